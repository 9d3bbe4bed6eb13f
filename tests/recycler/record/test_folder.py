from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from policies import Selection
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt
from recycler.record.folder import find_recorded, record_prompts
from recycler.record.one_prompt import record_trace
from traces import TraceFile, write_trace
from traces.reporting.folder_lock import folder_locked
from traces.trace_file import SUFFIX

SELECTION = Selection(k=12, sinks=2, window=4)
N_PROMPT, N_STEPS, MAX_AGE = 40, 6, 4


def make_prompt(name: str, seed: int, n_prompt: int = N_PROMPT, n_steps: int = N_STEPS) -> Prompt:
    tokens = np.random.default_rng(seed).integers(0, 50, n_prompt + n_steps)
    return Prompt(name=name, kind="random", tokens=tokens, n_prompt_tokens=n_prompt, source="drawn", licence="CC0-1.0")


@pytest.fixture
def load(make_model: Callable[..., PreTrainedModel]) -> Callable[..., LoadedModel]:
    def load(name: str = "tiny", dtype: torch.dtype = torch.float32, **shape: Any) -> LoadedModel:
        return LoadedModel(make_model(dtype=dtype, **shape), tokenizer=None, id=name)  # type: ignore[arg-type]

    return load


@pytest.fixture
def loaded(load: Callable[..., LoadedModel]) -> LoadedModel:
    return load()


@pytest.fixture
def prompts() -> list[Prompt]:
    return [make_prompt(name, seed) for seed, name in enumerate(["b", "a", "c"])]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "made" / "traces"


