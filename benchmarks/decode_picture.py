"""Tokens per second against the context, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from traces.reporting.picture_style import looks, new_figure

_LEFT_OUT = ("engine, tuned policy, never full", "engine, never full", "engine, every unit full, context k")


def draw(rows: list[dict[str, Any]], path: Path, caption: str) -> None:
    """Draw the rows of batch 1; both axes logarithmic.

    Args:
        rows: Of `benchmarks/decode.py`.
        path: PNG file.
        caption: Model and machine.
    """
    of_one = [row for row in rows if row["batch"] == 1 and row["case"] not in _LEFT_OUT]
    figure = new_figure("Decoding: tokens per second against the context", caption, (9, 6))
    axes = figure.subplots()
    names = list(dict.fromkeys(row["case"] for row in of_one))
    for name, (colour, dashes) in zip(names, looks(len(names)), strict=True):
        points = sorted((row["context_tokens"], row["tokens_per_s"]) for row in of_one if row["case"] == name)
        axes.plot(*zip(*points, strict=True), dashes, color=colour, marker="o", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    contexts = sorted({row["context_tokens"] for row in of_one})
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.minorticks_off()
    axes.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("tokens per second")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
