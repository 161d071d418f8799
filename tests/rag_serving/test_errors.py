"""The error table: each class names a real status, and messages carry field and value."""

import pytest

from rag_serving import errors

ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.RagError) and not kind.__name__.startswith("_")
]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_names_a_grpc_status_and_a_reason(kind: type[errors.RagError]) -> None:
    import grpc

    assert hasattr(grpc.StatusCode, kind.status)
    assert kind.reason == kind.reason.upper()
    assert kind.retryable == (kind.status in {"UNAVAILABLE", "RESOURCE_EXHAUSTED"})


def test_importing_the_errors_needs_no_grpc() -> None:
    import subprocess
    import sys

    program = "import sys, rag_serving.errors; sys.exit('grpc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_invalid_argument_says_field_problem_and_value() -> None:
    error = errors.InvalidArgumentError("n_docs", "must be at least 1", -3)
    assert str(error) == "n_docs: must be at least 1, got -3"
    assert error.violations == (errors.FieldViolation("n_docs", "must be at least 1, got -3"),)


def test_invalid_argument_shortens_a_huge_value() -> None:
    assert len(str(errors.InvalidArgumentError("text", "is too long", "x" * 10_000))) < 200


def test_invalid_argument_of_several_violations_names_all() -> None:
    violations = [errors.FieldViolation("a", "is negative"), errors.FieldViolation("b", "is empty")]
    error = errors.InvalidArgumentError.of(violations)
    assert error.violations == tuple(violations)
    assert str(error) == "a: is negative; b: is empty"
    with pytest.raises(ValueError, match="at least one"):
        errors.InvalidArgumentError.of([])


def test_retry_later_errors_carry_the_wait_in_seconds() -> None:
    assert errors.UnavailableError("down", 2.5).retry_after_s == 2.5
    assert errors.ResourceExhaustedError("full").retry_after_s == 1.0


def test_reason_of_one_error_may_be_set_without_touching_its_class() -> None:
    assert errors.NotFoundError("no row 7", reason="ROW_NOT_FOUND").reason == "ROW_NOT_FOUND"
    assert errors.NotFoundError.reason == "NOT_FOUND"
