"""rag.generator.v1 on the wire: requests to the answerer and back; what is wrong is refused by its name."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from generator_service import pinning, provenance_wire, wire
from generator_service.answer_stream import Piece
from generator_service.answerer import Answerer, GenerationOptions, QuestionContexts, Questions, Stages
from generator_service.checkpoint import Checkpoint
from generator_service.engine.messages import Ready
from generator_service.explainer import Explainer
from generator_service.forward_calls import ForwardCalls
from generator_service.generation_defaults import GenerationDefaults
from generator_service.request_checks import (
    RequestLimits,
    check_abstain_below,
    check_given,
    check_priority,
    check_settings,
)
from generator_service.tokenization import TextTokenizer
from generator_service.types import Compatibility, Hypothesis, QuestionScore, Strategy
from rag.generator.v1 import forward_pb2, generator_service_pb2, generator_service_pb2_grpc
from rag.tensor.v1 import tensor_pb2
from rag_serving import tensor_codec
from rag_serving.errors import FailedPreconditionError, InvalidArgumentError
from rag_serving.interceptors.base import Context

SERVICE_NAME: str = generator_service_pb2.DESCRIPTOR.services_by_name["GeneratorService"].full_name

_SEED_BITS = 31


@dataclass(frozen=True)
class ServedModel:
    """What the servicer knows of the model it serves."""

    checkpoint: Checkpoint
    ready: Ready
    devices: Sequence[str]
    limits: RequestLimits

    @property
    def default_n_docs(self) -> int:
        """Documents for a question that names no number."""
        return min(self.checkpoint.n_docs, self.limits.max_n_docs)


@dataclass(frozen=True)
class _Asked:
    """A request, read, and what its questions are answered from."""

    questions: Questions | None
    contexts: list[QuestionContexts]
    options: GenerationOptions
    stages: Stages


class GeneratorServicer(generator_service_pb2_grpc.GeneratorServiceServicer):
    """Serves one Answerer. What it raises becomes a status in the error interceptor."""

    def __init__(
        self, answerer: Answerer, explainer: Explainer, model: ServedModel, forward: ForwardCalls
    ) -> None:
        self._answerer, self._explainer, self._model = answerer, explainer, model
        self._forward = forward
        self._limits, self._checkpoint = model.limits, model.checkpoint
        self._defaults = GenerationDefaults(model.checkpoint)

    async def EncodeQuestions(  # noqa: N802  (the contract's name)
        self, request: generator_service_pb2.EncodeQuestionsRequest, _context: Context
    ) -> generator_service_pb2.EncodeQuestionsResponse:
        """Encodes questions into the retriever's space."""
        questions = self._read_questions(request, "question", request.WhichOneof("question"))
        hidden = await self._answerer.encode(questions, Stages())
        width = max(len(row) for row in questions.input_ids)
        ids = np.zeros((len(questions.input_ids), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(questions.input_ids):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        return generator_service_pb2.EncodeQuestionsResponse(
            question_hidden_states=tensor_codec.encode(hidden),
            input_ids=tensor_codec.encode(ids),
            attention_mask=tensor_codec.encode(mask),
        )

    async def Generate(  # noqa: N802
        self, request: generator_service_pb2.GenerateRequest, _context: Context
    ) -> generator_service_pb2.GenerateResponse:
        """Answers questions."""
        asked = await self._ask(request)
        hypotheses = await self._answerer.generate(asked.contexts, asked.options, asked.stages)
        return await self._response(request, asked, hypotheses)

    async def GenerateStream(  # type: ignore[override]  # noqa: N802  (the stubs know generators only)
        self, request: generator_service_pb2.GenerateStreamRequest, context: Context
    ) -> None:
        """Answers questions piece by piece; writes to the stream itself, so that a cancellation always arrives here."""
        pacing = wire.read_pacing(request)
        with wire.fields_within("generate"):
            if request.generate.abstain_below:
                raise InvalidArgumentError(
                    "abstain_below", "needs a whole answer before any of it is sent: use Generate"
                )
            asked = await self._ask(request.generate)

            async def send(piece: Piece) -> None:
                message = wire.write_piece(piece, asked.contexts[piece.question].n_docs)
                await context.write(generator_service_pb2.GenerateStreamResponse(piece=message))

            hypotheses = await self._answerer.stream(
                asked.contexts, asked.options, asked.stages, pacing, send
            )
        response = await self._response(request.generate, asked, hypotheses)
        await context.write(generator_service_pb2.GenerateStreamResponse(response=response))

    async def Explain(  # noqa: N802
        self, request: generator_service_pb2.ExplainRequest, _context: Context
    ) -> generator_service_pb2.ExplainResponse:
        """Says what answers owe to each of their documents, and what they would be without it."""
        if not request.HasField("generate"):
            raise InvalidArgumentError("generate", "must be set")
        with wire.fields_within("generate"):
            asked = await self._ask(request.generate)
        options = asked.options
        explanations = await self._explainer.explain(
            asked.contexts,
            self._read_given_answers(request, asked),
            replace(options, trace=False),
            asked.stages,
            answer_without=not request.skip_answers,
        )
        explained = await self._explainer.texts_off_loop(asked.contexts, explanations)
        return generator_service_pb2.ExplainResponse(
            explanations=provenance_wire.write_explanations(
                asked.contexts, explained, include_documents=request.generate.include_documents
            ),
            strategy=wire.WIRE_STRATEGIES[options.strategy],
            strategy_differs_from_checkpoint=self._differs(options.strategy),
            pinned_request=self._pinned(request.generate, asked),
            timings=wire.write_timings(asked.stages),
        )

    async def _ask(self, request: generator_service_pb2.GenerateRequest) -> _Asked:
        """Reads and checks a request, and finds its contexts."""
        stages = Stages()
        options = self._read_options(request)
        pinning.check_checkpoint(request, self._checkpoint.digest)
        pad = options.settings.pad_token_id if options.compatibility is Compatibility.HF else None
        questions, contexts = await self._contexts(request, stages, pad_token_id=pad)
        pinning.check_contexts(request, stages.generation, contexts)
        for question in contexts:
            check_settings(options.settings, options.strategy, len(question.contexts), self._limits)
        return _Asked(questions, contexts, options, stages)

    def _pinned(
        self, request: generator_service_pb2.GenerateRequest, asked: _Asked
    ) -> generator_service_pb2.GenerateRequest:
        return pinning.pinned(
            request,
            asked.options,
            asked.contexts,
            checkpoint_digest=self._checkpoint.digest,
            index_generation=asked.stages.generation,
            default_n_docs=self._model.default_n_docs,
        )

    async def _response(
        self,
        request: generator_service_pb2.GenerateRequest,
        asked: _Asked,
        hypotheses: Sequence[Sequence[Hypothesis]],
    ) -> generator_service_pb2.GenerateResponse:
        contexts, options, stages = asked.contexts, asked.options, asked.stages
        answers = await self._answerer.texts_off_loop(contexts, hypotheses)
        confidences = self._answerer.confidences(hypotheses, options)
        return generator_service_pb2.GenerateResponse(
            answers=wire.write_answers(
                contexts,
                answers,
                confidences,
                include_documents=request.include_documents,
                abstain_below=options.abstain_below,
            ),
            strategy=wire.WIRE_STRATEGIES[options.strategy],
            strategy_differs_from_checkpoint=self._differs(options.strategy),
            compatibility=wire.WIRE_COMPATIBILITIES[options.compatibility],
            seed=options.settings.seed if options.settings.do_sample else 0,
            checkpoint_digest=self._checkpoint.digest,
            index_generation=stages.generation,
            usage=wire.write_usage(asked.questions, contexts, answers),
            timings=wire.write_timings(stages),
            pinned_request=self._pinned(request, asked),
        )

    async def Score(  # noqa: N802
        self, request: generator_service_pb2.ScoreRequest, _context: Context
    ) -> generator_service_pb2.ScoreResponse:
        """Gives the marginal log-likelihood and the loss of given targets."""
        check_priority(request.priority)
        strategy = (
            wire.read_enum(wire.STRATEGIES, request.strategy, "strategy") or self._checkpoint.default_strategy
        )
        compatibility = wire.read_enum(wire.COMPATIBILITIES, request.compatibility, "compatibility")
        epsilon = (
            request.label_smoothing
            if request.HasField("label_smoothing")
            else self._checkpoint.label_smoothing
        )
        if not 0 <= epsilon < 1:
            raise InvalidArgumentError("label_smoothing", "must be at least 0 and below 1", epsilon)
        pad = self._defaults.resolve({}, strategy, 0).pad_token_id
        stages = Stages()
        self._check_has_target(request)
        _, contexts = await self._contexts(request, stages, pad_token_id=None)
        labels = self._read_labels(request, len(contexts), pad, compatibility)
        scores = await self._answerer.score(
            contexts,
            labels,
            strategy=strategy,
            compatibility=compatibility,
            pad_token_id=pad,
            exclude_first=self._exclude_first(request, strategy, compatibility, labels),
            priority=request.priority,
        )
        reduce = request.reduce_loss if request.HasField("reduce_loss") else self._checkpoint.reduce_loss
        return generator_service_pb2.ScoreResponse(
            log_likelihoods=_floats([s.log_likelihood for s in scores]),
            loss=_floats(_losses(scores, epsilon, self._model.ready.vocab_size, reduce=reduce)),
            document_posterior=_document_table(contexts, [s.document_posterior for s in scores], 0.0),
            doc_scores=_document_table(contexts, [q.doc_scores for q in contexts], -np.inf),
            strategy=wire.WIRE_STRATEGIES[strategy],
            strategy_differs_from_checkpoint=self._differs(strategy),
            index_generation=stages.generation,
        )

    async def Forward(  # noqa: N802
        self, request: forward_pb2.ForwardRequest, _context: Context
    ) -> AsyncIterator[forward_pb2.ForwardResponse]:
        """Runs the forward pass of Hugging Face's RAG classes."""
        async for part in self._forward.forward(request):
            yield part

    async def ReleasePastKeyValues(  # noqa: N802
        self, request: forward_pb2.ReleasePastKeyValuesRequest, _context: Context
    ) -> forward_pb2.ReleasePastKeyValuesResponse:
        """Frees what a Forward with use_cache left on the device."""
        return await self._forward.release(request)

    async def GetModel(  # noqa: N802
        self, _request: generator_service_pb2.GetModelRequest, _context: Context
    ) -> generator_service_pb2.GetModelResponse:
        """Describes the model that answers."""
        checkpoint, ready = self._checkpoint, self._model.ready
        defaults = self._defaults.resolve({}, checkpoint.default_strategy, 0)
        return generator_service_pb2.GetModelResponse(
            architecture=checkpoint.architecture,
            question_encoder_type=checkpoint.question_encoder_type,
            generator_type=checkpoint.generator_config.model_type,
            decoder=ready.decoder,
            num_parameters=ready.num_parameters,
            retrieval_vector_size=ready.retrieval_vector_size,
            vocab_size=ready.vocab_size,
            dtype=ready.dtype,
            devices=self._model.devices,
            default_strategy=wire.WIRE_STRATEGIES[checkpoint.default_strategy],
            default_generation_config=wire.write_generation_config(defaults),
            default_n_docs=self._model.default_n_docs,
            max_n_docs=self._limits.max_n_docs,
            max_batch_size=self._limits.max_batch_size,
            checkpoint_digest=checkpoint.digest,
            context_tokenizer_digest=checkpoint.generator_tokenizer.digest,
            embedding_model=checkpoint.embedding_model,
            quantization=checkpoint.source.quantization.value,
        )

    # --- reading

    def _read_options(self, request: generator_service_pb2.GenerateRequest) -> GenerationOptions:
        check_priority(request.priority)
        check_abstain_below(request.abstain_below)
        strategy = (
            wire.read_enum(wire.STRATEGIES, request.strategy, "strategy") or self._checkpoint.default_strategy
        )
        given = wire.read_given(request.generation_config)
        check_given(given, self._model.ready.vocab_size)
        config = request.generation_config
        seed = config.seed if config.HasField("seed") else secrets.randbits(_SEED_BITS)
        compatibility = wire.read_enum(wire.COMPATIBILITIES, request.compatibility, "compatibility")
        settings = self._defaults.resolve(given, strategy, seed, compatibility)
        check_settings(settings, strategy, self._limits.max_n_docs, self._limits)
        return GenerationOptions(
            strategy=strategy,
            sequence_decoding=wire.read_enum(
                wire.SEQUENCE_DECODINGS, request.sequence_decoding, "sequence_decoding"
            ),
            compatibility=compatibility,
            settings=settings,
            do_deduplication=request.do_deduplication
            if request.HasField("do_deduplication")
            else self._checkpoint.do_deduplication,
            exclude_bos_score=request.exclude_bos_score if request.HasField("exclude_bos_score") else True,
            priority=request.priority,
            trace=request.include_provenance,
            abstain_below=request.abstain_below,
        )

    async def _contexts(
        self,
        request: generator_service_pb2.GenerateRequest | generator_service_pb2.ScoreRequest,
        stages: Stages,
        *,
        pad_token_id: int | None,
    ) -> tuple[Questions | None, list[QuestionContexts]]:
        if request.WhichOneof("input") == "contexts":
            return None, wire.read_contexts(request.contexts, self._limits)
        settings = wire.read_retrieval(request.retrieval_config, self._model.default_n_docs, self._limits)
        questions = self._read_questions(request, "input", request.WhichOneof("input"))
        contexts = await self._answerer.retrieve(questions, settings, stages, pad_token_id=pad_token_id)
        longest = max(len(c) for q in contexts for c in (q.padded_contexts or q.contexts))
        if self._limits.max_positions is not None and longest > self._limits.max_positions:
            raise FailedPreconditionError(
                f"the retriever assembles contexts of {longest} tokens, the generator has {self._limits.max_positions}"
                " positions: lower the retriever's max_combined_length",
                reason="RETRIEVER_MISMATCH",
            )
        return questions, contexts

    def _read_questions(
        self,
        request: generator_service_pb2.GenerateRequest
        | generator_service_pb2.ScoreRequest
        | generator_service_pb2.EncodeQuestionsRequest,
        oneof: str,
        which: str | None,
    ) -> Questions:
        if self._limits.question_max_length == 0:
            raise FailedPreconditionError(
                "this generator has no question encoder: send contexts", reason="NO_ENCODER"
            )
        if which == "question_texts":
            return wire.read_question_texts(
                request.question_texts.texts, self._question_tokenizer, self._limits
            )
        if which == "question_tokens":
            masks_pads = self._checkpoint.question_encoder_type == "dpr"
            pad = self._question_tokenizer.pad_token_id if masks_pads else None
            return wire.read_question_tokens(request.question_tokens, self._limits, pad_token_id=pad)
        raise InvalidArgumentError(oneof, "one of its fields must be set")

    @property
    def _question_tokenizer(self) -> TextTokenizer:
        tokenizer = self._checkpoint.question_tokenizer
        assert tokenizer is not None, "a question encoder comes with its tokenizer"
        return tokenizer

    def _read_given_answers(
        self, request: generator_service_pb2.ExplainRequest, asked: _Asked
    ) -> list[list[int]] | None:
        """Answers to explain, without the pads behind them; None where the best are to be found."""
        which = request.WhichOneof("target")
        if which is None:
            return None
        pad = asked.options.settings.pad_token_id
        labels = self._read_labels(request, len(asked.contexts), pad, Compatibility.MASKED)
        for index, row in enumerate(labels):
            while len(row) > 1 and row[-1] == pad:
                row.pop()
            if len(row) < 2:
                raise InvalidArgumentError(
                    f"{which}[{index}]", "needs a token after the start token", [int(t) for t in row]
                )
        return labels

    @staticmethod
    def _check_has_target(request: generator_service_pb2.ScoreRequest) -> None:
        if request.WhichOneof("target") is None:
            raise InvalidArgumentError("target", "one of its fields must be set")

    def _read_labels(
        self,
        request: generator_service_pb2.ScoreRequest | generator_service_pb2.ExplainRequest,
        batch: int,
        pad: int,
        compatibility: Compatibility,
    ) -> list[list[int]]:
        if request.WhichOneof("target") == "labels":
            labels = wire.read_labels(request)
            self._limits.check_labels(labels, batch, "labels")
            return labels.tolist()  # type: ignore[no-any-return]
        texts = list(request.target_texts.texts)
        if len(texts) != batch:
            raise InvalidArgumentError(
                "target_texts.texts", f"needs one target for each of {batch} questions", len(texts)
            )
        rows = self._checkpoint.generator_tokenizer.encode_targets(texts)
        if compatibility is Compatibility.MASKED:
            # labels begin with what decoding starts from; Hugging Face takes the tokenizer's ids as they are
            start = self._defaults.resolve({}, self._checkpoint.default_strategy, 0).decoder_start_token_id
            rows = [row if row[:1] == [start] else [start, *row] for row in rows]
        for index, row in enumerate(rows):
            if len(row) > self._limits.max_target_length:
                raise InvalidArgumentError(
                    f"target_texts.texts[{index}]",
                    f"at most {self._limits.max_target_length} tokens",
                    len(row),
                )
        width = max(len(row) for row in rows)
        return [row + [pad] * (width - len(row)) for row in rows]

    def _exclude_first(
        self,
        request: generator_service_pb2.ScoreRequest,
        strategy: Strategy,
        compatibility: Compatibility,
        labels: Sequence[Sequence[int]],
    ) -> list[bool]:
        wanted = (
            request.exclude_bos_score
            if request.HasField("exclude_bos_score")
            else self._checkpoint.exclude_bos_score
        )
        bos = self._checkpoint.bos_token_id
        starts = [len(row) > 1 and bos is not None and row[1] == bos for row in labels]
        if not wanted or strategy is Strategy.RAG_TOKEN:
            return [False] * len(labels)
        return [all(starts)] * len(labels) if compatibility is Compatibility.HF else starts

    def _differs(self, strategy: Strategy) -> bool:
        return strategy is not self._checkpoint.default_strategy


def _losses(scores: Sequence[QuestionScore], epsilon: float, vocab_size: int, *, reduce: bool) -> list[float]:
    losses = [(1 - epsilon) * s.nll_loss + epsilon / vocab_size * s.smooth_loss for s in scores]
    return [sum(losses)] if reduce else losses


def _document_table(
    questions: Sequence[QuestionContexts], rows: Sequence[Sequence[float]], absent: float
) -> tensor_pb2.Tensor:
    width = max(q.n_docs for q in questions)
    table = np.full((len(questions), width), absent, dtype=np.float32)
    for index, (question, row) in enumerate(zip(questions, rows, strict=True)):
        table[index, question.present] = row
    return tensor_codec.encode(table)


def _floats(values: Sequence[float]) -> tensor_pb2.Tensor:
    return tensor_codec.encode(np.array(values, dtype=np.float32))
