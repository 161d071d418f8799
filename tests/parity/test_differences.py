"""The differences to transformers that docs/parity.md lists: what it does, and what is done here instead."""

from __future__ import annotations

import pytest
import torch

from generator_service.types import Compatibility, EarlyStopping, Hypothesis, SequenceDecoding, Strategy
from tests.parity import cases, engine, oracle
from tests.parity.oracle import Batch, Question
from tests.parity.tiny_models import TinyRag, tiny_rag


def ours(
    rag: TinyRag, batch: Batch, settings: cases.GenerationSettings, **how: object
) -> list[list[Hypothesis]]:
    strategy = how.pop("strategy", Strategy.RAG_SEQUENCE)
    requests = engine.requests_of(batch, settings, strategy, **how)  # type: ignore[arg-type]
    return engine.answers_to(engine.new_runner(rag.backbone), requests)


def with_appended_pads(batch: Batch, count: int) -> Batch:
    """The same questions beside a longer one, which is what makes transformers pad."""
    longer = Question([[9] * (batch.width + count)] * batch.n_docs, [0.0] * batch.n_docs)
    return Batch([*batch.questions, longer], batch.pad_token_id)


@pytest.mark.parametrize("family", ["bart", "t5-gated"])
def test_pads_are_masked_while_candidates_are_generated(family: str) -> None:
    """Stock RAG-Sequence attends to pads there, so that a longer neighbour changes an answer."""
    rag = tiny_rag(family, 1)
    rag.set_n_docs(3)
    batch = cases.random_batch(rag, 2, n_docs=3, size=1)
    beside = with_appended_pads(batch, 12)
    settings = cases.plain_settings(rag, num_beams=3, num_return_sequences=3, max_length=10)

    stock = [oracle.rag_sequence(rag.sequence, b, settings, masked=False)[0] for b in (batch, beside)]
    assert [a.token_ids for a in stock[0]] != [a.token_ids for a in stock[1]]
    hf = [ours(rag, b, settings, compatibility=Compatibility.HF)[0] for b in (batch, beside)]
    engine.assert_same(hf, stock, settings)
    masked = [ours(rag, b, settings)[0] for b in (batch, beside)]
    assert [h.token_ids for h in masked[0]] == [h.token_ids for h in masked[1]]
    assert [h.score for h in masked[0]] == pytest.approx([h.score for h in masked[1]], abs=1e-5)


@pytest.mark.parametrize("family", ["bart", "t5-pad3"])
def test_prior_counts_for_an_empty_answer(family: str) -> None:
    """Stock scoring adds the prior to the second target, which an empty answer has not."""
    rag = tiny_rag(family, 0)
    rag.set_n_docs(2)
    question = cases.random_batch(rag, 3, n_docs=2, size=1).questions[0]
    flat = Batch([Question(question.contexts, [0.0, 0.0])], rag.pad_token_id)
    steep = Batch([Question(question.contexts, [9.0, 0.0])], rag.pad_token_id)
    empty = (rag.eos_token_id,)
    settings = cases.plain_settings(rag, num_beams=2, max_length=4, allowed_sequences=(empty, (5, *empty)))

    def score_of_empty(batch: Batch, compatibility: Compatibility) -> float:
        every = cases.changed(settings, num_return_sequences=2)
        (answers,) = ours(rag, batch, every, compatibility=compatibility)
        return next(h.score for h in answers if len(h.token_ids) == 2)

    hf = [score_of_empty(b, Compatibility.HF) for b in (flat, steep)]
    assert hf[0] == pytest.approx(hf[1], abs=1e-5)
    masked = [score_of_empty(b, Compatibility.MASKED) for b in (flat, steep)]
    assert abs(masked[0] - masked[1]) > 1e-2
    for batch, score in ((flat, hf[0]), (steep, hf[1])):
        (stock,) = oracle.rag_sequence(
            rag.sequence, batch, cases.changed(settings, num_return_sequences=2), masked=False
        )
        assert any(a.score == pytest.approx(score, abs=1e-4) for a in stock if len(a.token_ids) == 2)


