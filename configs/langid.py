"""Language identification of short phrases (Unicode CLDR, 30 languages), byte by byte.

    python -m launch.train --config=configs/langid.py --workdir=runs/text

Two stages a network: token-retrieval warm-up (DataMUX, section 3.3), then fine-tuning with 0.9 task + 0.1 retrieval. N = 1 is the
plain network. Arguments: `n=1+2` the numbers of instances; `retrieval=4` further ones of which only the warm-up is run, twice as
long; `warmup=` and `finetune=` steps; `pool=` what classification reads; `width=` and `layers=` of the encoder. In a given time, steps
buy more accuracy than width here, and weight decay more than dropout.
"""

from configs import common


def get_config(arg=None):
    arg = common.parse_arg(arg, n=(1, 2), retrieval=(4,), warmup=300, finetune=6000, pool="mean", width=128, layers=3)
    c = common.get_config()
    c.title = "Language identification: N phrases at once"
    c.baseline = "char_tfidf"
    c.data.source = "cldr"
    c.data.length = 40
    c.batch_groups = 32
    c.optimizer.weight_decay = 0.2
    c.model.hidden_size = arg.width
    c.model.num_layers = arg.layers
    c.model.num_heads = arg.width // 32
    c.model.mlp_dim = 4 * arg.width
    c.model.pool = arg.pool
    runs = {}
    for n in (*arg.n, *arg.retrieval):
        start = {}
        if arg.warmup:
            runs[f"n{n}-warmup"] = stage(n, arg.warmup if n in arg.n else 2 * arg.warmup) | {"objective": "retrieval"}
            start = {"init_from": f"../n{n}-warmup"}
        if n in arg.n:
            runs[f"n{n}"] = stage(n, arg.finetune) | start | {"task_loss_coeff": 0.9, "retrieval_loss_coeff": 0.1}
    common.set_runs(c, runs)
    return c


def stage(n: int, steps: int) -> dict:
    return common.instances(n) | {"steps": steps, "optimizer": {"warmup_steps": min(100, steps)}}
