"""What a question is and how it is answered: plain data, shared by the service and its engine."""

from __future__ import annotations

from enum import Enum, StrEnum

import msgspec


class Strategy(Enum):
    """Which marginalisation of Lewis et al. 2020, section 2.1, answers."""

    RAG_SEQUENCE = "RAG_SEQUENCE"
    RAG_TOKEN = "RAG_TOKEN"  # noqa: S105  (a strategy, no password)


class SequenceDecoding(Enum):
    """How RAG-Sequence scores its candidates (section 2.5)."""

    THOROUGH = "THOROUGH"
    FAST = "FAST"


class Compatibility(Enum):
    """Whose semantics hold where Hugging Face departs from the mathematics (docs/parity.md)."""

    MASKED = "MASKED"
    HF = "HF"


class Batching(Enum):
    """When waiting questions join those that run: at any step, or only once all of these are answered.

    GATHER hands a batch's answers over together, as a call of generate does; GATHER_EARLY each when it is there.
    """

    CONTINUOUS = "CONTINUOUS"
    GATHER = "GATHER"
    GATHER_EARLY = "GATHER_EARLY"


class EarlyStopping(Enum):
    """When beam search ends: Hugging Face's False, True and "never"."""

    HEURISTIC = 0
    FIRST_COMPLETE = 1
    NEVER = 2


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Hugging Face's generation arguments, resolved: nothing is left to a default elsewhere.

    max_length counts the start token. forced_* are None where off. Scalars have Hugging Face's neutral values.
    """

    max_length: int = 20
    min_length: int = 0
    min_new_tokens: int = 0
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    decoder_start_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    allowed_sequences: tuple[tuple[int, ...], ...] = ()
    renormalize_logits: bool = False
    seed: int = 0

    @property
    def is_beam_search(self) -> bool:
        """Whether hypotheses compete; otherwise they are independent chains."""
        return self.num_beams > 1

    @property
    def beams_to_keep(self) -> int:
        """Candidates looked at in each step: enough that num_beams of them have not ended."""
        return max(2, 1 + len(self.eos_token_ids)) * self.num_beams

    @property
    def beam_fill_token_id(self) -> int:
        """What Hugging Face's beam search fills short hypotheses with: the end token where the pad id is 0."""
        return self.pad_token_id or (self.eos_token_ids[0] if self.eos_token_ids else -1)


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer's generated tokens owe to which context; arrays are little-endian float32.

    token_log_probs and token_posterior [tokens, contexts]: log p(token | prefix, document), zero where the token does
    not count, and the posterior of the documents (decoding.provenance). cross_attention holds, for each token, its
    weights over the tokens of the likeliest document's context [context length], averaged over layers and heads.
    """

    token_log_probs: bytes
    token_posterior: bytes
    cross_attention: list[bytes]


class Hypothesis(msgspec.Struct, frozen=True, kw_only=True):
    """One answer: token_ids start with the start token and hold no pads; document_posterior is over the contexts.

    trace is there where the request asked for it.
    """

    token_ids: list[int]
    score: float
    log_likelihood: float
    document_posterior: list[float]
    trace: Trace | None = None


class QuestionScore(msgspec.Struct, frozen=True, kw_only=True):
    """Marginal log-likelihood of one target, and the two parts of its loss."""

    log_likelihood: float
    nll_loss: float
    smooth_loss: float
    document_posterior: list[float]
    trace: Trace | None = None


class Pooling(Enum):
    """How a question encoder's outputs become one vector."""

    FIRST_OUTPUT = "first_output"
    POOLER = "pooler"
    MEAN = "mean"
    CLS = "cls"


class Quantization(StrEnum):
    """How weights of linear layers are held: in the model's dtype, or as int8, which changes answers a little."""

    NONE = "none"
    INT8 = "int8"


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where a worker finds its models, and how it runs them.

    rag_checkpoint, or question_encoder and generator apart; folders on this machine. dtype is "float32", "float16" or
    "bfloat16".
    """

    rag_checkpoint: str | None
    question_encoder: str | None
    generator: str | None
    pooling: Pooling
    normalize: bool
    score_scale: float
    dtype: str
    decoder: str = "auto"
    quantization: Quantization = Quantization.NONE


class ModelClass(Enum):
    """Whose forward pass is run: Hugging Face's RagModel, RagSequenceForGeneration or RagTokenForGeneration."""

    RAG_MODEL = "RAG_MODEL"
    RAG_SEQUENCE = "RAG_SEQUENCE"
    RAG_TOKEN = "RAG_TOKEN"  # noqa: S105  (a class, no password)
