"""Files that come with Slipstream: settings in the package, target and drafter in the repository.

A wheel holds the settings files and leaves out ``examples/``, which is 28 MB of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from configs.schema import Settings

BUNDLED_TARGET = "examples/target"
BUNDLED_DRAFTER = "examples/drafter/0"
REAL_TARGET = "runs/targets/SmolLM2-135M-Instruct.Q4_1.gguf"
"""The target of ``real.yaml``, which ``make real`` fetches into the repository."""

_PACKAGE = Path(__file__).resolve().parent
_REPOSITORY = _PACKAGE.parent


def shipped_settings() -> dict[str, Path]:
    """Settings files of the package, by the name that ``--config`` takes."""
    return {file.stem: file for file in sorted(_PACKAGE.glob("*.yaml"))}


def settings_file(name: Path) -> Path:
    """The shipped file that a bare name such as ``demo`` stands for; any other path unchanged."""
    return shipped_settings().get(str(name), name)


def resolve_paths(settings: Settings) -> Settings:
    """Replace ``target`` and ``drafter.path`` by absolute paths if only the repository has them."""
    drafter = settings.drafter.model_copy(
        update={
            "path": _resolved_path(settings.drafter.path),
            "beside": tuple(
                one.model_copy(update={"path": _resolved_path(one.path)})
                for one in settings.drafter.beside
            ),
        }
    )
    return settings.model_copy(update={"target": _resolved(settings.target), "drafter": drafter})


def missing_bundled(settings: Settings) -> Iterator[str]:
    """Messages for the targets and the drafter of shipped settings, where they are missing."""
    comes = "comes with Slipstream's repository and not with an installed package"
    if settings.target == BUNDLED_TARGET and not Path(BUNDLED_TARGET).exists():
        yield (
            f"target {BUNDLED_TARGET!r} is the bundled target, which {comes}; name another with "
            f"--set target=ORG/NAME (Hugging Face id) or --set target=FOLDER, or run in the "
            f"repository"
        )
    if settings.target == REAL_TARGET and not Path(REAL_TARGET).exists():
        yield (
            f"target {REAL_TARGET!r} has not been fetched; run `make real` in the repository, or "
            f"name another target with --set target=FILE.gguf"
        )
    if settings.drafter.path == Path(BUNDLED_DRAFTER) and not Path(BUNDLED_DRAFTER).exists():
        yield (
            f"drafter.path {BUNDLED_DRAFTER!r} is the bundled drafter, which {comes}; start from "
            f"random weights with --set drafter.path=null, name another with "
            f"--set drafter.path=FOLDER, or run in the repository"
        )


def _resolved_path(path: Path | None) -> Path | None:
    return None if path is None else Path(_resolved(str(path)))


def _resolved(path: str) -> str:
    """The path itself, unless it exists in the repository only."""
    if Path(path).is_absolute() or Path(path).exists() or not (_REPOSITORY / path).exists():
        return path
    return str(_REPOSITORY / path)
