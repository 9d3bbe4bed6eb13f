"""The command that measures a policy against its competitors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from policies import FixedStride, ModelShape, PolicyFile, Selection, StepPolicy
from recycler.evaluate import answers, competitors
from recycler.evaluate.__main__ import main
from recycler.evaluate.summary import QUARTERS
from recycler.model.loading import LoadedModel, load_model
from recycler.model.shape import model_shape
from traces.reporting.command import run_command

Run = Callable[..., tuple[int, str, str]]
WritePolicy = Callable[..., Path]

SELECTION = Selection(k=32, sinks=2, window=4)
POLICY = FixedStride(((2, 3), (4, 5)))
SIZES = ("--context-tokens", "400", "--steps", "12", "--prompts", "2", "--first-index", "1")
# The random model answers nothing right: methods can be compared on what is teacher-forced.
TEXTS = ("--tasks", "prose,technical")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, save_byte_model: Callable[..., None]) -> LoadedModel:
    folder = tmp_path_factory.mktemp("evaluate") / "tiny"
    save_byte_model(folder, positions=1024)
    return load_model(str(folder), device="cpu")


@pytest.fixture
def write_policy(tmp_path: Path, loaded: LoadedModel) -> WritePolicy:
    """Writes a policy file for the tiny model, or for another one."""

    def write(
        name: str = "policy",
        policy: StepPolicy = POLICY,
        selection: Selection = SELECTION,
        model: ModelShape | None = None,
        **provenance: Any,
    ) -> Path:
        path = tmp_path / f"{name}.json"
        PolicyFile(policy, selection, model or model_shape(loaded.model, loaded.id), provenance).write(path)
        return path

    return write


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run_command(main, ["--device", "cpu", "--out", str(tmp_path / "out"), *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


def test_the_last_line_holds_every_method_task_and_measure(run: Run, write_policy: WritePolicy, tmp_path: Path) -> None:
    code, out, _ = run("--policy", write_policy(family="mine"), *TEXTS, *SIZES, "--methods", "streaming_llm,sfi,random")
    assert code == 0
    last = json.loads(out.splitlines()[-1])
    assert set(last) == {"model", "k", "context_tokens", "rows"}
    assert (last["k"], last["context_tokens"]) == (32, 400)
    fields = {"method", "task", "measure", "value", "low", "high", "full_share", "read_share"}
    assert all(set(row) == fields for row in last["rows"])
    methods, tasks = ("full", "streaming_llm", "sfi", "random", "tuned_mine"), ("prose", "technical", "all")
    measures = ("kl", *QUARTERS, "kl_p95", "above_1_nat", "agreement", "nll_change", "full_share", "read_share")
    assert {(row["method"], row["task"], row["measure"]) for row in last["rows"]} == {
        (method, task, measure) for method in methods for task in tasks for measure in measures
    }
    assert all(row["low"] <= row["value"] <= row["high"] for row in last["rows"])
    by_method = {row["method"]: row for row in last["rows"] if (row["task"], row["measure"]) == ("all", "kl")}
    assert by_method["full"]["value"] == pytest.approx(0, abs=1e-6)
    assert by_method["full"]["full_share"] == by_method["full"]["read_share"] == 1
    assert by_method["streaming_llm"]["full_share"] == 0
    assert by_method["streaming_llm"]["read_share"] == pytest.approx(32 / 406.5, rel=1e-3)
    assert by_method["tuned_mine"]["full_share"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 6) / 4)
    for name in ("results.json", "tables.md", "ranking.png", "pareto.png", "curves.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["rows"] == last["rows"]
    assert len(results["curves"]["prose"]["streaming_llm"]) == 12


def test_a_task_that_full_attention_cannot_do_is_reported_and_not_compared(run: Run, write_policy: WritePolicy) -> None:
    # One token per byte: the question alone takes 300 of them.
    chosen = ("--tasks", "prose,single_needle", "--methods", "streaming_llm", "--context-tokens", "800")
    code, out, _ = run("--policy", write_policy(), *SIZES, *chosen)
    assert code == 0
    assert "no: full attention cannot" in out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert {row["method"] for row in rows if row["task"] == "single_needle"} == {"full"}
    assert {row["method"] for row in rows if row["task"] == "prose"} == {"full", "streaming_llm", "tuned_fixed_stride"}


def test_an_interrupted_comparison_goes_on_where_it_stopped(
    run: Run, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    stock = answers.measure

    def interrupted(loaded: Any, task: Any, methods: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(task.prompt.name)
        return stock(loaded, task, methods)

    arguments = ("--policy", write_policy(), *TEXTS, *SIZES, "--methods", "never")
    monkeypatch.setattr(answers, "measure", interrupted)
    assert run(*arguments)[0] == 130

    def counted(loaded: Any, task: Any, methods: Any) -> Any:
        measured.append(task.prompt.name)
        return stock(loaded, task, methods)

    monkeypatch.setattr(answers, "measure", counted)
    assert run(*arguments)[0] == 0
    assert sorted(measured) == ["prose-001", "prose-002", "technical-001", "technical-002"]


def test_sets_with_sizes_of_units_are_compared_at_their_k_and_thresholds_are_tuned_for_them_once(
    run: Run, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned_for: list[Selection] = []
    stock = competitors.calibrated_thresholds

    def counted(loaded: Any, prompts: Any, k: int, budget: float, our_set: Selection) -> Any:
        tuned_for.append(our_set)
        return stock(loaded, prompts, k, budget, our_set)

    monkeypatch.setattr(competitors, "calibrated_thresholds", counted)
    sized = Selection(k=32, sinks=2, window=4, unit_k=((20, 44), (50, 14)))
    # Looking at every fifth step is rare enough for this budget: nothing is decoded to tune thresholds.
    path = write_policy(selection=sized, budget=0.5)
    methods = ("--methods", "refreshkv_qc5_tuned_our_set,fresh_top_k_ceiling")
    for _ in range(2):
        code, out, _ = run("--policy", path, "--tasks", "prose", *SIZES, *methods)
        assert code == 0
        assert json.loads(out.splitlines()[-1])["k"] == 32
    assert tuned_for == [sized]


def test_several_policies_are_compared_under_names_of_their_own(run: Run, write_policy: WritePolicy) -> None:
    paths = [write_policy(name, FixedStride(stride), family="same") for name, stride in (("two", 2), ("three", 3))]
    both = [part for path in paths for part in ("--policy", path)]
    code, out, _ = run(*both, "--tasks", "prose", *SIZES, "--methods", "none")
    assert code == 0
    shares = {row["method"]: row["full_share"] for row in json.loads(out.splitlines()[-1])["rows"]}
    assert shares == {"full": 1, "tuned_two": 0.5, "tuned_three": pytest.approx(1 / 3, abs=1e-6)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--tasks", "prose,riddles"), "the task 'riddles' is unknown: use some of single_needle, "),
        (("--methods", "never,magic"), "the method 'magic' is unknown: use some of streaming_llm, "),
        (
            ("--context-tokens", "1020"),
            "task prose: the prompt has 1020 tokens and 12 more are asked for, but the model ",
        ),
        (("--context-tokens", "50"), "context_tokens must be at least 128, not 50"),
        (("--policy", "missing.json"), "cannot read the policy missing.json: No such file or directory."),
    ],
)
def test_what_cannot_be_measured_ends_with_one_sentence(
    run: Run, write_policy: WritePolicy, arguments: tuple[str, ...], sentence: str
) -> None:
    code, out, err = run("--policy", write_policy(), "--tasks", "prose", *SIZES, *arguments)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_a_policy_of_another_model_ends_with_both_shapes(
    run: Run, write_policy: WritePolicy, loaded: LoadedModel
) -> None:
    other = ModelShape("other", 3, 2, 4, 8)
    path = write_policy(policy=FixedStride(2), model=other)
    code, _, err = run("--policy", path, "--model", loaded.id, *TEXTS, *SIZES)
    assert code == 2
    assert err.startswith("error: the policy was tuned on other")
    assert "2 layers" in err or "layers=2" in err


def test_policies_of_different_k_are_not_comparable(run: Run, write_policy: WritePolicy) -> None:
    larger = write_policy("larger", selection=Selection(64))
    code, _, err = run("--policy", write_policy(), "--policy", larger, *TEXTS, *SIZES)
    assert code == 2
    assert f"methods are compared at equal k, but {larger} has 64" in err
