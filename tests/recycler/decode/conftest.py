"""The engines that must keep the contract, one line each, and how its tests run them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from triton.runtime import interpreter

from policies import Selection, StepPolicy, StepSignals
from recycler.decode import engines
from recycler.decode.cpu.modules import CpuModulesEngine
from recycler.decode.cuda.engine import CudaEngine
from recycler.decode.cuda.machine import Machine
from recycler.decode.engine import Engine
from recycler.decode.per_row import PerRow
from recycler.decode.read_prompt import ReadPrompt, read_prompt
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled
from recycler.decode.rows import Rows, decode_rows
from recycler.decode.session import Session
from recycler.model.attention_hook import attention_replaced

HAS_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if HAS_GPU else CPU
# Left padding of the rows of a batch.
PADDING = (0, 5, 11)
# Small shares, tiles and chunks, so that little work is cut into many; on a GPU, captured and compiled.
MACHINE = Machine(n_programs=3, tile_bytes=16 * 16 * 4, chunk_tokens=16, captures=HAS_GPU, compiles=HAS_GPU)


@dataclass(frozen=True)
class Subject:
    """An engine before the contract's tests.

    Attributes:
        name: What its receipts say.
        engine: Makes it; None for the plain path.
        model: Settings of the tiny models that it runs.
        atol: How far logits and measures may be from those of a decoder in plain Python.
        narrow: Types that round more than `model`'s, and that it runs.
        n_steps: How many steps a run takes.
        n_rows: How many rows a batch has.
        thorough: False if one case of a claim must do, because a step takes long, or another subject has most of it.
        device: Where it runs.
    """

    name: str
    engine: Callable[[PreTrainedModel], Engine] | None
    model: Mapping[str, Any] = field(default_factory=dict)
    atol: float = 1e-10
    narrow: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    n_steps: int = 20
    n_rows: int = 3
    thorough: bool = True
    device: torch.device = CPU


SUBJECTS = [
    # Sessions run the model's own forward then; rows of one prompt run on `PlainEngine`.
    Subject("plain", None, narrow=(torch.float32, torch.bfloat16, torch.float16)),
    Subject("cpu", engines.engine_for),
    # All but queries, keys and values is what `cpu` runs: one case of each claim.
    Subject("cpu_modules", lambda model: CpuModulesEngine(model, "a test asks for it"), thorough=False),
    # In float32, sums of another order.
    Subject(
        name="cuda",
        engine=lambda model: CudaEngine(model, MACHINE),
        model={"head_dim": 16, "dtype": torch.float32},
        atol=3e-5,
        narrow=(torch.bfloat16, torch.float16),
        n_steps=6,
        n_rows=2,
        thorough=False,
        device=DEVICE,
    ),
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only a GPU can do where there is none, and further cases of claims where a step takes long."""
    left_out = []
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
        subject = getattr(item, "callspec", None) and item.callspec.params.get("runs")  # type: ignore[attr-defined]
        if isinstance(subject, Subject) and not subject.thorough and item.get_closest_marker("further_case"):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@dataclass
class Run:
    """What came out of decode steps; arrays per step are `(steps, rows, layers, kv_heads)`.

    Attributes:
        logits: `(steps, rows, vocabulary)`, on the CPU.
        receipt: Of a session.
        full: Of rows that share a prompt: what units count in the full share.
        tokens_read: Of the same rows.
    """

    logits: Tensor
    receipt: Receipt | None = None
    full: np.ndarray | None = None
    tokens_read: np.ndarray | None = None


