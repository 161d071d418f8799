"""How `rag eval` shows figures and calibration on a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rag_client.bars import share_bar
from rag_client.calibration import Calibration
from rag_client.evaluate import Calibrations, Figures


def evaluation_view(figures: Figures, found: Calibrations) -> RenderableType:
    """Figures in percent, then both calibrations."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("questions", "exact match", "F1", "recall", "abstained"):
        table.add_column(name, justify="right")
    shares = (figures.exact_match, figures.f1, figures.recall, figures.abstained)
    table.add_row(str(figures.questions), *(f"{share:.1%}" for share in shares))
    return Group(
        table,
        Text(),
        calibration_table("does a document with posterior p hold the answer?", found.documents),
        Text(),
        calibration_table("is an answer with confidence p right?", found.answers),
    )


def calibration_table(title: str, found: Calibration) -> RenderableType:
    """A row for each bin that holds something, and the expected calibration error."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("p", "number"):
        table.add_column(name, justify="right")
    for name in ("mean p", "share true"):
        table.add_column(name, no_wrap=True)
    for one in found.bins:
        table.add_row(
            f"{one.low:.1f}-{one.high:.1f}",
            str(one.count),
            share_bar(one.mean_probability),
            share_bar(one.share_true),
        )
    heading = Text(title, style="bold").append(
        f"   expected calibration error {found.expected_error:.3f}", style="default not bold"
    )
    return Group(heading, table)
