"""What the configs of pre-training share: running text, sizes, stages."""

from configs import common, models, starting
from datamux_jax.errors import InputError

ARGUMENTS = {
    "n": (5,),
    "files": "",
    "tfds": "",
    "init": "",
    "tokenizer": "",
    "vocab": 30522,
    "length": 512,
    "groups": 256,
    "dropout": 0.1,
    "rate": 1e-4,
    "steps": 1_000_000,
}
STAGES = {"retrieval": 10_000, "stage": "all"}


def base(text: str | None, kind: str, **defaults):
    """The base config with the data, sizes and optimizer of a published pre-training, and the parsed arguments.

    Args:
      text: what stands after the colon. The first part may be a size without a name (`base,n=5`): small, base or large, or
        `LAYERSxWIDTH` (`4x256`, with heads of 64 and an MLP four times as wide).
      kind: key of `FAMILIES`.
      **defaults: arguments of the family, and other defaults for those of all.

    Returns:
      The config and the arguments.

    Raises:
      InputError: an unknown size or argument, or no data.
    """
    size, _, rest = (text or "").partition(",")
    if "=" in size:
        size, rest = "", text or ""
    arg = common.parse_arg(rest, **(ARGUMENTS | defaults))
    c = common.get_config()
    if arg.init:
        arg.start = starting.take(c, arg.init, size, arg.n)
    else:
        arg.start = {}
        c.model.update(model_of(kind, size or "base"))
    c.model.dropout_rate = c.model.attention_dropout_rate = arg.dropout
    if bool(arg.files) == bool(arg.tfds):
        raise InputError(
            f"files={arg.files!r}, tfds={arg.tfds!r}: pre-training reads one of them, text files (files=FOLDER) or a data set of "
            "TensorFlow Datasets (tfds=wikipedia/20230601.en). Name one."
        )
    c.data.source = "files" if arg.files else "tfds"
    c.data.path, c.data.name = arg.files, arg.tfds
    c.data.tokenizer = arg.tokenizer or arg.init or ("bpe" if kind == "roberta" else "wordpiece")
    c.data.vocab_size = arg.vocab
    c.data.length = arg.length
    c.batch_groups = arg.groups
    c.mux.attend_padding = (
        True  # Packed text has none, and the published classes, to which runs are exported, know no other way.
    )
    c.log_every = 100
    c.optimizer.update_rule = "published"
    c.optimizer.schedule = "linear"
    c.optimizer.weight_decay = 0.0
    c.optimizer.learning_rate = arg.rate
    c.eval.split = "validation"
    c.eval.groupings = 1
    c.eval.examples = 2000
    c.eval.batch_groups = 32
    c.checkpoint.every = 1000
    return c, arg


def check_family(c, arg, families: tuple[str, ...]) -> None:
    """Raises InputError unless the network that `init` names is of one of the families."""
    if c.model.family not in families:
        raise InputError(
            f"init={arg.init} is a network of the family {c.model.family!r}, but this config pre-trains {' or '.join(families)}. "
            "Choose configs/muxbert.py for BERT and RoBERTa, configs/muxelectra.py for ELECTRA, or another init."
        )


def model_of(family: str, size: str) -> dict:
    """The keys of `config.model` for a published size or `LAYERSxWIDTH`."""
    if f"{family}_{size}" in models.SIZES:
        return models.SIZES[f"{family}_{size}"]
    layers, _, width = size.partition("x")
    if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width) % 64 == 0 and int(width)):
        known = ", ".join(name.removeprefix(family + "_") for name in models.SIZES if name.startswith(family))
        raise InputError(
            f"The size {size!r} does not exist. Choose one of {known}, or LAYERSxWIDTH with a width that is a multiple of 64, "
            "such as 4x256."
        )
    keys = models.size(family, int(layers), int(width), int(width) // 64, 4 * int(width))
    # As wide activations as BERT base has with 0.02: narrow networks stand still for long with that.
    return keys | {"init_stddev": round(0.02 * (768 / int(width)) ** 0.5, 3)}


def stages(c, arg, pretraining: dict) -> None:
    """Makes `c` an experiment: for each N the retrieval stage, then `pretraining` from what it learned.

    The plain network (N = 1) has nothing to take apart, and is pre-trained alone.
    """
    if arg.stage not in ("all", "retrieval", "pretraining"):
        raise InputError(f"stage={arg.stage!r} does not exist. Choose all, retrieval or pretraining.")
    runs = {}
    for n in arg.n:
        start = arg.start.to_dict()
        if n > 1 and arg.retrieval and arg.stage != "pretraining":
            stage = {"objective": "retrieval", "steps": arg.retrieval, "optimizer": {"warmup_steps": arg.retrieval // 10}}
            runs[f"n{n}-retrieval"] = common.instances(n) | start | stage
        if n > 1 and arg.retrieval:
            start |= {"init_from": f"../n{n}-retrieval"}
        if arg.stage != "retrieval":
            steps = {"steps": arg.steps, "optimizer": {"warmup_steps": min(10_000, arg.steps // 10)}}
            runs[f"n{n}"] = common.instances(n) | steps | start | pretraining
    common.set_runs(c, runs)
