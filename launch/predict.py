"""Predicts the rows of a table, or the images of a .npy file, with a trained run.

    python -m launch.predict --workdir=runs/text/n2 --input=phrases.txt --output=labels.tsv
    python -m launch.predict --workdir=runs/mrpc --input=pairs.jsonl --text=first --text_pair=second --id=key --output=labels.parquet

Input: TSV, CSV, JSON lines, Parquet or lines of text of any size, or - for standard input. Output: one row for each row of the
input, in the same order, with its number, prediction, whether the text was longer than the model reads, and what is wrong with the
row. A row that is wrong does not stop the others; if all of them are, the command ends with an error. Interrupted, the same
command goes on where it was, and the file becomes the same, byte for byte. Given again after that, it says that the file is
complete, or refuses if the input is another one by now. A tagger reads lists of words (JSON lines, Parquet) or words between
spaces, and gives every word its tag.

The last line says how many rows were read, predicted, cut, and damaged in which way; OUTPUT.state.json has the same numbers, as
`counts`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from absl import flags

from launch import cli

if TYPE_CHECKING:
    from datamux_jax.data.tables import Table
    from datamux_jax.inference import Inference
    from datamux_jax.stream import Features, Fields
    from datamux_jax.tally import Tally

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a trained run, or of an export (launch.convert --to_stablehlo).")
INPUT = flags.DEFINE_string("input", "", "Table or text file; a .npy array [n, length, features]; - for standard input.")
FORMAT = flags.DEFINE_string("format", "", "Of the input: tsv, csv, jsonl, parquet or text; default: by its ending, of - text.")
HEADER = flags.DEFINE_bool("header", True, "TSV and CSV: the first row names the columns; without, they are 1, 2, ...")
TEXT = flags.DEFINE_string("text", "text", "Column of the text, or of the words.")
TEXT_PAIR = flags.DEFINE_string("text_pair", "", "Column of the second text, where the model reads pairs.")
ID = flags.DEFINE_string("id", "", "Column that is copied to the output.")
LABEL = flags.DEFINE_string(
    "label",
    "",
    "Column of a label, by name or as the training files write it (tags of entities in any scheme); unknown ones are reported.",
)
ECHO = flags.DEFINE_bool("echo", False, "Copy the text to the output.")
OUTPUT = flags.DEFINE_string("output", "-", "File to write: .tsv, .csv, .jsonl or .parquet; - for standard output, as TSV.")
ENSEMBLE = flags.DEFINE_integer(
    "ensemble", 1, "Times that every input is fed, logits averaged; divides the number of instances."
)
BUCKETS = flags.DEFINE_bool("buckets", True, "Cut rows to the length of their texts; --nobuckets pads all to the full length.")


def open_rows(inference: Inference, fields: Fields) -> Table | Features:
    """Opens the input.

    Raises:
      InputError: it cannot be read, or is not what the model reads.
    """
    from datamux_jax.data.tables import Table
    from datamux_jax.errors import InputError
    from datamux_jax.stream import Features

    arrays = INPUT.value.endswith(".npy")
    if arrays != (inference.format.inputs == "features"):
        reads = "texts" if arrays else "feature arrays, from a .npy file"
        raise InputError(f"--input={INPUT.value} does not fit: this model reads {reads}. Give another --input or --workdir.")
    if arrays:
        return Features(INPUT.value, inference.format)
    kind = FORMAT.value or ("text" if INPUT.value == "-" else "")
    source = sys.stdin.buffer if INPUT.value == "-" else INPUT.value
    optional = (fields.id, fields.label)
    named_by = {flag.value: f"--{flag.name}" for flag in (TEXT, TEXT_PAIR, ID, LABEL)}
    kinds = fields.kinds(inference)
    return Table(source, kinds, file_format=kind, header=HEADER.value, optional=optional, named_by=named_by)


def main(argv: Sequence[str]) -> None:
    del argv
    from datamux_jax import output_files
    from datamux_jax.errors import InputError
    from datamux_jax.exported import is_export, load_exported
    from datamux_jax.grouping import check_ensemble

    # What needs no network is refused before one is loaded.
    if INPUT.value != "-" and not Path(INPUT.value).is_file():
        raise InputError(f"--input={INPUT.value} cannot be read: it is no file. Check the path.")
    output = None if OUTPUT.value == "-" else Path(OUTPUT.value)
    source = None if INPUT.value == "-" else output_files.stamp(Path(INPUT.value))  # A stream has to be read to be known.
    if output:
        output_files.check_output(output)
        if done := output_files.complete(output, asked(), identity(Path(WORKDIR.value)), source):
            end(done, f"{output} is complete: ")
            return
    from datamux_jax import stream

    inference: Inference
    if is_export(Path(WORKDIR.value)):
        inference = load_exported(WORKDIR.value)
    else:
        from datamux_jax import load  # Imports the network.

        inference = load(WORKDIR.value)
    check_ensemble(ENSEMBLE.value, inference.instances)
    texts = (TEXT.value, TEXT_PAIR.value) if TEXT_PAIR.value else (TEXT.value,)
    arrays = inference.format.inputs == "features"
    fields = stream.Fields((stream.FEATURES,) if arrays else texts, ID.value, LABEL.value, ECHO.value and not arrays)
    columns = fields.columns(inference.objective)
    how: Any = {"ensemble": ENSEMBLE.value, "buckets": BUCKETS.value, "show": output is not None}
    with open_rows(inference, fields) as rows:
        if output is None:
            tally = stream.predict_rows(inference, rows, output_files.Stream(sys.stdout.buffer, columns, "tsv"), fields, **how)
            end(tally, file=sys.stderr)  # Standard output has the rows alone.
            return
        settings = asked() | {"model": inference.identity, "window": inference.window}
        with output_files.OutputFile(output, columns, settings, source) as sink:
            if sink.finished:
                stream.check_finished(rows, sink)
                end(sink.tally, f"{output} is complete: ")
                return
            end(stream.predict_rows(inference, rows, sink, fields, **how), f"{output}: ")


def end(tally: Tally, before: str = "", file: TextIO | None = None) -> None:
    """Prints the last line: `before`, then the numbers of rows.

    Raises:
      InputError: there were rows, and all were damaged: what calls this command is not to take that for success.
    """
    from datamux_jax.errors import InputError

    print(f"{before}{tally}", file=file)
    if tally.rows and not tally.scored:
        raise InputError(
            f"None of the {tally.rows:,} rows of --input={INPUT.value} could be predicted. The column 'error' says why of each: "
            "correct the rows, or the flags that say how they are read, and give another --output."
        )


def asked() -> dict[str, Any]:
    """What decides the content of the output, by flag; besides there are the model and its window."""
    named = (WORKDIR, INPUT, FORMAT, HEADER, TEXT, TEXT_PAIR, ID, LABEL, ECHO, ENSEMBLE, BUCKETS)
    return {flag.name: flag.value for flag in named}


def identity(folder: Path) -> str:
    """The `Inference.identity` of the run or export in `folder`, from its files: unless the checkpoint is damaged.

    Raises:
      InputError: it is neither.
    """
    from datamux_jax import exported, saved, workdir

    if exported.is_export(folder):
        return exported.identity(folder)
    config = workdir.load_config(folder)
    return saved.identity(folder, config, saved.chosen_step(folder, config))


if __name__ == "__main__":
    cli.required("workdir", "input")
    cli.run(main, goes_on=lambda: OUTPUT.value != "-")
