"""The arena's path against the plain one: same weights, same rows, same scores."""

import gc
import random

import pytest
import torch
from torch import Tensor

from generator_service.decoding import rag_sequence
from generator_service.model.backbone import Backbone, RowBatch, RowBlock
from generator_service.model.cross_attention_scores import CrossAttentionScores
from generator_service.model.loader import as_backbone
from generator_service.model.paged.arena import PAGE_SLOTS, Arena, ArenaFullError
from generator_service.model.paged.backbone import PagedBackbone, paged
from generator_service.model.paged.captured_step import buckets
from tests.parity.tiny_models import FIRST_WORD, VOCAB_SIZE, tiny_generator

MIB = 1 << 20


def words(rng: random.Random, count: int) -> Tensor:
    return torch.tensor([rng.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(count)])


def over_arena(family: str, max_rows: int, dtype: torch.dtype = torch.float64) -> tuple[Backbone, Backbone]:
    plain = as_backbone(tiny_generator(family, 1).to(dtype))
    return plain, paged(plain, budget_bytes=4 * MIB, max_rows=max_rows)


def stepwise(backbone: Backbone, seed: int, steps: int) -> list[Tensor]:
    """Beams that move over two contexts, chains over one and a tree over three, step after step."""
    rng = random.Random(seed)
    beams, chains, tree_contexts = (
        backbone.encode([words(rng, rng.randint(1, 45)) for _ in range(count)]) for count in (2, 1, 3)
    )
    answers = [[2, *words(rng, rng.randint(1, 25)).tolist()] for _ in range(4)]
    tree = rag_sequence.build_tree(answers, torch.device("cpu"))
    beam_cache, chain_cache = backbone.new_cache(2), backbone.new_cache(1)
    ancestry, out = torch.zeros(3, 0, dtype=torch.bool), []
    for step in range(steps):
        blocks = []
        positions = torch.full((3,), step)
        ids = words(rng, 3)
        beam_cache.append(ids, positions)
        parents = torch.tensor([rng.randrange(3) for _ in range(3)])
        ancestry = torch.cat([ancestry[parents], torch.eye(3, dtype=torch.bool)], 1)
        blocks.append(RowBlock(ids, positions, beams, beam_cache, ancestry))
        ids = words(rng, 1)
        chain_cache.append(ids, positions[:1])
        blocks.append(RowBlock(ids, positions[:1], chains, chain_cache, None))
        if step == steps // 2:
            cache = backbone.new_cache(3)
            cache.append(tree.token_ids, tree.positions)
            blocks.insert(1, RowBlock(tree.token_ids, tree.positions, tree_contexts, cache, tree.ancestry))
        out.append(backbone.logits(backbone.decode(RowBatch(blocks))).clone())
    return out


@pytest.mark.parametrize("max_rows", [0, 16, 512], ids=["eager", "some steps static", "static"])
@pytest.mark.parametrize("family", ["bart", "bart-scaled", "t5", "t5-gated", "mt5"])
def test_arena_gives_the_plain_path_s_logits(family: str, max_rows: int) -> None:
    """In float64; 16 rows hold the beams and chains but not the tree, which then runs without a bucket."""
    with torch.inference_mode():
        plain, arena = over_arena(family, max_rows)
        for expected, found in zip(stepwise(plain, 3, 24), stepwise(arena, 3, 24), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_half_precision_over_the_arena_scores_in_float32(family: str, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        plain, arena = over_arena(family, 512, dtype)
        assert isinstance(arena, PagedBackbone)
        assert arena.arena.keys.dtype is dtype
        found = torch.cat(stepwise(arena, 4, 3))
        expected = torch.cat(stepwise(plain, 4, 3))
        exact = torch.cat(stepwise(over_arena(family, 0, torch.float32)[0], 4, 3))
    assert found.dtype is dtype
    # both round, each in its own order: the arena's path must be no farther from the truth than the plain one
    assert (found - exact).abs().mean() < 1.5 * (expected - exact).abs().mean() + 1e-3


def test_general_backbone_stays_as_it_is() -> None:
    general = as_backbone(tiny_generator("pegasus", 0))
    assert paged(general, budget_bytes=MIB, max_rows=8) is general


def test_pages_come_back_with_the_last_reference() -> None:
    with torch.inference_mode():
        _, arena = over_arena("bart", 64)
        assert isinstance(arena, PagedBackbone)
        pages = arena.arena.num_pages
        states, cache = arena.encode([torch.full((17,), 9), torch.full((16,), 9)]), arena.new_cache(2)
        assert arena.arena.num_free_pages == pages - 3
        cache.append(torch.full((17,), 9), torch.arange(17))
        assert arena.arena.num_free_pages == pages - 3 - 4
        assert cache.size_bytes == 4 * PAGE_SLOTS * arena.slot_bytes()
        del states, cache
        gc.collect()
        assert arena.arena.num_free_pages == pages


def test_full_arena_says_so_and_takes_nothing() -> None:
    arena = Arena(num_layers=1, inner=4, num_pages=3, dtype=torch.float32, device=torch.device("cpu"))
    held = arena.take(2)
    with pytest.raises(ArenaFullError, match="2 pages of the arena are needed and 1 are free"):
        arena.take(2)
    assert arena.num_free_pages == 1
    assert 0 not in arena.take(1) + held  # page 0 is where rows that fill a batch up write


def test_buckets_reach_the_largest_step() -> None:
    assert buckets(1024)[:6] == [8, 16, 32, 64, 128, 192]
    assert buckets(1024)[-1] == 1024
    assert buckets(20) == [8, 16, 20]
    assert buckets(4) == [4]


@pytest.mark.parametrize("family", ["bart", "t5-gated"])
def test_traced_attention_is_the_plain_path_s(family: str) -> None:
    """A traced block beside one that is not; its rows and contexts stand anywhere in the batch."""
    found = []
    with torch.inference_mode():
        for backbone in over_arena(family, 512):
            rng = random.Random(8)
            contexts = backbone.encode([words(rng, 20), words(rng, 3)])
            blocks = []
            for traced in (False, True):
                cache, ids = backbone.new_cache(2), words(rng, 5)
                cache.append(ids, torch.arange(5))
                ancestry = torch.ones(5, 5, dtype=torch.bool).tril()
                scores = CrossAttentionScores(2) if traced else None
                blocks.append(RowBlock(ids, torch.arange(5), contexts, cache, ancestry, scores))
            backbone.decode(RowBatch(blocks))
            wanted = blocks[1].cross_attention
            assert wanted is not None
            found.append([wanted.of(0), wanted.of(1)])
    for plain, arena in zip(*found, strict=True):
        torch.testing.assert_close(arena, plain, atol=1e-5, rtol=1e-5)
