"""A trace that is written where it lies: its arrays are the file's own memory, which the system moves to disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from traces.reporting.whole_file import whole_file
from traces.trace import Trace, TraceHeader
from traces.trace_file import METADATA_KEY, SUFFIX

# Names of the types in a safetensors file, in the order in which it has their arrays.
_NAMES = {"<f4": "F32", "<i4": "I32"}
_ALIGNMENT_BYTES = 8
_PART_BYTES = 2**20


@contextmanager
def trace_on_disk(header: TraceHeader, folder: Path | str) -> Iterator[Trace]:
    """A trace of zeros to be filled in, which takes its name in `folder` when the `with` ends without an error.

    The file is byte for byte what `write_trace` makes of the same numbers. Its place on disk is taken first: a disk
    that is full is told here, and not by a signal when its memory is written to.

    Yields:
        The trace. Its arrays are not to be used after the `with`.

    Raises:
        OSError: If the file cannot be written.
    """
    entries, offset = {}, 0
    for dtype in _NAMES:
        for name, (of_type, shape) in sorted(header.arrays().items()):
            if of_type == dtype:
                n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
                entries[name] = (dtype, shape, [offset, offset + n_bytes])
                offset += n_bytes
    said = {
        name: {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": at}
        for name, (dtype, shape, at) in entries.items()
    }
    metadata = {"__metadata__": {METADATA_KEY: header.to_json()}}
    head = json.dumps({**metadata, **said}, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % _ALIGNMENT_BYTES)
    head = len(head).to_bytes(_ALIGNMENT_BYTES, "little") + head
    with whole_file(Path(folder) / (header.prompt["name"] + SUFFIX)) as partial:
        with partial.open("wb") as file:
            file.write(head)
            for begin in range(0, offset, _PART_BYTES):
                file.write(bytes(min(_PART_BYTES, offset - begin)))
        mapped = np.memmap(partial, np.uint8, "r+")
        data = mapped.view(np.ndarray)[len(head) :]
        yield Trace(
            header=header,
            **{name: data[at[0] : at[1]].view(dtype).reshape(shape) for name, (dtype, shape, at) in entries.items()},
        )
        mapped.flush()
