"""Triton's interpreter, without work that it repeats for nothing.

An interpreted kernel spends nearly all its time on Triton's checks of types and shapes. What is
computed here is what Triton computes; the same answer is only not worked out again:

- A launch replaces some 200 functions of ``triton.language`` by interpreted ones, and puts them
  back behind it; so does each call of a jitted function by another one. Here the first launch of a
  process does it for good: nothing is compiled in a process that interprets.
- Sums and products of integers are computed again in 64 bits, for an assertion about overflows that
  is left out unless Triton debugs.
- Every value gets a shape of new objects, and every type a new name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import triton.language as tl
from triton._utils import validate_block_shape
from triton.language import core
from triton.runtime import interpreter


@cache  # a second call changes nothing
def spare_repetition() -> None:
    """Change the interpreter of this process."""
    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter._patch_attr = _patch_attr
    interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)
    core._unwrap_if_constexpr = _unwrap_if_constexpr
    core.tensor.__init__ = _init_tensor
    core.block_type.__init__ = _init_block_type
    core.block_type.name = property(lambda kind: f"<{kind.shape}, {kind.element_ty}>")
    core.dtype.__eq__ = _same_dtype


def _once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """``patch``, which does nothing for functions whose modules are patched, and lasts."""
    patched: set[str] = set()

    def patch_lang(function: Callable[..., Any]) -> Any:
        modules = _languages_of(function)
        if not modules <= patched:
            patch(function)
            patched.update(modules)
        return interpreter._LangPatchScope()  # has nothing to restore

    return patch_lang


@cache
def _languages_of(function: Callable[..., Any]) -> frozenset[str]:
    """Names of the modules that the interpreter patches for a function."""
    modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    return frozenset(module.__name__ for module in modules)


def _patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """Replace a function of the language by one that tells it to interpret."""
    function = getattr(member, "__wrapped__", member)  # without a check that it has been told

    def call(*arguments: Any, **options: Any) -> Any:
        options["_semantic"] = interpreter.interpreter_semantic
        return function(*arguments, **options)

    scope.set_attr(owner, name, call)


def _looked_up_once(dtype_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``dtype_of``, which builds a table at every call, but with a table kept for all calls."""
    of_numbers = cache(dtype_of)

    def kept(kind: Any) -> Any:
        one = kind.scalar
        return dtype_of(one) if isinstance(one, tl.pointer_type) else of_numbers(one)

    return kept


_unwrap = core._unwrap_if_constexpr
_AS_THEY_ARE = frozenset({core.tensor, core.dtype, core.block_type, int, float, bool, str})


def _unwrap_if_constexpr(value: Any) -> Any:
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    return value.value if kind is core.constexpr else _unwrap(value)


_same_name = core.dtype.__eq__


def _same_dtype(one: Any, other: Any) -> bool:
    return one is other or _same_name(one, other)


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    sizes = tuple(type.shape.values) if type.is_block() else ()
    self.shape, self.numel = _shape_of_tensor(sizes)


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    self.element_ty = element_ty
    sizes = tuple(_unwrap_if_constexpr(size) for size in _unwrap_if_constexpr(shape))
    if not sizes:
        raise TypeError("0d block_type is forbidden")
    self.shape, self.numel = _shape_of_type(sizes)


@cache
def _shape_of_tensor(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    """Shape and number of elements as constants of the language."""
    numel = 1
    for size in sizes:
        numel *= size
    return core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(numel)


@cache
def _shape_of_type(sizes: tuple[int, ...]) -> tuple[Any, int]:
    """Shape and number of elements of a block, whose sizes are checked."""
    return core.tuple(list(sizes)), validate_block_shape(sizes)
