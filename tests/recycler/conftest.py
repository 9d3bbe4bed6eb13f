"""Tiny models, and a decoder written token by token in plain Python that the real one must agree with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from policies import MEASURED_SIGNALS, PerUnit, Selection, StepPolicy, StepSignals
from recycler.decode.per_row import PerRow

VOCABULARY = 61


@lru_cache
def _make_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    layers: int = 2,
    query_heads: int = 4,
    kv_heads: int = 2,
    **more: Any,
) -> PreTrainedModel:
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.3,  # Attention has peaks, and tokens vary.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(sum(family.encode()))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).to(dtype)
    # The padding token gets an embedding too: a model may write it, and without one its queries have no direction.
    embeddings = model.get_input_embeddings().weight.data
    embeddings[0] = -embeddings[1]
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Makes a tiny random model; the same object for the same arguments."""
    return _make_model


def _save_byte_model(folder: Path, positions: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<assistant>"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model of 128 positions with one token per byte."""
    folder = tmp_path_factory.mktemp("byte_model") / "tiny"
    _save_byte_model(folder, positions=128)
    return folder


@pytest.fixture(scope="session")
def save_byte_model() -> Callable[..., None]:
    """Saves a random model of 2 layers and 2 KV heads with one token per byte."""
    return _save_byte_model


@pytest.fixture(scope="session", autouse=True)
def _exact_norms() -> Iterator[None]:
    """Norms of transformers round to float32 in every model; those of float64 compute in it here, as engines do."""
    with pytest.MonkeyPatch.context() as patch:
        for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm):
            patch.setattr(norm, "forward", _exact_norm(norm.forward))
        yield


