"""Ways in which a bundle can be bad: each takes a sound one and returns one that must be refused.

Kinds of manifests and files are for every store; kinds of folders need a file system. What a kind
leaves open, such as the byte that flips, is drawn from a seeded generator.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from buffer.manifest import SCHEMA_VERSION, TENSORS
from buffer.tensors import join_tensors

Tensors = dict[str, tuple[str, Any]]


@dataclass(frozen=True)
class Given:
    """A bundle as it would be stored."""

    manifest: dict[str, Any]
    """Content of ``manifest.json``."""
    files: dict[str, bytes]
    text: bytes | None = None
    """Bytes of ``manifest.json``, if they are not those of ``manifest``."""

    @property
    def manifest_text(self) -> bytes:
        return json.dumps(self.manifest).encode() if self.text is None else self.text

    def having(self, **values: Any) -> Given:
        """With other values of the manifest."""
        return replace(self, manifest={**self.manifest, **values})

    def without(self, name: str) -> Given:
        """Without one key of the manifest."""
        return replace(self, manifest={k: v for k, v in self.manifest.items() if k != name})

    def file(self, content: bytes, name: str = TENSORS) -> Given:
        """With other content of one file, and digests that fit it."""
        digest = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)}
        files = {**self.manifest["files"], name: digest}
        return replace(self.having(files=files), files={**self.files, name: content})

    def digest(self, **values: Any) -> Given:
        """With another digest of the tensors than they have."""
        entry = {**self.manifest["files"][TENSORS], **values}
        return self.having(files={**self.manifest["files"], TENSORS: entry})

    def named(self, name: str) -> Given:
        """With one more file in the manifest, which is stored under a plain name."""
        entry = self.manifest["files"][TENSORS]
        return self.having(files={**self.manifest["files"], name: entry})

    def header(self, change: Callable[[dict[str, Any]], Any]) -> Given:
        """With a changed header of the tensors, and digests that fit."""
        blob = self.files[TENSORS]
        length = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + length])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
        return self.file(len(text).to_bytes(8, "little") + text + blob[8 + length :])


Kind = Callable[[Given, random.Random], Given]


class Payload:
    """Leaves a trace if anybody unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def sound_tensors(random: random.Random) -> Tensors:
    """Those of ``benchmarks.bad_bundles``'s drafter."""
    values = np.random.default_rng(random.getrandbits(32))
    return {
        "fc.weight": ("F32", values.standard_normal((8, 16)).astype(np.float32)),
        "norm": ("F32", values.standard_normal(8).astype(np.float32)),
    }


def _tensors(change: Callable[[Tensors], Any]) -> Kind:
    def bad(given: Given, random: random.Random) -> Given:
        tensors = sound_tensors(random)
        change(tensors)
        return given.file(join_tensors(tensors, {}))

    return bad


def _with_value(tag: str, dtype: Any, value: Any) -> Kind:
    """One tensor of this dtype holds the value somewhere."""

    def bad(given: Given, random: random.Random) -> Given:
        tensors = sound_tensors(random)
        bits = np.zeros((8, 16), dtype)
        bits.reshape(-1)[random.randrange(bits.size)] = value
        tensors["fc.weight"] = (tag, bits)
        return given.file(join_tensors(tensors, {}))

    return bad


def _replaced(name: str, value: Any) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: value})


def _flipped(given: Given, random: random.Random) -> Given:
    content = bytearray(given.files[TENSORS])
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return replace(given, files={**given.files, TENSORS: bytes(content)})


def _cut(given: Given, random: random.Random) -> Given:
    content = given.files[TENSORS]
    return replace(given, files={TENSORS: content[: random.randrange(len(content))]})


def _cut_with_digest(given: Given, random: random.Random) -> Given:
    content = given.files[TENSORS]
    return given.file(content[: random.randrange(len(content))])


def _entry(change: Callable[[dict[str, Any]], Any]) -> Kind:
    """The header's entry of one tensor is changed."""

    def in_header(header: dict[str, Any]) -> None:
        change(header["fc.weight"])

    return lambda given, random: given.header(in_header)


