"""The other side of `benchmarks/peers.py`, in an environment with kvpress: nothing of ours is imported.

Arguments: the model's folder, the prompts, numbers of tokens to keep, and where to write what was found.
"""

import json
import sys

import kvpress
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


def presses(kept_share: float) -> dict:
    """kvpress's methods with their papers' settings, as ours have them."""
    ratio = 1 - kept_share
    return {
        "StreamingLLM": kvpress.StreamingLLMPress(compression_ratio=ratio, n_sink=4),
        "SnapKV": kvpress.SnapKVPress(compression_ratio=ratio, window_size=32, kernel_size=7),
        "TOVA": kvpress.TOVAPress(compression_ratio=ratio),
        "ExpectedAttention": kvpress.ExpectedAttentionPress(compression_ratio=ratio),
    }


@torch.inference_mode()
def main(folder: str, prompts: str, sizes: str, out: str) -> None:
    """Measure every method on every prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    given = np.load(prompts)
    texts, n_prompt = torch.as_tensor(given["tokens"].astype(np.int64)), int(given["n_prompt"])
    n_steps = texts.shape[1] - n_prompt
    kept = [int(size) for size in sizes.split(",")]
    found = {size: {name: [] for name in presses(0.5)} for size in kept}
    for number, text in enumerate(texts[:, None]):
        full = model(text, logits_to_keep=n_steps).logits[0].log_softmax(-1)
        for size in kept:
            for name, press in presses((size + 0.5) / n_prompt).items():
                cache = DynamicCache()
                with press(model):
                    model(text[:, :n_prompt], past_key_values=cache, logits_to_keep=1)
                assert cache.get_seq_length() == size, (name, cache.get_seq_length(), size)
                kl = []
                for step in range(n_prompt, n_prompt + n_steps):
                    fed = text[:, step : step + 1]
                    logits = model(fed, past_key_values=cache, position_ids=torch.tensor([[step]])).logits
                    log_p, exact = logits[0, -1].log_softmax(-1), full[step - n_prompt]
                    kl.append(float((exact.exp() * (exact - log_p)).sum()))
                found[size][name].append(float(np.mean(kl)))
        print(f"kvpress: {number + 1} of {len(texts)} prompts", file=sys.stderr)
    versions = {"kvpress": "0.5.5", "transformers": transformers.__version__, "torch": torch.__version__}
    means = {size: {name: float(np.mean(kl)) for name, kl in of_size.items()} for size, of_size in found.items()}
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"theirs": means, "their_versions": versions}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
