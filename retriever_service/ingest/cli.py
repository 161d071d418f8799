"""`rag-index`: build, verify and describe the index folders that `rag-retriever` serves."""

import contextlib
import enum
import json
import sqlite3
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rag_serving.errors import RagError
from retriever_service.corpus.local import LocalCorpus
from retriever_service.errors import BuildError
from retriever_service.filters import is_field
from retriever_service.index.faiss_index import set_num_threads
from retriever_service.index.manifest import Manifest
from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest import tune as tuning
from retriever_service.ingest import tune_report
from retriever_service.ingest.build import BuildOptions, CorpusEncoder, Encoder, build_index
from retriever_service.ingest.progress import shown_progress
from retriever_service.ingest.reader import CorpusFormat, CorpusReader
from retriever_service.ingest.records import MAX_TEXT_BYTES
from retriever_service.ingest.repair import repair_index
from retriever_service.ingest.verify import verify_index
from retriever_service.milvus.connection import MilvusAddress
from retriever_service.milvus.library import MilvusLibrary
from retriever_service.types import Metric

app = typer.Typer(
    help="Builds, verifies and describes the indexes that rag-retriever serves.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console(stderr=True)
_LEASE_S = 10.0  # the retriever's default


class Engine(enum.StrEnum):
    """What embeds the passages: this process, or Ray Data's actors."""

    LOCAL = "local"
    RAY = "ray"


class EmbeddingsDtype(enum.StrEnum):
    """How SQLite holds the embeddings."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


Folder = Annotated[Path, typer.Argument(help="index folder, or one generation in it")]


def main() -> None:
    """The command; exits with 1 and one line on stderr where it cannot do what was asked."""
    try:
        app()
    except (RagError, OSError, sqlite3.Error) as error:
        sys.stderr.write(f"rag-index: error: {error}\n")
        sys.exit(1)


@app.command()
def build(
    corpus: Annotated[
        Path, typer.Option("--input", help="JSONL, TSV, datasets folder, folder of Markdown and text")
    ],
    output: Annotated[
        Path, typer.Option(help="index folder; an index there stays until the new one is whole")
    ],
    corpus_format: Annotated[
        CorpusFormat | None, typer.Option("--format", help="default: by the name of --input")
    ] = None,
    kind: Annotated[
        str, typer.Option(help='faiss factory string: "Flat", "HNSW32", "IVF256,Flat", "IVF256,PQ16" …')
    ] = "Flat",
    metric: Annotated[Metric, typer.Option(help="similarity of the search")] = Metric.INNER_PRODUCT,
    nprobe: Annotated[
        int | None,
        typer.Option(min=1, help="cells that an IVF index visits by default: 16, or --faiss-file's"),
    ] = None,
    ef_search: Annotated[
        int | None, typer.Option(min=1, help="candidates of an HNSW index by default: 64, or --faiss-file's")
    ] = None,
    faiss_file: Annotated[
        Path | None, typer.Option(help="take this faiss file over (--kind and --metric come from it)")
    ] = None,
    embedding_model: Annotated[
        str | None, typer.Option(help="passage encoder, folder or hub name; none: the corpus has embeddings")
    ] = None,
    embedding_model_name: Annotated[
        str | None, typer.Option(help="name that generators ask for; default: the folder's, with its digest")
    ] = None,
    pooling: Annotated[str, typer.Option(help="mean, cls or pooler; DPR always takes its pooler")] = "mean",
    normalize: Annotated[bool, typer.Option(help="scale embeddings to length 1")] = False,
    passage_template: Annotated[
        str, typer.Option(help="what is embedded of a passage; not for DPR")
    ] = "{title} {text}",
    max_length: Annotated[
        int | None, typer.Option(min=8, help="tokens of a passage that are embedded")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="passages embedded at once")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads of the encoder; default: torch's")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="where passages are embedded")] = Engine.LOCAL,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to embed on; none: this machine, on loopback")
    ] = None,
    ray_actors: Annotated[int, typer.Option(min=1, help="encoders that Ray runs beside each other")] = 1,
    embeddings_dtype: Annotated[
        EmbeddingsDtype, typer.Option(help="how embeddings are stored; float16 takes half the room")
    ] = EmbeddingsDtype.FLOAT32,
    filter_indexes: Annotated[
        str, typer.Option(help="metadata fields to index for filters, for example year,source.name")
    ] = "",
    passage_words: Annotated[
        int | None,
        typer.Option(min=1, help="cut texts into passages of at most so many words; pages: 100"),
    ] = None,
    language: Annotated[str, typer.Option(help="language of the sentences, as ISO 639 has it")] = "en",
    max_text_bytes: Annotated[int, typer.Option(min=1, help="bytes of a title or text")] = MAX_TEXT_BYTES,
    checkpoint_s: Annotated[
        float, typer.Option(min=0, help="seconds of indexing that a killed build does again, about")
    ] = 60.0,
    keep_generations: Annotated[int, typer.Option(min=1, help="generations left in the folder")] = 2,
) -> None:
    """Builds an index, or its next generation; the old one serves until the new one is whole.

    Killed at any moment, the same command goes on where it was, to the same result.
    """
    reader = CorpusReader(
        corpus, corpus_format, max_text_bytes, passage_words=passage_words, language=language
    )
    encoder: Encoder | CorpusEncoder | None = None
    if embedding_model is not None:
        # Imported here: verify, info and corpora with embeddings need no torch.
        from retriever_service.ingest.embed import PassageEncoder, Pooling  # noqa: PLC0415

        if pooling not in {choice.value for choice in Pooling}:
            raise BuildError(f"--pooling must be mean, cls or pooler, got {pooling!r}")
        settings: dict[str, Any] = {
            "source": embedding_model,
            "name": embedding_model_name,
            "pooling": Pooling(pooling),
            "normalize": normalize,
            "max_length": max_length,
            "template": passage_template,
            "batch_size": batch_size,
            "device": device,
            "num_threads": threads,
        }
        if engine is Engine.RAY:
            from retriever_service.ingest.ray_encoder import RayEncoder, RayOptions  # noqa: PLC0415

            on_gpu = device.startswith("cuda")
            encoder = RayEncoder(settings, RayOptions(ray_address, ray_actors, threads or 1, on_gpu))
        else:
            encoder = PassageEncoder(**settings)
    elif embedding_model_name is None:
        raise BuildError("give --embedding-model, or --embedding-model-name where the corpus has embeddings")
    options = BuildOptions(
        kind,
        metric,
        nprobe,
        ef_search,
        keep_generations,
        faiss_file,
        embeddings_dtype.value,
        checkpoint_s,
        _fields(filter_indexes),
    )
    with shown_progress(_console, reader.estimated_count) as progress:
        snapshot = build_index(
            reader,
            output,
            encoder=encoder,
            embedding_name=embedding_model_name,
            options=options,
            progress=progress,
        )
    _console.print(_table(snapshot.folder, snapshot.manifest), soft_wrap=True)


@app.command()
def verify(folder: Folder) -> None:
    """Reads every file of an index, checks it, and names the first one that is damaged."""
    snapshot = verify_index(folder, lambda what: _say(f"checking {what}", style="dim"))
    _say(f"{snapshot.folder}: whole, {snapshot.manifest.ntotal} documents")


@app.command()
def repair(
    folder: Folder,
    nprobe: Annotated[
        int | None, typer.Option(min=1, help="cells that an IVF index visits by default: as it was built")
    ] = None,
    ef_search: Annotated[
        int | None, typer.Option(min=1, help="candidates of an HNSW index by default: as it was built")
    ] = None,
) -> None:
    """Builds a damaged snapshot anew from the documents and embeddings in SQLite, changes included."""
    with shown_progress(_console) as progress:
        snapshot, is_new = repair_index(
            folder,
            nprobe=nprobe,
            ef_search=ef_search,
            step=lambda what: _say(f"checking {what}", style="dim"),
            progress=progress,
        )
    done = "built anew" if is_new else "was whole: nothing to repair"
    _say(f"{snapshot.folder}: {done}, {snapshot.manifest.ntotal} documents")


@app.command()
def milvus_import(
    folder: Folder,
    milvus_uri: Annotated[str, typer.Option(help="where Milvus is")] = "http://127.0.0.1:19530",
    milvus_collection: Annotated[str, typer.Option(help="name of the corpus in Milvus")] = "rag",
    milvus_database: Annotated[str, typer.Option(help="database of Milvus; default: its own")] = "",
    milvus_token_file: Annotated[
        Path | None, typer.Option(help="file that holds user:password or the API key")
    ] = None,
    filter_indexes: Annotated[
        str, typer.Option(help="metadata fields to index for filters, beside those of the folder's build")
    ] = "",
) -> None:
    """Copies an index folder, changes included, into Milvus, for `rag-retriever --backend milvus` to serve.

    While a retriever writes there, it is refused: ask that one to activate the folder.
    """
    token = "" if milvus_token_file is None else milvus_token_file.read_text(encoding="utf-8").strip()
    library = MilvusLibrary(
        MilvusAddress(milvus_uri, token, milvus_database),
        milvus_collection,
        lease_s=_LEASE_S,
        filter_indexes=_fields(filter_indexes),
    )
    with contextlib.closing(library), shown_progress(_console) as progress:
        corpus, generation = library.open(folder, library.next_number(), [], progress, threading.Event())
        with contextlib.closing(corpus):
            library.remember(corpus, generation)
    _say(f"{milvus_collection}: generation {generation.number}, {generation.index.ntotal} documents")


@app.command()
def info(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="print the manifest as JSON")] = False,
) -> None:
    """Describes an index from its manifest."""
    snapshot = Snapshot.open(folder)
    if as_json:
        sys.stdout.write(json.dumps(snapshot.manifest.model_dump(mode="json"), indent=2) + "\n")
    else:
        Console().print(_table(snapshot.folder, snapshot.manifest), soft_wrap=True)


@app.command()
def tune(
    folder: Folder,
    n_docs: Annotated[int, typer.Option(min=1, help="documents of a question")] = 5,
    target_recall: Annotated[float, typer.Option(min=0, max=1, help="recall that will do")] = 0.95,
    questions: Annotated[
        Path | None, typer.Option(help='JSONL of {"text", "embedding"}; default: drawn from the documents')
    ] = None,
    num_questions: Annotated[int, typer.Option(min=1, help="questions drawn, or taken of the file")] = 200,
    threads: Annotated[int, typer.Option(min=0, help="threads of a search; 0 takes every core")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    plot: Annotated[Path | None, typer.Option(help="write recall over latency to this .svg or .png")] = None,
) -> None:
    """Measures recall against latency over the search knobs of an index, and recommends a setting."""
    if threads:
        set_num_threads(threads)
    with contextlib.closing(LocalCorpus(folder, verify=False, take_changes=False)) as corpus:
        index, store = corpus.generation.index, corpus.generation.store
        asked = (
            tuning.sampled_questions(store, num_questions)
            if questions is None
            else tuning.given_questions(questions, num_questions)
        )
        trials = tuning.tune(
            index,
            store,
            asked,
            n_docs,
            lossy=not index.has_exact_scores,
            progress=lambda setting: _say(f"trying {tune_report.flags(setting)}", style="dim"),
        )
    best = tuning.recommended(trials, target_recall)
    if plot is not None:
        tune_report.plot(trials, best, n_docs, plot)
    if as_json:
        sys.stdout.write(
            json.dumps(tune_report.as_json(trials, best, n_docs, target_recall), indent=2) + "\n"
        )
    else:
        Console().print(tune_report.as_table(trials, best, n_docs, target_recall))


def _fields(given: str) -> tuple[str, ...]:
    """Reads metadata fields joined by commas, each as a filter names it. Raises BuildError."""
    fields = tuple(dict.fromkeys(field.strip() for field in given.split(","))) if given.strip() else ()
    for field in fields:
        if not is_field(field):
            raise BuildError(
                f"--filter-indexes: {field!r} is no key of the metadata, nor keys joined by dots, without quotes"
                " and backslashes"
            )
    return fields


def _say(what: str, style: str | None = None) -> None:
    """Prints a line as it is: a path may hold brackets, and is of use as a whole."""
    _console.print(what, style=style, markup=False, soft_wrap=True)


def _table(folder: Path, manifest: Manifest) -> Table:
    table = Table(title=Text(str(folder)), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in (
        ("documents", f"{manifest.ntotal:,}"),
        ("dimension", str(manifest.dimension)),
        ("kind", manifest.kind),
        ("metric", manifest.metric.value),
        ("embedding model", manifest.embedding.name),
        ("embedding digest", manifest.embedding.digest or "-"),
        ("generation", str(manifest.generation)),
        ("created", f"{manifest.created_at} by {manifest.created_by}"),
        *((name, f"{entry.size_bytes:,} bytes") for name, entry in manifest.files.items()),
    ):
        table.add_row(name, Text(value))
    return table


if __name__ == "__main__":
    main()
