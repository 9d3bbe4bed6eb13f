"""`transformers serve` on an exported folder, as a client of OpenAI's sees it: `make test-serve`."""

from __future__ import annotations

import ast
import os
import socket
import string
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policies import FixedStride, PolicyFile, Selection
from recycler.export import Weights
from recycler.export import main as export
from recycler.model.attention_hook import NO_BATCHES
from recycler.model.shape import model_shape

openai = pytest.importorskip("openai", reason="make test-serve installs what this needs")
pytest.importorskip("fastapi", reason="make test-serve installs what this needs")
pytest.importorskip("uvicorn", reason="make test-serve installs what this needs")

N_NEW = 24
PROMPTS = [f"It was a dark and stormy night; {what} fell." for what in ("rain", "snow", "nobody", "the prices")]
# As docs/engine.md has it: transformers' own command, with a place for the receipts to go.
SERVE = "import logging; logging.basicConfig(level='INFO'); from transformers.cli.transformers import main; main()"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder with a random model of one token per letter."""
    place = tmp_path_factory.mktemp("serve")
    letters = {letter: i for i, letter in enumerate(string.ascii_letters + string.digits + " ;.<>")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=letters, merges=[])))
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(place / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(place / "tiny")
    shape = model_shape(model, str(place / "tiny"))
    PolicyFile(FixedStride(5), Selection(16, sinks=2, window=4), shape).write(place / "policy.json")
    export(place / "policy.json", place / "folder", str(place / "tiny"), Weights.LINK)
    return place / "folder"


@pytest.fixture(scope="module")
def written(folder: Path) -> Iterator[Callable[..., str]]:
    """What the folder's own `generate` writes, or the model's without its policy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ours, stock = (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust) for trust in (True, False))

        def written(prompt: str, recycled: bool = True) -> str:
            turns = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            model = ours if recycled else stock
            tokens = model.generate(**inputs, max_new_tokens=N_NEW, do_sample=False)
            text: str = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
            return text

        yield written


@dataclass
class Server:
    """A running server.

    Attributes:
        client: Of OpenAI's library.
        model: What it calls the model.
        log: The file of what the server says.
    """

    client: Any
    model: str
    log: Path

    def chat(self, prompt: str, stream: bool = False) -> Any:
        """What the server answers at temperature 0."""
        turns = [{"role": "user", "content": prompt}]
        return self.client.chat.completions.create(
            model=self.model, messages=turns, max_tokens=N_NEW, temperature=0, stream=stream
        )

    def receipts(self) -> list[dict[str, Any]]:
        """Those of all requests so far."""
        lines = self.log.read_text().splitlines()
        return [
            ast.literal_eval(line.split("recycled: ", 1)[1]) for line in lines if "INFO:recycler:recycled: " in line
        ]


@contextmanager
def served(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder.parent / "modules of the server"),
    }
    command = [sys.executable, "-c", SERVE, "serve", "--trust-remote-code", "--device", "cpu", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT, env=settings)
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0) as client:
            yield Server(client, str(folder), log)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with served(folder, folder.parent / "log") as server:
        yield server


def test_the_server_writes_what_the_folder_writes(server: Server, written: Callable[..., str]) -> None:
    before = len(server.receipts())
    text = server.chat(PROMPTS[0]).choices[0].message.content
    assert text == written(PROMPTS[0])
    assert text != written(PROMPTS[0], recycled=False)
    (receipt,) = server.receipts()[before:]
    assert (receipt["engine"], receipt["n_steps"]) == ("cpu", N_NEW - 1)
    assert receipt["read_share"] < 0.6


def test_a_stream_comes_in_pieces_and_is_the_same_text(server: Server, written: Callable[..., str]) -> None:
    before = len(server.receipts())
    pieces = [piece.choices[0].delta.content for piece in server.chat(PROMPTS[1], stream=True)]
    assert "".join(filter(None, pieces)) == written(PROMPTS[1])
    assert len(pieces) > N_NEW / 2
    assert [receipt["n_steps"] for receipt in server.receipts()[before:]] == [N_NEW - 1]


def test_requests_at_once_are_each_as_alone(server: Server, written: Callable[..., str]) -> None:
    def ask(i: int) -> str:
        if i % 2:
            return "".join(piece.choices[0].delta.content or "" for piece in server.chat(PROMPTS[i], stream=True))
        text: str = server.chat(PROMPTS[i]).choices[0].message.content
        return text

    before = len(server.receipts())
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        texts = list(threads.map(ask, range(len(PROMPTS))))
    assert texts == [written(prompt) for prompt in PROMPTS]
    assert [receipt["n_steps"] for receipt in server.receipts()[before:]] == [N_NEW - 1] * len(PROMPTS)


def test_continuous_batching_of_the_folder_is_refused(folder: Path) -> None:
    with (
        served(folder, folder.parent / "log of batches", "--continuous-batching") as server,
        pytest.raises(openai.InternalServerError),
    ):
        server.chat(PROMPTS[0])
    assert f"ValueError: {NO_BATCHES}" in server.log.read_text()
    assert server.receipts() == []
