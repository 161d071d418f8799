"""Log lines: one a record, with the request's id and extras, as text or as JSON."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from rag_serving.logging import configure_logging, request_id


@pytest.fixture(autouse=True)
def _root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(log_format: str, level: str = "info") -> list[str]:
    stream = io.StringIO()
    configure_logging(level, log_format, stream)
    token = request_id.set("r-1")
    logging.getLogger("a.b").info("found %d documents", 5, extra={"generation": 7})
    request_id.reset(token)
    logging.getLogger("a.b").debug("hidden")
    try:
        raise KeyError("x")
    except KeyError:
        logging.getLogger("a.b").exception("broke")
    return stream.getvalue().splitlines()


def test_json_lines_carry_message_request_id_extras_and_exception() -> None:
    first, second = [json.loads(line) for line in logged("json")]
    assert first["message"] == "found 5 documents"
    assert (first["level"], first["logger"], first["request_id"]) == ("info", "a.b", "r-1")
    assert first["generation"] == 7
    assert first["time"].endswith("Z")
    assert "request_id" not in second
    assert "KeyError: 'x'" in second["exception"]


def test_text_lines_carry_the_same() -> None:
    lines = logged("text")
    assert lines[0].endswith("INFO    a.b: found 5 documents generation=7 request_id=r-1")
    assert lines[1].endswith("ERROR   a.b: broke")
    assert lines[-1] == "KeyError: 'x'"


def test_level_hides_what_is_below_it() -> None:
    assert "found" not in "".join(logged("text", "error"))
