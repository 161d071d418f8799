"""Turns the client's arguments into messages of the contract, and its messages into plain data."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from google.protobuf.message import Message

from rag.generator.v1 import explanation_pb2, generation_pb2, generator_service_pb2, provenance_pb2
from rag.retriever.v1 import document_pb2, retriever_service_pb2
from rag.tensor.v1 import tensor_pb2
from rag_client import types
from rag_client.filters import metadata_filter
from rag_serving import struct_codec, tensor_codec

Questions = str | Sequence[str] | types.QuestionTokens
Input = Questions | types.Contexts
Targets = str | Sequence[str] | npt.NDArray[np.integer[Any]]
MirrorT = TypeVar("MirrorT")

_RETRIEVAL = frozenset(generation_pb2.RetrievalConfig.DESCRIPTOR.fields_by_name)
_GENERATION = frozenset(generation_pb2.GenerationConfig.DESCRIPTOR.fields_by_name)
_PACING = ("piece_tokens", "piece_wait_s")
_EARLY_STOPPING = {
    False: generation_pb2.EARLY_STOPPING_HEURISTIC,
    True: generation_pb2.EARLY_STOPPING_FIRST_COMPLETE,
    "never": generation_pb2.EARLY_STOPPING_NEVER,
}
_PREFIXES = {
    "strategy": "STRATEGY",
    "sequence_decoding": "SEQUENCE_DECODING",
    "compatibility": "COMPATIBILITY",
    "model_class": "MODEL_CLASS",
}


def encode_questions_request(questions: Questions) -> generator_service_pb2.EncodeQuestionsRequest:
    """Makes the message. Raises TypeError for what is no question."""
    request = generator_service_pb2.EncodeQuestionsRequest()
    set_input(request, questions)
    return request


def generate_request(given: Input, options: Mapping[str, Any]) -> generator_service_pb2.GenerateRequest:
    """Makes the message. Raises TypeError or ValueError for an option that the contract cannot hold."""
    request = generator_service_pb2.GenerateRequest()
    try:
        ParseDict(options.get("pinned_request") or {}, request)
    except ParseError as error:
        raise ValueError(f"pinned_request: {error}") from error
    set_input(request, given)
    for name, value in options.items():
        if value is None or name == "pinned_request":
            continue
        if name in _GENERATION:
            _set_generation(request.generation_config, name, value)
        else:
            set_option(request, name, value)
    return request


def stream_request(given: Input, options: Mapping[str, Any]) -> generator_service_pb2.GenerateStreamRequest:
    """Makes the message. Raises TypeError or ValueError for an option that the contract cannot hold."""
    asked = {name: value for name, value in options.items() if name not in _PACING}
    request = generator_service_pb2.GenerateStreamRequest(generate=generate_request(given, asked))
    for name in _PACING:
        if options.get(name) is not None:
            _set_field(request, name, options[name])
    return request


def explain_request(
    given: Input, answers: Targets | None, options: Mapping[str, Any], *, skip_answers: bool
) -> generator_service_pb2.ExplainRequest:
    """Makes the message. Raises TypeError or ValueError for an option that the contract cannot hold."""
    generate = generate_request(given, options)
    request = generator_service_pb2.ExplainRequest(generate=generate, skip_answers=skip_answers)
    if answers is not None:
        _set_target(request, answers)
    return request


def score_request(
    given: Input, targets: Targets, options: Mapping[str, Any]
) -> generator_service_pb2.ScoreRequest:
    """Makes the message. Raises TypeError or ValueError for an option that the contract cannot hold."""
    request = generator_service_pb2.ScoreRequest()
    set_input(request, given)
    _set_target(request, targets)
    for name, value in options.items():
        if value is not None:
            set_option(request, name, value)
    return request


def retrieve_request(
    question_hidden_states: npt.NDArray[np.floating[Any]],
    questions: Questions | None,
    options: Mapping[str, Any],
) -> retriever_service_pb2.RetrieveRequest:
    """Makes the message. Raises TypeError or ValueError for an option that the contract cannot hold."""
    states = np.asarray(question_hidden_states, np.float32)
    request = retriever_service_pb2.RetrieveRequest(question_hidden_states=tensor_codec.encode(states))
    if isinstance(questions, types.QuestionTokens):
        request.question_input_ids.CopyFrom(tensor_codec.encode(wire_integers(questions.input_ids)))
    elif questions is not None:
        request.question_texts.texts.extend([questions] if isinstance(questions, str) else questions)
    for name, value in options.items():
        if value is None:
            continue
        if name in {"nprobe", "ef_search", "rescore_factor"}:
            setattr(request.search_parameters, name, value)
        elif name == "filter":
            request.filter.CopyFrom(metadata_filter(value))
        elif name == "truncation":
            request.truncation = document_pb2.Truncation.Value(f"TRUNCATION_{value}")
        else:
            _set_field(request, name, value)
    return request


def generation(response: generator_service_pb2.GenerateResponse) -> types.Generation:
    """Returns the answers of a response."""
    return types.Generation(
        answers=[_answer(one) for one in response.answers],
        strategy=strategy(response.strategy),
        strategy_differs_from_checkpoint=response.strategy_differs_from_checkpoint,
        compatibility=_enum_name(generation_pb2.Compatibility.Name(response.compatibility), "COMPATIBILITY"),
        seed=response.seed,
        checkpoint_digest=response.checkpoint_digest,
        index_generation=response.index_generation,
        usage=_mirror(types.Usage, response.usage),
        timings=_mirror(types.Timings, response.timings),
        pinned_request=_plain(response.pinned_request),
    )


def explanations(response: generator_service_pb2.ExplainResponse) -> types.Explanations:
    """Returns the explanations of a response."""
    return types.Explanations(
        explanations=[
            types.Explanation(
                answer=_hypothesis(one.answer),
                left_out=[_left_out(each) for each in one.left_out],
                documents=[_mirror(types.RetrievedDocument, each) for each in one.documents],
                n_docs=one.n_docs,
            )
            for one in response.explanations
        ],
        strategy=strategy(response.strategy),
        strategy_differs_from_checkpoint=response.strategy_differs_from_checkpoint,
        timings=_mirror(types.Timings, response.timings),
        pinned_request=_plain(response.pinned_request),
    )


def stream_event(
    response: generator_service_pb2.GenerateStreamResponse,
) -> types.AnswerPiece | types.Generation:
    """Returns the piece of a response, or in the end the answers."""
    if response.WhichOneof("event") == "response":
        return generation(response.response)
    piece = response.piece
    return _mirror(
        types.AnswerPiece,
        piece,
        token_ids=list(piece.token_ids),
        document_posterior=array(piece.document_posterior, "document_posterior"),
    )


def scores(response: generator_service_pb2.ScoreResponse) -> types.Scores:
    """Returns the scores of a response."""
    return types.Scores(
        log_likelihoods=array(response.log_likelihoods, "log_likelihoods"),
        loss=array(response.loss, "loss"),
        document_posterior=array(response.document_posterior, "document_posterior"),
        doc_scores=array(response.doc_scores, "doc_scores"),
        strategy=strategy(response.strategy),
        strategy_differs_from_checkpoint=response.strategy_differs_from_checkpoint,
        index_generation=response.index_generation,
    )


def retrieval(response: retriever_service_pb2.RetrieveResponse) -> types.Retrieval:
    """Returns the documents of a response, lists without padding, arrays with it."""
    n_docs, found = response.n_docs, list(response.n_docs_found)
    documents = None
    if len(response.documents) == n_docs * len(found) and response.documents:
        rows = [response.documents[i * n_docs : i * n_docs + count] for i, count in enumerate(found)]
        documents = [[document(one) for one in row] for row in rows]
    return types.Retrieval(
        doc_scores=array(response.doc_scores, "doc_scores"),
        retrieved_doc_ids=array(response.retrieved_doc_ids, "retrieved_doc_ids"),
        n_docs_found=found,
        n_docs=n_docs,
        generation=response.generation,
        context_input_ids=_optional_array(response, "context_input_ids"),
        context_attention_mask=_optional_array(response, "context_attention_mask"),
        retrieved_doc_embeds=_optional_array(response, "retrieved_doc_embeds"),
        documents=documents,
        question_truncated=list(response.question_truncated),
    )


def lookup(response: retriever_service_pb2.GetDocumentsResponse) -> types.DocumentLookup:
    """Returns the documents of a response."""
    return types.DocumentLookup(
        documents=[corpus_document(one) for one in response.documents],
        missing_keys=list(response.missing_keys),
        missing_rows=list(response.missing_rows),
    )


def model_info(response: generator_service_pb2.GetModelResponse) -> types.ModelInfo:
    """Returns the description of a response."""
    return _mirror(
        types.ModelInfo,
        response,
        devices=list(response.devices),
        default_strategy=strategy(response.default_strategy),
        default_generation_config=_plain(response.default_generation_config),
    )


def index_info(response: retriever_service_pb2.GetIndexResponse) -> types.IndexInfo:
    """Returns the description of a response."""
    metric = _enum_name(document_pb2.Metric.Name(response.metric), "METRIC")
    return _mirror(
        types.IndexInfo,
        response,
        metric=metric,
        generations=list(response.generations),
        devices=list(response.devices),
    )


def document(message: document_pb2.Document) -> types.Document:
    """Returns a document."""
    return _mirror(types.Document, message)


def corpus_document(message: document_pb2.Document) -> types.CorpusDocument:
    """Returns a document with its metadata and etag."""
    metadata = struct_codec.decode(message.metadata) if message.HasField("metadata") else None
    return _mirror(types.CorpusDocument, message, metadata=metadata)


def strategy(value: generation_pb2.Strategy.ValueType) -> types.Strategy:
    """Returns a strategy of the wire. Raises ValueError for one that this client does not know."""
    return types.Strategy(_enum_name(generation_pb2.Strategy.Name(value), "STRATEGY"))


def array(tensor: tensor_pb2.Tensor, field: str) -> npt.NDArray[Any]:
    """Returns an array of a response, float16 as float32 and int32 as int64."""
    return tensor_codec.decode(tensor, field, widen=True)


def _answer(message: generation_pb2.Answer) -> types.Answer:
    return types.Answer(
        hypotheses=[_hypothesis(one) for one in message.hypotheses],
        documents=[_mirror(types.RetrievedDocument, one) for one in message.documents],
        n_docs=message.n_docs,
        confidence=message.confidence,
        abstained=message.abstained,
    )


def _hypothesis(message: generation_pb2.Hypothesis) -> types.Hypothesis:
    return _mirror(
        types.Hypothesis,
        message,
        token_ids=list(message.token_ids),
        document_posterior=list(message.document_posterior),
        span=_mirror(types.AnswerSpan, message.span) if message.HasField("span") else None,
        provenance=_provenance(message.provenance) if message.HasField("provenance") else None,
    )


def _provenance(message: provenance_pb2.Provenance) -> types.Provenance:
    return types.Provenance(
        token_posterior=array(message.token_posterior, "token_posterior"),
        tokens=[
            _mirror(
                types.TokenSource,
                one,
                span=_mirror(types.TextSpan, one.span) if one.HasField("span") else None,
            )
            for one in message.tokens
        ],
    )


def _left_out(message: explanation_pb2.LeftOut) -> types.LeftOut:
    return _mirror(
        types.LeftOut,
        message,
        log_likelihood=message.log_likelihood if message.HasField("log_likelihood") else None,
        change=message.change if message.HasField("change") else None,
        answer=_hypothesis(message.answer) if message.HasField("answer") else None,
    )


def _plain(message: Message) -> dict[str, Any]:
    """A message as JSON has it, its fields by their own names."""
    return MessageToDict(message, preserving_proto_field_name=True)


def _mirror(kind: type[MirrorT], message: Message, **known: Any) -> MirrorT:
    """Makes a dataclass of the fields that it shares with a message; `known` are those that need a hand."""
    names = [one.name for one in dataclasses.fields(kind) if one.name not in known]  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **known)


def _optional_array(message: Message, field: str) -> npt.NDArray[Any] | None:
    return array(getattr(message, field), field) if message.HasField(field) else None


def _enum_name(name: str, prefix: str) -> str:
    return name.removeprefix(f"{prefix}_")


def set_input(request: Any, given: Input) -> None:
    """Sets what a request asks about: texts, tokens or contexts."""
    if isinstance(given, types.QuestionTokens):
        request.question_tokens.input_ids.CopyFrom(tensor_codec.encode(wire_integers(given.input_ids)))
        if given.attention_mask is not None:
            mask = tensor_codec.encode(wire_integers(given.attention_mask))
            request.question_tokens.attention_mask.CopyFrom(mask)
    elif isinstance(given, types.Contexts):
        contexts = request.contexts
        contexts.context_input_ids.CopyFrom(tensor_codec.encode(wire_integers(given.context_input_ids)))
        mask = tensor_codec.encode(wire_integers(given.context_attention_mask))
        contexts.context_attention_mask.CopyFrom(mask)
        contexts.doc_scores.CopyFrom(tensor_codec.encode(np.asarray(given.doc_scores, np.float32)))
    else:
        request.question_texts.SetInParent()
        request.question_texts.texts.extend([given] if isinstance(given, str) else given)


def _set_target(request: Any, targets: Targets) -> None:
    if isinstance(targets, np.ndarray):
        request.labels.CopyFrom(tensor_codec.encode(wire_integers(targets)))
    else:
        request.target_texts.texts.extend([targets] if isinstance(targets, str) else targets)


def wire_integers(values: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
    """Returns int32 as it is and other integers as int64; anything else is left for the service to refuse."""
    given = np.asarray(values)
    return given.astype(np.int64) if given.dtype.kind in "iub" and given.dtype != np.int32 else given


def set_option(request: Any, name: str, value: Any) -> None:
    """Sets an argument where the contract has it. Raises TypeError or ValueError where it cannot hold it."""
    if name == "filter":
        request.retrieval_config.filter.CopyFrom(metadata_filter(value))
    elif name in _RETRIEVAL:
        setattr(request.retrieval_config, name, value)
    elif name in _PREFIXES:
        field = request.DESCRIPTOR.fields_by_name[name]
        known = field.enum_type.values_by_name
        wanted = known.get(f"{_PREFIXES[name]}_{value}")
        if wanted is None:
            names = [_enum_name(one, _PREFIXES[name]) for one in known if not one.endswith("_UNSPECIFIED")]
            raise ValueError(f"{name} must be one of {', '.join(names)}, got {str(value)!r}")
        setattr(request, name, wanted.number)
    else:
        _set_field(request, name, value)


def _set_generation(config: generation_pb2.GenerationConfig, name: str, value: Any) -> None:
    if name == "early_stopping":
        if value not in _EARLY_STOPPING:
            raise ValueError(f"early_stopping must be True, False or 'never', got {value!r}")
        config.early_stopping = _EARLY_STOPPING[value]
    elif name in {"bad_words_ids", "allowed_sequences"}:
        sequences = [generation_pb2.TokenSequence(token_ids=ids) for ids in value]
        getattr(config, name).extend(sequences)
    else:
        _set_field(config, name, value)


def _set_field(message: Any, name: str, value: Any) -> None:
    fields = message.DESCRIPTOR.fields_by_name
    if name not in fields:
        near = difflib.get_close_matches(name, [*fields, *_RETRIEVAL, *_GENERATION, *_PACING], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"unknown argument {name!r}{hint}")
    try:
        if fields[name].is_repeated:
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
