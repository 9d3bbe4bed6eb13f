from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from policies import AlwaysFull, BudgetConstrained, FixedStride, MaxAge, ModelShape, PolicyFile, Selection, StepPolicy
from recycler.decode.recycled import recycled
from recycler.generate import main
from recycler.model.generation import generate_tokens
from recycler.model.loading import LoadedModel, load_model
from recycler.model.shape import model_shape
from traces.reporting.command import run_command

Run = Callable[..., tuple[int, str, str]]
WritePolicy = Callable[..., Path]

TEXT = "It was a dark and stormy night; the rain fell in torrents."
SELECTION = Selection(k=16, sinks=2, window=4)
POLICY = MaxAge(BudgetConstrained(FixedStride(((2, 3), (4, 5))), 0.3), 7)


@pytest.fixture(scope="module")
def loaded(byte_model: Path) -> LoadedModel:
    return load_model(str(byte_model), device="cpu")


@pytest.fixture
def write_policy(tmp_path: Path, loaded: LoadedModel) -> WritePolicy:
    """Writes a policy file for the tiny model, or for another one."""

    def write(policy: StepPolicy = POLICY, model: ModelShape | None = None) -> Path:
        path = tmp_path / "policy.json"
        PolicyFile(policy, SELECTION, model or model_shape(loaded.model, loaded.id)).write(path)
        return path

    return write


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run_command(main, ["--device", "cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


def result(out: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(out.splitlines()[-1])
    return values


def untimed(out: str) -> list[Any]:
    values = result(out)
    return [out.splitlines()[:-1], {name: values[name] for name in values if not name.endswith("_s")}]


def independent_run(
    loaded: LoadedModel, text: str, n_new: int, policy: StepPolicy = POLICY
) -> tuple[str, dict[str, Any]]:
    """The text and the receipt of stock generate inside `recycled`."""
    inputs = loaded.tokenizer(text, return_tensors="pt")
    with recycled(loaded.model, policy, SELECTION) as session:
        tokens = loaded.model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=n_new, do_sample=False
        )
    new = tokens[0, inputs.input_ids.shape[1] :]
    return str(loaded.tokenizer.decode(new)), session.receipt().to_json()


def test_it_prints_the_text_then_the_receipt_then_one_json_line(
    run: Run, write_policy: WritePolicy, loaded: LoadedModel
) -> None:
    path = write_policy()
    code, out, err = run("--policy", path, "--prompt", TEXT, "--max-new-tokens", "30")
    assert (code, err) == (0, "")
    text, receipt = independent_run(loaded, TEXT, 30)
    assert out.startswith(text + "\n29 steps x 1 rows on engine cpu: ")
    assert "full share per" in out

    values = result(out)
    assert values.pop("tokens_per_s") > 0
    assert values.pop("prefill_s") > 0
    assert values == {
        "new_tokens": 30,
        "prefill_tokens": len(TEXT),
        "full_share": receipt["full_share"],
        "keys_only_share": 0,
        "read_share": receipt["read_share"],
        "engine": "cpu",
        "why_plain": None,
        "reasons": receipt["reasons"],
        "horizon_steps": None,
        "notes": [],
        "audit": None,
        "governed": None,
        "rounds": None,
        "written_by": receipt["written_by"],
        "model": loaded.id,
        "policy": str(path),
    }
    assert 0 < values["full_share"] <= 0.3
    assert values["read_share"] < 0.6
    assert values["reasons"]["budget"] > 0


def test_with_audits_the_receipt_says_how_far_from_full_attention_the_text_was(
    run: Run, write_policy: WritePolicy
) -> None:
    code, out, err = run("--policy", write_policy(), "--prompt", TEXT, "--max-new-tokens", "30", "--audit", "8")
    assert (code, err) == (0, "")
    audit = result(out)["audit"]
    assert audit["row_steps"] == 24
    assert 0 < audit["kl_mean"] <= audit["kl_p95"]
    assert "\n  audited: 24 of 29 steps of rows, KL to full attention " in out


def test_exact_text_is_full_attentions(run: Run, write_policy: WritePolicy, loaded: LoadedModel) -> None:
    command = ("--policy", write_policy(), "--prompt", TEXT, "--max-new-tokens", "30", "--exact")
    code, out, err = run(*command)
    assert (code, err) == (0, "")
    inputs = loaded.tokenizer(TEXT, return_tensors="pt")
    stock = loaded.model.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert out.startswith(f"{loaded.tokenizer.decode(stock)}\n29 exact steps x 1 rows on engine cpu, ")
    rounds = result(out)["rounds"]
    assert rounds["n_accepted"] <= rounds["n_drafts"]
    assert rounds["n_rounds"] + rounds["n_accepted"] >= 29
    assert "\n  exact: " in out


def test_exact_text_is_not_measured(run: Run, write_policy: WritePolicy) -> None:
    code, _, err = run("--policy", write_policy(), "--prompt", TEXT, "--exact", "--audit", "8")
    assert code != 0
    assert "leave out audit and govern_kl" in err


def test_the_same_command_gives_the_same_output(run: Run, write_policy: WritePolicy) -> None:
    command = ("--policy", write_policy(), "--prompt", TEXT, "--max-new-tokens", "20")
    greedy = untimed(run(*command)[1])
    assert untimed(run(*command)[1]) == greedy
    assert untimed(run(*command, "--seed", "1")[1]) == greedy

    drawn = untimed(run(*command, "--temperature", "1.5", "--seed", "1")[1])
    assert untimed(run(*command, "--temperature", "1.5", "--seed", "1")[1]) == drawn
    assert untimed(run(*command, "--temperature", "1.5", "--seed", "2")[1]) != drawn
    assert drawn != greedy


def test_the_prompt_may_come_from_a_file_or_a_pipe(
    run: Run, write_policy: WritePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--policy", write_policy(), "--max-new-tokens", "10")
    expected = untimed(run(*command, "--prompt", TEXT)[1])
    (tmp_path / "prompt.txt").write_text(TEXT, encoding="utf-8")
    assert untimed(run(*command, "--prompt-file", tmp_path / "prompt.txt")[1]) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert untimed(run(*command)[1]) == expected


def test_chat_puts_the_prompt_into_the_template(run: Run, write_policy: WritePolicy, loaded: LoadedModel) -> None:
    templated = f"<user>{TEXT}<assistant>"
    _, out, _ = run("--policy", write_policy(), "--chat", "--prompt", TEXT, "--max-new-tokens", "10")
    assert result(out)["prefill_tokens"] == len(templated)
    assert out.startswith(independent_run(loaded, templated, 10)[0] + "\n")


def test_compare_tells_speed_and_tokens_of_full_attention(run: Run, write_policy: WritePolicy) -> None:
    command = ("--prompt", TEXT, "--max-new-tokens", "20", "--compare", "--policy")
    values = result(run(*command, write_policy(AlwaysFull()))[1])
    assert (values["shared_tokens"], values["agreement"], values["full_share"], values["read_share"]) == (20, 1, 1, 1)
    assert values["tokens_per_s_full"] > 0
    code, out, _ = run(*command, write_policy())
    other = result(out)
    assert code == 0
    assert other["shared_tokens"] < 20
    assert other["shared_tokens"] / 20 <= other["agreement"] < 1
    assert (
        f"share their first {other['shared_tokens']} tokens; along full attention's text {other['agreement']:.1%}"
        in out
    )


@pytest.mark.parametrize("how", [("--temperature", "0.7"), ("--exact",)], ids=["drawn", "exact"])
def test_compare_says_nothing_of_agreement_where_it_has_no_meaning(
    run: Run, write_policy: WritePolicy, how: tuple[str, ...]
) -> None:
    command = ("--prompt", TEXT, "--max-new-tokens", "20", "--compare", "--policy", write_policy())
    code, out, _ = run(*command, *how)
    values = result(out)
    assert code == 0
    assert values["agreement"] is None
    assert values["shared_tokens"] == 20 or "--exact" not in how


def test_the_plain_path_gives_the_same_text_and_says_why_it_was_taken(run: Run, write_policy: WritePolicy) -> None:
    command = ("--policy", write_policy(), "--prompt", TEXT, "--max-new-tokens", "20")
    (_, fast, _), (_, plain, _) = run(*command), run(*command, "--plain")
    assert fast.split("\n19 steps")[0] == plain.split("\n19 steps")[0]
    assert "engine plain because fast is False" in plain
    assert (result(plain)["engine"], result(plain)["why_plain"]) == ("plain", "fast is False")
    for name in ("full_share", "read_share", "reasons"):
        assert result(fast)[name] == result(plain)[name]


def test_one_new_token_has_no_decode_step_to_tell_of(run: Run, write_policy: WritePolicy) -> None:
    code, out, _ = run("--policy", write_policy(), "--prompt", TEXT, "--max-new-tokens", "1")
    values = result(out)
    assert (code, values["new_tokens"]) == (0, 1)
    assert [values[name] for name in ("tokens_per_s", "full_share", "read_share")] == [None, None, None]


def test_another_model_of_the_shape_is_used_with_a_note(
    run: Run, write_policy: WritePolicy, loaded: LoadedModel
) -> None:
    path = write_policy(model=ModelShape("tuned-on-this", 2, 2, 4, 8))
    code, out, err = run("--policy", path, "--prompt", TEXT, "--max-new-tokens", "3", "--model", loaded.id)
    assert (code, result(out)["model"]) == (0, loaded.id)
    assert err == f"note: the policy was tuned on tuned-on-this, and runs on {loaded.id}.\n"


def test_tokens_are_streamed_as_they_come(loaded: LoadedModel) -> None:
    seen: list[tuple[list[int], int]] = []

    class Stream:
        def put(self, value: torch.Tensor) -> None:
            seen.append((value.flatten().tolist(), session.receipt().n_steps))

        def end(self) -> None:
            seen.append(([], -1))

    prompt = list(range(40))
    with recycled(loaded.model, POLICY, SELECTION) as session:
        generation = generate_tokens(loaded.model, prompt, max_new_tokens=6, streamer=Stream())
    assert len(generation.tokens) == 6
    assert generation.prefill_s > 0
    assert generation.tokens_per_s == 5 / generation.decode_s
    expected = [([token], step) for step, token in enumerate(generation.tokens)]
    assert seen == [(prompt, 0), *expected, ([], -1)]


def test_an_end_of_text_token_ends_the_text_unless_more_tokens_are_asked_for(loaded: LoadedModel) -> None:
    prompt = list(range(40))
    free = generate_tokens(loaded.model, prompt, max_new_tokens=8).tokens
    config = loaded.model.generation_config
    config.eos_token_id = [free[2]]
    try:
        end = free.index(free[2]) + 1
        assert generate_tokens(loaded.model, prompt, max_new_tokens=8).tokens == free[:end]
        longer = generate_tokens(loaded.model, prompt, max_new_tokens=8, min_new_tokens=8).tokens
        assert len(longer) == 8
        assert free[2] not in longer
    finally:
        config.eos_token_id = None


def test_drawing_leaves_the_random_numbers_of_the_process_alone(loaded: LoadedModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate_tokens(loaded.model, [1, 2, 3], max_new_tokens=4, temperature=1.0, seed=9)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", " \n"], "the prompt is empty"),
        (["--prompt-file", "{empty}"], "the prompt is empty"),
        (["--prompt-file", "{folder}/none.txt"], "none.txt cannot be read: No such file"),
        (["--prompt-file", "{binary}"], "is not UTF-8 text: byte 1 is invalid"),
        (["--prompt", TEXT, "--prompt-file", "{empty}"], "not both"),
        (["--prompt", TEXT, "--max-new-tokens", "100"], "the model has only 128 positions"),
        (["--prompt", TEXT, "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", TEXT, "--temperature", "-1"], "--temperature"),
        (["--prompt", TEXT, "--dtype", "int3"], "dtype 'int3' is not supported"),
        (["--prompt", TEXT, "--model", "{folder}/none"], "cannot be loaded"),
        (["--prompt", TEXT, "--policy", "{folder}/none.json"], "cannot read the policy"),
        (["--prompt", TEXT, "--policy", "{binary}"], "is not JSON"),
        (["--prompt", TEXT, "--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    run: Run, write_policy: WritePolicy, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "empty.txt").touch()
    (folder / "binary.txt").write_bytes(b"a\xff")
    paths = {"folder": folder, "empty": folder / "empty.txt", "binary": folder / "binary.txt"}
    given = [argument.format(**paths) for argument in arguments]
    code, out, err = run("--policy", write_policy(), *given)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert sentence in err


def test_a_policy_for_another_shape_is_refused_with_both(
    run: Run, write_policy: WritePolicy, loaded: LoadedModel
) -> None:
    # One with per-unit numbers, and one that would run on any model but was tuned on another.
    for policy in (FixedStride(((2.0,), (3.0,), (4.0,))), FixedStride(2)):
        path = write_policy(policy, ModelShape(loaded.id, 3, 1, 4, 8))
        code, out, err = run("--policy", path, "--prompt", TEXT, "--max-new-tokens", "3")
        assert (code, out) == (2, "")
        assert err == (
            f"error: the policy was tuned on {loaded.id} (3 layers x 1 KV heads, 4 query heads of 8), "
            f"but {loaded.id} (2 layers x 2 KV heads, 4 query heads of 8) is of another shape.\n"
        )


def test_no_prompt_at_a_terminal_is_refused(
    run: Run, write_policy: WritePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    code, out, err = run("--policy", write_policy())
    assert (code, out) == (2, "")
    assert err == "error: there is no prompt: give --prompt TEXT or --prompt-file FILE, or pipe the text in.\n"


def test_chat_without_a_template_is_refused(run: Run, write_policy: WritePolicy, byte_model: Path) -> None:
    template = byte_model / "chat_template.jinja"
    text = template.read_text()
    template.unlink()
    try:
        code, out, err = run("--policy", write_policy(), "--prompt", TEXT, "--chat")
    finally:
        template.write_text(text)
    assert (code, out) == (2, "")
    assert err == f"error: the tokenizer of {byte_model} has no chat template: leave out --chat.\n"


def test_it_runs_as_a_module_in_a_pipe(run: Run, write_policy: WritePolicy) -> None:
    path = write_policy()
    command = [sys.executable, "-m", "recycler.generate", "--policy", str(path), "--max-new-tokens", "5"]
    done = subprocess.run(command, input=TEXT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    _, out, _ = run("--policy", path, "--prompt", TEXT, "--max-new-tokens", "5")
    assert untimed(done.stdout) == untimed(out)


def test_explain_says_what_would_run_and_generates_nothing(run: Run, write_policy: WritePolicy) -> None:
    code, out, error = run("--policy", write_policy(), "--prompt", TEXT, "--max-new-tokens", "20", "--explain")
    assert code == 0, error
    found = result(out)
    assert (found["engine"], found["why_plain"]) == ("cpu", None)
    assert found["context_tokens"] == len(TEXT) + 20
    # A limit of age around a budget limits nothing.
    assert found["full_share"] == 1
    assert "decode steps run on engine cpu" in out
    assert run("--policy", write_policy(FixedStride(4)), "--prompt", TEXT, "--explain")[1].count("25.0%") == 1
