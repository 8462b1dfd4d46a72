"""Thousands of bad bundles in every kind of weights store: is any of them loaded?

    python -m benchmarks.bad_bundles        # 10,000 bundles; some minutes on two cores

Every bundle is put into the store past all checks, as somebody who can write to it would, and given
to the server's own loader (``serving.swap.flat_weights.load_bundle``). It must be refused with a
reason; the weights in use must keep every bit; nothing may be unpickled, and no other error may
escape. Between them, sound bundles must load, or nothing would be shown. The kinds are in
``benchmarks/bundles/kinds.py``; ``signature`` kinds are sound but for their signature, and given to
a server with a public key.

Folders get every kind; Redis (Valkey from a package) and Kafka (noida-db) those that do not need a
file system. Writes ``bad_bundles.json`` and ``rows/bad_bundles.json`` in ``benchmarks/results``.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from benchmarks.bundles.kinds import (
    FILES,
    FOLDERS,
    MANIFESTS,
    MARKER,
    Given,
    Kind,
    sound_tensors,
)
from benchmarks.bundles.stores import InFolder, InKafka, InRedis, Target
from benchmarks.harness.results import RESULTS, Out, Row, at_least, say, write_result, write_rows
from buffer.manifest import TENSORS, decode_manifest, encode_manifest
from buffer.records import Manifest
from buffer.signatures import PublicKeys, SigningKey, read_signing_key, write_key_pair
from buffer.signed_weights import SignedWeights
from buffer.tensors import join_tensors
from buffer.weights_store import WeightsStore
from serving.swap.flat_weights import Expected, FlatWeights, RefusedError, load_bundle

SOURCE = "python -m benchmarks.bad_bundles"
KIND, TARGET = "small", "ab" * 32
EXPECTED = Expected(KIND, {"hidden_size": 16}, TARGET)
SOUND_EVERY = 50
"""After so many bad bundles a sound one must load."""


class Drafter(nn.Module):
    """The shapes that a sound bundle has."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8, bias=False)
        self.norm = nn.Parameter(torch.ones(8))


@dataclass(slots=True)
class Findings:
    """What became of the bundles of one store."""

    refused: Counter[str] = field(default_factory=Counter)
    """By reason."""
    kinds: Counter[str] = field(default_factory=Counter)
    loaded: list[str] = field(default_factory=list)
    """Kinds that were loaded: must stay empty."""
    errors: list[str] = field(default_factory=list)
    """Errors that no caller expects, and weights that changed: must stay empty."""
    sound_loaded: int = 0
    longest_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "bad": self.kinds.total(),
            "kinds": len(self.kinds),
            "by_kind": dict(sorted(self.kinds.items())),
            "refused": dict(sorted(self.refused.items())),
            "loaded": self.loaded,
            "errors": self.errors,
            "sound_loaded": self.sound_loaded,
            "longest_s": self.longest_s,
        }


@dataclass(frozen=True, slots=True)
class Keys:
    """Of the trainer whose versions the server takes, and of somebody else."""

    own: SigningKey
    other: SigningKey

    @property
    def public(self) -> PublicKeys:
        return self.own.public


def make_keys(folder: Path) -> Keys:
    """Two pairs in new files."""
    for name in ("own", "other"):
        write_key_pair(folder / f"{name}.key", folder / f"{name}.pub")
    return Keys(read_signing_key(folder / "own.key"), read_signing_key(folder / "other.key"))


def sound(version: int, random: random.Random) -> Given:
    """A bundle that loads."""
    manifest = Manifest(
        version, version - 1 if version else None, KIND, {"hidden_size": 16}, TARGET, {},
        gate={"tokens_per_step": 2.5}, created_unix_ms=1,
    )  # fmt: skip
    given = Given(json.loads(encode_manifest(manifest)), {})
    return given.file(join_tensors(sound_tensors(random), {}))


def signed(given: Given, key: SigningKey) -> Given:
    """The same with a signature."""
    manifest = key.signed(decode_manifest(given.manifest_text))
    return given.having(signature=manifest.signature)


