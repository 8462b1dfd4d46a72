"""Checks across settings: values that are each valid alone but contradict each other."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from itertools import pairwise

from configs.schema import DrafterSettings, PolicySettings, Settings
from configs.urls import MASK, file_place_problem

ENV_PREFIX = "SLIPSTREAM_"
IN_MEMORY = ("socket", "memory")
"""Schemes of ``buffer.url`` whose backends put no trace on a disk."""
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def check_settings(settings: Settings) -> list[str]:
    """Contradictions between settings, one message each; empty if there are none."""
    return [
        *_paths(settings),
        *_server(settings),
        *_drafting(settings),
        *_tables(settings.policy),
        *_sizes(settings),
        *_capture(settings),
        *_training(settings),
    ]


def _paths(settings: Settings) -> Iterator[str]:
    """Folders and files that somebody has named by a URL, which may hold a password."""
    paths = {
        "run_dir": settings.run_dir,
        "trainer.signing_key": settings.trainer.signing_key,
        "swap.public_key": settings.swap.public_key,
    }
    for name, path in paths.items():
        problem = None if path is None else file_place_problem(name, path)
        if problem is not None:
            yield problem


def _server(settings: Settings) -> Iterator[str]:
    server = settings.server
    if not _is_loopback(server.host) and not server.api_key:
        yield (
            f"server.host {server.host!r} is not loopback and server.api_key is not set; "
            f"set {ENV_PREFIX}SERVER__API_KEY or bind 127.0.0.1"
        )
    if server.api_key == MASK:
        yield "server.api_key is the mask that --print-config prints; put the real key there"
    if MASK in settings.buffer.url:
        yield "buffer.url has the mask that --print-config prints; put what it hides there"


def _drafting(settings: Settings) -> Iterator[str]:
    policy, drafter, suffix = settings.policy, settings.drafter, settings.drafter.suffix
    if policy.kind == "fixed" and policy.draft_k > drafter.max_draft:
        yield (
            f"policy.draft_k {policy.draft_k} is above drafter.max_draft {drafter.max_draft}; "
            f"lower one or raise the other"
        )
    if policy.kind == "fixed" and policy.draft_k > 0 and drafter.kind != "none":
        yield from _fixed_drafter(settings)
    if drafter.kind == "suffix" and not suffix.enabled:
        yield (
            "drafter.kind 'suffix' needs drafter.suffix.enabled; use drafter.kind 'none' to decode "
            "without a drafter"
        )
    if drafter.model is not None and drafter.kind != "draft_model":
        yield (
            f"drafter.model is set, but a drafter of kind {drafter.kind!r} is no language model; "
            f"set drafter.kind to 'draft_model' or take drafter.model out"
        )
    if suffix.mixed and not (suffix.enabled and drafter.kind not in ("none", "suffix")):
        yield (
            "drafter.suffix.mixed needs the index beside a neural drafter; set "
            "drafter.suffix.enabled to true and drafter.kind to one, or take it out"
        )
    if drafter.former and drafter.kind == "none":
        yield (
            "drafter.former keeps the version before the newest of a drafter, but drafter.kind is "
            "'none'; name a drafter that learns, or set drafter.former to false"
        )
    if drafter.former and suffix.mixed and suffix.place == "device":
        yield (
            "drafter.former needs rounds of the drafter alone, but with drafter.suffix.mixed and "
            "drafter.suffix.place 'device' it drafts with the index only; set one of them to false"
        )
    yield from _beside(drafter)
    if suffix.min_match > suffix.max_match:
        yield (
            f"drafter.suffix.min_match {suffix.min_match} is above drafter.suffix.max_match "
            f"{suffix.max_match}"
        )


def _tables(policy: PolicySettings) -> Iterator[str]:
    """Tables by batch size: one entry for each size, and tiers in rising order."""
    tables = {
        "policy.table.lengths": [batch for batch, _ in policy.table.lengths],
        "policy.ema_tiers.tiers": [batch for batch, _ in policy.ema_tiers.tiers],
    }
    for key, batches in tables.items():
        twice = next((one for one in batches if batches.count(one) > 1), None)
        if twice is not None:
            yield f"{key} has two entries for batch {twice}; take one out"
    for batch, tiers in policy.ema_tiers.tiers:
        if any(one >= following for one, following in pairwise(tiers)):
            yield (
                f"policy.ema_tiers.tiers: K for batch {batch} must rise, got "
                f"{', '.join(map(str, tiers))}"
            )


def _beside(drafter: DrafterSettings) -> Iterator[str]:
    """Further drafters: of a kind of their own each, and only beside a drafter."""
    kinds = [one.kind for one in drafter.beside]
    if kinds and drafter.kind in ("none", "suffix"):
        yield (
            f"drafter.beside names {kinds[0]!r}, but drafter.kind is {drafter.kind!r}; make "
            f"{kinds[0]!r} drafter.kind itself"
        )
    for number, kind in enumerate(kinds):
        if kind in (drafter.kind, *kinds[:number]):
            yield f"drafter.beside names {kind!r}, which is a drafter of this server already"
    for one in drafter.beside:
        if one.model is not None and one.kind != "draft_model":
            yield (
                f"drafter.beside sets model for kind {one.kind!r}, which is no language model; "
                f"take it out"
            )


def _fixed_drafter(settings: Settings) -> Iterator[str]:
    """``policy.drafter`` must be loaded: ``drafter.kind``, one of ``drafter.beside``, or the suffix
    index beside them."""
    wanted, drafter = settings.policy.drafter, settings.drafter
    if wanted == "suffix":
        if not drafter.suffix.enabled:
            yield "policy.drafter 'suffix' needs drafter.suffix.enabled"
    elif wanted not in (drafter.kind, *(one.kind for one in drafter.beside)):
        yield (
            f"policy.drafter {wanted!r} is not loaded with drafter.kind {drafter.kind!r}; "
            f"set policy.drafter to {drafter.kind!r} or drafter.kind to {wanted!r}"
        )


def _sizes(settings: Settings) -> Iterator[str]:
    engine, buffer = settings.engine, settings.buffer
    pages, longest = engine.num_pages, engine.max_model_len
    if pages is not None and longest is not None and pages * engine.page_size < longest:
        yield (
            f"engine.num_pages {pages} of engine.page_size {engine.page_size} tokens "
            f"cannot hold one request of engine.max_model_len {longest}"
        )
    if buffer.max_bytes is not None and buffer.max_bytes < 2 * buffer.segment_bytes:
        yield (
            f"buffer.max_bytes {buffer.max_bytes} holds less than two segments of "
            f"buffer.segment_bytes {buffer.segment_bytes}; raise the first or lower the second"
        )


def _capture(settings: Settings) -> Iterator[str]:
    capture, scheme = settings.capture, settings.buffer.url.partition(":")[0]
    if capture.memory_only and scheme not in IN_MEMORY:
        yield (
            f"capture.memory_only is true, but buffer.url begins with '{scheme}:', which keeps "
            f"traces on a disk or in a service that may; set buffer.url to 'socket:'"
        )
    if capture.process and capture.enabled and scheme == "memory":
        yield (
            "capture.process is true, but buffer.url begins with 'memory:', which only the process "
            "that writes can read; set capture.process to false, or buffer.url to 'socket:' or "
            "'shm:'"
        )
    if capture.redact is not None and not _FUNCTION.fullmatch(capture.redact):
        yield f"capture.redact {capture.redact!r} must look like 'module:function'"
    both = sorted(set(capture.tenants or ()) & set(capture.excluded_tenants))
    if both:
        yield f"capture.tenants and capture.excluded_tenants both name {both[0]!r}; take one out"


def _training(settings: Settings) -> Iterator[str]:
    trainer = settings.trainer
    if trainer.deepspeed.stage > 0 and trainer.optimizer != "adamw":
        yield (
            f"trainer.deepspeed.stage {trainer.deepspeed.stage} divides AdamW alone, and "
            f"trainer.optimizer is {trainer.optimizer!r}; set it to 'adamw', or the stage to 0"
        )
    fitting = trainer.policy
    if fitting.least_steps > fitting.most_steps:
        yield (
            f"trainer.policy.least_steps {fitting.least_steps} is more than "
            f"trainer.policy.most_steps {fitting.most_steps}: no policy would ever be fitted"
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
