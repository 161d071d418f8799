"""What the client hands back: answers, documents and descriptions as plain data, arrays as numpy."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class Strategy(StrEnum):
    """Which marginalisation answers."""

    RAG_SEQUENCE = "RAG_SEQUENCE"
    RAG_TOKEN = "RAG_TOKEN"  # noqa: S105  (no password)


class Health(StrEnum):
    """What grpc.health.v1 says of a service, or that nobody answered."""

    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    UNKNOWN = "UNKNOWN"
    UNREACHABLE = "UNREACHABLE"


@dataclass(frozen=True, slots=True)
class QuestionTokens:
    """Questions as ids of the question tokenizer: integers [batch, length]; no mask attends everything."""

    input_ids: npt.NDArray[np.integer[Any]]
    attention_mask: npt.NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True, slots=True)
class Contexts:
    """Contexts that the caller retrieved: integers [batch * n_docs, length] twice, floats [batch, n_docs]."""

    context_input_ids: npt.NDArray[np.integer[Any]]
    context_attention_mask: npt.NDArray[np.integer[Any]]
    doc_scores: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class AnswerSpan:
    """Where an answer stands: characters [start, end) of documents[document]'s text, or of its title."""

    document: int
    start: int
    end: int
    text: str
    in_title: bool = False


@dataclass(frozen=True, slots=True)
class TextSpan:
    """Characters [start, end) of a document's text."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TokenSource:
    """What a generated token rests on: its likeliest document, and where the decoder looked most in its text.

    `text` is what the token adds to the answer's text; [context_start, context_end) are the tokens of the document's
    context that `attention`, a share of the whole, falls on; `span` is the same as characters of its text, where known.
    """

    token_id: int
    text: str
    document: int
    probability: float
    span: TextSpan | None
    context_start: int
    context_end: int
    attention: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """What an answer rests on, token by token: token_posterior is float32 [generated tokens, n_docs]."""

    token_posterior: FloatArray
    tokens: list[TokenSource]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One answer; `document_posterior` is p(document | question, answer) of each retrieved document."""

    token_ids: list[int]
    text: str
    score: float
    log_likelihood: float
    document_posterior: list[float]
    span: AnswerSpan | None
    provenance: Provenance | None = None

    @property
    def probability(self) -> float:
        """p(answer | question), marginalised over the documents."""
        return math.exp(self.log_likelihood)

    @property
    def answer(self) -> str:
        """The answer as people write it: as its document has it, where it was found in one."""
        return self.span.text if self.span is not None else self.text


@dataclass(frozen=True, slots=True)
class Document:
    """A passage of the corpus; `row` is its number in the index."""

    key: str
    row: int
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class RetrievedDocument:
    """A passage that an answer rests on; `prior` is the softmax of the question's doc_scores."""

    key: str
    row: int
    title: str
    text: str
    doc_score: float
    prior: float


