"""Other numberings in which label maps of a data set are in use, and how they are noticed."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Numbering:
    """Another numbering than the one that is read."""

    ids: frozenset[int]
    """Its ids, with those for void."""
    advice: str
    """What such label maps are, and what to do, for messages."""
    expected: frozenset[int] = frozenset()
    """Ids of the right numbering: a set of label maps nearly always shows one of them."""
    unexpected: frozenset[int] = frozenset()
    """Ids that maps in the right numbering do not show, though they would be read."""

    def suspected(self, seen: Collection[int]) -> str | None:
        """Why a set whose label maps show the ids `seen` looks numbered like this, or None."""
        if not self.ids.issuperset(seen):
            return None
        if odd := sorted(self.unexpected.intersection(seen)):
            return f"the id {odd[0]} occurs: {self.advice}"
        if self.expected and not self.expected.intersection(seen):
            which = "no id" if len(self.expected) == 1 else "none of the ids"
            return f"{which} {_ranges(self.expected)} occurs: {self.advice}"
        return None


def _ranges(ids: Collection[int]) -> str:
    """Ids in words: 255, or 19 to 33."""
    low, high = min(ids), max(ids)
    return str(low) if low == high else f"{low} to {high}"
