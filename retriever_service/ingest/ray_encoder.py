"""`--engine ray`: embeds a corpus with a pool of Ray Data actors, on this machine or a cluster of many."""

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retriever_service.errors import BuildError
from retriever_service.index.manifest import Embedding
from retriever_service.ingest.build import chunks
from retriever_service.ingest.embed import PassageEncoder
from retriever_service.ingest.reader import CorpusReader
from retriever_service.types import Float32Array

_BLOCK_BYTES = 1 << 20
# Without it Ray gives its processes the machine's own address, and they listen on every interface.
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass(frozen=True, slots=True)
class RayOptions:
    """Where the actors run: a cluster's address, or None for this machine; each takes `threads` cores."""

    address: str | None
    num_actors: int
    threads: int
    gpu: bool


class RayEncoder:
    """A pool of actors, each with a PassageEncoder of its own.

    Texts go out and embeddings come back chunk by chunk, in order, with so many in flight as Ray has room for. A
    chunk is embedded by one actor as a whole, so that the result is the local engine's.
    """

    def __init__(self, encoder: Mapping[str, Any], options: RayOptions) -> None:
        """Takes PassageEncoder's arguments. Raises BuildError where there is no such model, or no Ray."""
        self._encoder = {**encoder, "source": _everywhere(encoder["source"])}
        self._options = options
        # What an actor's device is, this machine need not have.
        self._description = PassageEncoder(**self._encoder | {"device": "cpu"}).description()
        _import_ray(options)

    def description(self) -> Embedding:
        """Returns what the manifest says about the embeddings."""
        return self._description

    def encode_corpus(self, corpus: CorpusReader, first_row: int) -> Iterator[Float32Array]:
        """Yields float32 [records, dim] for each chunk of the corpus from first_row on, in order.

        The corpus is read beside this process, whichever machines embed. Raises BuildError where an actor fails.
        """
        corpus = copy.copy(corpus)
        corpus.path = corpus.path.absolute()
        with _ray(self._options) as ray:
            data = ray.data
            context = data.DataContext.get_current()
            context.execution_options.preserve_order = True
            context.enable_progress_bars = False
            context.target_max_block_size = _BLOCK_BYTES
            here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                ray.get_runtime_context().get_node_id(), soft=False
            )
            embedded = data.read_datasource(
                _datasource(data, corpus, first_row),
                override_num_blocks=1,
                ray_remote_args={"scheduling_strategy": here},
            ).map_batches(
                _Actor,
                fn_constructor_kwargs={"encoder": self._encoder},
                batch_size=1,
                batch_format="pyarrow",
                compute=data.ActorPoolStrategy(size=self._options.num_actors),
                num_cpus=self._options.threads,
                num_gpus=1 if self._options.gpu else 0,
            )
            try:
                for table in embedded.iter_batches(batch_size=1, batch_format="pyarrow"):
                    vectors = np.frombuffer(table["embeddings"][0].as_py(), dtype=np.float32)
                    yield vectors.reshape(-1, table["dimension"][0].as_py())
            except ray.exceptions.RayError as error:
                raise BuildError(f"--engine ray: {str(error).strip().splitlines()[-1]}") from error


class _Actor:
    """Embeds the chunk of a row."""

    def __init__(self, encoder: dict[str, Any]) -> None:
        self._encoder = PassageEncoder(**encoder)

    def __call__(self, chunk: pa.Table) -> pa.Table:
        titles, texts = chunk["titles"][0].as_py(), chunk["texts"][0].as_py()
        embeddings = self._encoder.encode(list(zip(titles, texts, strict=True)))
        columns = {"embeddings": [embeddings.tobytes()], "dimension": [embeddings.shape[1]]}
        return pa.table(columns, schema=pa.schema({"embeddings": pa.large_binary(), "dimension": pa.int64()}))


def _everywhere(source: str) -> str:
    """Returns a local folder as processes that were started elsewhere name it, and a hub's name as it is."""
    return str(Path(source).absolute()) if Path(source).exists() else source


def _datasource(data: Any, corpus: CorpusReader, first_row: int) -> Any:
    """Returns a source of one task that streams the corpus's chunks from first_row on, one a row."""

    class CorpusDatasource(data.Datasource):  # type: ignore[misc]  # Ray is imported only where it is used
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            metadata = data.block.BlockMetadata(
                num_rows=None, size_bytes=None, input_files=None, exec_stats=None
            )
            return [data.ReadTask(lambda: _tables(corpus, first_row), metadata)]

    return CorpusDatasource()


def _tables(corpus: CorpusReader, first_row: int) -> Iterator[pa.Table]:
    texts = pa.list_(pa.large_string())
    schema = pa.schema({"titles": texts, "texts": texts})
    for chunk in chunks(corpus, first_row):
        titles = [record.title for record in chunk]
        yield pa.table({"titles": [titles], "texts": [[record.text for record in chunk]]}, schema=schema)


def _import_ray(options: RayOptions) -> Any:
    if options.address is None:
        os.environ.setdefault(_LOOPBACK_ONLY, "0")  # noqa: TID251  (told to Ray, which reads it at import)
    try:
        import ray  # noqa: PLC0415  (an extra)
        import ray.data  # noqa: PLC0415
        import ray.data.block  # noqa: PLC0415
        import ray.util.scheduling_strategies  # noqa: PLC0415
    except ImportError as error:
        raise BuildError("--engine ray needs Ray: install ragpair with its extra ray") from error
    return ray


@contextlib.contextmanager
def _ray(options: RayOptions) -> Iterator[Any]:
    """Gives Ray, connected: to the cluster, or to one of its own that listens on loopback and then goes."""
    ray = _import_ray(options)
    try:
        if options.address is None:
            cores = options.num_actors * options.threads + 1
            ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, configure_logging=False)
        else:
            ray.init(options.address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BuildError(f"--engine ray: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
