"""Hugging Face's RAG classes over the wire: the same calls and outputs, computed by the pair of services.

Beside a generator's address the constructors take what transformers' take: a `retriever`, which is a RagRetriever of
this process (over a remote_index.RemoteIndex, say), SERVICE for the generator's own, or None where calls bring their
contexts.
This module and remote_index alone of the client need torch and transformers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, RagRetriever
from transformers.models.dpr.modeling_dpr import DPRQuestionEncoderOutput
from transformers.models.rag.modeling_rag import RetrievAugLMMarginOutput, RetrievAugLMOutput

from rag_client.client import RagClient
from rag_client.types import Contexts, EncoderOutputs, ForwardOutputs, QuestionTokens

SERVICE: Literal["service"] = "service"
"""As a retriever: the one that the generator is connected with."""

_OWN = {"compatibility", "sequence_decoding", "allowed_sequences", "seed", "priority", "timeout_s"}
_ARGUMENTS = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "num_beams",
    "num_return_sequences", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "length_penalty", "early_stopping", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id", "bos_token_id", "eos_token_id",
    "pad_token_id", "renormalize_logits",
}  # fmt: skip
_WITHOUT_MEANING = {"use_cache", "transformers_version", "return_dict_in_generate", "output_scores"}
_QUESTION = "question_encoder_last_hidden_state"
_SEED_BOUND = 2**31


class RemoteGradientError(RuntimeError):
    """backward was called on what a service computed."""


class _Remote(torch.autograd.Function):
    """Says at backward what is the matter."""

    @staticmethod
    def forward(_context: Any, _anchor: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(_context: Any, *_gradients: Tensor) -> Any:
        raise RemoteGradientError(
            "gradients do not cross the wire: this was computed by a generator service; train with transformers'"
            " own class and serve the checkpoint"
        )


class RemotePastKeyValues:
    """Keys and values that a forward with use_cache left at the service, until they expire or are released."""

    def __init__(self, client: RagClient, handle: str, length: int) -> None:
        self._client, self.handle, self._length = client, handle, length

    def get_seq_length(self) -> int:
        """Tokens decoded so far."""
        return self._length

    def release(self) -> None:
        """Free them. Raises NotFoundError where they are gone."""
        self._client.release_past_key_values(self.handle)


class _RemoteQuestionEncoder:
    """model.question_encoder: input_ids -> pooler_output [batch, dim]."""

    def __init__(self, client: RagClient) -> None:
        self._client = client

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_ignored: Any
    ) -> DPRQuestionEncoderOutput:
        states = self._client.encode_questions(_tokens(input_ids, attention_mask))
        return DPRQuestionEncoderOutput(pooler_output=_remote(states))


class _RemoteRag(ABC):
    """What the three classes share."""

    _model_class: ClassVar[Literal["RAG_MODEL", "RAG_SEQUENCE", "RAG_TOKEN"]]
    _output: ClassVar[type[Any]]

    def __init__(
        self,
        generator_address: str,
        retriever: RagRetriever | Literal["service"] | None = None,
        *,
        timeout_s: float = 60.0,
    ) -> None:
        self.client = RagClient(generator_address, timeout_s=timeout_s)
        self.retriever = retriever
        self.question_encoder = _RemoteQuestionEncoder(self.client)
        self._default_n_docs: int | None = None

    def set_retriever(self, retriever: RagRetriever | Literal["service"]) -> None:
        """As transformers'."""
        self.retriever = retriever

    def close(self) -> None:
        """Closes the channels."""
        self.client.close()

    def eval(self) -> Self:
        """A service has no dropout: nothing changes."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Raises RemoteGradientError for mode True."""
        if mode:
            raise RemoteGradientError("gradients do not cross the wire: a service cannot be trained")
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the forward of the transformers class that the subclass stands for."""

    @property
    def config(self) -> Any:
        """n_docs of the checkpoint, and the generator's pad token."""
        model = self.client.get_model()
        pad = model.default_generation_config.get("pad_token_id", 0)
        return SimpleNamespace(n_docs=model.default_n_docs, vocab_size=model.vocab_size, pad_token_id=pad)

    # --- forward

    def _forward(self, **given: Any) -> Any:
        encoder_outputs = given.pop("encoder_outputs")
        past, n_docs = given.pop("past_key_values"), given.pop("n_docs")
        source, n_docs, found = self._source(given, encoder_outputs, past, n_docs)
        outputs = self.client.forward(
            source,
            model_class=self._model_class,
            n_docs=n_docs,
            truncate_question_last=True if isinstance(source, QuestionTokens) else None,
            past_key_values=None if past is None else past.handle,
            **{name: _plain(value) for name, value in given.items()},
        )
        target = given["decoder_input_ids"] if given["decoder_input_ids"] is not None else given.get("labels")
        made = self._made(outputs, encoder_outputs, past, target)
        for name, value in found.items():
            setattr(made, name, value)
        return made

    def _source(
        self,
        given: dict[str, Any],
        encoder_outputs: Any,
        past: RemotePastKeyValues | None,
        n_docs: int | None,
    ) -> tuple[QuestionTokens | Contexts | EncoderOutputs | None, int | None, dict[str, Tensor]]:
        """What the service takes, of all that transformers takes, and outputs known here; takes names out of given."""
        known: dict[str, Tensor] = {}
        input_ids, attention_mask = given.pop("input_ids"), given.pop("attention_mask")
        contexts = [given.pop(n) for n in ("context_input_ids", "context_attention_mask", "doc_scores")]
        ids, mask, scores = contexts
        if encoder_outputs is None and self.retriever is not None and any(one is None for one in contexts):
            if input_ids is None and past is None:
                raise ValueError(
                    "give input_ids, or context_input_ids, context_attention_mask and doc_scores"
                )
            if input_ids is not None and self.retriever == SERVICE:
                return _tokens(input_ids, attention_mask), n_docs, known
            if input_ids is not None:
                ids, mask, scores, found = self._retrieved(input_ids, attention_mask, n_docs)
                shown = given["output_retrieved"]
                known = found if shown else {_QUESTION: found[_QUESTION]}
        if encoder_outputs is not None:
            _check_docs(scores, n_docs)
            hidden = encoder_outputs[0]
            return EncoderOutputs(_plain(hidden), _plain(scores), _plain(mask)), None, known
        if ids is None and past is not None:
            return None, None, known
        for name, value in (("context_input_ids", ids), ("context_attention_mask", mask)):
            if value is None:
                raise ValueError(f"Make sure that `{name}` are passed, if no `retriever` is set")
        _check_docs(scores, n_docs)
        return Contexts(_plain(ids), _plain(mask), _plain(scores)), None, known

    def _retrieved(
        self, input_ids: Tensor, attention_mask: Tensor | None, n_docs: int | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Contexts, their masks and scores, and all found on the way, by the RagRetriever of this process."""
        retriever: Any = self.retriever
        hidden = self.question_encoder(input_ids, attention_mask)[0].detach()
        found = retriever(input_ids, hidden.numpy(), n_docs=n_docs, return_tensors="pt")
        embeds = found["retrieved_doc_embeds"].to(hidden)
        scores = torch.bmm(hidden.unsqueeze(1), embeds.transpose(1, 2)).squeeze(1)
        ids, mask = found["context_input_ids"], found["context_attention_mask"]
        outputs = {
            _QUESTION: hidden,
            "retrieved_doc_embeds": embeds,
            "retrieved_doc_ids": found["doc_ids"],
            "context_input_ids": ids,
            "context_attention_mask": mask,
        }
        return ids, mask, scores, outputs

    def _made(
        self, outputs: ForwardOutputs, encoder_outputs: Any, past: RemotePastKeyValues | None, target: Any
    ) -> Any:
        found: dict[str, Any] = {}
        for name in self._output.__dataclass_fields__:
            value = getattr(outputs, name, None)
            if name == "past_key_values":
                continue
            if isinstance(value, tuple):
                found[name] = tuple(torch.from_numpy(np.array(one)) for one in value) or None
            elif value is not None:
                found[name] = torch.from_numpy(np.array(value))
        for name in ("loss", "logits"):
            if name in found:
                found[name] = _remote(found[name])
        for place, name in ((1, "generator_enc_hidden_states"), (2, "generator_enc_attentions")):
            if encoder_outputs is not None and len(encoder_outputs) > place:
                found[name] = encoder_outputs[place]
        if outputs.past_key_values:
            length = (0 if past is None else past.get_seq_length()) + target.shape[1]
            found["past_key_values"] = RemotePastKeyValues(self.client, outputs.past_key_values, length)
        return self._output(**found)

    # --- generate

    def _generate(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        contexts: Sequence[Tensor | None],
        n_docs: int | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Token ids [batch * num_return_sequences, longest], padded on the right."""
        ids, mask, scores = contexts
        source: QuestionTokens | Contexts
        if ids is None and self.retriever == SERVICE and input_ids is not None:
            source = _tokens(input_ids, attention_mask)
            options = options | {"n_docs": n_docs, "truncate_question_last": True}
        else:
            if ids is None and input_ids is not None and self.retriever is not None:
                ids, mask, scores, _ = self._retrieved(input_ids, attention_mask, n_docs)
            if ids is None or mask is None:
                raise ValueError(
                    "give input_ids with a retriever, or contexts with their masks and doc_scores"
                )
            _check_docs(scores, n_docs)
            source = Contexts(_plain(ids), _plain(mask), _plain(scores))
        if options.get("do_sample") and options.get("seed") is None:
            options["seed"] = int(torch.randint(_SEED_BOUND, ()))  # torch.manual_seed holds here too
        found = self.client.generate(source, strategy=self._model_class, **options)  # type: ignore[arg-type]
        each = options.get("num_return_sequences") or 1
        rows = [h.token_ids for answer in found.answers for h in answer.hypotheses[:each]]
        pad = options.get("pad_token_id")
        if pad is None:
            pad = self.config.pad_token_id
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=pad
        )


