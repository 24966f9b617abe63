"""Warm-up by state distillation: the hidden states of a plain encoder, read out of the mixture layer by layer, on running text.

    python -m launch.train --config=configs/states.py:init=minilm,n=2+5,files=texts --workdir=runs/states

The network starts from the encoder, mixes N texts, and learns to give what the encoder makes of each text by itself; tokens are
retrieved beside it. Of the operations of a step 29% are the teacher's at N = 2, and 63% at N = 10 (minilm, 64 tokens). Arguments:

    init=           the encoder, teacher and start in one: the folder of a plain run or of a published encoder, or minilm
    n=2+5+10        numbers of instances, above 1
    files=          a file, folder or pattern of text; or tfds= a data set of TensorFlow Datasets
    length=         tokens of a chunk; from a plain run of ours that was trained from scratch, its data.length
    groups=         mixed rows a step
    steps=          of training
    rate=           learning rate
    dropout=        of activations and of attention
    mux=, demux=    values of mux.name and demux.name, if they are to be others than those of docs/tasks.md

One warm-up serves many tasks: `configs/glue.py:sst2,n=2,init=runs/states/n2,warmup=0`.
"""

from configs import common, pretraining, tasks
from datamux_jax.errors import InputError

USUAL = {"length": 64, "groups": 8, "steps": 4000, "n": (2, 5), "rate": 1e-3, "dropout": 0.0}


def get_config(arg=None):
    c, arg = pretraining.base(arg, "bert", **USUAL, mux="", demux="")
    if not tasks.from_encoder(arg):
        raise InputError(
            f"init={arg.init!r} is no plain encoder, of which the states could be learned. Name the folder of a plain run or of a "
            "published encoder, or minilm."
        )
    if 1 in arg.n:
        raise InputError("n=1 is the plain network, whose states are learned here. Give numbers of instances above 1.")
    c.title = "Hidden states of a plain encoder, read out of mixed rows"
    c.model.pool = tasks.ARGUMENTS["pool"]
    c.mux.attend_padding = False  # As in tasks, which start from what is learned here.
    c.optimizer.update_rule, c.optimizer.schedule, c.optimizer.weight_decay = "adamw", "cosine", 0.01
    c.optimizer.warmup_steps = min(100, arg.steps // 10)
    c.update(tasks.learning_states(arg.init))
    c.steps, c.optimizer.learning_rate = arg.steps, arg.rate
    c.model.dropout_rate = c.model.attention_dropout_rate = arg.dropout
    c.eval.examples = 400
    common.set_runs(c, {f"n{n}": tasks.mixed(n, arg) | arg.start.to_dict() for n in arg.n})
    return c
