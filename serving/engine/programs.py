"""All programs of fixed shape of one engine, over one set of lanes: the only way to compute a step.

On a GPU each program is a CUDA graph. On a CPU it is an ordinary call of the same code, with
the batch's exact size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.phases import uncollected
from drafters.protocol import HostDrafter, NeuralDrafter, TextDrafter
from policies.allocation import Cut
from serving.engine.capture_ring import CaptureRing
from serving.engine.cuda_graphs import Graphs
from serving.engine.drafter_rows import BLOCK, DrafterRows, FeatureStore
from serving.engine.drafting import Drafting
from serving.engine.graph_recorder import Program
from serving.engine.lanes import Lanes
from serving.engine.making import Making
from serving.engine.mixed_rows import MixedRows
from serving.engine.prefill import Prefill
from serving.engine.rounds import Rounds
from serving.engine.text_mix import TextMix
from serving.engine.text_rows import TextRows
from specops.verify_logits import Rule
from targets.target import KvPool, Target

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bounds that programs are made for."""

    max_batch: int
    max_model_len: int
    prefill_chunk: int
    page_size: int
    num_pages: int
    max_draft: int

    @property
    def pages_each(self) -> int:
        """Number of pages that one request's rows can occupy: a block's last rows may lie beyond
        the last position that the request can use."""
        return -(-(self.max_model_len + self.max_draft + 1 + BLOCK) // self.page_size)


@dataclass(frozen=True, slots=True)
class Programs:
    """Programs that decode and prefill, and what they share."""

    target: Target
    pool: KvPool
    graphs: Graphs
    lanes: Lanes
    drafting: Drafting
    rounds: Rounds
    prefill: Prefill
    ring: CaptureRing | None
    making: Making
    """Makes the programs that ``capture_all`` leaves for later."""
    is_own: bool
    """They consist of our own operations, which keep nothing that they allocate."""

    def capture_all(self, most_draft: int | None = None, listed: Path | None = None) -> None:
        """Make programs now instead of at their first use, and time them. Does nothing on a CPU,
        which has no graphs.

        Args:
            most_draft: largest K of the rounds that are made now. Drafts are no longer until
                ``making`` has made the others. ``None``: all are made now.
            listed: file that lists the kernels that were needed, for the next start.
        """
        captures = self.graphs.captures
        if captures is None:
            return
        started = time.perf_counter()
        with uncollected():
            if self.is_own:
                from specops.compiling import Kernels  # Triton is there wherever a GPU is

                captures.begin(Kernels(), self._works(), listed)
            self.prefill.capture_all()
            for rows in self.drafting.neural.values():
                rows.capture_all()
            self.rounds.capture_all(most_draft)
            if self.rounds.num_left:
                self.making.begin()
            captures.end()
            if listed is not None:
                captures.keep_list(listed)
            self.graphs.trim()
        captures.tell()
        log.info(
            "%d programs are ready after %.1f s, %d are left for later",
            captures.spent.num_programs, time.perf_counter() - started, self.rounds.num_left,
        )  # fmt: skip

    def _works(self) -> list[Program]:
        """What all programs compute, in the order in which they are made, with only those of the
        target's layers that launch other kernels than the rest: what remains to be looked through
        is a quarter of the launches."""
        works = self.prefill.works()
        for rows in self.drafting.neural.values():
            works += rows.works()
        works += self.rounds.works()
        return [partial(self._abridged, work) for work in works]

    def _abridged(self, work: Program) -> None:
        with self.target.abridged():
            work()


def make_programs(
    target: Target,
    pool: KvPool,
    hosts: Several[HostDrafter],
    neural: Several[NeuralDrafter],
    sizes: Sizes,
    *,
    rule: Rule,
    ring: CaptureRing | None,
    on_request: Collection[str] = (),
    cuts: tuple[Cut, ...] = (),
    mixes: Mapping[str, tuple[str, ...]] | None = None,
    is_own: bool = False,
    texts: Several[TextDrafter] = (),
) -> Programs:
    """Programs for these drafters and sizes.

    Args:
        texts: drafters that read text on the device.
        on_request: kinds that draft only for requests that name them.
        mixes: name -> kinds of drafters that may draft in one round, neural ones first; ``None``:
            there are none.
        rule: verifies sampled requests without a seed.
        ring: receives the committed rows of captured requests.
        cuts: ways to cut drafts on the device that the policy uses.
        is_own: target and drafters compute all by our own operations; see ``fuse``.

    Raises:
        ValueError: the ring cannot hold the rows of one step, or drafters cannot be mixed.
    """
    # The rows of a prompt's last block may lie beyond its end.
    text_length = sizes.max_model_len + BLOCK if texts else 0
    lanes = Lanes(sizes.max_batch, sizes.pages_each, sizes.max_draft, target, text_length)
    graphs = Graphs(target.device)
    features = FeatureStore(target, sizes.num_pages * sizes.page_size)
    rows = [
        DrafterRows(
            drafter, features, lanes, graphs, target=target, num_pages=sizes.num_pages,
            page_size=sizes.page_size, most_rows=max(sizes.prefill_chunk, BLOCK * sizes.max_batch),
        )
        for drafter in neural
    ]  # fmt: skip
    by_kind = {one.kind: one for one in rows}
    reading = {drafter.kind: TextRows(drafter, lanes) for drafter in texts}
    mixed: list[MixedRows | TextMix] = []
    for name, kinds in (mixes or {}).items():
        members = [by_kind[kind] for kind in kinds if kind in by_kind]
        if texts_of := [reading[kind] for kind in kinds if kind in reading]:
            (member,), (text,) = members, texts_of
            mixed.append(TextMix(name, member, text, sizes.max_draft))
            continue
        others = [kind for kind in kinds if kind not in by_kind]
        mixed.append(MixedRows(name, members, target.vocab_size, others))
    drafting = Drafting(hosts, rows, sizes.max_draft, on_request, mixed, [*reading.values()])
    rounds = Rounds(
        target, pool, drafting, features, lanes, graphs,
        page_size=sizes.page_size, rule=rule, ring=ring, cuts=cuts,
    )  # fmt: skip
    prefill = Prefill(
        target, pool, drafting, features, lanes, graphs,
        prefill_chunk=sizes.prefill_chunk, page_size=sizes.page_size, rule=rule, ring=ring,
    )  # fmt: skip
    making = Making(rounds.make_next)
    return Programs(target, pool, graphs, lanes, drafting, rounds, prefill, ring, making, is_own)


def fuse(
    target: Target, neural: Several[NeuralDrafter], num_positions: int, *, pinned: bool
) -> bool:
    """Switch target and drafters to our fused operations where these compute the same. Returns
    whether they do everywhere.

    Args:
        num_positions: all rows are at positions below it.
        pinned: what the target computes for a token is bitwise independent of what else is in
            the pass.

    Raises:
        ValueError: numerics cannot be pinned.
    """
    if reason := target.fuse(num_positions, pinned):
        if pinned:
            raise ValueError(
                f"engine.numerics is 'pinned', but the target's own code must compute its layers: "
                f"{reason}; set it to 'fast'"
            )
        log.warning("the target's own code computes its layers, which is slower: %s", reason)
    is_own = reason is None
    for drafter in neural:
        if reason := drafter.fuse(num_positions):
            log.warning("the drafter's own code computes its layer, which is slower: %s", reason)
            is_own = False
    return is_own
