"""What is computed of measurements, and how the load is drawn. Pure: no clock, no I/O; chance comes in."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from random import Random
from statistics import median


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure of several rounds: their median, the least and the most."""

    middle: float
    least: float
    most: float

    @classmethod
    def of(cls, rounds: Sequence[float]) -> "Spread":
        """Take the figures of all rounds, one at least."""
        return cls(median(rounds), min(rounds), max(rounds))


def ratios(mine: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Divide within each round, so that a slow minute hits both; then take the median of the ratios."""
    return Spread.of([one / other for one, other in zip(mine, theirs, strict=True)])


def added(mine: Sequence[float], direct: Sequence[float]) -> list[float]:
    """Tell what each round took beyond the direct call of the same round."""
    return [one - other for one, other in zip(mine, direct, strict=True)]


def percentile(sorted_values: Sequence[float], share: float) -> float:
    """Give the least value that `share` (0 to 1) of all do not exceed (nearest rank)."""
    return sorted_values[max(ceil(len(sorted_values) * share) - 1, 0)]


class Zipf:
    """Draws 0 to `number` - 1, the place `n` in proportion to 1 / (n + 1)."""

    def __init__(self, number: int, chance: Random) -> None:
        self._sums = list(accumulate(1 / place for place in range(1, number + 1)))
        self._chance = chance

    def draw(self) -> int:
        """Draw one."""
        return bisect_right(self._sums, self._chance.random() * self._sums[-1])


@dataclass(frozen=True, slots=True)
class Schedule:
    """When each request of an open-loop run is sent, whatever became of those before it.

    Request `n` is meant to leave at `n / rate` seconds, on connection `n % connections`.
    """

    rate: float
    seconds: float
    connections: int

    def __len__(self) -> int:
        return int(self.rate * self.seconds)

    def intended_s(self, number: int) -> float:
        """Tell when a request is meant to leave, counted from the start."""
        return number / self.rate

    def connection(self, number: int) -> int:
        """Tell which connection a request leaves on."""
        return number % self.connections

    def due(self, elapsed_s: float) -> int:
        """Tell how many requests are meant to have left by now."""
        return max(min(int(elapsed_s * self.rate) + 1, len(self)), 0)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Make a Markdown table; the first `words` columns are text, the others numbers."""
    rule = [*["---"] * words, *["---:"] * (len(head) - words)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))


def shown_ratio(spread: Spread | None) -> str:
    """Write a ratio with its spread; a dash where there is nothing to compare with."""
    return "-" if spread is None else f"{spread.middle:.2f} ({spread.least:.2f} to {spread.most:.2f})"


def compared(figures: Mapping[str, Sequence[float]], name: str, yardstick: str) -> Spread | None:
    """Compare one server with another, if both were measured."""
    if name not in figures or yardstick not in figures:
        return None
    return ratios(figures[name], figures[yardstick])
