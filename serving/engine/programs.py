"""All programs of fixed shape of one engine, over one set of lanes."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from serving.capture.ring import CaptureRing
from serving.engine.adjusting import Adjusting
from serving.engine.blocks import BLOCK
from serving.engine.catch_up import CatchUp
from serving.engine.cuda_graphs import Graphs
from serving.engine.drafting import Drafting
from serving.engine.lanes import Lanes
from serving.engine.prefill import Prefill
from serving.engine.rounds import Rounds
from serving.engine.verifying import Rule
from targets.target import KvPool, Target

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Programs:
    """What decodes and prefills without being put together anew for each step."""

    graphs: Graphs
    lanes: Lanes
    rounds: Rounds
    prefill: Prefill
    catch_up: CatchUp | None

    def capture_all(self) -> None:
        """Make every program now instead of at its first use, and time them; without graphs
        there is nothing to make."""
        if not self.graphs.are_real:
            return
        started = time.perf_counter()
        self.prefill.capture_all()
        if self.catch_up is not None:
            self.catch_up.capture_all()
        self.rounds.capture_all()
        self.graphs.trim()
        spent = self.graphs.spent
        log.info(
            "made %d programs in %.1f s: %.1f s their first runs, compiling included, %.1f s "
            "capturing, %.1f s timing them",
            spent.num_programs, time.perf_counter() - started,
            spent.first_runs_s, spent.capture_s, spent.timing_s,
        )  # fmt: skip


def make_programs(
    target: Target,
    pool: KvPool,
    drafting: Drafting,
    *,
    max_batch: int,
    max_model_len: int,
    prefill_chunk: int,
    page_size: int,
    rule: Rule,
    ring: CaptureRing | None,
    fuse: bool,
    pinned: bool = False,
) -> Programs:
    """Programs for these sizes; on a GPU they become CUDA graphs.

    Args:
        ring: takes the committed rows of requests that capture.
        fuse: replace the target's own code by our decoder, if it is a model that we know, and the
            drafter's by our operations.
        pinned: what the target computes for a token does not depend, in any bit, on what is
            computed beside it.

    Raises:
        ValueError: the ring does not hold the rows of one step, or numerics cannot be pinned.
    """
    # A block's last rows may lie behind the last position that a request can use.
    pages_each = -(-(max_model_len + drafting.max_draft + 1 + BLOCK) // page_size)
    if fuse:
        _fuse(target, drafting, pages_each * page_size, pinned)
    lanes = Lanes(max_batch, pages_each, drafting.max_draft, target)
    graphs = Graphs(target.device)
    catch_up = None
    if drafting.neural:
        most_rows = max(prefill_chunk, BLOCK * max_batch)
        catch_up = CatchUp(drafting, lanes, graphs, most_rows=most_rows, page_size=page_size)
    adjusting = Adjusting(lanes.padding + 1, target.vocab_size, target.device)
    rounds = Rounds(
        target, pool, drafting, lanes, adjusting, graphs,
        page_size=page_size, rule=rule, ring=ring, catch_up=catch_up,
    )  # fmt: skip
    prefill = Prefill(
        target, pool, drafting, lanes, adjusting, graphs,
        prefill_chunk=prefill_chunk, page_size=page_size, rule=rule, ring=ring,
    )  # fmt: skip
    return Programs(graphs, lanes, rounds, prefill, catch_up)


def _fuse(target: Target, drafting: Drafting, num_positions: int, pinned: bool) -> None:
    if reason := target.fuse(num_positions, pinned):
        if pinned:
            raise ValueError(
                f"engine.numerics is 'pinned', but the target's own code must compute its layers: "
                f"{reason}; set it to 'fast'"
            )
        log.warning("the target's own code computes its layers, which is slower: %s", reason)
    if drafting.neural and (reason := drafting.neural.fuse(num_positions)):
        log.warning("the drafter's own code computes its layer, which is slower: %s", reason)
