"""A small product whose sums stay in registers: what products of many rows are made of.

Compilers make vectors of a loop over one dimension and keep one row of sums, so that most of the time goes into loads.
Here 6 x 2 vectors of sums are kept (BLIS, doi 10.1145/2764454): each number that is loaded is used 2 or 6 times.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import errors
from numba.extending import intrinsic

# NumPy's numbers: for Python's numba compiles a function once for each that it is called with.
TILE_ROWS = np.int64(6)
_VECTORS, _VECTOR_BYTES = 2, 32
# A row of a tile.
TILE_BYTES = np.int64(_VECTORS * _VECTOR_BYTES)


def padded(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def tile_columns(dtype: Any) -> int:
    """Columns of a tile of floats of a type."""
    return int(TILE_BYTES) // int(np.dtype(dtype).itemsize)


@intrinsic
def tile_product(
    _context: Any,
    a: Any,
    a_begin: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_begin: Any,
    b_step: Any,
    n: Any,
    c: Any,
    c_begin: Any,
    c_row: Any,
    add: Any,
) -> Any:
    """`c[r, v] = sum over p < n of a[r, p] b[p, v]` for the rows and columns of a tile, or that added to what is there.

    Arrays are contiguous, and are looked at as rows of numbers: of `a`, stored floats or bfloat16 as its 16 bits, the
    number `a_begin + r a_row + p a_step`; of `b` and `c` as many numbers as a tile has columns, from
    `b_begin + p b_step` and `c_begin + r c_row` on.
    """
    if any(array.layout != "C" for array in (a, b, c)):
        raise errors.TypingError("tile_product takes arrays whose numbers lie side by side")
    number = b.dtype
    lanes = _VECTOR_BYTES * 8 // number.bitwidth

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        index, word = ir.IntType(64), ir.IntType(32)
        scalar = context.get_value_type(number)
        vector = ir.VectorType(scalar, lanes)
        rows, vectors = range(int(TILE_ROWS)), range(_VECTORS)

        def begin(array: int, at: int) -> Any:
            data = context.make_array(signature.args[array])(context, builder, args[array]).data
            return builder.gep(data, [whole(at)])

        def whole(i: int) -> Any:
            return context.cast(builder, args[i], signature.args[i], types.intp)

        def of_vector(pointer: Any, v: int) -> Any:
            return builder.bitcast(builder.gep(pointer, [index(v * lanes)]), vector.as_pointer())

        def load(pointer: Any) -> Any:
            loaded = builder.load(pointer)
            loaded.align = number.bitwidth // 8
            return loaded

        def everywhere(value: Any) -> Any:
            if a.dtype == types.uint16:
                value = builder.bitcast(builder.shl(builder.zext(value, word), word(16)), ir.FloatType())
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, word(0))
            return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(word, lanes), [0] * lanes))

        a_data, b_data, c_data = begin(0, 1), begin(4, 5), begin(8, 9)
        a_rows = [builder.gep(a_data, [builder.mul(whole(2), index(r))]) for r in rows]
        zero = ir.Constant(vector, [0.0] * lanes)
        before = builder.block
        head, body, done = (builder.append_basic_block(f"tile.{name}") for name in ("head", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        p = builder.phi(index)
        p.add_incoming(index(0), before)
        sums = [[builder.phi(vector) for _ in vectors] for _ in rows]
        for row in sums:
            for one in row:
                one.add_incoming(zero, before)
        builder.cbranch(builder.icmp_signed("<", p, whole(7)), body, done)
        builder.position_at_end(body)
        b_row = builder.gep(b_data, [builder.mul(p, whole(6))])
        columns = [load(of_vector(b_row, v)) for v in vectors]
        at = builder.mul(p, whole(3))
        for r in rows:
            factor = everywhere(builder.load(builder.gep(a_rows[r], [at])))
            for v in vectors:
                product = builder.fmul(factor, columns[v], flags=("contract",))
                sums[r][v].add_incoming(builder.fadd(product, sums[r][v], flags=("contract",)), body)
        p.add_incoming(builder.add(p, index(1)), body)
        builder.branch(head)
        builder.position_at_end(done)
        adds = context.cast(builder, args[11], signature.args[11], types.boolean)
        for r in rows:
            c_of_row = builder.gep(c_data, [builder.mul(whole(10), index(r))])
            for v in vectors:
                place = of_vector(c_of_row, v)
                held = builder.select(adds, load(place), zero)
                builder.store(builder.fadd(sums[r][v], held), place).align = number.bitwidth // 8
        return context.get_dummy_value()

    return types.void(a, a_begin, a_row, a_step, b, b_begin, b_step, n, c, c_begin, c_row, add), codegen
