"""Work that threads share: one function, called once by every thread.

Not numba's `prange` around the work itself: numba compiles the body of such a loop four times over, each time in
another wrapper, and hands it every field of every named tuple by itself. Here the body is two addresses, compiled once
for all kernels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from recycler.decode.cpu.compiled import kernel

_ADDRESS = ir.IntType(64)
_SHARE = ir.FunctionType(ir.VoidType(), [_ADDRESS, _ADDRESS])


@intrinsic
def _call(_context: Any, function: Any, arguments: Any, thread: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function, arguments, thread = values
        builder.call(builder.inttoptr(function, _SHARE.as_pointer()), [arguments, thread])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@kernel(parallel=True)
def _call_on_threads(function: int, arguments: int, n_threads: int) -> None:
    for thread in prange(n_threads):
        _call(function, arguments, np.int64(thread))


@intrinsic
def on_threads(typing_context: Any, share: Any, arguments: Any, n_threads: Any) -> Any:
    """Call `share(thread, n_threads, *arguments)` for each of `n_threads` threads at a time, and wait for all.

    Args:
        share: A helper; it raises no errors.
        arguments: A tuple.
        n_threads: Threads to use, and as many calls.
    """
    # A number in the source is one of any other: its share is compiled once.
    arguments = types.Tuple([types.unliteral(kind) for kind in arguments])
    of_share = share.get_call_type(typing_context, (types.int64, types.int64, *arguments), {})
    of_call = types.void(types.int64, types.int64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _, packed, n_threads = values
        # What all threads see: `n_threads` and the arguments.
        state_type = types.Tuple([types.int64, *arguments])
        state = context.make_tuple(builder, state_type, [n_threads, *cgutils.unpack_tuple(builder, packed)])
        room = cgutils.alloca_once_value(builder, state)
        compiled = share.dispatcher.get_compile_result(of_share)
        context.active_code_library.add_linking_library(compiled.library)
        name = f"share.{compiled.fndesc.llvm_func_name}"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, _SHARE, name)
            function.linkage = "internal"
            inside = ir.IRBuilder(function.append_basic_block())
            address, thread = function.args
            seen = inside.load(inside.inttoptr(address, room.type))
            n, *fields = cgutils.unpack_tuple(inside, seen)
            context.call_internal_no_propagate(inside, compiled.fndesc, of_share, [thread, n, *fields])
            inside.ret_void()
        launch = _call_on_threads.get_compile_result(of_call)
        context.active_code_library.add_linking_library(launch.library)
        addresses = [builder.ptrtoint(pointer, _ADDRESS) for pointer in (function, room)]
        context.call_internal(builder, launch.fndesc, of_call, [*addresses, n_threads])
        return context.get_dummy_value()

    return types.void(share, arguments, types.int64), codegen