def test_bos_is_left_out_of_each_candidate_that_begins_with_it() -> None:
    """Stock scoring leaves it out only if all candidates of the question begin with it."""
    rag = tiny_rag("bart", 0)
    bos, end = 0, rag.eos_token_id
    assert rag.bos_token_id == bos
    batch = cases.random_batch(rag, 3, n_docs=2, size=1)
    settings = cases.plain_settings(
        rag,
        num_beams=2,
        num_return_sequences=2,
        max_length=6,
        allowed_sequences=((bos, 5, 6, end), (7, 8, end)),
    )
    score = {}
    for compatibility in Compatibility:
        (answers,) = ours(rag, batch, settings, compatibility=compatibility)
        score[compatibility] = {h.token_ids[1]: h.score for h in answers}
        likelihood = {h.token_ids[1]: h.log_likelihood for h in answers}
        assert set(likelihood) == {bos, 7}
    hf, masked = score[Compatibility.HF], score[Compatibility.MASKED]
    assert hf[7] == pytest.approx(masked[7], abs=1e-5)
    assert hf[bos] == pytest.approx(likelihood[bos], abs=1e-5)
    assert masked[bos] > hf[bos] + 0.1


def test_any_n_docs_is_scored() -> None:
    """Stock RagSequence.generate scores with its config's n_docs, whatever it was asked."""
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 3, n_docs=4, size=1)
    settings = cases.plain_settings(rag, num_beams=2, max_length=6)
    rag.set_n_docs(3)
    with pytest.raises((RuntimeError, AssertionError)):
        oracle.rag_sequence(rag.sequence, batch, settings, masked=False)
    (answers,) = ours(rag, batch, settings)
    assert len(answers[0].document_posterior) == 4


def test_fewer_candidates_than_asked_for_are_returned_as_they_are() -> None:
    """Stock RagSequence.generate fails in topk."""
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 3, n_docs=2, size=1)
    settings = cases.plain_settings(rag, num_beams=2, num_return_sequences=5, max_length=3)
    rag.set_n_docs(2)
    with pytest.raises(RuntimeError, match="out of range"):
        oracle.rag_sequence(rag.sequence, batch, settings, masked=False)
    (answers,) = ours(rag, batch, settings)
    assert 2 <= len(answers) < 5


@pytest.mark.parametrize("strategy", list(Strategy))
def test_dead_beams_leave_no_heirs(strategy: Strategy) -> None:
    """Where fewer answers than beams are allowed, stock beam search returns repetitions of score -1e9."""
    rag = tiny_rag("t5-pad3", 0)
    end = rag.eos_token_id
    batch = cases.random_batch(rag, 3, n_docs=2, size=1)
    allowed = ((5, end), (6, 7, end))
    settings = cases.plain_settings(
        rag, num_beams=4, num_return_sequences=4, max_length=8, allowed_sequences=allowed, length_penalty=2.0
    )
    (stock,) = oracle.rag_token(rag.token, batch, settings)
    assert sum(a.score is not None and a.score < -1e6 for a in stock) == 2
    (answers,) = ours(rag, batch, settings, strategy=strategy)
    assert {tuple(h.token_ids[1:]) for h in answers} == set(allowed)
    assert len(answers) == 2


def test_no_answer_is_returned_where_none_is_possible() -> None:
    rag = tiny_rag("t5-pad3", 0)
    batch = cases.random_batch(rag, 3, n_docs=2, size=1)
    nothing = cases.plain_settings(
        rag, num_beams=3, max_length=5, suppress_tokens=tuple(range(rag.backbone.vocab_size))
    )
    for strategy in Strategy:
        for decoding in SequenceDecoding:
            assert ours(rag, batch, nothing, strategy=strategy, decoding=decoding) == [[]]
        sampled = cases.changed(nothing, do_sample=True, top_p=0.9, typical_p=0.9, renormalize_logits=True)
        assert ours(rag, batch, sampled, strategy=strategy) == [[]]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("strategy", list(Strategy))
def test_chain_with_no_token_left_ends(strategy: Strategy, do_sample: bool) -> None:
    """transformers takes token 0 from then on, or fails to sample: and with it, here, all in the step would."""
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 3, n_docs=2, size=1)
    settings = cases.plain_settings(
        rag,
        max_length=6,
        do_sample=do_sample,
        top_p=0.9 if do_sample else 1.0,
        renormalize_logits=do_sample,
        suppress_tokens=tuple(range(rag.backbone.vocab_size)),
    )
    (answers,) = ours(rag, batch, settings, strategy=strategy)
    assert [h.token_ids for h in answers] == [[rag.decoder_start_token_id, rag.eos_token_id]]


