"""Traces on disk: one safetensors file per prompt."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from traces.trace import Trace, TraceHeader

SUFFIX = ".safetensors"
# One key only: safetensors writes several in random order, and equal traces would be different bytes.
METADATA_KEY = "recycled-attention-trace"
# Of the arrays of a trace, as safetensors names them.
_DTYPES = {"F32": "<f4", "I32": "<i4"}


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
            with safe_open(self.path, framework="np") as file:
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{self.path} is truncated or no safetensors file ({error}): record it again.") from error
        except OSError as error:
            raise ValueError(f"cannot read the trace {self.path}: {error.strerror or error}.") from error
        if METADATA_KEY not in metadata:
            raise ValueError(f"{self.path} is no trace: its metadata has no {METADATA_KEY!r}.")
        try:
            return TraceHeader.from_json(metadata[METADATA_KEY])
        except ValueError as error:
            raise ValueError(f"{self.path} is no trace: {error}.") from error

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

    def mapped(self, name: str) -> np.ndarray:
        """One array of the trace as the file's memory: read-only, and read as far as it is touched.

        Raises:
            ValueError: If the file has no such array, or ends before it does.
        """
        try:
            with self.path.open("rb") as file:
                n_header = int.from_bytes(file.read(8), "little")
                entry = json.loads(file.read(n_header))[name]
            offset = 8 + n_header + int(entry["data_offsets"][0])
            return np.memmap(self.path, _DTYPES[entry["dtype"]], "r", offset, tuple(entry["shape"]))
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is no whole trace: {name} cannot be read ({error}).") from error

    def load(self) -> Trace:
        """Read it whole.

        Raises:
            ValueError: As `header` does, or if arrays are missing or of the wrong shape.
        """
        header = self.header
        with safe_open(self.path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        try:
            return Trace(header=header, **arrays)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is no whole trace: {error}") from error

    def digest(self) -> str:
        """`sha256:` and the hash of the file's bytes."""
        with self.path.open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def write_trace(trace: Trace, folder: Path | str) -> TraceFile:
    """Write a trace into `folder` under its prompt's name: beside its place first, then renamed."""
    path = Path(folder) / (trace.name + SUFFIX)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    arrays = {name: np.ascontiguousarray(array) for name, array in trace.arrays().items()}
    save_file(arrays, partial, metadata={METADATA_KEY: trace.header.to_json()})
    os.replace(partial, path)
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
                        f"{self.path} mixes traces: {file.path.name} has {name} {dict(mine)}, "
                        f"{first.path.name} has {dict(theirs)}."
                    )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._files[index]

    def __iter__(self) -> Iterator[TraceFile]:
        return iter(self._files)
