"""Tokenizers and corpora small enough to make in a test: nothing is downloaded."""

import json
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BartConfig, BertConfig, PreTrainedTokenizerFast, RagConfig

WORDS = re.findall(
    r"\w+",
    "the a of in river city capital lake mountain island king queen painter metal planet moon ocean desert"
    " bridge tower stone north south east west old new long high deep small born found made wrote ruled"
    " who what where when which is was are were lies flows stands about between under over first last",
)


def wordpiece_tokenizer(*, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """BERT's way: WordPiece, [CLS] … [SEP]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    # Written out, not trained: the trainer breaks ties by chance.
    characters = sorted(set(string.printable.strip()) | set("éß中文"))
    pieces = [*special, *characters, *(f"##{character}" for character in characters), *WORDS]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.add_special_tokens(special)
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    ids = [("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]"))]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=512,
    )


def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """BART's way: byte-level BPE, <s> … </s>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_training_text()], trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=512,
    )


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """T5's way: SentencePiece unigram with a space mark, nothing before and </s> after; no bos."""
    characters = sorted(set(string.printable.strip()))
    pieces = [("▁", -2.0), *((f"▁{word}", -3.0) for word in WORDS), *((one, -6.0) for one in characters)]
    backend = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], unk_id=2))
    backend.add_special_tokens(["<pad>", "</s>", "<unk>"])
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=512
    )


def save_checkpoint(folder: Path, generator: Any, question: Any, **config: Any) -> Path:
    """Writes what the retriever reads of a RAG checkpoint: both tokenizers and config.json."""
    generator.save_pretrained(folder / "generator_tokenizer")
    question.save_pretrained(folder / "question_encoder_tokenizer")
    tiny_config(**config).save_pretrained(folder)
    return folder


def tiny_config(**overrides: Any) -> RagConfig:
    """A RagConfig with Hugging Face's separators."""
    return RagConfig(
        question_encoder=BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1).to_dict(),
        generator=BartConfig(d_model=16, encoder_layers=1, decoder_layers=1).to_dict(),
        **({"title_sep": " / ", "doc_sep": " // ", "n_docs": 5, "max_combined_length": 40} | overrides),
    )


def make_documents(num_documents: int, dim: int, seed: int = 0) -> list[dict[str, Any]]:
    """Passages of random words with random embeddings, as JSONL fields."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((num_documents, dim)).astype(np.float32)
    return [
        {
            "key": f"doc-{row}",
            "title": f'"{rng.choice(WORDS)} {row}"' if row % 3 == 0 else str(rng.choice(WORDS)),
            "text": "  ".join(rng.choice(WORDS, size=int(rng.integers(3, 60)))),
            "embedding": vectors[row].tolist(),
            **({} if row % 11 == 10 else {"metadata": make_metadata(row)}),
        }
        for row in range(num_documents)
    ]


def make_metadata(row: int) -> dict[str, Any]:
    """Every kind of value that a filter may meet, and those that it compares with nothing."""
    return {
        "language": ("en", "de", "fr")[row % 3],
        "year": 1990 + row % 30,
        "weight": row / 8,
        "open": row % 2 == 0,
        "source": {"name": f"source {row % 5}"},
        "mixed": ("1", 1, True, None, [1], 1.5)[row % 6],
    }


def write_jsonl(file: Path, documents: list[dict[str, Any]]) -> Path:
    """Writes a corpus."""
    file.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return file


def embeddings_of(documents: list[dict[str, Any]]) -> np.ndarray:
    """float32 [documents, dim]."""
    return np.asarray([document["embedding"] for document in documents], dtype=np.float32)


def _training_text() -> str:
    return " ".join(WORDS * 3) + " / // ? ! , . ' \" ( ) - 0 1 2 3 4 5 6 7 8 9 "
