"""What every command of the project does alike: parse, fail in one sentence, end with one JSON line."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from policies.shown import sentence as shortened

_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_command(
    command: Callable[..., dict[str, Any]], arguments: list[str] | None = None, *, version: str | None = None
) -> NoReturn:
    """Run a typed function as a command line and exit.

    What the function returns is printed as one JSON line, the last of standard output. A ValueError is bad input: its
    sentence, of at most 300 characters, goes to standard error and the exit code is 2, as for a command line that does
    not parse; so does that of a full disk. An interrupt exits with 130.

    Args:
        command: Function whose parameters typer turns into options and whose docstring is the help text.
        arguments: Command line without the program's name; None takes the process's own.
        version: What the option `--version` prints; None leaves the option out.
    """
    parser = _parser(command)
    if version is not None:
        parser.params += _parser(_version_option).params
    try:
        result = parser(arguments, standalone_mode=False, obj=version)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except ValueError as error:
        _fail(f"error: {error}", 2)
    except OSError as error:
        if error.errno not in _DISK_IS_FULL:
            raise
        # Of a copy the second name is that of what was to be written.
        name = error.filename2 or error.filename
        _fail(f"error: the disk is full{_free(name)} and {name} was not written: make room, and run it again.", 2)
    except Exception as error:
        # The parser's own complaints; their base class has moved between typer releases.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"error: {error.format_message()}", 2)
    # Typer turns exits of its own, help and in some releases an interrupt, into their code.
    if result == 130:
        _fail("interrupted", 130)
    if isinstance(result, int):
        sys.exit(result)
    if isinstance(result, dict):
        print(json.dumps(result), flush=True)
    sys.exit(0)


def _free(name: object) -> str:
    """How much room a file's disk has, in brackets; empty if that cannot be told."""
    path = Path(str(name)).absolute()
    try:
        free_bytes = shutil.disk_usage(next(one for one in path.parents if one.exists())).free
    except OSError:
        return ""
    return f" ({free_bytes / 1e6:,.3f} MB free)"


def _parser(command: Callable[..., Any]) -> Any:
    """What typer makes of a function; its type has moved between typer releases."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    return typer.main.get_command(app)


def _show_version(context: typer.Context, asked: bool) -> None:
    if asked:
        print(context.obj)
        raise typer.Exit


def _version_option(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, expose_value=False, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Only carries the option, which every command gets."""


def _fail(text: str, exit_code: int) -> NoReturn:
    print(shortened(" ".join(text.split())), file=sys.stderr)
    sys.exit(exit_code)
