"""vectors.recipe: beside an index file, what it was built by; it outlives the file where that is damaged."""

import re
from pathlib import Path

RECIPE_FILE = "vectors.recipe"
_KNOBS = re.compile(r"nprobe (\d+) ef_search (\d+)$")


def knobs_text(nprobe: int, ef_search: int) -> str:
    """Returns how a recipe ends: the index's own settings of its knobs."""
    return f"nprobe {nprobe} ef_search {ef_search}"


def recorded_knobs(generation: Path) -> dict[str, int] | None:
    """Returns the nprobe and ef_search that a generation was built with; None where it has no record of them."""
    try:
        recipe = (generation / RECIPE_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = _KNOBS.search(recipe)
    return None if found is None else {"nprobe": int(found[1]), "ef_search": int(found[2])}
