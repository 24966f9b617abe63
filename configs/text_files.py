"""Texts or pairs of texts of your own, from TSV, CSV, JSON lines or Parquet, with a class or a number each; N at once.

    python -m launch.train --config=configs/text_files.py:train=reviews.csv,text=review,label=stars,n=1+2 --workdir=runs/reviews

Stages as in configs/glue.py. Classes are scored by accuracy, numbers by their correlations. Arguments beside those of configs/glue.py:

    train=          file with a named column for the texts and one for the labels
    dev=            of the same form, to score; none: every tenth row of the training file, about, is held out
    test=           of the same form
    text=           column of the texts
    text_pair=      column of second texts; none: there are none
    label=          column of the labels
    numbers=true    labels are numbers
    format=         tsv, csv, jsonl or parquet, where the ending of the file does not say it
    header=false    TSV and CSV without a header; columns are named by their numbers, from 1
"""

from configs import tasks
from datamux_jax.errors import InputError

FILES = {"train": "", "dev": "", "test": "", "text": "", "text_pair": "", "label": "", "format": ""}
HELD_OUT = 0.1


def get_config(arg=None):
    c, arg = tasks.base(arg, **FILES, numbers=False, header=True)
    missing = [f"{name}=" for name in ("train", "text", "label") if not arg[name]]
    if missing:
        raise InputError(
            f"{', '.join(missing)} is missing. Name the training file and its columns, as in "
            "configs/text_files.py:train=reviews.csv,text=review,label=stars."
        )
    c.title = "N texts at once"
    c.data.source = "table"
    c.data.train_file, c.data.validation_file, c.data.test_file = arg.train, arg.dev, arg.test
    c.data.text, c.data.text_pair, c.data.label = arg.text, arg.text_pair, arg.label
    c.data.format, c.data.header, c.data.numbers = arg.format, arg.header, arg.numbers
    c.data.validation_share = HELD_OUT
    tasks.stages(c, arg, "regression" if arg.numbers else "classification")
    return c
