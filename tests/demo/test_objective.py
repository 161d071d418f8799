"""The training loss falls on a batch that is learnt by heart, and its parts are what they claim."""

import pytest
import torch

from demo.training.data.example import Tokens
from demo.training.data.mixture import Batch, collate
from demo.training.objective import GUIDE_WEIGHT, POINTER_WEIGHT, Objective
from demo.training.train import optimizer, rate


@pytest.fixture(scope="module")
def batch() -> Batch:
    return collate([Tokens([1, 5, 6, 7, 2], 2, 3), Tokens([1, 8, 9, 2], 1, 1)], eos=2)


def tiny_objective() -> Objective:
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=12,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return Objective(BartForConditionalGeneration(config).train())


def test_collate_labels_the_answer_and_its_end(batch: Batch) -> None:
    assert batch.labels.tolist() == [[6, 7, 2], [8, 2, -100]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.decoder_input_ids(1).tolist() == [[1, 6, 7], [1, 8, 2]]


def test_answer_loss_is_that_of_hugging_face(batch: Batch) -> None:
    objective = tiny_objective()
    losses = objective(batch)
    expected = objective.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss
    assert float(losses.answer.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    total = losses.answer + POINTER_WEIGHT * losses.pointer + GUIDE_WEIGHT * losses.guide
    assert float(losses.total.detach()) == pytest.approx(float(total.detach()))


def test_training_steps_lower_every_loss(batch: Batch) -> None:
    objective = tiny_objective()
    adam = optimizer(objective, 3e-3, 3e-3)
    before = objective(batch)
    for _ in range(60):
        adam.zero_grad()
        objective(batch).total.backward()
        adam.step()
    after = objective(batch)
    assert float(after.answer.detach()) < float(before.answer.detach())
    assert float(after.exact) == 1.0
    assert float(after.pointer.detach()) < float(before.pointer.detach())
    assert float(after.guide.detach()) < float(before.guide.detach())


def test_rates_rise_stay_and_fall() -> None:
    assert rate(0, 0.0, 0.3) == pytest.approx(1 / 40)
    assert rate(100, 0.2, 0.3) == 1.0
    assert rate(100, 0.65, 0.3) == pytest.approx(0.5)
    assert rate(100, 1.0, 0.3) == pytest.approx(0.03)
