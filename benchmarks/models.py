"""`python benchmarks/models.py`: which architectures are recycled. Writes `docs/models.md`.

A tiny random model of every family decodes, is recorded and runs in closed loop, and is compared with stock `generate`.
A test does the same and fails where the page says anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from policies import AlwaysFull, NeverFull, Selection
from recycler import recycled
from recycler.measure.closed_loop import run_closed_loops
from recycler.model.shape import n_layers, recycled_layers
from recycler.prompts import Prompt
from recycler.record.one_prompt import record_trace

_N_PROMPT, _N_NEW, _WINDOW = 24, 16, 12
_ALL = Selection(k=_N_PROMPT + _N_NEW, sinks=1, window=4)
_SHAPE: Mapping[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_HEAD = {"head_dim": 8}
_WINDOWS = {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED_EXPERT = {**_EXPERTS, "shared_expert_intermediate_size": 16}
_RECURRENT = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


_HEAD_OF_PAGE = """\
# Models

Which architectures of transformers are recycled, and how: `python benchmarks/models.py` writes this page, and a test
fails where a line is no longer true. Each line is of a tiny random model, mostly with four layers.

- **Decodes on**: what takes its decode steps on a CPU. `cpu` is the engine, `cpu_modules` its attention between the
  model's own modules, `plain` the path that runs every model whose attention goes through transformers'
  `AttentionInterface`. Soft-capping and attention sinks are computed in all that meet them.
- **Recycled**: layers that attend to the whole context. Layers with a window, chunks, convolutions or a recurrence read
  a bounded part of it whatever its length: they **pass through** untouched and are no units, so a budget is one of the
  recycled layers. A model all of whose layers have a window is recycled as long as the context lies within it.
- **Equals stock**: under a policy that is always full, and with sets that hold the whole context, the text is that of
  stock `generate` token for token; KL in closed loop is 0; recorded sets lose nothing. So recording and tuning work on
  every model that decodes.

| model | decodes on | recycled | pass through | equals stock |
|---|---|---|---|---|"""


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: What transformers calls it.
        config: What its configuration needs beside `_SHAPE`.
        vision: Whether it is built around a text model, by `config` alone.
    """

    model_type: str
    config: Mapping[str, Any]
    vision: bool = False

    def model(self) -> PreTrainedModel:
        """A tiny random model."""
        torch.manual_seed(0)
        if self.vision:
            return AutoModelForImageTextToText.from_config(AutoConfig.for_model(self.model_type, **self.config)).eval()
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(self.model_type, **{**_SHAPE, **self.config})
        ).eval()


