"""Random questions and settings, the same for a case's number on every machine."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from generator_service.types import EarlyStopping, GenerationSettings
from tests.parity.oracle import Batch, Question
from tests.parity.tiny_models import FIRST_WORD, VOCAB_SIZE, TinyRag


def plain_settings(rag: TinyRag, **changes: Any) -> GenerationSettings:
    """The model's own special tokens, everything else neutral but for the changes."""
    own = {
        "decoder_start_token_id": rag.decoder_start_token_id,
        "bos_token_id": rag.bos_token_id,
        "eos_token_ids": (rag.eos_token_id,),
        "pad_token_id": rag.pad_token_id,
    }
    return GenerationSettings(**(own | changes))


def random_batch(rag: TinyRag, seed: int, *, n_docs: int, size: int, ragged: bool = True) -> Batch:
    """Questions with contexts of 2 to 12 tokens, or of 12 each."""
    rng = random.Random(f"batch {seed}")
    questions = [
        Question(
            [[word(rng) for _ in range(rng.randint(2 if ragged else 12, 12))] for _ in range(n_docs)],
            [rng.gauss(0, 2) for _ in range(n_docs)],
        )
        for _ in range(size)
    ]
    return Batch(questions, rag.pad_token_id)


def word(rng: random.Random) -> int:
    return rng.randrange(FIRST_WORD, VOCAB_SIZE)


def random_settings(rag: TinyRag, seed: int, **fixed: Any) -> GenerationSettings:
    """Beam search under a random handful of arguments."""
    rng = random.Random(f"settings {seed}")
    max_length = rng.randint(3, 12)
    num_beams = fixed.get("num_beams", rng.randint(2, 5))
    drawn: dict[str, Any] = {
        "max_length": max_length,
        "num_beams": num_beams,
        "num_return_sequences": rng.randint(1, num_beams),
        "length_penalty": rng.choice([0.0, 0.5, 1.0, 1.0, 2.0, -1.0]),
        "early_stopping": rng.choice(list(EarlyStopping)),
    }
    some_eos = tuple(rng.sample(range(FIRST_WORD, 30), 2))
    others: dict[str, Any] = {
        "min_length": rng.randint(1, max_length - 1),
        "min_new_tokens": rng.randint(1, max_length - 1),
        "no_repeat_ngram_size": rng.randint(1, 3),
        "repetition_penalty": rng.choice([0.7, 1.3, 2.0]),
        "encoder_no_repeat_ngram_size": rng.randint(1, 3),
        "encoder_repetition_penalty": rng.choice([0.5, 1.5, 3.0]),
        "bad_words_ids": tuple(
            tuple(word(rng) for _ in range(rng.randint(1, 2))) for _ in range(rng.randint(1, 8))
        ),
        "suppress_tokens": tuple(word(rng) for _ in range(5)),
        "begin_suppress_tokens": tuple(word(rng) for _ in range(20)),
        "forced_bos_token_id": rag.bos_token_id
        if rag.bos_token_id is not None
        else rng.randrange(30, VOCAB_SIZE),
        "forced_eos_token_id": rag.eos_token_id,
        "eos_token_ids": (rag.eos_token_id, *some_eos),
        "renormalize_logits": True,
    }
    chosen = rng.sample(sorted(others), rng.randint(0, 4))
    drawn |= {name: others[name] for name in chosen}
    return plain_settings(rag, **(drawn | fixed))


def described(settings: GenerationSettings) -> dict[str, Any]:
    """What differs from the defaults: for a failing test's message."""
    neutral = msgspec.structs.asdict(GenerationSettings())
    return {k: v for k, v in msgspec.structs.asdict(settings).items() if v != neutral[k]}


def changed(settings: GenerationSettings, **changes: Any) -> GenerationSettings:
    return msgspec.structs.replace(settings, **changes)


def reads_pads(settings: GenerationSettings) -> bool:
    """Whether transformers takes the pads of padded contexts for tokens of them."""
    return settings.encoder_repetition_penalty != 1.0
