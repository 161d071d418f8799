"""Pieces on their way to the caller: text that no later token changes, and readers that are slow."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from generator_service.answer_stream import AnswerStream, GrowingText, Pacing, Piece
from generator_service.engine.messages import Progress

CORPUS = [
    "Don't stop: we've said it isn't theirs, they're late. 'Twas I'm sure \"ok\" !",
    "Zürich, Kraków und 東京 - naïve café 🎉🎊 ¿qué? 你好世界",
    "a b c d e f . , ? ! ' n't 's 've 're 'm",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [
        "▁a",
        "▁the",
        "b",
        "ing",
        "▁",
        "é",
        "東",
        "▁.",
        "'",
        "n",
    ]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    words = [
        "do",
        "##n",
        "##'",
        "n't",
        "'",
        "s",
        "'s",
        ".",
        ",",
        "!",
        "we",
        "##ve",
        "'ve",
        "n",
        "t",
        "a",
        "##b",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="do"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


def byte_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(i for piece, i in tokenizer.get_vocab().items() if piece.startswith("<0x"))


def cleaned(text: str) -> str:
    """What transformers' clean_up_tokenization does."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text


@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_piece])
def test_deltas_make_the_text_whatever_the_tokens(make: Callable[[], Tokenizer], clean_up: bool) -> None:
    tokenizer = make()

    def decode(token_ids: Sequence[int]) -> str:
        text = tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return (cleaned(text) if clean_up else text).strip()

    rng = random.Random(make.__name__)
    for case in range(300):
        if make is byte_level and case % 2:
            ids = tokenizer.encode(rng.choice(CORPUS)).ids
        else:
            ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randint(1, 12))]
        growing, given, place = GrowingText(decode, byte_tokens(tokenizer)), "", 0
        while place < len(ids):
            place = min(len(ids), place + rng.randint(1, 3))
            given += growing.delta(ids[:place], last=place == len(ids))
            assert decode(ids).startswith(given), (ids, given)
        assert given == decode(ids), ids


def test_an_unfinished_character_is_held_back() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("🎉x").ids
    growing = GrowingText(lambda token_ids: str(tokenizer.decode(list(token_ids))).strip())
    deltas = [growing.delta(ids[: n + 1], last=n == len(ids) - 1) for n in range(len(ids))]
    assert "".join(deltas) == "🎉x"
    assert all("\N{REPLACEMENT CHARACTER}" not in delta for delta in deltas)


def progress(*token_ids: int, last: bool = False) -> Progress:
    return Progress(
        request_id=1, token_ids=list(token_ids), document_posterior=[[1.0]] * len(token_ids), last=last
    )


def stream(pacing: Pacing, count: int = 1) -> AnswerStream:
    def texts() -> GrowingText:
        return GrowingText(lambda ids: "".join(chr(97 + i) for i in ids[1:]))

    return AnswerStream(count, pacing, texts, 0)


async def test_tokens_wait_for_company_or_for_their_time() -> None:
    one = stream(Pacing(piece_tokens=3, piece_wait_s=60.0))
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    pieces: list[Piece] = []
    take = pieces.append

    async def read() -> None:
        async for piece in one.pieces(answered):
            take(piece)

    reader = asyncio.ensure_future(read())
    one.add(0, progress(1, 2))
    await asyncio.sleep(0.02)
    assert pieces == [], "two of three"
    one.add(0, progress(3, 4))
    await asyncio.sleep(0.02)
    assert [p.token_ids for p in pieces] == [[1, 2, 3, 4]]
    one.add(0, progress(5, last=True))
    await asyncio.sleep(0.02)
    assert [p.token_ids for p in pieces] == [[1, 2, 3, 4], [5]], "the end waits for nothing"
    assert [p.last for p in pieces] == [False, True]
    answered.set_result(None)
    await reader
    assert one.sent(0) == [0, 1, 2, 3, 4, 5]


async def test_a_token_goes_out_when_it_has_waited_long_enough() -> None:
    one = stream(Pacing(piece_tokens=100, piece_wait_s=0.01))
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    one.add(0, progress(1))
    pieces = one.pieces(answered)
    assert (await anext(pieces)).token_ids == [1]  # type: ignore[arg-type]
    answered.set_result(None)
    assert [p async for p in pieces] == []


async def test_a_slow_reader_gets_fewer_and_longer_pieces() -> None:
    one = stream(Pacing(piece_tokens=1, piece_wait_s=0.0), count=2)
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    pieces = one.pieces(answered)
    one.add(1, progress(7))
    assert (await anext(pieces)).question == 1  # type: ignore[arg-type]
    for token in range(1, 200):  # while the reader is busy with the first piece
        one.add(token % 2, progress(token % 26))
    answered.set_result(None)
    rest = [piece async for piece in pieces]
    assert [(p.question, len(p.token_ids)) for p in rest] == [(0, 99), (1, 100)]
    assert [len(p.document_posterior) for p in rest] == [99, 100]
    assert "".join(p.text_delta for p in rest if p.question == 0) == one._answers[0].text._given


async def test_what_was_certain_comes_before_the_failure() -> None:
    one = stream(Pacing(piece_tokens=100, piece_wait_s=60.0))
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    one.add(0, progress(1))
    answered.set_exception(RuntimeError("the worker died"))
    assert [p.token_ids async for p in one.pieces(answered)] == [[1]]
    assert isinstance(answered.exception(), RuntimeError)
