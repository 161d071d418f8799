"""What a checkpoint folder says about itself, read without loading a weight."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, GenerationConfig

from generator_service.config import GeneratorSettings
from generator_service.errors import CheckpointError
from generator_service.tokenization import TextTokenizer
from generator_service.types import ModelSource, Pooling, Quantization, Strategy

_ARCHITECTURES = {
    "RagTokenForGeneration": Strategy.RAG_TOKEN,
    "RagSequenceForGeneration": Strategy.RAG_SEQUENCE,
}
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class Checkpoint:
    """Everything of a checkpoint but its weights; the names are RagConfig's."""

    source: ModelSource
    architecture: str
    default_strategy: Strategy
    generation: GenerationConfig
    generator_config: Any
    question_encoder_type: str
    n_docs: int
    do_deduplication: bool
    exclude_bos_score: bool
    reduce_loss: bool
    do_marginalize: bool
    label_smoothing: float
    bos_token_id: int | None
    embedding_model: str
    question_tokenizer: TextTokenizer | None
    generator_tokenizer: TextTokenizer
    digest: str


def read(settings: GeneratorSettings) -> Checkpoint:
    """Read the checkpoint that the settings name. Raises CheckpointError saying what is wrong with which folder."""
    if settings.rag_checkpoint is not None:
        return _read_rag(settings, _folder(settings.rag_checkpoint))
    return _read_apart(settings)


def _read_rag(settings: GeneratorSettings, folder: Path) -> Checkpoint:
    config = _config(folder)
    if config.model_type != "rag":
        raise CheckpointError(
            f"{folder} is a {config.model_type} checkpoint, not a RAG one; name it with --generator instead"
        )
    _require_weights(folder)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    own = dict(getattr(config, "ragpair", None) or {})
    strategy = settings.default_strategy or _ARCHITECTURES.get(architecture)
    if strategy is None:
        strategy = Strategy(own["strategy"]) if "strategy" in own else Strategy.RAG_SEQUENCE
    return Checkpoint(
        source=_source(settings, own, rag_checkpoint=str(folder)),
        architecture=architecture,
        default_strategy=strategy,
        generation=_generation(folder, config.generator),
        generator_config=config.generator,
        question_encoder_type=config.question_encoder.model_type,
        n_docs=int(config.n_docs),
        do_deduplication=bool(config.do_deduplication),
        exclude_bos_score=bool(config.exclude_bos_score),
        reduce_loss=bool(config.reduce_loss),
        do_marginalize=bool(config.do_marginalize),
        label_smoothing=float(config.label_smoothing),
        bos_token_id=getattr(config, "bos_token_id", None) or getattr(config.generator, "bos_token_id", None),
        embedding_model=settings.embedding_model or str(own.get("embedding_model", "")),
        question_tokenizer=_tokenizer(folder, "question_encoder_tokenizer"),
        generator_tokenizer=_tokenizer(folder, "generator_tokenizer"),
        digest=_digest(folder),
    )


def _read_apart(settings: GeneratorSettings) -> Checkpoint:
    assert settings.generator is not None
    folder = _folder(settings.generator)
    encoder = None if settings.question_encoder is None else _folder(settings.question_encoder)
    config = _config(folder)
    for part in (folder, encoder):
        if part is not None:
            _require_weights(part)
    source = _source(
        settings, {}, generator=str(folder), question_encoder=None if encoder is None else str(encoder)
    )
    return Checkpoint(
        source=source,
        architecture="",
        default_strategy=settings.default_strategy or Strategy.RAG_SEQUENCE,
        generation=_generation(folder, config),
        generator_config=config,
        question_encoder_type="" if encoder is None else _config(encoder).model_type,
        n_docs=5,
        do_deduplication=True,
        exclude_bos_score=False,
        reduce_loss=False,
        do_marginalize=False,
        label_smoothing=0.0,
        bos_token_id=getattr(config, "bos_token_id", None),
        embedding_model=settings.embedding_model or "",
        question_tokenizer=None if encoder is None else TextTokenizer(str(encoder)),
        generator_tokenizer=TextTokenizer(str(folder)),
        digest=_digest(folder, *([] if encoder is None else [encoder])),
    )


def _source(settings: GeneratorSettings, own: dict[str, Any], **folders: str | None) -> ModelSource:
    def first(given: Any, name: str, default: Any) -> Any:
        return given if given is not None else own.get(name, default)

    return ModelSource(
        rag_checkpoint=folders.get("rag_checkpoint"),
        question_encoder=folders.get("question_encoder"),
        generator=folders.get("generator"),
        pooling=Pooling(first(settings.pooling, "pooling", Pooling.FIRST_OUTPUT)),
        normalize=bool(first(settings.normalize, "normalize", False)),
        score_scale=float(first(settings.score_scale, "score_scale", 1.0)),
        dtype=settings.dtype,
        decoder=settings.decoder,
        quantization=Quantization(settings.quantization),
    )


def _folder(name: str) -> Path:
    """A local folder as it is; anything else is a name on the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"there is no folder {name}")
    try:
        return Path(snapshot_download(name))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a folder nor a checkpoint that the hub gives: {error}"
        ) from error


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is no checkpoint")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error


def _require_weights(folder: Path) -> None:
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise CheckpointError(f"{folder} holds no weights ({' or '.join(_WEIGHTS)})")


def _generation(folder: Path, generator_config: Any) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(generator_config)


def _tokenizer(folder: Path, part: str) -> TextTokenizer:
    return TextTokenizer(str(folder / part if (folder / part).is_dir() else folder))


def _digest(*folders: Path) -> str:
    """sha256 over names and contents of configuration and weights."""
    digest = hashlib.sha256()
    for folder in folders:
        files = [f for pattern in ("*config.json", *_WEIGHTS) for f in folder.glob(pattern)]
        for file in sorted(files):
            digest.update(file.name.encode() + b"\0")
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"