class Runs:
    """Runs decoding on a subject; tests ask for the fixture `runs`."""

    padding = PADDING

    def __init__(self, subject: Subject, make_model: Callable[..., PreTrainedModel]) -> None:
        self.subject, self._make_model = subject, make_model

    def model(self, family: str = "llama", **more: Any) -> PreTrainedModel:
        """A tiny model for this engine."""
        model = self._make_model(family, **(dict(self.subject.model) | more))
        return model if self.subject.device.type == "cpu" else copy.deepcopy(model).to(self.subject.device)

    def plainly(self) -> Runs:
        """The same models without an engine."""
        return Runs(dataclasses.replace(self.subject, name="plain", engine=None), self._make_model)

    def session(self, model: PreTrainedModel, policy: StepPolicy, selection: Selection) -> Any:
        """`recycled` on this engine."""
        return recycled(model, policy, selection, fast=self.subject.engine is not None)

    def follow(
        self,
        model: PreTrainedModel,
        policy: StepPolicy,
        selection: Selection,
        tokens: Tensor,
        n_prompt: int,
        *,
        padding: Sequence[int] = PADDING,
        after_step: Callable[[Session, Any], None] = lambda session, cache: None,
    ) -> Run:
        """Feed tokens `(rows, n_prompt + steps)` with left padding, after the prompt one by one.

        `after_step` is called with the cache after the prompt too.
        """
        with self.session(model, policy, selection) as session:
            logits = fed(model, tokens, n_prompt, padding, lambda cache: after_step(session, cache))
        receipt = session.receipt()
        assert receipt.engine == self.subject.name
        return Run(logits, receipt)

    def rows(
        self, model: PreTrainedModel, policies: Sequence[StepPolicy], selection: Selection, prompt: Tensor, n_steps: int
    ) -> Rows:
        """Rows after a prompt `(tokens,)`, one per policy; after `(prompts, tokens)`, one per policy and prompt."""
        prompts = prompt.reshape(-1, prompt.shape[-1]).to(model.device)
        read = [read_prompt(model, one, n_steps, prompt_queries=[selection.prompt_queries]) for one in prompts]
        of_rows = [policy for policy in policies for _ in read]
        fast = self.subject.engine is not None
        return decode_rows(model, ReadPrompt.side_by_side(read), of_rows, selection, fast=fast)

    def follow_rows(
        self,
        model: PreTrainedModel,
        policies: Sequence[StepPolicy],
        selection: Selection,
        tokens: Tensor,
        n_prompt: int,
    ) -> Run:
        """Feed all rows the same tokens `(n_prompt + steps,)`, or of `(prompts, n_prompt + steps)` their prompt's."""
        rows = self.rows(model, policies, selection, tokens[..., :n_prompt], tokens.shape[-1] - n_prompt)
        text = tokens.reshape(-1, tokens.shape[-1])[:, n_prompt:].to(model.device)
        steps = [rows.step(of_prompts.repeat(len(policies))) for of_prompts in text.T]
        return Run(
            torch.stack([step.logits for step in steps]).cpu(),
            full=np.stack([step.full for step in steps]),
            tokens_read=np.stack([step.tokens_read for step in steps]),
        )


def fed(
    model: PreTrainedModel,
    tokens: Tensor,
    n_prompt: int,
    padding: Sequence[int],
    after_step: Callable[[Any], None] = lambda cache: None,
    before_step: Callable[[Tensor], None] = lambda given: None,
) -> Tensor:
    """Logits `(steps, rows, vocabulary)` of a model that is fed a text, after its prompt token by token."""
    mask = (torch.arange(tokens.shape[1]) >= torch.tensor(padding[: len(tokens)])[:, None]).long()
    places, mask, tokens = ((given.to(model.device)) for given in ((mask.cumsum(-1) - 1).clamp(min=0), mask, tokens))
    cache, begin, logits = None, 0, []
    with torch.no_grad():
        for end in range(n_prompt, tokens.shape[1] + 1):
            given = tokens[:, begin:end]
            before_step(given)
            how = {"attention_mask": mask[:, :end], "position_ids": places[:, begin:end]}
            output = model(given, past_key_values=cache, use_cache=True, **how)
            cache, begin = output.past_key_values, end
            logits.append(output.logits[:, -1].cpu())
            after_step(cache)
    return torch.stack(logits[1:])


@pytest.fixture
def runs_on(
    monkeypatch: pytest.MonkeyPatch, make_model: Callable[..., PreTrainedModel]
) -> Callable[[Subject | str], Runs]:
    """Makes the runs of a subject or of its name."""
    by_name = {subject.name: subject for subject in SUBJECTS}

    def runs_on(asked: Subject | str) -> Runs:
        subject = by_name[asked] if isinstance(asked, str) else asked
        if subject.engine is not None:
            monkeypatch.setattr(engines, "engine_for", subject.engine)
        return Runs(subject, make_model)

    return runs_on


