"""One slab of keys and values, in pages: contexts and the rows' own caches take from it and give back."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from generator_service.model.kv_cache import ContextStates, SelfCache
from generator_service.transfers import to_device

PAGE_SLOTS = 16
"""Slots of a page: as many keys as the attention kernel's smallest product takes."""


class ArenaFullError(Exception):
    """The arena has fewer free pages than were asked for."""


class Arena:
    """Keys and values of all layers at addresses that never change.

    A slot holds one token's key and value in every layer, whether it is a context's (cross-attention) or a decoded
    row's (self-attention). Page 0 is never lent: rows that only fill a batch up write there.
    """

    def __init__(
        self, *, num_layers: int, inner: int, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = (num_pages + 1) * PAGE_SLOTS
        # zeros: a masked value still enters a product, and what lay in memory before may be a nan
        self.keys = torch.zeros((num_layers, slots, inner), dtype=dtype, device=device)
        self.values = torch.zeros((num_layers, slots, inner), dtype=dtype, device=device)
        self.positions = torch.zeros(slots, dtype=torch.int32, device=device)
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Numbers of count pages; raises ArenaFullError, and takes none, where there are not so many."""
        if count > len(self._free):
            raise ArenaFullError(f"{count} pages of the arena are needed and {len(self._free)} are free")
        kept = len(self._free) - count
        pages, self._free = self._free[kept:], self._free[:kept]
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Free pages; the device's order of work keeps what it still reads ahead of what is written next."""
        self._free.extend(pages)
        pages.clear()

    def slots(self, pages: Sequence[int], length: int) -> Tensor:
        """int64 [length]: the first slots of these pages."""
        starts = torch.tensor(list(pages), dtype=torch.int64)[:, None] * PAGE_SLOTS
        slots = (starts + torch.arange(PAGE_SLOTS)).flatten()[:length]
        return to_device(slots, torch.int64, self.keys.device)

    def store(self, states: ContextStates) -> PagedStates:
        """Move an encoded context in."""
        assert states.keys is not None
        assert states.values is not None
        paged = PagedStates(states.length, None, None, None, self.take(num_pages(states.length)))
        weakref.finalize(paged, self.give_back, paged.pages).atexit = False
        slots = self.slots(paged.pages, states.length)
        for slab, part in ((self.keys, states.keys), (self.values, states.values)):
            slab.index_copy_(1, slots, part.transpose(1, 2).flatten(2))
        return paged


@dataclass(frozen=True, eq=False)
class PagedStates(ContextStates):
    """A context in the arena; its pages are free once nothing refers to it."""

    pages: list[int] = field(default_factory=list)


class PagedCache(SelfCache):
    """Self-attention slots in the arena: each context has its own pages, which grow as rows are appended."""

    def __init__(self, arena: Arena, num_contexts: int) -> None:
        super().__init__(
            num_layers=0,
            num_contexts=num_contexts,
            heads=1,
            head_dim=1,
            dtype=arena.keys.dtype,
            device=arena.keys.device,
        )
        self.pages: list[list[int]] = [[] for _ in range(num_contexts)]
        self._arena = arena
        for pages in self.pages:
            weakref.finalize(self, arena.give_back, pages).atexit = False

    def append(self, token_ids: Tensor, positions: Tensor) -> None:  # noqa: ARG002  (the rows bring them)
        """As SelfCache.append; raises ArenaFullError."""
        end = self.num_slots + int(token_ids.shape[0])
        missing = num_pages(end) - num_pages(self.num_slots)
        taken = self._arena.take(missing * len(self.pages))
        for index, pages in enumerate(self.pages):
            pages.extend(taken[index * missing : (index + 1) * missing])
        self.num_slots = end

    @property
    def size_bytes(self) -> int:
        """Bytes held on the device."""
        keys = self._arena.keys
        slots = sum(len(p) for p in self.pages) * PAGE_SLOTS
        return 2 * keys.shape[0] * slots * keys.shape[2] * keys.element_size()


def num_pages(slots: int) -> int:
    """Pages that hold so many slots."""
    return -(-slots // PAGE_SLOTS)
