"""A whole file or none."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Where to write what is to become a file: beside its place, and renamed when all is written.

    The folder is made. After an error, or an interrupt, the file is what it was, and nothing is left beside it.

    Args:
        path: The file.

    Yields:
        The path to write to.
    """
    path = Path(path)
    # Of its own: another process may be writing the same file.
    partial = path.with_name(f"{uuid.uuid4().hex[:12]}.{path.name}.partial")
    try:
        with errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def errors_named(path: Path | str) -> Iterator[None]:
    """Errors of the system that name no file, as that of a full disk, name this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write a whole text file in UTF-8, or none."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
