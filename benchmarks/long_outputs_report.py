"""The picture and the text of `benchmarks/long_outputs.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from long_outputs_aims import aims
from long_outputs_measures import (
    FULL,
    TUNED,
    better_stride,
    copying_share,
    kl_share,
    last_over_first,
    read_result,
    worst_kind,
)
from matplotlib.figure import Figure

from traces.reporting import picture_style as style

# Steps over which a curve is smoothed.
_SMOOTHED = 32
# Of sums in another order.
_ROUNDING_NATS = 1e-6


def page(folder: Path) -> str:
    """The page on all that was measured over long outputs, from the JSON files in a folder."""
    usual = folder / "long-outputs.json"
    others = sorted(path for path in folder.glob("long-outputs-*.json") if path != usual)
    results = [read_result(path) for path in (usual, *others)]
    of_prompts = [result for result in results[1:] if _same_but_for_prompts(results[0], result)]
    sections = [report([result for result in results if result not in of_prompts]).rstrip("\n")]
    if of_prompts:
        sections.append("\n".join(_other_prompts(results[0], of_prompts)))
    for name, section in (("left-out.json", _left_out), ("turns.json", _turns), ("peers.json", _peers)):
        if (folder / name).exists():
            sections.append("\n".join(section(read_result(folder / name))))
    return "\n\n".join([*sections, "\n".join(aims(folder))]) + "\n"


def _same_but_for_prompts(usual: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a result is of the usual sizes and the usual model, on other prompts."""
    return all(result[name] == usual[name] for name in ("model", "steps", "context_tokens", "k"))


