"""Loading tokenizers, what a checkpoint says, and the digest that both services compute."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rag_serving.errors import CancelledByCallerError, DeadlineExceededError
from rag_serving.tokenizer_digest import tokenizer_digest
from retriever_service.context.assembler import ContextAssembler
from retriever_service.context.encoder import ContextParts
from retriever_service.context.tokenizer import (
    ContextDefaults,
    ContextTokenizer,
    load_context_defaults,
    load_context_tokenizer,
    load_question_tokenizer,
)
from retriever_service.errors import TokenizerError
from retriever_service.work_limit import WorkLimit
from tests.retriever_service.tiny_models import WORDS, bpe_tokenizer, save_checkpoint, wordpiece_tokenizer

SPECIAL = {"pad": 0, "bos": 1, "eos": None}


def digest_of(tokenizer: Any) -> str:
    return ContextTokenizer(tokenizer).digest


def test_digest_does_not_depend_on_layout_truncation_or_padding() -> None:
    plain = {"model": {"vocab": {"a": 0, "b": 1}}, "truncation": None, "padding": None}
    other = {"padding": {"length": 5}, "truncation": {"max_length": 3}, "model": {"vocab": {"b": 1, "a": 0}}}
    assert tokenizer_digest(json.dumps(plain), SPECIAL) == tokenizer_digest(
        json.dumps(other, indent=4), SPECIAL
    )


def test_digest_depends_on_vocabulary_and_special_ids() -> None:
    plain = json.dumps({"model": {"vocab": {"a": 0}}})
    digests = {
        tokenizer_digest(plain, SPECIAL),
        tokenizer_digest(json.dumps({"model": {"vocab": {"a": 1}}}), SPECIAL),
        tokenizer_digest(plain, SPECIAL | {"eos": 2}),
    }
    assert len(digests) == 3
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


@pytest.mark.parametrize(("backend", "special"), [("[]", SPECIAL), ("{}", {"pad": 0})])
def test_digest_refuses_what_it_cannot_describe(backend: str, special: dict[str, int | None]) -> None:
    with pytest.raises(ValueError, match="must"):
        tokenizer_digest(backend, special)


def test_digest_survives_saving_use_and_loading(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    before = digest_of(tokenizer)
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=7)
    assert digest_of(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    assert load_context_tokenizer(str(tmp_path)).digest == before
    assert digest_of(wordpiece_tokenizer()) != before


def test_rag_checkpoint_gives_both_tokenizers_and_its_settings(tmp_path: Path) -> None:
    folder = str(
        save_checkpoint(
            tmp_path, bpe_tokenizer(), wordpiece_tokenizer(), title_sep=" | ", doc_sep="\n", n_docs=3
        )
    )
    assert load_context_tokenizer(folder).digest == digest_of(bpe_tokenizer())
    question_tokenizer = load_question_tokenizer(folder, required=False)
    assert question_tokenizer is not None
    ids = np.asarray(wordpiece_tokenizer()(["the river"])["input_ids"])
    assert question_tokenizer.decode(ids) == ["the river"]
    assert load_context_defaults(folder) == ContextDefaults(" | ", "\n", None, 40, 3)


def test_prefix_is_the_generators(tmp_path: Path) -> None:
    config = {"model_type": "rag", "prefix": "not this", "generator": {"prefix": "this: "}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_context_defaults(str(tmp_path)).prefix == "this: "


def test_tokenizer_folder_says_nothing_about_settings_or_questions(tmp_path: Path) -> None:
    bpe_tokenizer().save_pretrained(tmp_path)
    assert load_context_defaults(str(tmp_path)) == ContextDefaults()
    assert load_question_tokenizer(str(tmp_path), required=False) is None
    assert load_question_tokenizer(str(tmp_path), required=True) is not None


def test_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        load_context_tokenizer(str(tmp_path))
    with pytest.raises(TokenizerError, match="no folder"):
        load_context_defaults(str(tmp_path / "nowhere"))


def test_tokenizer_that_assembly_cannot_use_is_refused() -> None:
    without_pad = bpe_tokenizer()
    without_pad.pad_token = None
    with pytest.raises(TokenizerError, match="no pad token"):
        ContextTokenizer(without_pad)
    left = bpe_tokenizer()
    left.truncation_side = "left"
    with pytest.raises(TokenizerError, match="truncates on the left"):
        ContextTokenizer(left)
    with pytest.raises(TokenizerError, match="no fast"):
        ContextTokenizer(object())


def test_missing_documents_give_empty_contexts() -> None:
    assembler = ContextAssembler(
        ContextTokenizer(bpe_tokenizer()), title_sep=" / ", doc_sep=" // ", prefix=""
    )
    part = ContextParts("t", "text", "question")
    contexts = assembler.assemble([None, part, None], max_combined_length=50)
    assert contexts.attention_mask.any(axis=1).tolist() == [False, True, False]
    assert (contexts.input_ids[0] == assembler.tokenizer.pad_token_id).all()
    assert assembler.assemble([], max_combined_length=50).input_ids.shape == (0, 0)
    assert assembler.assemble([None], max_combined_length=50).input_ids.shape == (1, 0)
    with pytest.raises(ValueError, match="at least 3"):
        assembler.assemble([part], max_combined_length=2)


def test_threads_assemble_at_once_and_get_the_same() -> None:
    assembler = ContextAssembler(
        ContextTokenizer(bpe_tokenizer()), title_sep=" / ", doc_sep=" // ", prefix=""
    )
    parts = [ContextParts("t", " ".join(WORDS[:length]), "q") for length in range(40)]
    expected = {
        length: assembler.assemble(parts, max_combined_length=length).input_ids for length in (10, 20, 30)
    }
    wrong: list[int] = []

    def assemble(length: int) -> None:
        for _ in range(20):
            contexts = assembler.assemble(parts, max_combined_length=length)
            if not np.array_equal(contexts.input_ids, expected[length]):
                wrong.append(length)

    threads = [threading.Thread(target=assemble, args=(length,)) for length in (10, 20, 30, 10, 20, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_long_texts_are_encoded_no_longer_than_somebody_waits() -> None:
    """One call of the backend took all texts, and as long as it took."""
    tokenizer = ContextTokenizer(bpe_tokenizer())
    texts = ["river " * 30_000] * 3
    gone = WorkLimit(num_waiting=1)
    encoded = []

    class Counting:
        def encode_batch_fast(self, texts: list[str], **_: Any) -> list[Any]:
            encoded.append(len(texts))
            gone.leave()
            return []

    tokenizer._backend = Counting()  # type: ignore[assignment]
    with pytest.raises(CancelledByCallerError):
        gone.run(tokenizer.encode_ids, texts)
    assert encoded == [1]
    with pytest.raises(DeadlineExceededError):
        WorkLimit(deadline_s=0.0).run(tokenizer.encode_ids, ["short"])
    assert encoded == [1]
