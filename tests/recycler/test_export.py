"""A model folder with a policy, and a callable: transformers' own ways to bring a `generate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

from policies import FixedStride, ModelShape, PolicyFile, Selection
from recycler import custom_generate, recycled
from recycler.export import main
from recycler.model.loading import load_model
from recycler.model.shape import model_shape
from traces.reporting.command import run_command

SELECTION = Selection(16, sinks=2, window=4)
TEXT = "It was a dark and stormy night; the rain fell in torrents."


@pytest.fixture(scope="module")
def policy(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = model_shape(load_model(str(byte_model), device="cpu").model, str(byte_model))
    path = tmp_path_factory.mktemp("export") / "policy.json"
    PolicyFile(FixedStride(5), SELECTION, shape, horizon_steps=40).write(path)
    return path


@pytest.fixture(autouse=True)
def _modules_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of folders is copied to where transformers keeps such code; not into the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            run_command(main, [*map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


def written(model: PreTrainedModel, **how: Any) -> list[int]:
    inputs = AutoTokenizer.from_pretrained(model.name_or_path)(TEXT, return_tensors="pt")
    found: list[int] = model.generate(**inputs, max_new_tokens=20, do_sample=False, **how)[0].tolist()
    return found


@pytest.mark.parametrize("weights", ["link", "copy"])
def test_a_folder_recycles_with_no_further_import(
    run: Any, byte_model: Path, policy: Path, tmp_path: Path, weights: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "deep" / "folder"
    code, text, error = run("--policy", policy, "--out", out, "--weights", weights)
    assert code == 0, error
    assert json.loads(text.splitlines()[-1]) == {
        "folder": str(out),
        "model": str(byte_model),
        "policy": str(policy),
        "weights": weights,
    }
    assert (out / "model.safetensors").is_symlink() == (weights == "link")
    assert [path.name for path in out.parent.iterdir()] == ["folder"]
    plain = AutoModelForCausalLM.from_pretrained(byte_model)
    with recycled(plain, policy) as session:
        expected = written(plain)
    assert session.receipt().n_steps == 19
    stock = written(plain)
    assert expected != stock
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    with caplog.at_level(logging.INFO, "recycler"):
        assert written(model) == expected
    assert "'n_steps': 19" in caplog.text
    # Who does not trust code has the model as it was.
    assert written(AutoModelForCausalLM.from_pretrained(out)) == stock
    # A `with` around it counts.
    with recycled(model, FixedStride(1), SELECTION):
        assert written(model) == stock


def test_a_pipeline_of_the_folder_recycles(run: Any, policy: Path, tmp_path: Path) -> None:
    assert run("--policy", policy, "--out", tmp_path / "folder")[0] == 0
    writer = pipeline("text-generation", model=str(tmp_path / "folder"), trust_remote_code=True, device="cpu")
    stock = pipeline("text-generation", model=str(tmp_path / "folder"), device="cpu")
    with recycled(stock, policy):
        expected = stock(TEXT, max_new_tokens=20, do_sample=False)
    assert writer(TEXT, max_new_tokens=20, do_sample=False) == expected
    assert expected != stock(TEXT, max_new_tokens=20, do_sample=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "taken"}, "is there already: choose another --out"),
        ({"policy": "none.json"}, "cannot read the policy"),
        ({"model": "no/such-model"}, "is neither a local folder nor a Hugging Face id within reach"),
        ({"policy": "other.json"}, "is of another shape"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence_and_leaves_nothing(
    run: Any,
    policy: Path,
    byte_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "taken").mkdir()
    other = ModelShape(str(byte_model), layers=3, kv_heads=2, query_heads=4, head_dim=8)
    PolicyFile(FixedStride(5), SELECTION, other).write(tmp_path / "other.json")
    given = {"policy": policy, "out": tmp_path / "new"} | {
        name: value if name == "model" else tmp_path / value for name, value in change.items()
    }
    before = sorted(tmp_path.rglob("*"))
    code, out, error = run(*(part for name, value in given.items() for part in (f"--{name}", value)))
    assert (code, out) == (2, "")
    assert message in error
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_continuous_batching_of_the_folder_is_refused(run: Any, policy: Path, tmp_path: Path) -> None:
    assert run("--policy", policy, "--out", tmp_path / "folder")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    # Before the first call of generate, and after it.
    for _ in range(2):
        with pytest.raises(ValueError, match=r"continuous batching .* recycled attention does not cover"):
            model.generate_batch([[7, 9, 11]], max_new_tokens=4)
        written(model)
    # Of a model without the folder's policy it is not.
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert stock.init_continuous_batching().model is stock


def test_a_folder_whose_policy_is_gone_says_so(run: Any, policy: Path, tmp_path: Path) -> None:
    assert run("--policy", policy, "--out", tmp_path / "folder")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    (tmp_path / "folder" / "policy.json").unlink()
    with pytest.raises(ValueError, match=r"holds no policy\.json: write it with python -m recycler\.export"):
        written(model)


def test_a_callable_recycles_one_call(byte_model: Path, policy: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    stock = written(model)
    with recycled(model, policy):
        expected = written(model)
    assert written(model, custom_generate=custom_generate, policy=policy) == expected
    bare = {"policy": FixedStride(5), "selection": SELECTION, "fast": False}
    assert written(model, custom_generate=custom_generate, **bare) == expected
    assert written(model) == stock
    torch.manual_seed(3)
    inputs = torch.tensor([[7, 9, 11, 13] * 8])
    drawn = model.generate(inputs, do_sample=True, max_new_tokens=8, custom_generate=custom_generate, policy=policy)
    assert drawn.shape == (1, 40)


@pytest.mark.parametrize(
    ("how", "message"), [({}, "give policy="), ({"num_beams": 2, "policy": FixedStride(5)}, "beam search cannot run")]
)
def test_a_callable_refuses_what_it_cannot_do(byte_model: Path, how: dict[str, Any], message: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(byte_model)
    with pytest.raises(ValueError, match=message):
        written(model, custom_generate=custom_generate, **how)