def signature_kinds(keys: Keys) -> dict[str, Kind]:
    """Bundles whose only fault is their signature, and damaged ones that were signed before."""

    def other_version(given: Given, random: random.Random) -> Given:
        version = given.manifest["version"]
        theirs = signed(given.having(version=version + 1, parent=version), keys.own)
        return given.having(signature=theirs.manifest["signature"])

    def flipped(given: Given, random: random.Random) -> Given:
        text = signed(given, keys.own).manifest["signature"]
        place = len("ed25519:") + random.randrange(128)
        return given.having(
            signature=text[:place] + format(int(text[place], 16) ^ 1, "x") + text[place + 1 :]
        )

    def and_then(change: Callable[[Given, random.Random], Given]) -> Kind:
        return lambda given, random: change(signed(given, keys.own), random)

    return {
        "unsigned": lambda given, random: given,
        "another key": lambda given, random: signed(given, keys.other),
        "of another version": other_version,
        "a flipped digit": flipped,
        "no hex": lambda given, random: given.having(signature="ed25519:" + "x" * 128),
        "too short": lambda given, random: given.having(signature="ed25519:ab"),
        "empty": lambda given, random: given.having(signature=""),
        "another algorithm": lambda given, random: given.having(signature="none:" + "0" * 128),
        "gate changed": and_then(lambda given, _: given.having(gate={"tokens_per_step": 9.0})),
        "parent changed": and_then(lambda given, _: given.having(parent=None)),
        "policy changed": and_then(lambda given, _: given.having(policy={"acceptance": [1.0]})),
        "time changed": and_then(lambda given, _: given.having(created_unix_ms=2)),
        "tensors changed": and_then(
            lambda given, random: given.file(join_tensors(sound_tensors(random), {}))
        ),
        "a file more": and_then(lambda given, _: given.file(b"{}", "policy.json")),
        "a flipped bit in the tensors": and_then(FILES["a flipped bit"]),
    }


@dataclass(slots=True)
class Trial:
    """One store, one server's weights, and what was found."""

    target: Target
    random: random.Random
    keys: Keys
    findings: Findings = field(default_factory=Findings)
    weights: FlatWeights = field(default_factory=lambda: FlatWeights(Drafter()))
    version: int = 0

    def bad(self, kind: str, make: Kind, store: WeightsStore | None = None) -> None:
        """One bad bundle."""
        given = sound(self.version + 1, self.random)
        changed = make(given, self.random)
        as_stored = [(one.manifest_text, one.files) for one in (given, changed)]
        assert as_stored[0] != as_stored[1] or kind == "signature: unsigned", kind
        self._offer(kind, lambda version: self.target.plant(version, changed), store)

    def bad_folder(self, kind: str, harm: Callable[[Path, Path], object]) -> None:
        """One bad bundle whose folder is the fault."""
        assert isinstance(self.target, InFolder)
        target, given = self.target, sound(self.version + 1, self.random)

        def plant(version: int) -> None:
            target.plant(version, given)
            aside = target.root.parent / "aside"
            shutil.rmtree(aside, ignore_errors=True)
            aside.unlink(missing_ok=True)
            harm(target.path(version), aside)

        self._offer(kind, plant, None)

    def sound(self) -> None:
        """One sound bundle, with a signature: it must load, with and without a key."""
        self.version += 1
        given = signed(sound(self.version, self.random), self.keys.own)
        self.target.plant(self.version, given)
        for store in (self.target.store, self.signed_store()):
            staged = load_bundle(store, self.version, self.weights, EXPECTED)
            self.weights.take_over(staged.flat)
            self.findings.sound_loaded += 1
        self.target.remove(self.version)

    def signed_store(self) -> WeightsStore:
        """The store as a server with a public key has it."""
        return SignedWeights(self.target.store, self.keys.public, None)

    def _offer(self, kind: str, plant: Callable[[int], None], store: WeightsStore | None) -> None:
        self.version += 1
        plant(self.version)
        before = self.weights.flat.clone()
        started = time.monotonic()
        self.findings.kinds[kind] += 1
        try:
            load_bundle(store or self.target.store, self.version, self.weights, EXPECTED)
            self.findings.loaded.append(kind)
        except RefusedError as error:
            self.findings.refused[error.reason] += 1
        except BaseException as error:
            self.findings.errors.append(f"{kind}: {type(error).__name__}: {error}"[:300])
        self.findings.longest_s = max(self.findings.longest_s, time.monotonic() - started)
        if not torch.equal(before, self.weights.flat):
            self.findings.errors.append(f"{kind}: the weights in use changed")
        if Path(MARKER).exists():
            Path(MARKER).rmdir()
            self.findings.errors.append(f"{kind}: it was unpickled")
        self.target.remove(self.version)


