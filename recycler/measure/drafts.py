"""What becomes of drafts: rounds along a model's own texts, what each draft showed, and whether it held."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import AlwaysFull, Selection, StepPolicy
from policies.stops import DraftSignals, StopRule
from recycler.decode.engine import Drafting
from recycler.decode.engines import begin_drafting
from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.decode.recycled import recycled
from recycler.decode.round_counts import RoundCounts
from recycler.decode.rounds import draft_signals
from recycler.decode.rows import decode_rows
from recycler.model.generation import generate_tokens
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt
from traces.drafted_rounds import DraftedRounds, MeasuredRounds, RoundCosts

# Of verifications that are timed: with few tokens, and with many.
_FEW, _MANY = 2, 17


@torch.no_grad()
def drafted_rounds(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    policy: StepPolicy,
    selection: Selection,
    *,
    n_tokens: int,
    n_drafts: int,
    temperature: float = 0.0,
    seed: int = 0,
    forced: bool = False,
    desc: str = "drafting",
) -> DraftedRounds:
    """Let a model go on from prompts in rounds, as `Rounds` does, each of so many drafts.

    Args:
        loaded: The model.
        prompts: Of one length; they decode side by side. Their continuations are not read unless `forced`.
        policy: Who decides in drafts.
        selection: How sets are chosen.
        n_tokens: Tokens that each text has at least.
        n_drafts: Drafts of a round.
        temperature: 0 for the most likely token at every place; else tokens are drawn, all but the first of a text, and
            a draft holds that is drawn.
        seed: Of what is drawn.
        forced: Whether texts are the prompts' continuations, whatever the model would write: a draft holds that full
            attention too finds the most likely there. Rounds that do not lie within a text do not count.
        desc: For the progress bar.

    Raises:
        ValueError: If texts are forced that are shorter than `n_tokens + n_drafts` tokens, or not of one length, or are
            forced at a temperature.
    """
    if forced and temperature:
        raise ValueError(f"where texts are given nothing is drawn: leave out temperature={temperature}.")
    texts = _continuations(prompts, n_tokens + n_drafts).to(loaded.model.device) if forced else None
    drafting, tokens, n_prompt = _begun(loaded, prompts, policy, selection, n_tokens + n_drafts)
    rows, device = np.arange(len(prompts)), tokens.device
    everyone, held = np.ones(len(rows), dtype=bool), np.zeros(len(rows), dtype=np.int64)
    generator = torch.Generator().manual_seed(seed)
    shown: list[np.ndarray] = []
    n_held: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    with tqdm(total=n_tokens, desc=desc, unit="token") as progress:
        while held.min() < n_tokens:
            drafting.begin_round(held, everyone)
            fed, drafts, of_round = [_read_at(texts, held, tokens)], [], []
            for n in range(1, n_drafts + 1):
                places = torch.from_numpy(n_prompt + held + n - 1).to(device)
                logits = drafting.draft(fed[-1], places, everyone)
                drafts.append(logits.argmax(-1))
                fed.append(_read_at(texts, held + n, drafts[-1]))
                signals = draft_signals(logits, n)
                of_round.append((signals.n_drafts, signals.probability, signals.margin, signals.entropy))
            # Rows that have their tokens go on, so that all rounds have as many.
            flat, of_rows = torch.stack(fed, dim=1), np.repeat(rows, n_drafts + 1)
            places = torch.from_numpy(n_prompt + held[:, None] + np.arange(n_drafts + 1)).to(device)
            logits = drafting.verify(flat.flatten(), places.flatten(), of_rows)
            chosen = _chosen(logits, temperature, generator).unflatten(0, (len(rows), -1))
            holds = (chosen[:, :-1] == torch.stack(drafts, dim=1)).cpu().numpy()
            n = holds.cumprod(1).sum(1)
            tokens = chosen[torch.arange(len(rows)), torch.from_numpy(n)]
            shown.append(np.array(of_round).transpose(2, 0, 1))
            n_held.append(n)
            counted.append(everyone if texts is None else held + n_drafts < texts.shape[1])
            before = held.min()
            held = held + n + 1
            progress.update(int(min(held.min(), n_tokens) - before))
    counts = np.concatenate(counted)
    signals = DraftSignals(*np.concatenate(shown)[counts].transpose(2, 0, 1))
    return DraftedRounds(signals, np.concatenate(n_held)[counts], np.tile(rows, len(n_held))[counts])


def _continuations(prompts: Sequence[Prompt], least: int) -> Tensor:
    """What follows each prompt, int64 `(prompts, tokens)`."""
    found = [prompt.tokens[prompt.n_prompt_tokens :].astype("int64") for prompt in prompts]
    lengths = {len(one) for one in found}
    if len(lengths) != 1 or min(lengths) < least:
        raise ValueError(f"texts that drafts follow have one length, at least {least} tokens, not {sorted(lengths)}.")
    return torch.from_numpy(np.stack(found))


def _read_at(texts: Tensor | None, at: np.ndarray, own: Tensor) -> Tensor:
    """The next token of each row, `(rows,)`: of its text, of which the last one stands for all beyond, or its own."""
    if texts is None:
        return own
    return texts[torch.arange(len(texts)), torch.from_numpy(at.clip(max=texts.shape[1] - 1))]


@torch.no_grad()
def round_costs(
    loaded: LoadedModel, prompt: Prompt, policy: StepPolicy, selection: Selection, *, repeats: int = 7
) -> RoundCosts:
    """Time drafts and verifications of one row on this machine; medians, after two rounds that make ready."""
    drafting, tokens, n_prompt = _begun(loaded, [prompt], policy, selection, _MANY)
    one, held = np.ones(1, dtype=bool), np.zeros(1, dtype=np.int64)
    drafts_ms: list[float] = []
    verified_ms: dict[int, list[float]] = {_FEW: [], _MANY: []}

    def timed(launch: object) -> float:
        began = time.perf_counter()
        launch()  # type: ignore[operator]
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e3

    for turn in range(repeats + 2):
        for n in verified_ms:
            drafting.begin_round(held, one)
            for j in range(n - 1):
                place = torch.full((1,), n_prompt + j, device=tokens.device)
                took = timed(lambda place=place: drafting.draft(tokens, place, one))
                if turn >= 2:
                    drafts_ms.append(took)
            places = n_prompt + torch.arange(n, device=tokens.device)
            rows = np.zeros(n, dtype=np.int64)
            took = timed(lambda n=n, places=places, rows=rows: drafting.verify(tokens.expand(n), places, rows))
            if turn >= 2:
                verified_ms[n].append(took)
    few, many = (statistics.median(took) for took in verified_ms.values())
    token_ms = max(0.0, (many - few) / (_MANY - _FEW))
    full_ms = statistics.median(_full_ms(loaded, prompt, selection, 2 * repeats))
    return RoundCosts(statistics.median(drafts_ms), max(0.0, few - _FEW * token_ms), token_ms, full_ms)


def _full_ms(loaded: LoadedModel, prompt: Prompt, selection: Selection, n_steps: int) -> list[float]:
    read = _read(loaded, [prompt], selection, n_steps + 2)
    rows = decode_rows(loaded.model, read, [AlwaysFull()], selection)
    token, took = read.logits.argmax(-1), []
    for _ in range(n_steps + 2):
        began = time.perf_counter()
        token = rows.step(token).logits.argmax(-1)
        if token.is_cuda:
            torch.cuda.synchronize()
        took.append((time.perf_counter() - began) * 1e3)
    return took[2:]


def exact_beside_full(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    policy: StepPolicy,
    selection: Selection,
    rule: StopRule,
    *,
    n_tokens: int,
    temperature: float = 0.0,
) -> MeasuredRounds:
    """Time exact decoding and the same engine with every unit full, in turns, text by text, drawn with one seed."""
    seconds, steps, n_equal, counted = {True: 0.0, False: 0.0}, {True: 0, False: 0}, 0, RoundCounts()
    for prompt in tqdm(prompts, desc="exact beside full", unit="prompt"):
        texts = {}
        for in_rounds in (True, False):
            decides, exact = (policy, rule) if in_rounds else (AlwaysFull(), False)
            with recycled(loaded, decides, selection, exact=exact) as session:
                run = generate_tokens(
                    loaded.model,
                    prompt.tokens[: prompt.n_prompt_tokens].tolist(),
                    max_new_tokens=n_tokens,
                    temperature=temperature,
                    ends=False,
                )
            texts[in_rounds] = run.tokens
            seconds[in_rounds] += run.decode_s
            steps[in_rounds] += n_tokens - 1
            counted += session.receipt().rounds or RoundCounts()
        n_equal += texts[True] == texts[False]
    return MeasuredRounds(
        exact_ms=1e3 * seconds[True] / steps[True],
        full_ms=1e3 * seconds[False] / steps[False],
        tokens_per_round=counted.tokens_per_round,
        n_equal=n_equal,
        n_texts=len(prompts),
    )


def _begun(
    loaded: LoadedModel, prompts: Sequence[Prompt], policy: StepPolicy, selection: Selection, n_steps: int
) -> tuple[Drafting, Tensor, int]:
    """Drafting after prompts side by side, the first token of each text, and the prompts' length."""
    together, n_rows = _read(loaded, prompts, selection, n_steps), len(prompts)
    if together.passing is not None:
        raise ValueError(f"{loaded.id} has layers that pass through, which take no drafts back.")
    drafting = begin_drafting(loaded.model, together.caches(n_rows), together.first_sets(selection, n_rows), policy)
    return drafting, together.logits.argmax(-1), together.n_tokens


def _read(loaded: LoadedModel, prompts: Sequence[Prompt], selection: Selection, n_steps: int) -> ReadPrompt:
    lengths = {prompt.n_prompt_tokens for prompt in prompts}
    if len(lengths) != 1:
        raise ValueError(f"prompts that draft side by side have one length, not {sorted(lengths)}.")
    model = loaded.model
    read = [
        read_prompt(
            model,
            torch.as_tensor(prompt.tokens[: prompt.n_prompt_tokens].astype("int64"), device=model.device),
            n_steps,
            prompt_queries=[selection.prompt_queries],
        )
        for prompt in prompts
    ]
    return ReadPrompt.side_by_side(read)


def _chosen(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    chances = (logits.float() / temperature).softmax(-1).cpu()
    return torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
