"""The prompts of a whole demo: live ones of each phase, held-out ones of each domain."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from examples import corpus
from examples.traffic import chat
from examples.traffic.prompts import Prompt, PromptError, by_domain, read_prompts

Source = Callable[[Mapping[str, int], int], Mapping[str, Sequence[Prompt]]]
"""(prompts wanted of each domain, seed) -> different prompts of each, at most as many."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of traffic."""

    name: str
    domain: str
    shifted: bool
    """The first drafter was not trained on such text."""
    seconds: float
    """Longest duration."""
    enough_requests: int
    """The phase ends earlier, after this number of requests, once the trainer has caught up."""
    mixed_with: tuple[str, ...] = ()
    """Further domains, whose prompts come in any order among those of ``domain``."""

    @property
    def domains(self) -> tuple[str, ...]:
        """All that its prompts are about."""
        return self.domain, *self.mixed_with


@dataclass(frozen=True, slots=True)
class Kept:
    """How many prompts of each domain are kept out of the traffic."""

    replayed: int
    """Each is answered by each arm."""
    warmup: int
    """Unmeasured."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts of the whole demo, all different.

    Phases of one domain share their held-out prompts, so that their replays are comparable.
    """

    live: dict[str, list[Prompt]]
    """Phase -> prompts."""
    held_out: dict[str, list[Prompt]]
    """Domain -> prompts for the replay."""
    warmup: dict[str, list[Prompt]]
    """Domain -> unmeasured prompts of the replay."""


def gather(source: Source, phases: Sequence[Phase], num_live: int, kept: Kept, seed: int) -> Texts:
    """Prompts for these phases. It takes seconds of a core, so gather them before the traffic.

    Args:
        num_live: prompts of each phase, fewer if the source holds fewer.

    Raises:
        ValueError: the source holds too few; the text says how many.
    """
    wanted: dict[str, dict[str, int]] = {}  # domain -> phase -> live prompts
    for phase in phases:
        for domain in phase.domains:
            wanted.setdefault(domain, {})[phase.name] = -(-num_live // len(phase.domains))
    num_kept = kept.replayed + kept.warmup
    found = source({d: num_kept + sum(counts.values()) for d, counts in wanted.items()}, seed)
    texts = Texts({phase.name: [] for phase in phases}, {}, {})
    for domain, counts in wanted.items():
        prompts = list(found.get(domain, ()))
        if len(prompts) < num_kept + len(counts):
            raise ValueError(
                f"there are {len(prompts)} prompts of domain {domain!r}; at least "
                f"{num_kept + len(counts)} are needed: {num_kept} to compare arms on, one for each "
                f"phase"
            )
        texts.held_out[domain] = prompts[: kept.replayed]
        texts.warmup[domain] = prompts[kept.replayed : num_kept]
        for name, prompt in _dealt(prompts[num_kept:], counts):
            texts.live[name].append(prompt)
    for phase in phases:
        if phase.mixed_with:
            random.Random(seed).shuffle(texts.live[phase.name])
    return texts


def _dealt(prompts: Sequence[Prompt], counts: Mapping[str, int]) -> Iterator[tuple[str, Prompt]]:
    """Phase and prompt: one for each phase in turn, until it has as many as it wants."""
    left, names = dict(counts), list(counts)
    for prompt in prompts:
        while names and not left[names[0]]:
            names.pop(0)
        if not names:
            return
        left[names[0]] -= 1
        yield names[0], prompt
        names.append(names.pop(0))


def completions(counts: Mapping[str, int], seed: int) -> dict[str, list[Prompt]]:
    """Held-out text of the bundled target's training domains, to continue.

    Raises:
        ValueError: this installation holds fewer.
    """
    return {
        domain: [
            Prompt(domain=domain, prompt=text)
            for text in corpus.prompts(cast(corpus.Domain, domain), count, seed)
        ]
        for domain, count in counts.items()
    }


def chats(counts: Mapping[str, int], seed: int) -> Mapping[str, Sequence[Prompt]]:
    """Chat requests made from this installation; fewer if it holds fewer."""
    return cast(
        Mapping[str, Sequence[Prompt]],
        chat.chat_prompts(cast(Mapping[chat.Domain, int], counts), seed, may_lack=True),
    )


def of_file(path: Path, most_phases: int = 5) -> tuple[Source, tuple[str, ...]]:
    """The prompts of a file, and its domains in the order in which they come.

    Raises:
        PromptError: the file is not one of prompts, or has too many domains.
    """
    found = by_domain(read_prompts(path))
    if len(found) >= most_phases:
        raise PromptError(
            f"{path}: has {len(found)} domains ({', '.join(found)}); a demo has time for at most "
            f"{most_phases - 1}"
        )

    def source(counts: Mapping[str, int], seed: int) -> dict[str, list[Prompt]]:
        return {domain: found[domain][:count] for domain, count in counts.items()}

    return source, tuple(found)


def phases_of(domains: Sequence[str], seconds: float, enough_requests: int) -> tuple[Phase, ...]:
    """A phase for each domain and one more for the first: traffic shifts, and comes back."""
    first, *others = domains
    return (
        Phase(first, first, False, seconds, enough_requests),
        *(Phase(domain, domain, True, seconds, enough_requests) for domain in others),
        Phase(f"{first}-again", first, False, seconds, enough_requests),
    )
