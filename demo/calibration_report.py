"""docs/calibration.md and its plots: how far the demo's probabilities can be believed (make eval-demo)."""

from collections.abc import Mapping
from pathlib import Path

from rag_client.calibration import Calibration
from rag_client.evaluate import Calibrations

_SIDE, _MARGIN, _GAP = 260, 46, 30
_DOCUMENTS = "documents: does one with posterior p hold the answer?"
_ANSWERS = "answers: is one with confidence p right?"

_HEAD = """# Calibration

Written by `make eval-demo`: the demo's pair asked its {questions} questions with {beams} beams, {n_docs} documents for
each. Every document of every question is one prediction of the left plots: its posterior p(document | question,
answer), and whether it is the passage that the question was written from. A passage that holds the answer by chance
counts as wrong: the shares that came true are lower bounds. Every best answer is one prediction of the right plots: its
confidence, exp of its log-likelihood marginalised over the documents, which is what `abstain_below` compares, and
whether it matches an accepted answer exactly.

The expected calibration error is the mean gap between a bin's probability and the share that came true, weighted by
the bin's number of predictions; bins are a tenth wide. Most documents have a posterior near 0 or near 1, which
keeps their error small: read the bins. Dots on the diagonal are perfectly calibrated; their areas grow
with the number of predictions.
"""


def write_report(
    folder: Path, found: Mapping[str, Calibrations], *, questions: int, num_beams: int, n_docs: int
) -> None:
    """Writes calibration.md and one calibration-STRATEGY.svg for each strategy."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD.format(questions=questions, beams=num_beams, n_docs=n_docs)]
    for strategy, both in found.items():
        plot = f"calibration-{strategy.lower().replace('_', '-')}.svg"
        (folder / plot).write_text(reliability_plot(both), "utf-8")
        parts.append(
            f"## {strategy}\n\n![reliability of documents and answers]({plot})\n\n"
            + _table(_DOCUMENTS, both.documents)
            + "\n"
            + _table(_ANSWERS, both.answers)
        )
    (folder / "calibration.md").write_text("\n".join(parts), "utf-8")


def reliability_plot(both: Calibrations) -> str:
    """Two reliability diagrams side by side as SVG: mean probability across, share that came true upwards."""
    width, height = 2 * (_SIDE + _MARGIN) + _GAP + 10, _SIDE + 2 * _MARGIN
    left = _diagram(_DOCUMENTS, both.documents, _MARGIN)
    right = _diagram(_ANSWERS, both.answers, 2 * _MARGIN + _SIDE + _GAP)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{left}{right}</svg>\n'
    )


def _diagram(title: str, found: Calibration, x: int) -> str:
    bottom = _MARGIN + _SIDE
    error = f"expected calibration error {found.expected_error:.3f}, {found.count} predictions"
    lines = [
        f'<text x="{x}" y="{_MARGIN - 22}">{title}</text>',
        f'<text x="{x}" y="{_MARGIN - 8}" fill="#555">{error}</text>',
        f'<rect x="{x}" y="{_MARGIN}" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#999"/>',
        f'<line x1="{x}" y1="{bottom}" x2="{x + _SIDE}" y2="{_MARGIN}" stroke="#bbb" stroke-dasharray="4 3"/>',
        f'<text x="{x + _SIDE // 2}" y="{bottom + 32}" text-anchor="middle">p</text>',
    ]
    for tenth in range(0, 11, 2):
        at = tenth * _SIDE // 10
        lines.append(f'<text x="{x + at}" y="{bottom + 16}" text-anchor="middle">{tenth / 10:.1f}</text>')
        lines.append(f'<text x="{x - 6}" y="{bottom - at + 4}" text-anchor="end">{tenth / 10:.1f}</text>')
    points = [
        (x + one.mean_probability * _SIDE, bottom - one.share_true * _SIDE, one.count) for one in found.bins
    ]
    path = " ".join(f"{across:.1f},{up:.1f}" for across, up, _ in points)
    lines.append(f'<polyline points="{path}" fill="none" stroke="#1f77b4"/>')
    most = max((count for *_, count in points), default=1)
    for across, up, count in points:
        radius = 2 + 6 * (count / most) ** 0.5
        lines.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{radius:.1f}" fill="#1f77b4"/>')
    return "\n".join(lines) + "\n"


def _table(title: str, found: Calibration) -> str:
    rows = [
        f"| {one.low:.1f} to {one.high:.1f} | {one.count} | {one.mean_probability:.3f} | {one.share_true:.3f} |"
        for one in found.bins
    ]
    head = f"{title[0].upper()}{title[1:]} Expected calibration error **{found.expected_error:.3f}**.\n\n"
    return "\n".join([f"{head}| p | number | mean p | share true |", "|---|---:|---:|---:|", *rows]) + "\n"
