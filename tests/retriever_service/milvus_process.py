"""The process of a Milvus server of the tests."""

import subprocess
import time
from collections.abc import Callable


class MilvusProcess:
    """One server process; `stop` kills it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that serves."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """Kills it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _await(self, is_well: Callable[[], bool], within_s: float) -> None:
        """Waits until it answers. Raises RuntimeError where it has ended by itself, or TimeoutError."""
        assert self._process is not None
        until_s = time.monotonic() + within_s
        while time.monotonic() < until_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"Milvus ended by itself: exit code {self._process.returncode}")
            if is_well():
                return
            time.sleep(0.05)
        raise TimeoutError(f"Milvus does not answer within {within_s} s")
