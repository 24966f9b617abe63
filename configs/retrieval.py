"""DataMUX's warm-up: token retrieval alone, on running text (DataMUX, section 3.3).

    python -m launch.train --config=configs/retrieval.py:base,n=2+5+10,tfds=wiki40b/en --workdir=runs/retrieval

Settings of the published code: RoBERTa's conventions, 128 tokens, 24 groups, learning rate 5e-5, linear, no warm-up steps, instance
vectors of norm 20, 500,000 steps. Arguments as in `configs/muxbert.py`; `norm=` of the instance vectors, 0 for unit variance.

One warm-up serves many tasks: `configs/glue.py:sst2,n=2,init=runs/retrieval/n2,warmup=0`.
"""

from configs import common, pretraining
from datamux_jax.errors import InputError


def get_config(arg=None):
    text = arg
    usual = {"length": 128, "groups": 24, "steps": 500_000, "vocab": 50265, "n": (2,)}
    c, arg = pretraining.base(arg, "roberta", **usual, rate=5e-5, norm=20.0)
    if "mux" in arg.start and ",norm=" in f",{text or ''}":
        raise InputError(f"init={arg.init} has instance vectors of its own, so norm={arg.norm} has no place. Leave it out.")
    c.title = "Token retrieval: N texts read back from one row"
    c.optimizer.warmup_steps = 0
    c.objective = "retrieval"
    c.mux.norm = arg.norm
    c.steps = arg.steps
    common.set_runs(c, {f"n{n}": common.instances(n) | arg.start.to_dict() for n in arg.n})
    return c
