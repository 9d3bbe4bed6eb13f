"""`python benchmarks/gpu_report.py`: the text and the picture of what `benchmarks/gpu.py` measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from traces.pictures import write_picture
from traces.reporting import picture_style as style
from traces.reporting.whole_file import write_text

_DOCS = Path(__file__).parents[1] / "docs"
_HEAD = """# The engine on a GPU: measured

`python benchmarks/gpu.py` on GPUs lent for three quarters of an hour in all, a model with random weights in the shape
of Llama-3.1-8B in bf16, k = 2,048; written by `python benchmarks/gpu_report.py` from
[results/gpu.json](results/gpu.json). How the engine is built, and what these numbers mean, is in [gpu.md](gpu.md).

Floor: weights and what is read of the cache, at the speed that a sum over memory reaches. Ideal: the full share x time
of the same engine with every unit full + the rest x its time at a context of k tokens. Stock is `generate` as a user
calls it, its best cache in each round: the growing one in all.

Where decisions and tokens are the same and logits further apart than rounding, a set has another of two tokens whose
scores are equal but for rounding.

![Milliseconds per step](pictures/gpu.png)
"""


def report(runs: Sequence[Mapping[str, Any]]) -> str:
    """All runs, in tables."""
    lines = [_HEAD]
    for run in runs:
        lines += [f"## {run['machine']}", "", f"{run['note'].capitalize()}. {_versions(run)}.", ""]
        for name, found in run["stages"].items():
            lines += [*_stage(name, found), ""]
    return "\n".join(lines)


def _stage(name: str, found: Any) -> Iterator[str]:
    if name == "bandwidth":
        read, copied = (found[name] for name in ("read_gb_per_s", "copy_gb_per_s"))
        yield f"Memory: {read:,.0f} GB/s read, {copied:,.0f} GB/s read and written by a copy."
    elif name == "identities":
        yield from _identities(found)
    elif name.startswith(("engine", "beside")):
        yield from _rows(found)
    elif name.startswith("exact"):
        yield from _exact(found)
    elif name.startswith("kernels"):
        yield from _kernels(found)
    elif name == "recording":
        yield (
            f"**Recording** 32,768 tokens and 512 steps, ages up to 64: {found['record_s']:.2f} s beside "
            f"{found['prefill_s']:.2f} s of prefill, **{found['ratio']:.1f} times** it, with "
            f"{found['beyond_prefill_mib']:,} MiB more."
        )
    elif name == "walk":
        yield from _launches(found)
    else:
        yield from _calls(found)


def _identities(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("| identity | holds | logits apart, at most |", "|---|---|---:|")
    for row in found:
        apart = row.get("logits_apart")
        shown = (
            ", ".join(f"{who} {x:.3f} rms" for who, x in row["rms_apart"].items()) if apart is None else f"{apart:.1e}"
        )
        yield f"| {row['claim']} | {'yes' if row['holds'] else '**no**'} | {shown} |"


def _rows(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from (
        "| rows x context | who decodes | full share | ms per step | floor, ms | of ideal | x best stock | GB taken |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    )
    for row in found:
        at = f"{row['batch']} x {row['context_tokens']:,}"
        if "error" in row:
            yield f"| {at} | {row['case']} | {row['error']} | | | | | |"
            continue
        # At a context of k tokens, everything else is another size.
        small = row["case"].endswith("context k")
        ideal, stock = (
            "" if row[name] is None or small else f"{row[name]:.2f}" for name in ("ideal_share", "vs_best_stock")
        )
        yield (
            f"| {at} | {row['case']} | {row['full_share']:.0%} | {row['step_ms']:.2f} | {row['floor_ms']:.2f} | "
            f"{ideal} | {stock} | "
            f"{row['peak_gb']:.1f} |"
        )


def _exact(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "Exact decoding, with drafts that hold as often as the default model's (simulated: these weights are random):"
    yield ""
    yield from (
        "| rows x context | who decodes | ms per token | x always full | tokens per round | ms per round | GB taken |",
        "|---|---|---:|---:|---:|---:|---:|",
    )
    full_ms = next(row["step_ms"] for row in found if row["case"] == "engine, every unit full")
    for row in found:
        at, gain = f"{row['batch']} x {row['context_tokens']:,}", full_ms / row["step_ms"]
        rounds = f"{row['tokens_per_round']:.2f} | {row['round_ms']:.1f}" if "round_ms" in row else " | "
        yield f"| {at} | {row['case']} | {row['step_ms']:.2f} | {gain:.2f} | {rounds} | {row['peak_gb']:.1f} |"


def _kernels(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    first = found[0]
    at = f"{first['batch']} x {first['context_tokens']:,}"
    of, digits = ("token", 1) if first["case"].startswith("exact") else ("step", 0)
    yield f"Kernels of a {of}, {at}, microseconds each (how many a {of}), the profiler beside them:"
    yield ""
    names = list(dict.fromkeys(kernel["kernel"] for case in found for kernel in case["kernels"][:16]))
    yield f"| kernel | {' | '.join(case['case'].removeprefix('engine, ') for case in found)} |"
    yield "|---|" + "---:|" * len(found)
    for name in names:
        cells = []
        for case in found:
            here = [one for one in case["kernels"] if one["kernel"] == name]
            # Names are cut: kernels of one beginning come together.
            n, us = (sum(one[part] for one in here) for part in ("per_step", "us_per_step"))
            cells.append(f"{us / n:.1f} ({n:.{digits}f})" if n else "")
        yield f"| `{name[:60]}` | {' | '.join(cells)} |"
    yield f"| all, at work | {' | '.join(format(case['busy_us_per_step'], ',.0f') for case in found)} |"


def _calls(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield from ("| one layer's attention, 32 heads on 8 | rows x context | us | GB/s |", "|---|---|---:|---:|")
    for row in (row for row in found if "batch" in row):
        took = f"{row['us']:.1f} | {row.get('gb_per_s', float('nan')):,.0f}" if "us" in row else "does not run |"
        yield f"| {row['call']} | {row['batch']} x {row['context_tokens']:,} | {took} |"
    if any(row["call"].startswith("flash_attn") and "error" in row for row in found):
        yield from ("", "flash-attn was not installed there; torch carries its kernel.")


def _launches(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "Ways to launch `walk`, microseconds of a call:"
    yield ""
    names = list(dict.fromkeys(name for row in found for name in row))
    yield f"| {' | '.join(names)} |"
    yield "|" + "---:|" * len(names)
    for row in found:
        yield f"| {' | '.join(str(row.get(name, '')) for name in names)} |"


def _versions(run: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in run["versions"].items())


def draw(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Milliseconds per step of all that was timed beside stock `generate`, with floors."""
    tables = [
        (run["machine"], rows)
        for run in runs
        for name, rows in run["stages"].items()
        if name.startswith("beside stock") and len([row for row in rows if "error" not in row]) > 1
    ]
    # The first run of a size is the one with most rounds.
    sizes = {(rows[0]["batch"], rows[0]["context_tokens"]): (machine, rows) for machine, rows in reversed(tables)}
    figure = style.new_figure(
        "Milliseconds per step on a GPU",
        "random weights in the shape of Llama-3.1-8B, bf16, k = 2,048; ticks: floors",
        (12.5, 8),
    )
    for place, ((batch, context), (machine, rows)) in enumerate(sorted(sizes.items())):
        axes = figure.add_subplot(2, -(-len(sizes) // 2), place + 1)
        style.style_axes(axes, f"{machine}, {batch} x {context:,} tokens", "ms per step", "")
        shown = [row for row in rows if "error" not in row and not row["case"].endswith("context k")]
        shown.sort(key=lambda row: -row["step_ms"])
        names = [row["case"].replace("cosine under a budget of", "a share of") for row in shown]
        colours = ["#8a8f98" if row["engine"] == "transformers" else "#2a6fbb" for row in shown]
        axes.barh(names, [row["step_ms"] for row in shown], color=colours)
        axes.scatter([row["floor_ms"] for row in shown], names, marker="|", s=160, color="black", zorder=3)
        for name, row in zip(names, shown, strict=True):
            axes.annotate(f" {row['step_ms']:.1f}", (row["step_ms"], name), va="center", fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
    return figure


def main() -> None:
    """Write both."""
    runs = json.loads((_DOCS / "results" / "gpu.json").read_text(encoding="utf-8"))
    write_text(_DOCS / "gpu_measured.md", report(runs))
    write_picture(draw(runs), _DOCS / "pictures" / "gpu.png")


if __name__ == "__main__":
    main()