class RemoteRagModel(_RemoteRag):
    """transformers' RagModel at a generator service."""

    _model_class = "RAG_MODEL"
    _output = RetrievAugLMOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        past_key_values: RemotePastKeyValues | None = None,
        doc_scores: Tensor | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_retrieved: bool | None = None,
        n_docs: int | None = None,
    ) -> RetrievAugLMOutput:
        """As RagModel.forward; use_cache is off unless asked for. Raises RagClientError where the service refuses."""
        arguments = dict(locals())
        del arguments["self"]
        return self._forward(**arguments)  # type: ignore[no-any-return]


class RemoteRagSequenceForGeneration(_RemoteRag):
    """transformers' RagSequenceForGeneration at a generator service."""

    _model_class = "RAG_SEQUENCE"
    _output = RetrievAugLMMarginOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        past_key_values: RemotePastKeyValues | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        doc_scores: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_retrieved: bool | None = None,
        exclude_bos_score: bool | None = None,
        reduce_loss: bool | None = None,
        labels: Tensor | None = None,
        n_docs: int | None = None,
    ) -> RetrievAugLMMarginOutput:
        """As RagSequenceForGeneration.forward; use_cache is off unless asked for."""
        arguments = dict(locals())
        del arguments["self"]
        return self._forward(**arguments)  # type: ignore[no-any-return]

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        doc_scores: Tensor | None = None,
        do_deduplication: bool | None = None,
        num_return_sequences: int | None = None,
        num_beams: int | None = None,
        n_docs: int | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """As RagSequenceForGeneration.generate, its semantics included unless compatibility="MASKED"."""
        given = {"num_beams": num_beams, "num_return_sequences": num_return_sequences, **model_kwargs}
        options = _generation_options(None, {"compatibility": "HF"} | given)
        options["do_deduplication"] = do_deduplication
        contexts = (context_input_ids, context_attention_mask, doc_scores)
        return self._generate(input_ids, attention_mask, contexts, n_docs, options)


