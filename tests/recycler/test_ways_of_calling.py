"""Ways in which people call a model, one table: each is recycled, or raises, or warns, and none is anything else."""

from __future__ import annotations

import asyncio
import copy
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from policies import FixedStride, NeverFull, PolicyFile, Selection, StepPolicy
from recycler import custom_generate, load_model, recycled
from recycler.decode.receipt import Receipt
from recycler.model.shape import model_shape

SELECTION = Selection(12, sinks=2, window=4)
N_NEW = 10
GREEDY = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0}
SAMPLED = {**GREEDY, "do_sample": True}


@dataclass
class Caller:
    """Somebody with a model, who calls it in one way: stock, or recycled.

    Attributes:
        model: A tiny random model of their own.
        tokenizer: Its tokenizer.
        folder: Where files may be written.
        policy: Who decides; None for stock.
        fast: As in `recycled`.
        receipts: Of the sessions that ended.
    """

    model: PreTrainedModel
    tokenizer: Any
    folder: Path
    policy: StepPolicy | None = None
    fast: bool = True
    receipts: list[Receipt] = field(default_factory=list)

    @property
    def tokens(self) -> Tensor:
        """A prompt, `(1, 30)`."""
        return torch.randint(1, 200, (1, 30), generator=torch.Generator().manual_seed(3))

    @contextmanager
    def recycled(self, target: Any = None, policy: Any = None, **how: Any) -> Iterator[Any]:
        """A session, or stock: what comes has `generate`."""
        if self.policy is None:
            yield self.model
            return
        selection = None if isinstance(policy, (PolicyFile, str, Path)) else SELECTION
        asked = self.policy if policy is None else policy
        with recycled(self.model if target is None else target, asked, selection, fast=self.fast, **how) as session:
            yield session
        self.receipts.append(session.receipt())

    def generate(self, tokens: Tensor | None = None, **how: Any) -> list[list[int]]:
        """`model.generate` inside the `with`, from one seed."""
        torch.manual_seed(7)
        tokens = self.tokens if tokens is None else tokens
        how = {"attention_mask": torch.ones_like(tokens), **GREEDY, **how}
        with self.recycled():
            found = self.model.generate(tokens, **how)
        return (found if isinstance(found, Tensor) else found.sequences)[:, tokens.shape[1] :].tolist()

    def file(self) -> PolicyFile:
        """The policy in a file of this model."""
        return PolicyFile(self.policy or NeverFull(), SELECTION, model_shape(self.model, "tiny"))


Way = Callable[[Caller], Any]
APPLIED: dict[str, Way] = {}


def applied(name: str, **how: Any) -> Any:
    """A way that is recycled; without a function: `generate` with these options."""
    if how:
        APPLIED[name] = lambda caller: caller.generate(**how)
        return None

    def note(way: Way) -> Way:
        APPLIED[name] = way
        return way

    return note


class Shift(LogitsProcessor):
    """A processor of one's own."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.roll(3, dims=-1)


class AfterFive(StoppingCriteria):
    """A criterion of one's own."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 35)


applied("greedy", use_cache=True)
applied("sampling", do_sample=True)
applied("sampling at a temperature, top-k, top-p", do_sample=True, temperature=0.7, top_k=20, top_p=0.9)
applied("sampling by min-p and typical-p", do_sample=True, min_p=0.05, typical_p=0.9)
applied("several sequences of one prompt", do_sample=True, num_return_sequences=3)
applied("repetition penalty", repetition_penalty=1.3)
applied("no repeated n-grams", no_repeat_ngram_size=2)
applied("words that are not allowed", bad_words_ids=[[5], [7, 9]])
applied("a least length", min_new_tokens=N_NEW, eos_token_id=11)
applied("several ends of text", eos_token_id=[11, 12])
applied("a processor of one's own", logits_processor=LogitsProcessorList([Shift()]))
applied("a stopping criterion of one's own", stopping_criteria=StoppingCriteriaList([AfterFive()]))
applied("a time limit", max_time=60.0)
applied("a dictionary of scores and logits", return_dict_in_generate=True, output_scores=True, output_logits=True)
applied("hidden states and attentions", return_dict_in_generate=True, output_hidden_states=True)
applied("a prompt in chunks", prefill_chunk_size=8)
applied("a static cache by name", cache_implementation="static", disable_compile=True)
applied("a generation config", generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0))


@applied("stop strings")
def _(caller: Caller) -> Any:
    return caller.generate(stop_strings=["never"], tokenizer=caller.tokenizer)


@applied("a batch")
def _(caller: Caller) -> Any:
    return caller.generate(torch.cat([caller.tokens, caller.tokens.flip(1), caller.tokens.roll(5, 1)]))


@applied("a batch with padding on the left")
def _(caller: Caller) -> Any:
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :7] = 0
    return caller.generate(torch.cat([caller.tokens, caller.tokens.flip(1)]), attention_mask=mask)


