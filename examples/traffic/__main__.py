"""Say how many chat requests this installation yields, or write some to a file.

python -m examples.traffic                                  # how many there are
python -m examples.traffic --out prompts.jsonl --count 3000 # of each domain
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Annotated

import typer

from examples.traffic.chat import DOMAINS, chat_prompts, found_prompts
from examples.traffic.prompts import write_prompts


def main(
    out: Annotated[Path | None, typer.Option(help="JSONL file to write")] = None,
    count: Annotated[int, typer.Option(min=1, help="prompts of each domain")] = 3000,
    seed: int = 0,
) -> None:
    """Count or write chat requests made from what is installed."""
    started_s = time.perf_counter()
    if out is None:
        for domain, number in found_prompts(seed).items():
            typer.echo(f"{domain:>8}: {number:,} different prompts")
    else:
        try:
            found = chat_prompts(dict.fromkeys(DOMAINS, count), seed)
            write_prompts(out, itertools.chain.from_iterable(found.values()))
        except (ValueError, OSError) as error:
            raise typer.BadParameter(str(error)) from None
        typer.echo(f"{len(DOMAINS) * count:,} prompts in {out}")
    typer.echo(f"{time.perf_counter() - started_s:.1f} s")


if __name__ == "__main__":
    typer.run(main)
