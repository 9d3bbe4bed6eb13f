"""Decoding in rounds gives full attention's logits, whatever drafts, whoever samples; on every engine that verifies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    NeverFull,
    PolicyFile,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from policies.stops.base import StopRule
from policies.stops.confident_drafts import ConfidentDrafts
from policies.stops.fixed_drafts import FixedDrafts
from recycler.decode.cpu.drafting import CpuDrafting
from recycler.decode.cpu.engine import CpuDecoding
from recycler.decode.engine import Drafting, Engine
from recycler.decode.plain.decoding import PlainEngine
from recycler.decode.plain.drafting import PlainDrafting
from recycler.decode.read_prompt import read_prompt
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled
from recycler.decode.round_counts import RoundCounts
from recycler.model.shape import model_shape

Make = Callable[..., PreTrainedModel]
SELECTION = Selection(9, 1, 3)
POLICIES: tuple[StepPolicy, ...] = (
    NeverFull(),
    AlwaysFull(),
    RefreshKeys(FixedStride(2)),
    BudgetConstrained(CosineThreshold(0.9), 0.4, 1),
)
FAST = [pytest.param(True, id="cpu"), pytest.param(False, id="plain")]


def generated(model: PreTrainedModel, tokens: Tensor, n_new: int = 24, **how: Any) -> Tensor:
    mask = (tokens != 0).long()
    torch.manual_seed(0)
    text: Tensor = model.generate(  # type: ignore[operator]
        tokens, attention_mask=mask, max_new_tokens=n_new, pad_token_id=0, **{"do_sample": False, **how}
    )
    return text


def a_batch(padding: tuple[int, ...] = (0, 5, 11), n_tokens: int = 40) -> Tensor:
    tokens = torch.randint(1, 61, (len(padding), n_tokens), generator=torch.Generator().manual_seed(1))
    for row, n in enumerate(padding):
        tokens[row, :n] = 0
    return tokens


def exactly(
    model: PreTrainedModel,
    tokens: Tensor,
    policy: StepPolicy,
    stop: StopRule | bool = True,
    fast: bool = True,
    **how: Any,
) -> tuple[Tensor, Receipt]:
    with recycled(model, policy, SELECTION, fast=fast, exact=stop) as session:
        text = generated(model, tokens, **how)
    return text, session.receipt()


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@pytest.mark.parametrize("stop", [FixedDrafts(4), ConfidentDrafts(0.1, 7)], ids=lambda stop: stop.kind)
def test_greedy_text_is_the_stock_decoders(make_model: Make, policy: StepPolicy, stop: StopRule, fast: bool) -> None:
    model, tokens = make_model(), a_batch()
    text, receipt = exactly(model, tokens, policy, stop, fast)
    assert torch.equal(text, generated(model, tokens))
    assert receipt.engine == ("cpu" if fast else "plain")
    assert receipt.n_steps == 23


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"eos_token_id": list(range(30))},
    ],
    ids=["drawn", "drawn with processors", "processors", "rows that end"],
)
def test_so_is_every_other_text(make_model: Make, how: dict[str, Any], fast: bool) -> None:
    model, tokens = make_model(), a_batch()
    text, _ = exactly(model, tokens, NeverFull(), FixedDrafts(5), fast, **how)
    assert torch.equal(text, generated(model, tokens, **how))


@pytest.mark.parametrize(("exact", "holds"), [(FixedDrafts(2), True), (False, False)], ids=["exact", "approximate"])
@torch.no_grad()
def test_what_is_drawn_has_full_attentions_distribution(make_model: Make, exact: StopRule | bool, holds: bool) -> None:
    """Three tokens in a row, of which a round gives the last; approximate decoding shows that the test can fail."""
    model, n_rows, heat = make_model(), 4000, 0.3
    prompt, vocabulary = a_batch((0,), 40), torch.arange(model.config.vocab_size)
    with recycled(model, NeverFull(), SELECTION, exact=exact):
        drawn = generated(model, prompt.expand(n_rows, -1), 3, do_sample=True, top_k=0, temperature=heat)[:, 40:]

    def chances(after: Tensor) -> Tensor:
        texts = torch.cat([prompt.expand(len(after), -1), after], dim=1)
        logits: Tensor = model(texts).logits[:, -1]
        return (logits / heat).softmax(-1)

    pairs = torch.cartesian_prod(vocabulary, vocabulary)
    of_two = chances(prompt[:, :0])[0, :, None] * chances(vocabulary[:, None])
    expected = (of_two.flatten()[:, None] * chances(pairs)).flatten().numpy() * n_rows
    n = len(vocabulary)
    seen = np.bincount((drawn[:, 0] * n * n + drawn[:, 1] * n + drawn[:, 2]).numpy(), minlength=n**3)
    # What is rare is one cell.
    often = expected >= 5
    cells = [np.append(counts[often], counts[~often].sum()) for counts in (seen, expected)]
    assert often.sum() > 20
    assert (chisquare(*cells).pvalue > 1e-3) == holds


@pytest.mark.parametrize("fast", FAST)
def test_logits_and_cache_are_those_of_full_attention(make_model: Make, fast: bool) -> None:
    model, tokens = make_model(), a_batch()
    kept: dict[bool, Any] = {}
    for exact in (True, False):
        cache = DynamicCache(config=model.config)
        run = {"past_key_values": cache, "output_logits": True, "return_dict_in_generate": True}
        if exact:
            with recycled(model, NeverFull(), SELECTION, fast=fast, exact=FixedDrafts(6)):
                made = generated(model, tokens, **run)
        else:
            made = generated(model, tokens, **run)
        kept[exact] = torch.stack(made.logits), [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[attr-defined]
    torch.testing.assert_close(kept[True][0], kept[False][0], atol=1e-10, rtol=0)
    for ours, stock in zip(kept[True][1], kept[False][1], strict=True):
        for part, other in zip(ours, stock, strict=True):
            torch.testing.assert_close(part, other, atol=1e-10, rtol=0)


def test_turns_of_a_conversation_are_exact_too(make_model: Make) -> None:
    model, tokens = make_model(), a_batch((0, 0))
    texts = []
    for exact in (True, False):
        cache, text = DynamicCache(config=model.config), tokens
        with recycled(model, NeverFull(), SELECTION, exact=exact) if exact else warnings.catch_warnings():
            for _ in range(3):
                text = generated(model, text, n_new=9, past_key_values=cache)
                text = torch.cat([text, tokens[:, :6]], dim=1)
        texts.append(text)
    assert torch.equal(*texts)


@pytest.mark.parametrize("stop", [FixedDrafts(1), FixedDrafts(7), ConfidentDrafts(0.3, 9)], ids=str)
@pytest.mark.parametrize("row", [0, 1])
def test_full_drafts_are_all_accepted(make_model: Make, stop: StopRule, row: int) -> None:
    counts: list[RoundCounts] = []

    def count(*_: Any, **__: Any) -> bool:
        if (counted := session.receipt().rounds) is not None:
            counts.append(counted)
        return False

    with recycled(make_model(), AlwaysFull(), SELECTION, exact=stop) as session:
        generated(make_model(), a_batch((0, 3))[row : row + 1], n_new=41, stopping_criteria=[count])
    assert [counted.n_tokens for counted in counts] == list(range(1, 41))
    # Where a round has been read to its end, no draft was left; a round has ten tokens at most.
    whole = [counted for counted in counts[-10:] if counted.n_tokens == counted.n_rounds + counted.n_drafts]
    assert whole
    assert all(counted.n_accepted == counted.n_drafts > 0 for counted in whole)


def test_drafts_that_a_drawn_text_leaves_are_not_accepted(make_model: Make) -> None:
    with recycled(make_model(), AlwaysFull(), SELECTION, exact=FixedDrafts(7)) as session:
        generated(make_model(), a_batch((0,)), n_new=65, do_sample=True, temperature=2.0, top_k=0)
    receipt = session.receipt()
    counted = receipt.rounds
    assert counted is not None
    # All drafts are what full attention finds most likely, and few of them are drawn.
    assert counted.n_tokens == receipt.row_steps == counted.n_rounds + counted.n_accepted
    assert counted.n_accepted < counted.n_drafts / 2
    assert counted.tokens_per_round == 64 / counted.n_rounds


def test_a_batch_takes_hardly_more_rounds_than_its_rows_alone(make_model: Make) -> None:
    model, tokens = make_model(), a_batch((0, 0, 0, 0))
    policy, stop = FixedStride(3), FixedDrafts(5)
    _, together = exactly(model, tokens, policy, stop, n_new=120)
    alone = [exactly(model, row[None], policy, stop, n_new=120)[1] for row in tokens]
    assert together.rounds is not None
    of_rows = np.mean([receipt.rounds.tokens_per_round for receipt in alone if receipt.rounds is not None])
    assert together.rounds.tokens_per_round >= 0.9 * of_rows


def test_a_row_that_has_ended_takes_no_round_for_every_token_of_the_others(make_model: Make) -> None:
    model, tokens = make_model(), a_batch((0, 0))
    after = generated(model, tokens, n_new=60)[:, tokens.shape[1] :]
    ends = next(int(token) for token in after[0] if token not in after[1])
    text, receipt = exactly(model, tokens, AlwaysFull(), FixedDrafts(5), n_new=60, eos_token_id=ends)
    assert torch.equal(text, generated(model, tokens, n_new=60, eos_token_id=ends))
    assert (text[0] == 0).sum() > 20
    assert receipt.rounds is not None
    # 59 steps of two rows, six tokens to a round, and some rounds more where one row ends.
    assert receipt.rounds.n_rounds <= 2 * 59 / 6 + 6


def test_nothing_is_drafted_beyond_the_models_positions(make_model: Make) -> None:
    model = copy.deepcopy(make_model())
    model.config.max_position_embeddings = 60
    tokens = a_batch((0,), 50)
    text, receipt = exactly(model, tokens, AlwaysFull(), FixedDrafts(40), n_new=10)
    assert torch.equal(text, generated(model, tokens, n_new=10))
    assert receipt.rounds is not None
    assert receipt.rounds.n_drafts <= 9


def test_a_nan_in_a_row_leaves_the_others_as_they_are(make_model: Make) -> None:
    model, tokens = make_model(), a_batch((0, 0))
    spoiled = copy.deepcopy(model)
    with torch.no_grad():
        spoiled.get_input_embeddings().weight[7] = float("nan")
        spoiled.get_output_embeddings().weight[7] = 0
    tokens[0, 20], tokens[1][tokens[1] == 7] = 7, 8
    stock = generated(spoiled, tokens)
    with pytest.warns(UserWarning, match="^row 0 has NaN in its prompt"):
        text, receipt = exactly(spoiled, tokens, NeverFull(), FixedDrafts(4))
    assert torch.equal(text[1], stock[1])
    assert len(receipt.notes) == 1


def test_no_horizon_and_no_other_weights_lead_away_from_full_attention(make_model: Make) -> None:
    model, tokens = make_model(), a_batch()
    shape = model_shape(model)
    file = PolicyFile(NeverFull(), SELECTION, shape, {"weights": "float64:another"}, horizon_steps=4)
    with recycled(model, file, exact=True) as session:
        text = generated(model, tokens)
    assert torch.equal(text, generated(model, tokens))
    assert (session.receipt().notes, session.receipt().beyond_horizon) == ((), "")


@pytest.mark.parametrize("fast", FAST)
def test_no_row_is_at_a_position_that_the_model_has_not(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    model = copy.deepcopy(make_model())
    model.config.max_position_embeddings = 64
    of_engine: type[Drafting] = CpuDrafting if fast else PlainDrafting
    draft, seen = of_engine.draft, []

    def noted(self: Any, tokens: Tensor, places: Tensor, going: np.ndarray) -> Tensor:
        seen.append(int(places.max()))
        return draft(self, tokens, places, going)

    monkeypatch.setattr(of_engine, "draft", noted)
    # Rows run ahead of each other up to the last position.
    tokens = a_batch((0, 0), 40)
    text, _ = exactly(model, tokens, FixedStride(3), ConfidentDrafts(0.3, 9), fast, n_new=24)
    assert torch.equal(text, generated(model, tokens, n_new=24))
    assert max(seen) < 64


def test_a_token_at_another_position_is_not_the_one_that_was_drafted(make_model: Make) -> None:
    model, tokens = make_model(), a_batch((0,), 30)

    def fed(exact: bool) -> Tensor:
        cache, logits = DynamicCache(config=model.config), []
        with torch.no_grad(), recycled(model, AlwaysFull(), SELECTION, exact=FixedDrafts(4) if exact else False):
            given, place = tokens, torch.arange(30)[None]
            for step in range(6):
                output = model(given, position_ids=place, past_key_values=cache, use_cache=True)
                logits.append(output.logits[:, -1])
                given, place = logits[-1].argmax(-1, keepdim=True), torch.tensor([[30 + step + 7 * (step > 2)]])
        return torch.stack(logits)

    torch.testing.assert_close(fed(True), fed(False), atol=1e-10, rtol=0)


def test_a_text_that_is_over_counts_no_drafts(make_model: Make) -> None:
    model, tokens = make_model(), a_batch((0, 0))
    after = generated(model, tokens, n_new=60)[:, tokens.shape[1] :]
    ends = next(int(token) for token in after[0] if token not in after[1])
    _, receipt = exactly(model, tokens, NeverFull(), FixedDrafts(4), n_new=60, eos_token_id=ends)
    _, whole = exactly(model, tokens, NeverFull(), FixedDrafts(4), n_new=60)
    assert receipt.rounds is not None
    assert whole.rounds is not None
    assert receipt.rounds.n_rounds < whole.rounds.n_rounds


def test_receipts_of_drafts_have_reasons_on_every_path(make_model: Make) -> None:
    policy = BudgetConstrained(FixedStride(2), 0.3)
    model, tokens = make_model(), a_batch()
    counted = [exactly(model, tokens, policy, FixedDrafts(6), fast)[1] for fast in (True, False)]
    assert counted[0].reasons["budget"].sum() > 0
    np.testing.assert_array_equal(counted[0].reasons["budget"], counted[1].reasons["budget"])


def test_an_interrupted_step_may_be_taken_again(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model(), a_batch((0,), 30)

    def fed(interrupted: bool) -> tuple[Tensor, int]:
        cache, logits = DynamicCache(config=model.config), []
        with torch.no_grad(), recycled(model, AlwaysFull(), SELECTION):
            model(tokens[:, :20], past_key_values=cache, use_cache=True)
            for step in range(20, 30):
                if interrupted and step == 24:
                    with monkeypatch.context() as patched:
                        patched.setattr(CpuDecoding, "predicted", _interrupt)
                        with pytest.raises(KeyboardInterrupt):
                            model(tokens[:, step : step + 1], past_key_values=cache, use_cache=True)
                logits.append(model(tokens[:, step : step + 1], past_key_values=cache, use_cache=True).logits)
        return torch.stack(logits), cache.get_seq_length()

    (ours, n_ours), (stock, n_stock) = fed(True), fed(False)
    assert n_ours == n_stock == 30
    torch.testing.assert_close(ours, stock, atol=1e-10, rtol=0)


def _interrupt(*_: Any) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("exact", [8, "fixed_drafts", None, 1.0])
def test_what_is_no_rule_is_refused(make_model: Make, exact: Any) -> None:
    with (
        pytest.raises(ValueError, match="True, False or a rule"),
        recycled(make_model(), NeverFull(), SELECTION, exact=exact),
    ):
        pass


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_follows_the_longest_text_is_refused(make_model: Make, kind: str) -> None:
    model = copy.deepcopy(make_model())
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": kind}
    with pytest.raises(ValueError, match=kind), recycled(model, NeverFull(), SELECTION, exact=True):
        pass


def test_weights_that_lie_otherwise_are_left_to_the_plain_path(make_model: Make) -> None:
    model = copy.deepcopy(make_model())
    weight = model.model.layers[0].self_attn.q_proj.weight  # type: ignore[union-attr, index]
    weight.data = weight.data.t().contiguous().t()
    tokens = a_batch((0,) * 7)
    with recycled(model, AlwaysFull(), SELECTION) as session:
        text = generated(model, tokens)
    assert torch.equal(text, generated(model, tokens))
    assert "row after row" in session.receipt().why_plain


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [({"audit": 4}, "leave out audit"), ({"govern_kl": 0.1}, "leave out audit")],
    ids=["audit", "govern_kl"],
)
def test_what_would_measure_nothing_is_refused(make_model: Make, arguments: dict[str, Any], problem: str) -> None:
    with (
        pytest.raises(ValueError, match=problem),
        recycled(make_model(), BudgetConstrained(NeverFull(), 0.1), SELECTION, exact=True, **arguments),
    ):
        pass


def test_layers_that_pass_through_are_refused(make_model: Make) -> None:
    model = make_model("gemma2", attention="eager", head_dim=8, sliding_window=16)
    tokens = a_batch((0,))
    with recycled(model, NeverFull(), SELECTION, exact=True), pytest.raises(ValueError, match="takes drafts back"):
        generated(model, tokens)


def test_a_policy_that_measures_sets_drafts_on_the_plain_path(make_model: Make) -> None:
    policy = LearnedLogistic(("refresh_loss",), (1.0,), 0.0)
    model, tokens = make_model(), a_batch()
    text, receipt = exactly(model, tokens, policy, FixedDrafts(4))
    assert torch.equal(text, generated(model, tokens))
    assert receipt.engine == "plain"
    assert "refresh_mass" in receipt.why_plain


SELECTIONS = {
    "default": SELECTION,
    "updated": Selection(9, 1, 3, group="mean", ranking="updated", unit_k=((4, 14), (11, 7))),
    "last_full": Selection(12, 2, 4, 1, 2, ranking="last_full"),
}
ALIKE = [
    pytest.param(name, policy, selection, id=f"{name}-{policy.kind}-{selected}")
    for name in ("cpu", "cuda")
    for i, policy in enumerate(POLICIES)
    for j, (selected, selection) in enumerate(SELECTIONS.items())
    # A kernel's step takes the interpreter long.
    if name == "cpu" or (i + j) % 4 == 3
]


@pytest.mark.parametrize(("name", "policy", "selection"), ALIKE)
@torch.no_grad()
def test_engines_draft_as_the_plain_path_does(
    runs_on: Callable[[str], Any], name: str, policy: StepPolicy, selection: Selection
) -> None:
    runs = runs_on(name)
    model, atol = runs.model(), runs.subject.atol
    prompts, text = torch.randint(1, 61, (2, 70), generator=torch.Generator().manual_seed(2)).split(40, dim=1)
    prompts, text = prompts.to(model.device), text.to(model.device)
    engines: tuple[Engine, ...] = (runs.subject.engine(model), PlainEngine(model))
    drafting = [_drafting(engine, model, prompts, policy, selection) for engine in engines]

    def both(ask: Callable[[Drafting], Tensor], rows: np.ndarray) -> None:
        ours, plain = (ask(one) for one in drafting)
        torch.testing.assert_close(ours[rows], plain[rows], atol=atol, rtol=0)

    held = np.zeros(2, dtype=np.int64)
    # Drafts of both rows, of one, and how many hold: all, some, none but the first, and fewer than before.
    for n_drafts, going, n_kept in (
        ((4, 4), (True, True), (5, 3)),
        ((3, 5), (True, True), (1, 6)),
        ((0, 2), (False, True), (0, 3)),
        ((4, 2), (True, True), (5, 3)),
    ):
        rows = np.array(going)
        for one in drafting:
            one.begin_round(held, rows)
        for step in range(max(n_drafts)):
            active = rows & (np.array(n_drafts) > step)
            places = torch.from_numpy(40 + held + step).to(model.device)
            fed = torch.stack([text[row, held[row] + min(step, n_drafts[row])] for row in range(2)])
            both(lambda one, fed=fed, places=places, active=active: one.draft(fed, places, active), active)  # type: ignore[misc]
        flat = [(row, held[row] + j) for row in range(2) if going[row] for j in range(n_drafts[row] + 1)]
        of_rows, own = (np.array(column) for column in zip(*flat, strict=True))
        tokens = text[torch.from_numpy(of_rows), torch.from_numpy(own)]
        places = torch.from_numpy(40 + own).to(model.device)
        both(
            lambda one, tokens=tokens, places=places, of_rows=of_rows: one.verify(tokens, places, of_rows),  # type: ignore[misc]
            np.arange(len(flat)),
        )
        held = held + n_kept
    for name in ("full_steps", "keys_only_steps", "tokens_read"):
        ours, plain = (getattr(one.totals(), name) for one in drafting)
        np.testing.assert_array_equal(ours, plain, err_msg=name)


def _drafting(
    engine: Engine, model: PreTrainedModel, prompts: Tensor, policy: StepPolicy, selection: Selection
) -> Drafting:
    from recycler.decode.read_prompt import ReadPrompt

    prompt = ReadPrompt.side_by_side([read_prompt(model, one, 30) for one in prompts])
    return engine.begin_drafts(prompt.caches(2), prompt.first_sets(selection, 2), policy)
