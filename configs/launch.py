"""Settings of the section ``launch``: where a trainer runs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from configs.section import Section

_NAME = r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
_LABEL = r"^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$"
_QUANTITY = r"^[1-9][0-9]{0,5}(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"


class SlurmSettings(Section):
    """The job of ``trainer launch --on slurm``."""

    partition: str | None = Field(None, pattern=_NAME)
    """Partition of the job. ``None``: the cluster's default."""
    account: str | None = Field(None, pattern=_NAME)
    """Account that is charged. ``None``: the user's default."""
    time_limit: str | None = Field(None, pattern=r"^([0-9]{1,3}-)?[0-9]{1,3}(:[0-9]{2}){0,2}$")
    """Longest duration, as Slurm writes it: minutes, HH:MM:SS or D-HH:MM:SS. Two minutes before it
    the trainer is told to stop. ``None``: the partition's."""
    memory: str | None = Field(None, pattern=r"^[1-9][0-9]{0,6}[KMGT]?$")
    """Memory of each node, in MiB without a letter. ``None``: the partition's default."""


class KubernetesSettings(Section):
    """The Job of ``trainer launch --on kubernetes``."""

    image: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,255}$")
    """Container image with this package; it must be set."""
    namespace: str = Field("default", pattern=_LABEL)
    """Namespace of the Job."""
    claims: dict[str, str] = Field(default_factory=dict)
    """Volume claims by the path at which each is mounted. ``run_dir`` must be on one of them,
    because checkpoints outlive a pod; so must the target, unless its files are in the image."""
    env_secret: str | None = Field(None, pattern=_LABEL)
    """Secret whose entries are environment variables of the trainer, such as
    ``SLIPSTREAM_BUFFER__URL``. Settings that are secrets are never written into the manifest."""
    memory: str | None = Field(None, pattern=_QUANTITY)
    """Memory that each pod asks for, e.g. 32Gi."""


class LaunchSettings(Section):
    """Where ``trainer launch --on torchrun|deepspeed|slurm|kubernetes`` runs the trainer."""

    name: str = Field("slipstream-trainer", pattern=_LABEL)
    """Name of the job."""
    nodes: int = Field(1, ge=1, le=1024)
    """Hosts, or pods."""
    gpus_per_node: int = Field(1, ge=0, le=64)
    """GPUs of each host that are used. 0: it trains on CPUs, as with ``trainer.device: cpu``."""
    processes_per_node: int | None = Field(None, ge=1, le=64)
    """Processes on each host. ``None``: one for each GPU, or one."""
    cpus_per_process: int = Field(4, ge=1, le=256)
    """CPU cores that each process asks Slurm or Kubernetes for."""
    endpoint: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]{0,252}:[0-9]{1,5}$")
    """HOST:PORT at which the hosts of torchrun meet: the first of them. Needed with several hosts;
    the command is then given on each. Whoever reaches the port can join."""
    port: int = Field(29500, ge=1024, le=65535)
    """Port of the first host at which the processes meet in Slurm, Kubernetes and DeepSpeed."""
    hostfile: Path | None = None
    """DeepSpeed's list of hosts; needed with several."""
    slurm: SlurmSettings = SlurmSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
