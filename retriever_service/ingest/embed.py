"""The passage encoder: title and text -> embedding. The only module of the retriever that uses torch."""

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, DPRContextEncoder
from transformers.utils.logging import disable_progress_bar

from retriever_service.errors import BuildError
from retriever_service.index.manifest import Embedding, sha256_of_file
from retriever_service.types import Float32Array

DEFAULT_TEMPLATE = "{title} {text}"
_disable_progress_bar: Any = disable_progress_bar  # untyped
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_SHORT_DIGEST_CHARS = 12
_FALLBACK_MAX_LENGTH = 512
# The models whose positions begin behind the one of the padding token.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet"}


class Pooling(enum.StrEnum):
    """How the states of a passage's tokens become one vector."""

    MEAN = "mean"
    CLS = "cls"
    POOLER = "pooler"


class PassageEncoder:
    """A DPRContextEncoder, or any AutoModel with pooling; in eval mode and float32.

    DPR encodes title and text as a pair of segments and gives its pooler_output, as in the paper's index; any
    other model encodes `template` with {title} and {text} filled in.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str | None = None,
        pooling: Pooling = Pooling.MEAN,
        normalize: bool = False,
        max_length: int | None = None,
        template: str = DEFAULT_TEMPLATE,
        batch_size: int = 32,
        device: str = "cpu",
        num_threads: int | None = None,
    ) -> None:
        """Loads a local folder or hub name. Raises BuildError where there is no such model, device or length."""
        if not any(field in template for field in ("{title}", "{text}")):
            raise BuildError(f"a passage template must hold {{title}} or {{text}}, got {template!r}")
        _disable_progress_bar()  # the build shows its own
        if num_threads:
            torch.set_num_threads(num_threads)
        _check_device(device)
        try:
            config = AutoConfig.from_pretrained(source)
            self._is_dpr = config.model_type == "dpr"
            model: Any = DPRContextEncoder if self._is_dpr else AutoModel
            self._model = model.from_pretrained(source, dtype=torch.float32).eval().to(device)
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError, KeyError) as error:
            said = str(error).strip().partition("\n")[0]
            raise BuildError(f"no passage encoder in {source}: {said}") from error
        self._pooling = Pooling.POOLER if self._is_dpr else pooling
        self._normalize = normalize
        self._template = template
        self._batch_size = batch_size
        self._device = device
        positions = _num_positions(config)
        if max_length is not None and positions is not None and max_length > positions:
            raise BuildError(f"{source} has positions for {positions} tokens, max_length is {max_length}")
        self._max_length = max_length or min(
            _FALLBACK_MAX_LENGTH, int(self._tokenizer.model_max_length), positions or _FALLBACK_MAX_LENGTH
        )
        self._name, self._digest = _identity(source, name, getattr(config, "_commit_hash", None))

    def description(self) -> Embedding:
        """Returns what the manifest says about the embeddings."""
        return Embedding(
            name=self._name,
            digest=self._digest,
            pooling=self._pooling.value,
            normalize=self._normalize,
            max_length=self._max_length,
            passage_template=None if self._is_dpr else self._template,
        )

    def encode(self, passages: Sequence[tuple[str, str]]) -> Float32Array:
        """Returns float32 [len, dim] for (title, text) pairs, in order.

        Passages of like length share a batch, so that little of it is padding; longer ones are cut at
        max_length tokens. Raises BuildError where the model gives something that is not finite.
        """
        lengths = [len(title) + len(text) for title, text in passages]
        order = np.argsort(np.asarray(lengths), kind="stable")[::-1]
        embeddings: Float32Array | None = None
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            pooled = self._encode_batch([passages[position] for position in chosen])
            if embeddings is None:
                embeddings = np.empty((len(passages), pooled.shape[1]), dtype=np.float32)
            embeddings[chosen] = pooled
        if embeddings is None:
            raise ValueError("no passages to encode")
        if not np.isfinite(embeddings).all():
            raise BuildError(f"the passage encoder {self._name} gave embeddings that are not finite")
        return embeddings

    @torch.inference_mode()
    def _encode_batch(self, passages: Sequence[tuple[str, str]]) -> Float32Array:
        inputs = self._tokenizer(
            *self._texts(passages),
            truncation=True,
            max_length=self._max_length,
            padding=True,
            return_tensors="pt",
        ).to(self._device)
        pooled = self._pooled(self._model(**inputs), inputs["attention_mask"])
        if self._normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        vectors: Float32Array = pooled.float().cpu().numpy()
        return vectors

    def _texts(self, passages: Sequence[tuple[str, str]]) -> tuple[list[str], ...]:
        if self._is_dpr:
            return [title for title, _ in passages], [text for _, text in passages]
        filled = [
            self._template.replace("{title}", title, 1).replace("{text}", text, 1) for title, text in passages
        ]
        return ([text.strip() for text in filled],)

    def _pooled(self, output: Any, attention_mask: torch.Tensor) -> torch.Tensor:
        if self._pooling is Pooling.POOLER:
            pooled: torch.Tensor | None = getattr(output, "pooler_output", None)
            if pooled is None:
                raise BuildError("this passage encoder has no pooler: choose --pooling mean or cls")
            return pooled
        states: torch.Tensor = output.last_hidden_state  # [batch, length, dim]
        if self._pooling is Pooling.CLS:
            return states[:, 0]
        weights = attention_mask.unsqueeze(-1).to(states.dtype)  # [batch, length, 1]
        return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip().partition("\n")[0]
        raise BuildError(f"device {device!r} cannot be used: {said}") from error


def _num_positions(config: Any) -> int | None:
    """Returns how many tokens the model has positions for, None where any number; RoBERTa's first two hold none."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    offset = config.pad_token_id + 1 if config.model_type in _OFFSET_POSITIONS else 0
    return positions - offset


def _identity(source: str, name: str | None, commit: str | None) -> tuple[str, str | None]:
    """Returns the model's name, and the digest of its weights where they lie in a local folder."""
    folder = Path(source)
    weights = next((folder / file for file in _WEIGHT_FILES if (folder / file).is_file()), None)
    digest = None if weights is None else f"sha256:{sha256_of_file(weights)}"
    if name is not None:
        return name, digest
    base = folder.resolve().name if folder.is_dir() else source
    if digest is not None:
        return f"{base}@{digest[: len('sha256:') + _SHORT_DIGEST_CHARS]}", digest
    return (base if commit is None else f"{base}@{commit}"), None
