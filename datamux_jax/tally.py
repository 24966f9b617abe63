"""What became of the rows of a prediction: numbers for programs, and a sentence for people."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping

from datamux_jax.errors import few

# What differs from row to row within one kind of reason -> the same for all of them.
VARYING = (
    (re.compile(r" \(lines \d+ to \d+\)$"), ""),
    (re.compile(r"^(is not UTF-8|is no JSON|is no CSV)(?: at|:) .*$", re.DOTALL), r"\1"),
    (re.compile(r"^has the label .*, which ", re.DOTALL), "has a label which "),
    (re.compile(r"^has pixels from .* to .*, where 0 .*$"), "has pixels outside of 0 to 1"),
    (re.compile(r"^has \d+ labels for \d+ words$"), "has more or fewer labels than words"),
    (re.compile(r"^has \d+ fields, but the header names \d+$"), "has more or fewer fields than the header"),
)


@dataclasses.dataclass(frozen=True)
class Tally:
    """Numbers of rows.

    Attributes:
      rows: read, each of which has a row in the output.
      scored: predicted.
      truncated: of these, longer than the model reads: the prediction is of their beginning.
      errors: with something wrong; predicted nevertheless where the id or the label alone is wrong.
      reasons: how many of the errors for each kind of reason, as `kind` names it.
    """

    rows: int = 0
    scored: int = 0
    truncated: int = 0
    errors: int = 0
    reasons: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def spared(self) -> int:
        """Errors that were predicted nevertheless: every row is predicted, or has something wrong, or both."""
        return self.scored + self.errors - self.rows

    def plus(self, *, rows: int, scored: int, truncated: int, problems: Iterable[str]) -> Tally:
        """The numbers with those of further rows; `problems` has a reason for each damaged one of them."""
        found = collections.Counter(map(kind, problems))
        return Tally(
            rows=self.rows + rows,
            scored=self.scored + scored,
            truncated=self.truncated + truncated,
            errors=self.errors + found.total(),
            reasons=dict(collections.Counter(self.reasons) + found),
        )

    def __str__(self) -> str:
        often = sorted(self.reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        reasons = few([f"{number:,}: {name}" for name, number in often])
        return (
            f"{self.rows:,} rows read, {self.scored:,} predicted, {self.truncated:,} of them cut to what the model reads; "
            f"{self.errors:,} damaged"
            + (f" (of which {self.spared:,} predicted, as only id or label is wrong)" if self.spared else "")
            + (f", see the column 'error' ({reasons})." if reasons else ".")
        )


def kind(problem: str) -> str:
    """The kind of reason that a problem of a row belongs to, of which a file has few: the problem without what is the row's own.

    For instance "is not UTF-8 at byte 7 (0xff)" -> "is not UTF-8".
    """
    for pattern, common in VARYING:
        problem = pattern.sub(common, problem)
    return problem
