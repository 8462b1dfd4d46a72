"""Where a trainer runs: on this host, on several through torchrun or DeepSpeed's launcher, as a
Slurm job, as a Kubernetes Job. Each is a plan: a command line, and the text that it reads.

All of them start ``trainer rank`` in every process. Slurm's script is the only shell text; what
comes from settings is quoted in it, and what a ``#SBATCH`` line holds is limited to harmless
characters by the settings' schema.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.launch import LaunchSettings
from configs.load import SECRETS, has_password, shown_override
from configs.schema import Settings

SETTINGS_FILE = "settings.yaml"
SETTINGS_FOLDER = "/etc/slipstream"
"""Of the settings in a pod."""
SHARED_MEMORY = "/dev/shm"
TORCHRUN_WAITS_S = 110
"""Seconds that torchrun gives its processes to end once it was told to; by default it kills them
after 30, which a checkpoint of a large drafter may take."""
TORCHRUN_WAITS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Variable that says so."""
_MOUNT = re.compile(r"/[^:\0/][^:\0]*")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be started."""

    settings: Settings
    configs: tuple[str, ...]
    """Values of ``--config``."""
    overrides: tuple[str, ...]
    """Values of ``--set``."""

    def options(self, cwd: Path) -> list[str]:
        """Options of ``trainer rank``; files that exist by their absolute path."""
        files = [
            str((cwd / one).resolve()) if (cwd / one).is_file() else one for one in self.configs
        ]
        pairs = [*(("--config", one) for one in files), *(("--set", one) for one in self.overrides)]
        return [word for pair in pairs for word in pair]


@dataclass(frozen=True, slots=True)
class Plan:
    """How it is started."""

    command: tuple[str, ...]
    text: str | None = None
    """Standard input of the command: a script or a manifest."""

    def shown(self) -> str:
        """What ``--dry-run`` prints: the text, or else the command line."""
        return self.text if self.text is not None else f"{_shown(self.command)}\n"


def local_command(job: Job, cwd: Path) -> list[str]:
    """One of several processes on this host."""
    return [sys.executable, "-m", "trainer", "rank", *job.options(cwd)]


def shown_locally(job: Job, size: int, cwd: Path) -> str:
    """What ``--on local`` starts: this process itself, or ``size`` others."""
    if size == 1:
        return f"{_shown([sys.executable, '-m', 'trainer', 'launch', *job.options(cwd)])}\n"
    line = _shown(local_command(job, cwd))
    return "".join(f"RANK={rank} WORLD_SIZE={size} {line}\n" for rank in range(size))


def _shown(command: Sequence[str]) -> str:
    """A command line without the secrets of its settings."""
    words = list(command)
    for index in range(1, len(words)):
        if words[index - 1] == "--set":
            words[index] = shown_override(words[index])
    return shlex.join(words)


def plan_for(place: str, job: Job, cwd: Path) -> Plan:
    """How to start a job somewhere else than in this process.

    Args:
        place: a key of ``PLACES``.

    Raises:
        ValueError: a setting that this place needs is missing.
    """
    return PLACES[place](job, cwd)


def num_gpus(settings: Settings) -> int:
    """GPUs that are used on each host: none by a trainer on CPUs."""
    return 0 if settings.trainer.device == "cpu" else settings.launch.gpus_per_node


def num_processes(settings: Settings) -> int:
    """Processes on each host."""
    return settings.launch.processes_per_node or max(num_gpus(settings), 1)


def check_gpus(settings: Settings) -> None:
    """Whether a job gets the GPUs that its processes will ask for: each takes the next one, from
    that of ``trainer.device`` on.

    Raises:
        ValueError: it does not.
    """
    device, count, processes = settings.trainer.device, num_gpus(settings), num_processes(settings)
    if not device.startswith("cuda") and not count:
        return
    first = int(device.partition(":")[2] or 0) if device.startswith("cuda") else 0
    if first + processes > count:
        raise ValueError(
            f"trainer.device is {device!r}, and the first of {processes} processes on each host "
            f"takes GPU {first}: a job of launch.gpus_per_node={settings.launch.gpus_per_node} has "
            f"too few. Its GPUs are its own and begin with 0: set trainer.device to cuda and "
            f"launch.gpus_per_node to the number of processes, or trainer.device to cpu"
        )


def _torchrun(job: Job, cwd: Path) -> Plan:
    launch = job.settings.launch
    if launch.nodes > 1 and launch.endpoint is None:
        raise ValueError(
            f"launch.nodes is {launch.nodes}: set launch.endpoint to HOST:PORT of the first host, "
            f"and give the same command on each of them"
        )
    meeting = ["--standalone"] if launch.nodes == 1 else _meeting(str(launch.endpoint), launch.name)
    return Plan((sys.executable, *_run(job.settings, meeting), *job.options(cwd)))


def _meeting(endpoint: str, name: str) -> list[str]:
    return ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", name]


def _run(settings: Settings, meeting: Sequence[str]) -> list[str]:
    """Arguments of Python that start the processes of one host."""
    nodes = str(settings.launch.nodes)
    sizes = ["--nnodes", nodes, "--nproc-per-node", str(num_processes(settings))]
    rank = ["--max-restarts", "0", "-m", "trainer", "rank"]
    return ["-m", "torch.distributed.run", *sizes, *meeting, *rank]


def _deepspeed(job: Job, cwd: Path) -> Plan:
    launch = job.settings.launch
    launcher = shutil.which("deepspeed") or shutil.which(
        "deepspeed", path=str(Path(sys.executable).parent)
    )
    if launcher is None:
        raise ValueError(
            "DeepSpeed's launcher is not installed: pip install 'slipstream-serving[deepspeed]', "
            "or use --on torchrun, which needs no DeepSpeed"
        )
    if launch.nodes > 1 and launch.hostfile is None:
        raise ValueError(
            f"launch.nodes is {launch.nodes}: set launch.hostfile to the list of hosts"
        )
    if launch.hostfile is not None and not launch.hostfile.is_file():
        raise ValueError(
            f"launch.hostfile {launch.hostfile} is no file: DeepSpeed would go on with this host "
            f"alone"
        )
    hosts = [] if launch.hostfile is None else ["--hostfile", str(launch.hostfile)]
    sizes = ["--num_nodes", str(launch.nodes), "--num_gpus", str(num_processes(job.settings))]
    rank = ["--master_port", str(launch.port), "--no_local_rank", "--module", "trainer", "rank"]
    return Plan((launcher, *hosts, *sizes, *rank, *job.options(cwd)))


def _slurm(job: Job, cwd: Path) -> Plan:
    settings, launch, slurm = job.settings, job.settings.launch, job.settings.launch.slurm
    check_gpus(settings)
    for one in job.overrides:
        if one.partition("=")[0] in SECRETS and has_password(one):
            raise ValueError(
                f"{one.partition('=')[0]} holds a secret, which a job's script must not: set it in "
                f"the environment, which sbatch passes on"
            )
    num_cpus = launch.cpus_per_process * num_processes(settings)
    wanted: dict[str, object | None] = {
        "job-name": launch.name,
        "nodes": launch.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": num_cpus,
        "gpus-per-node": num_gpus(settings) or None,
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time_limit,
        "mem": slurm.memory,
        "signal": f"TERM@{TORCHRUN_WAITS_S + 10}",
        "output": f"{launch.name}-%j.log",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in wanted.items() if value is not None]
    endpoint, number = '"$first:' + f'{launch.port}"', '"$SLURM_JOB_ID"'
    before = shlex.join([sys.executable, *_run(settings, ["MEETING"]), *job.options(cwd)])
    meeting = f"--rdzv-backend c10d --rdzv-endpoint {endpoint} --rdzv-id {number}"
    command = before.replace(" MEETING ", f" {meeting} ", 1)
    script = [
        "#!/bin/bash",
        *lines,
        "set -euo pipefail",
        f"export {TORCHRUN_WAITS}={TORCHRUN_WAITS_S}",
        # Not `scontrol | head`: head leaves first, and scontrol's SIGPIPE would end the job.
        'hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"',
        "first=\"${hosts%%$'\\n'*}\"",
        # srun does not take the number of cores from sbatch since 22.05: it would give each one.
        f"exec srun --cpus-per-task={num_cpus} --kill-on-bad-exit=1 {command}",
    ]
    return Plan(("sbatch",), "\n".join(script) + "\n")


def _kubernetes(job: Job, cwd: Path) -> Plan:
    settings = job.settings
    launch, kubernetes = settings.launch, settings.launch.kubernetes
    if kubernetes.image is None:
        raise ValueError("launch.kubernetes.image must name a container image with this package")
    if kubernetes.env_secret is None and has_password(f"buffer.url={settings.buffer.url}"):
        raise ValueError(
            "buffer.url holds a secret, which a manifest must not, and without it the job would "
            "read another buffer: put it into a Secret of the cluster as SLIPSTREAM_BUFFER__URL, "
            "and name that in launch.kubernetes.env_secret"
        )
    check_gpus(settings)
    _check_claims(kubernetes.claims)
    run_dir = Path(os.path.normpath(settings.run_dir))
    if not any(run_dir.is_relative_to(path) for path in kubernetes.claims):
        raise ValueError(
            f"run_dir {settings.run_dir} is on none of launch.kubernetes.claims: checkpoints would "
            f"end with their pod. Set, for example, launch.kubernetes.claims={{/runs: CLAIM}} and "
            f"run_dir=/runs/NAME"
        )
    documents = [_config_map(settings), _job(settings)]
    if launch.nodes > 1:
        documents.insert(0, _service(launch))
    text = yaml.safe_dump_all(documents, sort_keys=False, default_flow_style=False)
    return Plan(("kubectl", "apply", "-f", "-"), text)


def _check_claims(claims: Mapping[str, str]) -> None:
    """
    Raises:
        ValueError: Kubernetes would refuse one, or it would hide what a pod needs.
    """
    taken = (SETTINGS_FOLDER, SHARED_MEMORY)
    for path, claim in claims.items():
        wrong = None
        if not _MOUNT.fullmatch(path) or path != os.path.normpath(path):
            wrong = (
                "a claim is mounted at an absolute path below /, without '..', ':' or a / behind"
            )
        elif any(Path(one).is_relative_to(path) or Path(path).is_relative_to(one) for one in taken):
            wrong = f"{' and '.join(taken)} are mounted by the Job itself"
        elif not _CLAIM.fullmatch(claim):
            wrong = "the name of a claim has lower-case letters, digits, '-' and '.' alone"
        if wrong is not None:
            raise ValueError(f"launch.kubernetes.claims: {path!r}: {claim!r} cannot be: {wrong}")


def _named(kind: str, version: str, launch: LaunchSettings) -> dict[str, Any]:
    metadata = {
        "name": launch.name,
        "namespace": launch.kubernetes.namespace,
        "labels": {"app.kubernetes.io/name": launch.name},
    }
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _config_map(settings: Settings) -> dict[str, Any]:
    """The settings that are not defaults, without secrets."""
    tree = settings.model_dump(mode="json", exclude_defaults=True)
    for key in SECRETS:
        section, _, name = key.rpartition(".")
        own: dict[str, Any] = tree.get(section, {})
        if name in own and has_password(f"{key}={own[name]}"):
            del own[name]
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=False)
    return {**_named("ConfigMap", "v1", settings.launch), "data": {SETTINGS_FILE: text}}


def _service(launch: LaunchSettings) -> dict[str, Any]:
    """Gives the first pod a name that the others find before it is ready."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"job-name": launch.name},
        "ports": [{"name": "meeting", "port": launch.port}],
    }
    return {**_named("Service", "v1", launch), "spec": spec}


