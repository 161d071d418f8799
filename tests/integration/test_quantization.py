"""A service that decodes with int8 layers: it says so, and its answers do not depend on their company."""

from pathlib import Path

from rag_client import RagClient
from tests.integration.conftest import TinyPair
from tests.integration.services import start_generator


def test_int8_is_said_by_the_service_that_decodes_with_it(pair: TinyPair, tmp_path: Path) -> None:
    service = start_generator(
        pair.checkpoint, pair.retriever.grpc, tmp_path / "int8.log", "--quantization=int8"
    )
    try:
        service.wait_ready()
        with RagClient(service.grpc, timeout_s=60) as int8, RagClient(pair.generator.grpc) as plain:
            assert (int8.get_model().quantization, plain.get_model().quantization) == ("int8", "none")
            assert int8.get_model().dtype == "float32"
            alone = [int8.generate(one, max_length=8).answers[0].best for one in ("ti", "bako")]
            together = [answer.best for answer in int8.generate(["ti", "bako"], max_length=8).answers]
            assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    finally:
        assert service.stop() == 0
