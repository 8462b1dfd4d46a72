"""Asks for memory before it is needed, in compiled code.

A read that misses the caches waits 100 ns and more, and the processor looks only some hundred
instructions further meanwhile. Asking does not wait, so that a batch waits for its memory once
and not for each request. It changes no result, whatever the index: nothing is read.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

_READ, _KEEP, _DATA = 0, 3, 1
"""Arguments of LLVM's instruction: to be read, worth keeping in all caches, not code."""
_intrinsic: Any = intrinsic


@_intrinsic
def ask(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the line of the cache that holds ``array[index]`` of a vector."""
    return types.void(array, index), _code


@_intrinsic
def ask_row(typing: Any, array: Any, row: Any, column: Any) -> Any:
    """Ask for the line of the cache that holds ``array[row, column]`` of a matrix."""
    return types.void(array, row, column), _code


def _code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    kind, *_ = signature.args
    array = arrayobj.make_array(kind)(context, builder, arguments[0])
    at = [builder.sext(one, cgutils.intp_t) for one in arguments[1:]]
    where = cgutils.get_item_pointer(
        context, builder, kind, array, at, wraparound=False, boundscheck=False
    )
    number = ir.IntType(32)
    type_ = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
    call = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], type_)
    place = builder.bitcast(where, cgutils.voidptr_t)
    builder.call(call, [place, number(_READ), number(_KEEP), number(_DATA)])
    return context.get_dummy_value()
