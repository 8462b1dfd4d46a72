"""Hooks that schemathesis loads before it generates requests (``SCHEMATHESIS_HOOKS``)."""

from __future__ import annotations

from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, GenerationMode, HookContext, Response

ACROSS_FIELDS = {"prompt", "messages", "max_tokens", "stream_options", "top_logprobs"}
"""Fields that a valid body may still get wrong: no schema says how long a text is in tokens, or
which fields go together."""
FEW = 2
"""Completion tokens in these tests, which check formats."""


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    """Reduce the work. Valid bodies stay valid and invalid ones invalid."""
    body = case.body
    if not isinstance(body, dict):
        return
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if type(value) is int and FEW < value <= 512:
            body[name] = FEW
    if body.get("max_tokens") is body.get("max_completion_tokens") is None:
        body["max_tokens"] = FEW
    if type(body.get("n")) is int and 2 < body["n"] <= 8:
        body["n"] = 2


@schemathesis.check
def valid_data_is_taken(ctx: CheckContext, response: Response, case: Case) -> None:
    """A body that the schema allows is refused only for reasons that no schema can express."""
    is_valid = case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE
    if is_valid and response.status_code == 400:
        param = response.json()["error"]["param"]
        assert param in ACROSS_FIELDS, f"valid data was refused for {param!r}"
