"""``buffer keys``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from buffer.command_line import check_path, refusing
from buffer.signatures import write_key_pair


def keys(
    private: Annotated[
        Path, typer.Argument(help="new file for the private key, trainer.signing_key")
    ],
    public: Annotated[Path, typer.Argument(help="new file for the public key, swap.public_key")],
) -> None:
    """Make a pair of Ed25519 keys, with which a trainer signs versions of the drafter and servers
    recognise them.

    Exit code 0: both files were written. 2: one exists already, or cannot be written.
    """
    with refusing():
        check_path("the file of the private key", private)
        check_path("the file of the public key", public)
        write_key_pair(private, public)
    typer.echo(f"private key: {private} (only you may read it)\npublic key: {public}")
