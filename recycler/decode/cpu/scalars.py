"""Numbers inside the kernels: bfloat16 as its 16 bits, the bits of a float, and an exponential that vectorises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from policies.compiled.kernel import helper

_LOG2_E = np.float32(1 / math.log(2))
# ln 2 in two parts, the first exact in few bits, so that n x ln 2 loses nothing.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
# Below it the result would be subnormal.
_LOWEST = np.float32(-87.0)


@intrinsic
def widen(_context: Any, value: Any) -> Any:
    """A stored number as one to compute with: uint16 is bfloat16 and becomes float32, a float stays what it is."""
    if value != types.uint16:
        return value(value), lambda context, builder, signature, args: args[0]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(word, ir.FloatType())

    return types.float32(value), codegen


@intrinsic
def narrow(_context: Any, value: Any, like: Any) -> Any:
    """A computed number as one to store, in the type of `like`; to bfloat16, to nearest with ties to even."""
    if like != types.uint16:
        return like(value, like), lambda context, builder, signature, args: context.cast(builder, args[0], value, like)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        # Rounding would carry some NaNs over into infinity or zero.
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        kept = builder.select(is_nan, ir.Constant(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(kept, ir.Constant(word, 16)), ir.IntType(16))

    return types.uint16(types.float32, like), codegen


@intrinsic
def bits_of(_context: Any, value: Any) -> Any:
    """The 32 bits of a float32 as an int32; for numbers that are not negative they sort as the numbers do."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def float_of(_context: Any, bits: Any) -> Any:
    """The float32 of 32 bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def prefetch(_context: Any, rows: Any, row: Any, column: Any) -> Any:
    """Ask for the cache line of `rows[row, column]`, which need not exist, without waiting for it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        indices = [context.cast(builder, args[i], signature.args[i], types.intp) for i in (1, 2)]
        pointer = cgutils.get_item_pointer(context, builder, signature.args[0], array, indices, wraparound=False)
        pointer = builder.bitcast(pointer, cgutils.voidptr_t)
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # For reading, to all levels, of data.
        builder.call(function, [pointer, *(ir.Constant(word, n) for n in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(rows, row, column), codegen


# `contract` alone: reassociation would merge the two parts of ln 2.
@helper(fastmath={"contract", "nnan"})
def _exp_float32(x: Any) -> Any:
    """e^x for x <= 0 with a relative error of 3e-7; 1.6e-38 below -87. Cephes' polynomial (netlib.org/cephes, expf)."""
    x = max(x, _LOWEST)
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * float_of(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))


def exp(x: Any) -> Any:
    """e^x for x <= 0, in the precision of x."""
    raise NotImplementedError("only for use inside kernels")


@overload(exp)
def _exp(x: Any) -> Any:
    # numba wants the annotations of the implementation to be those of the template.
    def single(x: Any) -> Any:
        return _exp_float32(x)

    def double(x: Any) -> Any:
        return math.exp(x)

    return single if x == types.float32 else double
