"""`python benchmarks/exact_texts.py`: whether exact decoding is exact, and how many tokens a verification gives.

On prompts of all kinds that tuning did not see: texts of stock `generate` and of exact decoding, greedy and drawn with
the same seed, in float32; in bfloat16 beside the same engine with every unit full, which rounds as it does, and beside
stock `generate`. Then rounds of 16 drafts, in the model's own words, drawn at a temperature, and along the held-out
texts, and what every rule makes of them. A run that was cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from exact_texts_report import NUMBERS, lines
from machine import machine_name
from tqdm import tqdm
from tuned_rules import TunedRule, tuned_rules

from policies import AlwaysFull, PolicyFile
from policies.serialize import stop_to_json
from policies.stops import FixedDrafts, StopRule
from recycler.decode.recycled import recycled
from recycler.measure.drafts import drafted_rounds
from recycler.model.generation import generate_tokens
from recycler.model.loading import LoadedModel, load_model
from recycler.model.versions import versions
from recycler.prompts import Prompt, default_prompts
from traces.drafted_rounds import DraftedRounds
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text
from tuning.drafts.choose import best_rule, expected, fixed_rules

_RESULTS = Path(__file__).parents[1] / "docs/results"
_MOST_DRAFTS, _TEMPERATURE, _REPEATED = 16, 0.7, 16
# Of two logits that are nearer to each other than this, sums of another order may choose the other.
_TIE = 1e-4
_TEXTS = {
    "own": {},
    f"own, temperature {_TEMPERATURE}": {"temperature": _TEMPERATURE},
    "held-out": {"forced": True},
}


def main(
    per_kind: Annotated[int, typer.Option(help="Prompts of each kind whose texts are compared.", min=1)] = 10,
    drafted_per_kind: Annotated[int, typer.Option(help="Those of them on which rounds are drafted.", min=1)] = 4,
    context_tokens: Annotated[int, typer.Option(help="Of a prompt.", min=64)] = 1536,
    tokens: Annotated[int, typer.Option(help="Of each text.", min=17)] = 256,
    first_index: Annotated[int, typer.Option(help="Of the prompts; make optimize takes the first ones.", min=0)] = 12,
    policy: Annotated[Path, typer.Option(help="Who drafts.")] = _RESULTS / "policy-budget-0.1-512-steps.json",
    tuned: Annotated[Path, typer.Option(help="Rules and what rounds cost.")] = _RESULTS / "exact-tuned.json",
    out: Annotated[Path, typer.Option(help="JSON, written after every text.")] = _RESULTS / "exact-texts.json",
) -> dict[str, Any]:
    """Compare texts, then count what holds."""
    file = PolicyFile.read(policy)
    rules = tuned_rules(tuned)
    asked: dict[str, Any] = {
        "context_tokens": context_tokens,
        "tokens": tokens,
        "first_index": first_index,
        "rule": stop_to_json(rules[0].rule),
        "policy": _digest(policy),
        "rules": _digest(tuned),
        "drafted_per_kind": drafted_per_kind,
    }
    found = _known(out, asked) or {
        "what": "python benchmarks/exact_texts.py",
        "machine": machine_name(),
        "versions": versions(),
        **asked,
        "texts": [],
        "rounds": [],
    }
    how = {"n_per_kind": per_kind, "context_tokens": context_tokens, "n_steps": tokens + _MOST_DRAFTS}
    loaded = load_model(None)
    prompts = default_prompts(loaded.tokenizer, **how, first_index=first_index)  # type: ignore[arg-type]
    save = partial(_save, out, found)
    _add_texts(found, loaded, prompts, _FLOAT32, file, rules[0].rule, save)
    _add_rounds(found, loaded, prompts, file, rules, save)
    _add_texts(found, load_model(None, dtype="bfloat16"), prompts, _BFLOAT16, file, rules[0].rule, save)
    for line in lines(found):
        print(line)
    return {"out": str(out)}


def _save(out: Path, found: dict[str, Any]) -> None:
    write_text(out, json.dumps(found, indent=1))


def _add_texts(
    found: dict[str, Any],
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    ways: Mapping[str, Callable[..., dict[str, Any]]],
    file: PolicyFile,
    rule: StopRule,
    save: Callable[[], None],
) -> None:
    """Write a text after every prompt in every way, and compare it."""
    for prompt in tqdm(prompts, ", ".join(ways)):
        for name, way in ways.items():
            if (prompt.name, name) not in {(row["prompt"], row["way"]) for row in found["texts"]}:
                compared = way(loaded, file, rule, prompt, found["tokens"])
                found["texts"].append({"prompt": prompt.name, "kind": prompt.kind, "way": name, **compared})
                save()


def _add_rounds(
    found: dict[str, Any],
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    file: PolicyFile,
    rules: Sequence[TunedRule],
    save: Callable[[], None],
) -> None:
    """Draft whole rounds along texts of every kind, and say what the rules make of them."""
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        of_kind = [prompt for prompt in prompts if prompt.kind == kind][: found["drafted_per_kind"]]
        for texts, options in _TEXTS.items():
            if (kind, texts) in {(row["kind"], row["texts"]) for row in found["rounds"]}:
                continue
            how: dict[str, Any] = {"n_tokens": found["tokens"], "n_drafts": _MOST_DRAFTS, **options}
            rounds = drafted_rounds(loaded, of_kind, file.policy, file.selection, desc=f"{kind}, {texts}", **how)
            held = {str(n): expected(FixedDrafts(n), rounds, rules[0].costs).tokens_per_round for n in NUMBERS}
            found["rounds"].append(
                {"kind": kind, "texts": texts, "by_number": held, "by_costs": _by_costs(rounds, rules)}
            )
            save()


def _known(out: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What an equal run had found when it was cut off; results of another one are not written over."""
    if not out.exists():
        return None
    known: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    for name, value in asked.items():
        if known.get(name) != value:
            raise ValueError(f"{out} has results of {name} {known.get(name)}, not {value}: give another --out.")
    return known


