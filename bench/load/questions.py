"""Questions of a workload: random contexts, mixed strategies, beams and answer lengths; as requests and as work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from generator_service.engine.messages import GenerateAnswer
from generator_service.types import Compatibility, GenerationSettings, SequenceDecoding, Strategy
from rag_client import messages
from rag_client.types import Contexts

_FIRST_WORD = 1000
"""Token ids from here on are words in the vocabularies used here."""


@dataclass(frozen=True)
class Mix:
    """What questions are drawn from, evenly, but for answer_lengths, which have their shares.

    Mostly short answers and a tail of long ones, as callers' are.
    """

    strategies: Sequence[Strategy] = (Strategy.RAG_TOKEN, Strategy.RAG_SEQUENCE)
    num_beams: Sequence[int] = (1, 2, 4)
    answer_lengths: Sequence[int] = (6, 12, 24, 64)
    shares: Sequence[float] = (0.4, 0.3, 0.2, 0.1)
    n_docs: int = 5
    context_length: tuple[int, int] = (30, 90)


@dataclass(frozen=True)
class Question:
    """One question with its contexts; answers have exactly answer_length tokens after the start token."""

    strategy: Strategy
    num_beams: int
    answer_length: int
    contexts: list[list[int]]
    doc_scores: list[float]

    def request(self) -> bytes:
        """The GenerateRequest, serialised."""
        width = max(len(c) for c in self.contexts)
        ids = np.array([c + [0] * (width - len(c)) for c in self.contexts])
        mask = np.array([[1] * len(c) + [0] * (width - len(c)) for c in self.contexts])
        scores = np.array([self.doc_scores], dtype=np.float32)
        options = {
            "strategy": self.strategy.value,
            "num_beams": self.num_beams,
            "max_length": self.answer_length + 1,
            "min_length": self.answer_length + 1,
        }
        return messages.generate_request(Contexts(ids, mask, scores), options).SerializeToString()

    def work(self, request_id: int, config: Any) -> GenerateAnswer:
        """The same for an engine in this process; config is the generator's."""
        settings = GenerationSettings(
            max_length=self.answer_length + 1,
            min_length=self.answer_length + 1,
            num_beams=self.num_beams,
            decoder_start_token_id=config.decoder_start_token_id,
            eos_token_ids=(config.eos_token_id,),
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            forced_eos_token_id=config.forced_eos_token_id,
        )
        return GenerateAnswer(
            request_id=request_id,
            strategy=self.strategy,
            sequence_decoding=SequenceDecoding.THOROUGH,
            compatibility=Compatibility.MASKED,
            settings=settings,
            contexts=self.contexts,
            padded_contexts=None,
            doc_scores=self.doc_scores,
            do_deduplication=True,
            exclude_bos_score=True,
        )


def draw(mix: Mix, count: int, vocab_size: int, seed: int) -> list[Question]:
    """Questions of a mix; equal arguments give equal questions."""
    random = np.random.default_rng(seed)
    shortest, longest = mix.context_length
    drawn = []
    for _ in range(count):
        lengths = random.integers(shortest, longest, endpoint=True, size=mix.n_docs)
        drawn.append(
            Question(
                strategy=mix.strategies[int(random.integers(len(mix.strategies)))],
                num_beams=int(random.choice(mix.num_beams)),
                answer_length=int(random.choice(mix.answer_lengths, p=mix.shares)),
                contexts=[random.integers(_FIRST_WORD, vocab_size, size=n).tolist() for n in lengths],
                doc_scores=random.normal(size=mix.n_docs).astype(np.float32).tolist(),
            )
        )
    return drawn