def each_kind(trial: Trial) -> Iterator[Callable[[], None]]:
    """A call for each kind that fits the store."""
    for name, kind in MANIFESTS.items():
        if not (trial.target.name == "redis" and name == "no UTF-8"):  # its text is stored as JSON
            yield lambda name=name, kind=kind: trial.bad(f"manifest: {name}", kind)
    for name, kind in FILES.items():
        yield lambda name=name, kind=kind: trial.bad(f"tensors: {name}", kind)
    store = trial.signed_store()
    for name, kind in signature_kinds(trial.keys).items():
        yield lambda name=name, kind=kind: trial.bad(f"signature: {name}", kind, store)
    if isinstance(trial.target, InFolder):
        for name, harm in FOLDERS.items():
            yield lambda name=name, harm=harm: trial.bad_folder(f"folder: {name}", harm)


def offer(target: Target, num_bundles: int, seed: int, keys: Keys) -> Findings:
    """Offer so many bad bundles, all kinds in turn, with sound ones between them."""
    trial = Trial(target, random.Random(seed), keys)
    trial.sound()
    num = 0
    while num < num_bundles:
        for one in each_kind(trial):
            one()
            num += 1
            if num % SOUND_EVERY == 0:
                trial.sound()
            if num == num_bundles:
                break
    trial.sound()
    return trial.findings


def republished(store: WeightsStore, num: int, random: random.Random) -> dict[str, int]:
    """Sound versions offered under numbers that were used: ``publish`` must refuse all."""
    first = max(store.next_version(), 10)
    given = sound(first, random)
    manifest = decode_manifest(given.manifest_text)
    store.publish(manifest, {TENSORS: given.files[TENSORS]})
    counts = Counter[str]()
    for _ in range(num):
        again = replace(manifest, version=random.randint(0, first), parent=None)
        try:
            store.publish(again, {TENSORS: given.files[TENSORS]})
            counts["published"] += 1
        except ValueError:
            counts["refused"] += 1
    return dict(counts)


def rows_of(figures: dict[str, Any]) -> list[Row]:
    """One claim for each store, and the memory."""
    rows = []
    for name, found in figures["stores"].items():
        wrong = len(found["loaded"]) + len(found["errors"])
        what = f"{found['bad']} bad bundles of {found['kinds']} kinds in {name}"
        rows.append(Row(what, "loaded, or another error", wrong, "0", wrong == 0))
        rows.append(at_least(what, "sound bundles loaded between them", found["sound_loaded"], 1))
    published = sum(one.get("published", 0) for one in figures["republished"].values())
    rows.append(
        Row("used version numbers published again", "accepted", published, "0", published == 0)
    )
    return rows


def main(
    bundles: Annotated[int, typer.Option(min=1, help="bad bundles in folders")] = 10_000,
    redis: Annotated[int, typer.Option(min=0, help="bad bundles in Redis; 0: none")] = 1_000,
    kafka: Annotated[int, typer.Option(min=0, help="bad bundles in Kafka; 0: none")] = 300,
    seed: Annotated[int, typer.Option(help="of what the kinds leave open")] = 0,
    out: Out = RESULTS / "bad_bundles.json",
) -> None:
    """Offer bad bundles to the loader of a server, and count what it loads."""
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), bundles, redis, kafka, seed)
    write_result(out, figures)
    rows = rows_of(figures)
    write_rows("bad_bundles", rows, SOURCE)
    for row in rows:
        say(f"{row.row}: {row.measure}: {row.value} (goal: {row.goal}, holds: {row.holds})")
    if not all(row.holds for row in rows):
        raise typer.Exit(code=1)


def measure(folder: Path, bundles: int, redis: int, kafka: int, seed: int) -> dict[str, Any]:
    """Offer so many to each kind of store; those with 0 are not started."""
    keys = make_keys(folder)
    found: dict[str, Findings] = {}
    again: dict[str, dict[str, int]] = {}
    started = time.monotonic()

    def one(target: Target, num: int) -> None:
        found[target.name] = offer(target, num, seed, keys)
        again[target.name] = republished(target.store, 50, random.Random(seed))
        say(f"{target.name}: {num} offered after {time.monotonic() - started:.0f} s")

    one(InFolder(folder / "run"), bundles)
    if redis:
        from oracles.redis_servers import RedisServer, valkey_binary

        server = RedisServer(valkey_binary())
        try:
            one(InRedis(f"{server.url}?run=bad", folder), redis)
        finally:
            server.close()
    if kafka:
        from oracles.kafka_brokers import Broker

        broker = Broker("noida", folder / "noida")
        try:
            one(InKafka(f"kafka://{broker.address}/bad", folder), kafka)
        finally:
            broker.kill()
    return {
        "stores": {name: findings.to_json() for name, findings in found.items()},
        "republished": again,
        "seconds": time.monotonic() - started,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "seed": seed,
    }


if __name__ == "__main__":
    typer.run(main)
