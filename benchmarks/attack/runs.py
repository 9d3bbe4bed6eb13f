"""Small runs of the commands, and whether two of them left the same."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from benchmarks.attack.child import fork, run_main
from benchmarks.attack.tiny import save_tiny_model
from policies import BudgetConstrained, CosineThreshold, PolicyFile, Selection
from recycler import export
from recycler.evaluate import __main__ as evaluate
from recycler.model.loading import load_model
from recycler.model.shape import model_shape
from recycler.record import __main__ as record
from tuning import optimize

COMMANDS = ("record", "optimize", "evaluate", "export")
# Tuning writes most sorts of files.
_TIMES = (1, 3, 2, 1)
_SIZES = ("--per-kind", 2, "--context-tokens", 160, "--k", 48)
_SETTLED = {
    "record": ("*.safetensors",),
    "optimize": ("policy.json", "results.json", "traces/*.safetensors"),
    "evaluate": ("results.json", "tables.md", "*.png"),
    "export": ("*", "*/*"),
}


def make_ready(folder: Path) -> Path:
    """The tiny model, and beside it a policy of it; in a child, for a parent that computes has threads."""
    model = folder / "model"

    def make() -> None:
        save_tiny_model(model)
        shape = model_shape(load_model(str(model)).model, str(model))
        policy = BudgetConstrained(CosineThreshold(0.8), 0.2)
        PolicyFile(policy, Selection.unpooled(48), shape, written_by=None).write(folder / "policy.json")

    fork(make, folder / "log")
    return model


def run(command: str, model: Path, out: Path) -> None:
    """Run a command on the tiny model; ends in SystemExit."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    policy: tuple[object, ...] = ("--policy", model.with_name("policy.json"), "--model", model)
    if command == "record":
        options: tuple[object, ...] = ("--out", out, "--model", model, "--per-kind", 1, "--context-tokens", 128)
        run_main(record.main, *options, "--steps", 8, "--max-age", 8, "--k", 48)
    if command == "evaluate":
        options = ("--tasks", "prose,code", "--methods", "streaming_llm", "--prompts", 1, "--context-tokens", 160)
        run_main(evaluate.main, *policy, *options, "--steps", 8, "--out", out)
    if command == "export":
        run_main(export.main, *policy, "--weights", "copy", "--out", out)
    families = ("--families", "cosine_profile", "--trials", 4, "--candidates", 1)
    run_main(optimize.main, "--model", model, "--out", out, "--budget", 0.2, "--steps", 12, *_SIZES, *families)


def run_again(command: str, model: Path, out: Path) -> None:
    """The same after a run that was cut off; a folder that was exported is whole, and is not written over."""
    if command == "export":
        shutil.rmtree(out, ignore_errors=True)
    run(command, model, out)


def results(command: str, out: Path) -> Mapping[str, Any]:
    """What must be the same however often a run was interrupted."""
    paths = sorted(path for pattern in _SETTLED[command] for path in out.glob(pattern) if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


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
    """One of the commands."""
    return rng.choices(COMMANDS, _TIMES)[0]
