from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from traces import Trace, TraceFile, write_trace
from tuning.search.split import Split, split_by_prompt

MakeTrace = Callable[..., Trace]


@pytest.fixture
def files_of(make_trace: MakeTrace, tmp_path: Path) -> Callable[..., list[TraceFile]]:
    """Writes so many traces of each kind; names count up per kind and do not contain it."""

    def files_of(**n_by_kind: int) -> list[TraceFile]:
        return [
            write_trace(make_trace(f"{number}-{kind[::-1]}", kind, n_steps=1, max_age=1, units=(1, 1)), tmp_path)
            for kind, n in n_by_kind.items()
            for number in range(n)
        ]

    return files_of


def names(files: tuple[TraceFile, ...]) -> list[str]:
    return [file.path.stem for file in files]


def kinds(files: tuple[TraceFile, ...]) -> list[str]:
    return sorted(str(file.header.prompt["kind"]) for file in files)


def test_four_prompts_of_a_kind_play_four_parts(files_of: Callable[..., list[TraceFile]]) -> None:
    split = split_by_prompt(files_of(code=4))
    assert names(split.tune) == ["0-edoc", "1-edoc"]
    assert names(split.ablate) == ["0-edoc"]
    assert names(split.validate) == ["1-edoc"]
    assert names(split.held_out) == ["2-edoc", "3-edoc"]


@pytest.mark.parametrize("n", range(2, 8))
def test_every_kind_is_tuned_on_and_held_out(files_of: Callable[..., list[TraceFile]], n: int) -> None:
    files = files_of(code=n, prose=n, copying=n)
    split = split_by_prompt(files)
    assert sorted(names(split.tune + split.held_out)) == sorted(file.path.stem for file in files)
    assert set(names(split.tune)).isdisjoint(names(split.held_out))
    assert kinds(split.held_out) == sorted(["code", "prose", "copying"] * (n // 2))
    assert kinds(split.ablate) == kinds(split.validate) == ["code", "copying", "prose"]
    assert set(names(split.ablate + split.validate)) <= set(names(split.tune))
    if n > 2:
        assert set(names(split.ablate)).isdisjoint(names(split.validate))


def test_with_two_prompts_of_a_kind_one_is_both_ablated_and_validated_on(
    files_of: Callable[..., list[TraceFile]],
) -> None:
    split = split_by_prompt(files_of(code=2, prose=2))
    assert names(split.tune) == names(split.ablate) == names(split.validate) == ["0-edoc", "0-esorp"]
    assert names(split.held_out) == ["1-edoc", "1-esorp"]


def test_a_kind_with_one_prompt_is_tuned_on_only(files_of: Callable[..., list[TraceFile]]) -> None:
    split = split_by_prompt(files_of(code=1, prose=3))
    assert (kinds(split.tune), kinds(split.held_out)) == (["code", "prose", "prose"], ["prose"])


def test_the_order_of_the_files_does_not_matter(files_of: Callable[..., list[TraceFile]]) -> None:
    files = files_of(code=5, prose=3, copying=1)
    split = split_by_prompt(files)
    for seed in range(5):
        shuffled = random.Random(seed).sample(files, len(files))
        assert split_by_prompt(shuffled) == split


def test_more_prompts_of_one_kind_do_not_move_those_of_another(files_of: Callable[..., list[TraceFile]]) -> None:
    def prose(split: Split) -> list[list[str]]:
        parts = (split.tune, split.ablate, split.validate, split.held_out)
        return [[name for name in names(part) if name.endswith("esorp")] for part in parts]

    assert prose(split_by_prompt(files_of(prose=4))) == prose(split_by_prompt(files_of(prose=4, code=7)))


@pytest.mark.parametrize("n_by_kind", [{"code": 1}, {"code": 1, "prose": 1, "copying": 1}, {}])
def test_too_few_prompts_are_refused_with_what_to_do(
    files_of: Callable[..., list[TraceFile]], n_by_kind: dict[str, int]
) -> None:
    sentence = f"{len(n_by_kind)} prompts of {len(n_by_kind)} kinds are too few to hold any out: record at least two"
    with pytest.raises(ValueError, match=sentence):
        split_by_prompt(files_of(**n_by_kind))
