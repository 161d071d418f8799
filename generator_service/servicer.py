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
from generator_service.request_inputs import RequestInputs
from generator_service.request_targets import RequestTargets
from generator_service.score_calls import ScoreCalls
from generator_service.types import Compatibility, Hypothesis, Strategy
from rag.generator.v1 import forward_pb2, generator_service_pb2, generator_service_pb2_grpc
from rag_serving import tensor_codec
from rag_serving.errors import InvalidArgumentError
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
        self._inputs = RequestInputs(
            answerer, model.checkpoint, model.limits, default_n_docs=model.default_n_docs
        )
        self._targets = RequestTargets(model.checkpoint, model.limits, self._defaults)
        self._score = ScoreCalls(
            answerer,
            model.checkpoint,
            self._inputs,
            self._targets,
            self._defaults,
            vocab_size=model.ready.vocab_size,
        )

    async def EncodeQuestions(  # noqa: N802  (the contract's name)
        self, request: generator_service_pb2.EncodeQuestionsRequest, _context: Context
    ) -> generator_service_pb2.EncodeQuestionsResponse:
        """Encodes questions into the retriever's space."""
        questions = self._inputs.questions(request, "question", request.WhichOneof("question"))
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
        questions, contexts = await self._inputs.contexts(request, stages, pad_token_id=pad)
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
        return await self._score.score(request)

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

    def _read_given_answers(
        self, request: generator_service_pb2.ExplainRequest, asked: _Asked
    ) -> list[list[int]] | None:
        """Answers to explain, without the pads behind them; None where the best are to be found."""
        which = request.WhichOneof("target")
        if which is None:
            return None
        pad = asked.options.settings.pad_token_id
        labels = self._targets.labels(request, len(asked.contexts), pad, Compatibility.MASKED)
        for index, row in enumerate(labels):
            while len(row) > 1 and row[-1] == pad:
                row.pop()
            if len(row) < 2:
                raise InvalidArgumentError(
                    f"{which}[{index}]", "needs a token after the start token", [int(t) for t in row]
                )
        return labels

    def _differs(self, strategy: Strategy) -> bool:
        return strategy is not self._checkpoint.default_strategy