@dataclass(frozen=True, slots=True)
class Answer:
    """The answers to one question, best first, and the documents where they were asked for.

    `confidence` is the best answer's probability; where `abstained`, it was below what the request asked for, and
    there are no hypotheses.
    """

    hypotheses: list[Hypothesis]
    documents: list[RetrievedDocument]
    n_docs: int
    confidence: float = 0.0
    abstained: bool = False

    @property
    def best(self) -> Hypothesis:
        """The best hypothesis. Raises IndexError where constraints left none."""
        return self.hypotheses[0]

    @property
    def text(self) -> str:
        """The best answer as people write it, empty where constraints left none."""
        return self.hypotheses[0].answer if self.hypotheses else ""


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """Tokens and text of a question's best answer that follow those before, and will not be taken back.

    `document_posterior` is float32 [tokens, n_docs]: what each token owes to which document.
    """

    question: int
    token_ids: list[int]
    text_delta: str
    document_posterior: FloatArray
    last: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens processed by a request."""

    question_tokens: int
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a request went, in seconds."""

    encode_s: float
    retrieve_s: float
    queue_s: float
    generate_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Generation:
    """The answers of a request, in the order of its questions, and how they came about.

    `pinned_request` is the request with nothing left open, ready for JSON: given back to `generate` with the same
    questions, it gets the same tokens, or FAILED_PRECONDITION.
    """

    answers: list[Answer]
    strategy: Strategy
    strategy_differs_from_checkpoint: bool
    compatibility: str
    seed: int
    checkpoint_digest: str
    index_generation: int
    usage: Usage
    timings: Timings
    pinned_request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An answer without one document: its log-likelihood, the change of it, and what would be answered instead.

    log_likelihood and change are None where it is the only document, answer where none was asked for or there is none.
    """

    document: int
    log_likelihood: float | None
    change: float | None
    answer: Hypothesis | None
    answer_differs: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """An answer with its provenance, and what it owes to each of its documents."""

    answer: Hypothesis
    left_out: list[LeftOut]
    documents: list[RetrievedDocument]
    n_docs: int


@dataclass(frozen=True, slots=True)
class Explanations:
    """The explanations of a request, in the order of its questions."""

    explanations: list[Explanation]
    strategy: Strategy
    strategy_differs_from_checkpoint: bool
    timings: Timings
    pinned_request: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scores:
    """float32 [batch] log-likelihoods of the targets, their loss, and [batch, n_docs] of the documents."""

    log_likelihoods: FloatArray
    loss: FloatArray
    document_posterior: FloatArray
    doc_scores: FloatArray
    strategy: Strategy
    strategy_differs_from_checkpoint: bool
    index_generation: int


@dataclass(frozen=True, slots=True)
class EncoderOutputs:
    """Contexts that the caller encoded: floats [batch * n_docs, length, d_model], the mask of their tokens, and scores.

    doc_scores are floats [batch, n_docs]; no mask attends everything.
    """

    last_hidden_state: npt.NDArray[np.floating[Any]]
    doc_scores: npt.NDArray[np.floating[Any]]
    context_attention_mask: npt.NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True, slots=True)
class ForwardOutputs:
    """A forward pass by Hugging Face's names: None, "" and () are what was not asked for or does not apply.

    Shapes are those of rag.generator.v1's ForwardOutputs; hidden states and attentions have one array a layer.
    """

    n_docs: int
    checkpoint_digest: str
    index_generation: int
    past_key_values_expires_s: float
    past_key_values: str = ""
    loss: FloatArray | None = None
    logits: FloatArray | None = None
    doc_scores: FloatArray | None = None
    retrieved_doc_embeds: FloatArray | None = None
    retrieved_doc_ids: IntArray | None = None
    context_input_ids: IntArray | None = None
    context_attention_mask: IntArray | None = None
    question_encoder_last_hidden_state: FloatArray | None = None
    question_enc_hidden_states: tuple[FloatArray, ...] = ()
    question_enc_attentions: tuple[FloatArray, ...] = ()
    generator_enc_last_hidden_state: FloatArray | None = None
    generator_enc_hidden_states: tuple[FloatArray, ...] = ()
    generator_enc_attentions: tuple[FloatArray, ...] = ()
    generator_dec_hidden_states: tuple[FloatArray, ...] = ()
    generator_dec_attentions: tuple[FloatArray, ...] = ()
    generator_cross_attentions: tuple[FloatArray, ...] = ()


@dataclass(frozen=True, slots=True)
class Retrieval:
    """The documents of a batch and the generator's input made of them; None is what was not asked for.

    `documents` are lists of at most n_docs, without the padding that the arrays have; `question_truncated`
    says of each question whether a context lost part of it, and is empty where contexts were skipped.
    """

    doc_scores: FloatArray
    retrieved_doc_ids: IntArray
    n_docs_found: list[int]
    n_docs: int
    generation: int
    context_input_ids: IntArray | None = None
    context_attention_mask: IntArray | None = None
    retrieved_doc_embeds: FloatArray | None = None
    documents: list[list[Document]] | None = None
    question_truncated: list[bool] = field(default_factory=list)

    def contexts(self) -> Contexts:
        """What the generator takes. Raises ValueError where contexts were skipped."""
        if self.context_input_ids is None or self.context_attention_mask is None:
            raise ValueError("this retrieval was made with skip_contexts")
        return Contexts(self.context_input_ids, self.context_attention_mask, self.doc_scores)


@dataclass(frozen=True, slots=True)
class CorpusDocument:
    """A document to write, or as the corpus holds it.

    In an upsert `row` is not read, and an `etag` must be the stored document's.
    """

    key: str
    text: str
    title: str = ""
    metadata: Mapping[str, Any] | None = None
    etag: str = ""
    row: int = -1


@dataclass(frozen=True, slots=True)
class DocumentLookup:
    """Documents that exist, first by key, then by row, and what was asked for in vain."""

    documents: list[CorpusDocument]
    missing_keys: list[str]
    missing_rows: list[int]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that answers, as GetModel describes it."""

    architecture: str
    question_encoder_type: str
    generator_type: str
    decoder: str
    num_parameters: int
    retrieval_vector_size: int
    vocab_size: int
    dtype: str
    devices: list[str]
    default_strategy: Strategy
    default_n_docs: int
    max_n_docs: int
    max_batch_size: int
    checkpoint_digest: str
    context_tokenizer_digest: str
    embedding_model: str
    quantization: str = "none"
    default_generation_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """The index that answers, as GetIndex describes it."""

    ntotal: int
    dimension: int
    metric: str
    kind: str
    generation: int
    embedding_model: str
    context_tokenizer_digest: str
    max_combined_length: int
    default_n_docs: int
    max_n_docs: int
    title_sep: str
    doc_sep: str
    prefix: str
    sequence: int = 0
    pending_changes: int = 0
    writable: bool = False
    generations: list[int] = field(default_factory=list)
    index_folder: str = ""
    devices: list[str] = field(default_factory=list)
