"""Everything that a caller can send wrong, and the field that the refusal names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from generator_service.request_checks import RequestLimits, check_given, check_settings
from generator_service.types import GenerationSettings, Strategy
from rag_serving.errors import InvalidArgumentError

LIMITS = RequestLimits(
    max_batch_size=4,
    max_n_docs=5,
    max_num_beams=6,
    max_answer_length=30,
    max_question_chars=20,
    vocab_size=100,
    max_positions=24,
    question_vocab_size=50,
    question_max_length=8,
)


def field_of(error: pytest.ExceptionInfo[InvalidArgumentError]) -> str:
    return error.value.violations[0].field


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 1),
        ("max_new_tokens", 0),
        ("min_length", -1),
        ("min_new_tokens", -1),
        ("num_beams", 0),
        ("num_return_sequences", 0),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("typical_p", 0.0),
        ("epsilon_cutoff", 1.0),
        ("eta_cutoff", -0.5),
        ("repetition_penalty", 0.0),
        ("encoder_repetition_penalty", float("inf")),
        ("no_repeat_ngram_size", -2),
        ("encoder_no_repeat_ngram_size", -2),
        ("length_penalty", float("nan")),
        ("decoder_start_token_id", 100),
        ("pad_token_id", -1),
        ("forced_bos_token_id", 100),
        ("forced_eos_token_id", -2),
    ],
)
def test_a_wrong_generation_argument_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        check_given({name: value}, 100)
    assert field_of(error) == f"generation_config.{name}"
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("eos_token_ids", (2, 100), "eos_token_ids"),
        ("suppress_tokens", (-1,), "suppress_tokens"),
        ("bad_words_ids", ((1,), ()), "bad_words_ids[1].token_ids"),
        ("allowed_sequences", ((1, 100),), "allowed_sequences[0].token_ids"),
    ],
)
def test_a_wrong_token_list_is_named(name: str, value: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        check_given({name: value}, 100)
    assert field_of(error) == f"generation_config.{field}"


def test_right_arguments_pass() -> None:
    check_given(
        {"forced_bos_token_id": -1, "length_penalty": -1.0, "top_p": 1.0, "bad_words_ids": ((1,),)}, 100
    )


@pytest.mark.parametrize(
    ("settings", "strategy", "field"),
    [
        (GenerationSettings(max_length=25), Strategy.RAG_TOKEN, "max_length"),
        (GenerationSettings(max_length=10, min_length=11), Strategy.RAG_TOKEN, "min_length"),
        (GenerationSettings(max_length=10, min_new_tokens=10), Strategy.RAG_TOKEN, "min_length"),
        (GenerationSettings(num_beams=7), Strategy.RAG_TOKEN, "num_beams"),
        (GenerationSettings(num_beams=2, num_return_sequences=3), Strategy.RAG_TOKEN, "num_return_sequences"),
        (GenerationSettings(num_return_sequences=2), Strategy.RAG_TOKEN, "num_return_sequences"),
        (
            GenerationSettings(num_beams=2, num_return_sequences=7),
            Strategy.RAG_SEQUENCE,
            "num_return_sequences",
        ),
        (
            GenerationSettings(do_sample=True, num_return_sequences=7),
            Strategy.RAG_TOKEN,
            "num_return_sequences",
        ),
    ],
)
def test_arguments_that_do_not_go_together_are_named(
    settings: GenerationSettings, strategy: Strategy, field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        check_settings(settings, strategy, 3, LIMITS)
    assert field_of(error) == f"generation_config.{field}"


def test_rag_sequence_may_return_every_documents_beams() -> None:
    check_settings(GenerationSettings(num_beams=2, num_return_sequences=6), Strategy.RAG_SEQUENCE, 3, LIMITS)


@pytest.mark.parametrize(
    ("texts", "field"),
    [([], "q"), (["a"] * 5, "q"), (["a", "  "], "q[1]"), (["x" * 21], "q[0]")],
)
def test_wrong_question_texts_are_named(texts: list[str], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        LIMITS.check_texts(texts, "q")
    assert field_of(error) == field


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (1, 0), (1, 9)])
def test_question_ids_of_a_wrong_shape_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgumentError):
        LIMITS.check_question_ids(np.zeros(shape, dtype=np.int64), "ids")


def contexts(**changes: Any) -> dict[str, Any]:
    made = {
        "ids": np.full((4, 6), 7, dtype=np.int64),
        "mask": np.ones((4, 6), dtype=np.int64),
        "doc_scores": np.zeros((2, 2), dtype=np.float32),
    }
    return {**made, **changes}


def test_right_contexts_pass() -> None:
    LIMITS.check_contexts(**contexts(doc_scores=np.array([[0, -np.inf], [1, 2]], dtype=np.float32)))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"ids": np.full((3, 6), 7)}, "context_input_ids"),
        ({"ids": np.full((4, 0), 7)}, "context_input_ids"),
        ({"ids": np.full((4, 6), 100)}, "context_input_ids"),
        ({"ids": np.full((4, 6), -1)}, "context_input_ids"),
        ({"ids": np.full((4, 30), 7), "mask": np.ones((4, 30), dtype=np.int64)}, "context_input_ids"),
        ({"mask": np.ones((4, 5), dtype=np.int64)}, "context_attention_mask"),
        ({"mask": np.zeros((4, 6), dtype=np.int64)}, "context_attention_mask[0]"),
        ({"mask": np.tile([0, 1, 1, 1, 1, 1], (4, 1))}, "context_attention_mask[0]"),
        ({"mask": np.full((4, 6), 2)}, "context_attention_mask[0]"),
        ({"doc_scores": np.array([[np.nan, 0], [0, 0]], dtype=np.float32)}, "doc_scores"),
        ({"doc_scores": np.array([[np.inf, 0], [0, 0]], dtype=np.float32)}, "doc_scores"),
        ({"doc_scores": np.full((2, 2), -np.inf, dtype=np.float32)}, "doc_scores"),
        ({"doc_scores": np.zeros((0, 2), dtype=np.float32)}, "doc_scores"),
        ({"doc_scores": np.zeros((2, 6), dtype=np.float32)}, "doc_scores"),
        ({"doc_scores": np.zeros((2, 0), dtype=np.float32)}, "doc_scores"),
    ],
)
def test_wrong_contexts_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        LIMITS.check_contexts(**contexts(**changes))
    assert field_of(error) == f"contexts.{field}"


@pytest.mark.parametrize("shape", [(1, 3), (2, 0), (2, 25)])
def test_labels_of_a_wrong_shape_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        LIMITS.check_labels(np.zeros(shape, dtype=np.int64), 2, "labels")
    assert field_of(error) == "labels"
