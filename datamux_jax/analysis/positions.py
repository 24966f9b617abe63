"""Which tokens come back from the mixture: by slot and by position."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from datamux_jax import losses
from datamux_jax.analysis.parts import check_part, totals_of
from datamux_jax.data.formats import Arrays
from datamux_jax.model import MultiplexedTransformer, call
from datamux_jax.runs import Run


def retrieval_by_position(run: Run, arrays: Arrays, *, groupings: int = 1, label: str = "retrieval") -> dict[str, Any]:
    """Token retrieval over every token but padding and position 0, which is the same for all.

    Args:
      run: a loaded run with N > 1 and a vocabulary head.
      arrays: examples, as `examples_of` gives them.
      groupings: random groupings to average over; grouping `g` is drawn with the seed `g`.
      label: of the progress line.

    Returns:
      `accuracy`; `per_slot`, a list of N; `per_position`, a list of L, by the token's place in its own text; `table`, N lists of L;
      None where no token was asked for. `counts`, the tokens asked for at each position. `trained` says whether the run trained
      retrieval itself; what others can do is left from the runs that they started from.

    Raises:
      InputError: N = 1, no vocabulary head, or too few examples.
    """
    check_part(run, "retrieval", arrays)
    model = run.model
    assert isinstance(model, MultiplexedTransformer), "others have no vocabulary head"

    def sums(params: Any, batch: Any, key: jax.Array) -> Any:
        del key
        h = call(model, params, "encode", batch["inputs"], batch["mask"])
        read, _, counted = losses.read_back(model, params, h, batch)
        right = (read == batch["inputs"][..., : read.shape[2]]) * counted
        return {"retrieval": (right.sum(0), counted.sum(0))}, None

    right_NxL, count_NxL = totals_of(jax.jit(sums), run, arrays, groupings, label)["retrieval"]
    return {
        "accuracy": shares(right_NxL.sum(), count_NxL.sum()),
        "per_slot": shares(right_NxL.sum(1), count_NxL.sum(1)),
        "per_position": shares(right_NxL.sum(0), count_NxL.sum(0)),
        "table": shares(right_NxL, count_NxL),
        "counts": count_NxL.sum(0).astype(int).tolist(),
        "trained": run.config.objective == "retrieval" or run.config.retrieval_loss_coeff > 0,
    }


def shares(total: Any, count: Any) -> Any:
    """`total / count`, entry by entry, as lists; None where `count` is 0."""
    ratio = np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    found = ratio.astype(object)
    found[np.isnan(ratio)] = None
    return found.tolist()
