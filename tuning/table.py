"""The result of a tuning run in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tuning.result_rows import ResultRow, Role, interval, nats, percent, result_rows
from tuning.results import Estimate, TuningResult

_CAPTION = (
    "* exported. Below each value its 95% interval, bootstrap over prompts. "
    "Full share: unit-steps that ran full. KL: to full attention, in closed loop."
)


def print_table(result: TuningResult, console: Console) -> None:
    """Print the winners of all families beside the baseline, and their KL per kind of text; 80 columns are enough."""
    rows = [row for row in result_rows(result) if row.role is not Role.REFERENCE]
    console.print(_policies(result, rows))
    console.print(_kinds(result, rows))


def _policies(result: TuningResult, rows: list[ResultRow]) -> Table:
    n = len(result.prompt_names)
    table = Table(
        title=(
            f"{result.model.id}, k = {result.selection.k} tokens, budget {result.budget:.4g} full steps per unit-step, "
            f"{n} held-out {'prompt' if n == 1 else 'prompts'} x {result.n_steps} steps"
        ),
        title_justify="left",
        caption=_CAPTION,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        leading=1,
    )
    table.add_column("family\nparameters", min_width=18, overflow="fold")
    table.add_column("full\nshare,\nreplay", justify="right", no_wrap=True)
    table.add_column("full\nshare,\nloop", justify="right", no_wrap=True)
    table.add_column("mass,\nreplay", justify="right", no_wrap=True)
    table.add_column("KL\n(nats/step)", justify="right", no_wrap=True)
    table.add_column("KL of\nbaseline's", justify="right", no_wrap=True)
    table.add_column("same next\ntoken", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            _name(row, row.parameters),
            percent(row.measured.replay_full_share),
            percent(row.measured.full_share),
            f"{row.measured.recovered_mass:.3f}",
            _estimate(f"{nats(row.kl.value)}", interval(row.kl, nats)),
            _share(row.kl_share),
            _share(row.agreement),
        )
    return table


def _kinds(result: TuningResult, rows: list[ResultRow]) -> Table:
    table = Table(
        title="KL to full attention per kind of text (nats/step)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("family", min_width=18, overflow="fold")
    for kind in dict.fromkeys(result.prompt_kinds):
        table.add_column(Text(kind), justify="right", overflow="fold")
    for row in rows:
        kls = result.kl_by_kind(row.measured).values()
        table.add_row(_name(row), *(nats(kl) for kl in kls))
    return table


def _name(row: ResultRow, parameters: str = "") -> Text:
    marked = "* " if row.role is Role.EXPORTED else "  "
    text = Text(marked + row.label, style="bold" if row.role is Role.EXPORTED else "")
    for line in parameters.split(", ") if parameters else ():
        text.append(f"\n  {line}", style="not bold dim")
    return text


def _share(share: Estimate | None) -> Text:
    if share is None:
        return Text("-")
    ends = interval(share, lambda end: percent(end, "")) + "%"
    return _estimate(percent(share.value), ends)


def _estimate(value: str, ends: str) -> Text:
    return Text.assemble(value, "\n", (ends, "dim"))
