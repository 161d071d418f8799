"""Questions to token ids, token ids to answers."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from generator_service.errors import CheckpointError
from rag_serving.tokenizer_digest import tokenizer_digest

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class TextTokenizer:
    """A Hugging Face tokenizer behind the few calls that are needed; calls take turns, since each sets state on it."""

    def __init__(self, source: str) -> None:
        self._lock = threading.Lock()
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"no tokenizer in {source}: {error}") from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, never cut."""
        with self._lock:
            encoded = self._tokenizer(list(texts), truncation=False, padding=False, verbose=False)
        return list(encoded["input_ids"])

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of answers, as labels."""
        with self._lock:
            encoded = self._tokenizer(text_target=list(texts), truncation=False, padding=False, verbose=False)
        return list(encoded["input_ids"])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Token ids without special tokens, and the characters of each; None for a tokenizer that cannot tell."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        with self._lock:
            encoded = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
            )
        return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        with self._lock:
            return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    @functools.cached_property
    def byte_token_ids(self) -> frozenset[int]:
        """Tokens that stand for one byte of a character that the vocabulary does not have: "<0xE6>"."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return frozenset(token for piece, token in vocabulary.items() if _BYTE_TOKEN.fullmatch(piece))

    @property
    def vocab_size(self) -> int:
        """Token ids that exist."""
        return len(self._tokenizer)

    @property
    def pad_token_id(self) -> int:
        """What shorter rows of a batch are filled with; decoding leaves it out."""
        pad = self._tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    @property
    def digest(self) -> str:
        """As the retriever computes it; empty for a tokenizer that has no fast backend."""
        if not getattr(self._tokenizer, "is_fast", False):
            return ""
        special = {
            "pad": self._tokenizer.pad_token_id,
            "bos": self._tokenizer.bos_token_id,
            "eos": self._tokenizer.eos_token_id,
        }
        return tokenizer_digest(self._tokenizer.backend_tokenizer.to_str(), special)
