"""What requests ask about: their questions, and the contexts that these are answered from."""

from __future__ import annotations

from generator_service import wire
from generator_service.answerer import Answerer, QuestionContexts, Questions, Stages
from generator_service.checkpoint import Checkpoint
from generator_service.request_checks import RequestLimits
from generator_service.tokenization import TextTokenizer
from rag.generator.v1 import generator_service_pb2
from rag_serving.errors import FailedPreconditionError, InvalidArgumentError


class RequestInputs:
    """Reads inputs of requests. Raises InvalidArgumentError by the field's name, FailedPreconditionError."""

    def __init__(
        self, answerer: Answerer, checkpoint: Checkpoint, limits: RequestLimits, *, default_n_docs: int
    ) -> None:
        self._answerer, self._checkpoint, self._limits = answerer, checkpoint, limits
        self._default_n_docs = default_n_docs

    async def contexts(
        self,
        request: generator_service_pb2.GenerateRequest | generator_service_pb2.ScoreRequest,
        stages: Stages,
        *,
        pad_token_id: int | None,
    ) -> tuple[Questions | None, list[QuestionContexts]]:
        """Returns the contexts of a request, retrieved for its questions where it does not bring them.

        With a pad_token_id retrieved contexts are kept padded, too.
        """
        if request.WhichOneof("input") == "contexts":
            return None, wire.read_contexts(request.contexts, self._limits)
        settings = wire.read_retrieval(request.retrieval_config, self._default_n_docs, self._limits)
        questions = self.questions(request, "input", request.WhichOneof("input"))
        contexts = await self._answerer.retrieve(questions, settings, stages, pad_token_id=pad_token_id)
        longest = max(len(c) for q in contexts for c in (q.padded_contexts or q.contexts))
        if self._limits.max_positions is not None and longest > self._limits.max_positions:
            raise FailedPreconditionError(
                f"the retriever assembles contexts of {longest} tokens, the generator has {self._limits.max_positions}"
                " positions: lower the retriever's max_combined_length",
                reason="RETRIEVER_MISMATCH",
            )
        return questions, contexts

    def questions(
        self,
        request: generator_service_pb2.GenerateRequest
        | generator_service_pb2.ScoreRequest
        | generator_service_pb2.EncodeQuestionsRequest,
        oneof: str,
        which: str | None,
    ) -> Questions:
        """Returns the questions in the field `which` of a oneof."""
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
