"""Traces on disk: one safetensors file per prompt."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from policies.shown import sentence
from policies.strict_json import check_plain_file
from traces.reporting.differences import differences
from traces.reporting.whole_file import whole_file
from traces.trace import Trace, TraceHeader

SUFFIX = ".safetensors"
# One key only: safetensors writes several in random order, and equal traces would be different bytes.
METADATA_KEY = "recycled-attention-trace"
# Of the arrays of a trace, as safetensors names them, in the order in which it has them.
DTYPES = {"F32": "<f4", "I32": "<i4"}
# The first bytes of a safetensors file say how long its header is.
LENGTH_BYTES = 8


@dataclass(frozen=True)
class TraceFile:
    """A trace that has not been loaded yet.

    Attributes:
        path: The file.
    """

    path: Path

    @cached_property
    def header(self) -> TraceHeader:
        """Read without touching the arrays.

        Raises:
            ValueError: If the file is missing, truncated, or no trace.
        """
        try:
            check_plain_file(self.path)
            with safe_open(self.path, framework="np") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                sentence(f"{self.path} is truncated or no safetensors file ({error}): record it again.")
            ) from error
        except OSError as error:
            raise ValueError(f"cannot read the trace {self.path}: {error.strerror or error}.") from error
        if METADATA_KEY not in metadata:
            raise ValueError(f"{self.path} is no trace: its metadata has no {METADATA_KEY!r}.")
        try:
            return TraceHeader.from_json(metadata[METADATA_KEY])
        except ValueError as error:
            raise ValueError(sentence(f"{self.path} is no trace: {str(error).rstrip('.')}.")) from error

    @property
    def name(self) -> str:
        """Name of the prompt, and of the file without its ending."""
        return str(self.header.prompt["name"])

    @property
    def kind(self) -> str:
        """Kind of text."""
        return str(self.header.prompt["kind"])

    def array(self, name: str) -> np.ndarray:
        """Read one array of the trace.

        Raises:
            ValueError: If the file has no such array.
        """
        try:
            with safe_open(self.path, framework="np") as file:
                return np.asarray(file.get_tensor(name))
        except SafetensorError as error:
            raise ValueError(f"{self.path} is no whole trace: {error}.") from error

    def map(self) -> Trace:
        """The trace with the file's own memory as its arrays: read-only, and read as far as they are touched.

        All arrays share one mapping, which keeps a file descriptor until the last of them is gone. A file that is
        replaced by renaming, as `write_trace` does it, stays as it was for those who have mapped it; one that is cut
        short while it is mapped ends the process that reads on.

        Raises:
            ValueError: As `load` does, or if the system maps no more files.
        """
        _ = self.header  # Whatever is no trace is told here.
        # By a mapping of its own, which goes again with all that looking brought into memory.
        self._mapped(("recovered_mass", "fresh_mass"))
        return self._mapped(())

    def _mapped(self, checked: Sequence[str]) -> Trace:
        try:
            whole = np.memmap(self.path, np.uint8, "r").view(np.ndarray)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot map the trace {self.path}: {error}.") from error
        try:
            data_start = LENGTH_BYTES + int.from_bytes(whole[:LENGTH_BYTES].tobytes(), "little")
            entries = json.loads(whole[LENGTH_BYTES:data_start].tobytes())
            header = TraceHeader.from_json(entries.pop("__metadata__")[METADATA_KEY])
            trace = Trace(
                header=header, **{name: array_of(name, entries[name], whole[data_start:]) for name in entries}
            )
            trace.check_values(checked)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(sentence(f"{self.path} is no whole trace: {error}")) from error
        return trace

    def load(self) -> Trace:
        """Read it whole.

        Raises:
            ValueError: As `header` does, or if arrays are missing or of the wrong shape.
        """
        header = self.header
        try:
            with safe_open(self.path, framework="np") as file:
                names = list(file.keys())
                arrays = {name: np.asarray(file.get_tensor(name)) for name in names}
            for name, array in arrays.items():
                _check_dtype(name, array.dtype)
            trace = Trace(header=header, **arrays)
            trace.check_values()
        except (SafetensorError, AttributeError, TypeError, ValueError, MemoryError) as error:
            raise ValueError(sentence(f"{self.path} is no whole trace: {error}")) from error
        return trace

    def digest(self) -> str:
        """`sha256:` and the hash of the file's bytes."""
        with self.path.open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _check_dtype(name: str, dtype: np.dtype[Any]) -> None:
    wanted = np.int32 if name == "tokens" else np.float32
    if dtype != wanted:
        raise ValueError(f"{name} is of type {dtype}, not {np.dtype(wanted)}.")


def array_of(name: str, entry: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    """An array of a safetensors file, by its entry in the header and the bytes behind that."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of type {entry['dtype']}, which no array of a trace has")
    _check_dtype(name, np.dtype(DTYPES[entry["dtype"]]))
    begin, end = entry["data_offsets"]
    return data[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def write_trace(trace: Trace, folder: Path | str) -> TraceFile:
    """Write a trace into `folder` under its prompt's name: beside its place first, then renamed."""
    path = Path(folder) / (trace.name + SUFFIX)
    arrays = {name: np.ascontiguousarray(array) for name, array in trace.arrays().items()}
    with whole_file(path) as partial:
        try:
            save_file(arrays, partial, metadata={METADATA_KEY: trace.header.to_json()})
        except SafetensorError as error:
            if f"os error {errno.ENOSPC}" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
    return TraceFile(path)


class TraceFolder(Sequence[TraceFile]):
    """The traces of a folder, sorted by name, read when asked for.

    Args:
        path: The folder. Files that do not end in `.safetensors`, such as the remains of an interrupted recording,
            are passed over.

    Raises:
        ValueError: If the folder does not exist or holds no trace, if a file is truncated or foreign, or if the
            traces do not all have the same model shape and selection.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is no folder of traces: record some with python -m recycler.record.")
        self._files = [TraceFile(file) for file in sorted(self.path.glob("*" + SUFFIX))]
        if not self._files:
            raise ValueError(f"{self.path} holds no traces: record some with python -m recycler.record.")
        first = self._files[0]
        for file in self._files:
            for name in ("model", "selection"):
                mine, theirs = getattr(file.header, name), getattr(first.header, name)
                if mine != theirs:
                    raise ValueError(
                        sentence(
                            f"{self.path} mixes traces: {file.path.name} has {name} {differences(mine, theirs)} as in "
                            f"{first.path.name}."
                        )
                    )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._files[index]

    def __iter__(self) -> Iterator[TraceFile]:
        return iter(self._files)
