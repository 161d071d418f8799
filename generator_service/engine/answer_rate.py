"""How fast questions have been answered lately: what a caller is told who must come again."""

from __future__ import annotations

from collections import deque

_WINDOW_S = 10.0
_MOST = 512
_SHORTEST_S, _LONGEST_S, _UNKNOWN_S = 0.05, 30.0, 1.0


class AnswerRate:
    """Answers of the last ten seconds, the newest 512 of them."""

    def __init__(self) -> None:
        self._answered_s: deque[float] = deque(maxlen=_MOST)

    def count(self, now_s: float) -> None:
        """One more answer; now_s is on time.monotonic's clock."""
        self._answered_s.append(now_s)

    def per_second(self, now_s: float) -> float:
        """Answers a second; 0 where there were none."""
        while self._answered_s and self._answered_s[0] < now_s - _WINDOW_S:
            self._answered_s.popleft()
        if not self._answered_s:
            return 0.0
        full = len(self._answered_s) == _MOST
        return len(self._answered_s) / max(now_s - self._answered_s[0] if full else _WINDOW_S, 1e-3)

    def seconds_for(self, count: int, now_s: float) -> float:
        """Seconds in which count questions are answered at this rate, between 0.05 and 30; 1 where nothing is known."""
        rate = self.per_second(now_s)
        return min(max(count / rate, _SHORTEST_S), _LONGEST_S) if rate else _UNKNOWN_S
