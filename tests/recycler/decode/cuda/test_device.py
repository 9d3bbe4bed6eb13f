"""What is a GPU's stays there: with tensors that say they are on one, hold a CPU tensor, and refuse its company."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel
from triton.runtime import interpreter

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from policies.arrays import Array
from policies.signals import StepSignals
from policies.stops import FixedDrafts, StopRule
from recycler import Prompt, record_trace
from recycler.decode.cuda import drafting, engine
from recycler.decode.engine_run import EngineRun
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled
from recycler.measure.closed_loop import run_closed_loop
from recycler.model import decoder_parts

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")

Make = Callable[..., Any]
GPU = torch.device("cuda", 0)
SELECTION = Selection(12, sinks=2, window=4, pool_forward=1)
N_NEW = 6
LOGISTIC = LearnedLogistic(("age", "query_drift", "step_drift", "refresh_loss"), (0.3, 1.0, 0.2, 1.0), -1.8)
BUDGET = BudgetConstrained(LOGISTIC, 0.3)
BUDGET_OF_COSINE = BudgetConstrained(CosineThreshold(0.99), 0.3)
# Calls that make the host wait for a GPU; copies between the two do as well.
_WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero")
_COPIES = ("aten.copy_", "aten._to_copy")


class Held(Tensor):
    """Says that it is on a GPU; what it is is `held`, on the CPU."""

    held: Tensor
    waits: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        # torch must not look for a GPU of its own, so that below Python this is a tensor without memory.
        made: Held = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> list[Any]:
        Held.waits.append("tolist")
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(function, args, kwargs or {})


class Gpu(TorchDispatchMode):
    """Also makes tensors that are asked for there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(function, args, kwargs or {})


def held(thing: Any) -> Any:
    return thing.held if isinstance(thing, Held) else thing


