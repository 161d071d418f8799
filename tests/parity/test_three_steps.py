"""Encode, retrieve, generate apart, as the documentation does, gives what transformers' one step gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RagRetriever
from transformers.models.rag.retrieval_rag import CustomHFIndex

from generator_service.engine.messages import EncodeQuestion, ScoreTarget
from generator_service.engine.model_runner import ModelRunner
from generator_service.engine.request import Request
from generator_service.engine.scheduler import Schedule
from generator_service.model.question_encoder import QuestionEncoder
from generator_service.types import Compatibility, GenerationSettings, Pooling, Strategy
from tests.parity import cases, engine, oracle
from tests.parity.oracle import Batch, Question
from tests.parity.tiny_models import FIRST_WORD, VOCAB_SIZE, TinyRag, tiny_rag

N_DOCS = 3
DIMENSION = 16
QUESTIONS = [[7, 8, 9, 10, 11], [30, 31, 5, 6, 44], [12, 13, 14, 15, 16]]


def word_tokenizer(pad_token_id: int) -> Any:
    """Words w4 to w60 are their own ids; whatever else is said is unknown."""
    special = {("[PAD]" if i == pad_token_id else f"[S{i}]"): i for i in range(FIRST_WORD)}
    words = {f"w{i}": i for i in range(FIRST_WORD, VOCAB_SIZE)}
    unknown = next(name for name in special if name != "[PAD]")
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token=unknown)


@dataclass
class Pair:
    rag: TinyRag
    retriever: RagRetriever

    @property
    def one_step(self) -> dict[str, Any]:
        return {"input_ids": torch.tensor(QUESTIONS), "n_docs": N_DOCS}


@pytest.fixture(scope="module", params=["bart", "t5-gated", "t5-pad3"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    from datasets import Dataset

    rag = tiny_rag(request.param, 1)
    rag.set_n_docs(N_DOCS)
    rng = np.random.default_rng(3)

    def say(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(FIRST_WORD, VOCAB_SIZE, count))

    size = 20
    passages = Dataset.from_dict(
        {
            "title": [say(2) for _ in range(size)],
            "text": [say(int(rng.integers(3, 14))) for _ in range(size)],
            "embeddings": (rng.standard_normal((size, DIMENSION)) * 0.3).tolist(),
        }
    )
    passages.add_faiss_index("embeddings", metric_type=0)
    config = rag.token.config
    config.max_combined_length, config.retrieval_vector_size = 32, DIMENSION
    tokenizers = word_tokenizer(0), word_tokenizer(rag.pad_token_id)
    retriever = RagRetriever(config, *tokenizers, index=CustomHFIndex(DIMENSION, passages))
    answering = (rag.token, rag.sequence, rag.mathematical)
    for model in answering:
        model.set_retriever(retriever)
    yield Pair(rag, retriever)
    for model in answering:
        model.rag.retriever = None


def encoded(pair: Pair) -> np.ndarray:
    """Step one, through the runner: float32 [batch, dim]."""
    encoder = QuestionEncoder(
        pair.rag.question_encoder, pooling=Pooling.FIRST_OUTPUT, normalize=False, score_scale=1.0
    )
    runner = ModelRunner(pair.rag.backbone, encoder, torch.device("cpu"))
    requests = [
        Request(EncodeQuestion(request_id=i, input_ids=ids, attention_mask=[1] * len(ids)))
        for i, ids in enumerate(QUESTIONS)
    ]
    outcome = runner.execute(Schedule(encode=requests))
    return np.stack([np.frombuffer(vector, dtype="<f4") for _, vector in outcome.encoded])


def retrieved(pair: Pair) -> Batch:
    """Step two: contexts without their pads, and doc_scores."""
    hidden = encoded(pair)
    documents = pair.retriever(QUESTIONS, hidden, prefix=None, n_docs=N_DOCS, return_tensors="pt")
    embeddings = documents["retrieved_doc_embeds"].float()
    doc_scores = torch.bmm(torch.from_numpy(hidden).unsqueeze(1), embeddings.transpose(1, 2)).squeeze(1)
    rows = zip(documents["context_input_ids"], documents["context_attention_mask"], strict=True)
    contexts = [ids[mask.bool()].tolist() for ids, mask in rows]
    questions = [
        Question(contexts[i * N_DOCS : (i + 1) * N_DOCS], doc_scores[i].tolist())
        for i in range(len(QUESTIONS))
    ]
    batch = Batch(questions, pair.rag.pad_token_id)
    object.__setattr__(batch, "width", documents["context_input_ids"].shape[1])
    return batch


def three_steps(pair: Pair, settings: GenerationSettings, **how: Any) -> list[list[list[int]]]:
    requests = engine.requests_of(retrieved(pair), settings, **how)
    found = engine.answers_to(engine.new_runner(pair.rag.backbone), requests)
    return [[oracle.trimmed(h.token_ids, settings) for h in question] for question in found]


def one_step(pair: Pair, model: Any, settings: GenerationSettings) -> list[list[list[int]]]:
    rows = model.generate(**pair.one_step, **oracle.generation_arguments(settings)).tolist()
    each = settings.num_return_sequences
    answers = [oracle.trimmed(row, settings) for row in rows]
    return [answers[i * each : (i + 1) * each] for i in range(len(QUESTIONS))]


def test_first_step_is_the_question_encoders_output(pair: Pair) -> None:
    with torch.no_grad():
        expected = pair.rag.token.question_encoder(torch.tensor(QUESTIONS))[0]
    np.testing.assert_allclose(encoded(pair), expected.numpy(), atol=1e-5)


def test_contexts_of_the_second_step_are_padded_by_transformers(pair: Pair) -> None:
    """Without pads the rest of this file would not show that they do no harm."""
    batch = retrieved(pair)
    assert batch.has_pads
    assert len({len(c) for q in batch.questions for c in q.contexts}) > 1


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_three_steps_of_rag_token_give_what_one_gives(pair: Pair, num_beams: int) -> None:
    settings = cases.plain_settings(
        pair.rag, num_beams=num_beams, num_return_sequences=num_beams, max_length=10
    )
    found = three_steps(pair, settings, strategy=Strategy.RAG_TOKEN)
    assert found == one_step(pair, pair.rag.token, settings)


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_three_steps_of_rag_sequence_give_what_one_gives(pair: Pair, num_beams: int) -> None:
    settings = cases.plain_settings(
        pair.rag, num_beams=num_beams, num_return_sequences=num_beams, max_length=10
    )
    how = {"strategy": Strategy.RAG_SEQUENCE, "compatibility": Compatibility.HF}
    assert three_steps(pair, settings, **how) == one_step(pair, pair.rag.sequence, settings)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_three_steps_of_scoring_give_the_loss_of_one(pair: Pair, strategy: Strategy) -> None:
    rag = pair.rag
    labels = [[rag.decoder_start_token_id, 20 + i, 21, 22 + i, rag.eos_token_id] for i in range(3)]
    model = rag.token if strategy is Strategy.RAG_TOKEN else rag.sequence
    with torch.no_grad():
        expected = model(**pair.one_step, labels=torch.tensor(labels), reduce_loss=False).loss
    targets = [
        ScoreTarget(
            request_id=engine.new_id(),
            strategy=strategy,
            compatibility=Compatibility.HF,
            contexts=question.contexts,
            doc_scores=question.doc_scores,
            labels=row,
            pad_token_id=rag.pad_token_id,
            exclude_first=False,
        )
        for question, row in zip(retrieved(pair).questions, labels, strict=True)
    ]
    losses = torch.tensor([s.nll_loss for s in engine.score(rag.backbone, targets)])
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-5)


def test_transformers_retrieves_again_to_score_each_questions_candidates(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    stock = RagRetriever.__call__

    def counted(self: Any, question_input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(question_input_ids))
        return stock(self, question_input_ids, *args, **kwargs)

    monkeypatch.setattr(RagRetriever, "__call__", counted)
    one_step(pair, pair.rag.sequence, cases.plain_settings(pair.rag, num_beams=2, max_length=6))
    assert len(calls) == 1 + len(QUESTIONS)
    assert sum(calls[1:]) > len(QUESTIONS), "once more for every candidate"
