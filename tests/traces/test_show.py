from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from traces import Trace, write_trace
from traces.show import main
from traces.summary import summarise

MakeTrace = Callable[..., Trace]
Run = Callable[..., tuple[int, str, str]]


# Name, kind and steps of the traces in `folder`.
TRACES = (("a", "code", 9), ("b", "prose", 5), ("c", "prose", 7))


@pytest.fixture
def folder(make_trace: MakeTrace, tmp_path: Path) -> Path:
    """Two kinds, three traces."""
    for name, kind, n_steps in TRACES:
        write_trace(make_trace(name, kind, n_steps=n_steps, seed=n_steps), tmp_path / "traces")
    return tmp_path / "traces"


@pytest.fixture(scope="module")
def shown(make_trace: MakeTrace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the standard output of the command, run on the same traces in a process of its own."""
    folder = tmp_path_factory.mktemp("traces")
    for name, kind, n_steps in TRACES:
        write_trace(make_trace(name, kind, n_steps=n_steps, seed=n_steps), folder)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "traces.show", str(folder)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def test_the_command_ends_with_one_json_line_and_its_pictures_exist(shown: tuple[Path, str]) -> None:
    folder, out = shown
    result = json.loads(out.splitlines()[-1])
    mass = result.pop("recovered_mass")
    pictures = [Path(picture) for picture in result.pop("pictures")]
    assert result == {
        "traces": 3,
        "steps": 21,
        "max_age": 4,
        "layers": 2,
        "kv_heads": 3,
        "model": "tiny",
        "k": 64,
    }
    assert list(mass) == ["1", "2", "4"]
    assert len(pictures) == 3
    for picture in pictures:
        assert picture.parent == folder / "pictures"
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted((folder / "pictures").iterdir()) == sorted(pictures)


def test_the_json_line_gives_the_means_over_all_traces(shown: tuple[Path, str], make_trace: MakeTrace) -> None:
    overall, _ = summarise(make_trace(kind=kind, n_steps=n, seed=n) for _, kind, n in TRACES)
    mass = json.loads(shown[1].splitlines()[-1])["recovered_mass"]
    assert list(mass.values()) == pytest.approx(overall.by_age("recovered_mass")[[0, 1, 3]], abs=1e-6)


def test_the_table_has_a_row_for_each_kind_and_one_for_all(shown: tuple[Path, str]) -> None:
    out = shown[1]
    rows = [line.split()[:4] for line in out.splitlines()]
    assert ["code", "1", "5", "9"] in rows
    assert ["prose", "2", "10", "12"] in rows
    assert ["all", "3", "15", "21"] in rows
    for title in ("Recovered mass", "Overlap", "Query similarity"):
        assert title in out


def test_out_takes_the_pictures_elsewhere(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "else" / "where"
    code, stdout, _ = run(main, str(folder), "--out", str(out))
    assert code == 0
    assert {Path(picture).parent for picture in json.loads(stdout.splitlines()[-1])["pictures"]} == {out}
    assert not (folder / "pictures").exists()


def test_an_age_that_no_step_has_is_null_and_a_dash(run: Run, make_trace: MakeTrace, tmp_path: Path) -> None:
    write_trace(make_trace(n_steps=2, max_age=4), tmp_path)
    code, out, _ = run(main, str(tmp_path))
    assert code == 0
    mass = json.loads(out.splitlines()[-1])["recovered_mass"]
    assert mass["2"] is not None
    assert mass["4"] is None
    assert any(line.split()[0:1] == ["prose"] and line.split()[-1] == "-" for line in out.splitlines())


def test_kinds_with_brackets_are_printed_as_they_are(run: Run, make_trace: MakeTrace, tmp_path: Path) -> None:
    write_trace(make_trace(kind="[bold]x[/bold]"), tmp_path)
    code, out, _ = run(main, str(tmp_path))
    assert code == 0
    assert "[bold]x[/bold]" in out


def test_progress_over_many_traces_goes_to_stderr(run: Run, make_trace: MakeTrace, tmp_path: Path) -> None:
    for index in range(8):
        write_trace(make_trace(f"trace-{index}", n_steps=2, max_age=2), tmp_path)
    code, out, err = run(main, str(tmp_path))
    assert code == 0
    assert "8/8" in err
    assert "8/8" not in out


class TestBadInput:
    def refused(self, run: Run, *arguments: str) -> str:
        code, out, err = run(main, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    def test_a_missing_folder(self, run: Run, tmp_path: Path) -> None:
        assert "gone is no folder of traces" in self.refused(run, str(tmp_path / "gone"))

    def test_an_empty_folder(self, run: Run, tmp_path: Path) -> None:
        assert "holds no traces: record some" in self.refused(run, str(tmp_path))

    def test_a_folder_of_other_safetensors(self, run: Run, tmp_path: Path) -> None:
        save_file({"weight": np.zeros(3)}, tmp_path / "model.safetensors")
        assert "model.safetensors is no trace" in self.refused(run, str(tmp_path))

    def test_a_truncated_trace_among_whole_ones(self, run: Run, folder: Path) -> None:
        path = folder / "b.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        err = self.refused(run, str(folder))
        assert "b.safetensors is truncated" in err
        assert "record it again" in err

    def test_traces_of_two_selections(self, run: Run, folder: Path, make_trace: MakeTrace) -> None:
        write_trace(make_trace("d", k=128), folder)
        assert "mixes traces" in self.refused(run, str(folder))

    def test_a_map_at_an_age_that_was_not_recorded(self, run: Run, folder: Path) -> None:
        assert "recorded ages 1 to 4, not 5" in self.refused(run, str(folder), "--age", "5")
        assert "--age" in self.refused(run, str(folder), "--age", "0")

    def test_a_file_where_the_pictures_should_go(self, run: Run, folder: Path) -> None:
        taken = folder / "a.safetensors"
        assert "cannot write pictures to" in self.refused(run, str(folder), "--out", str(taken))

    def test_no_folder_at_all(self, run: Run) -> None:
        assert "folder" in self.refused(run)
