"""lm-eval's own machinery on local tasks: a multiple choice, a perplexity and a generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from policies import AlwaysFull, FixedStride, NeverFull, PolicyFile, Selection, StepPolicy
from recycler import model_shape, recycled, score

pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-lm-eval")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from recycler.harness.recycled_lm import RecycledLM

# What lm-eval and datasets do is theirs; ours stay errors.
pytestmark = pytest.mark.filterwarnings("ignore:::(lm_eval|datasets|multiprocess|dill|fsspec).*")

SELECTION = Selection(6, sinks=1, window=2)
CONTEXTS = ("A set keeps what it chose, and", "one two three four five six", "abababababababababab")
TASKS = {
    "choosing": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "reading": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, save_byte_model: Callable[..., None]) -> Path:
    """A random model whose tokenizer has an end of text, a policy for it, and local tasks."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save_byte_model(folder / "model", positions=64)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    # What stands for the byte 0.
    tokenizer.eos_token = tokenizer.pad_token = "Ā"
    tokenizer.save_pretrained(folder / "model")
    shape = model_shape(AutoModelForCausalLM.from_pretrained(folder / "model"))
    PolicyFile(policy=FixedStride(4), selection=SELECTION, model=shape).write(folder / "policy.json")
    choices = ["abc", " d", " six seven"]
    documents = [{"context": context, "choices": choices, "gold": i} for i, context in enumerate(CONTEXTS)]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    (folder / "tasks").mkdir()
    where = f"{{data_files: {{test: {folder}/test.jsonl}}, cache_dir: {folder}/cache}}"
    source = f"dataset_path: json\ndataset_kwargs: {where}\ntest_split: test\n"
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n{source}{task}", encoding="utf-8")
    return folder


def lm_of(folder: Path, policy: StepPolicy | None, **more: Any) -> Any:
    """The harness's model, stock if there is no policy."""
    given = {"pretrained": str(folder / "model"), "device": "cpu", **more}
    return HFLM(**given) if policy is None else RecycledLM(policy=policy, selection=SELECTION, **given)


def evaluated(folder: Path, lm: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    return found


def answers(found: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in found["samples"][task]]


@pytest.fixture(scope="module")
def stock(folder: Path) -> dict[str, Any]:
    return evaluated(folder, lm_of(folder, None))


@pytest.mark.parametrize("more", [{}, {"fast": False}, {"batch_size": 2}], ids=str)
def test_always_full_has_the_results_of_the_stock_model(
    folder: Path, stock: dict[str, Any], more: dict[str, Any]
) -> None:
    found = evaluated(folder, lm_of(folder, AlwaysFull(), **more))
    for task in ("choosing", "writing"):
        assert found["results"][task] == stock["results"][task]
    assert answers(found, "writing") == answers(stock, "writing")
    for ours, theirs in zip(answers(found, "choosing"), answers(stock, "choosing"), strict=True):
        for [(log_p, is_greedy)], [(stock_log_p, stock_is_greedy)] in zip(ours, theirs, strict=True):
            assert float(log_p) == pytest.approx(float(stock_log_p), abs=1e-4)
            assert is_greedy == stock_is_greedy
    for metric in ("word_perplexity,none", "byte_perplexity,none"):
        assert found["results"]["reading"][metric] == pytest.approx(stock["results"]["reading"][metric], rel=1e-5)
    receipt = found["config"]["recycled"]
    assert receipt["full_share"] == receipt["read_share"] == 1
    assert receipt["engine"] == ("cpu" if more.get("fast", True) else "plain")


def test_a_policy_answers_as_score_and_recycled_do(folder: Path, stock: dict[str, Any]) -> None:
    found = evaluated(folder, lm_of(folder, NeverFull()))
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    n_steps = 0
    for sample in found["samples"]["choosing"]:
        for (context, choice), [(log_p, is_greedy)] in zip(sample["arguments"], sample["resps"], strict=True):
            read, whole = (tokenizer(text).input_ids for text in (context, context + choice))
            alone = score(model, NeverFull(), read, whole[len(read) :], SELECTION)
            assert float(log_p) == pytest.approx(alone.log_probabilities.sum(), abs=1e-6)
            assert str(is_greedy) == str(alone.is_greedy.all())
            n_steps += alone.receipt.n_steps
    assert answers(found, "choosing") != answers(stock, "choosing")
    for context, [[written]] in zip(CONTEXTS, answers(found, "writing"), strict=True):
        tokens = tokenizer(context, return_tensors="pt").input_ids
        with recycled(model, NeverFull(), SELECTION):
            new = model.generate(tokens, max_new_tokens=24, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        assert tokenizer.decode(new[0, tokens.shape[1] :], skip_special_tokens=True).split("e")[0] == written
    receipt = found["config"]["recycled"]
    assert receipt["full_share"] == 0
    # Of a rolling one, all bytes but the first follow the end of text, and the last is not fed.
    assert receipt["n_steps"] > n_steps + sum(len(context) - 1 for context in CONTEXTS)


def test_exact_has_the_results_of_the_stock_model_whatever_drafts(folder: Path, stock: dict[str, Any]) -> None:
    found = evaluated(folder, lm_of(folder, NeverFull(), exact=True))
    for task in ("choosing", "writing"):
        assert found["results"][task] == stock["results"][task]
    assert answers(found, "writing") == answers(stock, "writing")
    assert found["config"]["recycled"]["rounds"]["n_rounds"] > 0


def test_a_context_that_is_too_long_is_cut_as_the_stock_model_does(folder: Path) -> None:
    requests = [(None, list(range(30, 100)), [5, 6, 7]), (None, list(range(30, 92)), [5, 6, 7])]
    ours, theirs = (lm_of(folder, policy)._loglikelihood_tokens(requests) for policy in (AlwaysFull(), None))
    np.testing.assert_allclose([log_p for log_p, _ in ours], [log_p for log_p, _ in theirs], atol=1e-4)


def test_what_is_no_rule_of_rounds_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"exact must be True, False or a rule of policies\.stops .*, not 8"):
        lm_of(folder, NeverFull(), exact=8)


def test_a_model_without_a_policy_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="give policy=FILE in --model_args"):
        RecycledLM(str(folder / "model"))


def test_the_command_runs_tasks_with_a_policy_file_and_tells_what_was_applied(folder: Path) -> None:
    arguments = [
        *("--model", "recycler", "--model_args", f"pretrained={folder}/model,policy={folder}/policy.json"),
        *("--include_path", str(folder / "tasks"), "--tasks", "choosing,writing", "--output_path", str(folder / "out")),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "recycler.lm_eval", *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|choosing|" in done.stdout.replace(" ", "")
    assert "steps x 1 rows on engine cpu: " in done.stderr
    (results,) = (folder / "out").rglob("results_*.json")
    assert json.loads(results.read_text(encoding="utf-8"))["config"]["recycled"]["horizon_steps"] is None
    wrong = subprocess.run(
        [sys.executable, "-m", "recycler.lm_eval", *arguments[:3], f"pretrained={folder}/model", *arguments[4:]],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: the model recycler decodes with a policy")