@pytest.fixture(params=SUBJECTS, ids=lambda subject: subject.name)
def runs(request: pytest.FixtureRequest, runs_on: Callable[[Subject | str], Runs]) -> Runs:
    """A test that asks for it is a clause of the contract: it runs on every engine."""
    return runs_on(request.param)


@dataclass(frozen=True)
class Reference:
    """What a decoder in plain Python did; arrays are `(steps, rows, layers, kv_heads)`.

    Attributes:
        logits: `(steps, rows, vocabulary)`.
        seen: What policies are shown, and what was done, by name.
        values_read: Places whose values were read at any step, by `(layer, row, kv_head)`.
    """

    logits: Tensor
    seen: Mapping[str, np.ndarray]
    values_read: Mapping[tuple[int, int, int], set[int]]

    @property
    def full_counts(self) -> np.ndarray:
        """What each unit-step counts in the full share."""
        counts: np.ndarray = self.seen["full"] - self.seen["keys_only"] / 2
        return counts

    def assert_counted_by(self, receipt: Receipt) -> None:
        for name, seen in (("full_steps", "full"), ("keys_only_steps", "keys_only"), ("tokens_read", "tokens_read")):
            np.testing.assert_array_equal(getattr(receipt, name), self.seen[seen].sum((0, 1)), err_msg=name)


@pytest.fixture(scope="session")
def reference(plain_decoder: Callable[..., Any]) -> Callable[..., Reference]:
    """Decodes in plain Python as `Runs.follow` does on an engine; once for equal arguments."""
    # With their models, so that no other one gets the identity of one that is gone.
    known: dict[Any, tuple[PreTrainedModel, Reference]] = {}

    def decode(
        model: PreTrainedModel,
        policy: StepPolicy,
        selection: Selection,
        tokens: Tensor,
        n_prompt: int,
        *,
        padding: Sequence[int] = PADDING,
    ) -> Reference:
        asked = (id(model), repr(policy), repr(selection), str(tokens.tolist()), n_prompt, tuple(padding))
        if asked in known:
            return known[asked][1]
        here = model if model.device.type == "cpu" else copy.deepcopy(model).cpu()
        plain = plain_decoder(policy, selection, list(padding[: len(tokens)]))

        def tell(given: Tensor) -> None:
            plain.tokens = given[:, -1].double().numpy()

        with attention_replaced(here, plain.attention):
            logits = fed(here, tokens, n_prompt, padding, before_step=tell)
        layers = [plain.seen[layer] for layer in sorted(plain.seen)]
        names = [name for name in layers[0][0] if name not in ("places", "values_read")]
        seen = {
            name: np.stack([[step[name] for step in steps] for steps in layers]).transpose(1, 2, 0, 3) for name in names
        }
        units = np.ndindex(len(layers), *seen["full"].shape[1:2], *seen["full"].shape[3:])
        read = {
            (layer, row, head): set().union(*(step["values_read"][row][head] for step in layers[layer]))
            for layer, row, head in units
        }
        known[asked] = model, Reference(logits, seen, read)
        return known[asked][1]

    return decode


@dataclass(frozen=True)
class AsksForTheLayer(StepPolicy):
    """No program: what it does depends on the layer."""

    reads_query: bool
    kind: ClassVar[str] = "asks_for_the_layer"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"query_similarity"}) if self.reads_query else frozenset()

    def decide(self, signals: StepSignals) -> Any:
        full = signals.age >= (2 if signals.layer == 0 else 3)
        return full & (signals.query_similarity < 0.99) if self.reads_query else full


@pytest.fixture
def asks_for_the_layer() -> type[AsksForTheLayer]:
    return AsksForTheLayer


