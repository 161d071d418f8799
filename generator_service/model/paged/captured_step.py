"""A decoder step over buffers that stay where they are, so that a CUDA graph can replay it."""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from generator_service.model.backbone import RowBatch
from generator_service.model.paged.arena import Arena
from generator_service.model.paged.reads import TILE_COLUMNS
from generator_service.model.paged.rows import Layout, PagedRows, ancestry_words, traced_rows
from generator_service.transfers import to_device

logger = logging.getLogger(__name__)

_MAX_WORDS = 64
"""Of a row's ancestry: 2048 slots, 4 beams of 512 tokens. Longer searches run without a graph."""
_PAGES_A_ROW = 64

Decode = Callable[[RowBatch], Tensor]


def buckets(max_rows: int) -> list[int]:
    """Numbers of rows for which a step is captured: few enough to capture, near enough not to waste."""
    sizes = [8, 16, 32, *range(64, 512, 64), *range(512, max_rows, 128)]
    return [*(n for n in sizes if n < max_rows), max_rows]


class CapturedStep:
    """Fills static buffers with a batch's rows and runs the decoder over as many of them as the bucket has.

    capture() records the decoder's work once for each bucket; run() then replays it. Without capture (on a CPU) run()
    does the same work on the same buffers, launched anew each time.
    """

    def __init__(
        self, decode: Decode, arena: Arena, *, max_rows: int, width: int, bias: Tensor | None
    ) -> None:
        device = arena.keys.device
        self._decode, self._arena, self._bias = decode, arena, bias
        self._sizes = buckets(max_rows)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._tokens = zeros(max_rows, dtype=torch.int64)
        self._positions = zeros(max_rows, dtype=torch.int64)
        self._slots = zeros(max_rows)
        self._tiles = zeros(max_rows, TILE_COLUMNS)
        self._pages = zeros(max_rows * _PAGES_A_ROW)
        self._words = zeros(max_rows, _MAX_WORDS)
        self._states = zeros(max_rows, width, dtype=arena.keys.dtype)

    def fits(self, layout: Layout) -> bool:
        """Whether there is a bucket for these rows."""
        return (
            layout.num_rows <= self._sizes[-1]
            and layout.num_words <= _MAX_WORDS
            and len(layout.pages) <= self._pages.shape[0]
        )

    def run(self, batch: RowBatch, layout: Layout) -> Tensor:
        """States [rows, width] of a batch that fits; they hold until the next run."""
        size = self._sizes[bisect.bisect_left(self._sizes, layout.num_rows)]
        self._fill(batch, layout, size)
        graph = self._graphs.get(size)
        if graph is not None:
            graph.replay()
        else:
            self._step(size, layout.longest)
        return self._states[: layout.num_rows]

    def capture(self) -> None:
        """Record every bucket, the largest first, so that the smaller ones share its memory."""
        started = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        self._tiles.zero_()
        for size in reversed(self._sizes):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels and makes workspaces, which a capture must not
                self._step(size, (1, 1))
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._step(size, (1, 1))
            self._graphs[size] = graph
        seconds = round(time.perf_counter() - started, 3)
        logger.info("captured the decoder's graphs", extra={"graphs": len(self._graphs), "seconds": seconds})

    def _fill(self, batch: RowBatch, layout: Layout, size: int) -> None:
        device, rows, tiles = self._tokens.device, layout.num_rows, layout.num_tiles
        self._tokens[:rows] = batch.token_ids()
        self._positions[:rows] = batch.positions()
        padding = [0] * (size - rows)  # slot 0 is nobody's
        self._slots[:size] = to_device(layout.slots + padding, torch.int32, device)
        own = layout.tiles + [0] * ((size - tiles) * TILE_COLUMNS)
        self._tiles[:size] = to_device(own, torch.int32, device).view(size, TILE_COLUMNS)
        self._pages[: len(layout.pages)] = to_device(layout.pages, torch.int32, device)
        words = ancestry_words(batch, layout, device)
        self._words[:rows, : words.shape[1]] = words

    def _step(self, size: int, longest: tuple[int, int]) -> None:
        rows = PagedRows(
            blocks=(),
            arena=self._arena,
            tokens=self._tokens[:size],
            token_positions=self._positions[:size],
            slots=self._slots[:size],
            tiles=self._tiles[:size],
            pages=self._pages,
            words=self._words[:size],
            longest=longest,
            bias=self._bias,
        )
        rows.begin()
        self._states[:size] = self._decode(rows)


def run_eagerly(decode: Decode, arena: Arena, batch: RowBatch, layout: Layout, bias: Tensor | None) -> Tensor:
    """The same work on buffers of just the right size: for batches that no bucket holds, or that are traced."""
    device = arena.keys.device
    rows = PagedRows(
        blocks=(),
        arena=arena,
        tokens=batch.token_ids(),
        token_positions=batch.positions(),
        slots=to_device(layout.slots, torch.int32, device),
        tiles=to_device(layout.tiles, torch.int32, device).view(-1, TILE_COLUMNS),
        pages=to_device(layout.pages, torch.int32, device),
        words=ancestry_words(batch, layout, device),
        longest=layout.longest,
        bias=bias,
        traced=traced_rows(batch, arena),
    )
    rows.begin()
    return decode(rows)