def _text(text: bytes) -> Kind:
    return lambda given, random: replace(given, text=text)


def _manifest_text(change: Callable[[bytes], bytes]) -> Kind:
    return lambda given, random: replace(given, text=change(given.manifest_text))


def _value(**values: Any) -> Kind:
    return lambda given, random: given.having(**values)


def _pickled(protocol: int) -> Kind:
    return lambda given, random: given.file(pickle.dumps(Payload(Path(MARKER)), protocol))


def _numpy_object(given: Given, random: random.Random) -> Given:
    out = io.BytesIO()
    array = np.array([Payload(Path(MARKER))], dtype=object)
    np.save(out, array, allow_pickle=True)
    return given.file(out.getvalue())


def _torch_file(given: Given, random: random.Random) -> Given:
    import torch

    out = io.BytesIO()
    torch.save({"fc.weight": Payload(Path(MARKER))}, out)
    return given.file(out.getvalue())


MARKER = "/tmp/slipstream-unpickled"
"""Folder that exists once somebody has unpickled one of the bundles."""
_NAMES = {
    "above": "../outside.json",
    "far above": "../../../../etc/passwd.json",
    "absolute": "/etc/hostname.json",
    "folder inside": "sub/x.json",
    "back and forth": "x/../../y.json",
    "dots": "..",
    "hidden": ".x.json",
    "backslash": "..\\x.json",
    "zero byte": "x\0.json",
    "newline": "x\n.json",
    "other ending": "x.pt",
    "pickle ending": "x.pkl",
    "no ending": "x",
    "too long": "x" * 200 + ".json",
    "look-alike": "x․json",
    "the manifest itself": "manifest.json",
    "empty": "",
}

MANIFESTS: dict[str, Kind] = {
    "empty": _text(b""),
    "no JSON": _text(b"{"),
    "no UTF-8": _text(b'{"schema": "\xff"}'),
    "a list": _text(b"[]"),
    "null": _text(b"null"),
    "deep": _text(b"[" * 100_000),
    "deep objects": _text(b'{"a":' * 50_000),
    "pickle": _text(pickle.dumps(Payload(Path(MARKER)))),
    "over a megabyte": _manifest_text(lambda text: text + b" " * (1 << 20)),
    "key twice": _manifest_text(lambda text: b'{"version": 0, ' + text[1:]),
    "digest twice": _manifest_text(lambda t: t.replace(b'"sha256"', b'"sha256": "", "sha256"')),
    "NaN": _manifest_text(lambda text: text.replace(b"2.5", b"NaN")),
    "infinity": _manifest_text(lambda text: text.replace(b"2.5", b"1e999")),
    "another schema": _value(schema="slipstream.trace"),
    "newer schema": _value(schema_version=SCHEMA_VERSION + 1),
    "schema 0": _value(schema_version=0),
    "schema true": _value(schema_version=True),
    **{
        f"without {name}": (lambda given, random, name=name: given.without(name))
        for name in (
            "schema", "schema_version", "version", "parent", "kind", "drafter_config",
            "target_fingerprint", "files", "gate", "policy", "created_unix_ms", "signature",
        )
    },
    "version going back": lambda given, random: given.having(version=0, parent=None),
    "version ahead": lambda given, random: given.having(version=given.manifest["version"] + 1),
    "negative version": _value(version=-1),
    "version true": _value(version=True),
    "version a text": lambda given, random: given.having(version=str(given.manifest["version"])),
    "version a real": lambda given, random: given.having(version=given.manifest["version"] + 0.0),
    "huge version": _value(version=10**30),
    "parent itself": lambda given, random: given.having(parent=given.manifest["version"]),
    "negative parent": _value(parent=-1),
    "parent a text": _value(parent="0"),
    "another kind": _value(kind="another"),
    "kind a number": _value(kind=1),
    "another target": _value(target_fingerprint="cd" * 32),
    "no target": _value(target_fingerprint=None),
    "another shape": _value(drafter_config={"hidden_size": 32}),
    "more in the shape": _value(drafter_config={"hidden_size": 16, "auto_map": "evil.Model"}),
    "shape a list": _value(drafter_config=[]),
    "gate a list": _value(gate=[2.5]),
    "policy a text": _value(policy="x"),
    "time a text": _value(created_unix_ms="now"),
    "signature a number": _value(signature=1),
    "signature too long": _value(signature="x" * 5000),
    "no files": _value(files={}),
    "files a list": _value(files=[TENSORS]),
    "entry a text": _value(files={TENSORS: "x"}),
    "a file that is missing": lambda given, random: given.named("policy.json"),
    "wrong digest": lambda given, random: given.digest(sha256="ab" * 32),
    "short digest": lambda given, random: given.digest(sha256="ab"),
    "digest a number": lambda given, random: given.digest(sha256=1),
    "size too small": lambda given, random: given.digest(num_bytes=1),
    "size too large": lambda given, random: given.digest(num_bytes=1 << 20),
    "size of a terabyte": lambda given, random: given.digest(num_bytes=1 << 40),
    "size below the bound": lambda given, random: given.digest(num_bytes=15 << 30),
    "negative size": lambda given, random: given.digest(num_bytes=-1),
    "size true": lambda given, random: given.digest(num_bytes=True),
    "size a real": lambda given, random: given.digest(num_bytes=1.5),
    **{
        f"file name: {what}": (lambda given, random, name=name: given.named(name))
        for what, name in _NAMES.items()
    },
}  # fmt: skip
"""Wrong manifests; all else is sound."""

