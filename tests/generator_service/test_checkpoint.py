"""Checkpoint folders: what they say, what is refused, and the generation arguments that follow."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RagConfig, RagTokenForGeneration

from generator_service import checkpoint
from generator_service.config import GeneratorSettings
from generator_service.errors import CheckpointError
from generator_service.generation_defaults import GenerationDefaults
from generator_service.types import Compatibility, EarlyStopping, Pooling, Strategy
from tests.parity.tiny_models import tiny_generator


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def rag_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rag")
    generator = tiny_generator("bart", 0)
    encoder = BertModel(BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    config = RagConfig.from_question_encoder_generator_configs(encoder.config, generator.config, n_docs=3)
    config.ragpair = {"pooling": "mean", "normalize": True, "score_scale": 30.0}
    model = RagTokenForGeneration(config, question_encoder=encoder, generator=generator)
    model.save_pretrained(folder)
    for part in ("question_encoder_tokenizer", "generator_tokenizer"):
        tokenizer().save_pretrained(folder / part)
    return folder


def settings(**values: object) -> GeneratorSettings:
    return GeneratorSettings.model_validate(values)


def test_a_rag_folder_says_what_it_was_trained_for(rag_folder: Path) -> None:
    read = checkpoint.read(settings(rag_checkpoint=str(rag_folder)))
    assert read.architecture == "RagTokenForGeneration"
    assert read.default_strategy is Strategy.RAG_TOKEN
    assert (read.n_docs, read.do_deduplication, read.exclude_bos_score) == (3, True, False)
    assert (read.source.pooling, read.source.normalize, read.source.score_scale) == (Pooling.MEAN, True, 30.0)
    assert read.digest.startswith("sha256:")
    assert read.question_tokenizer is not None
    assert read.question_tokenizer.encode(["a b"]) == [[4, 5]]


def test_settings_win_over_the_checkpoint(rag_folder: Path) -> None:
    read = checkpoint.read(
        settings(
            rag_checkpoint=str(rag_folder), pooling="cls", normalize=False, default_strategy="RAG_SEQUENCE"
        )
    )
    assert (read.source.pooling, read.source.normalize) == (Pooling.CLS, False)
    assert read.default_strategy is Strategy.RAG_SEQUENCE


def test_two_models_apart(tmp_path: Path) -> None:
    tiny_generator("bart", 0).save_pretrained(tmp_path / "generator")
    BertModel(
        BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "encoder")
    for part in ("generator", "encoder"):
        tokenizer().save_pretrained(tmp_path / part)
    read = checkpoint.read(
        settings(
            generator=str(tmp_path / "generator"), question_encoder=str(tmp_path / "encoder"), pooling="mean"
        )
    )
    assert read.architecture == ""
    assert read.question_encoder_type == "bert"
    assert read.default_strategy is Strategy.RAG_SEQUENCE
    assert read.generator_tokenizer.digest.startswith("sha256:")


def test_the_digest_follows_the_weights(rag_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in rag_folder.rglob("*"):
        target = copy / file.relative_to(rag_folder)
        target.mkdir(parents=True) if file.is_dir() else target.write_bytes(file.read_bytes())
    one = checkpoint.read(settings(rag_checkpoint=str(rag_folder))).digest
    assert checkpoint.read(settings(rag_checkpoint=str(copy))).digest == one
    weights = copy / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(bytes(damaged))
    assert checkpoint.read(settings(rag_checkpoint=str(copy))).digest != one


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "cannot be read"),
        ({"config.json": '{"model_type": "bart"}'}, "not a RAG one"),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        checkpoint.read(settings(rag_checkpoint=str(tmp_path)))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no folder"):
        checkpoint.read(settings(rag_checkpoint=str(tmp_path / "nowhere")))


def test_a_folder_without_weights_is_refused(rag_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((rag_folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoint.read(settings(rag_checkpoint=str(tmp_path)))


def test_one_source_of_models_must_be_named() -> None:
    with pytest.raises(ValueError, match="give --rag-checkpoint"):
        settings()
    with pytest.raises(ValueError, match="not both"):
        settings(rag_checkpoint="a", generator="b")


def test_unset_arguments_come_from_the_checkpoint_and_then_from_hugging_face(rag_folder: Path) -> None:
    defaults = GenerationDefaults(checkpoint.read(settings(rag_checkpoint=str(rag_folder))))
    token = defaults.resolve({}, Strategy.RAG_TOKEN, 7)
    assert (token.decoder_start_token_id, token.eos_token_ids, token.pad_token_id) == (2, (2,), 1)
    assert (token.max_length, token.num_beams, token.top_k, token.seed) == (20, 1, 0, 7)
    assert token.early_stopping is EarlyStopping.HEURISTIC
    assert defaults.resolve({}, Strategy.RAG_SEQUENCE, 0).max_length == 21
    assert defaults.resolve({"do_sample": True}, Strategy.RAG_TOKEN, 0).top_k == 50


def test_given_arguments_win(rag_folder: Path) -> None:
    defaults = GenerationDefaults(checkpoint.read(settings(rag_checkpoint=str(rag_folder))))
    given = {
        "max_new_tokens": 5,
        "max_length": 30,
        "early_stopping": EarlyStopping.NEVER,
        "eos_token_ids": (2, 5),
        "forced_bos_token_id": 0,
        "pad_token_id": 3,
        "bad_words_ids": ((1, 2),),
    }
    resolved = defaults.resolve(given, Strategy.RAG_TOKEN, 0)
    assert resolved.max_length == 6, "max_new_tokens wins over max_length and does not count the start token"
    assert resolved.early_stopping is EarlyStopping.NEVER
    assert (resolved.eos_token_ids, resolved.forced_bos_token_id, resolved.pad_token_id) == ((2, 5), 0, 3)
    off = defaults.resolve({"forced_bos_token_id": -1}, Strategy.RAG_TOKEN, 0)
    assert off.forced_bos_token_id is None


def test_min_new_tokens_replaces_min_length_where_hugging_face_does(rag_folder: Path) -> None:
    defaults = GenerationDefaults(checkpoint.read(settings(rag_checkpoint=str(rag_folder))))
    given = {"min_length": 9, "min_new_tokens": 2}

    def minima(strategy: Strategy, compatibility: Compatibility) -> tuple[int, int]:
        resolved = defaults.resolve(given, strategy, 0, compatibility)
        return resolved.min_length, resolved.min_new_tokens

    assert minima(Strategy.RAG_SEQUENCE, Compatibility.HF) == (0, 2)
    assert minima(Strategy.RAG_SEQUENCE, Compatibility.MASKED) == (9, 2)
    assert minima(Strategy.RAG_TOKEN, Compatibility.HF) == (9, 2)
