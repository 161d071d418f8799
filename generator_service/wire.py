"""rag.generator.v1 messages <-> the service's own types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from generator_service.answer_stream import Pacing, Piece
from generator_service.answerer import AnswerText, QuestionContexts, Questions, Stages
from generator_service.provenance import Provenance
from generator_service.request_checks import RequestLimits, check_mask
from generator_service.retrieval_client import RetrievalSettings
from generator_service.tokenization import TextTokenizer
from generator_service.types import (
    Compatibility,
    EarlyStopping,
    GenerationSettings,
    SequenceDecoding,
    Strategy,
)
from rag.generator.v1 import generation_pb2, generator_service_pb2, provenance_pb2
from rag_serving import tensor_codec
from rag_serving.errors import FieldViolation, InvalidArgumentError
from rag_serving.tensor_codec import FLOATS, INTEGERS

STRATEGIES = {
    generation_pb2.STRATEGY_UNSPECIFIED: None,
    generation_pb2.STRATEGY_RAG_SEQUENCE: Strategy.RAG_SEQUENCE,
    generation_pb2.STRATEGY_RAG_TOKEN: Strategy.RAG_TOKEN,
}
WIRE_STRATEGIES = {
    Strategy.RAG_SEQUENCE: generation_pb2.STRATEGY_RAG_SEQUENCE,
    Strategy.RAG_TOKEN: generation_pb2.STRATEGY_RAG_TOKEN,
}
SEQUENCE_DECODINGS = {
    generation_pb2.SEQUENCE_DECODING_UNSPECIFIED: SequenceDecoding.THOROUGH,
    generation_pb2.SEQUENCE_DECODING_THOROUGH: SequenceDecoding.THOROUGH,
    generation_pb2.SEQUENCE_DECODING_FAST: SequenceDecoding.FAST,
}
COMPATIBILITIES = {
    generation_pb2.COMPATIBILITY_UNSPECIFIED: Compatibility.MASKED,
    generation_pb2.COMPATIBILITY_MASKED: Compatibility.MASKED,
    generation_pb2.COMPATIBILITY_HF: Compatibility.HF,
}
WIRE_SEQUENCE_DECODINGS = {
    SequenceDecoding.THOROUGH: generation_pb2.SEQUENCE_DECODING_THOROUGH,
    SequenceDecoding.FAST: generation_pb2.SEQUENCE_DECODING_FAST,
}
WIRE_COMPATIBILITIES = {
    Compatibility.MASKED: generation_pb2.COMPATIBILITY_MASKED,
    Compatibility.HF: generation_pb2.COMPATIBILITY_HF,
}
EARLY_STOPPINGS = {
    generation_pb2.EARLY_STOPPING_UNSPECIFIED: None,
    generation_pb2.EARLY_STOPPING_HEURISTIC: EarlyStopping.HEURISTIC,
    generation_pb2.EARLY_STOPPING_FIRST_COMPLETE: EarlyStopping.FIRST_COMPLETE,
    generation_pb2.EARLY_STOPPING_NEVER: EarlyStopping.NEVER,
}
WIRE_EARLY_STOPPINGS = {
    EarlyStopping.HEURISTIC: generation_pb2.EARLY_STOPPING_HEURISTIC,
    EarlyStopping.FIRST_COMPLETE: generation_pb2.EARLY_STOPPING_FIRST_COMPLETE,
    EarlyStopping.NEVER: generation_pb2.EARLY_STOPPING_NEVER,
}
_SEQUENCE_LISTS = ("bad_words_ids", "allowed_sequences")
_MAX_PIECE_TOKENS, _MAX_PIECE_WAIT_S = 1024, 60.0
_TOKEN_LISTS = ("eos_token_ids", "suppress_tokens", "begin_suppress_tokens")


def read_enum(values: Mapping[Any, Any], number: int, field: str) -> Any:
    """An enum's meaning. Raises InvalidArgumentError for a number that it does not have."""
    if number not in values:
        raise InvalidArgumentError(field, "is not a value of its enum", number)
    return values[number]


def read_given(config: generation_pb2.GenerationConfig) -> dict[str, Any]:
    """The generation arguments that a request sets, by name; token lists as tuples."""
    given: dict[str, Any] = {}
    for descriptor, value in config.ListFields():
        name = descriptor.name
        if name == "early_stopping":
            given[name] = read_enum(EARLY_STOPPINGS, value, "generation_config.early_stopping")
        elif name in _SEQUENCE_LISTS:
            given[name] = tuple(tuple(sequence.token_ids) for sequence in value)
        elif name in _TOKEN_LISTS:
            given[name] = tuple(value)
        elif name != "seed":
            given[name] = value
    return given


