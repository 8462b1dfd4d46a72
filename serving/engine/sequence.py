"""The running state of one request: the one object of the engine that is modified in place."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from policies.interface import DraftRecord
from serving.engine.detokenize import Detokenizer
from serving.engine.noted_rounds import NotedRounds
from serving.requests import FinishReason, OnOutput, Request, SpeculationStats, TokenLogprob


@dataclass(slots=True, eq=False)
class Sequence:
    """One admitted or waiting request."""

    request: Request
    on_output: OnOutput
    key: int
    """64-bit key of its random numbers: the request's seed, or a fresh one."""
    detokenizer: Detokenizer
    eos_ids: frozenset[int]
    tokens: list[int]
    """Prompt and committed completion."""
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    """Prompt tokens whose pages were found in the prefix cache."""
    num_computed: int = 0
    """Positions with target KV; the anchor (last token) has none yet."""
    num_named: int = 0
    """Leading pages already declared to the prefix cache."""
    names: list[bytes] = field(default_factory=list)
    """Digests of its full pages, as far as known."""
    num_rounds: int = 0
    """Rounds so far, the end of its prompt included; the nonce of its random numbers."""
    next_row: dict[str, int] = field(default_factory=dict)
    """Next position whose row each neural drafter must compute; row 0 does not exist."""
    group: int = 0
    """See ``policies.groups``; given when it is admitted."""
    records: dict[str, DraftRecord] = field(default_factory=dict)
    """What the drafters of mixes have done for it, by kind."""
    lane: int | None = None
    """Its row of the state on the device, while it runs."""
    is_in_lane: bool = False
    """The lane holds its state."""
    is_flying: bool = False
    """In a round whose outcome is not committed yet: its lane is ahead of ``tokens``."""
    space: int = 0
    """Number of its namespace, for drafters that read text on the device."""
    num_told: int = 0
    """Number of its tokens that the host drafters know. Those beyond ``tokens`` are decided, but
    not committed yet."""
    num_emitted: int = 0
    """Completion tokens already sent out."""
    finish_reason: FinishReason | None = None
    num_proposed: int = 0
    num_accepted: int = 0
    version: int = 0
    rounds: NotedRounds = field(default_factory=NotedRounds)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    target_version: int = 0
    """How often the target's weights had been replaced when its newest token was computed."""
    target_switches: tuple[int, ...] = ()
    """Number of its completion tokens at each replacement of the target's weights."""
    capture_rows: list[int] = field(default_factory=list)
    """First position, running number in the ring, and count of captured rows, of each piece in
    turn."""
    # What each step asks about a request, worked out once.
    num_prompt: int = field(init=False)
    limit: int = field(init=False)
    """Number of tokens, prompt included, at which it ends."""
    end_ids: frozenset[int] = field(init=False)
    """Tokens that end it."""
    takes_best: bool = field(init=False)
    """Greedy, and from the logits as they are."""
    is_scored: bool = field(init=False)
    """Asks for log probabilities."""

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.num_prompt = len(self.request.prompt_ids)
        self.limit = self.num_prompt + sampling.max_tokens
        self.end_ids = self.eos_ids.union(sampling.stop_token_ids)
        self.takes_best = self.is_greedy and not sampling.adjusts_logits
        self.is_scored = sampling.logprobs is not None

    @property
    def num_left(self) -> int:
        """Completion tokens that may still be committed."""
        return self.limit - len(self.tokens)

    @property
    def is_prefilled(self) -> bool:
        """Only the anchor is left to compute."""
        return 0 < self.num_computed == len(self.tokens) - 1

    @property
    def is_greedy(self) -> bool:
        return self.request.sampling.temperature == 0

    @property
    def matches_target(self) -> bool:
        """Verified by ``match``: its output does not depend on the drafter at all."""
        return self.is_greedy or self.request.sampling.seed is not None

    def target_changed(self, version: int) -> None:
        """The target's weights were replaced: no row that was computed counts any more.

        A request that has completion tokens leaves no trace from now on, because a trace is of one
        target. The others are captured from their beginning.
        """
        self.num_computed = self.num_named = 0
        self.names = []
        self.capture_rows = []
        self.target_version = version
        num_completed = len(self.tokens) - self.num_prompt
        if num_completed:
            self.target_switches += (num_completed,)
            self.request = replace(self.request, capture=False)

    def stats(self) -> SpeculationStats:
        return SpeculationStats(
            self.version, self.num_rounds, self.num_proposed, self.num_accepted,
            self.target_version, self.target_switches,
        )  # fmt: skip
