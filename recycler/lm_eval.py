"""`python -m recycler.lm_eval`: the command `lm_eval` with a model `recycler` that decodes with a policy."""

from __future__ import annotations

import sys

from policies import written_by


def main() -> None:
    """Run lm-eval's own command line, with `--model recycler --model_args pretrained=...,policy=FILE`."""
    if sys.argv[1:] == ["--version"]:
        print(written_by())
        sys.exit(0)
    try:
        from lm_eval.__main__ import cli_evaluate

        import recycler.harness.recycled_lm  # noqa: F401  registers the model
    except ModuleNotFoundError as error:
        sys.exit(f'error: this needs lm-eval ({error}): run `pip install "recycled-attention[lm-eval]"`.')
    try:
        cli_evaluate()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
