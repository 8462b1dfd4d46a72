"""Fits the network of a draft policy to recent traces and judges it: the process that a trainer
starts for it (``trainer.fits``).

It gets one request on its standard input, with the traces, answers with one JSON object on its
standard output, and ends. It writes no file, publishes nothing, uses no GPU and one thread, and
yields to every other process of the machine. When the trainer ends, it ends, too.

A network must be better than what is in force, by the interval of its gain on steps that were held
out: than the network that the newest version carries, or, where it carries none, than the decisions
of the log itself, and also than the best fixed K of each load (``ltd``) or than the place in a
draft (``specdecpp``). Acceptance is that of a version. So the steps that judge are those of
versions that draft like the newest one alone (``policies.alike``); a network of ``ltd`` may be
fitted to those of former ones, too, as many as are needed.

A size that the network in force has stays: K alone is fitted, to what that size verifies.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from buffer.codec import decode_trace
from buffer.records import Trace
from configs.choices import SettingsError
from policies.alike import first_alike
from policies.budgets import BudgetScores
from policies.confidence_head import Head
from policies.logged import LoggedStep, of_drafter, of_newest_versions, steps_of
from policies.network import Network
from policies.published import Origin
from policies.replayed_log import ReplayedLog
from policies.run_log import log_of_run
from trainer.confidence_head import HeadFit, fit_head, judge_head, samples_of, split_samples
from trainer.lifeline import watch
from trainer.ltd import (
    FullInformation,
    chosen_ks,
    compare,
    compare_ks,
    fit_full_information,
    judge_network,
    split,
)
from trainer.ltd_networks import played
from trainer.sizes import fit_depth

LEAST_JUDGED = 256
"""Steps, of versions like the newest one, that a network is judged by at least."""
_NETWORK, _LOGGED = "the network in force", "the policy in force"
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be fitted."""

    kind: str
    """A name in ``FITS``."""
    drafter: str
    run_dir: str
    max_draft: int
    seed: int
    held_out: float
    least_steps: int
    most_steps: int
    margin: float
    """Ratio of its speed to what is in force that a network must reach."""
    in_force: str | None
    """Network of the newest version, as in its manifest; ``None``: it has none."""
    how: FullInformation = field(default_factory=FullInformation)
    """Effort that ``ltd`` is fitted with; its seed is that of the request."""

    @classmethod
    def read(cls, text: bytes) -> Self:
        """One that was written as JSON."""
        values = json.loads(text)
        return cls(**{**values, "how": FullInformation(**values["how"])})


@dataclass(frozen=True, slots=True)
class Fitted:
    """A network, and how it was judged."""

    network: bytes
    """File of it."""
    passed: bool
    gain: float
    """Relative, over what is in force."""
    low: float
    """Lower bound of it at 95 %."""
    lines: tuple[str, ...]
    """What the gates say."""
    num_steps: int
    """Steps that it was fitted to,"""
    num_judged: int
    """and that judged it."""
    origin: Origin


class NotYetError(Exception):
    """The traces do not say enough; the message is what is waited for."""


def fit(request: Request, traces: Iterable[Trace]) -> Fitted:
    """Fit and judge.

    Raises:
        NotYetError: more traces are needed.
        SettingsError: the run's profile of step times is damaged.
    """
    steps = steps_of(traces)[-request.most_steps :]
    try:
        steps, (oldest, newest) = of_newest_versions(steps, request.drafter, request.least_steps)
        return FITS[request.kind](request, steps, Origin(request.drafter, oldest, newest))
    except SettingsError:
        raise
    except ValueError as error:
        raise NotYetError(f"traces that say more: {error}") from error


def _fit_ltd(request: Request, steps: list[LoggedStep], origin: Origin) -> Fitted:
    start, _ = first_alike(steps, request.drafter)
    log = log_of_run(steps, request.drafter, Path(request.run_dir), "auto", request.max_draft)
    # The log leaves out steps of other drafters, so what is alike is told by the end of it.
    num_alike = len(of_drafter(steps[start:], request.drafter))
    rows = split(log, request.held_out)
    rows[: len(rows) - num_alike] = True
    num_judged = int((~rows).sum())
    if num_judged < LEAST_JUDGED:
        raise NotYetError(
            f"{round(LEAST_JUDGED / request.held_out)} steps of version {origin.newest} of "
            f"{origin.drafter}, or of others that draft like it, of which a share judges; there "
            f"are {num_alike}"
        )
    held_out, how = log.rows(~rows), replace(request.how, seed=request.seed)
    if request.in_force is None:
        network = fit_full_information(log, rows, how)
        ks = chosen_ks(network, log)[~rows]
        taken = np.minimum([step.draft_k for step in held_out.steps], log.max_draft)
        gates = [compare_ks(held_out, ks, taken, _LOGGED), judge_network(network, log, rows)]
    else:
        former = Network.from_text(request.in_force)
        budgets = _budgets_of(log, former)
        network = fit_depth(log, rows, budgets, how, former.size)
        ours, theirs = (played(one, log, budgets).rows(~rows) for one in (network, former))
        gates = [compare(held_out, ours, theirs, _NETWORK)]
    gain, low = gates[0].gain, gates[0].low - 1
    about = {"method": "full", "gain": f"{gain:.4f}", "at_least": f"{low:.4f}"}
    return Fitted(
        network=network.to_bytes(about | origin.metadata()),
        passed=all(gate.passed for gate in gates) and 1 + gain >= request.margin,
        gain=gain,
        low=low,
        lines=(*(gate.to_line() for gate in gates), *_too_little(gain, request.margin)),
        num_steps=int(rows.sum()),
        num_judged=num_judged,
        origin=origin,
    )