FILES: dict[str, Kind] = {
    "a flipped bit": _flipped,
    "cut short": _cut,
    "cut short, digest fits": _cut_with_digest,
    "a byte too many": lambda given, random: replace(
        given, files={TENSORS: given.files[TENSORS] + b"x"}
    ),
    "a byte too many, digest fits": lambda given, random: given.file(
        given.files[TENSORS] + b"x"
    ),
    "no tensors file": lambda given, random: replace(given, files={}),
    "empty": lambda given, random: given.file(b""),
    "text": lambda given, random: given.file(b"not tensors"),
    **{f"pickle, protocol {n}": _pickled(n) for n in range(6)},
    "torch.save": _torch_file,
    "numpy with objects": _numpy_object,
    "NaN": _with_value("F32", np.float32, np.nan),
    "infinity": _with_value("F32", np.float32, np.inf),
    "minus infinity": _with_value("F32", np.float32, -np.inf),
    "NaN in float64": _with_value("F64", np.float64, np.nan),
    "NaN in float16": _with_value("F16", np.float16, np.nan),
    "NaN in bfloat16": _with_value("BF16", np.uint16, 0x7FC1),
    "infinity in bfloat16": _with_value("BF16", np.uint16, 0xFF80),
    "too large for float32": _with_value("F64", np.float64, 1e300),
    "another shape": _tensors(_replaced("fc.weight", ("F32", np.ones((16, 8), np.float32)))),
    "flat": _tensors(_replaced("fc.weight", ("F32", np.ones(128, np.float32)))),
    "one row more": _tensors(_replaced("fc.weight", ("F32", np.ones((9, 16), np.float32)))),
    "no rows": _tensors(_replaced("norm", ("F32", np.ones(0, np.float32)))),
    "one tensor missing": _tensors(lambda tensors: tensors.pop("norm")),
    "one tensor more": _tensors(_replaced("more", ("F32", np.ones(1, np.float32)))),
    "another name": _tensors(lambda tensors: tensors.update({"norm2": tensors.pop("norm")})),
    "no tensor at all": _tensors(lambda tensors: tensors.clear()),
    "integers": _tensors(_replaced("norm", ("I32", np.ones(8, np.int32)))),
    "long integers": _tensors(_replaced("norm", ("I64", np.ones(8, np.int64)))),
    "bytes": _tensors(_replaced("norm", ("U8", np.ones(8, np.uint8)))),
    "fp8": _tensors(_replaced("norm", ("F8_E4M3", np.ones(8, np.uint8)))),
    "too many tensors": _tensors(
        lambda t: t.update({f"t{n}": ("U8", np.ones(1, np.uint8)) for n in range(5000)})
    ),
    "header: a length beyond the file": lambda given, random: given.file(
        (1 << 62).to_bytes(8, "little") + given.files[TENSORS][8:]
    ),
    "header: the largest length": lambda given, random: given.file(
        b"\xff" * 8 + given.files[TENSORS][8:]
    ),
    "header: over a megabyte": lambda given, random: given.header(
        lambda header: json.dumps(header).encode() + b" " * (1 << 20)
    ),
    "header: no JSON": lambda given, random: given.header(lambda header: b"{nothing"),
    "header: a list": lambda given, random: given.header(lambda header: b"[1]"),
    "header: deep": lambda given, random: given.header(lambda header: b"[" * 100_000),
    "header: a tensor twice": lambda given, random: given.header(
        lambda header: b'{"norm": ' + json.dumps(header["norm"]).encode() + b", "
        + json.dumps(header).encode()[1:]
    ),
    "header: NaN": lambda given, random: given.header(lambda header: b'{"__metadata__": NaN}'),
    "header: metadata a number": lambda given, random: given.header(
        lambda header: {**header, "__metadata__": {"a": 1}}
    ),
    "header: negative offset": _entry(lambda entry: entry.update(data_offsets=[-512, 0])),
    "header: offsets beyond the end": _entry(
        lambda entry: entry.update(data_offsets=[1 << 40, (1 << 40) + 512])
    ),
    "header: offsets in reverse": _entry(lambda entry: entry["data_offsets"].reverse()),
    "header: two tensors at one place": lambda given, random: given.header(
        lambda header: {**header, "norm": {**header["norm"], "data_offsets": [0, 32]}}
    ),
    "header: a gap": lambda given, random: given.header(
        lambda header: {**header, "norm": {**header["norm"], "data_offsets": [516, 548]}}
    ),
    "header: unknown dtype": _entry(lambda entry: entry.update(dtype="OBJECT")),
    "header: dtype of another size": _entry(lambda entry: entry.update(dtype="BF16")),
    "header: negative shape": _entry(lambda entry: entry.update(shape=[-8, -16])),
    "header: a shape that overflows": _entry(lambda entry: entry.update(shape=[1 << 61, 16])),
    "header: a shape of reals": _entry(lambda entry: entry.update(shape=[8.0, 16.0])),
    "header: a shape of truths": _entry(lambda entry: entry.update(shape=[True, 128])),
    "header: more in an entry": _entry(lambda entry: entry.update(code="import os")),
}  # fmt: skip
"""Wrong files; the manifest fits them unless the kind says otherwise."""


