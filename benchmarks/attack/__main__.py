"""`python -m benchmarks.attack --minutes 20 --seed 0`: whatever was promised, attacked; see docs/reliability.md."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.attack.attacked import attacked
from benchmarks.attack.rows import ROWS
from policies import written_by
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

WHOLE_MINUTES = 85
_RESULT = Path(__file__).parents[2] / "docs/results/attack.json"
# Cases between two notes of how far a row is.
_AT_ONCE = 50
_MOST_FINDINGS_TOLD = 20


def main(
    minutes: Annotated[float, typer.Option(help="85 is a whole run; less is that share of each row.", min=0.01)] = 85,
    seed: Annotated[int, typer.Option(help="Of every case.")] = 0,
    rows: Annotated[str, typer.Option(help="Classes of rows, by commas; default: all of them.")] = "",
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = _RESULT,
    state: Annotated[Path, typer.Option(help="What is done already, so that a run that was cut off goes on.")] = Path(
        "build/attack.json"
    ),
) -> dict[str, Any]:
    """Attack, and say what was found; the exit code is 1 if anything was."""
    by_name = {row.__name__: row for row in ROWS}
    asked = [name.strip() for name in rows.split(",") if name.strip()] or list(by_name)
    for name in asked:
        if name not in by_name:
            raise ValueError(f"the row {name!r} is unknown: use some of {', '.join(by_name)}.")
    run = {"seed": seed, "minutes": minutes}
    done = _known(state, run)
    for name in asked:
        n = max(1, round(by_name[name].n * min(minutes / WHOLE_MINUTES, 1)))
        while (mine := done.setdefault(name, {"n": 0, "seconds": 0.0, "findings": []}))["n"] < n:
            # A row takes seconds to begin, and what was not noted is done again.
            at_once = max(_AT_ONCE, n // 4) if by_name[name].n > 1000 and name != "Memory" else n
            cases = range(mine["n"], min(mine["n"] + at_once, n))
            began = time.perf_counter()
            mine["findings"] += attacked(name, seed, cases)
            mine["seconds"] = round(mine["seconds"] + time.perf_counter() - began, 1)
            mine["n"] = cases.stop
            write_text(state, json.dumps({**run, "rows": done}))
            print(f"{name}: {mine['n']} of {n}, {len(mine['findings'])} findings", file=sys.stderr)
    _print(done, asked)
    result = {
        "what": "python -m benchmarks.attack",
        "written_by": written_by(),
        **run,
        "rows": {by_name[name].name: {"n": done[name]["n"], **_told(done[name])} for name in asked},
    }
    write_text(out, json.dumps(result, indent=1) + "\n")
    n_findings = sum(len(done[name]["findings"]) for name in asked)
    if n_findings:
        print(json.dumps({"findings": n_findings, "out": str(out)}))
        raise typer.Exit(1)
    state.unlink(missing_ok=True)
    return {"findings": 0, "out": str(out)}


def _known(state: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """What an equal run had done when it was cut off."""
    if not state.exists():
        return {}
    known = json.loads(state.read_text(encoding="utf-8"))
    return dict(known["rows"]) if {name: known[name] for name in run} == run else {}


def _told(of_row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "findings": len(of_row["findings"]),
        "seconds": of_row["seconds"],
        "first_findings": of_row["findings"][:_MOST_FINDINGS_TOLD],
    }


def _print(done: Mapping[str, Any], asked: list[str]) -> None:
    table = Table("attack", "n", "seconds", "findings")
    for row in ROWS:
        if row.__name__ in asked:
            mine = done[row.__name__]
            table.add_row(row.name, f"{mine['n']:,}", f"{mine['seconds']:,.0f}", str(len(mine["findings"])))
    Console(width=min(shutil.get_terminal_size().columns, 120)).print(table)
    for row in ROWS:
        for found in done.get(row.__name__, {}).get("findings", [])[:3] if row.__name__ in asked else ():
            print(f"{row.__name__}: {found}")


if __name__ == "__main__":
    run_command(main, version=written_by())
