"""The files of a tuning result: a report to read, its pictures, and its numbers."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from traces.pictures import write_picture
from traces.reporting.whole_file import write_text
from tuning.confirm.results import TuningResult
from tuning.report.certificate_picture import draw_ladder
from tuning.report.pictures import draw_kl_by_kind, draw_pareto, draw_search, draw_unit_shares
from tuning.report.result_json import result_to_json
from tuning.report.result_rows import Role, interval, nats, percent, result_rows, share_of_baseline, whole_percent


@dataclass(frozen=True)
class _Picture:
    """A picture of the report: how it is drawn, and how it is to be read."""

    file: str
    title: str
    draw: Callable[[TuningResult], Figure]
    caption: str


_PICTURES = (
    _Picture(
        "pareto.png",
        "KL against full share",
        draw_pareto,
        "Left: each point is a policy on the held-out prompts; further left is cheaper, further down is closer to "
        "full attention, and both axes are logarithmic. A thin line is one policy at several budgets: the exported "
        "family, and the fixed stride. The thick grey steps join the policies that no other one beats in both; the "
        "dotted line is the budget. Blue points are the other families, named on the right. Right: the policies at "
        "the budget, lowest KL first. Bars are 95% intervals. Prompts differ more than policies do, so intervals may "
        "overlap although one policy wins on nearly every prompt; the share of the baseline's KL compares prompt by "
        "prompt.",
    ),
    _Picture(
        "full-share.png",
        "Where the full steps go",
        draw_unit_shares,
        "Share of decode steps, in percent, that each layer and KV head ran full under the exported policy. The "
        "mean over all cells is what the budget limits. A policy that treats all units alike gives one colour "
        "throughout.",
    ),
    _Picture(
        "kl-by-kind.png",
        "KL by kind of text",
        draw_kl_by_kind,
        "Lower is closer to full attention. A bar is the mean over the prompts of a kind, and a dot is one prompt. "
        "The baseline runs all units full in the same step.",
    ),
    _Picture(
        "search.png",
        "The search",
        draw_search,
        "Each dot is a trial, replayed along the recorded traces of the tuning prompts. Replay loss is the "
        "attention mass lost per unit-step, weighted by what losing it costs in each unit. A line that still falls "
        "at the right end asks for more trials. The few best trials of a family were then compared in closed loop.",
    ),
)


# Where the budget was chosen by its certificate; it comes first.
_LADDER = _Picture(
    "certificate.png",
    "What is certified",
    draw_ladder,
    "The exported family at each budget on the held-out prompts. A bar is the mean KL with every prompt counted up "
    "to the cap; a dot is a prompt, in the same order everywhere, and a triangle one beyond the cap. The thick line "
    "is the upper confidence bound of the expected KL. Budgets are tested from left to right until a bound is above "
    "the limit; the last one before that is exported.",
)


def write_report(result: TuningResult, folder: Path) -> Path:
    """Write `report.html`, which needs no other file, and its pictures into `pictures/`.

    Args:
        result: What to report.
        folder: Where to; made if it is not there.

    Returns:
        The path of the report.
    """
    pictures = []
    for picture in _PICTURES if result.ladder is None else (_LADDER, *_PICTURES):
        path = write_picture(picture.draw(result), folder / "pictures" / picture.file)
        inline = base64.b64encode(path.read_bytes()).decode("ascii")
        pictures.append({"title": picture.title, "caption": picture.caption, "png": inline})
    path = folder / "report.html"
    write_text(path, _html(result, pictures))
    return path


def write_results(result: TuningResult, folder: Path) -> Path:
    """Write `results.json`: `result_to_json(result)`.

    Args:
        result: What to write.
        folder: Where to; made if it is not there.

    Returns:
        The path of the file.
    """
    path = folder / "results.json"
    write_text(path, json.dumps(result_to_json(result), indent=1, allow_nan=False) + "\n")
    return path


def _html(result: TuningResult, pictures: list[dict[str, str]]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"nats": nats, "percent": percent, "whole_percent": whole_percent}
    template = environment.from_string((files(__package__) / "report.html.jinja").read_text(encoding="utf-8"))
    rows = result_rows(result)
    best = rows[0]
    baseline = next(row for row in rows if row.role is Role.BASELINE)
    by_label = {row.label: row for row in rows}
    context: dict[str, Any] = {
        "result": result,
        "best": best,
        "baseline": baseline,
        "comparison": share_of_baseline(result, best),
        "rows": rows,
        "rungs": [] if result.ladder is None else [(rung, by_label[rung.label]) for rung in result.ladder.rungs],
        "kinds": [(row, result.kl_by_kind(row.measured)) for row in rows if row.role is not Role.REFERENCE],
        "pictures": pictures,
        "interval": lambda estimate, spelled: interval(estimate, spelled, "\N{EN DASH}"),
        "spelled": {"nats": nats, "percent": percent, "whole_percent": whole_percent},
    }
    return template.render(context)
