"""Triton's interpreter, without work that it repeats for nothing.

A launch replaces some 200 functions of ``triton.language`` by interpreted ones. The interpreter
does that again whenever a jitted function calls another one, although they are replaced already: a
third of the time that our kernels take in tests. Here a launch does it once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


@cache  # a second call changes nothing
def spare_repetition() -> None:
    """Change the interpreter of this process."""
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)


def _once_per_launch(patch: Callable[..., Any]) -> Callable[..., Any]:
    """``patch``, which does nothing for functions whose modules the launch has patched before."""
    patched: set[str] = set()  # empty between launches

    def patch_lang(function: Callable[..., Any]) -> Any:
        modules = _languages_of(function)
        if modules <= patched:
            return interpreter._LangPatchScope()  # has nothing to restore
        scope = patch(function)
        if not patched:
            scope.restore = _both(patched.clear, scope.restore)
        patched.update(modules)
        return scope

    return patch_lang


def _languages_of(function: Callable[..., Any]) -> set[str]:
    """Names of the modules that the interpreter patches for a function."""
    modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    return {module.__name__ for module in modules}


def _both(first: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        then()

    return call


def _looked_up_once(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``dtype_of``, which builds a table at every call, but with a table kept for all calls."""
    of_numbers = cache(dtype_of)

    def kept(kind: Any) -> Any:
        one = kind.scalar
        return dtype_of(one) if isinstance(one, tl.pointer_type) else of_numbers(one)

    return kept
