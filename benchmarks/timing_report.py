"""The picture and the text of `benchmarks/timing.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from traces.reporting import picture_style as style

CLOCKS, TOLD = "clocks per unit", "told when the output turns"
_SENSOR, _HINDSIGHT = "sensor of the present", "hindsight"
_TUNED_CLOCKS = "stride_profile, tuned on these kinds"


def draw(result: Mapping[str, Any]) -> Figure:
    """KL of every schedule by kind, and over all."""
    caption = (
        f"{result['model']}, {result['prompts_judged']} prompts of {result['context_tokens']:,} tokens + "
        f"{result['steps']} steps, a tenth of unit-steps full; learned on {result['prompts_learned']} others"
    )
    figure = style.new_figure("KL where the output turns", caption, (12.5, 6.4))
    axes = figure.add_subplot()
    rows = {name: row for name, row in result["decoded"].items() if name != "stride 10"}
    groups = ["all", *result["kinds"]]
    style.style_axes(axes, "", "", "KL to full attention (nats per step)")
    width = 0.85 / len(rows)
    for place, ((colour, _), (name, row)) in enumerate(zip(style.looks(len(rows)), rows.items(), strict=True)):
        heights = [row["kl"], *(row["kinds"][kind] for kind in result["kinds"])]
        at = np.arange(len(groups)) + (place - len(rows) / 2) * width
        axes.bar(at, heights, width, color=colour, label=name, align="edge")
    axes.set_xticks(range(len(groups)), [group.replace("_", " ") for group in groups])
    axes.legend(fontsize=9, frameon=False, ncols=2)
    return figure


def report(result: Mapping[str, Any]) -> str:
    """What is gained, in replay and decoding."""
    replayed, decoded, kinds = result["replayed"], result["decoded"], result["kinds"]
    lines = [
        "# What timing is worth",
        "",
        f"`python benchmarks/timing.py`: {result['model']}, {result['context_tokens']:,} tokens of context and "
        f"{result['steps']} steps, a tenth of unit-steps full,",
        f"{result['prompts_judged']} prompts judged and {result['prompts_learned']} others learned from, of kinds "
        "whose output turns to another part of the context at",
        f"moments that no clock knows. Measured on {result['machine']}.",
        "",
        "![KL by kind](pictures/timing.png)",
        "",
        "**In replay**, the square of what units lose together, weighted by their damage, by kind; in brackets what",
        "part of the clocks' it is. Every unit has the schedule of its sort that is best for it on the traces that are",
        "learned from; hindsight and the sensor see the trace itself.",
        "",
        f"| schedule | all | {' | '.join(kinds)} |",
        "|---|" + "---|" * (1 + len(kinds)),
    ]
    for name, row in replayed.items():
        cells = [
            f"{row[kind]['squared']:.5f} ({row[kind]['squared'] / replayed[CLOCKS][kind]['squared']:.2f})"
            for kind in ("all", *kinds)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        *(
            f"- The detector of {name.rsplit(' ', 1)[-1]} is higher within two steps of an event than elsewhere with a "
            f"probability of {row['area_under_curve']:.2f}."
            for name, row in replayed.items()
            if "area_under_curve" in row
        ),
        "",
        "**Decoding**, KL to full attention in nats per step; of the way from the better clocks to the sensor and to",
        "hindsight, what part is gone. Tuned families may refresh by keys alone, at half the cost; schedules from",
        "replay do not:",
        "",
        f"| schedule | full share | tokens read | KL | {' | '.join(kinds)} | to the sensor | to hindsight |",
        "|---|" + "---|" * (5 + len(kinds)),
    ]
    for name, row in decoded.items():
        gone = [f"{part:.0%}" if part > 0 else "-" for part in ways_gone(decoded, name)]
        cells = [f"{row['kinds'][kind]:.4f}" for kind in kinds]
        lines.append(
            f"| {name} | {row['full_share']:.1%} | {row['read_share']:.1%} | {row['kl']:.4f} | {' | '.join(cells)} "
            f"| {' | '.join(gone)} |"
        )
    return "\n".join(lines) + "\n"


def ways_gone(decoded: Mapping[str, Any], name: str) -> list[float]:
    """What part of the way from the better clocks to the sensor, and to hindsight, a schedule has gone in KL."""
    clocks = min(decoded[one]["kl"] for one in (CLOCKS, _TUNED_CLOCKS))
    return [float((clocks - decoded[name]["kl"]) / (clocks - decoded[end]["kl"])) for end in (_SENSOR, _HINDSIGHT)]
