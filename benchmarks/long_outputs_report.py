"""The picture and the text of `benchmarks/long_outputs.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from traces.reporting import picture_style as style

# Steps over which a curve is smoothed.
_SMOOTHED = 32


def _baseline(rows: Mapping[str, Any]) -> Mapping[str, Any]:
    """The stride with least KL of those with sets of the paper's ranking."""
    strides = [row for name, row in rows.items() if name.startswith("stride") and "last_full" in name]
    return min(strides, key=lambda row: row["kl"])


def draw(result: Mapping[str, Any]) -> Figure:
    """KL along the output, smoothed, a panel for each kind of text."""
    caption = (
        f"{result['model']}, {result['prompts']} prompts of {result['context_tokens']:,} tokens + {result['steps']:,} "
        f"steps, none seen in tuning; means over {_SMOOTHED} steps"
    )
    kinds, rows = result["kinds"], {name: row for name, row in result["rows"].items() if name != "full attention"}
    columns = min(len(kinds), 3)
    n_panels = -(-len(kinds) // columns)
    size = (4.6 * columns + 0.6, 3.3 * n_panels + 1.6)
    figure = style.new_figure("KL to full attention along the output", caption, size)
    grid = figure.add_gridspec(n_panels + 1, columns, height_ratios=(0.08, *[1] * n_panels))
    legend = figure.add_subplot(grid[0, :])
    legend.set_axis_off()
    panels = [figure.add_subplot(grid[1 + place // columns, place % columns]) for place in range(len(kinds))]
    for panel, kind in zip(panels, kinds, strict=True):
        style.style_axes(panel, kind, "decode step", "KL (nats per step)")
        for (colour, dashes), (name, row) in zip(style.looks(len(rows)), rows.items(), strict=True):
            kl = np.array(row["kinds"][kind]["by_step"])
            smooth = np.convolve(kl, np.full(_SMOOTHED, 1 / _SMOOTHED), mode="valid")
            step = np.arange(len(smooth)) + _SMOOTHED / 2
            panel.plot(step, smooth, dashes, color=colour, label=name, linewidth=1.8)
        panel.set_yscale("log")
    legend.legend(*panels[0].get_legend_handles_labels(), loc="lower left", ncols=2, fontsize=10, frameon=False)
    return figure


def report(result: Mapping[str, Any]) -> str:
    """Tables over all prompts and by kind."""
    rows = {name: row for name, row in result["rows"].items() if name != "full attention"}
    baseline = _baseline(rows)
    lines = [
        "# Long outputs",
        "",
        f"`python benchmarks/long_outputs.py`: {result['model']}, {result['prompts']} prompts of "
        f"{len(result['kinds'])} kinds, {result['context_tokens']:,} tokens of context and {result['steps']:,} decode",
        "steps each, none of them seen in tuning; teacher-forced. KL to full attention in nats per step; shares of KL",
        "are of the better stride 10 with sets of the paper's ranking (`last_full`). Accuracy is that of the next",
        f"token on copied text, as a share of full attention's. Measured on {result['machine']}.",
        "",
        "![KL along the output](pictures/long-outputs.png)",
        "",
        *table(result, list(rows)),
        "",
        "By kind, KL by quarter of the output, and in brackets its mean as a share of that stride's:",
        "",
        f"| kind | {' | '.join(rows)} |",
        "|---|" + "---|" * len(rows),
    ]
    for kind in result["kinds"]:
        of_kind = [row["kinds"][kind] for row in rows.values()]
        least = baseline["kinds"][kind]["kl"]
        cells = [f"{_numbers(one['quarters'])} ({one['kl'] / least:.2f})" for one in of_kind]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table(result: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Lines of the table over all prompts; the README has some of them."""
    rows, full = result["rows"], result["rows"]["full attention"]
    baseline = _baseline(rows)
    lines = [
        "| who decides | full share | tokens read | KL | share of stride 10's | by quarter of the output "
        "| last / first | 95th percentile | above 1 nat | copying accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        row, quarters = rows[name], rows[name]["quarters"]
        cells = [
            name,
            f"{row['full_share']:.1%}",
            f"{row['read_share']:.1%}",
            f"{row['kl']:.3f}",
            f"{row['kl'] / baseline['kl']:.2f}",
            _numbers(quarters),
            f"{quarters[-1] / max(quarters[0], 1e-9):.1f}",
            f"{row['p95']:.2f}",
            f"{row['above_1_nat']:.1%}",
            _copying(row, full),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _copying(row: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    if "copying" not in row["kinds"]:
        return "not measured"
    return f"{row['kinds']['copying']['accuracy'] / full['kinds']['copying']['accuracy']:.3f}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}".removeprefix("0") for value in values)
