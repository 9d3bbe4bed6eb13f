"""What all commands of the project have in common."""

from __future__ import annotations

import runpy
import sys

import pytest

from policies import written_by


# Another test may have imported the module before, and here it runs once more.
@pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(
    "command",
    [
        "policies",
        "recycler.evaluate",
        "recycler.export",
        "recycler.generate",
        "recycler.lm_eval",
        "recycler.record",
        "recycler.sensitivity",
        "traces.show",
        "tuning.optimize",
    ],
)
def test_a_command_tells_its_version(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [command, "--version"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(command, run_name="__main__")
    assert caught.value.code in (0, None)
    assert capsys.readouterr() == (f"{written_by()}\n", "")
