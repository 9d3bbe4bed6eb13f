"""Kernels that are compiled once and kept on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import llvmlite.binding as llvm
from filelock import FileLock
from numba import njit
from numba.core.caching import IndexDataCacheFile
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import CPUDispatcher, cpu_target

from policies import program

_LOGGER = logging.getLogger("recycler")

# What all programs of policies are run by.
PROGRAM_SOURCES = (Path(program.__file__), *sorted(Path(__file__).parent.glob("*.py")))


def digest_of(sources: Iterable[Path]) -> str:
    """Of all that some kernels are made of, in the order given."""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _tell_that_kernels_compile(folder: str) -> None:
    """One line per process: whoever waits for the first token wants to know for what."""
    _LOGGER.warning("compiling kernels for this machine, once: half a minute; they are kept in %s", folder)


class _KeptFiles(IndexDataCacheFile):  # type: ignore[misc]
    """What is kept of a kernel, for one process at a time.

    numba's own would let two processes that compile it for two types count to the same number, and one type's code be
    kept under the other's name.
    """

    def load(self, key: Any) -> Any:
        with FileLock(f"{self._index_path}.lock"):
            found = super().load(key)
        if found is None:
            _tell_that_kernels_compile(str(Path(self._index_path).parent))
        return found

    def save(self, key: Any, data: Any) -> None:
        with FileLock(f"{self._index_path}.lock"):
            super().save(key, data)


class _Part(JITCodeLibrary):  # type: ignore[misc]
    """What is only ever compiled into a kernel: no machine code is made of it alone.

    numba makes it, to no use, of every helper, and three times over of what threads share.
    """

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        # Where numba notes what belongs to a function, once that is compiled.
        notes = "".join(
            f"@{variable.name} = common global i8* null\n"
            for variable in self._final_module.global_variables
            if variable.name.startswith("_ZN08NumbaEnv") and not variable.is_declaration
        )
        self._codegen._add_module(llvm.parse_assembly(notes))
        self._codegen._engine.finalize_object()
        self._finalized = True


@contextmanager
def _libraries_are(kind: type[JITCodeLibrary]) -> Iterator[None]:
    """What numba makes libraries of, for whoever holds its compiler lock."""
    codegen = cpu_target.target_context.codegen()
    before, codegen._library_class = codegen._library_class, kind
    try:
        yield
    finally:
        codegen._library_class = before


class _KernelCompiler(Compiler):  # type: ignore[misc]
    """A kernel has machine code, and all else that it is made of has none."""

    def compile_extra(self, function: Callable[..., Any]) -> Any:
        self.state.library = JITCodeLibrary(self.state.targetctx.codegen(), function.__qualname__)
        self.state.library.enable_object_caching()
        with _libraries_are(_Part):
            return super().compile_extra(function)


class _Kernel(CPUDispatcher):  # type: ignore[misc]
    """What one process compiles, others wait for and load, instead of doing the same."""

    def compile(self, sig: Any) -> Any:
        of_sig = hashlib.sha256(repr(sig).encode()).hexdigest()[:16]
        kept = self._cache._cache_file
        # In this order in all threads: a kernel compiles the kernels that it calls.
        lock = FileLock(f"{kept._index_path}.{of_sig}.lock")
        with global_compiler_lock, lock, _libraries_are(JITCodeLibrary):
            return super().compile(sig)


class _Helper(CPUDispatcher):  # type: ignore[misc]
    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        # numba would jump to address 0.
        raise TypeError(f"{self.__name__} is for kernels alone: call it in a function under `numba.njit`.")


def stamped_kernel(digest: str, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` for a function that Python calls: kept on disk while the digest of its sources stays.

    numba itself looks at the file of the function only, and would run old code after a change in what it calls.

    Args:
        digest: Of all sources of the kernel.
        options: Of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = njit(error_model="numpy", cache=True, pipeline_class=_KernelCompiler, **options)(function)
        compiled.__class__ = _Kernel
        cache = compiled._cache
        stamp = (cache._cache_file._source_stamp, digest)
        cache._cache_file = _KeptFiles(cache.cache_path, cache._impl.filename_base, stamp)
        return compiled

    return decorate


def helper(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` for a function that only kernels call: compiled without a way in from Python, and into each of them.

    That way is code too: of a function of named tuples, more than its own. Left a function, it may round otherwise in
    the process that compiles kernels than in one that loads them: there, all of them call the copy of the first.

    Args:
        options: Of `numba.njit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = njit(
            error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, forceinline=True, **options
        )(function)
        compiled.__class__ = _Helper
        return compiled

    return decorate
