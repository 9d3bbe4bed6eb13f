from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import typer

from traces.reporting.command import run_command

Run = Callable[..., tuple[int, str, str]]


def add(left: int, right: int = 1) -> dict[str, Any]:
    """Add two numbers."""
    print("adding")
    return {"sum": left + right}


def test_what_a_command_returns_is_the_last_line_of_stdout_as_json(run: Run) -> None:
    code, out, err = run(add, "2", "--right", "3")
    assert code == 0
    assert out.splitlines()[:-1] == ["adding"]
    assert json.loads(out.splitlines()[-1]) == {"sum": 5}
    assert err == ""


def test_a_command_that_returns_nothing_prints_nothing(run: Run) -> None:
    def nothing() -> None:
        pass

    assert run(nothing) == (0, "", "")


def test_a_value_error_is_one_line_on_stderr_and_exit_code_2(run: Run) -> None:
    def refuse() -> dict[str, Any]:
        raise ValueError("the file is\n   truncated.")

    assert run(refuse) == (2, "", "error: the file is truncated.\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["1", "--frobnicate"], "--frobnicate"),
        (["one"], "left"),
        ([], "left"),
        (["1", "2"], "2"),
        (["1", "--right"], "--right"),
    ],
    ids=["unknown option", "not a number", "missing argument", "one argument too many", "option without value"],
)
def test_a_command_line_that_does_not_parse_is_one_line_on_stderr_and_exit_code_2(
    run: Run, arguments: list[str], named: str
) -> None:
    code, out, err = run(add, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert named in err.lower()
    assert err.count("\n") == 1


def test_help_names_the_command_and_exits_with_0(run: Run) -> None:
    code, out, err = run(add, "--help")
    assert (code, err) == (0, "")
    assert "Add two numbers." in out
    assert "--right" in out


def test_the_version_is_printed_whatever_else_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(add, ["--version"], version="project 1.2")
    assert caught.value.code == 0
    assert capsys.readouterr() == ("project 1.2\n", "")
    with pytest.raises(SystemExit):
        run_command(add, ["--help"], version="project 1.2")
    assert "--version" in capsys.readouterr().out


def test_a_command_with_a_version_runs_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(add, ["2"], version="project 1.2")
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"sum": 3}


def test_a_command_without_a_version_has_no_such_option(run: Run) -> None:
    code, out, err = run(add, "--version")
    assert (code, out) == (2, "")
    assert "--version" in err


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, typer.Abort])
def test_an_interrupt_exits_with_130(run: Run, interrupt: type[BaseException]) -> None:
    def stop() -> dict[str, Any]:
        raise interrupt

    code, out, err = run(stop)
    assert (code, out) == (130, "")
    assert err.split() == ["interrupted"]


def test_a_command_may_choose_its_exit_code(run: Run) -> None:
    def give_up() -> dict[str, Any]:
        raise typer.Exit(3)

    assert run(give_up) == (3, "", "")


def test_a_bug_keeps_its_traceback() -> None:
    def buggy() -> dict[str, Any]:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(buggy, [])


def test_without_arguments_the_command_line_of_the_process_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["add", "4"])
    with pytest.raises(SystemExit) as caught:
        run_command(add)
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"sum": 5}
