"""What ``trainer launch --on ...`` starts, checked by those who would run it: Slurm's own sbatch
against a controller of its own, Kubernetes' published schemas, bash and torchrun's parser."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from configs.load import load_settings
from trainer.cli import app
from trainer.places import Job, plan_for

NASTY = "runs/a b'$(touch owned);\"`id`"
"""A folder whose name a shell would execute, were it not quoted."""
CLAIM = "launch.kubernetes.claims={/runs: claim}"
IMAGE = "launch.kubernetes.image=registry.example/slipstream:1"
POD = (CLAIM, IMAGE, "run_dir=/runs/one")


def job_of(*overrides: str, configs: tuple[str, ...] = ()) -> Job:
    settings = load_settings([Path(one) for one in configs], overrides, {})
    return Job(settings, configs, overrides)


def documents_of(*overrides: str) -> dict[str, Any]:
    """The manifest's documents by kind."""
    text = plan_for("kubernetes", job_of(*overrides), Path("/")).text
    return {one["kind"]: one for one in yaml.safe_load_all(text or "")}


@pytest.mark.parametrize("nodes", [1, 3])
def test_the_manifest_is_valid_for_kubernetes(nodes: int) -> None:
    more = (f"launch.nodes={nodes}", "launch.gpus_per_node=2", "launch.kubernetes.memory=32Gi")
    found = documents_of(*POD, *more, "launch.kubernetes.env_secret=redis")

    for document in found.values():
        kubernetes_validate.validate(document, "1.37", strict=True)
    assert set(found) == {"Job", "ConfigMap", *(["Service"] if nodes > 1 else [])}
    spec = found["Job"]["spec"]
    assert (spec["completions"], spec["parallelism"]) == (nodes, nodes)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2"}
    assert container["envFrom"] == [{"secretRef": {"name": "redis"}}]
    options = get_args_parser().parse_args([*container["command"][3:], *container["args"]])
    assert (options.nnodes, options.nproc_per_node) == (str(nodes), "2")
    assert options.training_script_args == ["rank", "--config", "/etc/slipstream/settings.yaml"]
    assert options.standalone == (nodes == 1)
    (waits,) = container["env"]
    grace_s = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert 60 < int(waits["value"]) < grace_s  # torchrun would kill it after 30
    assert waits["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


def test_a_trainer_on_cpus_asks_for_no_gpu() -> None:
    found = documents_of(*POD, "trainer.device=cpu", "launch.processes_per_node=3")["Job"]

    (container,) = found["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {"requests": {"cpu": "12"}}
    options = get_args_parser().parse_args(container["command"][3:])
    assert options.nproc_per_node == "3"
    assert "gpus-per-node" not in script_of("trainer.device=cpu")
    assert "--gpus-per-node=1" in script_of()


def test_a_manifest_that_kubernetes_would_refuse_fails_this_check() -> None:
    job = documents_of(*POD)["Job"]
    job["spec"]["template"]["spec"]["containers"][0]["imagePullPolices"] = "Always"

    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_the_settings_in_a_manifest_are_those_of_the_command_without_its_secrets(
    tmp_path: Path,
) -> None:
    secrets = ("buffer.url=redis://:hunter2@host/0", "server.api_key=hunter3")
    secret = "launch.kubernetes.env_secret=redis"
    found = documents_of(*POD, "trainer.lr=0.5", secret, *secrets)
    text = found["ConfigMap"]["data"]["settings.yaml"]
    (tmp_path / "settings.yaml").write_text(text)

    assert "hunter" not in yaml.safe_dump_all(found.values())
    read = load_settings([tmp_path / "settings.yaml"], (), {})
    assert read.trainer.lr == 0.5
    assert read.run_dir == Path("/runs/one")
    # It would describe the service in variables that begin with SLIPSTREAM_, as settings do.
    assert found["Job"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize(
    ("place", "overrides", "message"),
    [
        ("kubernetes", (CLAIM, "run_dir=/runs/x"), "launch.kubernetes.image must name"),
        ("kubernetes", (IMAGE, "run_dir=/runs/x"), "is on none of launch.kubernetes.claims"),
        ("kubernetes", (IMAGE, CLAIM, "run_dir=/runs-x/x"), "is on none of"),
        ("kubernetes", (IMAGE, CLAIM, "run_dir=/runs/../x"), "run_dir /runs/../x is on none of"),
        ("kubernetes", (IMAGE, "launch.kubernetes.claims={runs: claim}"), "an absolute path"),
        ("kubernetes", (IMAGE, "launch.kubernetes.claims={/runs/: claim}"), "an absolute path"),
        ("kubernetes", (IMAGE, "launch.kubernetes.claims={/: claim}"), "an absolute path"),
        ("kubernetes", (IMAGE, "launch.kubernetes.claims={/dev: claim}"), "mounted by the Job"),
        ("kubernetes", (IMAGE, "launch.kubernetes.claims={/etc/slipstream/x: c}"), "by the Job"),
        ("kubernetes", (IMAGE, "launch.kubernetes.claims={/runs: A claim}"), "lower-case letters"),
        ("kubernetes", (*POD, "trainer.device=cuda:1"), "takes GPU 1: a job of launch.gpus_per"),
        ("slurm", ("trainer.device=cuda:1", "device=cuda:0"), "takes GPU 1: a job of launch.gpus"),
        ("slurm", ("trainer.device=cuda", "launch.gpus_per_node=0"), "gpus_per_node=0 has too few"),
        ("slurm", ("launch.processes_per_node=3", "launch.gpus_per_node=2"), "has too few"),
        ("slurm", ("trainer.loss=mse",), "trainer.loss 'mse' is unknown; known: forward_kl"),
        ("deepspeed", ("launch.hostfile=/no/hosts",), "launch.hostfile /no/hosts is no file"),
        ("torchrun", ("trainer.draw=turn",), "trainer.draw 'turn' is unknown"),
        ("local", ("trainer.device=gpu",), "trainer.device must be auto, cpu, cuda or cuda:N"),
        ("torchrun", ("launch.nodes=2",), "set launch.endpoint to HOST:PORT"),
        ("slurm", ("buffer.url=redis://:pw@host/0",), "buffer.url holds a secret"),
        ("kubernetes", (*POD, "buffer.url=redis://:pw@host/0"), "in launch.kubernetes.env_secret"),
    ],
)
def test_what_a_place_lacks_is_named(place: str, overrides: tuple[str, ...], message: str) -> None:
    sets = [word for one in overrides for word in ("--set", one)]

    result = CliRunner().invoke(app, ["launch", "--on", place, "--dry-run", *sets])

    assert result.exit_code == 2
    assert message in result.stderr
    assert "pw@" not in result.output


@pytest.mark.parametrize(
    "override",
    [
        "launch.name=a;rm -rf /",
        "launch.name=UPPER",
        "launch.slurm.partition=$(id)",
        "launch.slurm.account=a b",
        "launch.slurm.time_limit=1h",
        "launch.slurm.memory=16GB x",
        "launch.kubernetes.image=a b",
        "launch.kubernetes.namespace=../x",
        "launch.endpoint=host:1;id",
        "launch.slurm.qos=x",
    ],
)
def test_names_that_could_be_more_than_names_are_refused(override: str) -> None:
    result = CliRunner().invoke(app, ["launch", "--on", "slurm", "--dry-run", "--set", override])

    assert result.exit_code == 2
    assert override.partition("=")[0] in result.stderr


def script_of(*overrides: str) -> str:
    text = plan_for("slurm", job_of(*overrides), Path("/")).text
    assert text is not None
    return text


def test_the_slurm_script_starts_torchrun_on_every_host_and_executes_nothing_it_is_given(
    tmp_path: Path,
) -> None:
    script = script_of("launch.nodes=2", "launch.gpus_per_node=4", f"run_dir={NASTY}")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for name, text in (
        ("srun", 'printf "%s\\0" "$@" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"'),
        ("scontrol", "echo first; seq 100000"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    ran = subprocess.run(
        ["bash"],
        input=script,
        text=True,
        check=True,
        capture_output=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_ID": "77",
        },
    )

    *words, waits_s = ran.stdout.split("\0")[:-1]
    assert f"#SBATCH --signal=TERM@{int(waits_s) + 10}\n" in script
    assert words[:2] == ["--cpus-per-task=16", "--kill-on-bad-exit=1"]
    assert words[2:5] == [sys.executable, "-m", "torch.distributed.run"]
    options = get_args_parser().parse_args(words[5:])
    assert (options.nnodes, options.nproc_per_node) == ("2", "4")
    assert (options.rdzv_endpoint, options.rdzv_id) == ("first:29500", "77")
    assert options.training_script_args[-1] == f"run_dir={NASTY}"
    assert not (tmp_path / "owned").exists()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a Slurm controller with four hosts of eight GPUs, which it believes in."""
    if shutil.which("sbatch") is None or shutil.which("slurmctld") is None:
        pytest.skip("Slurm is not installed (Debian: apt install slurmctld slurm-client)")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    ports = []
    for _ in range(2):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            ports.append(one.getsockname()[1])
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    (folder / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost={socket.gethostname().partition(".")[0]}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/pid
SlurmUser={user}
ProctrackType=proctrack/pgid
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=600
NodeName=node[1-4] CPUs=64 RealMemory=64000 Gres=gpu:8 State=CLOUD
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with (folder / "log").open("wb") as log:
        controller = subprocess.Popen(["slurmctld", "-D"], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(["sinfo"], env=environment, capture_output=True).returncode:
            assert controller.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield environment
    finally:
        controller.kill()
        controller.wait()


def submitted(environment: dict[str, str], script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sbatch", "--test-only"], input=script, text=True, env=environment, capture_output=True
    )


def test_slurm_takes_the_script(slurm: dict[str, str]) -> None:
    more = ("launch.slurm.partition=gpu", "launch.slurm.time_limit=1-02:00:00")
    script = script_of("launch.nodes=3", "launch.gpus_per_node=8", "launch.slurm.memory=32G", *more)

    taken = submitted(slurm, script)
    assert taken.returncode == 0, taken.stderr
    assert "on nodes node[1-3]" in taken.stderr
    assert submitted(slurm, script_of("launch.nodes=5")).returncode != 0
    assert submitted(slurm, script.replace("--nodes=", "--nodez=")).returncode != 0


def test_a_dry_run_prints_the_command_lines_and_starts_nothing(tmp_path: Path) -> None:
    (tmp_path / "my run.yaml").write_text("trainer: {lr: 0.5}\n")
    sets = ["--config", str(tmp_path / "my run.yaml"), "--set", f"run_dir={tmp_path / 'run'}"]

    def lines(*options: str) -> list[list[str]]:
        result = CliRunner().invoke(app, ["launch", "--dry-run", *options, *sets])
        assert result.exit_code == 0, result.output
        return [shlex.split(line) for line in result.stdout.splitlines()]

    (alone,) = lines()
    assert alone == [sys.executable, "-m", "trainer", "launch", *sets]
    both = lines("--processes", "2")
    assert [line[:2] for line in both] == [
        ["RANK=0", "WORLD_SIZE=2"],
        ["RANK=1", "WORLD_SIZE=2"],
    ]
    assert both[1][2:] == [sys.executable, "-m", "trainer", "rank", *sets]
    (torchrun,) = lines("--on", "torchrun", "--set", "launch.gpus_per_node=2")
    options = get_args_parser().parse_args(torchrun[3:])
    assert options.standalone and options.nproc_per_node == "2"
    assert not (tmp_path / "run").exists()