def call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a function of torch on what tensors hold."""
    name, asked = str(function).rsplit(".", 1)[0], kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, Held)]
    foreign = [tensor for tensor in tensors if not isinstance(tensor, Held) and tensor.dim()]
    leaves = asked is not None and torch.device(asked).type == "cpu"
    if there and foreign and name not in _COPIES:
        raise RuntimeError(f"{name}: tensors on the GPU and on the CPU.")
    # What is sent from the host without waiting for it is copied to a place of the driver's at once.
    is_sent = bool(foreign) and not leaves and (kwargs.get("non_blocking") or any(arg is True for arg in args))
    if there and (name in _WAITS or (name in _COPIES and (foreign or leaves) and not is_sent)):
        Held.waits.append(name)
    result = function(*tree_map(held, args), **tree_map(held, dict(kwargs) | ({"device": "cpu"} if asked else {})))
    known = {id(tensor.held): tensor for tensor in there}
    stays = not leaves if asked is not None else bool(there)

    def put(value: Any) -> Any:
        if id(value) in known:
            return known[id(value)]
        return Held(value) if stays and isinstance(value, Tensor) else value

    return args[0] if name == "aten.copy_" else tree_map(put, result)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, on_engine: Make) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(decoder_parts, "_WEIGHTS", (nn.Parameter, Held))
    # Such tensors have no inference mode, and no streams.
    monkeypatch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad())
    for module in (engine, drafting):
        monkeypatch.setattr(module, "on_gpu", lambda device: torch.no_grad())
        monkeypatch.setattr(module, "stream_for", lambda device, purpose: None)
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = [arg for arg in tree_leaves(args) if isinstance(arg, Tensor)]
        assert all(isinstance(arg, Held) for arg in given), f"{self.fn} is given CPU tensors."
        return launch(self, *tree_map(held, args), **kwargs)

    with monkeypatch.context() as patch:
        on_engine()
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        torch._C._set_only_lift_cpu_tensors(True)
        Held.waits.clear()
        with Gpu():
            yield
        torch._C._set_only_lift_cpu_tensors(False)


@pytest.fixture
def model(make_model: Make) -> PreTrainedModel:
    return copy.deepcopy(make_model(head_dim=16, dtype=torch.float32))


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The same model on the GPU."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Held(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else Held(buffer)
    return model


def generate(
    model: PreTrainedModel,
    tokens: Tensor,
    policy: StepPolicy,
    selection: Selection = SELECTION,
    *,
    fast: bool,
    exact: StopRule | bool = False,
) -> tuple[list[list[int]], Receipt]:
    """Greedily, with left padding of the second row."""
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    how = {"attention_mask": mask, "max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0}
    with recycled(model, policy, selection, fast=fast, exact=exact) as session:
        found = model.generate(tokens, **how)
    return found.cpu().tolist(), session.receipt()


@dataclass(frozen=True)
class AsksForTheStep(StepPolicy):
    """No program: what it does depends on the first step number."""

    kind: ClassVar[str] = "asks_for_the_step"

    def decide(self, signals: StepSignals) -> Array:
        return signals.age >= (2 if signals.step.max() > 3 else 3)


@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
@pytest.mark.parametrize(
    ("policy", "selection"),
    [
        (FixedStride(3), SELECTION),
        (CosineThreshold(0.3), SELECTION),
        (BUDGET, Selection(12, 2, 4, pool_forward=0, prompt_queries=8)),
        (RefreshKeys(BUDGET), Selection(12, 2, 4, ranking="accumulated")),
        (LOGISTIC, Selection(12, 2, 4, unit_k=((8, 16), (10, 14)), ranking="updated")),
    ],
    ids=["stride", "cosine", "budget", "by keys", "sizes"],
)
def test_tokens_and_receipts_are_those_of_the_cpu_and_the_host_waits_for_no_step_of_the_engine(
    model: PreTrainedModel,
    make_tokens: Make,
    monkeypatch: pytest.MonkeyPatch,
    policy: StepPolicy,
    selection: Selection,
    fast: bool,
) -> None:
    stock, waits, tokens = EngineRun.step, list[list[str]](), make_tokens(20, rows=2)

    def step(self: EngineRun, asked: Any) -> Any:
        Held.waits.clear()
        result = stock(self, asked)
        waits.append(list(Held.waits))
        return result

    monkeypatch.setattr(EngineRun, "step", step)
    plain, on_cpu = generate(model, tokens, policy, selection, fast=False)
    found, receipt = generate(moved(model), Held(tokens), policy, selection, fast=fast)
    assert found == plain
    assert receipt.engine == ("cuda" if fast else "plain")
    if fast:
        # At the first step, and at every 64th, the mask is looked at.
        assert waits[0]
        assert waits[1:] == [[]] * (N_NEW - 2)
    for name in ("full_steps", "keys_only_steps", "tokens_read", "tokens_dense"):
        np.testing.assert_equal(getattr(receipt, name), getattr(on_cpu, name), err_msg=name)
    assert 0 < receipt.full_share < 1


def test_a_round_is_launched_without_waiting_and_its_text_is_the_stock_decoders(
    model: PreTrainedModel, make_tokens: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []

    def watch(name: str) -> None:
        stock = getattr(drafting.CudaDrafting, name)

        def call(self: drafting.CudaDrafting, *args: Any) -> Any:
            Held.waits.clear()
            result = stock(self, *args)
            waits.extend(Held.waits)
            return result

        monkeypatch.setattr(drafting.CudaDrafting, name, call)

    for name in ("begin_round", "draft", "verify"):
        watch(name)
    tokens = make_tokens(20, rows=2)
    full, _ = generate(model, tokens, AlwaysFull(), fast=False)
    found, receipt = generate(moved(model), Held(tokens), BUDGET_OF_COSINE, fast=True, exact=FixedDrafts(2))
    assert (found, receipt.engine) == (full, "cuda")
    assert receipt.rounds is not None
    assert receipt.rounds.n_drafts > receipt.rounds.n_accepted > 0
    assert waits == []


def test_policies_that_are_no_programs_are_asked_on_the_host(model: PreTrainedModel, make_tokens: Make) -> None:
    tokens, policy = make_tokens(20, rows=2), AsksForTheStep()
    plain, _ = generate(model, tokens, policy, fast=False)
    with pytest.warns(UserWarning, match="is called on the host"):
        found, receipt = generate(moved(model), Held(tokens), policy, fast=True)
    assert (found, receipt.engine) == (plain, "cuda")


@pytest.mark.parametrize("selection", [SELECTION, Selection(12, 2, 4, prompt_queries=4, unit_k=((8, 16), (10, 14)))])
def test_a_recording_is_that_of_the_cpu(model: PreTrainedModel, make_tokens: Make, selection: Selection) -> None:
    prompt = Prompt("drawn", "random", make_tokens(30)[0].numpy().astype(np.int32), 20, "drawn", "CC0-1.0")
    there, here = (record_trace(one, prompt, selection, max_age=6) for one in (moved(model), model))
    for name in ("recovered_mass", "query_similarity", "overlap", "fresh_mass", "token_log_prob"):
        np.testing.assert_allclose(getattr(there, name), getattr(here, name), rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("fast", [True, False], ids=["engine", "plain"])
def test_policies_side_by_side_do_what_they_do_on_the_cpu(
    model: PreTrainedModel, make_tokens: Make, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    text, policies = make_tokens(24)[0].numpy(), (FixedStride(3), RefreshKeys(BUDGET))
    selection = Selection(12, 2, 4, prompt_queries=4)
    here = run_closed_loop(model, text, 20, policies, selection, fast=False)
    there = run_closed_loop(moved(model), text, 20, policies, selection, fast=fast)
    np.testing.assert_array_equal(there.full, here.full)
    np.testing.assert_allclose(there.kl, here.kl, rtol=0, atol=1e-5)
    assert here.kl.max() > 1e-3


def test_the_stand_in_refuses_what_a_gpu_refuses_and_notes_what_it_waits_for() -> None:
    there = torch.arange(3.0, device="cuda")
    assert (there.device, there.sum().device) == (GPU, GPU)
    with pytest.raises(RuntimeError, match=r"^aten\.add: tensors on the GPU and on the CPU\.$"):
        there + torch.ones(3)
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    assert Held.waits == []
    assert there.sum().item() == 3
    assert there.cpu().tolist() == [0, 1, 2]
    there[0] = torch.ones(1, device="cuda")[0]
    assert Held.waits == ["aten._local_scalar_dense", "aten._to_copy"]
