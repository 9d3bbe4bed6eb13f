"""Replacing a model's attention, and its forward, for one thread or task, while all others have the stock functions."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recycler.model.shape import recycled_layers

# fn(module, query, key, value, attention_mask, **kwargs) -> (output (batch, tokens, heads, head_dim), weights or None)
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_SUPPORTED = ("sdpa", "eager")
# Arguments that change what attention means; ignoring one would be silently wrong.
_REFUSED_ARGUMENTS = ("position_bias",)


@dataclass(frozen=True)
class Functions:
    """Functions of a model: its stock ones, or those that run instead of them.

    Attributes:
        attention: What computes the attention of recycled layers; that of all others is the stock one.
        forward: Its forward; None for the stock one.
        prefill: What `generate` calls to read a prompt; None for the stock one, or where there is none.
        owner: Whose they are; None for the model's own.
    """

    attention: AttentionFunction
    forward: Callable[..., Any] | None = None
    prefill: Callable[..., Any] | None = None
    owner: object = None


ENDED_ELSEWHERE = (
    "a `with recycled(...)` ended in another thread or task than it began in, as in a generator that a server runs "
    "step by step: what was called in others was not recycled. Use session.generate: it is the session's anywhere."
)
NO_BATCHES = (
    "continuous batching (generate_batch, transformers serve --continuous-batching) reads a cache of pages that "
    "recycled attention does not cover: use generate, or another model object for it."
)
# What runs instead, in this thread or task, by the identity of the model.
_INSTEAD: ContextVar[Mapping[int, Functions]] = ContextVar("instead", default=MappingProxyType({}))


def owner_here(model: PreTrainedModel) -> object:
    """Whose functions run in the place of the model's own in this thread or task; None if those do."""
    instead = _INSTEAD.get().get(id(model))
    return None if instead is None else instead.owner


