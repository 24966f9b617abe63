"""A task of GLUE, N texts or pairs at once.

    python -m launch.train --config=configs/glue.py:sst2,n=1+2+5,data=SST-2,init=minilm --workdir=runs/sst2

For each N > 1 two stages: a warm-up on the task's own texts, then the task with 0.9 task + 0.1 retrieval (DataMUX, section 3.3); N = 1
is the plain network. A network that starts from a plain encoder learns the encoder's hidden states in the warm-up; any other, token
retrieval. Scored is the development set, with the metrics that GLUE reports. Arguments:

    sst2            the task, first and without a name: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli
    data=           a folder with the task's files, or GLUE's folder; none: TensorFlow Datasets
    n=1+2+5         numbers of instances
    init=           weights to start from: the folder of a run or of a published encoder, or minilm, the installed package
    size=           without init: a size of configs/models.py (bert_base), or LAYERSxWIDTH, the width a multiple of 64
    tokenizer=      bytes, or a file or folder with one; by default that of init
    warmup=         steps of the warm-up; 0: none
    states=false    token retrieval alone in the warm-up, from a plain encoder too
    mux=, demux=    values of mux.name and demux.name; by default those of docs/tasks.md from an encoder, DataMUX's otherwise
    steps=          of the task
    groups=         mixed rows a step
    length=         tokens of a row
    buckets=        texts of similar length are trained on together, in shorter rows
    rate=           learning rate; 0: 1e-4, and for N > 1 with init 2e-4. The warm-up by hidden states has one of its own, 1e-3,
    dropout=        and no dropout. Of activations and of attention; -1: 0.1, and for N > 1 with init 0
    pool=           what the classifier reads, a value of model.pool; by default mean; demuxed_mean takes longer (docs/tasks.md)
    distill=        share of the task loss that the outputs of the run n1 give instead of the labels (datamux_jax/distill.py); 0: none

MNLI is scored on the matched part; --config.eval.split=validation_mismatched scores the other one.
"""

from configs import tasks
from datamux_jax.data import glue
from datamux_jax.errors import InputError

SHORT = ("cola", "sst2")  # Single sentences: 64 tokens. All others: 128, as published.


def get_config(arg=None):
    task, _, rest = (arg or "").partition(",")
    if task not in glue.TASKS:
        raise InputError(
            f"{task!r} is no task of GLUE. Name one first, as in configs/glue.py:sst2,n=2. Choose one of: {', '.join(glue.TASKS)}."
        )
    c, arg = tasks.base(rest, data="", length=64 if task in SHORT else 128)
    c.title = f"{glue.TASKS[task].folder}: N at once"
    c.data.source, c.data.name, c.data.path = "glue", task, arg.data
    if task == "mnli":
        c.eval.split = glue.MATCHED
    tasks.stages(c, arg, "classification" if glue.TASKS[task].names else "regression")
    return c
