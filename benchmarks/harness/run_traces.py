"""Traces of a finished run, for benchmarks that evaluate drafters on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from benchmarks.harness.arms import LOOKUP
from buffer.backends import open_backend
from buffer.records import Manifest, Trace
from buffer.traces import TraceReader
from configs.schema import Settings
from drafters.catalog import kind_of
from drafters.protocol import DrafterContext, HostDrafter
from drafters.samples import Sample
from drafters.suffix import compiled
from policies.replay import is_held_out
from targets.head import TargetHead
from trainer.build import expected_of
from trainer.dataset import Refusal, key_of, sample_of

JUDGED_TRACES = 64


def all_traces(settings: Settings) -> list[Trace]:
    """Every trace of the run, in the order in which requests finished."""
    reader = TraceReader(open_backend(settings.buffer.url, settings.run_dir))
    traces: list[Trace] = []
    while batch := reader.read(256):
        traces += batch
    return sorted(traces, key=lambda trace: trace.finished_unix_ms)


def held_out(
    traces: Sequence[Trace], manifest: Manifest, head: TargetHead, settings: Settings
) -> list[Sample]:
    """The newest traces that no version was trained on.

    Args:
        manifest: the manifest of any version of the run.
    """
    expected = expected_of(manifest, head)
    kept = [t for t in traces if is_held_out(key_of(t), settings.trainer.held_out_every)]
    samples = [sample_of(t, expected, settings.trainer.max_sequence) for t in kept[-JUDGED_TRACES:]]
    return [s for s in samples if not isinstance(s, Refusal)]


def num_kept(drafted: Sequence[int], ids: Sequence[int], at: int) -> int:
    """Number of drafted tokens that match the text from ``at`` on, before the first mismatch."""
    kept = 0
    while kept < min(len(drafted), len(ids) - at) and drafted[kept] == ids[at + kept]:
        kept += 1
    return kept


def new_index(settings: Settings) -> HostDrafter:
    """An empty match-lookup drafter, configured by these settings."""
    compiled.wait()
    nothing: Any = None  # it computes nothing on a device and has no weights
    context = DrafterContext(
        settings.drafter, embed=nothing, lm_head=nothing, hidden_size=0, vocab_size=0, num_slots=0,
        logits=nothing, device=nothing, dtype=nothing, weights=None,
    )  # fmt: skip
    return cast(HostDrafter, kind_of(LOOKUP).build(context))


def by_index(index: HostDrafter, trace: Trace, draft_k: int) -> dict[int, tuple[int, int]]:
    """Simulate the index at every position; other drafters are simulated at the same positions.

    Returns:
        Position of the last committed token -> (kind of match, drafted tokens that would be kept).
    """
    ids, found = trace.token_ids.tolist(), {}
    index.begin("judged", ids[: trace.prompt_length])
    for p in range(trace.prompt_length, len(ids) - draft_k):
        index.extend(["judged"], [[ids[p]]])
        [match] = index.observe(["judged"])
        [drafted] = index.propose(["judged"], [draft_k if match else 0])
        found[p] = (match, num_kept(drafted, ids, p + 1))
    index.finish("judged", keep=False)
    return found
