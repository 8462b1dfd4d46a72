"""Looks for text, token ids and hidden rows in files, in every form that a program might write."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = ("<i4", ">i4", "<i8", ">i8", "<u2", ">u2", "<f4", "<f8")


def forms_of_ids(ids: Sequence[int]) -> list[bytes]:
    """Some token ids in a row: as integers and floats of all widths, as text, and in base 64."""
    values = np.asarray(ids)
    binary = [values.astype(dtype).tobytes() for dtype in _DTYPES]
    text = [mark.join(map(str, ids)).encode() for mark in (",", ", ", " ", "\n", ",\n", ":", "-")]
    return [*binary, *text, *(form for one in binary[:3] for form in _in_base64(one))]


def forms_of_rows(bits: np.ndarray[Any, Any]) -> list[bytes]:
    """Some bfloat16 values of a hidden row, as they are captured and as float32."""
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    return [bits.tobytes(), bits.byteswap().tobytes(), wide.tobytes(), *_in_base64(bits.tobytes())]


def forms_of_text(text: str) -> list[bytes]:
    """A text in the usual encodings."""
    plain = text.encode()
    return [plain, text.encode("utf-16-le"), plain.hex().encode(), *_in_base64(plain)]


def hits(paths: Iterable[Path], forms: Iterable[bytes]) -> list[tuple[Path, bytes]]:
    """Which files hold which of these."""
    wanted = list(forms)
    found = []
    for path in paths:
        content = path.read_bytes()
        found += [(path, form) for form in wanted if form in content]
    return found


def files_of(folder: Path, pids: Iterable[int] = ()) -> Iterator[Path]:
    """Regular files under a folder, and those that these processes have open, deleted ones too."""
    for place, _, names in os.walk(folder):
        yield from (path for name in names if (path := Path(place, name)).is_file())
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            target = Path(os.readlink(link))
            if link.is_file() and not str(target).startswith(("/dev/", "/proc/", "/sys/")):
                yield link


def _in_base64(content: bytes) -> list[bytes]:
    """What a piece of base 64 of something that holds ``content`` would contain."""
    return [base64.b64encode(content[skip:])[:-4] for skip in range(3)]
