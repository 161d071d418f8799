"""Each backbone's scores over the vocabulary against transformers' full forward."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generator_service.decoding import rag_sequence
from generator_service.engine.messages import ScoreTarget
from generator_service.model import attention
from generator_service.model.backbone import Backbone, RowBatch, RowBlock
from generator_service.model.bart import BartBackbone
from generator_service.model.general import GeneralBackbone
from generator_service.model.loader import as_backbone
from generator_service.model.t5 import T5Backbone
from generator_service.types import Compatibility, Strategy
from tests.parity import engine
from tests.parity.tiny_models import FIRST_WORD, VOCAB_SIZE, tiny_generator

FAMILIES = ["bart", "bart-scaled", "t5", "t5-gated", "mt5", "pegasus", "marian"]
OWN = {
    "bart": BartBackbone,
    "bart-scaled": BartBackbone,
    "t5": T5Backbone,
    "t5-gated": T5Backbone,
    "mt5": T5Backbone,
}


def words(rng: random.Random, count: int) -> Tensor:
    return torch.tensor([rng.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(count)])


def in_one_block(backbone: Backbone, contexts: list[Tensor], answer: Tensor) -> Tensor:
    """All positions of an answer at once: [contexts, length, vocab]."""
    cache, positions = backbone.new_cache(len(contexts)), torch.arange(len(answer))
    cache.append(answer, positions)
    ancestry = torch.ones(len(answer), len(answer), dtype=torch.bool).tril()
    block = RowBlock(answer, positions, backbone.encode(contexts), cache, ancestry)
    return backbone.logits(backbone.decode(RowBatch([block]))).view(len(contexts), len(answer), -1)


def step_by_step(backbone: Backbone, contexts: list[Tensor], answer: Tensor) -> Tensor:
    states, cache, out = backbone.encode(contexts), backbone.new_cache(len(contexts)), []
    for position, token in enumerate(answer):
        ids, positions = token[None], torch.tensor([position])
        cache.append(ids, positions)
        block = RowBlock(ids, positions, states, cache, None)
        out.append(backbone.logits(backbone.decode(RowBatch([block]))))
    return torch.stack(out, 1)


def expected_logits(model: torch.nn.Module, contexts: list[Tensor], answer: Tensor) -> Tensor:
    """transformers, with pads and masks."""
    ids = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True, padding_value=model.config.pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(c) for c in contexts], batch_first=True)
    with torch.inference_mode():
        outputs = model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=answer.expand(len(contexts), -1)
        )
    return outputs.logits


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, seed: int) -> None:
    """In float64: the tiny models magnify float32's rounding to some 1e-4."""
    rng, model = random.Random(seed), tiny_generator(family, seed).double()
    backbone = as_backbone(model)
    assert isinstance(backbone, OWN.get(family, GeneralBackbone))
    contexts = [words(rng, length) for length in (1, 40, 7, 23)]
    answer = torch.cat([torch.tensor([model.config.decoder_start_token_id]), words(rng, 39)])
    expected = expected_logits(model, contexts, answer)
    with torch.inference_mode():
        for found in (in_one_block(backbone, contexts, answer), step_by_step(backbone, contexts, answer)):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bart", "t5", "pegasus"])
def test_rows_see_their_ancestors_alone(family: str) -> None:
    """A tree of answers in one block gives each its own logits; a block beside it changes nothing."""
    rng, model = random.Random(5), tiny_generator(family, 1).double()
    backbone, start = as_backbone(model), model.config.decoder_start_token_id
    contexts = [words(rng, 9), words(rng, 4)]
    stem = [start, *words(rng, 3).tolist()]
    answers = [stem + words(rng, count).tolist() for count in (2, 5, 1)] + [[start, *words(rng, 4).tolist()]]
    tree = rag_sequence.build_tree(answers, torch.device("cpu"))
    with torch.inference_mode():
        cache = backbone.new_cache(2)
        cache.append(tree.token_ids, tree.positions)
        block = RowBlock(tree.token_ids, tree.positions, backbone.encode(contexts), cache, tree.ancestry)
        other_cache = backbone.new_cache(1)
        other_cache.append(torch.tensor([7]), torch.tensor([0]))
        other = RowBlock(
            torch.tensor([7]), torch.tensor([0]), backbone.encode([words(rng, 6)]), other_cache, None
        )
        states = backbone.decode(RowBatch([other, block]))
        logits = backbone.logits(states[1:]).view(2, len(tree.token_ids), -1)
    for answer, path in zip(answers, tree.paths, strict=True):
        expected = expected_logits(model, contexts, torch.tensor(answer))[:, :-1]
        found = logits[:, tree.edge_rows[path]]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_half_precision_scores_are_float32(family: str) -> None:
    """transformers takes log_softmax in half precision; here it is taken in float32, of half precision's logits."""
    backbone = as_backbone(tiny_generator(family, 0).to(torch.bfloat16))
    with torch.inference_mode():
        logits = in_one_block(backbone, [torch.tensor([5, 6, 7])], torch.tensor([2, 8]))[0, 0]
    assert logits.dtype is torch.bfloat16
    target = ScoreTarget(
        request_id=engine.new_id(),
        strategy=Strategy.RAG_TOKEN,
        compatibility=Compatibility.MASKED,
        contexts=[[5, 6, 7]],
        doc_scores=[0.0],
        labels=[2, 8],
        pad_token_id=1,
        exclude_first=False,
    )
    (score,) = engine.score(backbone, [target])
    assert score.log_likelihood == pytest.approx(float(logits.float().log_softmax(-1)[8]), abs=1e-6)
    assert score.log_likelihood != pytest.approx(float(logits.log_softmax(-1)[8]), abs=1e-4)
    assert backbone.new_cache(1).keys.dtype is torch.bfloat16


@pytest.mark.parametrize("family", ["bart", "t5-gated", "pegasus"])
def test_encoded_contexts_hold_the_bytes_that_are_reckoned_with(family: str) -> None:
    backbone = as_backbone(tiny_generator(family, 0))
    with torch.inference_mode():
        states = backbone.encode([torch.full((n,), 9) for n in (3, 17)])
    assert [s.length for s in states] == [3, 17]
    assert [s.size_bytes for s in states] == [backbone.context_bytes(3), backbone.context_bytes(17)]


def test_general_path_is_taken_where_it_is_asked_for() -> None:
    assert as_backbone(tiny_generator("bart", 0), "general").name == "general"


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_contexts_encoded_in_parts_are_as_if_encoded_together(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = as_backbone(tiny_generator(family, 0))
    contexts = [words(random.Random(n), n) for n in (3, 9, 4, 11, 2)]
    with torch.inference_mode():
        together = backbone.encode(contexts)
        monkeypatch.setattr("generator_service.model.backbone._CPU_ROWS", 8)
        apart = backbone.encode(contexts)
    assert [s.length for s in apart] == [3, 9, 4, 11, 2]
    for one, other in zip(apart, together, strict=True):
        assert one.keys is not None
        assert one.values is not None
        torch.testing.assert_close(one.keys, other.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize(("rows", "slots"), [(4, 40), (40, 40), (40, 70), (600, 600)])
def test_attention_by_plain_products_is_torchs_own(rows: int, slots: int, scale: float | None) -> None:
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, 3, n, 8) for n in (rows, slots, slots))
    mask = attention.ancestry_mask(torch.rand(rows, slots) < 0.9, torch.float32)
    for given in (None, mask):
        expected = F.scaled_dot_product_attention(query, keys, values, attn_mask=given, scale=scale)
        found = attention.attend(query, keys, values, given, scale)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
