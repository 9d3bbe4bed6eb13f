"""What is measured of a method, against stock `generate`, the closed loop, and forwards of the whole text."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import FixedStride, NeverFull, RefreshKeys, Selection
from recycler.decode.recycled import recycled
from recycler.evaluate import Method, Outcome, Scheduled
from recycler.evaluate.answers import measure
from recycler.evaluate.baselines import fresh_top_k
from recycler.measure.closed_loop import run_closed_loop
from recycler.model.loading import LoadedModel
from recycler.tasks import TaskPrompt

FAST = pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])


def written(model: PreTrainedModel, task: TaskPrompt) -> list[int]:
    """What stock `generate` writes, without the token that ends it."""
    prompt = torch.as_tensor(task.prompt.tokens[: task.prompt.n_prompt_tokens].astype(np.int64))[None]
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=task.n_new_tokens, do_sample=False
    )
    own: list[int] = tokens[0, prompt.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    return [token for token in own if token not in (ends if isinstance(ends, list) else [ends])]


def text_of(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def ending(loaded: LoadedModel, ends: int | list[int] | None) -> LoadedModel:
    """The model with other tokens at which it stops."""
    model = copy.copy(loaded.model)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.eos_token_id = ends
    return dataclasses.replace(loaded, model=model)


def equal(one: Outcome, other: Outcome, tolerance: float = 0) -> None:
    for field in dataclasses.fields(Outcome):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, str) or mine is None:
            assert mine == theirs, field.name
        else:
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance, err_msg=field.name)


@FAST
@pytest.mark.parametrize("n_new", [1, 2, 14, 60])
def test_full_attentions_answer_is_that_of_stock_generate(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], n_new: int, fast: bool
) -> None:
    for seed in range(3):
        task = make_task(seed, n_new=n_new)
        own = written(loaded.model, task)
        assert len(own) == n_new
        full = measure(loaded, task, [], fast=fast).methods["full"]
        assert full.answer == text_of(own)
        assert full.score == task.score(text_of(own))


@FAST
@pytest.mark.parametrize("several", [False, True], ids=["one end", "two ends"])
@pytest.mark.parametrize("place", [0, 1, 5, 13])
def test_an_answer_stops_where_stock_generate_stops(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], place: int, several: bool, fast: bool
) -> None:
    task = make_task(1)
    own = written(loaded.model, task)
    end = own[place]
    unused = next(token for token in range(61) if token not in own)
    stops = ending(loaded, [unused, end] if several else end)
    expected = written(stops.model, task)
    assert expected == own[: own.index(end)]
    outcome = measure(stops, task, [Scheduled("stride", "", FixedStride(3), Selection(12, 2, 4))], fast=fast)
    assert outcome.methods["full"].answer == text_of(expected)


@FAST
def test_every_method_writes_what_it_writes_alone(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method], fast: bool
) -> None:
    task = make_task(2)
    n_prompt = task.prompt.n_prompt_tokens
    prompt = torch.as_tensor(task.prompt.tokens[:n_prompt].astype(np.int64))[None]
    outcome = measure(loaded, task, methods, fast=fast)
    answers = {name: one.answer for name, one in outcome.methods.items()}
    assert len(set(answers.values())) > 2
    for method in methods:
        if isinstance(method, Scheduled):
            with recycled(loaded.model, method.policy, method.selection, fast=fast):
                own = loaded.model.generate(prompt, max_new_tokens=task.n_new_tokens, do_sample=False)
            assert answers[method.name] == text_of(own[0, n_prompt:].tolist()), method.name
    assert answers["whole"] == answers["full"]


@FAST
def test_a_row_that_has_ended_goes_on_for_the_others_without_a_trace(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], fast: bool
) -> None:
    window = Selection(12, sinks=2, window=4)
    rows: list[Method] = [Scheduled("never", "", NeverFull(), window), Scheduled("stride", "", FixedStride(3), window)]
    task = make_task(2)
    answers = {name: one.answer for name, one in measure(loaded, task, rows, fast=fast).methods.items()}
    # A token that one of them writes early and the other late or never.
    words = {name: str(answers[name]).split() for name in ("never", "stride")}

    def length(name: str, end: str) -> int:
        return words[name].index(end) if end in words[name] else len(words[name])

    end = max(
        set(words["never"] + words["stride"]), key=lambda word: abs(length("never", word) - length("stride", word))
    )
    assert abs(length("never", end) - length("stride", end)) >= 3
    stops = ending(loaded, int(end))
    together = measure(stops, task, rows, fast=fast)
    for method in rows:
        found = together.methods[method.name]
        assert found.answer == " ".join(words[method.name][: length(method.name, end)])
        equal(found, measure(stops, task, [method], fast=fast).methods[method.name], 1e-10)


@FAST
def test_what_is_always_full_is_full_attention(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method], fast: bool
) -> None:
    outcomes = measure(loaded, make_task(), methods, fast=fast).methods
    for name in ("full", "whole"):
        found = outcomes[name]
        assert found.kl.max() < 1e-12
        assert found.agreement.all()
        assert np.abs(found.nll_change).max() < 1e-12
        shares = (found.full_share, found.read_share, found.answer_full_share, found.answer_read_share)
        assert shares == (1, 1, 1, 1)
    assert all(outcomes[name].kl.max() > 1e-3 for name in outcomes if name not in ("full", "whole"))


@FAST
def test_teacher_forced_numbers_of_schedules_are_those_of_the_closed_loop(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method], fast: bool
) -> None:
    task = make_task()
    outcomes = measure(loaded, task, methods, fast=fast).methods
    for method in methods:
        if isinstance(method, Scheduled):
            loop = run_closed_loop(
                loaded.model,
                task.prompt.tokens,
                task.prompt.n_prompt_tokens,
                [method.policy],
                method.selection,
                fast=fast,
            )
            found = outcomes[method.name]
            np.testing.assert_allclose(found.kl, loop.kl[0], rtol=0, atol=1e-10)
            np.testing.assert_array_equal(found.agreement, loop.agreement[0])
            assert found.full_share == pytest.approx(loop.full_share[0])


def log_p_of(model: PreTrainedModel, task: TaskPrompt, method: Method | None) -> Tensor:
    """Log-probabilities `(steps, vocabulary)` along the reference; of full attention for None."""
    n_prompt = task.prompt.n_prompt_tokens
    text = torch.as_tensor(task.prompt.tokens.astype(np.int64))[None]
    with torch.no_grad():
        if method is None:
            return model(text).logits[0, n_prompt:].log_softmax(-1)
        assert isinstance(method, Scheduled)
        with recycled(model, method.policy, method.selection, fast=False):
            cache = model(text[:, :n_prompt]).past_key_values
            steps = [
                model(text[:, place : place + 1], past_key_values=cache).logits[0, -1]
                for place in range(n_prompt, text.shape[1])
            ]
    return torch.stack(steps).log_softmax(-1)


@FAST
def test_teacher_forced_numbers_are_what_their_names_say(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method], fast: bool
) -> None:
    task = make_task()
    reference = torch.as_tensor(task.prompt.tokens[task.prompt.n_prompt_tokens :].astype(np.int64))
    outcomes = measure(loaded, task, methods, fast=fast).methods
    full = log_p_of(loaded.model, task, None)
    following = reference[1:, None]
    for method in methods:
        if isinstance(method, Scheduled):
            found, log_p = outcomes[method.name], log_p_of(loaded.model, task, method)
            kl = (full.exp() * (full - log_p)).sum(-1)
            np.testing.assert_allclose(found.kl, kl.clamp(min=0), rtol=0, atol=1e-4)
            np.testing.assert_array_equal(found.agreement, log_p.argmax(-1) == full.argmax(-1))
            np.testing.assert_array_equal(found.accuracy, log_p[:-1].argmax(-1) == following[:, 0])
            added = (full - log_p)[:-1].gather(-1, following)[:, 0]
            np.testing.assert_allclose(found.nll_change, added, rtol=0, atol=1e-4)
    assert np.abs(outcomes["never"].nll_change).max() > 1e-2


@FAST
def test_shares_of_schedules_are_counted_by_hand(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], fast: bool
) -> None:
    # Stride 3: full at steps 2, 5, 8 of 10 along the reference, and at 2, 5, 8, 11 of the 13 that write 14 tokens.
    method = Scheduled("stride", "", FixedStride(3), Selection(12, 2, 4))
    found = measure(loaded, make_task(), [method], fast=fast).methods["stride"]
    assert found.full_share == pytest.approx(3 / 10)
    assert found.answer_full_share == pytest.approx(4 / 13)
    for share, n_steps in ((found.read_share, 10), (found.answer_read_share, 13)):
        read = [1 if step % 3 == 2 else 12 / (40 + step + 1) for step in range(n_steps)]
        assert share == pytest.approx(np.mean(read))


@FAST
def test_a_keys_only_refresh_counts_half_in_both_shares(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], fast: bool
) -> None:
    method = Scheduled("keys", "", RefreshKeys(FixedStride(3)), Selection(12, 2, 4))
    found = measure(loaded, make_task(), [method], fast=fast).methods["keys"]
    assert found.full_share == pytest.approx(3 / 10 / 2)
    assert found.answer_full_share == pytest.approx(4 / 13 / 2)
    for share, n_steps in ((found.read_share, 10), (found.answer_read_share, 13)):
        dense = np.arange(41, 41 + n_steps)
        read = np.where(np.arange(n_steps) % 3 == 2, (dense + 12) / 2, 12)
        assert share == pytest.approx(np.mean(read / dense))


def test_a_new_set_at_every_step_is_a_keys_only_refresh_at_every_step(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt]
) -> None:
    found = measure(loaded, make_task(), [fresh_top_k("fresh", "", Selection(12, 2, 4))]).methods["fresh"]
    assert (found.full_share, found.answer_full_share) == (0.5, 0.5)
    # All keys and 12 values.
    reads = [(end + 12) / 2 / end for end in range(41, 51)]
    assert found.read_share == pytest.approx(np.mean(reads))


def test_an_answer_of_one_token_takes_no_step(loaded: LoadedModel, make_task: Callable[..., TaskPrompt]) -> None:
    found = measure(loaded, make_task(n_new=1), []).methods["full"]
    assert (found.answer_full_share, found.answer_read_share) == (0, 0)


def test_a_prompt_that_is_only_teacher_forced_has_no_answer(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method]
) -> None:
    def score(text: str) -> float:
        raise AssertionError("nothing was written")

    outcomes = measure(loaded, make_task(n_new=0, score=score), methods).methods
    for found in outcomes.values():
        assert (found.answer, found.score, found.answer_full_share, found.answer_read_share) == (None,) * 4
        assert found.kl.shape == found.agreement.shape == (10,)
        assert found.nll_change.shape == found.accuracy.shape == (9,)


def test_a_reference_of_one_token_has_no_next_token(loaded: LoadedModel, make_task: Callable[..., TaskPrompt]) -> None:
    found = measure(loaded, make_task(n_reference=1), []).methods["full"]
    assert (found.kl.shape, found.nll_change.shape) == ((1,), (0,))


@FAST
def test_neither_order_nor_company_changes_what_a_method_does(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method], fast: bool
) -> None:
    task = make_task(3)
    outcome = measure(loaded, task, methods, fast=fast)
    assert list(outcome.methods) == ["full", *(method.name for method in methods)]
    assert (outcome.name, outcome.task, outcome.n_prompt_tokens) == ("numbers-000", "numbers", 40)
    backwards = measure(loaded, task, methods[::-1], fast=fast)
    assert list(backwards.methods) == ["full", *(method.name for method in methods[::-1])]
    for name, found in outcome.methods.items():
        equal(found, backwards.methods[name], 1e-10)
    for method in methods:
        equal(outcome.methods[method.name], measure(loaded, task, [method], fast=fast).methods[method.name], 1e-10)


@pytest.mark.parametrize("names", [("one", "one"), ("full",), ("one", "two", "one")], ids=str)
def test_two_methods_of_one_name_are_refused(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], names: tuple[str, ...]
) -> None:
    named: list[Method] = [Scheduled(name, "", NeverFull(), Selection(12, 2, 4)) for name in names]
    with pytest.raises(ValueError, match="methods need names of their own"):
        measure(loaded, make_task(), named)


@pytest.mark.parametrize(("n_new", "n_reference"), [(17, 10), (5, 17)])
def test_a_prompt_without_room_for_the_answer_or_the_reference_is_refused(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], n_new: int, n_reference: int
) -> None:
    with pytest.raises(ValueError, match=r"prompt has 240 tokens and 17 more .* but the model has only 256 positions"):
        measure(loaded, make_task(n_prompt=240, n_new=n_new, n_reference=n_reference), [])


def test_a_method_for_another_model_is_refused(loaded: LoadedModel, make_task: Callable[..., TaskPrompt]) -> None:
    method = Scheduled("other", "", FixedStride(((2, 3),)), Selection(12, 2, 4))
    with pytest.raises(ValueError, match="the policy is for 1 layers x 2 KV heads"):
        measure(loaded, make_task(), [method])


def test_the_model_is_as_it_was(
    loaded: LoadedModel, make_task: Callable[..., TaskPrompt], methods: list[Method]
) -> None:
    task = make_task()
    before, attributes = written(loaded.model, task), set(loaded.model.__dict__)
    measure(loaded, task, methods)
    assert written(loaded.model, task) == before
    assert set(loaded.model.__dict__) == attributes
    assert loaded.model.config._attn_implementation == "sdpa"
