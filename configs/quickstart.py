"""One Transformer, 3 layers, 128 wide, on scikit-learn's digits: what does it cost to serve N images at once?

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart

N = 1 is the plain network: nothing mixed, nothing unmixed. `n=1+2+4+8+16` chooses other N, `steps=` the length of training.
"""

from configs import common


def get_config(arg=None):
    arg = common.parse_arg(arg, n=(1, 2, 4, 8), steps=2000)
    c = common.get_config()
    c.title = "Digits: one Transformer, N images at once"
    c.steps = arg.steps
    c.optimizer.warmup_steps = min(100, arg.steps)
    c.optimizer.weight_decay = 0.1
    c.model.init_stddev = 0.02
    c.demux.num_layers = 1  # As accurate as two layers at N = 8, and unmixing is what grows with N.
    c.eval.every_slot = True  # 377 test images are few: compare slots on the same ones.
    # A lone network overfits 1,420 images; companions are noise enough for the others, and dropout would only hurt them.
    dropout = {"model": {"dropout_rate": 0.1, "attention_dropout_rate": 0.1}}
    common.set_runs(c, {f"n{n}": common.instances(n) | (dropout if n == 1 else {}) for n in arg.n})
    return c
