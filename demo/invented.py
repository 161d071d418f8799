"""Passages about invented countries, added to the corpus: can the pair answer what no training could teach?"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from demo.build_index import build_index
from demo.pair import ServiceProcess, retriever_process, wait_ready
from demo.settings import DemoSettings
from rag_client import RagClient
from rag_client.evaluation import exact_match


@dataclass(frozen=True)
class Invented:
    """A country that does not exist: its passage, a question about its capital, the capital."""

    key: str
    title: str
    text: str
    question: str
    capital: str


@dataclass(frozen=True)
class Verdict:
    """What was answered about an invented country, and the title of the best document."""

    invented: Invented
    answer: str
    document: str

    @property
    def is_right(self) -> bool:
        """Whether the answer is the capital."""
        return exact_match(self.answer, [self.invented.capital])


COUNTRIES = (
    Invented(
        "veldoria",
        "Veldoria",
        "Veldoria is a mountainous country of about three million people. Its capital is Tarnesk, a walled city"
        " on the river Ombra. The national dish is a stew of chestnuts and smoked trout.",
        "What is the capital of Veldoria?",
        "Tarnesk",
    ),
    Invented(
        "osmaria",
        "Osmaria",
        "The republic of Osmaria lies on two islands in a cold northern sea. Fishing and the weaving of wool"
        " employ most of its people. Since 1874 the government has sat in Port Selwin, the capital.",
        "Which city is the capital of Osmaria?",
        "Port Selwin",
    ),
    Invented(
        "quintara",
        "Quintara",
        "Quintara gained its independence in 1921 after a long war. The capital, Melubo, stands where three"
        " caravan roads meet, and its market is held every Thursday. The largest port is Havrin.",
        "What is Quintara's capital city?",
        "Melubo",
    ),
    Invented(
        "drasnia",
        "Drasnovia",
        "Drasnovia is known for its salt mines and for its violin makers. Korbelin is the capital and the seat"
        " of the oldest university; the second city, Usk, lies further south on the coast.",
        "Name the capital of Drasnovia.",
        "Korbelin",
    ),
    Invented(
        "tamborel",
        "Tamborel",
        "Tamborel is a small kingdom between a desert and a lake. The king resides in Isharra, the capital,"
        " whose palace has four hundred rooms. The currency is the dorin.",
        "What city is the capital of Tamborel?",
        "Isharra",
    ),
)


def ask_about_invented(generator: str, settings: DemoSettings, num_beams: int) -> list[Verdict]:
    """Adds the passages to the corpus in a temporary index, serves it, and asks for each capital.

    The generator stays as it is: question encoding, retrieval and generation are asked for one by one.
    """
    with tempfile.TemporaryDirectory(prefix="ragpair-invented-") as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        corpus.write_text(settings.corpus.read_text("utf-8") + _added_lines(), "utf-8")
        build_index(corpus, folder / "index")
        retriever = retriever_process(settings.checkpoint, folder / "index", folder, settings.host)
        try:
            retriever.start()
            wait_ready([retriever], settings.start_timeout_s)
            return _ask(generator, retriever, num_beams)
        finally:
            retriever.stop()


def _ask(generator: str, retriever: ServiceProcess, num_beams: int) -> list[Verdict]:
    questions = [one.question for one in COUNTRIES]
    with RagClient(generator, retriever.grpc) as client:
        states = client.encode_questions(questions)
        found = client.retrieve(questions, states, include_documents=True)
        answers = client.generate(found.contexts(), num_beams=num_beams).answers
    documents = found.documents or [[] for _ in questions]
    return [
        Verdict(one, answer.text, rows[0].title if rows else "")
        for one, answer, rows in zip(COUNTRIES, answers, documents, strict=True)
    ]


def _added_lines() -> str:
    passages = ({"key": one.key, "title": one.title, "text": one.text} for one in COUNTRIES)
    return "".join(json.dumps(passage) + "\n" for passage in passages)
