"""`python benchmarks/llama.py`: the same weights in llama.cpp, for the table of `benchmarks/decode.py`.

`pip install llama-cpp-python` builds llama.cpp; it is no dependency of the project. Run it on the same machine, with
nothing else running, and give its last line as a file to `benchmarks/decode.py --llama FILE`. It needs nothing of this
project, so that it runs in an environment of its own.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LlamaTimes:
    """What llama.cpp took.

    Attributes:
        found: The last line of this command.
    """

    found: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> LlamaTimes:
        """Read a file that holds the last line of this command."""
        try:
            return cls(json.loads(path.read_text().splitlines()[-1]))
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"{path} holds no result of benchmarks/llama.py: {error}.") from error

    def rows(self, others: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As rows of the table, next to `generate` at the same context."""
        rows = []
        for row in self.found["rows"]:
            same = [
                other
                for other in others
                if other["case"] == "generate"
                and (other["context_tokens"], other["batch"]) == (row["context_tokens"], row["batch"])
            ]
            against = row["tokens_per_s"] / same[0]["tokens_per_s"] if same else None
            rows.append(
                {
                    "engine": "llama.cpp",
                    "case": f"llama.cpp, {row['weights']} weights, {row['cache']} cache",
                    "device": "cpu",
                    "dtype": row["weights"],
                    "k": None,
                    "full_share": 1.0,
                    "ideal_share": None,
                    "floor_share": None,
                    "vs_generate": None if against is None else round(against, 3),
                    **{name: row[name] for name in ("context_tokens", "batch", "step_ms", "tokens_per_s")},
                }
            )
        return rows


def main(gguf_file: str, context_tokens: int = 8000, steps: int = 40, rounds: int = 5, threads: int = 2) -> None:
    """Time decode steps of the file's own weights, and of the same numbers as float32."""
    # Here, not above: who reads this command's result needs no llama.cpp.
    import llama_cpp

    wide = Path(gguf_file).with_suffix(".f32.gguf")
    wide = Path("/tmp") / wide.name
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
    settings.allow_requantize = True
    if llama_cpp.llama_model_quantize(gguf_file.encode(), str(wide).encode(), ctypes.byref(settings)):
        sys.exit(f"{gguf_file} cannot be widened to float32.")
    rows = []
    for weights, file in (("Q4_1", gguf_file), ("float32", str(wide))):
        for cache, kind in (("float16", llama_cpp.GGML_TYPE_F16), ("float32", llama_cpp.GGML_TYPE_F32)):
            if (weights, cache) == ("Q4_1", "float32"):
                continue
            model = llama_cpp.Llama(
                file,
                n_ctx=context_tokens + (rounds + 1) * steps + 8,
                n_threads=threads,
                n_threads_batch=threads,
                type_k=kind,
                type_v=kind,
                flash_attn=True,
                verbose=False,
            )
            model.eval([1 + i % 40000 for i in range(context_tokens)])
            means = []
            for _ in range(rounds + 1):
                began = time.perf_counter()
                for step in range(steps):
                    model.eval([100 + step])
                means.append((time.perf_counter() - began) / steps * 1e3)
                print(f"{weights} weights, {cache} cache: {means[-1]:.2f} ms per step", file=sys.stderr)
            step_ms = statistics.median(means[1:])
            rows.append(
                {
                    "weights": weights,
                    "cache": cache,
                    "context_tokens": context_tokens,
                    "batch": 1,
                    "step_ms": round(step_ms, 3),
                    "tokens_per_s": round(1e3 / step_ms, 2),
                }
            )
            del model
    wide.unlink()
    print(json.dumps({"version": llama_cpp.__version__, "threads": threads, "rows": rows}))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/llama.py MODEL.gguf")
    main(sys.argv[1])
