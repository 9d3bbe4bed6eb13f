"""Recording many prompts into one folder, leaving what it holds already as it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import Selection
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt
from recycler.record.one_prompt import heads_at_once, record_trace, trace_header
from traces import TraceFile, TraceHeader
from traces.reporting.differences import differences
from traces.reporting.folder_lock import folder_locked
from traces.trace_file import SUFFIX
from traces.trace_on_disk import trace_on_disk

_WAY_OUT = "record into another folder, or remove the trace."


def record_prompts(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    selection: Selection,
    folder: Path | str,
    *,
    max_age: int,
    memory_mib: int = 1024,
) -> list[TraceFile]:
    """Record the prompts that `folder` holds no trace of, one whole file each, with progress on standard error.

    What can be refused is refused before the first prompt is recorded. Remains of an interrupted recording are removed.

    Args:
        loaded: The model.
        prompts: Texts with different names and equally many steps.
        selection: How sets are chosen.
        folder: Where the traces go; made if there is none.
        max_age: Oldest set to record, in steps, at least 1.
        memory_mib: As in `record_trace`, in MiB.

    Returns:
        The traces in the order of the prompts, those found included.

    Raises:
        ValueError: As `find_recorded` and `record_trace` do, or if nothing can be written to `folder`, or another
            process records into it.
    """
    folder = Path(folder)
    recorded = find_recorded(loaded, prompts, selection, folder, max_age=max_age)
    missing = [prompt for prompt in prompts if prompt.name not in recorded]
    for prompt in missing:
        heads_at_once(loaded.model, prompt, selection, memory_mib)
    _make(folder)
    bar = tqdm(desc="recording", unit="prompt", total=len(prompts), initial=len(recorded), disable=not missing)
    with folder_locked(folder) if missing else nullcontext(), bar as progress:
        if missing:
            _clear(folder)
        for prompt in missing:
            progress.set_postfix_str(prompt.name)
            header = trace_header(loaded.model, prompt, selection, max_age=max_age, model_id=loaded.id)
            with trace_on_disk(header, folder) as trace:
                record_trace(
                    loaded.model,
                    prompt,
                    selection,
                    max_age=max_age,
                    model_id=loaded.id,
                    memory_mib=memory_mib,
                    into=trace,
                )
            recorded[prompt.name] = TraceFile(folder / (prompt.name + SUFFIX))
            progress.update()
    return [recorded[prompt.name] for prompt in prompts]


def find_recorded(
    loaded: LoadedModel, prompts: Sequence[Prompt], selection: Selection, folder: Path | str, *, max_age: int
) -> dict[str, TraceFile]:
    """Find the prompts that are recorded already, and make sure that the others may join them.

    A folder holds traces of one model, selection, number of steps, oldest age and set of package versions.

    Args:
        loaded: The model.
        prompts: Texts with different names and equally many steps.
        selection: How sets are chosen.
        folder: A folder of traces; one that does not exist holds none.
        max_age: Oldest age, in steps.

    Returns:
        Name of a prompt to its trace.

    Raises:
        ValueError: If a trace in the folder is damaged, has other settings, or has the name of a prompt and another
            text; if prompts share a name or differ in steps, or there are none; if `max_age` is below 1.
    """
    if not prompts:
        raise ValueError("there are no prompts to record.")
    names = {prompt.name for prompt in prompts}
    if len(names) < len(prompts) or len({prompt.n_steps for prompt in prompts}) > 1:
        raise ValueError("prompts that are recorded together need different names and equally many steps.")
    headers = {
        prompt.name: _as_read(trace_header(loaded.model, prompt, selection, max_age=max_age, model_id=loaded.id))
        for prompt in prompts
    }
    settings = _settings(headers[prompts[0].name])
    tokens = {prompt.name: prompt.tokens for prompt in prompts}
    recorded = {}
    for path in sorted(Path(folder).glob("*" + SUFFIX)):
        file, name = TraceFile(path), path.name.removesuffix(SUFFIX)
        try:
            header, held_tokens = file.header, file.array("tokens")
        except ValueError as error:
            raise ValueError(f"{error} Remove the file first.") from error
        _refuse_other(path, _settings(header), settings)
        if name not in names:
            continue
        _refuse_other(path, _text(header), _text(headers[name]))
        if not np.array_equal(held_tokens, tokens[name]):
            raise ValueError(f"{path} was recorded on another text: {_WAY_OUT}")
        recorded[name] = file
    return recorded


def _settings(header: TraceHeader) -> dict[str, Any]:
    """What all traces of a folder have in common, by the name to use in a sentence."""
    return {
        **{f"model {name}": value for name, value in header.model.items()},
        **header.selection,
        "steps": header.n_steps,
        "max_age": header.max_age,
        **{f"{package} version": value for package, value in header.versions.items()},
    }


def _text(header: TraceHeader) -> dict[str, Any]:
    # Not the source: the same text may be found at another path.
    return {
        "kind of text": header.prompt["kind"],
        "prompt tokens": header.prompt["n_prompt_tokens"],
    }


def _refuse_other(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if found := differences(theirs, ours):
        raise ValueError(f"{path} was recorded with {found}: {_WAY_OUT}")


def _as_read(header: TraceHeader) -> TraceHeader:
    """The header as it comes out of a file, enumerations turned into text."""
    return TraceHeader.from_json(header.to_json())


def _make(folder: Path) -> None:
    with _refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _clear(folder: Path) -> None:
    """Remove what an interrupted recording left; nobody else's, as the folder is held."""
    with _refused(folder):
        for partial in folder.glob("*" + SUFFIX + ".partial"):
            partial.unlink()


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write traces to {folder}: {error.strerror}.") from error
