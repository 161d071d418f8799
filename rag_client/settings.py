"""What the `rag` command takes from the environment when no flag says otherwise."""

from pydantic import BaseModel, ConfigDict, Field

from rag_serving.config import load_settings

ENV_PREFIX = "RAG_CLIENT_"


class ClientSettings(BaseModel):
    """Where the pair is, and how long an answer may take."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    generator: str = Field("localhost:50052", min_length=1, description="gRPC address of the generator")
    retriever: str = Field("localhost:50051", min_length=1, description="gRPC address of the retriever")
    timeout_s: float = Field(60.0, gt=0, description="seconds that a call may take")


def client_settings(
    generator: str | None = None, retriever: str | None = None, timeout_s: float | None = None
) -> ClientSettings:
    """Returns the settings: what is given here, then RAG_CLIENT_GENERATOR and the like, then the defaults.

    Prints a message and exits with status 2 where a value is wrong.
    """
    given = {"--generator": generator, "--retriever": retriever, "--timeout-s": timeout_s}
    flags = [f"{flag}={value}" for flag, value in given.items() if value is not None]
    return load_settings(ClientSettings, env_prefix=ENV_PREFIX, argv=flags, program="rag")
