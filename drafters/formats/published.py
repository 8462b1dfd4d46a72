"""Which layouts are read and written, and how a layout becomes a bundle.

A layout of another drafter is one file with its functions, and its lines in ``READERS`` and
``WRITERS``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from buffer.bundles import Bundle, prepare_bundle
from buffer.fingerprint import target_fingerprint
from buffer.manifest import TENSORS
from buffer.records import Manifest
from buffer.sealed import plain
from drafters.catalog import CATALOG
from drafters.formats.checkpoint import (
    FLOATING,
    Checkpoint,
    read_checkpoint,
    read_config,
    write_checkpoint,
)
from drafters.trainable import trainable
from targets.fits import num_positions
from targets.head import load_target_head
from targets.tokenizer import copy_tokenizer

EMBEDDING = "embed_tokens.weight"
"""A drafter's embedding table, in all layouts of its own."""
_MAX_POSITIONS = 32_768
"""What an exported config says of a target that does not say."""

Wanted = dict[str, tuple[tuple[int, ...], set[str]]]
"""Name -> shape and dtype tags of a tensor."""
_TOLERANCE = 2**-8
"""Relative difference of two embedding tables that are the same up to rounding to bfloat16."""


@dataclass(frozen=True, slots=True)
class Imported:
    """What a bundle is made of."""

    kind: str
    """Of the drafter."""
    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class TargetTable:
    """What a layout is compared with, or says of the target."""

    name: str
    """As the user gave it."""
    folder: Path
    config: Any
    """Hugging Face text config."""
    architectures: tuple[str, ...]
    embed_VH: Tensor
    """float32, as stored."""

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.embed_VH.shape[0])

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.embed_VH.shape[1])

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def max_positions(self) -> int:
        """What an exported config says of the positions that the target has."""
        return num_positions(self.config) or _MAX_POSITIONS

    def check_embedding(self, checkpoint: Checkpoint, but: int | None = None) -> None:
        """Refuse an embedding table of its own, if there is one: drafters here read the target's.

        Args:
            but: a row that may differ.

        Raises:
            FormatError: ``EMBEDDING`` is there, and is not the target's table.
        """
        if EMBEDDING not in checkpoint.files:
            return
        checkpoint.expect(EMBEDDING, (self.vocab_size, self.hidden_size), FLOATING)
        theirs = checkpoint.read(EMBEDDING).float()
        if but is not None:
            theirs = theirs.index_copy(0, torch.tensor([but]), self.embed_VH[but : but + 1])
        if (theirs - self.embed_VH).norm() > _TOLERANCE * self.embed_VH.norm():
            raise checkpoint.error(
                f"{EMBEDDING} is not the target's table: a drafter with an embedding of its own is "
                f"not supported"
            )

    def speculators_config(self, algorithm: str, num_draft: int) -> dict[str, Any]:
        """What ``speculators`` says of an algorithm and its target."""
        return {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": num_draft,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": self.name, "architectures": list(self.architectures)},
        }


def load_target_table(name: str, folder: Path) -> TargetTable:
    """Read what layouts need of the target in ``folder``.

    Raises:
        ValueError: see ``load_target_head``.
    """
    head = load_target_head(folder, torch.device("cpu"), torch.float32)
    given = read_config(folder)
    architectures = tuple(given.get("architectures") or ())
    stored_VH = head.embed_VH / (head.embed_scale or 1.0)
    return TargetTable(name, folder, head.config, architectures, stored_VH)


@dataclass(frozen=True, slots=True)
class Reader:
    """One layout; functions as ``module:name``."""

    what: str
    """As a message names it."""
    is_it: str
    """(checkpoint) -> whether it is in this layout."""
    read: str
    """(checkpoint, target) -> ``Imported``."""


