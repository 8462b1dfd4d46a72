"""The package ``gguf``'s reader, faster. Importing this module imports that package."""

from __future__ import annotations

from typing import Any

import numpy as np
from gguf import GGUFReader


class Reader(GGUFReader):
    """Reads a GGUF file through an ordinary array over its memory map.

    The reader slices the map a million times for a vocabulary of 49,000 tokens, and each slice of
    a ``np.memmap`` runs Python code of its own: 4 s in place of 2.
    """

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)
