"""Checkpoint folders -> a backbone and a question encoder on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, RagModel

from generator_service.model.backbone import Backbone
from generator_service.model.bart import BartBackbone
from generator_service.model.forward_modules import GeneratorModule
from generator_service.model.general import GeneralBackbone
from generator_service.model.linears import with_linears
from generator_service.model.question_encoder import QuestionEncoder
from generator_service.model.t5 import T5Backbone
from generator_service.types import ModelSource, Quantization

_BACKBONES: dict[str, type[BartBackbone | T5Backbone]] = {
    "bart": BartBackbone,
    "t5": T5Backbone,
    "mt5": T5Backbone,
}


@dataclass(frozen=True)
class LoadedModel:
    """What a worker runs."""

    backbone: Backbone
    question_encoder: QuestionEncoder | None
    num_parameters: int
    dtype: str
    generator: GeneratorModule


def load(source: ModelSource, device: torch.device) -> LoadedModel:
    """Load the models; raises OSError or ValueError with transformers' own words where a folder is no checkpoint.

    The question encoder stays in float32: doc_scores are made from its output.
    """
    dtype = getattr(torch, source.dtype)
    encoder, generator = _load_pair(source)
    if encoder is not None:
        encoder = encoder.eval().to(device=device, dtype=torch.float32)
    generator = generator.eval().to(device=device, dtype=dtype)
    if dtype is torch.float16:
        _keep_in_float32(generator)
    count = sum(p.numel() for m in (encoder, generator) if m is not None for p in m.parameters())
    question_encoder = None
    if encoder is not None:
        question_encoder = QuestionEncoder(
            encoder, pooling=source.pooling, normalize=source.normalize, score_scale=source.score_scale
        )
    backbone = as_backbone(generator, source.decoder, source.quantization)
    return LoadedModel(backbone, question_encoder, count, source.dtype, GeneratorModule(generator))


def as_backbone(
    generator: Any, decoder: str = "auto", quantization: Quantization = Quantization.NONE
) -> Backbone:
    """Our decoder for the model's family, or the general path; decoder="general" asks for the latter.

    Raises ValueError where int8 is asked for and cannot be had.
    """
    generator = generator.eval().requires_grad_(False)
    family = _BACKBONES.get(generator.config.model_type)
    if quantization is Quantization.INT8 and (
        decoder == "general" or family is None or next(generator.parameters()).dtype != torch.float32
    ):
        raise ValueError("quantization int8 is for BART and T5 on our own decoder, float32 on the CPU")
    if decoder == "general" or family is None:
        return GeneralBackbone(generator)
    with torch.no_grad():
        return cast(Backbone, with_linears(family(generator).eval(), quantization))


def _keep_in_float32(generator: Any) -> None:
    """As transformers: T5's feed-forward outputs are beyond the range of float16."""
    kept = generator._keep_in_fp32_modules or ()  # noqa: SLF001  (it has no public name)
    for name, module in generator.named_modules():
        if name.rpartition(".")[2] in kept:
            module.float()


def _load_pair(source: ModelSource) -> tuple[Any, Any]:
    if source.rag_checkpoint is not None:
        rag = RagModel.from_pretrained(source.rag_checkpoint, dtype=torch.float32)
        return rag.question_encoder, rag.generator
    if source.generator is None:
        raise ValueError("neither a RAG checkpoint nor a generator is given")
    generator = AutoModelForSeq2SeqLM.from_pretrained(source.generator, dtype=torch.float32)
    encoder = None
    if source.question_encoder is not None:
        encoder = AutoModel.from_pretrained(
            source.question_encoder,
            config=AutoConfig.from_pretrained(source.question_encoder),
            dtype=torch.float32,
        )
    return encoder, generator