class RemoteRagTokenForGeneration(_RemoteRag):
    """transformers' RagTokenForGeneration at a generator service."""

    _model_class = "RAG_TOKEN"
    _output = RetrievAugLMMarginOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        past_key_values: RemotePastKeyValues | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        doc_scores: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_retrieved: bool | None = None,
        do_marginalize: bool | None = None,
        reduce_loss: bool | None = None,
        labels: Tensor | None = None,
        n_docs: int | None = None,
    ) -> RetrievAugLMMarginOutput:
        """As RagTokenForGeneration.forward; use_cache is off unless asked for."""
        arguments = dict(locals())
        del arguments["self"]
        return self._forward(**arguments)  # type: ignore[no-any-return]

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        context_input_ids: Tensor | None = None,
        context_attention_mask: Tensor | None = None,
        doc_scores: Tensor | None = None,
        n_docs: int | None = None,
        generation_config: GenerationConfig | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As RagTokenForGeneration.generate. Raises ValueError for functions, which do not cross the wire."""
        if prefix_allowed_tokens_fn is not None:
            raise ValueError(
                "prefix_allowed_tokens_fn does not cross the wire: give allowed_sequences, the answers allowed"
            )
        if logits_processor or stopping_criteria:
            raise ValueError("logits_processor and stopping_criteria do not cross the wire")
        options = _generation_options(generation_config, kwargs)
        contexts = (context_input_ids, context_attention_mask, doc_scores)
        return self._generate(input_ids, attention_mask, contexts, n_docs, options)


def _generation_options(config: GenerationConfig | None, given: dict[str, Any]) -> dict[str, Any]:
    """GenerationConfig's arguments by the contract's names. Raises TypeError for one that is unknown."""
    merged = ({} if config is None else config.to_diff_dict()) | given
    options: dict[str, Any] = {}
    for name, value in merged.items():
        if value is None or name in _WITHOUT_MEANING or name.startswith("_"):
            continue
        if name not in _ARGUMENTS and name not in _OWN:
            raise TypeError(f"generate cannot carry {name!r} to the service")
        plain = value.tolist() if isinstance(value, Tensor) else value
        if name == "eos_token_id":
            options["eos_token_ids"] = [plain] if isinstance(plain, int) else list(plain)
        else:
            options[name] = plain
    return options


def _check_docs(doc_scores: Tensor | None, n_docs: int | None) -> None:
    if doc_scores is None:
        raise ValueError("Make sure that `doc_scores` are passed with contexts or `encoder_outputs`")
    if n_docs is not None and doc_scores.shape[1] != n_docs:
        raise ValueError(f"n_docs is {n_docs}, and doc_scores has {doc_scores.shape[1]} columns")


def _tokens(input_ids: Tensor, attention_mask: Tensor | None) -> QuestionTokens:
    return QuestionTokens(_plain(input_ids), _plain(attention_mask))


def _plain(value: Any) -> Any:
    """Tensors as arrays; whatever else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.long().numpy() if value.dtype is torch.bool else value.numpy()


def _remote(values: Any) -> Tensor:
    """A tensor that says at backward that gradients do not cross the wire."""
    tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    return _Remote.apply(torch.zeros((), requires_grad=True), tensor)  # type: ignore[no-any-return,no-untyped-call]