def own_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward, or, while somebody runs another in its place, the one that is put back afterwards."""
    dispatch = _DISPATCHES.get(model)
    stock = None if dispatch is None else dispatch.stock
    return model.forward if stock is None or stock.forward is None else stock.forward


@contextmanager
def replaced(
    model: PreTrainedModel, make: Callable[[Functions], Functions], *, inside_of: object = None
) -> Iterator[None]:
    """Run other functions in the place of a model's own, in this thread or task and nowhere else.

    Tasks that begin inside inherit it, threads do not. Masks stay those of the model's own implementation. The model is
    as it was when the last that needed this has ended, and calls of other threads that were running meanwhile.

    Args:
        model: A model whose attention goes through transformers' AttentionInterface.
        make: Given the stock functions, returns those to use instead.
        inside_of: An owner whose functions may be the ones that run here meanwhile; theirs run again afterwards.

    Raises:
        ValueError: If the model's implementation is neither `sdpa` nor `eager`, or cannot be replaced, or something
            runs instead of it here already.
    """
    if id(model) in _INSTEAD.get() and (inside_of is None or owner_here(model) is not inside_of):
        raise ValueError(f"this {type(model).__name__} is recycled already in this thread: end the other `with` first.")
    dispatch, user = _dispatch_of(model), object()
    before, token, is_reset = _INSTEAD.get(), None, False

    def end() -> None:
        # To be called again if it was interrupted, wherever that was.
        nonlocal is_reset
        try:
            if token is None:
                _INSTEAD.set(before)
            elif not is_reset:
                _INSTEAD.reset(token)
                is_reset = True
        except ValueError:
            is_reset = True
            warnings.warn(ENDED_ELSEWHERE, stacklevel=5)
        except RuntimeError:
            # It was reset, and interrupted before that was noted.
            pass
        finally:
            dispatch.end(user)

    try:
        token = _INSTEAD.set({**before, id(model): make(dispatch.begin(user))})
        yield
    finally:
        # An interrupt may come before the first call has done anything.
        try:
            end()
        finally:
            end()


def attention_replaced(
    model: PreTrainedModel, make: Callable[[AttentionFunction], AttentionFunction], *, inside_of: object = None
) -> AbstractContextManager[None]:
    """The same for attention alone: `make` is given the stock function."""
    return replaced(model, lambda stock: Functions(make(stock.attention)), inside_of=inside_of)


class _Dispatch:
    """Stands in the place of a model's functions while anybody needs it, and asks who is calling.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # The model keeps this alive while it is in place.
        self._model = weakref.ref(model)
        self._lock = threading.RLock()
        self._users: set[object] = set()
        self._put_back: list[Callable[[], None]] = []
        self._stock: Functions | None = None

    @property
    def stock(self) -> Functions | None:
        """The stock functions while this is in place."""
        return self._stock

    def begin(self, user: object) -> Functions:
        """Be in place until `end` has been called for all users; the stock functions."""
        with self._lock:
            self._users.add(user)
            if self._stock is None:
                self._stock = self._install()
            return self._stock

    def end(self, user: object) -> None:
        """Put everything back if nobody needs it any more; to be called again if it was interrupted."""
        with self._lock:
            self._users.discard(user)
            if not self._users:
                self._remove()

    def _stay(self, user: object) -> None:
        """Be in place for one call more, if this is in place: a hook may have kept our function for longer."""
        with self._lock:
            if self._stock is not None:
                self._users.add(user)

    def _remove(self) -> None:
        while self._put_back:
            self._put_back[-1]()
            self._put_back.pop()
        self._stock = None

    def _install(self) -> Functions:
        model = self._model()
        assert model is not None
        key = id(model)
        stock = Functions(_stock_attention(model), model.forward, getattr(model, "_prefill", None))
        layers = recycled_layers(model)

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            instead = _INSTEAD.get().get(key)
            # A vision tower's layers have no index.
            if instead is None or getattr(module, "layer_idx", None) not in layers:
                return stock.attention(module, *args, **kwargs)
            for name in _REFUSED_ARGUMENTS:
                if kwargs.get(name) is not None:
                    raise ValueError(f"attention with {name!r} ({type(module).__name__}) is not supported.")
            return instead.attention(module, *args, **kwargs)

        def dispatcher(name: str) -> Callable[..., Any]:
            own = getattr(stock, name)

            # `generate` reads the signature to know what to pass.
            @wraps(own)
            def function(*args: Any, **kwargs: Any) -> Any:
                instead = _INSTEAD.get().get(key)
                ours = None if instead is None else getattr(instead, name)
                if instead is not None:
                    return (ours or own)(*args, **kwargs)
                # Whoever is in the middle of a stock call still finds the name of our attention in the configuration.
                user = object()
                try:
                    self._stay(user)
                    return own(*args, **kwargs)
                finally:
                    try:
                        self.end(user)
                    finally:
                        self.end(user)

            # `generate` compiles the model's call for a static cache on a GPU. What is remembered between steps is
            # nothing to trace, and tensors that it keeps must not lie in memory that a compiled call uses again.
            untraced: Callable[..., Any] = torch.compiler.disable(function)
            return untraced

        try:
            self._put_attention(model, attention)
            self._put_method(model, "forward", dispatcher("forward"))
            if stock.prefill is not None:
                self._put_method(model, "_prefill", dispatcher("prefill"))
            # It would run in a thread of its own, and not recycled.
            self._put_method(model, "init_continuous_batching", refuse_batches)
        except BaseException:
            self._remove()
            raise
        return stock

    def _put_method(self, model: PreTrainedModel, name: str, function: Callable[..., Any]) -> None:
        before = model.__dict__.get(name)

        def put_back() -> None:
            # Hooks that were added meanwhile stand around ours, and stay.
            if model.__dict__.get(name) is not function:
                return
            if before is None:
                del model.__dict__[name]
            else:
                model.__dict__[name] = before

        self._put_back.append(put_back)
        model.__dict__[name] = function

    def _put_attention(self, model: PreTrainedModel, attention: AttentionFunction) -> None:
        original, name = model.config._attn_implementation, f"recycled-{id(attention):x}"
        began = False

        def put_back() -> None:
            nonlocal began
            # An interrupt may have left it half done.
            began |= model.config._attn_implementation == name
            if began:
                model.set_attn_implementation(original)
            # Registering has a public way in and none out.
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)

        self._put_back.append(put_back)
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"{type(model).__name__} does not let its attention function be replaced.")


def refuse_batches(*_: Any, **__: Any) -> None:
    """Stands in the place of what begins continuous batching.

    Raises:
        ValueError: Always.
    """
    raise ValueError(NO_BATCHES)


_DISPATCHES: weakref.WeakKeyDictionary[PreTrainedModel, _Dispatch] = weakref.WeakKeyDictionary()


def _dispatch_of(model: PreTrainedModel) -> _Dispatch:
    # One operation of a dictionary, for whatever threads come at once; a lock could be left locked by an interrupt.
    return _DISPATCHES.setdefault(model, _Dispatch(model))


def refuse_full_window(layer: int, n_tokens: int, window: int | None) -> None:
    """Refuse a context that a layer with a sliding window no longer sees as a whole.

    Raises:
        ValueError: With the layer and its window.
    """
    if window is not None and n_tokens >= window:
        raise ValueError(
            f"layer {layer} attends to a sliding window of {window} tokens and the context has reached it: "
            "recycled attention covers contexts within the window only."
        )


def _stock_attention(model: PreTrainedModel) -> AttentionFunction:
    implementation = model.config._attn_implementation
    if implementation not in _SUPPORTED:
        raise ValueError(
            f"recycled attention replaces 'sdpa' or 'eager' attention, and this model runs {implementation!r}: "
            "load it with attn_implementation='sdpa'."
        )
    if implementation in ALL_ATTENTION_FUNCTIONS:
        function: AttentionFunction = ALL_ATTENTION_FUNCTIONS[implementation]
        return function

    # Eager attention is a function of each model's own module.
    def eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = sys.modules[type(module).__module__].eager_attention_forward(
            module, *args, **kwargs
        )
        return result

    return eager
