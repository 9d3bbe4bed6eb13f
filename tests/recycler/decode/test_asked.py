"""What `recycled` takes: models and what is around them, policies and files; and what it says of nothing done."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, pipeline

from policies import CosineThreshold, FixedStride, PolicyFile, Selection
from recycler import load_model, recycled
from recycler.decode.asked import model_of
from recycler.decode.explain import explain
from recycler.decode.session_sentences import NOT_CALLED, NOTHING_RECYCLED
from recycler.model.shape import model_shape
from recycler.model.weights_digest import weights_sample

SELECTION = Selection(12, sinks=2, window=4)


@pytest.fixture
def model(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def file(model: PreTrainedModel) -> PolicyFile:
    shape = model_shape(model, "tiny")
    return PolicyFile(FixedStride(4), SELECTION, shape, provenance={}, horizon_steps=7)


def decode(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False)


def test_a_file_applies_itself(model: PreTrainedModel, file: PolicyFile, make_tokens: Callable[..., Tensor]) -> None:
    tokens = make_tokens(30)
    with recycled(model, file, fast=False) as session:
        expected = decode(model, tokens)
    with file.apply(model, fast=False) as applied:
        assert torch.equal(decode(model, tokens), expected)
    assert applied.receipt().to_json() == session.receipt().to_json()


def test_a_file_its_path_and_its_parts_are_one_policy(
    model: PreTrainedModel, file: PolicyFile, make_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    file.write(tmp_path / "policy.json")
    tokens, receipts = make_tokens(30), []
    written = []
    for policy, selection in (
        (file, None),
        (tmp_path / "policy.json", None),
        (str(tmp_path / "policy.json"), None),
        (file.policy, SELECTION),
    ):
        with recycled(model, policy, selection) as session:
            written.append(decode(model, tokens).tolist())
        receipts.append(session.receipt())
    assert written[1:] == written[:-1]
    assert [receipt.horizon_steps for receipt in receipts] == [7, 7, 7, None]
    assert {int(receipt.full_steps.sum()) for receipt in receipts} == {int(receipts[0].full_steps.sum())}
    assert receipts[0].full_steps.sum() > 0


def test_a_selection_beside_a_file_is_taken_instead_of_the_files(
    model: PreTrainedModel, file: PolicyFile, make_tokens: Callable[..., Tensor]
) -> None:
    read = []
    for k in (12, 20):
        with recycled(model, file, Selection(k, sinks=2, window=4)) as session:
            decode(model, make_tokens(40))
        read.append(session.receipt().read_share)
    assert read[0] < read[1]


def test_a_pipeline_and_a_loaded_model_are_the_model_inside(byte_model: Path) -> None:
    loaded = load_model(str(byte_model), device="cpu")
    writer = pipeline("text-generation", model=loaded.model, tokenizer=AutoTokenizer.from_pretrained(byte_model))
    assert model_of(writer) is model_of(loaded) is loaded.model
    with recycled(writer, FixedStride(4), SELECTION) as session:
        writer("a set keeps what it chose, " * 3, max_new_tokens=8, do_sample=False)
    assert session.receipt().n_steps == 7


class Wrapper(nn.Module):
    """As of another library: what is not its own is the model's."""

    def __init__(self, inside: PreTrainedModel) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)


@pytest.mark.parametrize(
    ("wrapped", "message"),
    [
        (Wrapper, "not the wrapper Wrapper around one: give it the model inside"),
        (lambda _: "HuggingFaceTB/SmolLM2-135M", "takes a transformers model or a pipeline, not str"),
    ],
)
def test_what_is_no_model_is_refused_before_anything_runs(
    model: PreTrainedModel, wrapped: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message), recycled(wrapped(model), FixedStride(4), SELECTION):
        pass


def test_a_bare_policy_needs_a_selection(model: PreTrainedModel) -> None:
    with (
        pytest.raises(ValueError, match=r"'fixed_stride' says nothing of how sets are chosen: give a selection"),
        recycled(model, FixedStride(4)),
    ):
        pass


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (4, "must be a StepPolicy, a PolicyFile or the path of one, not int"),
        (CosineThreshold([[0.5]]), "is for 1 layers x 1 KV heads, but"),
        ("no/such/policy.json", r"cannot read the policy no/such/policy\.json: No such file"),
    ],
)
def test_what_is_no_policy_for_the_model_is_refused(model: PreTrainedModel, policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), recycled(model, policy, SELECTION):
        pass


