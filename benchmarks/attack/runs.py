"""Small runs of the commands, and whether two of them left the same."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from benchmarks.attack.child import run_main
from recycler.record import __main__ as record
from tuning import optimize

COMMANDS = ("record", "optimize")
_SIZES = ("--per-kind", 2, "--context-tokens", 160, "--k", 48)


def run(command: str, model: Path, out: Path) -> None:
    """Run a command on the tiny model; ends in SystemExit."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if command == "record":
        options: tuple[object, ...] = ("--out", out, "--model", model, "--per-kind", 1, "--context-tokens", 128)
        run_main(record.main, *options, "--steps", 8, "--max-age", 8, "--k", 48)
    families = ("--families", "cosine_profile", "--trials", 4, "--candidates", 1)
    run_main(optimize.main, "--model", model, "--out", out, "--budget", 0.2, "--steps", 12, *_SIZES, *families)


def results(command: str, out: Path) -> Mapping[str, Any]:
    """What must be the same however often a run was interrupted."""
    if command == "record":
        return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}
    files = {name: (out / name).read_bytes() for name in ("policy.json", "results.json")}
    return files | {path.name: path.read_bytes() for path in sorted((out / "traces").glob("*.safetensors"))}


def unfinished(out: Path) -> list[str]:
    """Files under a final name that are not whole JSON or safetensors."""
    wrong = []
    for path in out.rglob("*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            wrong.append(path.name)
    for path in out.rglob("*.safetensors"):
        content = path.read_bytes()
        header = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + header]) if header < len(content) else {}
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        if not ends or len(content) != 8 + header + max(ends):
            wrong.append(path.name)
    return wrong


def pick(rng: random.Random) -> str:
    """One of the commands; tuning, which writes more sorts of files, three times of four."""
    return rng.choice((COMMANDS[0], *[COMMANDS[1]] * 3))
