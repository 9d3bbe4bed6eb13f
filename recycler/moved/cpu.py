"""What `recycler.cpu` was in 0.1: a folder of modules."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

warnings.warn("recycler.cpu is now recycler.decode.cpu; the old path goes in 0.3.", DeprecationWarning, stacklevel=2)


def __getattr__(name: str) -> ModuleType:
    """`from recycler.cpu import engine` gives the module of the new folder."""
    path = f"recycler.decode.cpu.{name}"
    if importlib.util.find_spec(path) is None:
        raise AttributeError(f"recycler.decode.cpu has no module {name!r}.")
    return importlib.import_module(path)
