"""Networks to measure, with random weights and without data: throughput against N.

    python -m launch.benchmark --config=configs/benchmark.py:bert_base,n=1+2+5+10+20+40 --output=runs/benchmark

Arguments:

    bert_base       the size, first and without a name: of configs/models.py, or LAYERSxWIDTH (4x256; the width a multiple of 64)
    n=1+2+5         numbers of instances
    length=         tokens of a row
    groups=         mixed rows a batch
    task=           classification, regression or tagging
    mux=, demux=    of all networks with N > 1
    pool=           what classification reads; by default what the size's published network does
    dtype=          float32 or bfloat16
    vocab=          rows of the embedding table
    retrieval=      training: weight of the retrieval loss where N > 1, beside the rest for the task; N = 1 has the task alone
"""

from configs import common, tasks


def get_config(arg=None):
    size, _, rest = (arg or "").partition(",")
    if "=" in size:
        size, rest = "", arg
    arg = common.parse_arg(
        rest, n=(1, 2, 5, 10, 20, 40), length=128, groups=8, task="classification", mux="gaussian_hadamard", demux="rsa",
        pool="", dtype="float32", vocab=30522, retrieval=0.1,
    )  # fmt: skip
    size = size or "bert_base"
    c = common.get_config()
    c.title = f"{size}, {arg.task}, {arg.length} tokens"
    c.model.update(tasks.model_of(size))
    c.model.pool = arg.pool or c.model.pool
    c.objective = arg.task
    c.dtype = arg.dtype
    c.batch_groups = c.eval.batch_groups = arg.groups
    c.data.source = "cldr"
    c.data.tokenizer = "wordpiece"
    c.data.vocab_size = arg.vocab
    c.data.length = arg.length
    c.optimizer.learning_rate = 1e-4
    runs = {}
    for n in arg.n:
        runs[f"n{n}"] = common.instances(n)
        if n > 1:
            runs[f"n{n}"] |= {
                "mux": {"name": arg.mux},
                "demux": {"name": arg.demux},
                "task_loss_coeff": 1 - arg.retrieval,
                "retrieval_loss_coeff": arg.retrieval,
            }
    common.set_runs(c, runs)
    return c