def _other_prompts(usual: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[str]:
    """Policies that were tuned on other prompts by another search, each on prompts that its tuning never saw."""
    lines = [
        "## Other prompts, other searches",
        "",
        "A policy for each row, tuned on other prompts and by a search of another seed "
        "(`python -m tuning.optimize --seed S --first-index I`),",
        "on prompts that its tuning never saw (`python benchmarks/long_outputs.py --seed S --first-index J --policies "
        "...`). Shares are of the",
        "better stride 10.",
        "",
        "| seed, prompts of a kind | KL | share of stride 10's | by quarter of the output | last / first "
        "| worst kind, share | copying accuracy | full share | tokens read | measured on |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in (usual, *others):
        row, stride = result["rows"][TUNED], better_stride(result["rows"])
        worst, worst_share = worst_kind(row, stride)
        first, n = result["first_index"], result["prompts"] // len(result["kinds"])
        cells = [
            f"{result['seed']}, {first} to {first + n - 1}",
            f"{row['kl']:.3f}",
            f"{kl_share(row, stride):.3f}",
            _numbers(row["quarters"]),
            f"{last_over_first(row):.2f}",
            f"{worst}, {worst_share:.2f}",
            _copying(row, result["rows"][FULL]),
            f"{row['full_share']:.1%}",
            f"{row['read_share']:.1%}",
            result["machine"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _left_out(result: Mapping[str, Any]) -> list[str]:
    """What became of kinds of text that tuning did not see."""
    lines = [
        "## Kinds that tuning never saw",
        "",
        f"`python benchmarks/left_out.py`: each kind left out of tuning in turn ({result['family']}), "
        f"{result['per_kind']} unseen prompts of it decode, {result['context_tokens']:,} +",
        f"{result['n_steps']} tokens, k = 128, a tenth full. KL in nats per step; measured on {result['machine']}.",
        "",
        "| kind | tuned without it | tuned with it | better stride 10 | tuned without it, share of that |",
        "|---|---|---|---|---|",
    ]
    for kind, row in result["kinds"].items():
        lines.append(
            f"| {kind} | {row['tuned without it']:.3f} | {row['tuned with it']:.3f} | {row['stride 10']:.3f} "
            f"| {row['tuned without it'] / row['stride 10']:.2f} |"
        )
    return lines


def _turns(result: Mapping[str, Any]) -> list[str]:
    """What became of conversations."""
    rows = result["rows"]
    turns = range(1, result["turns"] + 1)

    def line(name: str, values: Sequence[float], digits: int) -> str:
        return f"| {name} | {' | '.join(f'{value:.{digits}f}' for value in values)} |"

    return [
        "## Ten turns over one cache",
        "",
        f"`python benchmarks/turns.py`: {result['conversations']} conversations, {result['context_tokens']:,} tokens "
        f"and then {result['turns']} turns of {result['said_tokens']} tokens that are read",
        f"at once and {result['answer_tokens']} that are decoded. KL to full attention in nats per step by turn; what "
        "choosing the sets of six rows adds",
        f"to reading what was said, in milliseconds. Measured on {result['machine']}.",
        "",
        "![KL by turn](pictures/turns.png)",
        "",
        f"| turn | {' | '.join(map(str, turns))} |",
        "|---|" + "---|" * len(turns),
        *(line(f"KL, {name}", row["kl_by_turn"], 3) for name, row in rows.items()),
        *(line(f"full share, {name}", row["full_share_by_turn"], 3) for name, row in rows.items()),
        line("reading, ms", result["reading_ms_by_turn"], 0),
        # The first reading of a process warms it up, and what it took says nothing.
        *(line(f"choosing sets, ms, {name} | -", row["choosing_ms_by_turn"][1:], 0) for name, row in rows.items()),
    ]


def _peers(result: Mapping[str, Any]) -> list[str]:
    """Other people's own code beside ours."""
    few, as_many = (result["theirs"][str(result[size])] for size in ("k", "as_many"))
    versions = result["their_versions"]
    lines = [
        "## Other people's own code",
        "",
        f"`python benchmarks/peers.py`: kvpress {versions['kvpress']} (transformers {versions['transformers']}) beside "
        f"ours, {result['prompts']} prompts of {result['context_tokens']:,} tokens",
        f"and {result['steps']} steps, none seen in tuning. kvpress keeps k tokens of the prompt and all that come "
        "after; ours keep k in all. KL to",
        f"full attention in nats per step; measured on {result['machine']}. The tuned policy reads as much as a set of "
        f"{result['as_many']} tokens.",
        "",
        f"| method | kvpress, k = {result['k']} | ours, k = {result['k']} | kvpress, k = {result['as_many']} |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys([*few, *result["ours"]]):
        cells = [
            *(f"{table[name]:.3f}" if name in table else "" for table in (few,)),
            f"{result['ours'][name]['kl']:.3f}" if name in result["ours"] else "",
            f"{as_many[name]:.3f}" if name in as_many else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(result: Mapping[str, Any]) -> Figure:
    """KL along the output, smoothed, a panel for each kind of text."""
    caption = (
        f"{result['model']}, {result['prompts']} prompts of {result['context_tokens']:,} tokens + {result['steps']:,} "
        f"steps, none seen in tuning; means over {_SMOOTHED} steps"
    )
    # Of what is full attention's own there is nothing to draw.
    rows = {name: row for name, row in result["rows"].items() if row["kl"] > _ROUNDING_NATS}
    kinds = result["kinds"]
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


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """The page: tables over all prompts and by kind, of the usual sizes first and then of others."""
    usual, *others = results
    lines = [
        "# Long outputs",
        "",
        "`python benchmarks/long_outputs.py`: teacher-forced on prompts that no tuning saw. KL to full attention in",
        "nats per step; shares of KL are of the stride 10 with the best of its sets. Accuracy is that of the next",
        "token on copied text, as a share of full attention's.",
        "",
        f"## {_sizes(usual, usual)}",
        "",
        "![KL along the output](pictures/long-outputs.png)",
        "",
        *_tables(usual),
    ]
    for result in others:
        lines += ["", f"## {_sizes(usual, result)}", "", *_tables(result)]
    return "\n".join(lines) + "\n"


def _sizes(usual: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    sizes = f"{result['steps']:,} steps after {result['context_tokens']:,} tokens, k = {result['k']}"
    return sizes if result["model"] == usual["model"] else f"{sizes}, {Path(result['model']).name}"


def _tables(result: Mapping[str, Any]) -> list[str]:
    rows = {name: row for name, row in result["rows"].items() if name != FULL}
    baseline = better_stride(rows)
    lines = [
        f"{result['model']}, {result['prompts']} prompts of {len(result['kinds'])} kinds, measured on "
        f"{result['machine']}.",
        "",
        *table(result, list(rows)),
        *_notes(rows),
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
    return lines


def _notes(rows: Mapping[str, Any]) -> Iterator[str]:
    """Lines on rows that another machine has measured, and on exact decoding."""
    for name, row in rows.items():
        if "machine" in row:
            yield from ("", f"*{name}* was measured on {row['machine']}.")
        if name.startswith("exact"):
            yield from ("", f"*{name}* is fed texts that it would not write; a verification counts as a full step.")


def table(result: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Lines of the table over all prompts; the README has some of them."""
    rows, full = result["rows"], result["rows"][FULL]
    baseline = better_stride(rows)
    lines = [
        "| who decides | full share | tokens read | KL | share of stride 10's | by quarter of the output "
        "| last / first | 95th percentile | above 1 nat | copying accuracy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        row = rows[name]
        cells = [
            name,
            f"{row['full_share']:.1%}",
            f"{row['read_share']:.1%}",
            f"{row['kl']:.3f}",
            f"{kl_share(row, baseline):.2f}",
            _numbers(row["quarters"]),
            f"{last_over_first(row):.1f}",
            f"{row['p95']:.2f}",
            f"{row['above_1_nat']:.1%}",
            _copying(row, full),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _copying(row: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    share = copying_share(row, full)
    return "not measured" if np.isnan(share) else f"{share:.3f}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}".removeprefix("0") for value in values)
