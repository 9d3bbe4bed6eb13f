"""`python -m tuning.exact --policy results/policy.json`: when to stop drafting and verify, for exact decoding.

`python -m tuning.optimize --exact` does the same after it has tuned a policy.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from policies import NeverFull, PolicyFile, Selection, StepPolicy
from policies.stops import StopRule
from recycler.measure.drafts import drafted_rounds, exact_beside_full, round_costs
from recycler.model.loading import LoadedModel, load_model
from recycler.model.shape import check_positions, model_shape
from recycler.prompts import Prompt, default_prompts
from traces.drafted_rounds import RoundCosts
from traces.pictures import write_picture
from traces.reporting.command import run_command
from tuning.drafts.choose import best_rule, expected, fixed_rules, learned_rules
from tuning.drafts.picture import draw_drafts
from tuning.drafts.results import Drafter, DraftsResult
from tuning.search.split import Split, split_by_prompt

# Tokens of each text, and drafts of a round at most.
TEXT_TOKENS, MOST_DRAFTS = 128, 16
# Tokens of the sets that drafts attend to, as multiples of the file's.
_SIZES = (1, 2)


def main(
    policy: Annotated[Path, typer.Option(help="Policy JSON to draft with.")] = Path("results/policy.json"),
    out: Annotated[
        Path, typer.Option(help="Policy JSON with the rule that ends rounds; a picture lies beside it.")
    ] = Path("results/exact.json"),
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the policy's.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.", min=2)] = 1536,
    tokens: Annotated[
        int, typer.Option(help="Tokens of each text, which the model writes itself.", min=16)
    ] = TEXT_TOKENS,
    per_kind: Annotated[int, typer.Option(help="Prompts per kind; half of them are held out.", min=2)] = 2,
    most_drafts: Annotated[int, typer.Option(help="Most drafts of a round.", min=1, max=256)] = MOST_DRAFTS,
    temperature: Annotated[
        float, typer.Option(help="At which texts are drawn; 0: the most likely token at every place.", min=0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    costs: Annotated[
        str | None,
        typer.Option(
            help="Milliseconds of a draft by the policy, of a verification, of each token in it, of a full step, as "
            "5.8,12,0.2,11.3: of the machine and context where it will run; default: measured here, of one row."
        ),
    ] = None,
) -> dict[str, Any]:
    """Choose what drafts, and when a round ends, for the most tokens of full attention's own text for the time."""
    of_rounds = round_costs_of(costs)
    file = PolicyFile.read(policy)
    loaded = load_model(model or file.model.id, dtype=dtype, device=device)
    file.check_model(model_shape(loaded.model, loaded.id))
    check_positions(loaded.model, context_tokens, tokens + most_drafts)
    prompts = default_prompts(
        loaded.tokenizer, n_per_kind=per_kind, context_tokens=context_tokens, n_steps=tokens, seed=seed
    )
    return tuned_exactly(
        loaded,
        file,
        split_by_prompt(prompts),
        out,
        n_tokens=tokens,
        most_drafts=most_drafts,
        costs=of_rounds,
        temperature=temperature,
    )


def tuned_exactly(
    loaded: LoadedModel,
    file: PolicyFile,
    split: Split[Prompt],
    out: Path,
    *,
    n_tokens: int = TEXT_TOKENS,
    most_drafts: int = MOST_DRAFTS,
    costs: RoundCosts | None = None,
    temperature: float = 0.0,
) -> dict[str, Any]:
    """Tune, write the policy file and its picture, print a table; what the file says of it, and where it is."""
    how: dict[str, Any] = {"n_tokens": n_tokens, "most_drafts": most_drafts, "costs": costs, "temperature": temperature}
    result = tune_drafts(loaded, file, split.tune, split.held_out, **how)
    result.file(file).write(out)
    picture = out.with_suffix(".png")
    write_picture(draw_drafts(result, costs is None), picture)
    _print(result, costs is None)
    return {"policy": str(out), "picture": str(picture), **result.to_json()}


