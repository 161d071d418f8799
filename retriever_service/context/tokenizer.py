"""The tokenizers of context assembly, and what a checkpoint says about the way contexts are put together."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from rag_serving.tokenizer_digest import tokenizer_digest
from retriever_service.context.splitting import Splitting, splittings_of
from retriever_service.errors import TokenizerError
from retriever_service.work_limit import current_limit

_PROBE = "a"
_CHARACTERS_PER_CALL = 1 << 18
"""About a quarter of a second in one thread; before each call it is asked whether the work is still wanted."""


class ContextTokenizer:
    """The generator's tokenizer, as a pure function of the text.

    Uses the Rust backend with truncation and padding off: Hugging Face's own call sets both on the shared
    backend, which is not safe across threads. The backend releases the GIL.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Takes a fast Hugging Face tokenizer. Raises TokenizerError for one that assembly cannot use."""
        if not getattr(tokenizer, "is_fast", False):
            raise TokenizerError(f"{type(tokenizer).__name__} has no fast (tokenizer.json) backend")
        if tokenizer.pad_token_id is None:
            raise TokenizerError(f"{type(tokenizer).__name__} has no pad token")
        if tokenizer.truncation_side != "right":
            raise TokenizerError("contexts are truncated on the right; this tokenizer truncates on the left")
        backend_json: str = tokenizer.backend_tokenizer.to_str()
        self._backend = Tokenizer.from_str(backend_json)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = bool(tokenizer.split_special_tokens)
        self.pad_token_id = int(tokenizer.pad_token_id)
        self.bos_ids, self.eos_ids = self._frame()
        special_ids = {
            "pad": tokenizer.pad_token_id,
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
        }
        self.digest = tokenizer_digest(backend_json, special_ids)

    @property
    def num_special_tokens(self) -> int:
        """Tokens that stand around every context."""
        return len(self.bos_ids) + len(self.eos_ids)

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodes texts without the special tokens around them, whole, offsets included.

        Raises DeadlineExceededError, or CancelledByCallerError, where nobody waits any more: between long texts too.
        """
        calls = (self._backend.encode_batch(call, add_special_tokens=False) for call in _calls(texts))
        return [encoding for encodings in calls for encoding in encodings]

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts as `encode` does; without offsets it takes less time."""
        calls = (self._backend.encode_batch_fast(call, add_special_tokens=False) for call in _calls(texts))
        return [encoding.ids for encodings in calls for encoding in encodings]

    @functools.cached_property
    def splittings(self) -> dict[str, Splitting]:
        """Where a text may be encoded in two parts, by the printable ASCII character that the first ends in."""
        return splittings_of(self._backend)

    def _frame(self) -> tuple[list[int], list[int]]:
        """Returns the special tokens put before and after a single text."""
        bare = self._backend.encode(_PROBE, add_special_tokens=False).ids
        framed = self._backend.encode(_PROBE, add_special_tokens=True).ids
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
        raise TokenizerError("the tokenizer's special tokens do not stand around the text")


def _calls(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yields the texts in lists that take no long time each, unless a text alone does."""
    call: list[str] = []
    num_characters = 0
    for text in texts:
        if call and num_characters + len(text) > _CHARACTERS_PER_CALL:
            current_limit().left_s()
            yield call
            call, num_characters = [], 0
        call.append(text)
        num_characters += len(text)
    current_limit().left_s()
    yield call


class QuestionTokenizer:
    """The question encoder's tokenizer: turns question_input_ids back into text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.num_tokens = len(tokenizer)

    def decode(self, question_input_ids: npt.NDArray[np.int64]) -> list[str]:
        """Decodes int64 [batch, length] as RagRetriever does, without special tokens."""
        decoded = self._tokenizer.batch_decode(question_input_ids.tolist(), skip_special_tokens=True)
        return [str(text) for text in decoded]


@dataclass(frozen=True, slots=True)
class ContextDefaults:
    """What a RAG checkpoint's config.json says; None where it says nothing."""

    title_sep: str | None = None
    doc_sep: str | None = None
    prefix: str | None = None
    max_combined_length: int | None = None
    n_docs: int | None = None


def load_context_tokenizer(checkpoint: str) -> ContextTokenizer:
    """Loads the generator's tokenizer of a RAG checkpoint, or the tokenizer of a folder or hub name.

    Raises TokenizerError saying what was tried.
    """
    return ContextTokenizer(_load(checkpoint, "generator_tokenizer"))


def load_question_tokenizer(checkpoint: str, *, required: bool) -> QuestionTokenizer | None:
    """Loads the question encoder's tokenizer.

    Unless `required`, gives None where the checkpoint is not a RAG folder with one of its own: a generator's
    tokenizer would decode other ids without a complaint. Raises TokenizerError.
    """
    if not required and not (Path(checkpoint) / "question_encoder_tokenizer").is_dir():
        return None
    return QuestionTokenizer(_load(checkpoint, "question_encoder_tokenizer"))


def load_context_defaults(checkpoint: str) -> ContextDefaults:
    """Reads the RagConfig of a checkpoint folder or hub name; all None where it is not a RAG checkpoint.

    Raises TokenizerError where there is no such folder, or the hub cannot be asked.
    """
    folder = Path(checkpoint)
    if folder.is_absolute() and not folder.is_dir():
        raise TokenizerError(f"no folder {checkpoint}")
    file = folder / "config.json" if folder.is_dir() else _hub_config(checkpoint)
    if file is None or not file.is_file():
        return ContextDefaults()
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file}: {error}") from error
    if config.get("model_type") != "rag":
        return ContextDefaults()
    return ContextDefaults(
        title_sep=config.get("title_sep"),
        doc_sep=config.get("doc_sep"),
        prefix=(config.get("generator") or {}).get("prefix"),
        max_combined_length=config.get("max_combined_length"),
        n_docs=config.get("n_docs"),
    )


def _hub_config(name: str) -> Path | None:
    from transformers.utils.hub import cached_file  # noqa: PLC0415

    try:
        found = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"no config.json of {name}: {_first_line(error)}") from error
    return None if found is None else Path(found)


def _load(checkpoint: str, part: str) -> Any:
    # Imported here: it brings torch along, which a missing index or a wrong flag must not wait for.
    from transformers import AutoTokenizer  # noqa: PLC0415

    folder = Path(checkpoint)
    source = folder / part if (folder / part).is_dir() else checkpoint
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as error:
        raise TokenizerError(f"no tokenizer in {source}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
