"""A label for every word, N sentences at once: parts of speech, entities.

    python -m launch.train --config=configs/tagging.py:ewt,n=1+2,data=UD_English-EWT,init=minilm --workdir=runs/ewt
    python -m launch.train --config=configs/tagging.py:train=my.conll,dev=dev.conll,n=2 --workdir=runs/mine

Stages as in configs/glue.py. Entities are scored by F1 of whole entities and by accuracy, other tags by accuracy. Arguments beside
those of configs/glue.py:

    ewt             first and without a name: ewt (parts of speech) or conll2003 (entities); or none, and train= and dev=
    data=           a folder with the data set's files, known by their names (.conllu before others); none: TensorFlow Datasets
    train=, dev=, test=  files of your own, in CoNLL columns or CoNLL-U
    label=          number of the column of the labels, by default the last; in CoNLL-U upos (default) or xpos
"""

from configs import tasks
from datamux_jax.data import tagging
from datamux_jax.errors import InputError


def get_config(arg=None):
    name, _, rest = (arg or "").partition(",")
    if "=" in name:
        name, rest = "", arg or ""
    c, arg = tasks.base(rest, data="", train="", dev="", test="", label="")
    if (name not in tagging.SETS) if name else not (arg.data or (arg.train and arg.dev)):
        raise InputError(
            f"{name!r} with data={arg.data!r}, train={arg.train!r}, dev={arg.dev!r} is nothing to tag. Name a data set first, as in "
            f"configs/tagging.py:ewt,n=2 ({', '.join(tagging.SETS)}), or files: train=FILE,dev=FILE, or data=FOLDER."
        )
    c.title = f"{name or 'Tagging'}: N sentences at once"
    c.data.source, c.data.name, c.data.path, c.data.label = "tagging", name, arg.data, arg.label
    c.data.train_file, c.data.validation_file, c.data.test_file = arg.train, arg.dev, arg.test
    tasks.stages(c, arg, "tagging")
    return c
