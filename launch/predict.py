"""Labels the lines of a text file, or the images of a .npy file, with a trained run.

    python -m launch.predict --workdir=runs/text/n2 --input=phrases.txt

Writes one line an input: label, probability, and the text (tab-separated).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from launch import cli

if TYPE_CHECKING:
    import numpy as np

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of a trained run.")
INPUT = flags.DEFINE_string("input", "", "Text file, a line each; or a .npy array [n, length, features]; - for standard input.")
OUTPUT = flags.DEFINE_string("output", "-", "File to write, which must not exist yet; - for standard output.")


def read_inputs(name: str) -> list[str] | np.ndarray:
    """Reads all inputs.

    Raises:
      InputError: the file cannot be read, or a line is not UTF-8.
    """
    import numpy as np

    from datamux_jax.errors import InputError

    way_out = "Check the path and its permissions."
    try:
        if name.endswith(".npy"):
            array = np.load(name, allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("it holds no single array")
            return array
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"--input={name} cannot be read: {error}. {way_out}") from error
    lines = data.removeprefix(b"\xef\xbb\xbf").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"--input={name} is not UTF-8 in line {number}, byte {error.start + 1}. Convert it, for instance with "
                "iconv -f latin1 -t utf-8."
            ) from error
    return [line.decode() for line in lines]


def main(argv: Sequence[str]) -> None:
    del argv
    from datamux_jax import load, workdir
    from datamux_jax.errors import InputError

    output = None if OUTPUT.value == "-" else Path(OUTPUT.value)
    if output and output.exists():
        raise InputError(f"--output={output} exists and is not overwritten. Remove it, or choose another name.")
    if output and not os.access(output.absolute().parent, os.W_OK):
        raise InputError(
            f"--output={output} cannot be written: its folder does not exist, or may not be written. Choose another."
        )
    inputs = read_inputs(INPUT.value)
    predictions = load(WORKDIR.value)(inputs)
    texts = inputs if isinstance(inputs, list) else [""] * len(inputs)
    rows = [
        "\t".join([p.label, f"{p.probability:.4f}", *([text] if isinstance(inputs, list) else [])])
        for p, text in zip(predictions, texts, strict=True)
    ]
    text = "".join(row + "\n" for row in rows)
    if output:
        workdir.write_text(output, text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    cli.required("workdir", "input")
    cli.run(main)
