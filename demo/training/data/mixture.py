"""The mixture of training data, drawn as batches of about equally long examples."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from demo.training.data.example import Example, Tokens, encode

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """Tensors of one step; S source tokens, T label tokens (answer and [SEP])."""

    input_ids: torch.Tensor  # [batch, S], padded with 0
    labels: torch.Tensor  # [batch, T], padded with -100
    first: torch.Tensor  # [batch], the answer's first source position
    last: torch.Tensor  # [batch], its last

    @property
    def attention_mask(self) -> torch.Tensor:
        """Return 1 for tokens, 0 for pads."""  # [batch, S]
        return (self.input_ids != 0).long()

    def decoder_input_ids(self, start: int) -> torch.Tensor:
        """Return the labels moved right behind the start token."""  # [batch, T]
        starts = torch.full((len(self.labels), 1), start)
        return torch.cat([starts, self.labels[:, :-1].clamp_min(0)], 1)


def collate(examples: list[Tokens], eos: int) -> Batch:
    """Pad the examples to one batch."""
    width = max(len(example.input_ids) for example in examples)
    answers = [[*example.input_ids[example.first : example.last + 1], eos] for example in examples]
    height = max(map(len, answers))
    return Batch(
        torch.tensor([example.input_ids + [0] * (width - len(example.input_ids)) for example in examples]),
        torch.tensor([answer + [IGNORED] * (height - len(answer)) for answer in answers]),
        torch.tensor([example.first for example in examples]),
        torch.tensor([example.last for example in examples]),
    )


class Mixture:
    """Draws from weighted sources; keeps a pool sorted by length so that batches need little padding."""

    def __init__(
        self,
        rng: random.Random,
        tokenizer: PreTrainedTokenizerBase,
        sources: list[tuple[float, Callable[[], Example]]],
        max_length: int,
        excluded_questions: frozenset[str] = frozenset(),
        pool_size: int = 600,
    ) -> None:
        self.rng = rng
        self.tokenizer = tokenizer
        self.weights = [weight for weight, _ in sources]
        self.draw = [source for _, source in sources]
        self.max_length = max_length
        self.excluded_questions = excluded_questions
        self.pool_size = pool_size
        self.pool: list[Tokens] = []
        self.eos = int(tokenizer("")["input_ids"][-1])  # [SEP] ends every text

    def fill(self) -> None:
        """Fill the pool and sort it by length."""
        while len(self.pool) < self.pool_size:
            example = self.rng.choices(self.draw, self.weights)[0]()
            if example.question.lower().rstrip("?") in self.excluded_questions:
                continue
            tokens = encode(self.tokenizer, example, self.max_length)
            if tokens is not None:
                self.pool.append(tokens)
        self.pool.sort(key=lambda tokens: len(tokens.input_ids))

    def batch(self, num_tokens: int) -> Batch:
        """Return a batch of about num_tokens source tokens from a random place of the pool."""
        if len(self.pool) < self.pool_size // 3:
            self.fill()
        start = self.rng.randrange(len(self.pool))
        length = len(self.pool[min(start + 20, len(self.pool) - 1)].input_ids)
        size = min(max(6, num_tokens // length), len(self.pool))
        start = min(start, len(self.pool) - size)
        chosen, self.pool[start : start + size] = self.pool[start : start + size], []
        return collate(chosen, self.eos)
