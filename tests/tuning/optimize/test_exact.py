"""`python -m tuning.exact`: from a policy file to one with a rule that ends rounds."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from policies import PolicyFile
from recycler import load_model, recycled
from traces.reporting.command import run_command
from tuning.exact import main

Run = Any


def tune(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        run_command(main, list(map(str, arguments)))
    return int(ended.value.code or 0), out.getvalue(), err.getvalue()


def test_the_file_drafts_by_its_rule_and_its_text_is_full_attentions(
    first: Run, out: Path, model: Path, tmp_path: Path
) -> None:
    written = tmp_path / "exact.json"
    asked = ("--policy", out / "policy.json", "--model", model, "--out", written, "--tokens", 24, "--most-drafts", 5)
    code, told, err = tune(*asked, "--context-tokens", 160, "--costs", "5.2,9.5,0.2,11")
    assert code == 0, err
    result = json.loads(told.splitlines()[-1])
    assert result["costs"] == {"draft_ms": 5.2, "verify_ms": 9.5, "token_ms": 0.2, "full_ms": 11}
    assert result["measured"]["n_equal"] == result["measured"]["n_texts"] == 6
    assert (tmp_path / "exact.png").stat().st_size > 0
    file = PolicyFile.read(written)
    assert file.stop is not None
    assert file.provenance["exact"]["stop"]["kind"] == file.stop.kind

    loaded = load_model(str(model), device="cpu")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(1, 200, (1, 100)))
    texts = []
    for exact in (True, file.stop):
        with recycled(loaded, written, exact=exact) as session:
            texts.append(loaded.model.generate(tokens, max_new_tokens=12, do_sample=False))
        rounds = session.receipt().rounds
        assert rounds is not None
        assert rounds.n_drafts <= file.stop.most_drafts * rounds.n_rounds
    stock = loaded.model.generate(tokens, max_new_tokens=12, do_sample=False)
    assert all(torch.equal(text, stock) for text in texts)


def test_a_rule_for_drawn_texts_is_learned_on_texts_that_are_drawn(
    first: Run, out: Path, model: Path, tmp_path: Path
) -> None:
    asked = ("--policy", out / "policy.json", "--model", model, "--tokens", 24, "--most-drafts", 5)
    results = []
    for temperature in (0, 3.0):
        written = tmp_path / f"{temperature}.json"
        how = ("--context-tokens", 160, "--costs", "5.2,9.5,0.2,11", "--temperature", temperature, "--out", written)
        code, told, err = tune(*asked, *how)
        assert code == 0, err
        results.append(json.loads(told.splitlines()[-1]))
        assert PolicyFile.read(written).provenance["exact"]["temperature"] == temperature
    greedy, drawn = results
    # Drawn with one seed, a text is full attention's too; but fewer drafts are what is drawn.
    assert drawn["measured"]["n_equal"] == 6
    assert drawn["predicted"]["tokens_per_round"] < greedy["predicted"]["tokens_per_round"]


@pytest.mark.parametrize("costs", ["5", "5,6,7", "5,6,x,9", "1,2,-3,4", "0,0,0,1"])
def test_costs_that_cannot_be_are_one_sentence(costs: str) -> None:
    code, _, err = tune("--costs", costs)
    assert code != 0
    assert "milliseconds of a draft" in err
    assert "Traceback" not in err


def test_optimize_goes_on_to_exact_decoding(
    first: Run, copied: Path, model: Path, sizes: tuple[str, ...], optimize: Callable[..., Run]
) -> None:
    run = optimize("--model", model, "--out", copied, "--budget", "0.2", *sizes, "--exact", "--costs", "5,9,0.2,11")
    assert run.code == 0, run.err
    assert PolicyFile.read(copied / "exact.json").stop is not None
    assert PolicyFile.read(copied / "policy.json").stop is None
    assert run.result["exact"]["measured"]["n_texts"] == 6


def test_costs_without_exact_decoding_are_refused(optimize: Callable[..., Run]) -> None:
    run = optimize("--costs", "5,9,0.2,11")
    assert run.code != 0
    assert "there is no --exact" in run.err
