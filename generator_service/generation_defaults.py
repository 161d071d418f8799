"""Generation arguments: the request's, else the checkpoint's, else Hugging Face's own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from generator_service.checkpoint import Checkpoint
from generator_service.types import Compatibility, EarlyStopping, GenerationSettings, Strategy

_HF_EARLY_STOPPING = {
    False: EarlyStopping.HEURISTIC,
    True: EarlyStopping.FIRST_COMPLETE,
    "never": EarlyStopping.NEVER,
}
# RagToken ignores max_new_tokens and so its default is one token shorter (docs/parity.md, quirk 7)
_DEFAULT_MAX_LENGTH = {Strategy.RAG_TOKEN: 20, Strategy.RAG_SEQUENCE: 21}
_OFF = -1


@dataclass(frozen=True)
class GenerationDefaults:
    """Resolves arguments against a checkpoint."""

    checkpoint: Checkpoint

    def resolve(
        self,
        given: Mapping[str, Any],
        strategy: Strategy,
        seed: int,
        compatibility: Compatibility = Compatibility.MASKED,
    ) -> GenerationSettings:
        """Settings with nothing left open; given holds the arguments that the request sets, by their names."""
        do_sample = self._value(given, "do_sample", False)
        min_new_tokens = self._value(given, "min_new_tokens", 0)
        min_length = self._value(given, "min_length", 0)
        if min_new_tokens and strategy is Strategy.RAG_SEQUENCE and compatibility is Compatibility.HF:
            min_length = 0  # transformers puts the one in the other's place (docs/parity.md, quirk 20)
        return GenerationSettings(
            max_length=self._max_length(given, strategy),
            min_length=min_length,
            min_new_tokens=min_new_tokens,
            do_sample=do_sample,
            num_beams=self._value(given, "num_beams", 1),
            num_return_sequences=self._value(given, "num_return_sequences", 1),
            temperature=self._value(given, "temperature", 1.0),
            top_k=self._value(given, "top_k", 50 if do_sample else 0),
            top_p=self._value(given, "top_p", 1.0),
            min_p=self._value(given, "min_p", 0.0),
            typical_p=self._value(given, "typical_p", 1.0),
            epsilon_cutoff=self._value(given, "epsilon_cutoff", 0.0),
            eta_cutoff=self._value(given, "eta_cutoff", 0.0),
            repetition_penalty=self._value(given, "repetition_penalty", 1.0),
            encoder_repetition_penalty=self._value(given, "encoder_repetition_penalty", 1.0),
            no_repeat_ngram_size=self._value(given, "no_repeat_ngram_size", 0),
            encoder_no_repeat_ngram_size=self._value(given, "encoder_no_repeat_ngram_size", 0),
            length_penalty=self._value(given, "length_penalty", 1.0),
            early_stopping=given.get("early_stopping")
            or _HF_EARLY_STOPPING[getattr(self.checkpoint.generation, "early_stopping", None) or False],
            bad_words_ids=tuple(tuple(w) for w in self._value(given, "bad_words_ids", ())),
            suppress_tokens=tuple(self._value(given, "suppress_tokens", ())),
            begin_suppress_tokens=tuple(self._value(given, "begin_suppress_tokens", ())),
            forced_bos_token_id=self._token(given, "forced_bos_token_id"),
            forced_eos_token_id=self._token(given, "forced_eos_token_id"),
            decoder_start_token_id=self._start_token(given),
            bos_token_id=given.get("bos_token_id", self.checkpoint.bos_token_id),
            eos_token_ids=self._eos(given),
            pad_token_id=self._pad(given),
            allowed_sequences=tuple(tuple(s) for s in given.get("allowed_sequences", ())),
            renormalize_logits=self._value(given, "renormalize_logits", False),
            seed=seed,
        )

    def _value(self, given: Mapping[str, Any], name: str, default: Any) -> Any:
        if name in given:
            return given[name]
        own = getattr(self.checkpoint.generation, name, None)
        if isinstance(
            own, float
        ):  # as the contract has it: an answer is pinned to the very number that gave it
            return float(np.float32(own))
        return default if own is None else own

    def _max_length(self, given: Mapping[str, Any], strategy: Strategy) -> int:
        for name, extra in (("max_new_tokens", 1), ("max_length", 0)):
            if name in given:
                return int(given[name]) + extra
        own = self.checkpoint.generation
        if getattr(own, "max_new_tokens", None) is not None:
            return int(own.max_new_tokens) + 1
        if getattr(own, "max_length", None) is not None:
            return int(own.max_length)
        return _DEFAULT_MAX_LENGTH[strategy]

    def _token(self, given: Mapping[str, Any], name: str) -> int | None:
        if name in given:
            return None if given[name] == _OFF else int(given[name])
        own = getattr(self.checkpoint.generation, name, None)
        return None if own is None else int(own)

    def _start_token(self, given: Mapping[str, Any]) -> int:
        start = self._token(given, "decoder_start_token_id")
        if start is None:
            start = self._token(given, "bos_token_id")
        return 0 if start is None else start

    def _eos(self, given: Mapping[str, Any]) -> tuple[int, ...]:
        if given.get("eos_token_ids"):
            return tuple(given["eos_token_ids"])
        own = getattr(self.checkpoint.generation, "eos_token_id", None)
        if own is None:
            return ()
        return tuple(own) if isinstance(own, list | tuple) else (int(own),)

    def _pad(self, given: Mapping[str, Any]) -> int:
        pad = self._token(given, "pad_token_id")
        if pad is not None:
            return pad
        eos = self._eos(given)
        return eos[0] if eos else 0
