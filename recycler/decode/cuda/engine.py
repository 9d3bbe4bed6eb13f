"""The decoder on a GPU: kernels in Triton, the decision among them, and a step that is one launch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from policies import SIGNALS, GroupPooling, NotAProgram, StepPolicy
from recycler.decode.cache import KvLayer, of_rows
from recycler.decode.counts import Totals, keys_only_units, setless_units
from recycler.decode.cuda.decisions import DeviceHostDecisions, RowPrograms, row_programs
from recycler.decode.cuda.dense import LastWeights, LayerMath, LayerWeights, last_weights, layer_weights
from recycler.decode.cuda.drafting import CudaDrafting
from recycler.decode.cuda.machine import Machine
from recycler.decode.cuda.own_tokens import OwnTokens
from recycler.decode.cuda.state import Scratch, Sizes, UnitState
from recycler.decode.cuda.step_graph import Aside, StepGraph, on_gpu, stream_for
from recycler.decode.cuda.unit_kernels import UnitKernels
from recycler.decode.engine import Decoding, Engine
from recycler.decode.first_sets import FirstSets
from recycler.model.attention_hook import refuse_full_window
from recycler.model.decoder_parts import DecoderParts, NotCovered, decoder_parts
from recycler.model.shape import model_shape

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rotary embeddings that look at positions on the host.
_CHANGING_ROPES = ("dynamic", "longrope")
_TOKEN = SIGNALS.index("token")


class CudaEngine(Engine):
    """Runs models in float32, bfloat16 and float16.

    Args:
        model: The model; its weights are used where they lie, but that those for queries, keys and values are brought
            together (`recycler.decode.cuda.dense.stacked`).
        machine: How kernels are launched; None asks the model's GPU. Given, the model may be where Triton's interpreter
            runs kernels.

    Raises:
        NotCovered: If it is not on a GPU, in another type, or of another kind.
    """

    name = "cuda"

    def __init__(self, model: PreTrainedModel, machine: Machine | None = None) -> None:
        if machine is None:
            if model.device.type != "cuda":
                raise NotCovered(f"it runs on cuda, and the model is on {model.device}")
            shape = model_shape(model)
            machine = Machine.of(model.device, shape.head_dim, shape.query_heads // shape.kv_heads)
        parts = decoder_parts(model)
        if parts.dtype not in _DTYPES:
            raise NotCovered(f"it runs {', '.join(map(str, _DTYPES))}, and the model is in {parts.dtype}")
        head_dim = parts.layers[0].self_attn.head_dim
        if head_dim < 16 or head_dim & (head_dim - 1):
            raise NotCovered(f"it runs heads of 16, 32, 64, 128 or 256 numbers, and this model's have {head_dim}")
        rope = getattr(parts.rotary, "rope_type", "default")
        if rope in _CHANGING_ROPES:
            raise NotCovered(f"the model's rotary embedding ({rope}) changes with the positions")
        self._parts, self._machine = parts, machine
        self._weights = [layer_weights(layer) for layer in parts.layers]
        self._last = last_weights(parts)

    def begin(
        self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy, passing: DynamicCache | None = None
    ) -> CudaDecoding:
        if first.selection.group == GroupPooling.LAYER_MEAN:
            raise NotCovered("it pools scores over the heads of a KV group, and the selection over those of a layer")
        # Tensors that all steps may write to, whatever mode the prompt was read in.
        with on_gpu(first.positions.device), torch.inference_mode(False), torch.no_grad():
            return CudaDecoding(self._parts, self._weights, self._last, self._machine, layers, first, policy)

    def begin_drafts(self, layers: Sequence[KvLayer], first: FirstSets, policy: StepPolicy) -> CudaDrafting:
        return CudaDrafting(self.begin(layers, first, policy), policy.needs)


class CudaDecoding(Decoding):
    """See `Decoding`. Args: those of `Engine.begin`, after the model's parts and weights and the machine.

    Drafts are steps too, of some of the rows, each at its own place, and are in no cache that anybody else sees.

    Attributes:
        parts: The model's.
        weights: Of each layer.
        last: Those after the last layer.
        machine: How kernels are launched.
        sizes: What does not change.
        state: Of all units.
        scratch: Room for intermediate results; another one after the cache has grown out of it.
        kernels: Of each layer, on that room.
        selection: How sets are chosen.
    """

    def __init__(
        self,
        parts: DecoderParts,
        weights: Sequence[LayerWeights],
        last: LastWeights,
        machine: Machine,
        layers: Sequence[KvLayer],
        first: FirstSets,
        policy: StepPolicy,
    ) -> None:
        self.parts, self.weights, self.last, self.machine = parts, weights, last, machine
        self._layers, self._needs, self.selection = layers, policy.needs, first.selection
        key, _ = layers[0].parts
        rows, kv_heads, _, head_dim = key.own.shape
        for part in (part for layer in layers for part in layer.parts):
            # Kernels know one prompt for all rows, or one for each.
            if 1 < len(part.prompt) < rows:
                part.prompt = of_rows(part.prompt, rows)
        device = key.own.device
        self._math = LayerMath(parts, rows, machine.compiles)
        attention = parts.layers[0].self_attn
        self.sizes = Sizes(
            rows=rows,
            layers=len(layers),
            kv_heads=kv_heads,
            group=attention.q_proj.out_features // attention.k_proj.out_features,
            head_dim=head_dim,
            k=self.selection.widest,
            n_prompt=key.prompt.shape[2],
            n_programs=machine.n_programs,
            chunk_tokens=machine.chunk_tokens,
        )
        units = (len(layers), kv_heads)
        self._by_keys, self._setless = (of(policy, (rows, *units)) for of in (keys_only_units, setless_units))
        self._programs: list[RowPrograms] = []
        self._host: DeviceHostDecisions | None = None
        try:
            self._programs = row_programs(policy, units, rows, device)
        except NotAProgram as why:
            self._host = DeviceHostDecisions(policy, why)
        counted = self._programs and len(self._programs[0].results) > 1
        self._reasons = tuple(self._programs[0].program.reasons) if counted else ()
        self.state = UnitState(self.sizes, first, policy.needs, self._by_keys, len(self._reasons))

        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._places = torch.zeros(rows, dtype=torch.int64, device=device)
        self._logits = torch.empty((rows, parts.head.out_features), dtype=parts.dtype, device=device)
        captures = machine.captures and not (self._host is not None and self._host.in_layers)
        stream = stream_for(device, "step") if captures else None
        self._graph = None if stream is None else StepGraph(stream)
        self._aside = Aside(stream_for(device, "aside"))
        self._own = OwnTokens(layers, device)
        # Own tokens that kernels have room to work on.
        self._reach_tokens = 2 * machine.chunk_tokens
        self._make_kernels()

    @property
    def full(self) -> np.ndarray:
        full: np.ndarray = _by_row(self.state.decided) != 0
        return full

    @property
    def keys_only(self) -> np.ndarray:
        led = self.state.led.cpu().numpy()[:, None, None] != 0
        keys_only: np.ndarray = self.full & self._by_keys & ~led
        return keys_only

    @property
    def tokens_read(self) -> np.ndarray:
        return _by_row(self.state.tokens_read)

    def totals(self) -> Totals:
        state = self.state
        full_steps = _by_row(state.full_before + state.signals[SIGNALS.index("n_full")]).astype(np.int64)
        counted = dict(zip(self._reasons, state.overruled.cpu().numpy(), strict=False))
        overruled = counted if self._host is None else self._host.overruled
        return Totals(
            full_steps=full_steps,
            keys_only_steps=full_steps * self._by_keys,
            tokens_read=_by_row(state.all_tokens_read),
            reasons={reason: counts.swapaxes(0, 1).astype(np.int64) for reason, counts in overruled.items()},
        )

    def run_full(self, rows: Tensor) -> None:
        with on_gpu(self._tokens.device), torch.inference_mode():
            self.state.led.bitwise_or_(rows.to(torch.int32))

    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        with on_gpu(self._tokens.device):
            n_own = self._layers[0].parts[0].n_own + 1
            self.make_room(n_own, n_own)
            logits = self.take(tokens, places)
        for cached in self._layers:
            for part in cached.parts:
                part.n_own += 1
        return logits

    def make_room(self, most_own: int, most_seen: int) -> None:
        """Make room in the cache for so many tokens of each row since the prompt.

        Args:
            most_own: How many.
            most_seen: How many of them a row attends to at most.

        Raises:
            ValueError: If the model's layers do not see as many.
        """
        refuse_full_window(0, self.sizes.n_prompt + most_seen, self.parts.window)
        # All layers grow together: looking at each of them takes longer than launching the step.
        if self._layers[0].parts[0].make_room(most_own):
            for layer in self._layers:
                for part in layer.parts:
                    part.make_room(most_own)
            self._own.look(self._layers)
            if self._own_room() > self._reach_tokens:
                self._make_kernels()

    def take(self, tokens: Tensor, places: Tensor) -> Tensor:
        """A step of the rows that are going; the cache has room for it, and does not show it."""
        self._tokens.copy_(tokens)
        self._places.copy_(places.expand_as(self._places))
        if self._host is not None and not self._host.in_layers:
            self._tell_token()
            self._host.decide(self.state.signals, self.state.given)
        # One mode for all steps: compiled functions and captured graphs belong to a mode.
        with torch.inference_mode():
            if self._graph is None:
                self._take_step()
            else:
                self._graph(self._take_step)
        return self._logits.clone()

    def _take_step(self) -> None:
        """All that happens on the GPU: what the graph holds."""
        self._tell_token()
        x = self.parts.embedding.weight[self._tokens]
        # Per row, for all heads: `(rows, 1, head_dim)`.
        cosine, sine = self.parts.rotary(x, self._places[:, None])
        query, key, value = self._math.enter(x, self.weights[0], cosine, sine)
        for layer, (weights, kernels) in enumerate(zip(self.weights, self.kernels, strict=True)):
            if self._host is not None and self._host.in_layers:
                kernels.compare(query)
                self._host.decide(self.state.signals, self.state.given, layer)
            # The layer before chooses new sets while torch gets from its attention to here.
            self._aside.join()
            kernels.prepare(query, key, value, self._programs)
            attended = kernels.attend(query)
            with self._aside():
                kernels.settle()
            if layer + 1 < len(self.weights):
                following = self.weights[layer + 1]
                x, query, key, value = self._math.cross(x, attended, weights, following, cosine, sine)
        self._logits.copy_(self._math.leave(x, attended, weights, self.last))
        self._aside.join()
        self.state.n_own += self.state.going

    def _tell_token(self) -> None:
        self.state.signals[_TOKEN] = self._tokens[:, None]

    def _own_room(self) -> int:
        return self._layers[0].parts[0].own.shape[2]

    def _make_kernels(self) -> None:
        """Point the kernels at memory, and make their room as large as the cache will be for long.

        It takes a hundredth of what the cache does, so that it grows more rarely, and a captured step lasts.
        """
        sizes, dtype = self.sizes, self.parts.dtype
        while self._reach_tokens < self._own_room():
            self._reach_tokens *= 2
        places = sizes.n_prompt + self._reach_tokens
        device = self.state.start.device
        with torch.inference_mode(False):
            measures = bool(self._needs & {"refresh_mass", "refresh_overlap"})
            self.scratch = Scratch(sizes, places, measures, dtype, device)
        # Layers have only the kernels that some unit of theirs may need.
        choosing = ~self._by_keys & (measures | ~self._setless)
        by_keys, by_values = (np.asarray(some.any(axis=(0, 2))) for some in (self._by_keys, choosing))
        self.kernels = [
            UnitKernels(
                layer,
                sizes,
                self.state,
                self.scratch,
                tuple(part.prompt for part in self._layers[layer].parts),
                self._own,
                self.selection,
                self._needs,
                module.self_attn.scaling,
                self.machine,
                by_keys=bool(by_keys[layer]),
                chooses=bool(by_values[layer]),
            )
            for layer, module in enumerate(self.parts.layers)
        ]
        if self._graph is not None:
            self._graph.forget()


def _by_row(state: Tensor) -> np.ndarray:
    """A copy of `(layers, rows, kv_heads)` as `(rows, layers, kv_heads)`, on the host."""
    return np.array(state.cpu().numpy().swapaxes(0, 1))
