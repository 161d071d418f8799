"""The best next tokens of many rows at once: normalised, mixed over documents, without what may not follow."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from generator_service.decoding.picks import Picks
from generator_service.transfers import to_device

MAX_BANNED = 16
"""Banned tokens of a row; more are the processors' work."""
MAX_KEYS = 8192
"""Candidates that the kernels can put together for a row."""
_ROWS_AT_ONCE = 64
"""Temporaries of a large vocabulary for more rows are memory that the CPU asks its system for anew in every call."""
_LEAST = 1e-30
"""Smaller probabilities are near to where float32 loses digits: their logarithms are added up instead."""


def has_kernels(device: torch.device) -> bool:
    """Whether the Triton kernels run there."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def fits(logits: Tensor, keep: int) -> bool:
    """Whether best_tokens is there for these logits."""
    if not has_kernels(logits.device):
        return False
    from generator_service.decoding.top_kernels import TOP_TILE  # noqa: PLC0415  (Triton is there on CUDA only)

    return -(-logits.shape[1] // TOP_TILE) * keep <= MAX_KEYS


def logsumexp(logits: Tensor) -> Tensor:
    """Over the vocabulary, in float32: logits [rows, vocab] of any dtype -> [rows]."""
    if not has_kernels(logits.device):
        parts = [part.float() for part in torch.split(logits, _ROWS_AT_ONCE)]
        return torch.cat([_logsumexp(part, torch.softmax(part, dim=-1)) for part in parts])
    from generator_service.decoding import top_kernels  # noqa: PLC0415

    return top_kernels.logsumexp(logits)


def mixed(logits: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    """RAG-Token's p(token | question, prefix) [rows, vocab], and the logsumexp [docs, rows] of what it is made of.

    logits [docs, rows, vocab] of any dtype, log_prior float32 [docs]. Probabilities, not their logarithms: on a CPU
    their sum is one product, where a logsumexp over documents goes through all of the vocabulary eight times.
    """
    logits = logits.float()
    probabilities = torch.softmax(logits, dim=-1)
    mixture = log_prior.exp()[None] @ probabilities.flatten(1)
    return mixture.view(logits.shape[1:]), _logsumexp(logits, probabilities)


def _logsumexp(logits: Tensor, probabilities: Tensor) -> Tensor:
    """By the largest probability, at least 1 / vocab: torch's softmax keeps a row in cache, its logsumexp does not."""
    return logits.amax(dim=-1) - probabilities.amax(dim=-1).log_()


def likeliest_mixed(mixture: Tensor, keep: int, banned: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """The keep highest log-probabilities of each row of mixed() and their ids, but banned tokens'.

    None where one of them is so unlikely that float32 tells its probability apart from others' no more.
    """
    values, ids = likeliest(mixture, keep, banned)
    return None if bool(values.min() < _LEAST) else (values.log_(), ids)


def likeliest(logits: Tensor, keep: int, banned: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The keep highest logits of each row [rows, vocab] and their ids, but banned tokens': minus infinity.

    Banned tokens are taken out of a few more, so that nothing is written over the vocabulary.
    """
    values, ids = logits.topk(min(keep + len(banned), logits.shape[1]), dim=-1)
    if not banned:
        return values, ids
    is_banned = torch.isin(ids, to_device(banned, torch.int64, ids.device))
    values, order = values.masked_fill(is_banned, float("-inf")).topk(min(keep, logits.shape[1]), dim=-1)
    return values, ids.gather(1, order)


def best_tokens(
    logits: Tensor, lse: Tensor, priors: Tensor | None, picks: Picks, keep: int, num_out: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and token ids, each [num_out, keep], best first; of equal ones the lowest token.

    logits [rows, vocab] of any dtype and lse float32 [rows], their logsumexp; priors float32 [searches, docs], or None
    where a row has one document. keep is at most the vocabulary, and fits() has said yes. Rows of the output that no
    pick names are minus infinity.
    """
    from generator_service.decoding import top_kernels  # noqa: PLC0415

    return top_kernels.best_tokens(logits, lse, priors, picks, keep, num_out)
