"""Shares as bars on a terminal."""

from rich.text import Text

_BAR_CELLS = 10
_EIGHTHS = " ▏▎▍▌▋▊▉"


def share_bar(share: float) -> Text:
    """A share of one as a bar of ten cells, and in percent."""
    eighths = round(min(max(share, 0.0), 1.0) * _BAR_CELLS * 8)
    full, rest = divmod(eighths, 8)
    bar = "█" * full + (_EIGHTHS[rest] if rest else "")
    return Text.assemble((bar.ljust(_BAR_CELLS), "cyan"), f" {share:6.1%}")
