"""The Triton kernels, run by Triton's interpreter on the CPU, against torch's own attention."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from generator_service.model.paged import attend
from generator_service.model.paged.arena import PAGE_SLOTS
from generator_service.model.paged.reads import CROSS, SELF, TILE_ROWS, Reads, Visible
from tests.generator_service.model.test_paged import over_arena, stepwise

pytest.importorskip("triton")
kernels = pytest.importorskip("generator_service.model.paged.kernels")

ROOT = Path(__file__).resolve().parents[3]
HEADS, HEAD_DIM, NUM_PAGES = 2, 16, 40


def tiles(rng: random.Random, num_rows: int) -> tuple[Tensor, Tensor, list[int]]:
    """Tiles of 1 to 16 rows over random pages, two of them of no rows; the pages; and the longest of each kind."""
    table, pages, row, longest = [], [], 0, {CROSS: 1, SELF: 1}
    while row < num_rows:
        count = min(rng.choice([1, 4, TILE_ROWS]), num_rows - row)
        entry = [row, count]
        for kind in (CROSS, SELF):
            length = rng.choice([1, 15, 16, 17, 33, 90])
            longest[kind] = max(longest[kind], length)
            entry += [len(pages), length]
            pages += rng.sample(range(1, NUM_PAGES), -(-length // PAGE_SLOTS))
        table.append(entry)
        row += count
    table[1:1] = [[0] * 6]
    table.append([0] * 6)
    return (
        torch.tensor(table, dtype=torch.int32),
        torch.tensor(pages, dtype=torch.int32),
        [longest[CROSS], longest[SELF]],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", ["cross", "self", "self with bias"])
def test_kernel_attends_as_torch_does(case: str, dtype: torch.dtype) -> None:
    """Ancestry that hides whole pages, tiles of no rows, lengths on and off a page's edge."""
    rng, random_ = random.Random(case), torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random_).to(dtype)

    rows, slots = 45, NUM_PAGES * PAGE_SLOTS
    table, pages, longest = tiles(rng, rows)
    qkv = normal(rows, 3 * HEADS * HEAD_DIM)
    query = qkv[:, : HEADS * HEAD_DIM]  # as in the layers: not contiguous
    keys, values = normal(slots, HEADS * HEAD_DIM), normal(slots, HEADS * HEAD_DIM)
    visible, column, most = None, CROSS, longest[0]
    if case != "cross":
        words = torch.randint(-(2**31), 2**31, (rows, 4), generator=random_, dtype=torch.int64)
        words[::5, 0] = 0  # nothing of the first two pages
        words |= 1 << 14  # but always something: a row sees itself
        words[::5, 0] = 0
        visible = Visible(
            words.to(torch.int32),
            torch.randint(0, 30, (rows,), generator=random_),
            torch.randint(0, 30, (slots,), generator=random_, dtype=torch.int32),
            torch.randn(HEADS, 9, generator=random_) if case == "self with bias" else None,
        )
        column, most = SELF, longest[1]
    reads = Reads(table, column, pages, most)
    expected = attend.dense(query, keys, values, reads, HEADS, scale=0.3, visible=visible)
    found = kernels.attend(query, keys, values, reads, HEADS, scale=0.3, visible=visible)
    blind = expected.isnan().any(1)  # a row that sees nothing: no decoder has one, torch makes nan of it
    tolerance = 1e-5 if dtype is torch.float32 else 2e-3
    torch.testing.assert_close(found[~blind], expected[~blind], atol=tolerance, rtol=tolerance)
    assert not found.isnan().any()


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_decoder_over_the_kernels_gives_the_plain_path_s_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        plain, arena = over_arena(family, 512, torch.float32)
        expected = stepwise(plain, 6, 2)
        monkeypatch.setattr(attend, "has_kernels", lambda device, head_dim: True)
        for ours, theirs in zip(stepwise(arena, 6, 2), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


def test_kernels_compile_for_an_h100() -> None:
    """To machine code, without a GPU: in a process of its own, where Triton does not interpret."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, program], check=False, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9 + 15