@applied("a prompt of one token")
def _(caller: Caller) -> Any:
    return caller.generate(caller.tokens[:, :1])


@applied("a prompt of embeddings")
def _(caller: Caller) -> Any:
    embedded = caller.model.get_input_embeddings()(caller.tokens)
    with caller.recycled():
        return caller.model.generate(inputs_embeds=embedded, **GREEDY).tolist()


@applied("a cache of one's own")
def _(caller: Caller) -> Any:
    return caller.generate(past_key_values=DynamicCache(config=caller.model.config))


@applied("a static cache of one's own")
def _(caller: Caller) -> Any:
    return caller.generate(past_key_values=StaticCache(caller.model.config, max_cache_len=60))


@applied("two turns over one cache")
def _(caller: Caller) -> Any:
    with caller.recycled():
        first = caller.model.generate(caller.tokens, return_dict_in_generate=True, **GREEDY)
        longer = torch.cat([first.sequences, caller.tokens[:, :9]], dim=1)
        return caller.model.generate(longer, past_key_values=first.past_key_values, **GREEDY).tolist()


@applied("a turn that is taken back")
def _(caller: Caller) -> Any:
    with caller.recycled():
        first = caller.model.generate(caller.tokens, return_dict_in_generate=True, **GREEDY)
        first.past_key_values.crop(-6)
        edited = torch.cat([first.sequences[:, :33], caller.tokens[:, :4]], dim=1)
        return caller.model.generate(edited, past_key_values=first.past_key_values, **GREEDY).tolist()


def step_by_step(caller: Caller, call: Callable[..., Any]) -> list[int]:
    """A loop of one's own."""
    with torch.no_grad(), caller.recycled():
        out = call(caller.tokens, use_cache=True)
        cache, found = out.past_key_values, [out.logits[0, -1].argmax()]
        for _ in range(N_NEW - 1):
            found.append(call(found[-1].view(1, 1), past_key_values=cache).logits[0, -1].argmax())
    return [int(token) for token in found]


@applied("a loop of one's own")
def _(caller: Caller) -> Any:
    return step_by_step(caller, caller.model)


@applied("a loop of one's own over forward")
def _(caller: Caller) -> Any:
    return step_by_step(caller, lambda *args, **kwargs: caller.model.forward(*args, **kwargs))


@applied("with gradients")
def _(caller: Caller) -> Any:
    with torch.enable_grad():
        return caller.generate()


@applied("in inference mode")
def _(caller: Caller) -> Any:
    with torch.inference_mode():
        return caller.generate()


@applied("eager attention")
def _(caller: Caller) -> Any:
    caller.model.set_attn_implementation("eager")
    return caller.generate()


@applied("bfloat16")
def _(caller: Caller) -> Any:
    caller.model.bfloat16()
    return caller.generate()


@applied("a streamer")
def _(caller: Caller) -> Any:
    streamer = TextIteratorStreamer(caller.tokenizer)
    caller.generate(streamer=streamer)
    return list(streamer)


@applied("a streamer in a thread that outlives the with")
def _(caller: Caller) -> Any:
    streamer = TextIteratorStreamer(caller.tokenizer)
    with caller.recycled() as session:
        how = {"attention_mask": torch.ones_like(caller.tokens), "streamer": streamer, **GREEDY}
        thread = threading.Thread(target=session.generate, args=(caller.tokens,), kwargs=how)
        if caller.policy is None:
            thread.start()
            return list(streamer)
    # As a server does, whose handler has returned.
    thread.start()
    found = list(streamer)
    thread.join()
    caller.receipts[-1] = session.receipt()
    return found


@applied("a thread inside")
def _(caller: Caller) -> Any:
    found: queue.Queue[Any] = queue.Queue()
    with caller.recycled() as session:
        thread = threading.Thread(target=lambda: found.put(session.generate(caller.tokens, **GREEDY).tolist()))
        thread.start()
        thread.join()
    return found.get()


@applied("a task of asyncio")
def _(caller: Caller) -> Any:
    async def write() -> Any:
        await asyncio.sleep(0)
        return caller.model.generate(caller.tokens, **GREEDY).tolist()

    async def serve() -> Any:
        with caller.recycled():
            return await asyncio.create_task(write())

    return asyncio.run(serve())


@applied("a worker thread of asyncio")
def _(caller: Caller) -> Any:
    async def serve() -> Any:
        with caller.recycled() as session:
            return (await asyncio.to_thread(session.generate, caller.tokens, **GREEDY)).tolist()

    return asyncio.run(serve())


@applied("a pipeline of the model")
def _(caller: Caller) -> Any:
    texts = pipeline("text-generation", model=caller.model, tokenizer=caller.tokenizer, device="cpu")
    with caller.recycled():
        return texts("It was a dark and stormy night", return_full_text=False, **GREEDY)