@pytest.mark.parametrize("case", range(4))
def test_short_candidates_are_not_filled_with_end_tokens(case: int) -> None:
    """Where the pad id is 0, stock beam search fills with end tokens, and RAG-Sequence then scores them."""
    rag = tiny_rag("t5", 1)
    assert rag.pad_token_id == 0
    rag.set_n_docs(3)
    batch = cases.random_batch(rag, 20 + case, n_docs=3, size=1)
    settings = cases.plain_settings(rag, num_beams=4, num_return_sequences=4, max_length=8)
    (stock,) = oracle.rag_sequence(rag.sequence, batch, settings, masked=False)
    (hf,) = ours(rag, batch, settings, compatibility=Compatibility.HF)
    engine.assert_same([hf], [stock], settings)
    (masked,) = ours(rag, batch, settings)
    assert len({len(h.token_ids) for h in hf}) == 1, "all as wide as the widest"
    assert all(h.token_ids.count(rag.eos_token_id) <= 1 for h in masked)
    assert any(h.token_ids.count(rag.eos_token_id) > 1 for h in hf)


def test_answers_carry_no_pads_of_their_neighbours() -> None:
    rag = tiny_rag("t5-pad3", 0)
    batch = cases.random_batch(rag, 3, n_docs=2, size=6)
    settings = cases.plain_settings(rag, num_beams=3, num_return_sequences=3, max_length=10)
    for strategy in Strategy:
        found = [h.token_ids for q in ours(rag, batch, settings, strategy=strategy) for h in q]
        assert len({len(ids) for ids in found}) > 1
        assert all(ids[-1] != rag.pad_token_id for ids in found)


def test_rag_token_ignores_max_new_tokens_in_transformers() -> None:
    """Here settings know max_length alone, into which max_new_tokens is resolved before."""
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 3, n_docs=2, size=1)
    settings = cases.plain_settings(rag, max_length=9, min_length=8)
    arguments = oracle.generation_arguments(settings) | {"max_new_tokens": 3}
    rows = rag.token.generate(**batch.tensors(), n_docs=2, **arguments)
    assert rows.shape[1] > 4


def test_both_minima_of_length_hold() -> None:
    """In stock RAG-Sequence min_new_tokens replaces min_length, in stock RAG-Token both hold."""
    rag = tiny_rag("t5-pad3", 2)
    rag.set_n_docs(3)
    batch = cases.random_batch(rag, 4, n_docs=3, size=2)
    settings = cases.plain_settings(
        rag, num_beams=3, num_return_sequences=3, max_length=9, min_length=7, min_new_tokens=1
    )
    arguments = oracle.generation_arguments(settings)
    rows = rag.sequence.generate(**batch.tensors(), n_docs=3, **arguments).tolist()
    assert any(len(oracle.trimmed(row, settings)) < 7 for row in rows)
    for strategy in Strategy:
        assert all(len(h.token_ids) > 7 for q in ours(rag, batch, settings, strategy=strategy) for h in q)


def test_encoder_repetition_penalty_is_that_of_all_documents() -> None:
    """transformers' RAG-Token divides rows by contexts, and so gives a row one document or another question's."""
    rag = tiny_rag("bart", 1)
    batch = cases.random_batch(rag, 4, n_docs=3, size=1, ragged=False)
    settings = cases.plain_settings(
        rag, num_beams=4, num_return_sequences=4, max_length=8, encoder_repetition_penalty=3.0
    )
    found = ours(rag, batch, settings, strategy=Strategy.RAG_TOKEN)
    engine.assert_same(found, oracle.rag_token(rag.token, batch, settings), settings)
    rows = rag.token.generate(**batch.tensors(), n_docs=3, **oracle.generation_arguments(settings))
    stock = [oracle.trimmed(row, settings) for row in rows.tolist()]
    assert [h.token_ids for h in found[0]] != stock


def test_encoder_no_repeat_ngrams_are_those_of_the_questions_own_documents() -> None:
    """transformers' RAG-Token divides rows by contexts, which fails where there are fewer rows than contexts."""
    rag = tiny_rag("bart", 1)
    batch = cases.random_batch(rag, 4, n_docs=5, size=1)
    arguments = oracle.generation_arguments(
        cases.plain_settings(rag, num_beams=2, max_length=6, encoder_no_repeat_ngram_size=2)
    )
    with pytest.raises(ZeroDivisionError):
        rag.token.generate(**batch.tensors(), n_docs=5, **arguments)


def test_pads_are_no_tokens_of_the_contexts() -> None:
    """transformers' encoder processors take the pads of padded contexts for words of them."""
    rag = tiny_rag("bart", 1)
    batch = cases.random_batch(rag, 4, n_docs=3, size=1)
    assert len({len(c) for c in batch.questions[0].contexts}) > 1
    beside = with_appended_pads(batch, 5)
    settings = cases.plain_settings(rag, max_length=8, encoder_repetition_penalty=9.0)
    alone, crowded = (ours(rag, b, settings)[0] for b in (batch, beside))
    assert [h.token_ids for h in alone] == [h.token_ids for h in crowded]
    assert not any(rag.pad_token_id in h.token_ids for h in alone)


