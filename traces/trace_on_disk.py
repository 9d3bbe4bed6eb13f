"""A trace that is written where it lies: its arrays are the file's own memory, which the system moves to disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from traces.reporting.whole_file import whole_file
from traces.trace import Trace, TraceHeader
from traces.trace_file import DTYPES, LENGTH_BYTES, METADATA_KEY, SUFFIX, array_of

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
    entries: dict[str, dict[str, Any]] = {}
    n_bytes = 0
    for kind, dtype in DTYPES.items():
        for name, (of_type, shape) in sorted(header.layout().items()):
            if of_type == dtype:
                end = n_bytes + math.prod(shape) * np.dtype(dtype).itemsize
                entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [n_bytes, end]}
                n_bytes = end
    said = {"__metadata__": {METADATA_KEY: header.to_json()}, **entries}
    head = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    # Arrays begin at whole eights of bytes.
    head += b" " * (-len(head) % LENGTH_BYTES)
    head = len(head).to_bytes(LENGTH_BYTES, "little") + head
    with whole_file(Path(folder) / (header.prompt["name"] + SUFFIX)) as partial:
        with partial.open("wb") as file:
            file.write(head)
            for begin in range(0, n_bytes, _PART_BYTES):
                file.write(bytes(min(_PART_BYTES, n_bytes - begin)))
        mapped = np.memmap(partial, np.uint8, "r+")
        data = mapped.view(np.ndarray)[len(head) :]
        yield Trace(header=header, **{name: array_of(name, entry, data) for name, entry in entries.items()})
        mapped.flush()