def _digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _greedy(loaded: LoadedModel, file: PolicyFile, rule: StopRule, prompt: Prompt, n_tokens: int) -> dict[str, Any]:
    """Exact greedy decoding beside stock `generate`."""
    return _beside_stock(loaded, file, rule, prompt, n_tokens, {})


def _drawn(loaded: LoadedModel, file: PolicyFile, rule: StopRule, prompt: Prompt, n_tokens: int) -> dict[str, Any]:
    """The same, tokens drawn with one seed."""
    return _beside_stock(
        loaded, file, rule, prompt, n_tokens, {"temperature": _TEMPERATURE, "seed": int(prompt.tokens.sum())}
    )


def _beside_stock(
    loaded: LoadedModel, file: PolicyFile, rule: StopRule, prompt: Prompt, n_tokens: int, how: dict[str, Any]
) -> dict[str, Any]:
    stock = _written(loaded, prompt, n_tokens, how)
    with recycled(loaded, file, exact=rule) as session:
        exact = _written(loaded, prompt, n_tokens, how)
    counted = session.receipt().rounds
    assert counted is not None
    return {
        "beside_stock": _compared(loaded, prompt, exact, stock),
        "tokens_per_round": counted.tokens_per_round,
        "rounds": counted.n_rounds,
        "drafts": counted.n_drafts,
        "repeats": _repeats(stock),
    }


def _bfloat16(loaded: LoadedModel, file: PolicyFile, rule: StopRule, prompt: Prompt, n_tokens: int) -> dict[str, Any]:
    """Exact greedy decoding beside the same engine with every unit full, and both beside stock `generate`."""
    stock = _written(loaded, prompt, n_tokens, {})
    with recycled(loaded, AlwaysFull(), file.selection):
        full = _written(loaded, prompt, n_tokens, {})
    with recycled(loaded, file, exact=rule):
        exact = _written(loaded, prompt, n_tokens, {})
    return {
        "beside_full": _compared(loaded, prompt, exact, full),
        "shared_with_stock": _n_shared(exact, stock),
        "repeats": _repeats(stock),
    }


def _written(loaded: LoadedModel, prompt: Prompt, n_tokens: int, how: dict[str, Any]) -> tuple[int, ...]:
    """What `generate` writes after a prompt, its end not being looked for."""
    tokens = prompt.tokens[: prompt.n_prompt_tokens].tolist()
    return generate_tokens(loaded.model, tokens, max_new_tokens=n_tokens, ends=False, **how).tokens


@torch.no_grad()
def _compared(loaded: LoadedModel, prompt: Prompt, ours: Sequence[int], theirs: Sequence[int]) -> str:
    """Whether two texts are equal, or where they part, and how far the logits of their tokens are apart there."""
    if ours == theirs:
        return "equal"
    first = _n_shared(ours, theirs)
    before = [*prompt.tokens[: prompt.n_prompt_tokens].tolist(), *theirs[:first]]
    logits = loaded.model(torch.tensor([before]), logits_to_keep=1).logits[0, -1]
    apart = float(logits[theirs[first]].double() - logits[ours[first]].double())
    return f"{'a tie' if abs(apart) <= _tie(logits) else 'different'} at {first}: logits {apart:.2e} apart"


def _tie(logits: torch.Tensor) -> float:
    """How near two logits are of which rounding may choose the other: in narrow types, neighbours."""
    narrow = torch.finfo(logits.dtype).eps * 2.0 ** math.floor(math.log2(float(logits.max())))
    return max(_TIE, narrow)


def _n_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts begin with alike."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True))))


def _repeats(text: Sequence[int]) -> bool:
    """Whether some sixteen tokens come twice."""
    return max(Counter(zip(*(text[i:] for i in range(_REPEATED)), strict=False)).values(), default=0) > 1


_FLOAT32 = {"greedy": _greedy, "drawn": _drawn}
_BFLOAT16 = {"bfloat16": _bfloat16}


def _by_costs(rounds: DraftedRounds, rules: Sequence[TunedRule]) -> list[dict[str, Any]]:
    """What a learned rule makes of rounds, and the number of drafts that would have been best for these very ones."""
    rows = []
    for tuned in rules:
        costs = tuned.costs
        by_learned = expected(tuned.rule, rounds, costs)
        fixed, by_fixed = best_rule(fixed_rules(_MOST_DRAFTS), rounds, costs)
        rows.append(
            {
                "costs_of": tuned.where,
                "tokens_per_round": by_learned.tokens_per_round,
                "drafts_per_round": by_learned.drafts_per_round,
                "times_full": by_learned.tokens_per_ms * costs.full_ms,
                "best_fixed": fixed.most_drafts,
                "best_fixed_tokens_per_round": by_fixed.tokens_per_round,
                "best_fixed_times_full": by_fixed.tokens_per_ms * costs.full_ms,
            }
        )
    return rows


if __name__ == "__main__":
    run_command(main)
