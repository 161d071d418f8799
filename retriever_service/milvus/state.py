"""Which of a collection's entities are documents: what every search and read leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict


class Change(BaseModel):
    """One change of the log, numbered by `revision`.

    It is written once, as one entity, when its rows are in: that makes the change. Its rows are `count` from
    `first_row`; `replaced` holds the row that each hides, None where there was none. Of a deletion, `missing` are
    the places in its batch whose keys were not there. `void` are ranges of rows that changes which failed may have
    left behind. `timestamp` is Milvus': reads as of then find its rows, 0 where that is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    revision: int
    sequence: int
    num_documents: int
    digest: str
    first_row: int
    count: int = 0
    replaced: Sequence[int | None] = ()
    missing: Sequence[int] = ()
    void: Sequence[tuple[int, int]] = ()
    timestamp: int = 0

    @property
    def hidden(self) -> list[int]:
        """The rows that it hides."""
        return [row for row in self.replaced if row is not None]


class Checkpoint(BaseModel):
    """Where the log may begin: everything up to `revision` is in the collection, and what it hid is gone from it.

    `num_changes` counts the versions written and hidden since the beginning. Reads as of `timestamp` find it so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    revision: int = 0
    sequence: int = 0
    next_row: int
    num_documents: int
    num_changes: int = 0
    void: Sequence[tuple[int, int]] = ()
    timestamp: int = 0


@dataclass(frozen=True, slots=True)
class State:
    """The corpus after a change: a search takes one and keeps it, so that it sees all of a change or nothing.

    Milvus has it as of `timestamp`, or knows no better than now where that is 0.
    """

    revision: int
    sequence: int
    next_row: int
    num_documents: int
    num_changes: int
    void: tuple[tuple[int, int], ...]
    hidden: frozenset[int]
    timestamp: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, changes: Sequence[Change]) -> "State":
        """Returns the state after the changes behind a checkpoint."""
        void = tuple((first, behind) for first, behind in checkpoint.void)
        state = cls(
            checkpoint.revision,
            checkpoint.sequence,
            checkpoint.next_row,
            checkpoint.num_documents,
            checkpoint.num_changes,
            void,
            frozenset(),
            checkpoint.timestamp,
        )
        for change in changes:
            state = state.after(change)
        return state

    def after(self, change: Change) -> "State":
        """Returns the state after one more change."""
        return State(
            change.revision,
            change.sequence,
            max(self.next_row, change.first_row + change.count, *(behind for _, behind in change.void)),
            change.num_documents,
            self.num_changes + change.count + len(change.hidden),
            self.void + tuple((first, behind) for first, behind in change.void),
            self.hidden | frozenset(change.hidden),
            max(self.timestamp, change.timestamp) if change.timestamp else 0,
        )

    def without(self, rows: frozenset[int], timestamp: int) -> "State":
        """Returns the state once these hidden rows are gone from the collection, as of a timestamp."""
        return replace(self, hidden=self.hidden - rows, timestamp=timestamp)

    def checkpoint(self, timestamp: int) -> Checkpoint:
        """Returns where the log may begin once nothing hidden is left, as of a timestamp."""
        return Checkpoint(
            revision=self.revision,
            sequence=self.sequence,
            next_row=self.next_row,
            num_documents=self.num_documents,
            num_changes=self.num_changes,
            void=self.void,
            timestamp=timestamp,
        )

    def shows(self, row: int) -> bool:
        """Whether the row is a document's."""
        is_void = any(first <= row < behind for first, behind in self.void)
        return row < self.next_row and row not in self.hidden and not is_void

    def expression(self, *, hidden: bool = False) -> str:
        """Returns what Milvus must leave out; with `hidden`, not what was replaced or deleted."""
        parts = [f"row < {self.next_row}"]
        parts += [f"(row < {first} or row >= {behind})" for first, behind in self.void]
        if self.hidden and not hidden:
            parts.append(f"row not in {sorted(self.hidden)}")
        return " and ".join(parts)


class Shown:
    """The state that searches and reads begin with; whoever changes the corpus sets it."""

    def __init__(self, state: State) -> None:
        self.state = state
