"""Whether a service can take work: named conditions, each with the reason why it is not met."""

import asyncio
from collections.abc import Callable, Mapping

# Health service name that is SERVING as long as the process works at all, ready or not.
LIVENESS = "liveness"


class Readiness:
    """Ready when every condition is met and nobody has asked for a shutdown.

    All methods belong to the event loop's thread. Listeners get the new state after each change between ready
    and not ready.
    """

    def __init__(self, *conditions: str) -> None:
        self._unmet: dict[str, str] = dict.fromkeys(conditions, "starting")
        self._shutdown_reason: str | None = None
        self._listeners: list[Callable[[bool], None]] = []
        self._ready = asyncio.Event()
        self._publish()

    @property
    def is_ready(self) -> bool:
        """Whether work is welcome now."""
        return self._ready.is_set()

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why the service is not ready: a reason for each condition that is not met; empty when ready."""
        shutdown = {} if self._shutdown_reason is None else {"shutdown": self._shutdown_reason}
        return {**shutdown, **self._unmet}

    def set_met(self, condition: str) -> None:
        """Records that a condition holds."""
        self._unmet.pop(condition, None)
        self._publish()

    def set_unmet(self, condition: str, reason: str) -> None:
        """Records that a condition, known or new, does not hold, and why."""
        self._unmet[condition] = reason
        self._publish()

    def shut_down(self, reason: str = "shutting down") -> None:
        """Makes the service not ready for good."""
        self._shutdown_reason = reason
        self._publish()

    def on_change(self, listener: Callable[[bool], None]) -> None:
        """Calls `listener` with the state now and after every later change."""
        self._listeners.append(listener)
        listener(self.is_ready)

    async def wait_ready(self) -> None:
        """Returns once the service is ready."""
        await self._ready.wait()

    def _publish(self) -> None:
        ready = not self._unmet and self._shutdown_reason is None
        if ready == self.is_ready:
            return
        if ready:
            self._ready.set()
        else:
            self._ready.clear()
        for listener in self._listeners:
            listener(ready)
