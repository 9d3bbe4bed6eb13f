from __future__ import annotations

import json
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recycler.model.loading import load_model
from recycler.record.__main__ import main
from traces import TraceFile, TraceFolder
from traces.reporting.command import run_command

Run = Callable[..., tuple[int, str, str]]

KINDS = ("--kinds", "technical,code", "--per-kind", "1", "--context-tokens", "130", "--steps", "5", "--k", "40")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of 320 positions with one token per byte."""
    folder = tmp_path_factory.mktemp("record") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=320,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], model_folder: str) -> Run:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run_command(main, ["--model", model_folder, *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file, letters in zip(files, (string.ascii_letters, string.digits * 6), strict=True):
        file.write_text(letters, encoding="utf-8")
    return files


def result(out: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(out.splitlines()[-1])
    return values


def test_default_prompts_of_the_kinds_asked_for_are_recorded(run: Run, tmp_path: Path, model_folder: str) -> None:
    code, out, err = run("--out", tmp_path / "traces", *KINDS)
    assert code == 0
    assert len(out.splitlines()) == 1
    values = result(out)
    assert values.pop("seconds") > 0
    assert values.pop("tokens_per_s") > 0
    assert values == {
        "traces": str(tmp_path / "traces"),
        "recorded": 2,
        "skipped": 0,
        "steps": 5,
        "max_age": 5,
        "k": 40,
    }
    assert "recording" in err
    folder = TraceFolder(tmp_path / "traces")
    assert [file.path.stem for file in folder] == ["code-000", "technical-000"]
    header = folder[0].header
    assert (header.n_steps, header.max_age, header.prompt["n_prompt_tokens"]) == (5, 5, 130)
    assert (header.model["id"], header.model["dtype"]) == (model_folder, "float32")
    assert dict(header.selection) == {
        "k": 40,
        "sinks": 4,
        "window": 32,
        "pool_backward": 0,
        "pool_forward": 0,
        "group": "max",
        "ranking": "decayed",
        "prompt_queries": 32,
        "unit_k": None,
        "score_decay": 0.8,
    }


def test_every_option_reaches_the_trace(run: Run, tmp_path: Path) -> None:
    options = ["--max-age", "3", "--dtype", "float64", "--device", "cpu", "--seed", "3", "--memory-mib", "64"]
    options += ["--sinks", "1", "--window", "8", "--pool-backward", "2", "--pool-forward", "1"]
    options += ["--group", "mean", "--ranking", "updated", "--prompt-queries", "3"]
    options += ["--score-decay", "0.25"]
    options += ["--kinds", "copying", "--kinds", "prose"]
    code, out, _ = run("--out", tmp_path, "--context-tokens", "140", "--steps", "4", "--per-kind", "2", *options)
    assert code == 0
    assert result(out)["recorded"] == 4
    header = TraceFile(tmp_path / "copying-001.safetensors").header
    assert (header.n_steps, header.max_age, header.model["dtype"]) == (4, 3, "float64")
    assert dict(header.selection) == {
        "k": 128,
        "sinks": 1,
        "window": 8,
        "pool_backward": 2,
        "pool_forward": 1,
        "group": "mean",
        "ranking": "updated",
        "prompt_queries": 3,
        "unit_k": None,
        "score_decay": 0.25,
    }


def test_what_is_recorded_is_skipped(run: Run, tmp_path: Path) -> None:
    run("--out", tmp_path, *KINDS)
    (tmp_path / "code-000.safetensors").unlink()
    (tmp_path / "code-000.safetensors.partial").write_bytes(b"half")
    kept = (tmp_path / "technical-000.safetensors").read_bytes()

    code, out, _ = run("--out", tmp_path, *KINDS)
    assert (code, result(out)["recorded"], result(out)["skipped"]) == (0, 1, 1)
    assert (tmp_path / "technical-000.safetensors").read_bytes() == kept
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["code-000.safetensors", "technical-000.safetensors"]

    code, out, err = run("--out", tmp_path, *KINDS)
    assert (code, result(out)["recorded"], result(out)["skipped"], err) == (0, 0, 2, "")
    assert result(out)["tokens_per_s"] is None


def test_more_prompts_join_those_recorded(run: Run, tmp_path: Path) -> None:
    run("--out", tmp_path, *KINDS)
    _, out, _ = run("--out", tmp_path, *KINDS, "--per-kind", "2")
    assert (result(out)["recorded"], result(out)["skipped"]) == (2, 2)


@pytest.mark.parametrize("option", ["--prompts", "positional"])
def test_own_texts_are_recorded_with_their_end_as_the_continuation(
    run: Run, tmp_path: Path, texts: list[Path], option: str
) -> None:
    files = texts if option == "positional" else ["--prompts", *texts]
    code, out, _ = run("--out", tmp_path, "--steps", "7", "--k", "40", *files)
    assert (code, result(out)["recorded"]) == (0, 2)
    one, two = (TraceFile(tmp_path / f"user-00{i}.safetensors").load() for i in range(2))
    assert (one.header.prompt["n_prompt_tokens"], one.header.n_steps) == (52 - 7, 7)
    assert (two.header.prompt["n_prompt_tokens"], two.header.n_steps) == (60 - 7, 7)
    assert one.header.prompt["source"] == str(texts[0])


def test_a_text_without_continuation_is_continued_by_the_model(
    run: Run, tmp_path: Path, texts: list[Path], model_folder: str
) -> None:
    code, _, err = run("--out", tmp_path, "--steps", "7", "--k", "40", "--write-continuation", "--prompts", texts[0])
    assert code == 0
    assert "continuing" in err
    trace = TraceFile(tmp_path / "user-000.safetensors").load()
    assert (trace.header.prompt["n_prompt_tokens"], trace.header.n_steps) == (52, 7)
    assert trace.header.prompt["source"] == f"{texts[0]}, continued by {model_folder}"

    loaded = load_model(model_folder, device="cpu")
    assert loaded.tokenizer.decode(trace.tokens[:52].tolist()) == string.ascii_letters
    tokens = torch.tensor(trace.tokens.astype(np.int64))[None]
    predicted = loaded.model(tokens).logits[0, 51:-1].argmax(-1)
    np.testing.assert_array_equal(predicted, trace.tokens[52:])


def test_an_interrupt_keeps_what_is_whole(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, n_seen = LlamaForCausalLM.forward, 0

    def interrupted(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        nonlocal n_seen
        n_seen += 1
        if n_seen == 4:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(LlamaForCausalLM, "forward", interrupted)
        code, out, err = run("--out", tmp_path, *KINDS)
    assert (code, out, err.splitlines()[-1]) == (130, "", "interrupted")
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["technical-000.safetensors"]
    _, out, _ = run("--out", tmp_path, *KINDS)
    assert (result(out)["recorded"], result(out)["skipped"]) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--k", "20"], "k must hold the sinks and the window"),
        (["--sinks", "-1"], "sinks must be a whole number"),
        (["--kinds", "poems"], "'poems' is unknown"),
        (["--kinds", "code,code"], "each once"),
        (["--context-tokens", "20"], "context_tokens must be at least 128"),
        (["--context-tokens", "400"], "320 positions"),
        (["--steps", "0"], "--steps"),
        (["--max-age", "0"], "--max-age"),
        (["--group", "median"], "--group"),
        (["--dtype", "int3"], "dtype 'int3' is not supported"),
        (["--device", "abacus"], "device 'abacus' is not usable"),
        (["--memory-mib", "1", "--steps", "100"], "raise --memory-mib"),
        (["--write-continuation"], "name them with --prompts"),
        (["--prompts", "none.txt"], "none.txt cannot be read"),
        (["--prompts", "{file}", "--kinds", "code"], "leave it out"),
        (["--prompts", "{file}", "--steps", "30"], "52 tokens, and 30 steps need a text of at least 62"),
        (["--prompts", "{file}", "--write-continuation", "--steps", "300"], "320 positions"),
        (["--out", "{file}"], "cannot write traces to"),
        (["--frobnicate"], "--frobnicate"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    run: Run, tmp_path: Path, texts: list[Path], arguments: list[str], sentence: str
) -> None:
    given = [argument.format(file=texts[0]) for argument in arguments]
    defaults = [] if "--prompts" in given else ["--per-kind", "1", "--context-tokens", "200", "--kinds", "code"]
    if "--kinds" in given:
        defaults = []
    code, out, err = run("--out", tmp_path / "traces", *defaults, *given)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert sentence in err
    assert not (tmp_path / "traces").exists()


def test_a_folder_of_other_settings_is_one_sentence_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    run("--out", tmp_path, *KINDS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = run("--out", tmp_path, *KINDS, "--window", "20")
    assert (code, out) == (2, "")
    assert err == (
        f"error: {tmp_path}/code-000.safetensors was recorded with window 32 instead of 20: "
        "record into another folder, or remove the trace.\n"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_it_runs_as_a_module(model_folder: str, tmp_path: Path, texts: list[Path]) -> None:
    command = [sys.executable, "-m", "recycler.record", "--model", model_folder, "--out", "traces", "--steps", "3"]
    done = subprocess.run(
        [*command, "--k", "40", "--prompts", *map(str, texts)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recorded"] == 2
    assert len(TraceFolder(tmp_path / "traces")) == 2
