"""What `recycler.model_weights` was in 0.1."""

from __future__ import annotations

import warnings

from recycler.model.decoder_parts import DecoderParts, bias_of, decoder_parts

__all__ = ["DecoderParts", "bias_of", "decoder_parts"]

warnings.warn(
    "recycler.model_weights is now recycler.model.decoder_parts; the old path goes in 0.3.",
    DeprecationWarning,
    stacklevel=2,
)