def read_retrieval(
    config: generation_pb2.RetrievalConfig, default_n_docs: int, limits: RequestLimits
) -> RetrievalSettings:
    """Retrieval arguments; the retriever checks those that are its own."""
    n_docs = config.n_docs if config.n_docs != 0 else default_n_docs
    limits.check_n_docs(n_docs, "retrieval_config.n_docs")
    for name in ("nprobe", "ef_search", "rescore_factor", "max_combined_length"):
        if getattr(config, name) < 0:
            raise InvalidArgumentError(
                f"retrieval_config.{name}", "must not be negative", getattr(config, name)
            )
    if limits.max_positions is not None and config.max_combined_length > limits.max_positions:
        raise InvalidArgumentError(
            "retrieval_config.max_combined_length",
            f"the generator has {limits.max_positions} positions",
            config.max_combined_length,
        )
    return RetrievalSettings(
        n_docs=n_docs,
        prefix=config.prefix if config.HasField("prefix") else None,
        nprobe=config.nprobe,
        ef_search=config.ef_search,
        max_combined_length=config.max_combined_length,
        truncate_question_last=config.truncate_question_last,
        rescore_factor=config.rescore_factor,
        filter=config.filter if config.HasField("filter") else None,
        score_threshold=config.score_threshold if config.HasField("score_threshold") else None,
    )


def read_question_texts(texts: Sequence[str], tokenizer: TextTokenizer, limits: RequestLimits) -> Questions:
    """Questions given as text."""
    limits.check_texts(texts, "question_texts.texts")
    ids = tokenizer.encode(texts)
    limits.check_question_lengths(ids, "question_texts.texts")
    return Questions(ids, [[1] * len(row) for row in ids], list(texts))


def read_question_tokens(
    tokens: generation_pb2.QuestionTokens, limits: RequestLimits, *, pad_token_id: int | None
) -> Questions:
    """Questions given as token ids: rows lose the pads that their masks mark on the right.

    pad_token_id is set where the encoder masks its own pads for want of a mask (DPR, modeling_dpr.py).
    """
    ids = tensor_codec.decode(
        tokens.input_ids, "question_tokens.input_ids", dtypes=INTEGERS, ndim=2, widen=True
    )
    limits.check_question_ids(ids, "question_tokens.input_ids")
    mask = np.ones_like(ids) if pad_token_id is None else (ids != pad_token_id).astype(ids.dtype)
    if tokens.HasField("attention_mask"):
        mask = tensor_codec.decode(
            tokens.attention_mask, "question_tokens.attention_mask", dtypes=INTEGERS, ndim=2, widen=True
        )
        if mask.shape != ids.shape:
            raise InvalidArgumentError(
                "question_tokens.attention_mask", f"must have the shape {list(ids.shape)}", list(mask.shape)
            )
    lengths = check_mask(mask, "question_tokens.attention_mask")
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    return Questions(rows, [[1] * len(row) for row in rows], None)


def read_contexts(contexts: generation_pb2.Contexts, limits: RequestLimits) -> list[QuestionContexts]:
    """Contexts that the caller retrieved itself."""
    ids = tensor_codec.decode(
        contexts.context_input_ids, "contexts.context_input_ids", dtypes=INTEGERS, ndim=2, widen=True
    )
    mask = tensor_codec.decode(
        contexts.context_attention_mask,
        "contexts.context_attention_mask",
        dtypes=INTEGERS,
        ndim=2,
        widen=True,
    )
    scores = tensor_codec.decode(
        contexts.doc_scores, "contexts.doc_scores", dtypes=FLOATS, ndim=2, widen=True
    )
    limits.check_contexts(ids, mask, scores)
    n_docs, lengths = scores.shape[1], mask.sum(axis=1)
    found = []
    for index, row in enumerate(scores):
        present = [d for d in range(n_docs) if np.isfinite(row[d])]
        places = [index * n_docs + d for d in present]
        found.append(
            QuestionContexts(
                contexts=[ids[p, : lengths[p]].tolist() for p in places],
                padded_contexts=[ids[p].tolist() for p in places],
                doc_scores=[float(row[d]) for d in present],
                documents=[],
                present=present,
                n_docs=n_docs,
            )
        )
    return found


def read_pacing(request: generator_service_pb2.GenerateStreamRequest) -> Pacing:
    """When pieces go out. Raises InvalidArgumentError out of its bounds, or where nothing is asked."""
    if not request.HasField("generate"):
        raise InvalidArgumentError("generate", "must be set")
    given = {n: getattr(request, n) for n in ("piece_tokens", "piece_wait_s") if request.HasField(n)}
    pacing = Pacing(**given)
    if not 1 <= pacing.piece_tokens <= _MAX_PIECE_TOKENS:
        raise InvalidArgumentError("piece_tokens", f"must be 1 to {_MAX_PIECE_TOKENS}", pacing.piece_tokens)
    if not 0 <= pacing.piece_wait_s <= _MAX_PIECE_WAIT_S:
        raise InvalidArgumentError("piece_wait_s", f"must be 0 to {_MAX_PIECE_WAIT_S:g}", pacing.piece_wait_s)
    return pacing


@contextmanager
def fields_within(message: str) -> Iterator[None]:
    """Refusals of a request inside another one name its fields by their whole path."""
    try:
        yield
    except InvalidArgumentError as error:
        violations = [FieldViolation(f"{message}.{v.field}", v.description) for v in error.violations]
        whole = InvalidArgumentError.of(violations)
        whole.reason = error.reason
        raise whole from error