def tune_drafts(
    loaded: LoadedModel,
    file: PolicyFile,
    tune: Sequence[Prompt],
    held_out: Sequence[Prompt],
    *,
    n_tokens: int,
    most_drafts: int,
    costs: RoundCosts | None = None,
    temperature: float = 0.0,
) -> DraftsResult:
    """Choose what drafts and when a round ends, for the most tokens of full attention's own text per unit of time.

    Args:
        loaded: The model.
        file: The policy to draft with, which competes with one that never looks again.
        tune: Prompts to choose on.
        held_out: Prompts to measure on.
        n_tokens: Of each text.
        most_drafts: Of a round.
        costs: What rounds of the file's policy take, where they will run, and nothing else is tried; None measures it
            here, of one row, and tries a policy that never looks again and larger sets too.
        temperature: At which texts are drawn; 0 for the most likely token at every place. What is drawn leaves drafts
            that full attention finds most likely, so a rule for drawn texts drafts less.
    """
    tried = [(size, name) for size in _SIZES for name in ("tuned", "never full")] if costs is None else [(1, "tuned")]
    of_texts: dict[str, Any] = {"n_tokens": n_tokens, "n_drafts": most_drafts, "temperature": temperature}
    drafters = sorted(
        (
            _drafter(
                loaded,
                name,
                file.policy if name == "tuned" else NeverFull(),
                file.selection.at_k(size * file.selection.k),
                tune,
                of_texts,
                costs,
            )
            for size, name in tried
        ),
        key=lambda one: -one.tuned.tokens_per_ms,
    )
    best = drafters[0]
    rounds = drafted_rounds(loaded, held_out, best.policy, best.selection, **of_texts, desc="held-out texts")
    fixed, _ = best_rule(fixed_rules(most_drafts), best.rounds, best.costs)
    return DraftsResult(
        drafters=tuple(drafters),
        held_out=rounds,
        predicted=expected(best.rule, rounds, best.costs),
        fixed=(fixed, expected(fixed, rounds, best.costs)),
        measured=exact_beside_full(
            loaded, held_out, best.policy, best.selection, best.rule, n_tokens=n_tokens, temperature=temperature
        ),
        temperature=temperature,
    )


def _drafter(
    loaded: LoadedModel,
    name: str,
    policy: StepPolicy,
    selection: Selection,
    prompts: Sequence[Prompt],
    of_texts: Mapping[str, Any],
    costs: RoundCosts | None,
) -> Drafter:
    name = f"{name}, k = {selection.k}"
    rounds = drafted_rounds(loaded, prompts, policy, selection, **of_texts, desc=f"drafts, {name}")
    costs = costs or round_costs(loaded, prompts[0], policy, selection)
    rule, tuned = best_rule([*fixed_rules(rounds.most_drafts), *learned_rules(rounds)], rounds, costs)
    return Drafter(name, policy, selection, costs, rounds, rule, tuned)


def round_costs_of(asked: str | None) -> RoundCosts | None:
    """What `--costs` gives.

    Raises:
        ValueError: If it is not four numbers from 0 on.
    """
    if asked is None:
        return None
    try:
        draft_ms, verify_ms, token_ms, full_ms = (float(number) for number in asked.split(","))
        return RoundCosts(draft_ms, verify_ms, token_ms, full_ms)
    except ValueError as error:
        raise ValueError(
            f"costs are milliseconds of a draft, a verification, each token in it and a full step, as 5.8,12,0.2,11, "
            f"not {asked!r}."
        ) from error


def _named(rule: StopRule) -> str:
    limit = getattr(rule, "least_survival", None)
    return f"{rule.kind}, at most {rule.most_drafts}" + ("" if limit is None else f", survival {limit:g}")


def _print(result: DraftsResult, costs_of_here: bool) -> None:
    # Piped, the table is as wide as it needs to be; a terminal has its own width.
    console, measured = Console(width=None if sys.stdout.isatty() else 110), result.measured
    table = Table(title=f"Exact decoding, tuning prompts, {result.texts}", title_justify="left")
    for name in (
        "drafts by",
        "rounds end by",
        "ms: draft, verification, token, full step",
        "tokens per round",
        "x always full",
    ):
        table.add_column(name)
    for one in result.drafters:
        costs = one.costs
        gain = one.tuned.tokens_per_ms * costs.full_ms
        took = f"{costs.draft_ms:.1f}, {costs.verify_ms:.1f}, {costs.token_ms:.2f}, {costs.full_ms:.1f}"
        table.add_row(one.name, _named(one.rule), took, f"{one.tuned.tokens_per_round:.2f}", f"{gain:.2f}")
    console.print(table)
    gain = result.predicted.tokens_per_ms * result.best.costs.full_ms
    console.print(
        f"held-out texts: {measured.tokens_per_round:.2f} tokens per round (predicted "
        f"{result.predicted.tokens_per_round:.2f}), {gain:.2f} times as fast as always full predicted; "
        f"{measured.n_equal} of {measured.n_texts} texts equal token by token.",
        highlight=False,
    )
    console.print(
        f"here: {measured.exact_ms:.1f} ms per token beside {measured.full_ms:.1f} always full, {measured.gain:.2f} "
        "times as fast.",
        highlight=False,
    )
    if costs_of_here and measured.gain < 1:
        console.print("Exact decoding does not pay on this machine: leave out exact for speed, take it for the proof.")


if __name__ == "__main__":
    run_command(main)