def _exact_norm(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(norm: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != torch.float64:
            return stock(norm, hidden_states)
        variance = hidden_states.square().mean(-1, keepdim=True)
        scaled: torch.Tensor = norm.weight * (hidden_states * torch.rsqrt(variance + norm.variance_epsilon))
        return scaled

    return forward


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _make_tokens(n_tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, n_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    """Makes random tokens `(rows, n_tokens)`, none of them the padding."""
    return _make_tokens


def _selection_of_unit(selection: Selection, layer: int, head: int) -> Selection:
    if selection.unit_k is None:
        return selection
    return dataclasses.replace(selection, k=selection.unit_k[layer][head], unit_k=None)


@pytest.fixture(scope="session")
def selection_of_unit() -> Callable[[Selection, int, int], Selection]:
    """The selection of a lone unit, with its own size as k."""
    return _selection_of_unit


class PlainSet:
    """The recycled set of one unit as a dictionary from place to score.

    `weights` are `(group, end)`, the attention of the query heads to the cache, whose first token is at `start`.
    """

    def __init__(self, weights: np.ndarray, selection: Selection, start: int = 0) -> None:
        self.selection, self.start = selection, start
        end = weights.shape[1]
        pooled = weights.max(0) if selection.group == "max" else weights.mean(0)
        scores = {}
        for place in range(start, end):
            near = range(max(start, place - selection.pool_forward), min(end, place + selection.pool_backward + 1))
            scores[place] = np.float32(max(pooled[other] for other in near))
        stays = [place for place in scores if place < start + selection.sinks or place >= end - selection.window]
        rest = sorted(set(scores) - set(stays), key=lambda place: (scores[place], place), reverse=True)
        self.scores = {place: scores[place] for place in stays + rest[: selection.k - len(stays)]}

    @property
    def places(self) -> list[int]:
        return sorted(self.scores)

    def admit(self, place: int) -> int:
        """Take in a token; the place of the one that leaves, or -1."""
        left = -1
        if len(self.scores) == self.selection.k:
            may_leave = [
                other
                for other in self.scores
                if other >= self.start + self.selection.sinks and other <= place - self.selection.window
            ]
            left = min(may_leave, key=lambda other: (self.scores[other], other))
            del self.scores[left]
        self.scores[place] = np.float32(np.inf if self.selection.ranking == "last_full" else 0)
        return left

    def rescore(self, weights: np.ndarray) -> None:
        """Rank by `(group, len(set))`, attention over the set in order of place."""
        if self.selection.ranking == "last_full":
            return
        pooled = weights.max(0) if self.selection.group == "max" else weights.mean(0)
        kept = {"updated": 0, "accumulated": 1, "decayed": self.selection.score_decay}[self.selection.ranking]
        now = zip(self.places, pooled.astype(np.float32), strict=True)
        self.scores = {place: self.scores[place] * np.float32(kept) + score for place, score in now}


@pytest.fixture(scope="session")
def plain_set() -> type[PlainSet]:
    return PlainSet


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


class _PlainUnit:
    """One KV head of one row: what `StepSignals` says of it, and its attention.

    `queries` are those of the prompt, `(group, tokens, head_dim)`; of the last step, `values_read` are the places
    whose values were read, and `tokens_read` is what was read with keys and values half a token each.
    """

    def __init__(self, queries: np.ndarray, key: np.ndarray, selection: Selection, start: int, scaling: float) -> None:
        self.selection, self.start, self.scaling = selection, start, scaling
        self.step, self.age, self.n_full = 0, 1, 0
        query = queries[:, -1]
        weights = self._weights(query, key)
        n_voting = min(selection.prompt_queries or len(key), len(key) - start)
        votes = np.zeros_like(weights)
        for end in range(len(key) - n_voting + 1, len(key) + 1):
            votes[:, :end] += self._weights(queries[:, end - 1], key[:end])
        self.set = PlainSet(votes, selection, start)
        self.full_query = self.last_query = query.mean(0)
        self.refresh_mass = weights.mean(0)[self.set.places].sum()
        self.refresh_overlap = float("nan")

    def _weights(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        weights = np.zeros((len(query), len(key)))
        weights[:, self.start :] = softmax(query @ key[self.start :].T * self.scaling)
        return weights

    def signals(self, query: np.ndarray, end: int) -> dict[str, float]:
        self.set.admit(end - 1)
        mean_query = query.mean(0)
        return {
            "step": self.step,
            "age": self.age,
            "n_full": self.n_full,
            "query_similarity": _cosine(mean_query, self.full_query),
            "step_similarity": _cosine(mean_query, self.last_query),
            "refresh_mass": self.refresh_mass,
            "refresh_overlap": self.refresh_overlap,
        }

    def attend(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, full: bool, keys_only: bool) -> np.ndarray:
        self.last_query = query.mean(0)
        self.step += 1
        self.age += 1
        dense = range(self.start, len(key))
        if not full:
            self.values_read, self.tokens_read = self.set.places, len(self.set.places)
            weights = self._weights_on_set(query, key)
            output = weights @ value[self.set.places]
            self.set.rescore(weights)
            return output
        self.age = 1
        self.n_full += 1
        self.full_query = self.last_query
        weights = self._weights(query, key)
        old, self.set = self.set, PlainSet(weights, self.selection, self.start)
        self.refresh_mass = weights.mean(0)[self.set.places].sum()
        self.refresh_overlap = len(set(old.places) & set(self.set.places)) / len(self.set.places)
        self.values_read = self.set.places if keys_only else list(dense)
        self.tokens_read = (len(dense) + len(self.values_read)) / 2
        return self._weights_on_set(query, key) @ value[self.set.places] if keys_only else weights @ value

    def _weights_on_set(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return softmax(query @ key[self.set.places].T * self.scaling)


class PlainDecoder:
    """Recycled attention, unit by unit, over a cache without empty places.

    Give `attention` to `attention_replaced`. `seen[layer]` has, per step, the signals of the units `(rows, kv_heads)`,
    the decisions as `"full"` and `"keys_only"`, the sets before the step as `"places"`, and what was read as
    `"tokens_read"` and `"values_read"`.
    `tokens`, `(rows,)`, are those that are fed, if somebody tells.
    """

    def __init__(self, policy: StepPolicy, selection: Selection, starts: list[int]) -> None:
        self.policy, self.selection, self.starts = policy, selection, starts
        self.tokens: np.ndarray | None = None
        self.units: dict[int, list[list[_PlainUnit]]] = {}
        self.seen: dict[int, list[dict[str, Any]]] = {}

    def attention(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            layer = module.layer_idx
            grouped = query.unflatten(1, (key.shape[1], -1)).numpy()
            queries = grouped[:, :, :, -1]
            keys, values = key.numpy(), value.numpy()
            # A prompt may be one token.
            if query.shape[2] > 1 or layer not in self.units:
                self.seen[layer] = []
                self.units[layer] = [
                    [
                        _PlainUnit(q, k, _selection_of_unit(self.selection, layer, head), start, kwargs["scaling"])
                        for head, (q, k) in enumerate(zip(*row, strict=True))
                    ]
                    for *row, start in zip(grouped, keys, self.starts, strict=True)
                ]
                return stock(module, query, key, value, mask, **kwargs)
            units = self.units[layer]
            table = [
                [unit.signals(q, key.shape[2]) for unit, q in zip(*row, strict=True)]
                for row in zip(units, queries, strict=True)
            ]
            seen = {name: np.array([[float(unit[name]) for unit in row] for row in table]) for name in table[0][0]}
            for name, of_layer in self._of_layer(units, queries).items():
                seen[name] = np.broadcast_to(of_layer[:, None], seen["age"].shape)
            full = self.policy.decide(StepSignals(**seen, layer=layer))
            places = [[unit.set.places for unit in row] for row in units]
            of_rows = self.policy.rows if isinstance(self.policy, PerRow) else (self.policy,) * len(units)
            keys_only = np.array([self._keys_only(policy, layer, full.shape[1]) for policy in of_rows])
            output = [
                [unit.attend(*parts) for unit, *parts in zip(*row, strict=True)]
                for row in zip(units, queries, keys, values, full, keys_only, strict=True)
            ]
            read = np.array([[unit.tokens_read for unit in row] for row in units])
            done = {"full": full, "keys_only": full & keys_only, "tokens_read": read, "places": places}
            values_read = [[unit.values_read for unit in row] for row in units]
            self.seen[layer].append(seen | done | {"values_read": values_read})
            return torch.from_numpy(np.array(output)).to(query).flatten(1, 2)[:, None], None

        return attend

    def _of_layer(self, units: list[list[_PlainUnit]], queries: np.ndarray) -> dict[str, np.ndarray]:
        """Signals that the units of a row share."""
        then = [np.mean([unit.full_query for unit in row], axis=0) for row in units]
        now = queries.reshape(len(queries), -1, queries.shape[-1]).mean(1)
        cosines = [_cosine(*pair) for pair in zip(now, then, strict=True)]
        unknown = np.full(len(units), np.nan)
        return {"layer_similarity": np.array(cosines), "token": unknown if self.tokens is None else self.tokens}

    def _keys_only(self, policy: StepPolicy, layer: int, kv_heads: int) -> np.ndarray:
        modes = np.asarray(policy.keys_only)
        return np.broadcast_to((modes[layer] if modes.ndim else modes) == 1, kv_heads)


@pytest.fixture(scope="session")
def plain_decoder() -> type[PlainDecoder]:
    return PlainDecoder


@dataclass(frozen=True)
class Spy(StepPolicy):
    """Notes per layer and step what another policy is shown, and what it decides as `"full"`."""

    policy: StepPolicy
    needs: frozenset[str] = MEASURED_SIGNALS
    seen: dict[int, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    kind: ClassVar[str] = "spy"

    @property
    def keys_only(self) -> PerUnit:
        return self.policy.keys_only

    def decide(self, signals: StepSignals) -> Any:
        full = self.policy.decide(signals)
        shown = {name: values for name, values in vars(signals).items() if name not in ("layer", "reasons", "tables")}
        noted = {name: _as_numpy(values) for name, values in (shown | {"full": full}).items()}
        if signals.layer is not None:
            self.seen.setdefault(signals.layer, []).append(noted)
        else:
            # An engine may ask for all layers at once.
            for layer in range(noted["full"].shape[1]):
                self.seen.setdefault(layer, []).append({name: values[:, layer] for name, values in noted.items()})
        return full


def _as_numpy(values: Any) -> np.ndarray:
    copied: np.ndarray = values.numpy().copy() if isinstance(values, torch.Tensor) else values.copy()
    return copied


@pytest.fixture(scope="session")
def spy() -> type[Spy]:
    return Spy