def test_a_file_of_another_model_is_refused(make_model: Callable[..., PreTrainedModel], file: PolicyFile) -> None:
    other = make_model("llama", kv_heads=4)
    with pytest.raises(ValueError, match="is of another shape"), recycled(other, file):
        pass


def tuned_on(model: PreTrainedModel, other: PreTrainedModel) -> PolicyFile:
    """A file for a model's shape, tuned on the weights of another."""
    return PolicyFile(
        FixedStride(4), SELECTION, model_shape(model, "tiny"), provenance={"weights": weights_sample(other)}
    )


def test_a_file_that_was_tuned_on_other_weights_is_applied_and_says_so_once(
    make_model: Callable[..., PreTrainedModel], model: PreTrainedModel, make_tokens: Callable[..., Tensor]
) -> None:
    # Equal in all but one number of half a million.
    other = copy.deepcopy(model)
    other.lm_head.weight.data[0, 0] += 1
    with (
        pytest.warns(UserWarning, match="tuned on other weights than those of") as caught,
        recycled(model, tuned_on(model, other)) as session,
    ):
        decode(model, make_tokens(30, rows=2))
    assert len(caught) == 1
    receipt = session.receipt()
    assert (receipt.n_steps, receipt.full_share) == (11, 2 / 11)
    assert receipt.notes == (str(caught[0].message),)
    assert receipt.to_json()["notes"] == [str(caught[0].message)]
    out = io.StringIO()
    receipt.print(Console(file=out, width=300))
    assert str(caught[0].message) in out.getvalue()
    assert explain(model, tuned_on(model, other), context_tokens=9).notes == receipt.notes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_weights_and_those_in_another_precision_are_no_other_weights(
    model: PreTrainedModel, dtype: torch.dtype
) -> None:
    cast = copy.deepcopy(model).to(dtype)
    assert explain(cast, tuned_on(model, model), context_tokens=9).notes == ()
    assert explain(model, tuned_on(model, cast), context_tokens=9).notes == ()


def test_a_file_that_does_not_know_its_weights_says_nothing_of_them(model: PreTrainedModel, file: PolicyFile) -> None:
    assert explain(model, file, context_tokens=9).notes == ()
    assert file.note_on_weights("bfloat16:0", "tiny") == ""


def test_a_file_says_of_weights_that_cannot_be_read_that_only_the_shape_was_compared(model: PreTrainedModel) -> None:
    packed = weights_sample(copy.deepcopy(model).to("meta"))
    assert packed is None
    assert (
        tuned_on(model, model).note_on_weights(packed, "tiny").startswith("the weights of tiny are packed, and could")
    )


def test_a_with_in_which_the_model_was_not_called_says_so(
    model: PreTrainedModel, make_tokens: Callable[..., Tensor]
) -> None:
    began, left = threading.Event(), threading.Event()

    def later() -> None:
        began.set()
        left.wait()
        decode(model, make_tokens(20))

    thread = threading.Thread(target=later)

    def request() -> None:
        # As a web server does: the thread of a streamer outlives the `with`.
        with recycled(model, FixedStride(4), SELECTION):
            thread.start()
            began.wait()

    with pytest.warns(UserWarning, match="the model was not called there") as caught:
        request()
    left.set()
    thread.join()
    assert str(caught[0].message) == NOT_CALLED


@pytest.mark.parametrize(
    "call",
    [
        lambda model, tokens: model.generate(tokens, max_new_tokens=4, use_cache=False),
        lambda model, tokens: model(tokens),
    ],
    ids=["use_cache=False", "scoring"],
)
def test_a_with_in_which_nothing_was_recycled_says_so(
    model: PreTrainedModel, make_tokens: Callable[..., Tensor], call: Callable[..., Any]
) -> None:
    with (
        pytest.warns(UserWarning, match="every forward brought several tokens") as caught,
        recycled(model, FixedStride(4), SELECTION),
        torch.inference_mode(),
    ):
        call(model, make_tokens(20))
    assert str(caught[0].message) == NOTHING_RECYCLED


def test_one_token_needs_no_step_and_no_warning(model: PreTrainedModel, make_tokens: Callable[..., Tensor]) -> None:
    with warnings.catch_warnings(), recycled(model, FixedStride(4), SELECTION) as session:
        warnings.simplefilter("error")
        model.generate(make_tokens(20), max_new_tokens=1)
    assert session.receipt().n_steps == 0