def test_rag_token_samples_as_many_sequences_as_are_asked_for() -> None:
    """Stock RagToken.generate returns one a question while sampling."""
    rag = tiny_rag("bart", 0)
    batch = cases.random_batch(rag, 4, n_docs=2, size=1)
    settings = cases.plain_settings(rag, max_length=8, do_sample=True, num_return_sequences=3)
    assert len(oracle.rag_token(rag.token, batch, settings)[0]) == 1
    assert len(ours(rag, batch, settings, strategy=Strategy.RAG_TOKEN)[0]) == 3


def test_stock_scoring_reads_a_bos_id_that_t5_configs_lack() -> None:
    """RagSequence.generate raises over a plain T5Config; here a missing BOS is simply none."""
    rag = tiny_rag("t5-pad3", 0)
    rag.set_n_docs(2)
    batch = cases.random_batch(rag, 4, n_docs=2, size=1)
    settings = cases.plain_settings(rag, num_beams=2, max_length=6)
    config = rag.sequence.config.generator
    assert config.bos_token_id is None
    del config.bos_token_id
    try:
        with pytest.raises(AttributeError, match="bos_token_id"):
            oracle.rag_sequence(rag.sequence, batch, settings, masked=False)
        assert ours(rag, batch, settings)[0]
    finally:
        config.bos_token_id = None


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", list(EarlyStopping))
@pytest.mark.parametrize("family", ["bart", "t5-pad3"])
def test_search_that_stops_by_itself_finds_what_a_joint_one_finds(
    family: str, early_stopping: EarlyStopping, length_penalty: float
) -> None:
    """transformers steps on until the last question or document is done: the others then change no more."""
    rag = tiny_rag(family, 1)
    rag.set_n_docs(4)
    batch = cases.random_batch(rag, 31, n_docs=4, size=4)
    settings = cases.plain_settings(
        rag,
        num_beams=3,
        num_return_sequences=3,
        max_length=12,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
    )
    joint = oracle.rag_token(rag.token, batch, settings)
    engine.assert_same(ours(rag, batch, settings, strategy=Strategy.RAG_TOKEN), joint, settings)
    joint = oracle.rag_sequence(rag.mathematical, batch, settings, masked=True)
    engine.assert_same(ours(rag, batch, settings), joint, settings)


@pytest.mark.parametrize("family", ["bart", "t5-pad3"])
@pytest.mark.parametrize("case", range(4))
def test_fast_decoding_counts_documents_whose_beam_held_the_answer(case: int, family: str) -> None:
    """The paper's fast decoding, which transformers has not: from its generator's own beams, by hand."""
    rag = tiny_rag(family, case % 3)
    batch = cases.random_batch(rag, 50 + case, n_docs=3, size=1)
    question = batch.questions[0]
    settings = cases.plain_settings(rag, num_beams=4, num_return_sequences=12, max_length=7)
    arguments = oracle.generation_arguments(settings) | {"num_return_sequences": 4}
    prior = torch.tensor(question.doc_scores).log_softmax(0)
    expected: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for document, context in enumerate(question.contexts):
        ids = torch.tensor([context])
        mask = torch.ones_like(ids)
        rows = rag.generator.generate(ids, attention_mask=mask, **arguments).tolist()
        for row in rows:
            answer = oracle.trimmed(row, settings)
            with torch.no_grad():
                logits = rag.generator(
                    input_ids=ids, attention_mask=mask, decoder_input_ids=torch.tensor([answer])
                ).logits
            first = 1 if answer[1] == rag.bos_token_id else 0
            chosen = logits[0].log_softmax(1)[range(len(answer) - 1), answer[1:]]
            expected.setdefault(tuple(answer), []).append(chosen[first:].sum() + prior[document])

    (found,) = ours(rag, batch, settings, decoding=SequenceDecoding.FAST)
    assert {tuple(h.token_ids) for h in found} == set(expected)
    for hypothesis in found:
        likelihoods = torch.stack(expected[tuple(hypothesis.token_ids)])
        assert hypothesis.score == pytest.approx(float(likelihoods.logsumexp(0)), abs=1e-4)
        held = sum(share > 0 for share in hypothesis.document_posterior)
        assert held == len(likelihoods)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
