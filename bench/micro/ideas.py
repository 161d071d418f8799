"""The engine's ideas, each with a way to switch it off: the plain way of doing the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.micro.workload import Questions
from generator_service.decoding import logits_processors, rag_sequence, top_tokens
from generator_service.engine.model_runner import ModelRunner
from generator_service.engine.pool_scores import PoolScores
from generator_service.engine.request import Request
from generator_service.engine.search import PoolKey, Search
from generator_service.model import attention, cpu_kernels, loader
from generator_service.model.backbone import RowBatch
from generator_service.model.paged import rows as paged_rows
from generator_service.types import Quantization, Strategy

_BOTH = tuple(Strategy)
_EVERYWHERE = ("cpu", "cuda")


@dataclass(frozen=True)
class Idea:
    """An idea, and what stands in its place while `off` is entered.

    asked makes of a batch what both sides are asked, questions of that what is asked without the idea. exact: answers
    stay the same without it (up to float rounding). graphs: CUDA graphs are captured.
    """

    name: str
    off: Callable[[], AbstractContextManager[Any]] = nullcontext
    asked: Callable[[Questions], Questions] = lambda asked: asked
    questions: Callable[[Questions], Questions] = lambda asked: asked
    strategies: tuple[Strategy, ...] = _BOTH
    devices: tuple[str, ...] = _EVERYWHERE
    exact: bool = True
    graphs: bool = True


def padded(asked: Questions) -> Questions:
    """Pads taken for tokens, so that all contexts are as long as Hugging Face's."""
    return Questions(asked.input_ids, torch.ones_like(asked.attention_mask), asked.doc_scores)