@applied("a pipeline as the target")
def _(caller: Caller) -> Any:
    texts = pipeline("text-generation", model=caller.model, tokenizer=caller.tokenizer, device="cpu")
    with caller.recycled(texts):
        return texts(["It was dark", "and a stormy night"], batch_size=1, return_full_text=False, **GREEDY)


@applied("a chat in a pipeline")
def _(caller: Caller) -> Any:
    texts = pipeline("text-generation", model=caller.model, tokenizer=caller.tokenizer, device="cpu")
    with caller.recycled(texts):
        return texts([{"role": "user", "content": "Who goes there?"}], **GREEDY)


@applied("adapters of PEFT")
def _(caller: Caller) -> Any:
    adapted = get_peft_model(caller.model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    torch.manual_seed(2)
    for name, weight in adapted.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight, std=0.3)
    with caller.recycled(adapted):
        return adapted.generate(input_ids=caller.tokens, **GREEDY).tolist()


@applied("what torch.compile made")
def _(caller: Caller) -> Any:
    compiled = torch.compile(caller.model, backend="eager")
    with caller.recycled(compiled):
        return compiled.generate(caller.tokens, **GREEDY).tolist()


@applied("a hook in a layer")
def _(caller: Caller) -> Any:
    caller.model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return caller.generate()


@applied("linear layers that were quantized")
def _(caller: Caller) -> Any:
    caller.model = torch.ao.quantization.quantize_dynamic(caller.model, {torch.nn.Linear})
    return caller.generate()


@applied("the path of a policy file")
def _(caller: Caller) -> Any:
    caller.file().write(caller.folder / "policy.json")
    with caller.recycled(policy=str(caller.folder / "policy.json")):
        return caller.model.generate(caller.tokens, **GREEDY).tolist()


@applied("a policy file that applies itself")
def _(caller: Caller) -> Any:
    if caller.policy is None:
        return caller.model.generate(caller.tokens, **GREEDY).tolist()
    with caller.file().apply(caller.model, fast=caller.fast) as session:
        found = caller.model.generate(caller.tokens, **GREEDY).tolist()
    caller.receipts.append(session.receipt())
    return found


@applied("one with after another")
def _(caller: Caller) -> Any:
    return caller.generate(), caller.generate(caller.tokens.flip(1))


@applied("many calls in one with")
def _(caller: Caller) -> Any:
    with caller.recycled():
        return [caller.model.generate(caller.tokens.roll(i, 1), **GREEDY).tolist() for i in range(3)]


def caller_of(byte_model: Path, folder: Path) -> Caller:
    loaded = _loaded(byte_model)
    return Caller(copy.deepcopy(loaded.model), loaded.tokenizer, folder)


@cache
def _loaded(folder: Path) -> Any:
    return load_model(str(folder), device="cpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning", "ignore:.*checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:nothing was decoded inside:UserWarning")
@pytest.mark.parametrize("name", APPLIED)
def test_a_way_of_calling_is_recycled(byte_model: Path, tmp_path: Path, name: str) -> None:
    way = APPLIED[name]
    stock = way(caller_of(byte_model, tmp_path))

    # Always full is stock.
    caller = caller_of(byte_model, tmp_path)
    caller.policy = FixedStride(1)
    assert way(caller) == stock
    assert all(receipt.full_share == 1 for receipt in caller.receipts)

    # And never full is recycled at every step, alike on both paths.
    texts = {}
    for fast in (True, False):
        caller = caller_of(byte_model, tmp_path)
        caller.policy, caller.fast = NeverFull(), fast
        texts[fast] = way(caller)
        assert caller.receipts
        for receipt in caller.receipts:
            assert receipt.n_steps > 0
            assert receipt.full_share == 0
            assert bool(receipt.why_plain) == (receipt.engine != "cpu")
    # In bfloat16 the engine rounds less often than the model.
    assert texts[True] == texts[False] or name == "bfloat16"


def test_custom_generate_is_recycled(byte_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caller = caller_of(byte_model, tmp_path)
    stock = caller.generate()
    with caplog.at_level("INFO", logger="recycler"):
        assert caller.generate(custom_generate=custom_generate, policy=FixedStride(1), selection=SELECTION) == stock
        caller.generate(custom_generate=custom_generate, policy=NeverFull(), selection=SELECTION)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("recycled")]
    assert ["'full_share': 1.0" in one for one in said] == [True, False]
    assert all(f"'n_steps': {N_NEW - 1}" in one for one in said)