class Watch:
    """Notes the last token of every prompt that reaches the model, and interrupts at one of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.seen: list[int] = []
        self.interrupt_at: int | None = None
        self.handle = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0]
        if tokens.shape[1] == N_STEPS + 1:
            self.seen.append(int(tokens[0, -1]))
            if len(self.seen) == self.interrupt_at:
                raise KeyboardInterrupt


@pytest.fixture
def watch(loaded: LoadedModel) -> Iterator[Watch]:
    watch = Watch(loaded.model)
    yield watch
    watch.handle.remove()


def record(loaded: LoadedModel, prompts: list[Prompt], folder: Path, **changed: Any) -> list[TraceFile]:
    options: dict[str, Any] = {"max_age": MAX_AGE} | changed
    return record_prompts(loaded, prompts, options.pop("selection", SELECTION), folder, **options)


def test_two_processes_do_not_record_into_one_folder(loaded: LoadedModel, prompts: list[Prompt], folder: Path) -> None:
    record(loaded, prompts[:1], folder)
    half_written = folder / f"c{SUFFIX}.partial"
    half_written.write_text("of the other process")
    with folder_locked(folder):
        with pytest.raises(ValueError, match=r"in use by process \d+"):
            record(loaded, prompts, folder)
        # Where nothing is to be recorded nobody is in the way.
        record(loaded, prompts[:1], folder)
        assert half_written.exists()
    record(loaded, prompts, folder)
    assert not half_written.exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def test_every_prompt_becomes_the_trace_that_record_trace_makes(
    loaded: LoadedModel, prompts: list[Prompt], folder: Path
) -> None:
    files = record(loaded, prompts, folder)
    assert [file.path for file in files] == [folder / f"{name}.safetensors" for name in ("b", "a", "c")]
    assert sorted(contents(folder)) == ["a.safetensors", "b.safetensors", "c.safetensors"]
    for prompt, file in zip(prompts, files, strict=True):
        expected = record_trace(loaded.model, prompt, SELECTION, max_age=MAX_AGE, model_id="tiny")
        assert file.header.to_json() == expected.header.to_json()
        for name, array in expected.arrays().items():
            np.testing.assert_array_equal(file.array(name), array)


def test_recording_does_not_depend_on_the_order(loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path) -> None:
    files = record(loaded, prompts, tmp_path / "one")
    others = record(loaded, prompts[::-1], tmp_path / "two")[::-1]
    for file, other in zip(files, others, strict=True):
        assert file.header == other.header
        for name, array in file.load().arrays().items():
            np.testing.assert_array_equal(array, other.array(name))


def test_progress_goes_to_standard_error(
    loaded: LoadedModel, prompts: list[Prompt], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(loaded, prompts, folder)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err
    record(loaded, prompts, folder)
    assert capsys.readouterr() == ("", "")


def test_an_interrupted_recording_leaves_whole_traces_and_goes_on_with_the_missing(
    loaded: LoadedModel, prompts: list[Prompt], folder: Path, watch: Watch
) -> None:
    watch.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        record(loaded, prompts, folder)
    assert list(contents(folder)) == ["b.safetensors"]
    first = folder / "b.safetensors"
    TraceFile(first).load()
    before = first.read_bytes(), first.stat().st_mtime_ns
    assert loaded.model.config._attn_implementation == "sdpa"

    # What dying in the middle of a write would leave.
    (folder / "a.safetensors.partial").write_bytes(before[0][:1000])
    watch.seen.clear()
    watch.interrupt_at = None
    files = record(loaded, prompts, folder)
    assert watch.seen == [int(prompt.tokens[-1]) for prompt in prompts[1:]]
    assert [file.load().name for file in files] == ["b", "a", "c"]
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert sorted(contents(folder)) == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_prompts_join_a_folder_of_other_prompts(
    loaded: LoadedModel, prompts: list[Prompt], folder: Path, watch: Watch
) -> None:
    record(loaded, prompts[:2], folder)
    assert find_recorded(loaded, prompts[2:], SELECTION, folder, max_age=MAX_AGE) == {}
    (file,) = record(loaded, prompts[2:], folder)
    assert file.path.name == "c.safetensors"
    assert len(watch.seen) == 3
    found = find_recorded(loaded, prompts, SELECTION, folder, max_age=MAX_AGE)
    assert {name: file.path.name for name, file in found.items()} == {name: f"{name}.safetensors" for name in "abc"}


def test_another_source_of_the_same_text_is_the_same_prompt(
    loaded: LoadedModel, prompts: list[Prompt], folder: Path, watch: Watch
) -> None:
    record(loaded, prompts, folder)
    moved = [dataclasses.replace(prompt, source="elsewhere") for prompt in prompts]
    record(loaded, moved, folder)
    assert len(watch.seen) == 3


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"selection": Selection(k=13, sinks=2, window=4)}, "k 12 instead of 13:"),
        ({"selection": Selection(k=12, sinks=1, window=5)}, "sinks 2 instead of 1, window 4 instead of 5:"),
        ({"selection": dataclasses.replace(SELECTION, group="mean")}, 'group "max" instead of "mean":'),
        ({"max_age": 5}, "max_age 4 instead of 5:"),
    ],
)
@pytest.mark.parametrize("names", [["a", "c"], ["d"]], ids=["same prompts", "other prompts"])
def test_other_settings_are_refused_with_the_difference(
    loaded: LoadedModel, prompts: list[Prompt], folder: Path, names: list[str], changed: dict[str, Any], named: str
) -> None:
    record(loaded, prompts, folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=r"a\.safetensors was recorded with ") as refusal:
        record(loaded, [make_prompt(name, 1) for name in names], folder, **changed)
    assert named in str(refusal.value)
    assert contents(folder) == before


def test_other_steps_are_refused(loaded: LoadedModel, prompts: list[Prompt], folder: Path) -> None:
    record(loaded, prompts, folder)
    with pytest.raises(ValueError, match=r"steps 6 instead of 7:"):
        record(loaded, [make_prompt("d", 0, n_steps=7)], folder)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"name": "other"}, 'model id "tiny" instead of "other":'),
        ({"kv_heads": 4}, "model kv_heads 2 instead of 4:"),
        ({"dtype": torch.bfloat16}, 'model dtype "float32" instead of "bfloat16":'),
    ],
    ids=["id", "shape", "dtype"],
)
def test_another_model_is_refused(
    load: Callable[..., LoadedModel], prompts: list[Prompt], folder: Path, other: dict[str, Any], named: str
) -> None:
    record(load(), prompts, folder)
    with pytest.raises(ValueError, match=named):
        record(load(**other), prompts, folder)


def test_other_versions_are_refused(loaded: LoadedModel, prompts: list[Prompt], folder: Path) -> None:
    trace = record_trace(loaded.model, prompts[0], SELECTION, max_age=MAX_AGE, model_id="tiny")
    versions = dict(trace.header.versions) | {"torch": "1.0"}
    write_trace(dataclasses.replace(trace, header=dataclasses.replace(trace.header, versions=versions)), folder)
    with pytest.raises(ValueError, match=r'torch version "1\.0" instead of '):
        record(loaded, prompts, folder)


def test_another_text_of_the_same_name_is_refused(loaded: LoadedModel, prompts: list[Prompt], folder: Path) -> None:
    record(loaded, prompts, folder)
    with pytest.raises(ValueError, match=r"b\.safetensors was recorded on another text: record into another folder"):
        record(loaded, [make_prompt("b", 7)], folder)
    with pytest.raises(ValueError, match=r"prompt tokens 40 instead of 39"):
        record(loaded, [make_prompt("b", 0, n_prompt=39)], folder)


def test_a_damaged_trace_is_refused_not_skipped(loaded: LoadedModel, prompts: list[Prompt], folder: Path) -> None:
    files = record(loaded, prompts, folder)
    files[1].path.write_bytes(files[1].path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.safetensors is truncated .* Remove the file first\."):
        record(loaded, prompts, folder)
    files[1].path.unlink()
    assert [file.load().name for file in record(loaded, prompts, folder)] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("last", "memory_mib", "sentence"),
    [
        (make_prompt("long", 0, n_prompt=251), 1024, "the prompt has 251 tokens and 6 more"),
        (make_prompt("fits", 0), 0, "more than the 0 MiB allowed"),
    ],
    ids=["positions", "memory"],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is(
    loaded: LoadedModel, prompts: list[Prompt], folder: Path, last: Prompt, memory_mib: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        record(loaded, [*prompts, last], folder, memory_mib=memory_mib)
    assert not folder.exists()


@pytest.mark.parametrize(
    "prompts",
    [[], [make_prompt("a", 0), make_prompt("a", 1)], [make_prompt("a", 0), make_prompt("b", 1, n_steps=7)]],
    ids=["none", "same name", "different steps"],
)
def test_prompts_that_make_no_folder_are_refused(loaded: LoadedModel, prompts: list[Prompt], folder: Path) -> None:
    with pytest.raises(ValueError, match="prompts"):
        record(loaded, prompts, folder)


def test_a_folder_that_cannot_be_written_to_is_refused(
    loaded: LoadedModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match=r"cannot write traces to .*file: File exists\."):
        record(loaded, prompts, tmp_path / "file")
