"""The decoder's keys and values that Forward keeps between calls: bounded in number and bytes, and not for ever."""

from __future__ import annotations

import copy
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_REMEMBERED = 1024
"""Handles that are gone, of which it is still known why."""


class PastError(Exception):
    """A handle cannot be had: status and reason are for the caller."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Past:
    """What a pass leaves for the next: the cache of transformers, and what its rows were decoded against."""

    cache: Any  # EncoderDecoderCache
    encoder_last_hidden_state: Tensor  # [rows, length, d_model]
    context_attention_mask: Tensor | None  # [rows, length]
    doc_scores: Tensor  # [batch, n_docs]

    @property
    def length(self) -> int:
        """Tokens decoded so far."""
        return int(self.cache.get_seq_length())

    def tensors(self) -> list[Tensor]:
        """All that it holds on the device."""
        layers = [*self.cache.self_attention_cache.layers, *self.cache.cross_attention_cache.layers]
        cached = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
        mask = self.context_attention_mask
        rest = [self.encoder_last_hidden_state, self.doc_scores, *([] if mask is None else [mask])]
        return [*cached, *rest]

    def copied_cache(self) -> Any:
        """A cache to decode on with: new tokens are appended to it, and what is held here stays as it is."""
        fresh = copy.copy(self.cache)
        fresh.is_updated = dict(self.cache.is_updated)
        for name in ("self_attention_cache", "cross_attention_cache"):
            part = copy.copy(getattr(self.cache, name))
            part.layers = [copy.copy(layer) for layer in part.layers]
            setattr(fresh, name, part)
        return fresh


@dataclass
class _Held:
    past: Past
    expires_s: float


class PastStore:
    """Handles of one worker process. A handle lives expires_s seconds from its last use."""

    def __init__(self, *, max_handles: int, max_bytes: int, expires_s: float) -> None:
        self._max_handles, self._max_bytes, self._expires_s = max_handles, max_bytes, expires_s
        self._process = secrets.token_hex(4)
        self._held: OrderedDict[str, _Held] = OrderedDict()  # the longest unused first
        self._gone: OrderedDict[str, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes held; what handles of one chain share counts once."""
        return sum(_storages([t for held in self._held.values() for t in held.past.tensors()]).values())

    def check_room(self, num_bytes: int) -> None:
        """Raises PastError where a further handle of so many bytes is more than is held here."""
        self.expire()
        if num_bytes > self._max_bytes:
            raise PastError(
                "INVALID_ARGUMENT",
                f"use_cache would hold {num_bytes} bytes of keys and values, and {self._max_bytes} are allowed in all:"
                " ask with fewer questions, documents or tokens",
            )
        if len(self._held) >= self._max_handles or self.num_bytes + num_bytes > self._max_bytes:
            raise PastError(
                "RESOURCE_EXHAUSTED",
                f"{len(self._held)} past_key_values of {self.num_bytes} bytes are held, one more would have {num_bytes}"
                f" bytes, and {self._max_handles} of {self._max_bytes} bytes are allowed: release some, or wait until"
                " they expire",
            )

    def add(self, past: Past) -> str:
        """Hold it; returns its handle."""
        handle = f"{self._process}-{secrets.token_hex(16)}"
        self._held[handle] = _Held(past, time.monotonic() + self._expires_s)
        return handle

    def get(self, handle: str) -> Past:
        """What a handle names, whose time begins anew. Raises PastError with the reason where it is lost."""
        self.expire()
        held = self._held.get(handle)
        if held is None:
            raise PastError("NOT_FOUND", f"past_key_values {handle!r} is not held: {self._why(handle)}")
        held.expires_s = time.monotonic() + self._expires_s
        self._held.move_to_end(handle)
        return held.past

    def release(self, handle: str) -> None:
        """Free it. Raises PastError where it is not held."""
        self.get(handle)
        self._forget(handle, "it was released")

    def expire(self) -> None:
        """Free the handles whose time is over."""
        now_s = time.monotonic()
        for handle in [h for h, held in self._held.items() if held.expires_s <= now_s]:
            self._forget(handle, f"it expired after {self._expires_s:g} s without use")

    def _forget(self, handle: str, why: str) -> None:
        del self._held[handle]
        self._gone[handle] = why
        while len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

    def _why(self, handle: str) -> str:
        if handle in self._gone:
            return self._gone[handle]
        if handle.split("-", maxsplit=1)[0] != self._process:
            return "its worker was restarted since, or it is not one of this service"
        return "it expired or was released long ago, or never was"


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