def write_piece(piece: Piece, n_docs: int) -> generation_pb2.AnswerPiece:
    """Tokens that have become certain."""
    posterior = np.array(piece.document_posterior, dtype=np.float32).reshape(len(piece.token_ids), n_docs)
    return generation_pb2.AnswerPiece(
        question=piece.question,
        token_ids=piece.token_ids,
        text_delta=piece.text_delta,
        document_posterior=tensor_codec.encode(posterior),
        last=piece.last,
    )


def write_answers(
    questions: Sequence[QuestionContexts],
    answers: Sequence[Sequence[AnswerText]],
    confidences: Sequence[float],
    *,
    include_documents: bool,
    abstain_below: float,
) -> Iterable[generation_pb2.Answer]:
    """One message a question; without its hypotheses where the best one's probability is too low."""
    for question, texts, confidence in zip(questions, answers, confidences, strict=True):
        abstained = confidence < abstain_below
        yield generation_pb2.Answer(
            hypotheses=[] if abstained else [write_hypothesis(text) for text in texts],
            documents=write_documents(question) if include_documents else [],
            n_docs=question.n_docs,
            confidence=confidence,
            abstained=abstained,
        )


def write_usage(
    questions: Questions | None, contexts: Sequence[QuestionContexts], answers: Sequence[Sequence[AnswerText]]
) -> generation_pb2.Usage:
    """Tokens processed."""
    return generation_pb2.Usage(
        question_tokens=0 if questions is None else sum(len(ids) for ids in questions.input_ids),
        context_tokens=sum(len(c) for question in contexts for c in question.contexts),
        generated_tokens=sum(len(a.hypothesis.token_ids) - 1 for texts in answers for a in texts),
    )


def write_timings(stages: Stages) -> generation_pb2.Timings:
    """Seconds of each stage."""
    return generation_pb2.Timings(
        encode_s=stages.encode_s,
        retrieve_s=stages.retrieve_s,
        queue_s=stages.queue_s,
        generate_s=stages.generate_s,
        total_s=stages.total_s,
    )


def write_generation_config(settings: GenerationSettings) -> generation_pb2.GenerationConfig:
    """Resolved settings as the arguments that would ask for them."""
    sequences = [generation_pb2.TokenSequence(token_ids=word) for word in settings.bad_words_ids]
    config = generation_pb2.GenerationConfig(bad_words_ids=sequences)
    for name in settings.__struct_fields__:
        value = getattr(settings, name)
        if name in (*_TOKEN_LISTS,):
            getattr(config, name).extend(value)
        elif name == "early_stopping":
            config.early_stopping = WIRE_EARLY_STOPPINGS[value]
        elif value is not None and name not in _SEQUENCE_LISTS and name != "seed":
            setattr(config, name, value)
    return config


def read_labels(
    request: generator_service_pb2.ScoreRequest | generator_service_pb2.ExplainRequest,
) -> npt.NDArray[np.int64]:
    """Targets given as token ids, int64 [batch, length]."""
    return tensor_codec.decode(request.labels, "labels", dtypes=INTEGERS, ndim=2, widen=True)


def write_hypothesis(answer: AnswerText) -> generation_pb2.Hypothesis:
    """One answer; its provenance where it was traced."""
    hypothesis, span = answer.hypothesis, answer.span
    return generation_pb2.Hypothesis(
        token_ids=hypothesis.token_ids,
        text=answer.text,
        score=hypothesis.score,
        log_likelihood=hypothesis.log_likelihood,
        document_posterior=hypothesis.document_posterior,
        span=None
        if span is None
        else generation_pb2.AnswerSpan(
            document=span.document, start=span.start, end=span.end, text=span.text, in_title=span.in_title
        ),
        provenance=None if answer.provenance is None else _write_provenance(answer.provenance),
    )


def _write_provenance(provenance: Provenance) -> provenance_pb2.Provenance:
    return provenance_pb2.Provenance(
        token_posterior=tensor_codec.encode(provenance.token_posterior),
        tokens=[
            provenance_pb2.TokenSource(
                token_id=one.token_id,
                text=one.text,
                document=one.document,
                probability=one.probability,
                span=None
                if one.span is None
                else provenance_pb2.TextSpan(start=one.span[0], end=one.span[1]),
                context_start=one.context_start,
                context_end=one.context_end,
                attention=one.attention,
            )
            for one in provenance.tokens
        ],
    )


def write_documents(question: QuestionContexts) -> list[generation_pb2.RetrievedDocument]:
    """The documents behind a posterior; none where the caller brought the contexts."""
    if not question.documents:
        return []
    scores = np.array(question.doc_scores, dtype=np.float64)
    prior = np.exp(scores - scores.max())
    prior /= prior.sum()
    return [
        generation_pb2.RetrievedDocument(
            key=d.key, row=d.row, title=d.title, text=d.text, doc_score=score, prior=share
        )
        for d, score, share in zip(question.documents, question.doc_scores, prior.tolist(), strict=True)
    ]
