"""Commands run in this process, and whether they left anything where they should not."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from traces.reporting.command import run_command


def command(main: Callable[..., Any], *arguments: object) -> str | None:
    """Run a command; the ValueError that it ended with is raised, and its end is None otherwise."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_command(main, [str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    if code == 2:
        raise ValueError(err.getvalue().strip().splitlines()[-1])
    return None if code == 0 else f"exit code {code}: {err.getvalue()[-100:]}"


def files_of(folder: Path) -> Mapping[str, int]:
    """Every file below a folder, by its path, and its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
