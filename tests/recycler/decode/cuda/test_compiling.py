"""Compiling is told of once; loading is not."""

from __future__ import annotations

import logging

import pytest
from triton import knobs

from recycler.decode.cuda import compiling
from recycler.decode.cuda.compiling import told_of_compiling


def test_one_line_tells_of_what_is_compiled_and_none_of_what_is_loaded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling._tell_that_kernels_compile.cache_clear()
    heard: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **compiled: heard.append(compiled["cache_hit"]))
    others = knobs.compilation.listener
    with caplog.at_level(logging.WARNING, "recycler"), told_of_compiling():
        tell = knobs.compilation.listener
        assert tell is not None
        tell(cache_hit=True)
        assert not caplog.messages
        tell(cache_hit=False)
        tell(cache_hit=False)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith(knobs.cache.dir)
    # Whoever listened before goes on listening.
    assert heard == [True, False, False]
    assert knobs.compilation.listener is others
