"""What the configs of tasks share: sizes or weights to start from, stages, arguments."""

from configs import common, models, pretraining, starting
from datamux_jax.errors import InputError

MUX, DEMUX = "binary_hadamard", "mlp"  # Of networks that start from an encoder (docs/tasks.md).
RATE, DROPOUT = 1e-4, 0.1
MIXED_RATE, MIXED_DROPOUT = 2e-4, 0.0  # Of networks that mix and start from something (docs/tasks.md).
ARGUMENTS = {
    "n": (1, 2, 5),
    "init": "",
    "size": "",
    "tokenizer": "",
    "warmup": 1500,
    "steps": 3000,
    "groups": 32,
    "length": 128,
    "rate": 0.0,
    "dropout": -1.0,
    "pool": "mean",
    "buckets": True,
    "distill": 0.0,
    "states": True,
    "mux": "",
    "demux": "",
}


def base(text: str | None, /, **defaults):
    """The base config with the network, optimizer and evaluation of a task, and the parsed arguments.

    Args:
      text: what stands after the colon.
      **defaults: arguments of the family, and other defaults for those of all.

    Returns:
      The config and the arguments.

    Raises:
      InputError: an unknown argument or size, an encoder to start from that cannot be read, or arguments that do not go together.
    """
    arg = common.parse_arg(text, **(ARGUMENTS | defaults))
    c = common.get_config()
    if arg.init:
        arg.start = starting.take(c, arg.init, arg.size, arg.n)
    else:
        arg.start = {}
        c.model.update(model_of(arg.size or "4x256"))
    for name in ("mux", "demux"):
        if arg[name] and "mux" in arg.start:
            raise InputError(
                f"init={arg.init} mixes in its own way, so {name}={arg[name]} has no place. Leave it out, or start from a plain "
                "encoder."
            )
    c.model.dropout_rate = c.model.attention_dropout_rate = DROPOUT if arg.dropout == -1 else arg.dropout
    c.model.pool = arg.pool
    c.data.tokenizer = arg.tokenizer or arg.init or "bytes"
    c.data.length = arg.length
    c.data.buckets = arg.buckets
    c.batch_groups = arg.groups
    c.optimizer.learning_rate = arg.rate or RATE
    c.eval.split = "validation"
    return c, arg


def model_of(size: str) -> dict:
    """The keys of `config.model` for a key of `models.SIZES`, or `LAYERSxWIDTH` of BERT's family."""
    return models.SIZES[size] if size in models.SIZES else pretraining.model_of("bert", size.removeprefix("bert_"))


def stages(c, arg, objective: str) -> None:
    """Makes `c` an experiment: for each N > 1 a warm-up on the task's own texts, then the task.

    A network that starts from a plain encoder learns the encoder's hidden states in the warm-up, with token retrieval beside it; any
    other one learns token retrieval alone. The task has the loss 0.9 task + 0.1 retrieval (DataMUX, section 3.3). The plain network
    (N = 1) has nothing to take apart, and learns the task alone. The first stage starts from `init`.

    With `distill` the plain network comes first, and teaches the others the task.

    Raises:
      InputError: it is to teach, but is not among the runs.
    """
    if arg.distill and 1 not in arg.n:
        raise InputError(
            f"distill={arg.distill} lets the plain network teach the others, but n={'+'.join(map(str, arg.n))} has none. Add 1 to n, "
            "or leave distill out."
        )
    runs = {}
    for n in sorted(arg.n, key=lambda n: n != 1) if arg.distill else arg.n:
        start = merged(mixed(n, arg), usual(n, arg), arg.start.to_dict())
        if n > 1 and arg.warmup:
            warm_up = learning_states(arg.init) if arg.states and from_encoder(arg) else {"objective": "retrieval"}
            runs[f"n{n}-warmup"] = merged(start, stage(arg.warmup), warm_up)
            start |= {"init_from": f"../n{n}-warmup"}
        losses: dict = {"task_loss_coeff": 0.9, "retrieval_loss_coeff": 0.1} if n > 1 else {}
        if n > 1 and arg.distill:
            losses["distill"] = {"teacher": "../n1", "weight": arg.distill}
        runs[f"n{n}"] = merged(start, stage(arg.steps), losses, {"objective": objective})
    common.set_runs(c, runs)


def from_encoder(arg) -> bool:
    """Whether `init` is given, and names a plain network."""
    return bool(arg.init) and "mux" not in arg.start


def mixed(n: int, arg) -> dict:
    """The keys of a network of `n` instances, with the multiplexer and demultiplexer asked for."""
    keys = common.instances(n)
    if n > 1:
        mux, demux = (MUX, DEMUX) if from_encoder(arg) else (keys["mux"]["name"], keys["demux"]["name"])
        keys |= {"mux": {"name": arg.mux or mux}, "demux": {"name": arg.demux or demux}}
    return keys


def usual(n: int, arg) -> dict:
    """The learning rate and the dropout of a network of `n` instances where the arguments leave them open and the base has others."""
    keys: dict = {}
    if n > 1 and arg.init:
        if not arg.rate:
            keys["optimizer"] = {"learning_rate": MIXED_RATE}
        if arg.dropout == -1:
            keys["model"] = {"dropout_rate": MIXED_DROPOUT, "attention_dropout_rate": MIXED_DROPOUT}
    return keys


def learning_states(teacher: str) -> dict:
    """The keys of a run that learns the hidden states of `teacher`, as measured in docs/tasks.md."""
    return {
        "objective": "states",
        "distill": {"teacher": teacher},
        "retrieval_loss_coeff": 0.3,
        "retrieval_percentage": 0.25,
        "model": {"dropout_rate": 0.0, "attention_dropout_rate": 0.0},
        "optimizer": {"learning_rate": 1e-3},
    }


def stage(steps: int) -> dict:
    """The keys of a stage; a tenth of it is the warm-up of the learning rate."""
    return {"steps": steps, "optimizer": {"warmup_steps": steps // 10}}


def merged(*parts: dict) -> dict:
    """Nested dicts as one; of equal keys the last one counts."""
    found: dict = {}
    for part in parts:
        for key, value in part.items():
            found[key] = merged(found[key], value) if isinstance(value, dict) and key in found else value
    return found
