"""A tiny random RAG checkpoint with its tokenizer, and tiny indexes of made-up passages."""

import json
import random
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.decoders import WordPiece as WordPieceDecoder
from transformers import PreTrainedTokenizerFast, RagConfig, RagTokenForGeneration

from tests.parity.tiny_models import VOCAB_SIZE, tiny_rag

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
DIMENSION = 16
N_DOCS = 3
MAX_COMBINED_LENGTH = 48
EMBEDDING_MODEL = "tiny-dpr"
QUESTIONS = ["where is bako", "who made the lumi", "ti"]
ARGUMENTS = {"max_length": 12, "num_beams": 3, "num_return_sequences": 2}


def build_checkpoint(folder: Path) -> None:
    """Writes a RagTokenForGeneration checkpoint: BART, DPR, both tokenizers."""
    tiny = tiny_rag("bart", seed=1)
    config = RagConfig.from_question_encoder_generator_configs(
        tiny.question_encoder.config,
        tiny.generator.config,
        n_docs=N_DOCS,
        max_combined_length=MAX_COMBINED_LENGTH,
        retrieval_vector_size=DIMENSION,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        is_encoder_decoder=True,
    )
    model = RagTokenForGeneration(
        config, question_encoder=tiny.question_encoder, generator=tiny.generator
    ).eval()
    model.save_pretrained(folder)
    for part in ("question_encoder_tokenizer", "generator_tokenizer"):
        tokenizer().save_pretrained(folder / part)


def tokenizer(vocabulary: list[str] | None = None) -> PreTrainedTokenizerFast:
    """WordPiece over single letters: as many tokens as the tiny models have."""
    words = vocabulary or letters()
    backend = Tokenizer(
        models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = WordPieceDecoder()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def letters() -> list[str]:
    words = [*SPECIAL, *string.ascii_lowercase, *(f"##{one}" for one in string.ascii_lowercase), *"/,.?'"]
    assert len(words) == VOCAB_SIZE
    return words


def build_index(folder: Path, *, dimension: int = DIMENSION, passages: int = 9, seed: int = 0) -> None:
    """Builds an index of random passages with random embeddings by the rag-index command."""
    rng, numbers = random.Random(seed), np.random.default_rng(seed)
    corpus = folder.parent / f"{folder.name}.jsonl"
    with corpus.open("w", encoding="utf-8") as stream:
        for number in range(passages):
            text = " ".join(word(rng) for _ in range(rng.randint(3, 7)))
            embedding = numbers.normal(size=dimension).tolist()
            line = {
                "key": f"d{number}",
                "title": word(rng),
                "text": text.capitalize(),
                "embedding": embedding,
                "metadata": {"number": number},
            }
            stream.write(json.dumps(line) + "\n")
    command = [sys.executable, "-m", "retriever_service.ingest.cli", "build"]
    flags = [f"--input={corpus}", f"--output={folder}", f"--embedding-model-name={EMBEDDING_MODEL}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def word(rng: random.Random) -> str:
    return "".join(rng.choice("bklmnrst") + rng.choice("aeiou") for _ in range(rng.randint(1, 2)))
