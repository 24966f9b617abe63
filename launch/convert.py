"""Published checkpoints to runs, and runs to published checkpoints or to exported programs.

python -m launch.convert --source=DIR --workdir=runs/muxbert
python -m launch.convert --source=princeton-nlp/muxbert_base_gaussian_hadamard_index_pos_5 --revision=COMMIT --workdir=runs/muxbert
python -m launch.convert --workdir=runs/muxbert --to_hf=DIR
python -m launch.convert --workdir=runs/text/n2 --to_stablehlo=DIR

A source is a folder with `config.json` and `model.safetensors` (or `pytorch_model.bin`, which needs torch): a model of DataMUX or
MUX-PLMs, or a plain BERT, RoBERTa or ELECTRA encoder to start multiplexing from. Runs start from the result with
`--config.init_from=runs/muxbert`.

`--to_stablehlo` writes compiled-anywhere programs of a run that was trained for a task, for `datamux_jax.load_exported` and
`launch.predict --workdir=DIR`, which need no network code then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from configs import common
from datamux_jax.errors import InputError
from launch import cli

WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run: written with --source, read with --to_hf and --to_stablehlo.")
SOURCE = flags.DEFINE_string("source", "", "Folder of a published checkpoint, or its name on the Hugging Face hub.")
REVISION = flags.DEFINE_string("revision", "", "Commit of a hub name.")
OBJECTIVE = flags.DEFINE_string(
    "objective", "", "What the checkpoint is for, if its config.json does not say: classification, ..."
)
TO_HF = flags.DEFINE_string("to_hf", "", "Folder to write config.json and model.safetensors into.")
TO_STABLEHLO = flags.DEFINE_string("to_stablehlo", "", "Folder to write an exported predictor into (jax.export).")
PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], "With --to_stablehlo: devices that it can run on; or rocm.")


def main(argv: Sequence[str]) -> None:
    del argv
    if sum(map(bool, (SOURCE.value, TO_HF.value, TO_STABLEHLO.value))) != 1:
        raise InputError(
            "Say either what to read, --source=DIR, or where to write, --to_hf=DIR or --to_stablehlo=DIR; --workdir is the other side."
        )
    from datamux_jax import convert, export  # Imports jax; bad flags are refused before.

    if SOURCE.value:
        folder = convert.find_source(SOURCE.value, REVISION.value)
        print(convert.import_run(folder, Path(WORKDIR.value), common.get_config(), objective=OBJECTIVE.value))
    elif TO_STABLEHLO.value:
        print(export.export_run(Path(WORKDIR.value), Path(TO_STABLEHLO.value), PLATFORMS.value))
    else:
        print(convert.export_run(Path(WORKDIR.value), Path(TO_HF.value)))


if __name__ == "__main__":
    cli.required("workdir")
    cli.run(main, goes_on=False)