def _job(settings: Settings) -> dict[str, Any]:
    launch, kubernetes = settings.launch, settings.launch.kubernetes
    claims = {f"claim-{n}": item for n, item in enumerate(sorted(kubernetes.claims.items()))}
    mounts = [{"name": name, "mountPath": path} for name, (path, _) in claims.items()]
    volumes: list[dict[str, Any]] = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}}
        for name, (_, claim) in claims.items()
    ]
    mounts += [
        {"name": "settings", "mountPath": SETTINGS_FOLDER},
        {"name": "shared-memory", "mountPath": SHARED_MEMORY},
    ]
    volumes += [
        {"name": "settings", "configMap": {"name": launch.name}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    container: dict[str, Any] = {
        "name": "trainer",
        "image": kubernetes.image,
        "command": ["python", *_run(settings, _pods_meet(launch))],
        "args": ["--config", f"{SETTINGS_FOLDER}/{SETTINGS_FILE}"],
        "env": [{"name": TORCHRUN_WAITS, "value": str(TORCHRUN_WAITS_S)}],
        "resources": _resources(settings),
        "volumeMounts": mounts,
    }
    if kubernetes.env_secret is not None:
        container["envFrom"] = [{"secretRef": {"name": kubernetes.env_secret}}]
    pod = {
        "restartPolicy": "Never",
        "subdomain": launch.name,
        # They would be variables that begin with SLIPSTREAM_, which settings do, and be refused.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": TORCHRUN_WAITS_S + 10,
        "containers": [container],
        "volumes": volumes,
    }
    spec = {
        "completions": launch.nodes,
        "parallelism": launch.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 6 * launch.nodes,
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/name": launch.name}},
            "spec": pod,
        },
    }
    return {**_named("Job", "batch/v1", launch), "spec": spec}


def _pods_meet(launch: LaunchSettings) -> list[str]:
    if launch.nodes == 1:
        return ["--standalone"]
    return _meeting(f"{launch.name}-0.{launch.name}:{launch.port}", launch.name)


def _resources(settings: Settings) -> dict[str, Any]:
    launch = settings.launch
    asked: dict[str, Any] = {"cpu": str(launch.cpus_per_process * num_processes(settings))}
    if launch.kubernetes.memory is not None:
        asked["memory"] = launch.kubernetes.memory
    count = num_gpus(settings)
    gpus = {"nvidia.com/gpu": str(count)} if count else {}
    return {"requests": asked | gpus, "limits": gpus} if gpus else {"requests": asked}


PLACES: Mapping[str, Callable[[Job, Path], Plan]] = {
    "torchrun": _torchrun,
    "deepspeed": _deepspeed,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
}
"""Name of ``--on`` -> its plan."""