def test_exact_and_audited_calls_are_what_they_say(byte_model: Path, tmp_path: Path) -> None:
    caller = caller_of(byte_model, tmp_path)
    for how in (GREEDY, {**SAMPLED, "temperature": 1.5}):
        torch.manual_seed(4)
        stock = caller.model.generate(caller.tokens, **how)
        torch.manual_seed(4)
        with recycled(caller.model, NeverFull(), SELECTION, exact=True) as session:
            assert torch.equal(caller.model.generate(caller.tokens, **how), stock)
        assert session.receipt().rounds is not None
    with recycled(caller.model, NeverFull(), SELECTION, audit=3) as session:
        caller.model.generate(caller.tokens, **GREEDY)
    assert len(session.receipt().audited_kl) == 9


REFUSED: dict[str, tuple[Way, str]] = {}


def refused(name: str, sentence: str) -> Callable[[Way], Way]:
    """A way that raises, or warns, with a sentence."""

    def note(way: Way) -> Way:
        REFUSED[name] = way, sentence
        return way

    return note


REFUSED["beam search"] = (lambda caller: caller.generate(num_beams=2), "beam search and assisted decoding cannot run")
REFUSED["prompt lookup"] = (
    lambda caller: caller.generate(caller.tokens.repeat(1, 2), prompt_lookup_num_tokens=3),
    "beam search and assisted decoding cannot run",
)
REFUSED["no cache"] = (lambda caller: caller.generate(use_cache=False), "nothing was recycled inside")
REFUSED["padding on the right"] = (
    lambda caller: caller.generate(
        caller.tokens.repeat(2, 1), attention_mask=torch.tensor([[1] * 30, [1] * 25 + [0] * 5])
    ),
    "padding on the left only",
)


@refused("an assistant model", "nothing was recycled inside")
def _(caller: Caller) -> Any:
    return caller.generate(assistant_model=copy.deepcopy(caller.model))


@refused("continuous batching", "continuous batching")
def _(caller: Caller) -> Any:
    with caller.recycled():
        return caller.model.generate_batch(caller.tokens.tolist(), max_new_tokens=4)


@refused("flash attention", "recycled attention replaces 'sdpa' or 'eager' attention")
def _(caller: Caller) -> Any:
    caller.model.config._attn_implementation = "flash_attention_2"
    return caller.generate()


@refused("a with inside a with", "is recycled already in this thread")
def _(caller: Caller) -> Any:
    with caller.recycled(), caller.recycled():
        pass


@refused("a plain call in another thread", "nothing was decoded inside")
def _(caller: Caller) -> Any:
    with caller.recycled():
        thread = threading.Thread(target=lambda: caller.model.generate(caller.tokens, **GREEDY))
        thread.start()
        thread.join()


@refused("no call at all", "nothing was decoded inside")
def _(caller: Caller) -> Any:
    with caller.recycled():
        pass


@refused("a forward over a whole text", "nothing was recycled inside")
def _(caller: Caller) -> Any:
    with torch.no_grad(), caller.recycled():
        caller.model(caller.tokens)


@refused("a policy file of another model", "is of another shape")
def _(caller: Caller) -> Any:
    shape = model_shape(caller.model, "tiny")
    other = PolicyFile(NeverFull(), SELECTION, type(shape)("other", shape.layers + 1, 2, 4, 8))
    with caller.recycled(policy=other):
        pass


@refused("a bare policy without a selection", "selection")
def _(caller: Caller) -> Any:
    with recycled(caller.model, NeverFull()):
        pass


@refused("rows that move in the cache", "the KV cache changed between two decode steps")
def _(caller: Caller) -> Any:
    both = torch.cat([caller.tokens, caller.tokens.flip(1)])
    with torch.no_grad(), caller.recycled():
        cache = caller.model(both).past_key_values
        caller.model(both[:, :1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        caller.model(both[:, :1], past_key_values=cache)


@refused("something that is no model", "model")
def _(caller: Caller) -> Any:
    with caller.recycled("a name"):
        pass


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recycled_says_so_in_a_sentence(byte_model: Path, tmp_path: Path, name: str) -> None:
    way, sentence = REFUSED[name]
    for fast in (True, False):
        caller = caller_of(byte_model, tmp_path)
        caller.policy, caller.fast = NeverFull(), fast
        before = dict(vars(caller.model))
        with warnings.catch_warnings(record=True) as said, _as_warning():
            warnings.simplefilter("always")
            way(caller)
        told = [str(one.message) for one in said if sentence in str(one.message)]
        assert told, [str(one.message) for one in said]
        assert all(len(one) <= 400 for one in told)
        assert dict(vars(caller.model)) == before


@contextmanager
def _as_warning() -> Iterator[None]:
    """A refusal is told as a warning is, so that one test asks for either."""
    try:
        yield
    except (ValueError, TypeError) as error:
        warnings.warn(str(error), stacklevel=1)


def test_the_table_is_as_long_as_was_promised() -> None:
    assert len(APPLIED) + len(REFUSED) >= 60
