"""Sets the demo up, starts the pair, asks it a question, serves until Ctrl-C: make run."""

import signal
import sys

from rich.console import Console

from demo.build_index import DemoError, prepare
from demo.pair import Pair, Ports, ServiceProcess
from demo.settings import RunSettings, demo_settings
from rag_client import RagClient, RagClientError
from rag_client.views import answer_view

_DEFAULT_GENERATOR_PORT = 50052


def run(settings: RunSettings, console: Console) -> None:
    """Does all of it; returns where `once` is set. Raises DemoError or RagClientError where a part fails."""
    prepare(settings, console)
    pair = Pair(
        settings.checkpoint,
        settings.index,
        settings.logs,
        host=settings.host,
        retriever_ports=Ports(settings.retriever_grpc_port, settings.retriever_http_port),
        generator_ports=Ports(settings.generator_grpc_port, settings.generator_http_port),
        threads=settings.threads,
    )

    def serving(service: ServiceProcess, seconds: float) -> None:
        console.print(
            f"[green]✓[/] {service.name:<11}serving at {service.grpc} after {seconds:.0f} s", highlight=False
        )

    with pair:
        with console.status("starting retriever and generator"):
            pair.start(settings.start_timeout_s, serving)
        ask(pair, settings.question, console)
        show_addresses(pair, console)
        if not settings.once:
            console.print("\nserving until Ctrl-C", style="bold")
            pair.wait()


def ask(pair: Pair, question: str, console: Console) -> None:
    """Asks one question through the client and shows the answer with its documents."""
    with RagClient(pair.generator.grpc) as client:
        generation = client.generate(question, include_documents=True, num_beams=4, num_return_sequences=3)
    console.print(f"\n[bold]{question}[/]", highlight=False)
    console.print(answer_view(generation, generation.answers[0]))


def show_addresses(pair: Pair, console: Console) -> None:
    """Says where both services are, and how to ask them."""
    console.print()
    for service in (pair.generator, pair.retriever):
        console.print(f"{service.name:<11}gRPC {service.grpc}   HTTP http://{service.http}", highlight=False)
    port = int(pair.generator.grpc.rsplit(":", 1)[1])
    where = "" if port == _DEFAULT_GENERATOR_PORT else f"RAG_CLIENT_GENERATOR={pair.generator.grpc} "
    console.print(
        f'ask        {where}make ask Q="How many hearts does an octopus have?"',
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    """The command: python -m demo.run."""
    settings = demo_settings(RunSettings, "demo.run")
    console = Console()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell ignores SIGINT for what it runs with &
        signal.signal(number, signal.default_int_handler)
    try:
        run(settings, console)
    except KeyboardInterrupt:
        console.print("stopped")
    except (DemoError, RagClientError) as error:
        console.print(f"demo.run: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
