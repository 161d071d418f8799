"""The targets of requests, as labels or as texts, to score or to explain."""

from __future__ import annotations

from generator_service import wire
from generator_service.checkpoint import Checkpoint
from generator_service.generation_defaults import GenerationDefaults
from generator_service.request_checks import RequestLimits
from generator_service.types import Compatibility
from rag.generator.v1 import generator_service_pb2
from rag_serving.errors import InvalidArgumentError


class RequestTargets:
    """Reads targets of requests. Raises InvalidArgumentError by the field's name."""

    def __init__(self, checkpoint: Checkpoint, limits: RequestLimits, defaults: GenerationDefaults) -> None:
        self._checkpoint, self._limits, self._defaults = checkpoint, limits, defaults

    def labels(
        self,
        request: generator_service_pb2.ScoreRequest | generator_service_pb2.ExplainRequest,
        batch: int,
        pad: int,
        compatibility: Compatibility,
    ) -> list[list[int]]:
        """Returns one target for each of `batch` questions, padded to one length, begun with the start token.

        Hugging Face's way (Compatibility.HF) takes the tokenizer's ids as they are.
        """
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