@pytest.fixture
def reference_rows(reference: Callable[..., Reference]) -> Callable[..., Reference]:
    """Decodes in plain Python as `Runs.follow_rows` does on an engine."""

    def decode(
        model: PreTrainedModel, policies: Sequence[StepPolicy], selection: Selection, tokens: Tensor, n_prompt: int
    ) -> Reference:
        n = len(policies)
        together = tokens.expand(n, -1)
        return reference(model, PerRow(tuple(policies)), selection, together, n_prompt, padding=(0,) * n)

    return decode


@pytest.fixture(scope="session", autouse=True)
def _mended_interpreter() -> Iterator[None]:
    """Faults of Triton's interpreter (3.6 to 3.9): bfloat16 in `tl.dot` as whole numbers, and hours of looking up.

    Nor does it compute whether whole numbers overflow, which takes as long as all else, and of which it says nothing
    unless it debugs, as it does for `overflows_are_errors`.
    """
    if HAS_GPU:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
        dot, launch, patch_lang = builder.create_dot, interpreter.GridExecutor.__call__, interpreter._patch_lang
        patched: set[str] = set()

        def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
            # Products of two bfloat16 are exact in float32, in which a GPU sums them too.
            wide = [
                interpreter.TensorHandle(self.create_fp_ext(x, interpreter.tl.float32).data, interpreter.tl.float32)
                if x.dtype == interpreter.tl.bfloat16
                else x
                for x in (a, b)
            ]
            return dot(self, *wide, *rest)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            # As it is, but `triton.language` is patched once per launch and module, not at every call in a kernel.
            if self.fn.__module__ not in patched:
                patched.add(self.fn.__module__)
                patch_lang(self.fn)
            return self.rewrite()(*args, **kwargs)

        def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
            patched.clear()
            return launch(self, *args, **kwargs)

        of_scalar = lru_cache(interpreter._get_np_dtype)

        def np_dtype(kind: Any) -> Any:
            # As it is, without a table of all types made at every call.
            is_pointer = isinstance(kind.scalar, interpreter.tl.pointer_type)
            return np.dtype(np.uint64) if is_pointer else of_scalar(kind.scalar)

        def init_block(self: Any, element_ty: Any, shape: Any) -> None:
            # As it is, once for each type of numbers and shape: there are a million blocks of some hundred types.
            if type(element_ty) is not interpreter.tl.dtype:
                init_block_type(self, element_ty, shape)
                return
            key = (element_ty.name, *(getattr(n, "value", n) for n in shape))
            if key not in blocks:
                init_block_type(self, element_ty, shape)
                blocks[key] = dict(vars(self))
            vars(self).update(blocks[key])

        def init_tensor(self: Any, handle: Any, type: Any) -> None:
            # Likewise: what a tensor knows of itself follows from its shape.
            shape = tuple(type.shape.values) if type.is_block() else ()
            if shape not in shapes:
                init_tensor_of(self, handle, type)
                shapes[shape] = (self.numel, self.shape)
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = shapes[shape]

        tl = interpreter.tl
        init_block_type, init_tensor_of = tl.block_type.__init__, tl.tensor.__init__
        blocks: dict[Any, dict[str, Any]] = {}
        shapes: dict[Any, tuple[Any, Any]] = {}
        patch.setattr(tl.block_type, "__init__", init_block)
        patch.setattr(tl.tensor, "__init__", init_tensor)
        patch.setattr(
            interpreter.interpreter_builder,
            "options",
            dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False),
        )
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        patch.setattr(builder, "create_dot", create_dot)
        patch.setattr(function, "__call__", call)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        yield


@pytest.fixture
def overflows_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Triton's interpreter look at every sum, difference and product of whole numbers."""
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True, debug=True))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the GPU engine's kernels run: on a GPU if there is one, else in Triton's interpreter, on NumPy."""
    return DEVICE


@pytest.fixture(scope="session")
def machine() -> Machine:
    return MACHINE


@pytest.fixture
def on_engine(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Callable[..., None]:
    """Lets `recycled` run models on the GPU engine, wherever they are."""

    def use(**other: Any) -> None:
        how = dataclasses.replace(machine, **other)
        monkeypatch.setattr(engines, "engine_for", lambda model: CudaEngine(model, how))

    return use
