"""What a worker process is told on its command line, as one JSON text."""

from __future__ import annotations

import msgspec

from generator_service.types import Batching, ModelSource


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Device, models and limits of one worker; 0 threads are every core, a budget of 0 bytes is automatic."""

    device: str
    source: ModelSource
    threads: int
    cache_budget_bytes: int
    max_rows: int
    max_context_tokens: int
    heartbeat_s: float
    log_level: str
    log_format: str
    batching: Batching = Batching.CONTINUOUS
    max_forward_bytes: int = 256 << 20
    max_past_key_values: int = 64
    past_key_values_bytes: int = 256 << 20
    past_key_values_expires_s: float = 60.0
    cuda_graphs: bool = True

    def to_json(self) -> str:
        """As text."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> WorkerOptions:
        """From text."""
        return msgspec.json.decode(text, type=cls)
