"""What an answer rests on: spans of documents that its tokens looked at, and what it loses without a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from generator_service.tokenization import TextTokenizer
from generator_service.types import Hypothesis, Strategy, Trace

MAX_SPAN_TOKENS = 8

FloatArray = npt.NDArray[np.float32]
Characters = tuple[int, int]


@dataclass(frozen=True)
class TokenSource:
    """A generated token's likeliest document, and the run of its context's tokens that was looked at most.

    span is the run as characters of the document's text, None where that is not known to be in the context.
    """

    token_id: int
    text: str
    document: int
    probability: float
    span: Characters | None
    context_start: int
    context_end: int
    attention: float


@dataclass(frozen=True)
class Provenance:
    """token_posterior float32 [tokens, n_docs], and a source for each generated token."""

    token_posterior: FloatArray
    tokens: list[TokenSource]

    def over(self, present: Sequence[int], n_docs: int) -> Provenance:
        """The same numbered by the places, among n_docs, of the documents that are there."""
        if len(present) == n_docs:
            return self
        wide = np.zeros((len(self.tokens), n_docs), dtype=np.float32)
        wide[:, list(present)] = self.token_posterior
        return Provenance(wide, [replace(one, document=present[one.document]) for one in self.tokens])


class SourceFinder:
    """Finds the sources of answers to one question; contexts hold no pads, texts are its documents' or empty."""

    def __init__(
        self, contexts: Sequence[Sequence[int]], texts: Sequence[str], tokenizer: TextTokenizer
    ) -> None:
        self._contexts, self._texts, self._tokenizer = contexts, texts, tokenizer
        self._places: dict[int, list[Characters | None]] = {}

    def provenance(self, hypothesis: Hypothesis) -> Provenance:
        """Sources of a traced hypothesis' tokens; documents are numbered as the contexts are."""
        assert hypothesis.trace is not None
        tokens = hypothesis.token_ids[1:]
        posterior = posteriors(hypothesis.trace, len(self._contexts))
        pieces = self._pieces(hypothesis.token_ids)
        sources = [
            self._source(token, piece, row, np.frombuffer(weights, dtype="<f4"))
            for token, piece, row, weights in zip(
                tokens, pieces, posterior, hypothesis.trace.cross_attention, strict=True
            )
        ]
        return Provenance(posterior, sources)

    def _source(self, token: int, piece: str, posterior: FloatArray, weights: FloatArray) -> TokenSource:
        document = int(posterior.argmax())
        places = self._characters(document)
        inside = [index for index, place in enumerate(places) if place is not None]
        first = inside[0] if inside else 0
        start, end = best_run(weights[first : inside[-1] + 1] if inside else weights)
        start, end = start + first, end + first
        span = None
        if inside:
            covered = [place for place in places[start:end] if place is not None]
            span = (covered[0][0], covered[-1][1]) if covered else None
        return TokenSource(
            token_id=token,
            text=piece,
            document=document,
            probability=float(posterior[document]),
            span=span,
            context_start=start,
            context_end=end,
            attention=float(weights[start:end].sum()),
        )

    def _characters(self, document: int) -> list[Characters | None]:
        """For each token of a context the characters of its document's text that it stands for."""
        if document not in self._places:
            text = self._texts[document] if self._texts else ""
            self._places[document] = locate(self._contexts[document], text, self._tokenizer)
        return self._places[document]

    def _pieces(self, token_ids: Sequence[int]) -> list[str]:
        """What each generated token adds to the text."""
        pieces, before = [], ""
        for end in range(2, len(token_ids) + 1):
            text = self._tokenizer.decode(token_ids[:end])
            if text.startswith(before):
                pieces.append(text[len(before) :])
                before = text
            else:  # an unfinished character, say: it is written out by the tokens that finish it
                pieces.append("")
        return pieces


def posteriors(trace: Trace, n_docs: int) -> FloatArray:
    """token_posterior float32 [tokens, n_docs]."""
    return np.frombuffer(trace.token_posterior, dtype="<f4").astype(np.float32).reshape(-1, n_docs)


