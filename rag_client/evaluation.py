"""How an answer is compared with the accepted ones: SQuAD's exact match and F1, as pure functions."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable

ARTICLES = re.compile(r"\b(a|an|the)\b")
SPACED_FIGURES = re.compile(r"(?<=\d)\s*([.,:])\s*(?=\d)")
SPACED_JOINTS = re.compile(r"(?<=\w)\s*(['-])\s*(?=\w)")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Return text in lower case without accents, punctuation, articles and needless white space.

    Beyond SQuAD's rules, spaces inside figures and around hyphens and apostrophes are closed first,
    because an uncased word-piece tokenizer decodes "1,012 km" as "1, 012 km".
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    joined = SPACED_JOINTS.sub(r"\1", SPACED_FIGURES.sub(r"\1", plain))
    return " ".join(ARTICLES.sub(" ", joined.translate(PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> bool:
    """Return whether the prediction equals one of the answers after normalisation."""
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in answers}


def f1(prediction: str, answers: Iterable[str]) -> float:
    """Return the best word-overlap F1 (0 to 1) of the prediction with one of the answers."""
    return max(
        (word_overlap(normalize_answer(prediction), normalize_answer(a)) for a in answers), default=0.0
    )


def word_overlap(prediction: str, answer: str) -> float:
    """Return the F1 of two normalised texts as bags of words."""
    predicted, expected = prediction.split(), answer.split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))
