"""One training example and its token form, exactly as the services build their contexts."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

TITLE_SEP = " / "
DOC_SEP = " // "
MAX_LABEL_TOKENS = 18


@dataclass(frozen=True)
class Example:
    """A passage, a question, and where in the text the answer stands (start, end: character offsets)."""

    title: str
    text: str
    question: str
    start: int
    end: int

    @property
    def answer(self) -> str:
        """Return the answer as it stands in the text."""
        return self.text[self.start : self.end]


@dataclass(frozen=True)
class Tokens:
    """input_ids of "[CLS] title / text // question [SEP]", and the answer's first and last token in it."""

    input_ids: list[int]
    first: int
    last: int


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int) -> Tokens | None:
    """Return the example's tokens, or None where it does not fit or its answer is too long."""
    prefix = example.title + TITLE_SEP
    encoding = tokenizer(
        prefix + example.text + DOC_SEP + example.question, return_offsets_mapping=True, verbose=False
    )
    if len(encoding["input_ids"]) > max_length:
        return None
    start, end = example.start + len(prefix), example.end + len(prefix)
    inside = [i for i, (a, b) in enumerate(encoding["offset_mapping"]) if b > a and b > start and a < end]
    if not inside or len(inside) > MAX_LABEL_TOKENS:
        return None
    return Tokens(encoding["input_ids"], inside[0], inside[-1])
