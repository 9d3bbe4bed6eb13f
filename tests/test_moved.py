"""Paths that README and docs named in 0.1 import for one version more."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BASELINES = (
    *("CHECKS_EVERY", "OUR_SET", "PUBLISHED_THRESHOLD", "SFI_MAX_AGE", "STRIDES", "baselines", "schedules"),
    *("h2o_set", "refreshkv_set", "snapkv_set", "streaming_llm_set", "tova_set"),
)

# Old path to the new one, and of all its names that still exist, where they are.
MOVED = {
    "recycler.engine": (
        "recycler.decode.engine",
        {
            "Decoding": "recycler.decode.engine",
            "Engine": "recycler.decode.engine",
            "NotCovered": "recycler.model.decoder_parts",
            "Totals": "recycler.decode.counts",
            "engine_for": "recycler.decode.engines",
        },
    ),
    "recycler.engine_run": (
        "recycler.decode.engine_run",
        {
            "CACHE_CHANGED": "recycler.decode.cache_watch",
            "EngineRun": "recycler.decode.engine_run",
            "ForwardCall": "recycler.decode.forward_call",
            "other_padding": "recycler.decode.cache_watch",
        },
    ),
    "recycler.kv_layer": (
        "recycler.decode.cache",
        dict.fromkeys(("GrowingTokens", "KvLayer", "growing_layers"), "recycler.decode.cache"),
    ),
    "recycler.model_weights": (
        "recycler.model.decoder_parts",
        dict.fromkeys(("DecoderParts", "bias_of", "decoder_parts"), "recycler.model.decoder_parts"),
    ),
    "recycler.size_losses": (
        "recycler.record.size_losses",
        dict.fromkeys(("measure_size_losses", "set_sizes"), "recycler.record.size_losses"),
    ),
    "recycler.cpu": ("recycler.decode.cpu", {}),
    "recycler.cuda": ("recycler.decode.cuda", {}),
    "recycler.fidelity": (
        "recycler.evaluate",
        {
            "Method": "recycler.evaluate.method",
            "Outcome": "recycler.evaluate.outcome",
            "PromptOutcome": "recycler.evaluate.outcome",
            "Scheduled": "recycler.evaluate.method",
            "baselines": "recycler.evaluate.baselines",
        },
    ),
    "recycler.fidelity.baselines": (
        "recycler.evaluate.baselines",
        dict.fromkeys(BASELINES, "recycler.evaluate.baselines"),
    ),
    "tuning.hindsight": ("tuning.divide.hindsight", {"hindsight": "tuning.divide.hindsight"}),
}

GONE = {
    ("recycler.fidelity", "Chosen"): "recycler.evaluate.Method",
    ("recycler.fidelity", "EveryStep"): "recycler.evaluate.Method",
    ("recycler.fidelity", "FreshTopK"): "recycler.evaluate.baselines.fresh_top_k",
    ("recycler.fidelity", "Quest"): "recycler.evaluate.Quest",
    ("recycler.fidelity", "TokenSelector"): "recycler.evaluate.Method",
    ("recycler.fidelity.baselines", "dynamic_name"): "DynamicSchedule",
}


@pytest.fixture(autouse=True)
def _not_imported_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in MOVED:
        monkeypatch.delitem(sys.modules, path, raising=False)


def run_import(statement: str) -> tuple[dict[str, object], list[warnings.WarningMessage]]:
    """Names after an import statement, and what was warned of."""
    names: dict[str, object] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile(statement, "the user's file", "exec"), names)
    return names, caught


def test_the_table_has_every_module_of_the_folders() -> None:
    files = [file for package in ("recycler", "tuning") for file in (ROOT / package / "moved").rglob("*.py")]
    paths = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    shims = {path.replace(".moved", "", 1).removesuffix(".__init__") for path in paths}
    assert shims - {"recycler", "tuning"} == set(MOVED)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_warns_once_whoever_imports_it_and_names_the_new_one(old: str) -> None:
    new, _ = MOVED[old]
    _, caught = run_import(f"import {old}\nimport {old}")
    about = [one for one in caught if str(one.message).startswith(f"{old} is now {new}")]
    assert [(one.category, one.filename, one.lineno) for one in about] == [(DeprecationWarning, "the user's file", 1)]
    # The package that a path is in may have moved too.
    assert {one.category for one in caught} == {DeprecationWarning}
    assert len(caught) == old.count(".")


@pytest.mark.parametrize(("old", "name"), [(old, name) for old, (_, names) in MOVED.items() for name in names])
def test_an_old_path_gives_the_very_objects_of_the_new_one(old: str, name: str) -> None:
    place = MOVED[old][1][name]
    names, caught = run_import(f"from {old} import {name}")
    assert names[name] is getattr(importlib.import_module(place), name)
    assert place in str(caught[-1].message) or place.startswith(MOVED[old][0])


@pytest.mark.parametrize("name", ["arrays", "engine", "walk"])
def test_the_modules_of_a_folder_that_moved_come_out_of_the_old_one(name: str) -> None:
    names, _ = run_import(f"from recycler.cpu import {name}")
    assert names[name] is importlib.import_module(f"recycler.decode.cpu.{name}")


@pytest.mark.parametrize("old", ["recycler.cpu", "recycler.cuda", "recycler.fidelity", "recycler.fidelity.baselines"])
def test_a_name_that_never_was_is_refused_as_ever(old: str) -> None:
    with pytest.raises(ImportError, match="nothing_like_it"):
        run_import(f"from {old} import nothing_like_it")
    names, _ = run_import(f"import {old} as old")
    assert not hasattr(names["old"], "nothing_like_it")


@pytest.mark.parametrize(("old", "name"), GONE)
def test_a_name_that_is_gone_is_refused_with_a_way_out(old: str, name: str) -> None:
    with pytest.raises(ImportError, match=f"^{old}.{name} is gone: .*{GONE[old, name]}.*\\.$"):
        run_import(f"from {old} import {name}")


def test_packages_import_nothing_of_the_old_paths_by_themselves() -> None:
    script = (
        f"import sys, recycler, tuning; print([path for path in {list(MOVED)!r} if path in sys.modules], "
        "[name for name in sys.modules if '.moved' in name])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"
