"""Compiled kernels are stamped with the digest of all their sources, and are there before the first step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recycler.decode.cpu import compiled, decide, dense, walk

REPOSITORY = Path(compiled.__file__).parents[3]


@pytest.mark.parametrize("kernel", [dense.project, walk.attend, dense.feed, dense.predict, decide.run_program])
def test_what_python_calls_is_stamped_with_the_digest_of_the_sources(kernel: object) -> None:
    stamp = kernel._cache._cache_file._source_stamp  # type: ignore[attr-defined]
    assert stamp[-1] == compiled._SOURCES
    assert len(stamp[-1]) == 64


def sources() -> list[Path]:
    folder = Path(compiled.__file__).parent
    policies = REPOSITORY / "policies"
    return [*sorted(folder.glob("*.py")), policies / "program.py", *sorted((policies / "compiled").glob("*.py"))]


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.name)
def test_the_digest_changes_with_every_source(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    before, read = compiled._digest_of_sources(), Path.read_bytes
    assert compiled._digest_of_sources() == before
    changed = {source.resolve()}
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.resolve() in changed))
    assert compiled._digest_of_sources() != before


# In a process of its own: here, other tests have compiled kernels, or loaded them.
BEFORE_THE_FIRST_TOKEN = """
import contextlib, io, sys, torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM
from policies import FixedStride, Selection
from recycler import recycled
from recycler.decode.cpu import decide, dense, given, many, votes, walk

KERNELS = (dense.project, dense.feed, dense.predict, walk.attend, many.attend_many, votes.choose_by_votes,
           given.take_in, decide.run_program, decide.prepare)
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=8, vocab_size=97)
llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, layer_types=["full_attention"] * 2, attn_implementation="eager")).eval()
tokens = torch.arange(80).reshape(2, 40)
padded = (torch.arange(40) >= torch.tensor([[3], [0]])).long()
for model, options in ((llama, {}), (llama, {"audit": 4}), (llama, {"exact": True}), (gemma, {})):
    with recycled(model, FixedStride(3), Selection(16, window=4), **options) as session:
        before = [len(kernel.signatures) for kernel in KERNELS]
        model.generate(tokens, attention_mask=padded, max_new_tokens=9, do_sample=False)
    grown = [len(kernel.signatures) for kernel in KERNELS] != before
    print(session.receipt().engine, sum(before), grown)
"""


def test_entering_a_with_compiles_or_loads_all_that_its_steps_run_on() -> None:
    command = [sys.executable, "-W", "ignore", "-c", BEFORE_THE_FIRST_TOKEN]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert out == ["cpu", "6", "False", "cpu", "8", "False", "cpu", "8", "False", "cpu_modules", "9", "False"]
