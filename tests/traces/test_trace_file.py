from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from traces import Trace, TraceFile, TraceFolder, TraceHeader, trace_file, write_trace
from traces.trace_file import METADATA_KEY

MakeTrace = Callable[..., Trace]

OPEN_FILES = Path("/proc/self/fd")


def assert_same_bits(mine: Trace, theirs: Trace) -> None:
    assert mine.header == theirs.header
    for name, array in theirs.arrays().items():
        loaded = getattr(mine, name)
        assert (loaded.dtype, loaded.shape) == (array.dtype, array.shape), name
        # Bytes and not values: NaN is unequal to itself.
        assert loaded.tobytes() == np.ascontiguousarray(array).tobytes(), name


def write_with_header(path: Path, arrays: dict[str, np.ndarray], header: str) -> TraceFile:
    save_file(arrays, path, metadata={METADATA_KEY: header})
    return TraceFile(path)


class TestRoundTrip:
    def test_a_trace_comes_back_bit_for_bit_with_its_nans(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        trace = make_trace()
        assert np.isnan(trace.recovered_mass).any()
        assert_same_bits(write_trace(trace, tmp_path).load(), trace)

    @settings(max_examples=30, deadline=None)
    @given(
        n_steps=st.integers(0, 5),
        max_age=st.integers(1, 5),
        units=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        n_prompt_tokens=st.integers(1, 4),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_a_trace_of_any_shape_comes_back_bit_for_bit(self, make_trace: MakeTrace, **shape: Any) -> None:
        trace = make_trace(**shape)
        with tempfile.TemporaryDirectory() as folder:
            assert_same_bits(write_trace(trace, folder).load(), trace)

    def test_an_array_that_is_a_view_is_written_as_it_reads(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        trace = make_trace(units=(3, 3))
        view = dataclasses.replace(trace, overlap=trace.overlap.swapaxes(2, 3))
        assert_same_bits(write_trace(view, tmp_path).load(), view)

    def test_one_array_can_be_read_alone(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        trace = make_trace()
        assert np.array_equal(write_trace(trace, tmp_path).array("fresh_mass"), trace.fresh_mass)

    def test_the_file_is_named_after_the_prompt_in_a_folder_made_for_it(
        self, make_trace: MakeTrace, tmp_path: Path
    ) -> None:
        written = write_trace(make_trace("poem-3"), tmp_path / "new" / "folder")
        assert written.path == tmp_path / "new" / "folder" / "poem-3.safetensors"

    def test_writing_again_replaces_the_trace(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        write_trace(make_trace(seed=1), tmp_path)
        write_trace(make_trace(seed=2), tmp_path)
        assert_same_bits(TraceFolder(tmp_path)[0].load(), make_trace(seed=2))
        assert len(TraceFolder(tmp_path)) == 1

    def test_the_digest_is_that_of_the_bytes(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        written = write_trace(make_trace(), tmp_path)
        assert written.digest() == "sha256:" + hashlib.sha256(written.path.read_bytes()).hexdigest()


class TestMapping:
    @settings(max_examples=20, deadline=None)
    @given(
        n_steps=st.integers(0, 5),
        max_age=st.integers(1, 5),
        units=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        n_prompt_tokens=st.integers(1, 4),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_a_mapped_trace_is_the_trace_bit_for_bit(self, make_trace: MakeTrace, **shape: Any) -> None:
        trace = make_trace(**shape)
        with tempfile.TemporaryDirectory() as folder:
            assert_same_bits(write_trace(trace, folder).map(), trace)

    def test_its_arrays_share_one_mapping_that_nobody_can_write_to(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        file = write_trace(make_trace(), tmp_path)
        arrays = file.map().arrays().values()
        (whole,) = {id(array.base): array.base for array in arrays}.values()
        assert whole is not None
        assert whole.nbytes == file.path.stat().st_size
        for array in arrays:
            assert array.flags.aligned
            with pytest.raises(ValueError, match="read-only"):
                array[:] = 0

    @pytest.mark.skipif(not OPEN_FILES.exists(), reason="the system does not list open files")
    def test_it_keeps_one_file_open_and_closes_it_with_its_last_array(
        self, make_trace: MakeTrace, tmp_path: Path
    ) -> None:
        file = write_trace(make_trace(), tmp_path)

        def n_open() -> int:
            gc.collect()
            return sum(Path(os.path.realpath(entry)) == file.path for entry in OPEN_FILES.iterdir())

        overlap = file.map().overlap
        assert n_open() == 1
        del overlap
        assert n_open() == 0

    def test_a_trace_that_is_written_again_does_not_change_what_is_mapped(
        self, make_trace: MakeTrace, tmp_path: Path
    ) -> None:
        file = write_trace(make_trace(seed=1), tmp_path)
        mapped = file.map()
        write_trace(make_trace(n_steps=2, seed=2), tmp_path)
        assert_same_bits(mapped, make_trace(seed=1))
        # Its header is that of the file that it maps, not one that was read before.
        assert_same_bits(file.map(), make_trace(n_steps=2, seed=2))


class TestInterruptedWriting:
    @pytest.fixture
    def failing_save(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def save_half(arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
            Path(path).write_bytes(b"half a trace")
            raise OSError("no space left on device")

        monkeypatch.setattr(trace_file, "save_file", save_half)

    @pytest.mark.usefixtures("failing_save")
    def test_leaves_no_trace_under_the_final_name(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="no space"):
            write_trace(make_trace(), tmp_path)
        assert not list(tmp_path.glob("*.safetensors"))

    def test_leaves_the_trace_that_was_there(
        self, make_trace: MakeTrace, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        before = make_trace(seed=1)
        write_trace(before, tmp_path)
        request.getfixturevalue("failing_save")
        with pytest.raises(OSError, match="no space"):
            write_trace(make_trace(seed=2), tmp_path)
        assert_same_bits(TraceFolder(tmp_path)[0].load(), before)

    def test_its_remains_are_passed_over(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        write_trace(make_trace(), tmp_path)
        (tmp_path / "two.safetensors.partial").write_bytes(b"half a trace")
        (tmp_path / "notes.txt").write_text("not a trace")
        assert [file.path.name for file in TraceFolder(tmp_path)] == ["one.safetensors"]

    def test_the_name_is_taken_only_when_the_file_is_whole(
        self, make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trace = make_trace()
        whole = len(write_trace(trace, tmp_path / "elsewhere").path.read_bytes())
        sizes = []

        def replace(source: Path, target: Path) -> None:
            sizes.append(Path(source).stat().st_size)
            os.rename(source, target)

        monkeypatch.setattr(os, "replace", replace)
        write_trace(trace, tmp_path)
        assert sizes == [whole]


class TestBadFiles:
    @pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
    def test_a_truncated_file_is_named_and_the_sentence_says_to_record_it_again(
        self, make_trace: MakeTrace, tmp_path: Path, share: float
    ) -> None:
        path = write_trace(make_trace(), tmp_path).path
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])
        reads = [lambda: TraceFile(path).header, lambda: TraceFile(path).load(), lambda: TraceFile(path).map()]
        for read in [*reads, lambda: TraceFolder(tmp_path)]:
            with pytest.raises(ValueError, match="record it again") as caught:
                read()
            assert str(path) in str(caught.value)

    @pytest.mark.parametrize("missing", [1, 2, 7, 8, 9])
    def test_a_file_short_of_a_few_bytes_is_truncated(
        self, make_trace: MakeTrace, tmp_path: Path, missing: int
    ) -> None:
        path = write_trace(make_trace(), tmp_path).path
        path.write_bytes(path.read_bytes()[:-missing])
        with pytest.raises(ValueError, match=r"one\.safetensors is truncated.*record it again"):
            TraceFolder(tmp_path)

    def test_a_foreign_file_is_told_by_its_metadata(self, tmp_path: Path) -> None:
        save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"model\.safetensors is no trace: its metadata has no '{METADATA_KEY}'"):
            TraceFolder(tmp_path)

    def test_a_file_without_metadata_is_no_trace(self, tmp_path: Path) -> None:
        save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="its metadata has no"):
            TraceFolder(tmp_path)

    @pytest.mark.parametrize("text", ["", "not json", "[]", "{}", '{"temperature": 1}'])
    def test_a_header_of_other_fields_is_no_trace(self, make_trace: MakeTrace, tmp_path: Path, text: str) -> None:
        file = write_with_header(tmp_path / "x.safetensors", make_trace().arrays(), text)
        with pytest.raises(ValueError, match=r"x\.safetensors is no trace: "):
            _ = file.header

    def test_a_trace_of_another_format_is_refused(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        header = make_trace().header.to_json().replace("trace/2", "trace/3")
        file = write_with_header(tmp_path / "x.safetensors", make_trace().arrays(), header)
        with pytest.raises(ValueError, match="the header is not of format 'recycled-attention-trace/2'"):
            _ = file.header

    def test_a_trace_of_format_1_has_every_age(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        trace = make_trace(max_age=4)
        header = json.loads(trace.header.to_json())
        assert header.pop("ages") == [1, 2, 3, 4]
        old = json.dumps(header | {"format": "recycled-attention-trace/1", "max_age": 4})
        read = write_with_header(tmp_path / "x.safetensors", trace.arrays(), old).load()
        assert read.header == trace.header
        np.testing.assert_array_equal(read.overlap, trace.overlap)

    @pytest.mark.parametrize("name", ["tokens", "overlap", "token_log_prob"])
    def test_a_missing_array_is_named(self, make_trace: MakeTrace, tmp_path: Path, name: str) -> None:
        trace = make_trace()
        arrays = trace.arrays()
        del arrays[name]
        file = write_with_header(tmp_path / "x.safetensors", arrays, trace.header.to_json())
        with pytest.raises(ValueError, match=rf"x\.safetensors is no whole trace.*{name}"):
            file.load()
        with pytest.raises(ValueError, match=rf"x\.safetensors is no whole trace.*{name}"):
            file.map()
        with pytest.raises(ValueError, match=rf"x\.safetensors is no whole trace.*{name}"):
            file.array(name)

    def test_an_array_too_many_is_named(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        trace = make_trace()
        for extra in (np.zeros(3), np.zeros(3, dtype=np.float32)):
            arrays = trace.arrays() | {"entropy": extra}
            file = write_with_header(tmp_path / "x.safetensors", arrays, trace.header.to_json())
            for read in (file.load, file.map):
                with pytest.raises(ValueError, match=r"x\.safetensors is no whole trace.*entropy"):
                    read()

    def test_an_array_of_another_shape_than_the_header_says_is_named(
        self, make_trace: MakeTrace, tmp_path: Path
    ) -> None:
        trace = make_trace()
        longer = dataclasses.replace(trace.header, n_steps=7)
        file = write_with_header(tmp_path / "x.safetensors", trace.arrays(), longer.to_json())
        for read in (file.load, file.map):
            with pytest.raises(ValueError, match=r"x\.safetensors is no whole trace: recovered_mass must have shape"):
                read()

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
    def test_a_file_that_is_cut_after_its_header_was_read_is_not_mapped(
        self, make_trace: MakeTrace, tmp_path: Path, share: float
    ) -> None:
        file = write_trace(make_trace(), tmp_path)
        _ = file.header
        whole = file.path.read_bytes()
        file.path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"one\.safetensors(: cannot mmap an empty| is no whole trace)"):
            file.map()

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"cannot read the trace .*gone\.safetensors"):
            _ = TraceFile(tmp_path / "gone.safetensors").header

    def test_a_folder_with_the_name_of_a_trace_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").mkdir()
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            TraceFolder(tmp_path)


class TestLaziness:
    def test_opening_a_folder_and_reading_headers_reads_no_array(
        self, make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("a", "b"):
            write_trace(make_trace(name), tmp_path)
        read = []

        class Watched:
            def __init__(self, *arguments: Any, **options: Any) -> None:
                self._file = real_open(*arguments, **options)

            def __enter__(self) -> Watched:
                self._file.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self._file.__exit__(*error)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def get_tensor(self, name: str) -> np.ndarray:
                read.append(name)
                return np.asarray(self._file.get_tensor(name))

        real_open = trace_file.safe_open
        monkeypatch.setattr(trace_file, "safe_open", Watched)
        folder = TraceFolder(tmp_path)
        assert [file.header.prompt["name"] for file in folder] == ["a", "b"]
        assert read == []
        folder[0].array("overlap")
        assert read == ["overlap"]

    def test_a_header_is_read_once(
        self, make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = write_trace(make_trace(), tmp_path)
        header = file.header
        monkeypatch.setattr(trace_file, "safe_open", None)
        assert file.header is header
        assert isinstance(header, TraceHeader)


def test_the_file_can_be_read_without_this_project(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace()
    path = write_trace(trace, tmp_path).path
    assert np.array_equal(load_file(path)["tokens"], trace.tokens)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    header = json.loads(metadata[METADATA_KEY])
    assert header["format"] == "recycled-attention-trace/2"
    assert header["prompt"]["name"] == "one"


def test_equal_traces_are_equal_bytes(make_trace: MakeTrace, tmp_path: Path) -> None:
    digests = {write_trace(make_trace(), tmp_path / str(attempt)).digest() for attempt in range(8)}
    assert len(digests) == 1


class TestValues:
    @pytest.mark.parametrize(
        ("name", "number", "message"),
        [
            ("recovered_mass", 1.5, r"recovered_mass must lie in \[0, 1\], and 1\.5 does not"),
            ("fresh_mass", -0.5, r"fresh_mass must lie in \[0, 1\], and -0\.5 does not"),
            ("overlap", np.inf, r"overlap must lie in \[0, 1\], and inf does not"),
            ("query_similarity", -2, r"query_similarity must lie in \[-1, 1\], and -2 does not"),
            ("tokens", -1, "tokens must be token ids, 0 or more, not -1"),
        ],
    )
    def test_a_number_that_cannot_be_is_named(
        self, make_trace: MakeTrace, tmp_path: Path, name: str, number: float, message: str
    ) -> None:
        trace = make_trace()
        getattr(trace, name)[..., -1] = number
        file = write_trace(trace, tmp_path)
        with pytest.raises(ValueError, match=message):
            file.load()
        if name in ("recovered_mass", "fresh_mass", "tokens"):
            with pytest.raises(ValueError, match=message):
                file.map()

    def test_an_array_of_another_type_is_named(self, make_trace: MakeTrace, tmp_path: Path) -> None:
        trace = make_trace()
        file = write_trace(dataclasses.replace(trace, overlap=trace.overlap.astype(np.float16)), tmp_path)
        with pytest.raises(ValueError, match="overlap is of type float16, not float32"):
            file.load()

    def test_a_fifo_is_refused_and_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "one.safetensors")
        with pytest.raises(ValueError, match="is no ordinary file"):
            TraceFolder(tmp_path)

    @pytest.mark.parametrize(
        ("part", "value"),
        [
            ("prompt", {"name": "/tmp/elsewhere"}),
            ("prompt", {"name": "../elsewhere"}),
            ("prompt", {"kind": ["prose"]}),
            ("prompt", {"kind": "x" * 10**6}),
            ("prompt", {"n_prompt_tokens": 2.5}),
            ("model", {"id": "\x1b[31m"}),
            ("model", {"layers": 10**9}),
            ("selection", {"k": 0}),
            ("selection", {"unknown": 1}),
        ],
    )
    def test_a_header_is_checked_before_anything_uses_it(
        self, make_trace: MakeTrace, tmp_path: Path, part: str, value: dict[str, Any]
    ) -> None:
        trace = make_trace()
        header = json.loads(trace.header.to_json())
        header[part] |= value
        file = write_with_header(tmp_path / "one.safetensors", trace.arrays(), json.dumps(header))
        with pytest.raises(ValueError, match="is no trace: ") as refusal:
            _ = file.header
        assert len(str(refusal.value)) <= 300
