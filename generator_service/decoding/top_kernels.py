"""Triton: from the head's logits to each row's best tokens, in float32, without log-probabilities in memory.

Two readings of the logits: one for their logsumexp, one for mixtures over documents and their best tokens. Both go
through the vocabulary in tiles, and what the tiles find is put together in a small launch of its own.

A score and its token are one int64 key that orders by score and then by the lower token, so that ties are decided
alike everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from generator_service.decoding.picks import BANNED, Picks

SUM_TILE = 4096
"""Tokens that one program sums up."""
TOP_TILE = 1024
"""Tokens that one program finds the best of."""

_LOWEST = tl.constexpr(-(2**63) + 1)  # below the key of minus infinity


@triton.jit
def _sum_kernel(logits, sums, row_stride, vocab, num_tiles, TILE: tl.constexpr) -> None:
    row, tile = tl.program_id(0), tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    at = logits + row.to(tl.int64) * row_stride + token
    x = tl.load(at, mask=token < vocab, other=float("-inf")).to(tl.float32)
    tl.store(sums + row * num_tiles + tile, _logsumexp(x))


@triton.jit
def _sum_up_kernel(sums, lse, num_tiles, TILES: tl.constexpr) -> None:
    row, tile = tl.program_id(0), tl.arange(0, TILES)
    x = tl.load(sums + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    tl.store(lse + row, _logsumexp(x))


@triton.jit
def _logsumexp(x):
    highest = tl.max(x, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp(x - safe), 0)
    return tl.where(total == 0.0, float("-inf"), safe + tl.log(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def _top_kernel(
    logits,
    lse,
    priors,
    picks,
    keys,
    row_stride,
    vocab,
    num_docs,
    num_columns,
    BANNED: tl.constexpr,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
    MIXES: tl.constexpr,
) -> None:
    pick, tile = tl.program_id(0), tl.program_id(1)
    at = picks + pick * num_columns
    first, step, search = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    token = tile * TILE + tl.arange(0, TILE)
    there = token < vocab
    if MIXES:
        highest = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        for document in range(num_docs):
            row = (first + document * step).to(tl.int64)
            x = tl.load(logits + row * row_stride + token, mask=there, other=float("-inf")).to(tl.float32)
            x = x - tl.load(lse + row) + tl.load(priors + search * num_docs + document)
            higher = tl.maximum(highest, x)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(highest - safe) + tl.exp(x - safe)
            highest = higher
        # where nothing has any probability, both are minus infinity
        score = tl.where(total == 0.0, float("-inf"), highest + tl.log(tl.where(total == 0.0, 1.0, total)))
    else:
        row = first.to(tl.int64)
        x = tl.load(logits + row * row_stride + token, mask=there, other=float("-inf")).to(tl.float32)
        score = x - tl.load(lse + row)
    for column in range(BANNED, num_columns):
        score = tl.where(token == tl.load(at + column), float("-inf"), score)
    score = tl.where(score == 0.0, 0.0, score)  # there is a negative zero
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    key = tl.where(there, key, _LOWEST)
    out = keys + (pick * tl.num_programs(1) + tile).to(tl.int64) * KEEP
    for place in range(KEEP):
        best = tl.max(key, 0)
        tl.store(out + place, best)
        key = tl.where(key == best, _LOWEST, key)


@triton.jit
def _merge_kernel(
    keys, picks, values, ids, num_keys, num_columns, KEEP: tl.constexpr, KEYS: tl.constexpr
) -> None:
    pick, place = tl.program_id(0), tl.arange(0, KEYS)
    out = tl.load(picks + pick * num_columns + 3) * KEEP
    key = tl.load(keys + pick.to(tl.int64) * num_keys + place, mask=place < num_keys, other=_LOWEST)
    for place_ in range(KEEP):
        best = tl.max(key, 0)
        ordered = (best >> 32).to(tl.int32)
        bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
        tl.store(values + out + place_, bits.to(tl.float32, bitcast=True))
        tl.store(ids + out + place_, 0x7FFFFFFF - (best & 0xFFFFFFFF))
        key = tl.where(key == best, _LOWEST, key)


def logsumexp(logits: Tensor) -> Tensor:
    """As top_tokens.logsumexp."""
    assert logits.stride(1) == 1
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, SUM_TILE)
    sums = torch.empty((rows, tiles), dtype=torch.float32, device=logits.device)
    lse = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _sum_kernel[(rows, tiles)](logits, sums, logits.stride(0), vocab, tiles, TILE=SUM_TILE)
    _sum_up_kernel[(rows,)](sums, lse, tiles, TILES=triton.next_power_of_2(tiles))
    return lse


def best_tokens(
    logits: Tensor, lse: Tensor, priors: Tensor | None, picks: Picks, keep: int, num_out: int
) -> tuple[Tensor, Tensor]:
    """As top_tokens.best_tokens."""
    assert logits.stride(1) == 1
    device, (num_picks, num_columns) = logits.device, picks.table.shape
    tiles = triton.cdiv(logits.shape[1], TOP_TILE)
    keys = torch.empty((num_picks, tiles, keep), dtype=torch.int64, device=device)
    values = torch.full((num_out, keep), float("-inf"), device=device)
    ids = torch.zeros((num_out, keep), dtype=torch.int64, device=device)
    unused: Any = lse  # a kernel's argument must be something, even where a flag says it is not read
    _top_kernel[(num_picks, tiles)](
        logits,
        lse,
        unused if priors is None else priors,
        picks.table,
        keys,
        logits.stride(0),
        logits.shape[1],
        1 if priors is None else priors.shape[1],
        num_columns,
        BANNED=BANNED,
        KEEP=keep,
        TILE=TOP_TILE,
        MIXES=priors is not None,
    )
    _merge_kernel[(num_picks,)](
        keys,
        picks.table,
        values,
        ids,
        tiles * keep,
        num_columns,
        KEEP=keep,
        KEYS=triton.next_power_of_2(tiles * keep),
    )
    return values, ids
