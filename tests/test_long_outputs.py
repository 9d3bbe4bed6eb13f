"""What README and docs say of long outputs is what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULT: dict[str, Any] = json.loads((ROOT / "docs" / "results" / "long-outputs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(benchmark_module: Callable[[str], Any]) -> Any:
    """The module that wrote `docs/long_outputs.md`."""
    return benchmark_module("long_outputs_report")


def test_the_page_is_what_the_benchmark_writes_of_its_json(report: Any) -> None:
    assert (ROOT / "docs" / "long_outputs.md").read_text(encoding="utf-8") == report.page(ROOT / "docs" / "results")


@pytest.mark.parametrize(
    ("at_most", "found", "met"),
    [(True, [0.07, 0.08], "yes"), (True, [0.09], "no"), (False, [0.07, 0.08], "1 of 2"), (False, [0.07], "no")],
)
def test_an_aim_is_met_where_the_number_is_on_its_side(
    benchmark_module: Callable[[str], Any], at_most: bool, found: list[float], met: str
) -> None:
    aim = benchmark_module("long_outputs_aims").Aim("a share", 0.08, at_most, found)
    assert aim.line.split(" | ")[3] == met


def test_the_readmes_table_has_rows_of_the_json(report: Any) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    head, *rows = report.table(RESULT, [name for name in RESULT["rows"] if name != "full attention"])
    assert head in readme
    told = [row for row in rows[1:] if row in readme]
    assert any(row.startswith("| tuned on 512 steps") for row in told)
    assert any(row.startswith("| stride 10") for row in told)
    # Nothing else is said in that table.
    begin = readme.index(head)
    lines = readme[begin : readme.index("\n\n", begin)].splitlines()
    assert set(lines) == {head, rows[0], *told}


def test_the_page_on_timing_is_what_the_benchmark_writes_of_its_json(benchmark_module: Callable[[str], Any]) -> None:
    result = json.loads((ROOT / "docs" / "results" / "timing.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "timing.md").read_text(encoding="utf-8") == benchmark_module("timing_report").report(result)


def test_what_the_readme_says_of_kinds_left_out_was_measured() -> None:
    kinds = json.loads((ROOT / "docs" / "results" / "left-out.json").read_text(encoding="utf-8"))["kinds"].values()
    mean = sum(kind["tuned without it"] for kind in kinds) / sum(kind["stride 10"] for kind in kinds)
    worst = max(kind["tuned without it"] / kind["stride 10"] for kind in kinds)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{mean:.0%} of stride 10's KL in the mean, {worst:.0%} at worst" in readme


def test_what_the_readme_says_of_longer_outputs_and_contexts_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.search(
        r"over 1,024 steps has (\d+%) of stride 10's KL \((\d+) prompts\), and .* with k = 256, .*, "
        r"(\d+%) \((\d+) prompts\), at 6,144 tokens with k = 512 (\d+%) \((\d+) prompts\)",
        readme,
    )
    assert told is not None
    found = []
    for name in ("long-outputs-1536-1024-k128", "long-outputs-3072-512-k256", "long-outputs-6144-512-k512"):
        result = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        stride = min(row["kl"] for who, row in result["rows"].items() if who.startswith("stride 10"))
        found += [f"{result['rows']['tuned on 512 steps']['kl'] / stride:.0%}", str(result["prompts"])]
    assert list(told.groups()) == found


def test_what_the_readme_says_of_other_prompts_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.search(
        r"judged on (\d+) prompts of other texts: ([\d.]+), (\d+%) of stride 10's ([\d.]+), "
        r"and ([\d.]+), (\d+%) of ([\d.]+),",
        readme,
    )
    assert told is not None
    n_prompts, *numbers = told.groups()
    found = []
    for name in ("seed1-from12", "seed2-from0"):
        result = json.loads((ROOT / f"docs/results/long-outputs-{name}.json").read_text(encoding="utf-8"))
        assert n_prompts == str(result["prompts"])
        kl = result["rows"]["tuned on 512 steps"]["kl"]
        stride = min(row["kl"] for who, row in result["rows"].items() if who.startswith("stride 10"))
        found += [f"{kl:.3f}", f"{kl / stride:.0%}", f"{stride:.3f}"]
    assert numbers == found
    # Of the last one, new sets at every step as well.
    rows = result["rows"]
    beside = f"{rows['tuned on 512 steps']['kl']:.3f} beside {rows['new sets at every step']['kl']:.3f}"
    assert f"with the policy of seed 2 on other texts (below), {beside}." in readme


def test_what_the_readme_says_of_another_model_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.search(
        r"(\d+%) of stride 10's KL over 512 steps \((\d+) prompts;[^)]*\), "
        r"and with `--k 256`, not tuned again, (\d+%); "
        r"at 16,000 tokens with `--k 800` \(5%\), not tuned again, (\d+%) \((\d+) prompts",
        readme,
    )
    assert told is not None
    found = []
    for sizes in ("", "-1536-512-k256", "-16000-512-k800-seed1-from1"):
        path = ROOT / f"docs/results/long-outputs-qwen2.5-coder-0.5b-instruct{sizes}.json"
        result = json.loads(path.read_text(encoding="utf-8"))
        stride = min(row["kl"] for who, row in result["rows"].items() if who.startswith("stride 10"))
        found += [f"{result['rows']['tuned on 512 steps']['kl'] / stride:.0%}", str(result["prompts"])]
    assert list(told.groups()) == [*found[:3], *found[4:]]


def test_what_the_readme_says_of_another_models_own_words_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = re.search(r"it keeps (\d+%) of full attention's score .* at k = 128, stride 10 (\d+%)", readme)
    assert told is not None
    rows = json.loads((ROOT / "docs/results/own-words-qwen2.5-coder-0.5b.json").read_text(encoding="utf-8"))["rows"]
    kept = {row["method"]: row["value"] for row in rows if (row["task"], row["measure"]) == ("all", "accuracy_kept")}
    assert list(told.groups()) == [f"{kept[who]:.0%}" for who in ("tuned_cosine_profile", "refreshkv_s10_our_set")]
