"""The README's policy in the decoder, on the exported file's model and sets, and in replay on the traces beside it.

Run by `try_wheel.py`, which puts the README's code beside it as `readme_policy.py`. Prints full shares as a JSON line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from readme_policy import DriftAfter, policy

import tuning
from policies import PolicyFile
from recycler import load_model, recycled
from traces import TraceFolder

results, n_new_tokens = Path(sys.argv[1]), int(sys.argv[2])
if not Path(tuning.__file__).is_relative_to(sys.prefix):
    sys.exit(f"{tuning.__file__} is not what was installed into {sys.prefix}.")

selection = PolicyFile.read(results / "policy.json").selection
traces = tuning.TraceBatch(list(TraceFolder(results / "traces")))
loaded = load_model(None, device="cpu")
prompt = loaded.tokenizer("Once upon a time there was a shopkeeper who kept nothing but keys", return_tensors="pt")

shares = {}
# The second one's query has always drifted: it shows that it is asked.
for name, own in {"DriftAfter(4, 0.7) at 0.1": policy, "DriftAfter(1, 1)": DriftAfter(1, 1.0)}.items():
    with torch.no_grad(), recycled(loaded.model, own, selection) as session:
        loaded.model.generate(**prompt, max_new_tokens=n_new_tokens, do_sample=False)
    receipt = session.receipt()
    if receipt.engine != "cpu":
        sys.exit(f"{name} ran on the {receipt.engine} path, because {receipt.why_plain}.")
    shares[name] = {"decoder": receipt.full_share, "replay": tuning.replay_policy(traces, own).full_share}
print(json.dumps(shares))
