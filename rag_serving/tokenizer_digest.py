"""A digest of a tokenizer, whatever the layout of its files; both services compute the same."""

import hashlib
import json
from collections.abc import Mapping

SPECIAL_TOKENS = ("pad", "bos", "eos")


def tokenizer_digest(backend_json: str, special_ids: Mapping[str, int | None]) -> str:
    """Returns "sha256:…" of what decides the ids of a text.

    `backend_json` is the tokenizers library's `Tokenizer.to_str()`; truncation and padding are left out of
    it, because each call sets its own. `special_ids` gives the ids of "pad", "bos" and "eos", None where
    the tokenizer has none. Raises ValueError for other names, or where the JSON is not an object.
    """
    if set(special_ids) != set(SPECIAL_TOKENS):
        raise ValueError(f"special_ids must name {', '.join(SPECIAL_TOKENS)}, not {sorted(special_ids)}")
    backend = json.loads(backend_json)
    if not isinstance(backend, dict):
        raise ValueError("backend_json must be an object")
    backend.pop("truncation", None)
    backend.pop("padding", None)
    described = {"backend": backend, "special_ids": dict(special_ids)}
    canonical = json.dumps(described, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"
