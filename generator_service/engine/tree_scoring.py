"""Token sequences that are known, as one prefix tree of rows: laid out, and scored with everybody's of a step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generator_service.decoding import rag_sequence, top_tokens
from generator_service.model.backbone import Backbone, RowBlock
from generator_service.model.kv_cache import ContextStates
from generator_service.transfers import to_device

_ROWS_A_CHUNK = 128
"""Rows whose scores over the vocabulary are held at once: 50,000 tokens' are 25 MB.

Blocks above 32 MB glibc asks the system for anew each time, and the faults of their pages cost a tenth of the head.
"""


@dataclass
class TreeScoring:
    """Token sequences over some contexts, waiting for their step."""

    tree: rag_sequence.PrefixTree
    block: RowBlock


def lay_out(
    sequences: Sequence[Sequence[int]],
    contexts: Sequence[ContextStates],
    backbone: Backbone,
    device: torch.device,
) -> TreeScoring:
    """Each sequence with its start token first; all of them over all the contexts."""
    tree = rag_sequence.build_tree(sequences, device)
    cache = backbone.new_cache(len(contexts))
    cache.append(tree.token_ids, tree.positions)
    return TreeScoring(tree, RowBlock(tree.token_ids, tree.positions, contexts, cache, tree.ancestry))


def edge_log_probs(
    scorings: Sequence[TreeScoring], states: Sequence[Tensor], backbone: Backbone
) -> list[Tensor]:
    """Of each, float32 [contexts, edges]: log p(next token | prefix, context), on the states' device.

    states are the decoder's for each scoring's block. All go through the head together, a chunk of rows at a time.
    """
    if not scorings:
        return []
    asked, sizes, first = [], [], 0
    for scoring in scorings:
        tree, num_contexts = scoring.tree, len(scoring.block.contexts)
        rows = first + torch.arange(num_contexts)[:, None] * len(tree.token_ids) + tree.edge_rows
        asked.append(torch.stack([rows, tree.edge_tokens.expand_as(rows)]).flatten(1))
        sizes.append(rows.shape)
        first += scoring.block.num_rows
    packed, edges = torch.cat(list(states)), torch.cat(asked, dim=1)
    rows, order = edges[0].sort(stable=True)
    tokens = edges[1, order]
    ends = torch.searchsorted(rows, torch.arange(0, len(packed) + _ROWS_A_CHUNK, _ROWS_A_CHUNK)).tolist()
    sent = to_device(torch.stack([rows, tokens, order.argsort()]), torch.int64, packed.device)
    found = []
    for (start, logits, lse), (low, high) in zip(
        _chunks(packed, backbone), itertools.pairwise(ends), strict=True
    ):
        local = sent[0, low:high] - start
        found.append(logits[local, sent[1, low:high]] - lse[local])
    parts = torch.split(torch.cat(found)[sent[2]], [size.numel() for size in sizes])
    return [part.view(size) for part, size in zip(parts, sizes, strict=True)]


def _chunks(states: Tensor, backbone: Backbone) -> Iterator[tuple[int, Tensor, Tensor]]:
    for start in range(0, states.shape[0], _ROWS_A_CHUNK):
        logits = backbone.logits(states[start : start + _ROWS_A_CHUNK])
        yield start, logits, top_tokens.logsumexp(logits)
