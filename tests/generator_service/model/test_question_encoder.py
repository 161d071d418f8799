"""Question encoders: DPR, and the poolings of any other."""

import pytest
import torch
from transformers import BertConfig, BertModel, DPRConfig, DPRQuestionEncoder

from generator_service.model.question_encoder import QuestionEncoder
from generator_service.types import Pooling

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
}
QUESTIONS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
MASKS = [[1] * len(q) for q in QUESTIONS]


def bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(BertConfig(**SIZES)).eval()


def encoder(model: torch.nn.Module, pooling: Pooling, **changes: float) -> QuestionEncoder:
    options = {"normalize": False, "score_scale": 1.0} | changes
    return QuestionEncoder(model, pooling=pooling, **options)


@pytest.mark.parametrize("projection_dim", [0, 8])
def test_dpr_gives_its_first_output(projection_dim: int) -> None:
    torch.manual_seed(0)
    model = DPRQuestionEncoder(DPRConfig(**SIZES, projection_dim=projection_dim)).eval()
    ours = encoder(model, Pooling.FIRST_OUTPUT)
    assert ours.dimension == (projection_dim or 16)
    found = ours.encode(QUESTIONS, MASKS)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([q]))[0] for q in QUESTIONS])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", [Pooling.POOLER, Pooling.MEAN, Pooling.CLS])
def test_pooling_of_a_question_does_not_depend_on_its_company(pooling: Pooling) -> None:
    model = bert()
    found = encoder(model, pooling).encode(QUESTIONS, MASKS)
    assert found.shape == (3, 16)
    for question, vector in zip(QUESTIONS, found, strict=True):
        with torch.no_grad():
            outputs = model(torch.tensor([question]))
        expected = {
            Pooling.POOLER: outputs.pooler_output[0],
            Pooling.MEAN: outputs.last_hidden_state[0].mean(0),
            Pooling.CLS: outputs.last_hidden_state[0, 0],
        }[pooling]
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


def test_tokens_that_the_caller_masks_do_not_count() -> None:
    ours = encoder(bert(), Pooling.MEAN)
    masked = ours.encode([[5, 6, 7, 50, 51]], [[1, 1, 1, 0, 0]])
    torch.testing.assert_close(masked, ours.encode([[5, 6, 7]], [[1, 1, 1]]), atol=1e-5, rtol=1e-4)


def test_normalised_vectors_have_the_length_of_the_score_scale() -> None:
    model = bert()
    plain = encoder(model, Pooling.MEAN).encode(QUESTIONS, MASKS)
    scaled = encoder(model, Pooling.MEAN, normalize=True, score_scale=20.0).encode(QUESTIONS, MASKS)
    torch.testing.assert_close(scaled.norm(dim=1), torch.full((3,), 20.0))
    torch.testing.assert_close(scaled / 20, plain / plain.norm(dim=1, keepdim=True))


def test_limits_are_those_of_the_model() -> None:
    ours = encoder(bert(), Pooling.POOLER)
    assert (ours.dimension, ours.vocab_size, ours.max_length) == (16, 61, 32)