FAMILIES: Mapping[str, Family] = {
    "Llama": Family("llama", {}),
    "Mistral": Family("mistral", {"sliding_window": None}),
    "Qwen2": Family("qwen2", {}),
    "Qwen2 with windows": Family(
        "qwen2", {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 2}
    ),
    "Qwen3": Family("qwen3", _HEAD),
    "Qwen3-MoE": Family("qwen3_moe", {**_HEAD, **_EXPERTS}),
    "Qwen3-Next (hybrid)": Family("qwen3_next", {**_HEAD, **_SHARED_EXPERT, **_RECURRENT}),
    "Qwen3.5 (hybrid)": Family("qwen3_5_text", {**_HEAD, **_RECURRENT}),
    "Mixtral": Family("mixtral", {"num_local_experts": 4}),
    "Ministral": Family("ministral", {**_HEAD, **_WINDOWS}),
    "Phi-3": Family(
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "OLMo 2": Family("olmo2", {}),
    "OLMo 3": Family("olmo3", {"sliding_window": _WINDOW}),
    "SmolLM3": Family("smollm3", {}),
    "Granite": Family("granite", {}),
    "StarCoder2": Family("starcoder2", {}),
    "GLM-4": Family("glm4", _HEAD),
    "GPT-NeoX": Family("gpt_neox", {"num_key_value_heads": 4}),
    "GPT-2": Family("gpt2", {"num_key_value_heads": 4, "n_embd": 32, "n_layer": 4, "n_head": 4}),
    "Gemma": Family("gemma", _HEAD),
    "Gemma 2": Family(
        "gemma2",
        {**_HEAD, "sliding_window": _WINDOW, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    "Gemma 3": Family("gemma3_text", {**_HEAD, **_WINDOWS, "query_pre_attn_scalar": 8}),
    "Gemma 4": Family(
        "gemma4_text",
        {
            **_HEAD,
            **_WINDOWS,
            "global_head_dim": 12,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 97,
            "hidden_size_per_layer_input": 8,
        },
    ),
    "Cohere 2": Family("cohere2", _WINDOWS),
    "EXAONE 4": Family("exaone4", _WINDOWS),
    "GPT-OSS": Family("gpt_oss", {**_HEAD, **_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Llama 4": Family(
        "llama4_text",
        {
            **_HEAD,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": _WINDOW,
            "layer_types": ["chunked_attention", "full_attention"] * 2,
            "no_rope_layers": [1, 0, 1, 0],
            "interleave_moe_layer_step": 2,
        },
    ),
    "DeepSeek-V3 (MLA)": Family(
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "n_shared_experts": 1,
        },
    ),
    "LFM2 (hybrid)": Family("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}),
    "LLaVA, text side": Family(
        "llava",
        {"text_config": {"model_type": "llama", **_SHAPE}, "vision_config": _VISION, "image_token_id": 96},
        vision=True,
    ),
    "Falcon": Family("falcon", {}),
    "Falcon-H1": Family("falcon_h1", {}),
    "Mamba": Family("mamba", {}),
}


@dataclass(frozen=True)
class Found:
    """What became of a family.

    Attributes:
        engine: What decoded it; empty if it is refused.
        recycled: Layers that are recycled, of all.
        passing: Kinds of layers that pass through.
        refused: The refusal, in one sentence; empty if there is none.
        differences: What was not as full attention: empty if the text of always full and of sets that hold the whole
            context is that of stock `generate`, sets lose nothing in recordings, and KL in closed loop is 0.
    """

    engine: str = ""
    recycled: str = ""
    passing: tuple[str, ...] = ()
    refused: str = ""
    differences: tuple[str, ...] = ()

    def row(self, name: str) -> str:
        """A line of the page's table."""
        passing = ", ".join(kind.removesuffix("_attention") for kind in self.passing) or "-"
        if self.refused:
            return f"| {name} | refused | - | - | {self.refused} |"
        return f"| {name} | {self.engine} | {self.recycled} | {passing} | {'; '.join(self.differences) or 'yes'} |"


def try_family(family: Family) -> Found:
    """Decode, record and run in closed loop."""
    model = family.model()
    try:
        layers = recycled_layers(model)
        tokens = torch.randint(1, 96, (2, _N_PROMPT), generator=torch.Generator().manual_seed(1))
        how = {"max_new_tokens": _N_NEW, "min_new_tokens": _N_NEW, "do_sample": False}
        stock = model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
        differences, engine = [], ""
        for said, policy in (("always full", AlwaysFull()), ("sets of all tokens", NeverFull())):
            with recycled(model, policy, _ALL) as session:
                text = model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)
            engine = session.receipt().engine
            if session.receipt().n_steps != _N_NEW - 1:
                differences.append(f"{said}: not recycled")
            if not torch.equal(text, stock):
                differences.append(f"{said}: another text")
        texts = [row.numpy() for row in stock]
        for loop in run_closed_loops(model, texts, _N_PROMPT, [NeverFull()], _ALL):
            if np.abs(loop.kl).max() > 1e-5:
                differences.append(f"closed loop: KL {np.abs(loop.kl).max():.0e}")
        prompt = Prompt("text", "random", texts[0].astype(np.uint32), _N_PROMPT, "drawn", "none")
        lost = 1 - np.nanmin(record_trace(model, prompt, _ALL, max_age=4).recovered_mass)
        if lost > 1e-4:
            differences.append(f"recorded: sets of all tokens lose {lost:.0e}")
    except ValueError as error:
        return Found(refused=str(error))
    kinds = dict.fromkeys(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    passing = tuple(kinds) if len(layers) < n_layers(model) else ()
    return Found(
        engine=engine,
        recycled=f"{len(layers)} of {n_layers(model)}",
        passing=tuple(kind for kind in passing if kind != "full_attention"),
        differences=tuple(differences),
    )


def page(found: Mapping[str, Found]) -> str:
    """`docs/models.md`."""
    return "\n".join([_HEAD_OF_PAGE, *(one.row(name) for name, one in found.items()), ""])


def main() -> None:
    found = {name: try_family(family) for name, family in tqdm(FAMILIES.items(), unit="family")}
    (Path(__file__).parents[1] / "docs" / "models.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
