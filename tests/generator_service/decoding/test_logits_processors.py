"""Which processors a search gets, and what ours do that transformers has not."""

from typing import Any

import pytest
import torch

from generator_service.decoding import logits_processors
from generator_service.decoding.logits_processors import AllowedSequences, EncoderRepetitionPenalty
from generator_service.types import GenerationSettings

CPU = torch.device("cpu")
END = 2


def left(scores: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in scores]


def test_neutral_settings_need_no_processor() -> None:
    settings = GenerationSettings(eos_token_ids=(END,))
    assert logits_processors.build(settings, [torch.tensor([5])], CPU) == []
    assert logits_processors.build_warpers(settings, CPU) == []


def test_warpers_act_only_while_sampling() -> None:
    warped: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "eos_token_ids": (END,)}
    assert logits_processors.build_warpers(GenerationSettings(**warped), CPU) == []
    assert len(logits_processors.build_warpers(GenerationSettings(do_sample=True, **warped), CPU)) == 3


def test_allowed_sequences_leave_what_may_follow() -> None:
    allowed = AllowedSequences([(5, END), (5, 6, END), (7, END)], (END,), rows_compete=True)
    scores = allowed(torch.tensor([[0], [0], [0]]), torch.zeros(3, 9))
    assert left(scores) == [[5, 7]] * 3
    scores = allowed(torch.tensor([[0, 5], [0, 7], [0, 8]]), torch.zeros(3, 9))
    assert left(scores) == [[END, 6], [END], [END]]


@pytest.mark.parametrize("rows_compete", [False, True])
def test_allowed_tokens_are_forced_where_others_forbid_them(rows_compete: bool) -> None:
    allowed = AllowedSequences([(5, END), (6, END)], (END,), rows_compete=rows_compete)
    scores = torch.zeros(2, 9)
    scores[:, END] = float("-inf")
    both_stuck = allowed(torch.tensor([[0, 5], [0, 6]]), scores)
    assert left(both_stuck) == [[END], [END]]
    scores[1, END] = -1.0
    one_stuck = allowed(torch.tensor([[0, 5], [0, 6]]), scores)
    assert left(one_stuck) == ([[], [END]] if rows_compete else [[END], [END]])


def test_encoder_repetition_penalty_favours_tokens_of_the_contexts() -> None:
    favour = EncoderRepetitionPenalty(2.0, torch.tensor([3, 4, 3]))
    scores = favour(torch.tensor([[0]]), torch.tensor([[1.0, -1.0, 1.0, 1.0, -1.0]]))
    assert scores.tolist() == [[1.0, -1.0, 1.0, 2.0, -0.5]]


@pytest.mark.parametrize(
    ("changes", "cur_len", "expected"),
    [
        ({}, 1, None),
        ({"forced_bos_token_id": 7}, 1, 7),
        ({"forced_bos_token_id": 7}, 2, None),
        ({"forced_bos_token_id": 7, "do_sample": True}, 1, None),
        ({"forced_eos_token_id": END}, 9, END),
        ({"forced_eos_token_id": END}, 8, None),
        ({"forced_eos_token_id": END, "suppress_tokens": (END,)}, 9, None),
        ({"forced_bos_token_id": 7, "begin_suppress_tokens": (7,)}, 1, None),
        ({"forced_bos_token_id": 7, "renormalize_logits": True}, 1, None),
        ({"forced_bos_token_id": 7, "forced_eos_token_id": END, "max_length": 2}, 1, END),
    ],
)
def test_forced_token_is_known_only_where_nothing_else_could_matter(
    changes: dict[str, Any], cur_len: int, expected: int | None
) -> None:
    settings = GenerationSettings(**({"max_length": 10, "eos_token_ids": (END,)} | changes))
    assert logits_processors.forced_token(settings, cur_len) == expected