_EAGLE3, _MTP = "drafters.formats.eagle3:", "drafters.formats.mtp:"
_DFLASH, _P_EAGLE = "drafters.formats.dflash:", "drafters.formats.p_eagle:"
READERS = (
    Reader("P-EAGLE", _P_EAGLE + "is_published", _P_EAGLE + "from_published"),
    Reader("LlamaForCausalLMEagle3", _EAGLE3 + "is_published", _EAGLE3 + "from_published"),
    Reader("eagle3 of speculators", _EAGLE3 + "is_speculators", _EAGLE3 + "from_speculators"),
    Reader("DFlashDraftModel", _DFLASH + "is_published", _DFLASH + "from_published"),
    Reader("dflash of speculators", _DFLASH + "is_speculators", _DFLASH + "from_speculators"),
    Reader("mtp of speculators", _MTP + "is_speculators", _MTP + "from_speculators"),
    Reader("a target with MTP heads", _MTP + "is_carrier", _MTP + "from_carrier"),
)
WRITERS = {
    ("eagle3", "hf"): _EAGLE3 + "to_published",
    ("eagle3", "speculators"): _EAGLE3 + "to_speculators",
    ("dflash", "hf"): _DFLASH + "to_published",
    ("dflash", "speculators"): _DFLASH + "to_speculators",
    ("p_eagle", "hf"): _P_EAGLE + "to_published",
    ("p_eagle", "speculators"): _P_EAGLE + "to_speculators",
    ("mtp", "hf"): _MTP + "to_carrier",
    ("mtp", "speculators"): _MTP + "to_speculators",
    ("draft_model", "hf"): "drafters.formats.draft_model:to_published",
}
"""(Kind, layout) -> (config, tensors, target) -> ``config.json`` and tensors."""
LAYOUTS = ("hf", "speculators")


def read_drafter(checkpoint: Checkpoint, target: TargetTable) -> Imported:
    """The drafter in a published folder, checked as the server will check it.

    Raises:
        FormatError: the layout is not known, or the first key or shape that does not fit.
    """
    try:
        reader = _reader_of(checkpoint)
        found: Imported = pkgutil.resolve_name(reader.read)(checkpoint, target)
        trainable(found.kind).check(found.config, found.tensors)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
        # JSON may hold anything anywhere.
        raise checkpoint.error(f"config.json holds a value of a wrong type: {error}") from None
    return found


def _reader_of(checkpoint: Checkpoint) -> Reader:
    for reader in READERS:
        if pkgutil.resolve_name(reader.is_it)(checkpoint):
            return reader
    known = "; ".join(reader.what for reader in READERS)
    given = checkpoint.config.get("architectures")
    raise checkpoint.error(
        f"it is in none of the layouts that are read ({known}); its architectures are {given}"
    )


def imported(source: Path, target: TargetTable) -> tuple[Manifest, dict[str, bytes]]:
    """The bundle, version 0, of a published drafter.

    Raises:
        FormatError: see ``read_drafter``.
        ValueError: a tensor holds NaN or infinity.
    """
    found = read_drafter(read_checkpoint(source), target)
    fingerprint = target_fingerprint(target.folder)
    manifest = Manifest(0, None, found.kind, found.config, fingerprint, {})
    checked, files = prepare_bundle(manifest, {TENSORS: save(found.tensors)})
    return checked, {name: bytes(plain(content)) for name, content in files.items()}


def export(bundle: Bundle, layout: str, target: TargetTable, folder: Path) -> None:
    """Write a bundle's drafter in another layout; with the target's tokenizer, if it is a model of
    its own.

    Raises:
        ValueError: its kind has no such layout, or it was made for another target.
        OSError: the folder cannot be written.
    """
    manifest = bundle.manifest
    writer = WRITERS.get((manifest.kind, layout))
    if writer is None:
        has = [name for kind, name in WRITERS if kind == manifest.kind]
        raise ValueError(
            f"a drafter of kind {manifest.kind!r} cannot be written as {layout!r}; its layouts: "
            f"{', '.join(has) or 'none'}"
        )
    if manifest.target_fingerprint != target_fingerprint(target.folder):
        raise ValueError(
            f"the drafter was made for target {manifest.target_fingerprint[:12]}, not for "
            f"{target.name}; set `target` to the one it belongs to"
        )
    tensors = load(bundle.files[TENSORS])
    trainable(manifest.kind).check(manifest.drafter_config, tensors)
    make: Callable[..., tuple[Mapping[str, Any], dict[str, Tensor]]] = pkgutil.resolve_name(writer)
    config, published = make(manifest.drafter_config, tensors, target)
    write_checkpoint(folder, config, published)
    if CATALOG[manifest.kind].is_model:
        copy_tokenizer(target.folder, folder)
