"""Assembles the parts that an engine runs on from a target and its drafters."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

from drafters.protocol import HostDrafter, NeuralDrafter, TextDrafter
from policies.allocation import Cut
from serving.engine.capture_ring import CaptureRing
from serving.engine.inbox import Inbox, Limits, Sequences
from serving.engine.loop import EngineParts
from serving.engine.pages import PagePool
from serving.engine.programs import Sizes, make_programs
from serving.engine.scheduler import Scheduler
from specops.verify_logits import Rule
from targets.target import Target


@dataclass(frozen=True, slots=True)
class Choices:
    """How an engine schedules and verifies."""

    rule: Rule = Rule.BLOCK
    """Rule that verifies sampled requests without a seed."""
    prefix_cache: bool = True
    prefill_hold_s: float = 0.0
    """Maximum time that a prompt waits for others; see ``Scheduler``."""
    max_queue: int = 256
    """Maximum number of waiting requests."""
    overlaps: bool = False
    """See ``EngineParts``."""
    on_request: tuple[str, ...] = ()
    """Kinds of drafters that draft only for requests that name them."""
    cuts: tuple[Cut, ...] = ()
    """Ways to cut drafts on the device that the policy uses: programs are made for them."""
    mixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name -> kinds of the drafters that may draft in one round, neural ones first."""
    is_own: bool = False
    """Target and drafters compute all by our own operations; see ``programs.fuse``."""


def assemble(
    target: Target,
    hosts: Several[HostDrafter],
    neural: Several[NeuralDrafter],
    sizes: Sizes,
    sequences: Sequences,
    choices: Choices,
    ring: CaptureRing | None,
    texts: Several[TextDrafter] = (),
) -> EngineParts:
    """Allocate the KV pool and make everything that an ``Engine`` needs except its policy.

    Args:
        neural: their pools have ``sizes.num_pages * sizes.page_size`` slots.
        ring: receives the committed rows of captured requests.
        texts: drafters that read text on the device.

    Raises:
        ValueError: the ring cannot hold the rows of one step, or drafters cannot be mixed.
    """
    pool = target.make_pool(sizes.num_pages * sizes.page_size)
    programs = make_programs(
        target, pool, hosts, neural, sizes,
        rule=choices.rule, ring=ring, on_request=choices.on_request,
        cuts=choices.cuts, mixes=choices.mixes, is_own=choices.is_own, texts=texts,
    )  # fmt: skip
    scheduler = Scheduler(
        PagePool(sizes.num_pages, choices.prefix_cache),
        sizes.page_size,
        sizes.max_batch,
        sizes.prefill_chunk,
        sizes.max_draft,
        choices.prefill_hold_s,
    )
    limits = Limits(target.vocab_size, sizes.max_model_len, choices.max_queue)
    inbox = Inbox(limits, sequences, scheduler)
    return EngineParts(inbox, scheduler, programs, choices.overlaps)
