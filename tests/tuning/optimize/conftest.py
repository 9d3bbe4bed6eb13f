"""A tiny model in a folder, and one run of the whole command that all tests look at or start from."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policies import PolicyFile
from recycler.model.loading import load_model
from recycler.prompts import default_prompts
from recycler.record.folder import record_prompts
from traces.reporting.command import run_command
from tuning.optimize import main

SIZES = ("--per-kind", "2", "--context-tokens", "160", "--steps", "12", "--k", "48", "--trials", "2")


@dataclass(frozen=True)
class Run:
    """How a command line ended.

    Attributes:
        code: Exit code.
        out: Standard output.
        err: Standard error.
    """

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The last line of standard output, which must be JSON in the strict sense."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        values: dict[str, Any] = json.loads(self.out.splitlines()[-1], parse_constant=refuse)
        return values

    @property
    def found(self) -> dict[str, Any]:
        """The result without paths and seconds."""
        passed_over = {"seconds", "stages_s", "policy", "traces", "report"}
        return {name: self.result[name] for name in self.result.keys() - passed_over}


def _optimize(*arguments: object) -> Run:
    out, err = io.StringIO(), io.StringIO()
    threads, verbosity = torch.get_num_threads(), optuna.logging.get_verbosity()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_:
            run_command(main, list(map(str, arguments)))
    finally:
        torch.set_num_threads(threads)
        optuna.logging.set_verbosity(verbosity)
    return Run(int(exit_.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def optimize() -> Callable[..., Run]:
    """Runs the command with arguments."""
    return _optimize


@pytest.fixture(scope="session")
def sizes() -> tuple[str, ...]:
    """Arguments that make a run small: 6 kinds of 2 prompts of 160 tokens and 12 steps, k 48, 2 trials."""
    return SIZES


def _make_model_folder(folder: Path, *, layers: int = 2, kv_heads: int = 2, hidden_size: int = 32) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=320,
        # Large enough for attention with peaks.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_model_folder() -> Callable[..., Path]:
    """Saves a random model of 320 positions with one token per byte into a folder."""
    return _make_model_folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model of 2 layers x 2 KV heads."""
    return _make_model_folder(tmp_path_factory.mktemp("optimize") / "tiny")


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of `first`, to be looked at only."""
    return tmp_path_factory.mktemp("optimize") / "results"


@pytest.fixture(scope="session")
def first(model: Path, out: Path) -> Run:
    """An uninterrupted run into `out` with a budget of 0.2."""
    return _optimize("--model", model, "--out", out, "--budget", "0.2", *SIZES)


@pytest.fixture(scope="session")
def recorded(first: Run, out: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of traces of all prompts of that run, those that it held out too, with its sets."""
    loaded, folder = load_model(str(model), device="cpu"), tmp_path_factory.mktemp("optimize") / "recorded"
    prompts = default_prompts(loaded.tokenizer, n_per_kind=2, context_tokens=160, n_steps=12)
    record_prompts(loaded, prompts, PolicyFile.read(out / "policy.json").selection, folder, max_age=12)
    return folder


@pytest.fixture
def copied(first: Run, out: Path, tmp_path: Path) -> Path:
    """A copy of what that run left behind."""
    return Path(shutil.copytree(out, tmp_path / "results"))
