"""What a check says: something that is wrong, with its evidence."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    name: str
    text: str  # what, where, by which figure, and what to change
    tag: str  # to open in TensorBoard
    steps: list[int] = field(default_factory=list)  # the first one first
    figure: float | None = None  # that was found
    threshold: float | None = None  # that it is beyond


def list_steps(steps: list[int]) -> str:
    """Return the first few steps in words."""
    more = len(steps) - 5
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps[:5]))}" + (f" and {more} more" if more > 0 else "")
