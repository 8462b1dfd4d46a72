"""A server of the bundled target, its traffic, its versions, and what judges candidates."""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from benchmarks.harness.policy import PolicySwitch
from buffer.backends import open_backend
from buffer.bundles import Bundle
from buffer.manifest import MANIFEST, TENSORS, encode_manifest
from buffer.records import Count, FileDigest, Manifest, Trace
from buffer.traces import TraceReader
from configs.load import load_settings
from configs.schema import Settings
from drafters.trainable import Trainable, trainable
from examples import corpus
from policies.interface import Outcome
from serving.build import build_service
from serving.requests import Output, Request, SamplingParams
from serving.service import Service
from targets.head import TargetHead, load_target_head
from trainer.build import expected_of
from trainer.dataset import Refusal, sample_of
from trainer.gate import Judge
from trainer.learner import Learner
from trainer.packing import HeldPiece
from trainer.rows import HeldSample, RowStore

CLIENTS = 4
MAX_TOKENS = 96
TEMPERATURE = 0.5
_STORE_BYTES = 1 << 30
_PROMPTS = 400
_WAIT_S = 1800.0
_SETTLE_S, _MOST_TRACED = 5.0, 0.9


Rounds = Sequence[Sequence[tuple[int, int]]]
"""(proposed, accepted) of each round of each request."""


class Counting(PolicySwitch):
    """Also counts the rounds that each version drafted."""

    def __init__(self, own: Any) -> None:
        super().__init__(own)
        self.rounds: Counter[int] = Counter()

    def observe(self, outcome: Outcome) -> None:
        if outcome.decision.draft_k:
            self.rounds[outcome.version] += outcome.batch
        super().observe(outcome)


@dataclass(frozen=True, slots=True)
class Live:
    """What became of a version that was published past the gate."""

    outcome: str
    """``refused``: not loaded; ``rolled back``; ``kept``."""
    reason: str | None
    """Why it was not loaded."""
    rounds: int
    """Rounds that it drafted, until that was clear."""
    drafted: Rounds = ()
    """These rounds, request by request."""


