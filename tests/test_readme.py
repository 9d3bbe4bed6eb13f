"""The README's example of a policy works as it stands there."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies import Schedule

README = Path(__file__).parents[1] / "README.md"


def test_the_policy_of_the_readme_decides_within_its_budget() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (source,) = [block for block in blocks if "StepPolicy" in block]
    names: dict[str, object] = {"__name__": __name__}
    # As in a file of its own, without the __future__ import of this one.
    exec(compile(source, str(README), "exec", dont_inherit=True), names)
    policy = names["policy"]
    schedule = Schedule(np.zeros((2, 3)))
    n_steps = 200
    for _ in range(n_steps):
        schedule.advance(policy.decide(schedule.signals(query_similarity=np.full((2, 3), 0.2))))  # type: ignore[attr-defined]
    assert (schedule.n_full == n_steps * 0.1).all()


def test_the_readmes_python_runs_from_the_first_line_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    shutil.copy(README.parent / "docs/results/policy-budget-0.1-512-steps.json", tmp_path / "results/policy.json")
    (tmp_path / "long.txt").write_text("A set keeps what it chose. " * 60, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    for source in blocks:
        # As long as a test may take.
        short = source.replace("max_new_tokens=256", "max_new_tokens=12, min_new_tokens=12")
        exec(compile(short, str(README), "exec", dont_inherit=True), {"__name__": __name__})
    receipt = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert (receipt["n_steps"], receipt["horizon_steps"]) == (11, 512)


def test_what_the_readme_says_of_make_optimize_is_what_it_found() -> None:
    found = json.loads((README.parent / "docs/results/optimize-budget-0.1-512-steps.json").read_text(encoding="utf-8"))
    measured = {row["family"]: row for row in found["families"]} | {"fixed stride 10": found["baseline"]}
    (head,) = re.findall(
        r"^\| policy at a full-step budget of 10% .*\n", README.read_text(encoding="utf-8"), re.MULTILINE
    )
    text = README.read_text(encoding="utf-8").partition(head)[2].partition("\n\n")[0]
    _, *rows = text.splitlines()
    assert len(rows) >= 5
    for row in rows:
        who, *cells = row.strip("| ").split("|")
        told = [measured[name] for name in measured if re.search(rf"\b{name}\b", who.partition(":")[0])]
        assert told, who
        known = {
            form
            for one in told
            for form in (
                f"{one['full_share']:.1%}",
                f"{one['agreement']['value']:.1%}",
                *(f"{value:.3f}" for value in one["kl"].values()),
                *(f"{value:.0%}".removesuffix("%") for value in one["kl_share_of_baseline"].values()),
                f"{one['kl_share_of_baseline']['value']:.0%}",
            )
        }
        numbers = [number for cell in cells for number in re.findall(r"\d[\d.]*%?", cell)]
        assert set(numbers) <= known, who


def test_what_the_readme_says_of_another_models_speed_was_measured() -> None:
    path = README.parent / "benchmarks/results/decode-cpu-float32-qwen2.5-coder-0.5b.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    speeds = [
        ", ".join(
            f"{row['tokens_per_s']:.1f}"
            for context in (8000, 16000, 32000)
            for row in rows
            if (row["case"], row["beside_context_tokens"]) == (case, context)
        )
        for case in ("engine, tuned policy", "generate, static cache", "generate")
    ]
    sentence = "16,000 and 32,000 tokens: {}; stock with a static cache {}, with a growing one {}\n".format(*speeds)
    assert sentence in README.read_text(encoding="utf-8")


def test_what_the_readme_says_of_speed_was_measured() -> None:
    root = README.parent
    file = "decode-cpu-float32-2-x-AMD-EPYC-family-25-model-1.json"
    rows = json.loads((root / "benchmarks/results" / file).read_text(encoding="utf-8"))["rows"]
    text = (
        README.read_text(encoding="utf-8").partition("| | 2,000 tokens | 8,000 | 32,000 |")[2].partition("\n\nOn ")[0]
    )
    contexts = (2000, 8000, 32000)

    def column(case: str, name: str) -> list[float]:
        measured = {row["beside_context_tokens"]: row[name] for row in rows if row["case"] == case}
        return [measured[context] for context in contexts]

    for who, cases in {
        r"\*\*engine, tuned policy\*\*": ["engine, tuned policy"],
        "engine, stride 10": ["engine, stride 10"],
        "engine, every unit full": ["engine, every unit full"],
        "stock `generate` / with a static cache": ["generate", "generate, static cache"],
    }.items():
        (line,) = re.findall(rf"^\| {who} \|(.*)\|$", text, re.MULTILINE)
        told = [re.findall(r"[\d.]+", cell) for cell in line.split("|")]
        assert told == [
            [f"{speed:.1f}" for speed in speeds]
            for speeds in zip(*(column(case, "tokens_per_s") for case in cases), strict=True)
        ], who
    for name, sentence in (
        ("vs_generate", r"So ([\d.]+), ([\d.]+) and ([\d.]+) times stock"),
        ("vs_best_stock", r"\(([\d.]+), ([\d.]+) and ([\d.]+) times the better"),
    ):
        (told,) = re.findall(sentence, text)
        assert list(told) == [f"{times:.1f}" for times in column("engine, tuned policy", name)]


def test_what_the_readme_says_of_a_gpu_was_measured() -> None:
    runs = json.loads((README.parent / "docs/results/gpu.json").read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8").partition("On an **H200**")[2]
    columns = []
    for name in ("beside stock, batch 1 x 131072", "beside stock, batch 8 x 65536"):
        # The first run of a size is the one with most rounds.
        rows = next(run["stages"][name] for run in runs if name in run["stages"])
        columns.append({row["case"]: row for row in rows})
    of_tenth, full = "engine, cosine under a budget of 0.1", "engine, every unit full"
    stocks = ("generate", "generate, static cache, compiled")

    def cells(line: str) -> list[list[str]]:
        (found,) = re.findall(rf"^\| {line} \|(.*)\|$", text, re.MULTILINE)
        return [re.findall(r"[\d.]+", cell) for cell in found.split("|")]

    def told(column: dict[str, Any], floor_of: str, *cases: str) -> list[str]:
        return [f"{column[case]['step_ms']:.1f}" for case in cases] + [f"{column[floor_of]['floor_ms']:.1f}"]

    assert cells(r"\*\*engine, a tenth full\*\*") == [told(column, of_tenth, of_tenth) for column in columns]
    assert cells("engine, every unit full") == [told(column, full, full) for column in columns]
    assert cells("stock `generate`: growing cache / static and compiled") == [
        told(column, full, *stocks) for column in columns
    ]
    (factors,) = re.findall(
        r"So ([\d.]+) \(.*\) and ([\d.]+) times the best stock cache, .* ([\d.]+) and ([\d.]+)\.", text
    )
    expected = [column[case]["vs_best_stock"] for case in (of_tenth, full) for column in columns]
    assert list(factors) == [f"{times:.1f}" for times in expected]


def test_what_the_readme_says_of_other_peoples_code_was_measured() -> None:
    found = json.loads((README.parent / "docs/results/peers.json").read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8").partition("**Beside other people's own code**")[2]
    (as_many, *theirs) = re.findall(
        r"reads \((\d+)\): StreamingLLM ([\d.]+), ExpectedAttention ([\d.]+), TOVA ([\d.]+), SnapKV ([\d.]+) nats", text
    )[0]
    assert as_many == str(found["as_many"])
    of_theirs = found["theirs"][as_many]
    assert theirs == [f"{of_theirs[name]:.3f}" for name in ("StreamingLLM", "ExpectedAttention", "TOVA", "SnapKV")]
    (ours,) = re.findall(r"k = 128, \*\*([\d.]+)\*\*", text)
    assert ours == f"{found['ours']['tuned on 512 steps']['kl']:.3f}"


def test_what_the_readme_says_of_a_models_own_modules_was_measured() -> None:
    rows = json.loads((README.parent / "docs/results/modules.json").read_text(encoding="utf-8"))["rows"]
    shares = {(row["context_tokens"], row["policy"], row["path"]): row["of_stock"] for row in rows}
    text = README.read_text(encoding="utf-8")
    (told,) = re.findall(
        r"8,000 tokens: ([\d.]+) and\s+([\d.]+) of stock's time with the tuned policy, ([\d.]+) and ([\d.]+)",
        text,
    )
    found = [shares[tokens, "tuned", path] for path in ("cpu_modules", "cpu") for tokens in (2000, 8000)]
    assert list(told) == [f"{share:.2f}" for share in found]


def test_every_path_that_the_readme_names_exists() -> None:
    text = README.read_text(encoding="utf-8")
    paths = re.findall(r"\]\(((?!https?:)[^)]+)\)", text)
    assert paths
    for path in paths:
        assert (README.parent / path.partition("#")[0]).exists(), path


def test_what_the_readme_says_of_exact_decoding_was_measured() -> None:
    compared = json.loads((README.parent / "docs/results/exact-texts.json").read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8").partition("**Exact**")[2]
    ((n_texts, n_tokens),) = re.findall(r"Of (\d+) texts of (\d+) tokens, .*? every one is stock `generate`'s", text)
    written = [row for row in compared["texts"] if row["way"] != "bfloat16"]
    assert all(row["beside_stock"] == "equal" for row in written)
    assert [int(n_texts), int(n_tokens)] == [len(written), compared["tokens"]]
    held = re.findall(
        r"eight drafts to a verification ([\d.]+) of 9 tokens hold.*?, ([\d.]+) along .*? and ([\d.]+)\s+where", text
    )
    means = {
        texts: np.mean([row["by_number"]["8"] for row in compared["rounds"] if row["texts"] == texts])
        for texts in ("own", "held-out", "own, temperature 0.7")
    }
    assert held == [tuple(f"{mean:.1f}" for mean in means.values())]

    found = json.loads((README.parent / "docs/results/exact.json").read_text(encoding="utf-8"))
    (told,) = re.findall(r"at 2,000 and 8,000 tokens it has ([\d.]+) and ([\d.]+) of the\s+speed", text)
    times = {(row["batch"], row["context_tokens"], row["case"]): row["times_full"] for row in found["times"]}
    assert list(told) == [f"{times[1, context, 'exact, 8']:.2f}" for context in (2000, 8000)]

    runs = json.loads((README.parent / "docs/results/gpu.json").read_text(encoding="utf-8"))
    stages = next(run["stages"] for run in reversed(runs) if "exact, batch 1 x 131072" in run["stages"])
    (*ms, once, twice) = re.findall(
        r"takes ([\d.]+) ms at 1 x 131,072 and ([\d.]+) at 8 x 65,536, ([\d.]+) and ([\d.]+) times as fast", text
    )[0]
    for at, told_ms, gain in (("1 x 131072", ms[0], once), ("8 x 65536", ms[1], twice)):
        rows = {row["case"]: row["step_ms"] for row in stages[f"exact, batch {at}"]}
        exact_ms = rows["exact, 8 drafts"]
        assert [told_ms, gain] == [f"{exact_ms:.1f}", f"{rows['engine, every unit full'] / exact_ms:.2f}"]

    tuned = json.loads((README.parent / "docs/results/exact-tuned.json").read_text(encoding="utf-8"))["runs"][1:]
    told = re.findall(
        r"predicted to be\s+([\d.]+) and ([\d.]+) times always full, "
        r"where the best number of drafts has ([\d.]+) and ([\d.]+)",
        text,
    )
    fixed = [run["best_fixed"]["tokens_per_ms"] * run["costs"]["full_ms"] for run in tuned]
    assert list(told[0]) == [f"{gain:.2f}" for gain in (*(run["predicted_gain"] for run in tuned), *fixed)]
    assert all(run["measured"]["n_equal"] == run["measured"]["n_texts"] for run in tuned)