def locate(context: Sequence[int], text: str, tokenizer: TextTokenizer) -> list[Characters | None]:
    """For each token of a context, the characters of text that it stands for; None outside of the text.

    The retriever assembles contexts as Hugging Face does, title and text and question in one string, with pairs of
    spaces made one, and cuts the text on the right. So the text's own tokens, or all but the first, which may have
    grown together with what stands before it, begin somewhere in the context: at the place where most of them follow.
    """
    places: list[Characters | None] = [None] * len(context)
    squeezed, origins = _squeezed(text)
    encoded = tokenizer.encode_with_offsets(" " + squeezed) if squeezed else None
    if encoded is None or not encoded[0]:
        return places
    ids, offsets = encoded
    count, place, skipped = max(
        ((_common(context[at:], ids[skip:]), at, skip) for at in range(len(context)) for skip in (0, 1)),
        key=lambda found: (found[0], -found[1]),
    )
    for index in range(count):
        start, end = offsets[index + skipped]
        start, end = max(start - 1, 0), end - 1  # the space put before it
        if start < end:
            places[place + index] = (origins[start], origins[end - 1] + 1)
    return places


def best_run(weights: FloatArray, max_tokens: int = MAX_SPAN_TOKENS) -> tuple[int, int]:
    """The run of at most max_tokens whose weights are the most above the mean of all: [start, end).

    weights float32 [tokens], at least one. The mean keeps a run from growing by tokens that are looked at no more
    than any other.
    """
    above = np.cumsum(np.concatenate([[0.0], weights.astype(np.float64) - weights.mean(dtype=np.float64)]))
    count = len(weights)
    runs = [
        (above[e] - above[s], s, e)
        for s in range(count)
        for e in range(s + 1, min(s + max_tokens, count) + 1)
    ]
    _, start, end = max(runs, key=lambda run: (run[0], run[1] - run[2], -run[1]))
    return start, end


@dataclass(frozen=True)
class LeaveOneOut:
    """An answer's log-likelihood with all documents, and without each: None where it is the only one."""

    log_likelihood: float
    without: list[float | None]


def leave_one_out(trace: Trace, doc_scores: Sequence[float], strategy: Strategy) -> LeaveOneOut:
    """Arithmetic on a traced answer's per-document log-probabilities; the priors of those that stay add up to one."""
    n_docs = len(doc_scores)
    log_probs = np.frombuffer(trace.token_log_probs, dtype="<f4").astype(np.float64).reshape(-1, n_docs)
    scores = np.array(doc_scores, dtype=np.float64)
    everything = np.arange(n_docs)
    without: list[float | None] = [None]
    if n_docs > 1:
        rest = [np.delete(everything, document) for document in everything]
        without = [_log_likelihood(log_probs[:, kept], scores[kept], strategy) for kept in rest]
    return LeaveOneOut(_log_likelihood(log_probs, scores, strategy), without)


def _log_likelihood(
    log_probs: npt.NDArray[np.float64], doc_scores: npt.NDArray[np.float64], strategy: Strategy
) -> float:
    """log p(answer | question): log_probs [tokens, n_docs] (Lewis et al. 2020, section 2.1)."""
    log_prior = doc_scores - np.logaddexp.reduce(doc_scores)
    if strategy is Strategy.RAG_TOKEN:
        return float(np.logaddexp.reduce(log_probs + log_prior, axis=1).sum())
    return float(np.logaddexp.reduce(log_probs.sum(axis=0) + log_prior))


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count


def _squeezed(text: str) -> tuple[str, list[int]]:
    """text with pairs of spaces made one, from the left, and where each character came from."""
    characters, origins, index = [], [], 0
    while index < len(text):
        characters.append(text[index])
        origins.append(index)
        index += 2 if text[index : index + 2] == "  " else 1
    return "".join(characters), origins