def _budgets_of(log: ReplayedLog, network: Network) -> BudgetScores | None:
    """What the shares of a network's size would have brought; ``None``: it has none, or the log
    does not tell, as where ``policy.ltd.size`` is ``off``."""
    if network.size is None:
        return None
    try:
        return BudgetScores.of(log, network.size.num_shares)
    except ValueError:
        return None


def _too_little(gain: float, margin: float) -> list[str]:
    """That a gain is not worth a version, if it is not."""
    if 1 + gain >= margin:
        return []
    return [f"less than the {100 * (margin - 1):+.2f} % of trainer.gate_margin"]


def _fit_head(request: Request, steps: list[LoggedStep], origin: Origin) -> Fitted:
    start, oldest = first_alike(steps, request.drafter)
    origin = replace(origin, oldest=oldest)
    samples = samples_of(steps[start:], request.drafter)
    fitted_on, judged_by = split_samples(samples, request.held_out)
    head = fit_head(fitted_on, HeadFit(seed=request.seed))
    gates = [judge_head(head, fitted_on, judged_by)]
    if request.in_force is not None:
        former = Head.from_text(request.in_force)
        gates.insert(0, judge_head(head, fitted_on, judged_by, former, _NETWORK))
    gain = gates[0].auc - gates[0].place_auc
    about = {"method": request.kind, "auc": f"{gates[0].auc:.4f}"}
    return Fitted(
        network=head.to_bytes(about | origin.metadata()),
        passed=gates[0].passed,
        gain=gain,
        low=gates[0].low,
        lines=tuple(gate.to_line() for gate in gates),
        num_steps=len(fitted_on),
        num_judged=len(judged_by),
        origin=origin,
    )


FITS: dict[str, Callable[[Request, list[LoggedStep], Origin], Fitted]] = {
    "ltd": _fit_ltd,
    "specdecpp": _fit_head,
}
"""Policies whose networks are fitted -> what fits them: (request, steps of as few of the newest
versions as have drafted enough, whose these are) -> network. Raises ``NotYetError`` or ValueError
if they say too little."""


# ---- the process ---------------------------------------------------------------------------------


def asked(request: Request, records: Sequence[bytes]) -> Iterator[bytes]:
    """A request as it is written to the process.

    Args:
        records: encoded traces, in order.
    """
    text = json.dumps(asdict(request)).encode()
    for part in (text, *records):
        yield _LENGTH.pack(len(part))
        yield part


def answer_of(answer: bytes) -> Fitted:
    """What the process answered.

    Raises:
        NotYetError: more traces are needed.
        ValueError: it could not fit, or it is no answer.
    """
    try:
        found = json.loads(answer)
        if "not_yet" in found:
            raise NotYetError(found["not_yet"])
        if "failed" in found:
            raise ValueError(found["failed"])
        return Fitted(
            **{
                **found,
                "network": base64.b64decode(found["network"], validate=True),
                "lines": tuple(found["lines"]),
                "origin": Origin(**found["origin"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"the process that fits answered no network: {error}") from error


def main() -> None:
    """Answer one request."""
    os.nice(19 - os.nice(0))
    if len(sys.argv) > 1:
        watch(int(sys.argv[1]), lambda: os._exit(1))
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    text, *records = _parts(sys.stdin.buffer)
    request = Request.read(text)
    try:
        found = fit(request, (decode_trace(one) for one in records))
    except NotYetError as error:
        answer: dict[str, Any] = {"not_yet": str(error)}
    except SettingsError as error:
        answer = {"failed": str(error)}
    else:
        answer = {**asdict(found), "network": base64.b64encode(found.network).decode()}
    sys.stdout.write(json.dumps(answer))


def _parts(stream: BinaryIO) -> Iterator[bytes]:
    while head := stream.read(_LENGTH.size):
        yield stream.read(_LENGTH.unpack(head)[0])


if __name__ == "__main__":
    main()
