"""Searches of one shape, advanced together: state tensors over all, one vectorised update a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from generator_service.decoding import beam, certainty, chains, marginalize, sampling, top_tokens
from generator_service.engine.messages import Progress
from generator_service.engine.pool_scores import PoolScores, StepScores
from generator_service.engine.search import FoundHypothesis, PoolKey, Search
from generator_service.model.backbone import RowBlock
from generator_service.transfers import to_device


class SearchPool:
    """Adds, advances and removes searches with the same PoolKey."""

    def __init__(self, key: PoolKey) -> None:
        self.key = key
        self.searches: list[Search] = []
        self._beams: beam.BeamState | None = None
        self._chains: chains.ChainState | None = None

    def add(self, search: Search) -> None:
        """A search joins at its first token."""
        device = search.log_prior.device
        if self.key.beam:
            begun = beam.start(search.settings, self.key.num_docs, device)
            self._beams = begun if self._beams is None else self._beams.joined_by(begun)
        else:
            chain = chains.start(search.settings, self.key.width, self.key.num_docs, device)
            self._chains = chain if self._chains is None else self._chains.joined_by(chain)
        self.searches.append(search)

    def blocks(self) -> list[RowBlock | None]:
        """The rows of each search's next step; None where nothing need be computed."""
        state = self._state
        last = (state.cur_len - 1)[:, None].expand(-1, self.key.width)  # [searches, width]
        newest = state.running.gather(2, last[:, :, None])[:, :, 0]
        own = torch.eye(self.key.width, dtype=torch.bool, device=newest.device)
        return [
            None
            if s.ends_forced
            else s.block(newest[i, : s.rows], last[i, : s.rows], own[: s.rows, : s.rows])
            for i, s in enumerate(self.searches)
        ]

    def advance(self, scores: PoolScores) -> None:
        """Take one token in every search."""
        if self.key.beam:
            self._advance_beams(scores)
        else:
            self._advance_chains(scores)
        for search in self.searches:
            search.cur_len += 1

    def news(self) -> list[Tensor]:
        """What the host must know of a step: who is done, and what is certain of the searches that stream."""
        streaming = self._streaming
        if not streaming:
            return [self._state.done]
        index = to_device(streaming, torch.int64, self._state.done.device)
        if self._beams is not None:
            return [self._state.done, *certainty.of_beams(self._beams, index)]
        assert self._chains is not None
        return [self._state.done, *certainty.of_chains(self._chains, index)]

    def progress(self, news: list[Tensor]) -> list[Progress]:
        """What has become certain in searches that go on and whose requests stream; news are on the host."""
        if len(news) == 1:
            return []
        done, (lengths, examples, history) = news[0].tolist(), news[1:]
        found = []
        for place, (index, length) in enumerate(zip(self._streaming, lengths.tolist(), strict=True)):
            search = self.searches[index]
            sent = 1 + search.request.num_streamed
            if length > sent and not done[index]:
                found.append(
                    search.progress(examples[place, sent:length].tolist(), history[place, sent:length])
                )
        return found

    def take_finished(self, done: Sequence[bool]) -> tuple[list[Search], list[Tensor]]:
        """Remove the searches that are done; they, and what hypotheses_of wants of them on the host."""
        if not any(done):
            return [], []
        found, kept = ([i for i, d in enumerate(done) if d is which] for which in (True, False))
        searches, index = (
            [self.searches[i] for i in found],
            to_device(found, torch.int64, self._state.done.device),
        )
        if self._beams is not None:
            ended = self._beams.select(index)
            results = [ended.lengths, ended.sequences, ended.log_probs, ended.scores, beam.is_real(ended)]
        else:
            assert self._chains is not None
            ran = self._chains.select(index)
            results = [ran.lengths, ran.running, ran.running_log_probs]
        self._keep(kept)
        return searches, results

    def remove_request(self, request_id: int) -> None:
        """Forget the searches of a request."""
        self._keep([i for i, s in enumerate(self.searches) if s.request.request_id != request_id])

    @property
    def _streaming(self) -> list[int]:
        return [i for i, s in enumerate(self.searches) if s.request.streams]

    @property
    def _state(self) -> beam.BeamState | chains.ChainState:
        state = self._beams if self.key.beam else self._chains
        assert state is not None
        return state

    def _keep(self, kept: list[int]) -> None:
        if len(kept) == len(self.searches):
            return
        index = to_device(kept, torch.int64, self._state.done.device)
        if self._beams is not None:
            self._beams = self._beams.select(index)
        if self._chains is not None:
            self._chains = self._chains.select(index)
        self.searches = [self.searches[i] for i in kept]

    # --- beams

    def _advance_beams(self, pool: PoolScores) -> None:
        state = self._beams
        assert state is not None
        top_log_probs, top_ids = self._top_tokens_of_all(pool, state)
        best, parents, tokens = beam.select_continuations(
            top_log_probs, top_ids, state.running_scores, self.key.keep
        )
        for i, search in enumerate(self.searches):
            if search.random is not None and search.forced_token is None:
                best[i], parents[i], tokens[i] = self._drawn(i, pool.of(i), state)
        history = pool.token_log_probs(parents, tokens)
        self._beams, live_parents = beam.advance(state, best, parents, tokens, history)
        rows = to_device([[s.rows] for s in self.searches], torch.int64, live_parents.device)
        for search, moved in zip(self.searches, torch.minimum(live_parents, rows - 1), strict=True):
            search.follow(moved)

    def _top_tokens_of_all(self, pool: PoolScores, state: beam.BeamState) -> tuple[Tensor, Tensor]:
        """The best continuations of each beam: log-probabilities and token ids, each [searches, beams, k]."""
        together = pool.best_tokens()
        apart = {
            i: self._top_tokens(s, pool.of(i), state.running[i, : s.rows, : s.cur_len])
            for i, s in enumerate(self.searches)
            if together is None or i not in together.found
        }
        if together is None:
            width = max(t[0].shape[1] for t in apart.values())
            tops = list(apart.values())
            return (
                torch.stack([self._widened(t[0], width, float("-inf")) for t in tops]),
                torch.stack([self._widened(t[1], width, 0) for t in tops]),
            )
        for i, (log_probs, ids) in apart.items():
            rows, count = ids.shape
            together.log_probs[i, :rows, :count], together.ids[i, :rows, :count] = log_probs, ids
        return together.log_probs, together.ids

    def _top_tokens(self, search: Search, scores: StepScores, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The best continuations of each row: log-probabilities and token ids, each [rows, k]."""
        if search.forced_token is not None:
            forced = input_ids.new_full((search.rows, 1), search.forced_token)
            return torch.zeros(forced.shape, device=input_ids.device), forced
        assert scores.logits is not None
        assert scores.lse is not None
        keep = min(self.key.keep, scores.logits.shape[-1])
        if search.random is not None:  # its continuations are drawn, these only hold their place
            place = torch.zeros((search.rows, keep), dtype=torch.int64, device=input_ids.device)
            return place.float(), place
        if self.key.num_docs == 1 and search.banned_tokens is not None:
            values, ids = top_tokens.likeliest(scores.logits[0], keep, search.banned_tokens)
            return values - scores.lse[0][:, None], ids
        likeliest = self._likeliest_mixed(search, scores, keep)
        if likeliest is not None:
            return likeliest
        mixture = search.processed(self._mixture(search, scores), input_ids)
        values, ids = mixture.topk(keep, dim=-1)
        return values, ids

    def _widened(self, top: Tensor, width: int, fill: float) -> Tensor:
        """[rows, k] -> [beams, width]: the first step's one row stands for all its equal beams."""
        wide = top.new_full((self.key.width, width), fill)
        wide[:, : top.shape[1]] = top
        return wide

    def _drawn(self, index: int, scores: StepScores, state: beam.BeamState) -> tuple[Tensor, Tensor, Tensor]:
        search = self.searches[index]
        assert search.random is not None
        input_ids = state.running[index, : search.rows, : search.cur_len]
        log_probs = search.processed(self._mixture(search, scores), input_ids).expand(self.key.width, -1)
        return sampling.draw_continuations(
            log_probs, state.running_scores[index], self.key.keep, search.random
        )

    @staticmethod
    def _likeliest_mixed(search: Search, scores: StepScores, keep: int) -> tuple[Tensor, Tensor] | None:
        """What `processed` would leave at the top of the mixture, where that can be told without it."""
        banned = search.banned_tokens
        if scores.mixture is None or banned is None:
            return None
        return top_tokens.likeliest_mixed(scores.mixture, keep, banned)

    @staticmethod
    def _mixture(search: Search, scores: StepScores) -> Tensor:
        """log p(token | prefix) of each row [rows, vocab]: of its document, or marginalised."""
        assert scores.logits is not None
        assert scores.lse is not None
        log_probs = scores.logits - scores.lse[:, :, None]
        if log_probs.shape[0] == 1:
            return log_probs[0]
        return marginalize.rag_token_mixture(log_probs, search.log_prior)

    # --- chains

    def _advance_chains(self, pool: PoolScores) -> None:
        state = self._chains
        assert state is not None
        together = pool.best_tokens()
        tokens = torch.stack(
            [
                together.ids[i, :, 0]
                # RAG-Sequence's best is that of the raw logits: log-probabilities may round two of them into one
                if together is not None and i in together.found and s.is_rag_token
                else self._next_tokens(s, pool.of(i), state.running[i, :, : s.cur_len])
                for i, s in enumerate(self.searches)
            ]
        )
        rows = torch.arange(self.key.width, device=tokens.device).expand_as(tokens)
        self._chains = chains.advance(state, tokens, pool.token_log_probs(rows, tokens))

    def _next_tokens(self, search: Search, scores: StepScores, input_ids: Tensor) -> Tensor:
        """int64 [chains]."""
        if search.forced_token is not None:
            return torch.full((self.key.width,), search.forced_token, device=input_ids.device)
        assert scores.logits is not None
        likeliest = self._likeliest_mixed(search, scores, 1)
        if likeliest is not None:
            return likeliest[1][:, 0]
        # transformers processes RAG-Sequence's raw logits here, but RAG-Token's log-probabilities, mixed or not
        mixed = self._mixture(search, scores) if search.is_rag_token else scores.logits[0]
        processed = search.processed(mixed, input_ids)
        if search.random is not None:
            return sampling.draw_tokens(processed, search.random)
        return processed.argmax(dim=-1)


def hypotheses_of(results: Sequence[Tensor]) -> list[list[FoundHypothesis]]:
    """Of each search that take_finished took, best first; results are its tensors on the host."""
    lengths, sequences, history, *scored = results
    if scored:
        scores, real = scored
    else:
        scores, real = torch.zeros(lengths.shape), torch.ones(lengths.shape, dtype=torch.bool)
    return [
        [
            FoundHypothesis(
                token_ids=sequences[search, i, : n + 1].tolist(),
                score=float(scores[search, i]),
                token_log_probs=history[search, i, 1 : n + 1],
            )
            for i, n in enumerate(lengths[search].tolist())
            if real[search, i]
        ]
        for search in range(len(lengths))
    ]