def _link_to(path: Path, aside: Path) -> None:
    path.rename(aside)
    path.symlink_to(aside)


FOLDERS: dict[str, Callable[[Path, Path], object]] = {
    "tensors are a link": lambda path, aside: _link_to(path / TENSORS, aside),
    "the manifest is a link": lambda path, aside: _link_to(path / "manifest.json", aside),
    "the folder is a link": _link_to,
    "tensors are a folder": lambda path, aside: (
        (path / TENSORS).unlink(), (path / TENSORS).mkdir()
    ),
    "tensors are a pipe": lambda path, aside: (
        (path / TENSORS).unlink(), os.mkfifo(path / TENSORS)
    ),
    "the manifest is a pipe": lambda path, aside: (
        (path / "manifest.json").unlink(), os.mkfifo(path / "manifest.json")
    ),
    "no manifest": lambda path, aside: (path / "manifest.json").unlink(),
    "a program beside it": lambda path, aside: (path / "modeling.py").write_text("import os"),
    "a pickle beside it": lambda path, aside: (path / "x.pkl").write_bytes(
        pickle.dumps(Payload(Path(MARKER)))
    ),
    "a terabyte of holes": lambda path, aside: _of_holes(path, 1 << 40),
    "fifteen gigabytes of holes": lambda path, aside: _of_holes(path, 15 << 30),
}  # fmt: skip
"""Wrong folders: (folder of a sound bundle, a free path beside it)."""


def _of_holes(path: Path, num_bytes: int) -> None:
    os.truncate(path / TENSORS, num_bytes)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"][TENSORS]["num_bytes"] = num_bytes
    (path / "manifest.json").write_text(json.dumps(manifest))
