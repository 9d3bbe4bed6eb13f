"""What a session says where nothing was recycled, or nothing can be any more."""

from __future__ import annotations

NOT_CALLED = (
    "nothing was decoded inside `with recycled(...) as session`: the model was not called there. What runs in another "
    "thread, or after the end of the `with`, as a streamer's generation does, is recycled by session.generate only."
)
NOTHING_RECYCLED = (
    "nothing was recycled inside `with recycled(...)`: every forward brought several tokens, which are read with full "
    "attention, as those of use_cache=False, of prompt lookup and of scoring a text are. Recycled steps bring one "
    "token per row, with a cache."
)
SPOILED = (
    "an audit was interrupted, and this KV cache holds neither the tokens before it nor those after it: read the text "
    "again with another cache."
)
STEPPED_INSIDE = (
    "a decode step did not come through the model's forward, as those before it did: inner modules were called, or the "
    "forward is another one since the prompt. Call the model itself, or use recycled(..., fast=False)."
)
MODEL_CHANGED = (
    "the model changed after its prompt was read: a module, a weight or a hook of it is another one, and a decode step "
    "cannot leave the engine; change it before the prompt, or use recycled(..., fast=False)."
)
