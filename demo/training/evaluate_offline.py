"""Answer the demo questions with numpy retrieval and transformers, with no service."""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer, RagTokenForGeneration

from demo.assemble import ENCODER_DIR, assemble
from demo.training.data.example import DOC_SEP, TITLE_SEP
from rag_client.evaluation import exact_match, f1

DEMO = Path(__file__).parents[1]
MAX_LENGTH = 24
SEP = 102


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Encoder:
    """MiniLM: mean pooled, normalised sentence embeddings."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(ENCODER_DIR)
        self.model = AutoModel.from_pretrained(ENCODER_DIR).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> np.ndarray[Any, Any]:
        """Return the embeddings [texts, 384] as float32."""
        parts = []
        for start in range(0, len(texts), 32):
            batch = self.tokenizer(
                texts[start : start + 32], padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None]
            parts.append(F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts).numpy()


class Answerer:
    """Retrieves from the corpus and generates with RAG-Token or RAG-Sequence."""

    def __init__(self, folder: Path, strategy: str, n_docs: int, score_scale: float, num_beams: int) -> None:
        self.strategy = strategy
        self.n_docs = n_docs
        self.score_scale = score_scale
        self.num_beams = num_beams
        self.model: Any = RagTokenForGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model.train(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "generator_tokenizer")
        self.passages = read_lines(DEMO / "corpus.jsonl")
        self.encoder = Encoder()
        self.embeddings = self.encoder([f"{p['title']} {p['text']}" for p in self.passages])

    def add(self, passage: dict[str, Any]) -> None:
        """Add a passage to the index."""
        self.passages.append(passage)
        added = self.encoder([f"{passage['title']} {passage['text']}"])
        self.embeddings = np.concatenate([self.embeddings, added])

    def retrieve(self, question: str) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Return the n_docs nearest passages and their scaled scores [1, n_docs]."""
        scores = self.embeddings @ self.encoder([question])[0]
        best = np.argsort(-scores)[: self.n_docs]
        return [self.passages[i] for i in best], torch.tensor(scores[best] * self.score_scale)[None]

    @torch.inference_mode()
    def answer(self, question: str) -> tuple[str, list[str]]:
        """Return the answer and the keys of the passages it was drawn from."""
        passages, doc_scores = self.retrieve(question)
        contexts = [f"{p['title']}{TITLE_SEP}{p['text']}{DOC_SEP}{question}" for p in passages]
        batch = self.tokenizer(contexts, padding=True, truncation=True, max_length=300, return_tensors="pt")
        generate = self.rag_token if self.strategy == "RAG_TOKEN" else self.rag_sequence
        tokens = generate(batch["input_ids"], batch["attention_mask"], doc_scores)
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)), [p["key"] for p in passages]

    def rag_token(self, ids: torch.Tensor, mask: torch.Tensor, doc_scores: torch.Tensor) -> torch.Tensor:
        """Return the best beam of Hugging Face's RAG-Token."""
        output: torch.Tensor = self.model.generate(
            context_input_ids=ids,
            context_attention_mask=mask,
            doc_scores=doc_scores,
            n_docs=len(ids),
            num_beams=self.num_beams,
            max_length=MAX_LENGTH,
        )[0]
        return output

    def rag_sequence(self, ids: torch.Tensor, mask: torch.Tensor, doc_scores: torch.Tensor) -> torch.Tensor:
        """Return the best sequence of thorough decoding: every document's beams, scored with all documents.

        Written out, since Hugging Face's own drops the attention mask while it generates.
        """
        generator = self.model.generator
        found = generator.generate(
            input_ids=ids,
            attention_mask=mask,
            num_beams=self.num_beams,
            num_return_sequences=self.num_beams,
            max_length=MAX_LENGTH,
        )
        found = torch.unique(found, dim=0)  # [candidates, length], filled up with [SEP] or pads
        states = generator.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        scores: list[float] = []
        for candidate in found:
            target = candidate[: int((candidate == SEP).nonzero()[0]) + 1]
            inputs = target[None, :-1].expand(len(ids), -1)
            logits = generator(
                encoder_outputs=(states,), attention_mask=mask, decoder_input_ids=inputs
            ).logits
            token_scores = logits.log_softmax(-1)[
                :, torch.arange(len(target) - 1), target[1:]
            ]  # [n_docs, length]
            scores.append(float(torch.logsumexp(doc_scores[0].log_softmax(0) + token_scores.sum(1), 0)))
        best: torch.Tensor = found[int(np.argmax(scores))]
        return best


def evaluate(
    answerer: Answerer, questions: list[dict[str, Any]], verbose: bool
) -> dict[str, dict[str, float]]:
    """Return the mean exact match, F1 and retrieval recall of each split and of all questions."""
    rows: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for question in questions:
        prediction, keys = answerer.answer(question["question"])
        right = exact_match(prediction, question["answers"])
        row = (float(right), f1(prediction, question["answers"]), float(question["key"] in keys))
        rows[question["split"]].append(row)
        rows["all"].append(row)
        if verbose and not right:
            print(
                f"{question['id']} {question['question']} -> {prediction!r}, not {question['answers'][0]!r}",
                *keys[:2],
            )
    names = ("exact_match", "f1", "retrieved")
    return {
        split: {"questions": len(values)}
        | {name: round(100 * sum(v[i] for v in values) / len(values), 1) for i, name in enumerate(names)}
        for split, values in rows.items()
    }


def main() -> None:
    """Evaluate a generator checkpoint and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generator", type=Path, default=DEMO / "checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder for the assembled checkpoint")
    parser.add_argument("--strategy", choices=("RAG_TOKEN", "RAG_SEQUENCE"), default="RAG_TOKEN")
    parser.add_argument("--n-docs", type=int, default=5)
    parser.add_argument("--score-scale", type=float, default=30.0)
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--every", type=int, default=1, help="take each n-th question only")
    parser.add_argument("--verbose", action="store_true", help="print the questions that fail")
    options = parser.parse_args()
    folder = assemble(options.work, options.generator)
    answerer = Answerer(folder, options.strategy, options.n_docs, options.score_scale, options.num_beams)
    questions = read_lines(DEMO / "questions.jsonl")[:: options.every]
    print(json.dumps(evaluate(answerer, questions, options.verbose), indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