@dataclass(slots=True)
class World:
    """One server with version 0, and the traces of its traffic."""

    settings: Settings
    service: Service
    policy: Counting
    first: Bundle
    """Version 0."""
    head: TargetHead
    rows: RowStore
    prompts: dict[str, Iterator[tuple[int, ...]]] = field(default_factory=dict)
    version: int = 0
    """Highest version so far."""

    @property
    def manifest(self) -> Manifest:
        return self.first.manifest

    @property
    def learns(self) -> Trainable[Any]:
        return trainable(self.manifest.kind)

    @property
    def watch(self) -> Any:
        """The server's own."""
        assert self.service.swapper is not None
        return self.service.swapper._watch

    def tensors(self) -> dict[str, Tensor]:
        """Those of version 0, to be changed."""
        return {name: tensor.clone() for name, tensor in load(self.first.files[TENSORS]).items()}

    def model(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A drafter of these weights, or of version 0."""
        config = self.manifest.drafter_config
        made: nn.Module = self.learns.load_model(config, tensors or self.tensors())
        return made

    def tensors_of(self, model: nn.Module) -> dict[str, Tensor]:
        """As they would be published."""
        found = self.learns.bundle_tensors(model)
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def judge(self, incumbent: nn.Module) -> Judge:
        """The trainer's gate, with its default margin and confidence."""
        t = Settings().trainer
        return Judge(self.learns, self.head, self.rows, incumbent, t.gate_margin, t.gate_confidence)

    # ---- traffic -------------------------------------------------------------------------------

    def play(self, domain: str, is_over: Callable[[], bool], capture: bool = False) -> None:
        """Decode requests of a domain for all clients until it is over.

        Raises:
            RuntimeError: it was not over in time, or a request failed.
        """
        ended, failed = threading.Semaphore(0), list[str]()
        numbers = itertools.count()

        def ask() -> None:
            number = next(numbers)
            sampling = SamplingParams(
                temperature=TEMPERATURE, max_tokens=MAX_TOKENS, ignore_eos=True, seed=number
            )
            name = f"{domain}-{time.monotonic_ns()}"
            request = Request(name, next(self.prompts[domain]), sampling, capture=capture)
            self.service.inbox.submit(request, take)

        def take(output: Output) -> None:
            if output.finish_reason is not None:
                if output.finish_reason == "error":
                    failed.append(str(output.error))
                ended.release()

        for _ in range(CLIENTS):
            ask()
        running, end_s = CLIENTS, time.monotonic() + _WAIT_S
        while running:
            if not ended.acquire(timeout=_WAIT_S):
                raise RuntimeError(f"the server decodes nothing: {self.policy.figures()}")
            if failed or time.monotonic() > end_s:
                raise RuntimeError(f"traffic of {domain}: {failed or 'it does not end'}")
            if is_over():
                running -= 1
            else:
                ask()

    def play_rounds(self, domain: str, num_rounds: int, capture: bool = False) -> None:
        """The same for so many drafted rounds."""
        end = self.policy.rounds.total() + num_rounds
        self.play(domain, lambda: self.policy.rounds.total() >= end, capture)

    def play_requests(self, domain: str, num_requests: int) -> list[Trace]:
        """The same for so many requests; returns their traces."""
        before = {trace.request_id for trace in self.traces()}
        left = itertools.count(1)
        self.play(domain, lambda: next(left) > num_requests - CLIENTS, capture=True)
        end_s = time.monotonic() + _WAIT_S
        while True:
            found = [trace for trace in self.traces() if trace.request_id not in before]
            if len(found) >= num_requests:
                return found
            if time.monotonic() > end_s:
                raise RuntimeError(f"{len(found)} traces of {num_requests} requests arrived")
            time.sleep(0.1)

    def traces(self) -> list[Trace]:
        """All traces of the run."""
        reader = TraceReader(open_backend(self.settings.buffer.url, self.settings.run_dir))
        found: list[Trace] = []
        while batch := reader.read(256):
            found += batch
        return found

    def hold(self, traces: Sequence[Trace]) -> list[HeldSample]:
        """Traces as a trainer holds them."""
        expected = expected_of(self.manifest, self.head)
        found = [sample_of(t, expected, self.settings.trainer.max_sequence) for t in traces]
        return self.rows.put([one for one in found if not isinstance(one, Refusal)])

    # ---- training ------------------------------------------------------------------------------

    def trained(
        self,
        samples: Sequence[HeldSample],
        lr: float,
        most_updates: int,
        is_enough: Callable[[nn.Module], bool],
        seed: int,
        *,
        averaged: bool,
    ) -> nn.Module | None:
        """Version 0, trained on these samples until it is enough, asked every ten updates;
        ``None``: it never was."""
        settings = self.settings.trainer.model_copy(update={"lr": lr, "warmup_steps": 0})
        learner = Learner(self.learns, self.model(), self.head, settings, self.rows)
        chance = random.Random(seed)
        for number in range(1, most_updates + 1):
            learner.update(_batch(samples, settings.batch_tokens, chance))
            if number % 10 == 0:
                learner.settle()
                found = learner.average if averaged else learner.model
                if is_enough(found):
                    return found
        return None

    # ---- versions ------------------------------------------------------------------------------

    def plant(self, tensors: Mapping[str, Tensor]) -> int:
        """Store a version past all checks of ``publish``, with digests that fit; returns it."""
        self.version += 1
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        digest = FileDigest(hashlib.sha256(content).hexdigest(), len(content))
        manifest = replace(
            self.manifest, version=self.version, parent=0, files={TENSORS: digest}, policy={}
        )
        root = self.settings.run_dir / "weights"
        aside = root / f"aside-{self.version}"
        aside.mkdir()
        (aside / MANIFEST).write_bytes(encode_manifest(manifest))
        (aside / TENSORS).write_bytes(content)
        aside.rename(root / str(self.version))
        return self.version

    def publish(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Try to publish as a trainer does, aside; returns why that was refused."""
        store = open_backend("log:", self.settings.run_dir / "aside").open_weights()
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        manifest = replace(self.manifest, version=store.next_version(), parent=None, files={})
        try:
            store.publish(manifest, {TENSORS: content})
        except ValueError as error:
            return str(error)
        finally:
            shutil.rmtree(self.settings.run_dir / "aside", ignore_errors=True)
        return None

    def offer(self, tensors: Mapping[str, Tensor], domain: str) -> Live:
        """Plant a version and serve traffic until the server has refused, kept or rolled it
        back."""
        swapper = self.service.swapper
        assert swapper is not None
        self.play_rounds(domain, 400)  # of the version before, to compare with
        refused, rejected = swapper.refusals(), swapper.counts()["rejected"]
        version = self.plant(tensors)
        end_s = time.monotonic() + _WAIT_S

        def is_known() -> bool:
            """It was refused, or taken; it may have been rolled back by now."""
            status = swapper.status()
            was_taken = status["version"] == version or version in status["denied"]
            return was_taken or swapper.counts()["rejected"] > rejected

        while not is_known():
            self.play_rounds(domain, 1, capture=True)
            if time.monotonic() > end_s:
                raise RuntimeError(f"version {version} is neither taken nor refused")
        if swapper.counts()["rejected"] > rejected:
            [reason] = (Counter(swapper.refusals()) - Counter(refused)).keys()
            return Live("refused", reason, self.policy.rounds[version])

        def is_clear() -> bool:
            figures = self.watch.figures()
            is_kept = figures["state"] == "steady" and figures["version"] == version
            return is_kept or version in swapper.status()["denied"]

        self.play(domain, is_clear, capture=True)
        outcome = "rolled back" if version in swapper.status()["denied"] else "kept"
        rounds = self.policy.rounds[version]
        return Live(outcome, None, rounds, self._drafted_by(version, rounds))

    def _drafted_by(self, version: int, num_rounds: int) -> Rounds:
        """The rounds of a version that it was captured with: nearly all, for requests that began
        before the capture are not in traces. Waits for the recorder."""
        end_s, found = time.monotonic() + _SETTLE_S, list[list[tuple[int, int]]]()
        while sum(map(len, found)) < _MOST_TRACED * num_rounds and time.monotonic() < end_s:
            time.sleep(0.1)
            found = sequences(self.traces(), version)
        return found

    def back_to_first(self) -> None:
        """Serve version 0 again, and what comes after by itself."""
        swapper = self.service.swapper
        assert swapper is not None
        if swapper.status()["version"] != 0:
            swapper.rollback()


def _batch(
    samples: Sequence[HeldSample], num_tokens: int, chance: random.Random
) -> list[HeldPiece]:
    found: list[HeldPiece] = []
    while sum(len(piece.slots) for piece in found) < num_tokens:
        found.append(chance.choice(chance.choice(samples).pieces))
    return found


def sequences(traces: Sequence[Trace], version: int | None = None) -> list[list[tuple[int, int]]]:
    """(proposed, accepted) of the drafted rounds of each trace, in order; those of one version, if
    it is given."""
    found = []
    for trace in traces:
        counts = trace.rounds.counts
        if version is not None:
            counts = counts[:, counts[Count.VERSION] == version]
        proposed, accepted = counts[Count.NUM_DRAFTED], counts[Count.NUM_ACCEPTED]
        rounds = [(p, a) for p, a in zip(proposed.tolist(), accepted.tolist(), strict=True) if p]
        if rounds:
            found.append(rounds)
    return found


@contextmanager
def world(
    domains: Sequence[str], seed: int, folder: Path, settings: Sequence[str] = ()
) -> Iterator[World]:
    """A running server in a folder, with version 0, the bundled drafter.

    Args:
        settings: in place of those of this benchmark, as for ``--set``.
    """
    chosen = [
        f"run_dir={folder / 'run'}",
        "engine.cpu_threads=1",
        "drafter.suffix.enabled=false",
        "policy.kind=fixed",
        "policy.draft_k=4",
        "swap.poll_s=0.02",
        "trainer.replay_ratio=1000",
        *settings,
    ]
    own = load_settings([Path("configs/demo.yaml")], chosen, {})
    made: list[Counting] = []

    def wrap(policy: Any) -> Counting:
        made.append(Counting(policy))
        return made[0]

    service = build_service(own, None, wrap)
    service.start()
    try:
        head = load_target_head(Path(own.target), torch.device("cpu"), torch.float32)
        first = open_backend(own.buffer.url, own.run_dir).open_weights().read(0)
        tokenizer = service.model.tokenizer
        prompts: dict[str, Iterator[tuple[int, ...]]] = {}
        for domain in domains:
            texts = corpus.prompts(cast(corpus.Domain, domain), _PROMPTS, seed)
            ids = [tuple(tokenizer(text)["input_ids"]) for text in texts]
            prompts[domain] = itertools.cycle(ids)
        rows = RowStore(torch.device("cpu"), _STORE_BYTES)
        yield World(own, service, made[0], first, head, rows, prompts)
    finally:
        service.stop()
