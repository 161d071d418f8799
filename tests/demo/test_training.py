"""The training data is what it says: answers stand where their spans point, in the serving format."""

import random

import pytest

from demo.assemble import GENERATOR_DIR
from demo.training.data.example import Example, encode
from demo.training.data.mixture import IGNORED, collate
from demo.training.data.names import Names
from demo.training.data.passages import Passages
from demo.training.data.qamr import Asked, Qamr, agreed_answer, join_words
from demo.training.data.synthetic import Synthesizer, read_tables

VOCABULARY = ["[PAD]", "stone", "river", "kal", "dor", "##mar", "##tis", "##en", "bright"]


def test_synthetic_answers_stand_where_their_spans_point() -> None:
    synthesizer = Synthesizer(random.Random(1), VOCABULARY)
    for _ in range(300):
        example = synthesizer.example(6)
        assert example.answer.strip() == example.answer != ""
        assert "{" not in example.text + example.question


def test_each_slot_asked_for_is_told_by_some_sentence() -> None:
    for table in read_tables():
        told = " ".join(table.sentences).replace("{s}", "{e}")
        for slot, wording in table.questions:
            assert "{" + slot + "}" in told, (table.kind, wording)


def test_renamed_passages_still_contain_their_answers() -> None:
    rng = random.Random(2)
    passages = Passages(
        rng,
        Names(rng, VOCABULARY),
        GENERATOR_DIR.parent / "corpus.jsonl",
        GENERATOR_DIR.parent / "training" / "passages.jsonl",
    )
    titles = {row["title"] for row in passages.passages.values()}
    examples = [passages.example() for _ in range(200)]
    assert all(example.answer for example in examples)
    assert any(example.title not in titles for example in examples)


def test_join_words_undoes_the_treebank_tokenisation() -> None:
    sentence = join_words(["Liam", "-LRB-", "12", "-RRB-", "said", ",", "``", "no", "''", "."])
    assert sentence.text == 'Liam (12) said, "no".'
    assert [sentence.text[a:b] for a, b in sentence.spans][:3] == ["Liam", "(", "12"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["1 2", "7:1 2", "8:1 2 3"], (1, 2)),
        (["1 2", "7:8 9", "8:4"], None),
        (["1 3", "7:1 3", "8:1 3"], None),
        (["1", "7:invalid", "8:"], None),
    ],
)
def test_agreed_answer_needs_agreement_and_one_stretch(columns: list[str], expected: object) -> None:
    assert agreed_answer([*[""] * 6, *columns]) == expected


def test_qamr_passages_keep_the_answer_among_other_sentences(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("qamr")
    lines = [f"s{i}\tThe town of Kalmar{i} lies on the Baltic coast of Sweden .\n" for i in range(6)]
    (folder / "wiki-sentences.tsv").write_text("".join(lines), encoding="utf-8")
    row = "s1\t3\t1\t0\t1\tWhich town lies on the coast?\t3\t1:3\t2:3\n"
    (folder / "filtered_dev.tsv").write_text(row, encoding="utf-8")
    (folder / "filtered_test.tsv").write_text("", encoding="utf-8")
    qamr = Qamr(random.Random(3), folder)
    assert qamr.questions == [Asked("s1", "Which town lies on the coast?", 3, 3)]
    assert {qamr.example(4).answer for _ in range(20)} == {"Kalmar1"}
    assert all(qamr.cloze(2).answer for _ in range(20))


@pytest.mark.skipif(not (GENERATOR_DIR / "tokenizer.json").exists(), reason="no tokenizer checked out")
def test_examples_are_encoded_in_the_serving_format() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(GENERATOR_DIR)
    example = Example("Peru", "Lima is the capital of Peru.", "What is the capital of Peru?", 0, 4)
    tokens = encode(tokenizer, example, 60)
    assert tokens is not None
    text = tokenizer.decode(tokens.input_ids)
    assert text == "[CLS] peru / lima is the capital of peru. / / what is the capital of peru? [SEP]"
    batch = collate([tokens, tokens], 102)
    assert tokenizer.decode(batch.labels[0]) == "lima [SEP]"
    assert batch.decoder_input_ids(101)[0].tolist() == [101, int(batch.labels[0, 0])]
    assert IGNORED not in batch.decoder_input_ids(101)
    assert encode(tokenizer, example, 10) is None