def same_contexts(asked: Questions) -> Questions:
    """The first question's contexts for all, of whom there are two at least."""
    count = max(2, len(asked.doc_scores))
    ids, mask = (
        t[: asked.doc_scores.shape[1]].repeat(count, 1) for t in (asked.input_ids, asked.attention_mask)
    )
    scores = asked.doc_scores.repeat(-(-count // len(asked.doc_scores)), 1)[:count]
    return Questions(ids, mask, scores)


def encode_for_each(runner: ModelRunner, requests: Sequence[Request]) -> None:
    """As the runner's own, but no question finds contexts that another has had encoded."""
    for request in requests:
        runner._encoded.clear()  # noqa: SLF001  (what it knows is no one else's business)
        _admit(runner, [request])


_admit = ModelRunner._admit  # noqa: SLF001  encode_for_each stands in its place


def reorder(search: Search, parents: Tensor) -> None:
    """As Search.follow, but keys and values move with their beams, as Hugging Face's do: one copy a step."""
    if search.ancestry is None or search.ends_forced:
        return
    cache, width, device = search.cache, search.key.width, parents.device
    later = search.cur_len - 1  # steps of width rows each, after a first of one row or of as many
    first = cache.num_slots - later * width
    starts = first + width * torch.arange(later, device=device)
    source = torch.arange(cache.keys.shape[3], device=device)
    if first == width:
        source[:first] = parents
    source[first : cache.num_slots] = (starts[:, None] + parents).flatten()
    cache.keys, cache.values = cache.keys.index_select(3, source), cache.values.index_select(3, source)
    own = torch.eye(width, dtype=torch.bool, device=device)
    begin = own if first == width else own.new_ones((width, 1))
    search.ancestry = torch.cat([begin, own.repeat(1, later)], dim=1)


def separate_rows(candidates: Sequence[Sequence[int]], device: torch.device) -> rag_sequence.PrefixTree:
    """As rag_sequence.build_tree, but a prefix that candidates share has a row in each of them."""
    trees = [_build_tree([candidate], device) for candidate in candidates]
    edge_rows, paths, first_row, first_edge = [], [], 0, 0
    for tree in trees:
        edge_rows.append(tree.edge_rows + first_row)
        paths.append([first_edge + edge for edge in tree.paths[0]])
        first_row += int(tree.token_ids.shape[0])
        first_edge += int(tree.edge_tokens.shape[0])
    return rag_sequence.PrefixTree(
        token_ids=torch.cat([t.token_ids for t in trees]),
        positions=torch.cat([t.positions for t in trees]),
        ancestry=torch.block_diag(*[t.ancestry.int() for t in trees]).bool(),
        edge_rows=torch.cat(edge_rows),
        edge_tokens=torch.cat([t.edge_tokens for t in trees]),
        paths=paths,
    )


_build_tree = rag_sequence.build_tree  # separate_rows stands in its place


def attention_by_row(
    query: Tensor, batch: RowBatch, layer: int, heads: int, *, scale: float | None
) -> Tensor:
    """As attention.cross_attention, but each row reads a copy of its context's keys and values of its own."""
    out = torch.empty_like(query)
    for block, start, _ in batch.spans():
        rows = int(block.token_ids.shape[0])
        for index, context in enumerate(block.contexts):
            if context.keys is None or context.values is None:
                raise TypeError("a backbone that keeps no keys and values")
            low = start + index * rows
            part = query[low : low + rows].view(rows, heads, 1, -1)
            keys, values = (
                states[layer].expand(rows, -1, -1, -1).contiguous()
                for states in (context.keys, context.values)
            )
            attended = F.scaled_dot_product_attention(part, keys, values, scale=scale)
            out[low : low + rows] = attended.flatten(1)
    return out


def mixed_as_logarithms(
    key: PoolKey, searches: Sequence[Search], logits: Tensor, first: Sequence[int | None]
) -> PoolScores:
    """As PoolScores.of_logits, but documents are mixed by a logsumexp, which each search makes for itself."""
    return PoolScores(key, searches, logits, logits.float().logsumexp(dim=-1), first)


def _plain_linears(module: nn.Module, _: Quantization) -> nn.Module:
    return module


IDEAS = (
    Idea("contexts without pads", questions=padded, exact=False),
    Idea(
        "keys and values read once, and never copied for a row",
        off=lambda: patch.object(attention, "cross_attention", attention_by_row),
        devices=("cpu",),
    ),
    Idea(
        "attention of few rows by kernels of its own",
        off=lambda: patch.object(cpu_kernels, "library", lambda: None),
        devices=("cpu",),
    ),
    Idea(
        "keys and values read once for a tile of rows",
        off=lambda: patch.object(paged_rows, "TILE_ROWS", 1),
        devices=("cuda",),
    ),
    Idea(
        "contexts of two questions or more encoded once",
        off=lambda: patch.object(ModelRunner, "_admit", encode_for_each),
        asked=same_contexts,
    ),
    Idea(
        "self-attention's cache never reordered",
        off=lambda: patch.object(Search, "follow", reorder),
        devices=("cpu",),
    ),
    Idea(
        "candidates as a prefix tree",
        off=lambda: patch.object(rag_sequence, "build_tree", separate_rows),
        strategies=(Strategy.RAG_SEQUENCE,),
    ),
    Idea(
        "candidates not scored again where a search has found them",
        off=lambda: patch.object(Request, "search_scores", new=False),
        strategies=(Strategy.RAG_SEQUENCE,),
    ),
    Idea(
        "first step with one row a context",
        off=lambda: patch.object(Search, "rows", property(lambda search: search.key.width)),
    ),
    Idea(
        "no head and no last step for forced tokens",
        off=lambda: patch.object(logits_processors, "forced_token", lambda _settings, _cur_len: None),
        strategies=(Strategy.RAG_TOKEN,),
    ),
    Idea(
        "documents mixed as probabilities",
        off=lambda: patch.object(PoolScores, "of_logits", mixed_as_logarithms),
        strategies=(Strategy.RAG_TOKEN,),
        devices=("cpu",),
    ),
    Idea(
        "weights laid out once",
        off=lambda: patch.object(loader, "with_linears", _plain_linears),
        devices=("cpu",),
    ),
    Idea("CUDA graphs", devices=("cuda",), graphs=False),
    Idea(
        "best tokens in kernels over all questions",
        off=lambda: patch.object(top_tokens, "has_kernels", lambda _device: False),
        devices=("cuda",),
    ),
)
