"""Predictions of scored examples: what is measured of them, and the file that they are written to."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from datamux_jax import task_metrics, workdir
from datamux_jax.data.formats import Arrays, Format
from datamux_jax.errors import InputError
from datamux_jax.inference import softmax
from datamux_jax.losses import NO_LABEL
from datamux_jax.scoring import Scored

DIGITS = 6  # Of the numbers in the file.


def numbers(scored: Scored, arrays: Arrays, fmt: Format, instances: int) -> dict[str, Any]:
    """The metrics of the format, of one grouping, by name; and `NAME_per_slot`, a list. Nothing where no task was scored.

    Examples that were scored in every slot count once for each. Words without a prediction, because they lie beyond the length,
    count as wrong; the accuracy of tags, that of all words, is always there.

    Args:
      scored: the examples.
      arrays: of the same examples.
      fmt: that they have.
      instances: `N`.
    """
    if scored.outputs is None or scored.slots is None:
        return {}
    truth, guesses = labels(arrays), predictions(scored.outputs, arrays, fmt)

    def measured(where: np.ndarray) -> dict[str, float | None]:
        one, example = np.nonzero(where)
        pair = truth[example], guesses[one, example]
        asked = task_metrics.measure(fmt.metrics, *pair, fmt.label_names)
        return task_metrics.measure(("accuracy",), *pair, fmt.label_names) | asked if fmt.token_labels else asked

    slots = [measured(scored.slots == slot) for slot in range(instances)]
    whole = measured(scored.slots >= 0)
    return {**whole, **{f"{name}_per_slot": [slot[name] for slot in slots] for name in whole}}


def labels(arrays: Arrays) -> np.ndarray:
    """What should be predicted: classes or numbers `[n]`; of tagging, the tags of all words, `[n, W]`, padded with -100."""
    return arrays["gold"] if "gold" in arrays else arrays["label"]


def predictions(outputs: np.ndarray, arrays: Arrays, fmt: Format) -> np.ndarray:
    """What is predicted, shaped like `labels` behind the passes: of tagging, `NO_PREDICTION` at words that were cut off."""
    if not fmt.token_labels:
        return outputs.argmax(-1) if fmt.label_names else outputs
    gold = labels(arrays)
    tags = np.full((len(outputs), *gold.shape), task_metrics.NO_PREDICTION, np.int32)
    word = arrays["word"][:, : outputs.shape[2]]  # A cut index prefix pushes the last tokens out.
    row, position = np.nonzero(word >= 0)
    tags[:, row, word[row, position]] = outputs[:, row, position]
    return tags


def words_cut(scored: Scored, arrays: Arrays) -> int:
    """How many labelled words lie beyond what the network reads."""
    assert scored.outputs is not None
    return int((labels(arrays) != NO_LABEL).sum() - (arrays["word"][:, : scored.outputs.shape[2]] >= 0).sum())


def check_path(path: Path) -> None:
    """Checks that predictions can be written to `path`.

    Raises:
      InputError: another ending than .tsv or .jsonl, a file that exists, or a folder that does not.
    """
    if path.suffix not in WRITERS:
        raise InputError(
            f"--predictions={path} ends in neither {' nor '.join(WRITERS)}, which say what is written. Choose one of them."
        )
    if path.exists():
        raise InputError(f"--predictions={path} exists and is not overwritten. Remove it, or choose another name.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(
            f"--predictions={path} cannot be written: its folder does not exist, or may not be written. Choose another."
        )


def write(path: Path, scored: Scored, arrays: Arrays, fmt: Format) -> None:
    """Writes one row an example, in the order of the split: number of the row from 1, label, prediction, scores.

    The predictions are those of the first pass. Of classes, `score` is the probability of the one predicted; .jsonl has `scores`
    instead, those of all classes. A number is its own score. Tags are those of all words, of which some may have been cut off: null, in
    .tsv "-".

    Args:
      path: ends in .tsv or .jsonl.
      scored: with outputs.
      arrays: of the split.
      fmt: that they have.
    """
    assert scored.outputs is not None
    with workdir.replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        WRITERS[path.suffix](handle, _rows(scored.outputs[:1], arrays, fmt), fmt)


def _rows(outputs: np.ndarray, arrays: Arrays, fmt: Format) -> Iterator[dict[str, Any]]:
    truth, guesses = labels(arrays), predictions(outputs, arrays, fmt)[0]
    names: Sequence[str] = fmt.label_names
    if fmt.token_labels:
        for row, (tags, guess) in enumerate(zip(truth, guesses, strict=True), start=1):
            there = tags != NO_LABEL
            best = [None if tag == task_metrics.NO_PREDICTION else names[tag] for tag in guess[there]]
            yield {"row": row, "label": [names[tag] for tag in tags[there]], "prediction": best}
    elif names:
        shares = softmax(outputs[0]).tolist()
        for row, (label, guess, share) in enumerate(zip(truth.tolist(), guesses.tolist(), shares, strict=True), start=1):
            yield {"row": row, "label": names[label], "prediction": names[guess], "score": share[guess], "scores": share}
    else:
        for row, (label, guess) in enumerate(zip(truth.tolist(), guesses.tolist(), strict=True), start=1):
            yield {"row": row, "label": round(label, DIGITS), "prediction": round(guess, DIGITS)}


def _write_tsv(handle: IO[str], rows: Iterable[dict[str, Any]], fmt: Format) -> None:
    columns = ["row", "label", "prediction"] + ["score"] * (bool(fmt.label_names) and not fmt.token_labels)
    writer = csv.DictWriter(handle, columns, extrasaction="ignore", delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        if fmt.token_labels:
            row |= {key: " ".join("-" if tag is None else tag for tag in row[key]) for key in ("label", "prediction")}
        elif fmt.label_names:
            row["score"] = round(row["score"], DIGITS)
        writer.writerow(row)


def _write_jsonl(handle: IO[str], rows: Iterable[dict[str, Any]], fmt: Format) -> None:
    for row in rows:
        if "scores" in row:
            scores = {name: round(share, DIGITS) for name, share in zip(fmt.label_names, row["scores"], strict=True)}
            row = {"row": row["row"], "label": row["label"], "prediction": row["prediction"], "scores": scores}
        handle.write(json.dumps(row, ensure_ascii=False) + "\n")


WRITERS: dict[str, Callable[[IO[str], Iterable[dict[str, Any]], Format], None]] = {".tsv": _write_tsv, ".jsonl": _write_jsonl}
