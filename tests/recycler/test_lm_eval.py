"""The command without lm-eval; what it does with it is in `harness/`."""

from __future__ import annotations

import sys

import pytest

from recycler.lm_eval import main


def test_without_lm_eval_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["recycler.lm_eval", "--tasks", "none"])
    # What an import finds instead of a package that is not there.
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    with pytest.raises(
        SystemExit, match=r'^error: this needs lm-eval .*: run `pip install "recycled-attention\[lm-eval\]"`\.$'
    ):
        main()
