"""Handwritten digits as images, N at once: the LeNet and the MLP of DataMUX, and a Transformer over rows of pixels.

    python -m launch.train --config=configs/vision.py:lenet,mux=nonlinear_expand,n=8,data=MNIST --workdir=runs/lenet

Defaults are the published protocol: 20x20 pixels, 15 epochs, SGD with rate 0.1, 32 groups a step, squared error to targets of +-1; for
the Transformer cross-entropy and AdamW. An epoch has as many groups as there are training images, for all N, as in the published
notebook: every image is seen N times. Two things differ: N = 1 is the plain network, nothing mixed or unmixed (plain=false: as
published), and on digits, which are few, rate and epochs are larger. Arguments:

    lenet              the network, first and without a name: lenet, mlp or transformer
    data=              digits, of scikit-learn, enlarged; mnist, of TensorFlow Datasets; or a folder with MNIST's four idx files (one
                       that is called mnist: ./mnist)
    n=1+2+4+8          numbers of instances
    mux=               transformation: for lenet and mlp of datamux_jax/image_mixing.py or mixing.py, for transformer of mux.py
    demux=             mlp, layers of each instance's own, or rsa, a key for each
    plain=false        N = 1 is mixed and unmixed too: the same network for all N
    loss=              squared or cross_entropy
    optimizer=         sgd or adamw
    rate=              learning rate; 0: the published 0.1, the Transformer's 0.001, on digits 1 for lenet and 0.3 for mlp
    schedule=          constant, linear or cosine
    epochs=            0: 15; on digits 30, for mlp 60
    groups=            mixed images a step
    width=, depth=     of mlp and transformer alone: units of a layer, and layers
    size=              pixels of a side; 0: as they are
    validation=        training images held out, and scored in place of the test images; 0: none
    examples=          training images, held out ones included, where a folder has not MNIST's 60,000
    seed=
"""

from configs import common
from datamux_jax.data.builtin import digits
from datamux_jax.errors import InputError, choose

# What differs between networks: arguments that are not given.
PUBLISHED = {
    "mux": "nonlinear_expand",
    "demux": "mlp",
    "loss": "squared",
    "optimizer": "sgd",
    "schedule": "constant",
}
# Rate and epochs on MNIST, and on digits.
TRAINING = {
    "lenet": ((0.1, 15), (1.0, 30)),
    "mlp": ((0.1, 15), (0.3, 60)),
    "transformer": ((1e-3, 15), (1e-3, 30)),
}
NETWORKS: dict[str, dict] = {
    "lenet": PUBLISHED,
    "mlp": PUBLISHED | {"mux": "orthogonal", "width": 400, "depth": 2},
    "transformer": {"mux": "gaussian_hadamard", "demux": "rsa", "loss": "cross_entropy", "optimizer": "adamw"}
    | {"schedule": "cosine", "width": 128, "depth": 3},
}
MNIST_EXAMPLES = 60_000


def get_config(arg=None):
    name, _, rest = (arg or "").partition(",")
    choose(NETWORKS, name, "Name the network first, as in configs/vision.py:lenet,n=8. The network")
    shared = {"data": "digits", "n": (1, 2, 4, 8), "plain": True, "epochs": 0, "groups": 32, "size": 20}
    arg = common.parse_arg(rest, **shared, **NETWORKS[name], rate=0.0, validation=0, examples=0, seed=0)
    rate, epochs = TRAINING[name][arg.data == "digits"]
    arg.rate, arg.epochs = arg.rate or rate, arg.epochs or epochs
    c = common.get_config()
    c.title = f"{name}, {'MNIST' if arg.data != 'digits' else 'digits'}: N images at once"
    c.seed = arg.seed
    c.batch_groups = arg.groups
    c.task_loss = arg.loss
    c.data.source = "digits" if arg.data == "digits" else "mnist"
    c.data.path = arg.data if arg.data not in ("digits", "mnist") else ""
    c.data.image_size, c.data.validation_examples = arg.size, arg.validation
    c.eval.split = "validation" if arg.validation else "test"
    c.eval.batch_groups = 128
    c.model.backbone = "encoder" if name == "transformer" else name
    if name != "lenet":
        c.model.hidden_size, c.model.num_layers = arg.width, arg.depth
    if name == "transformer":
        c.model.mlp_dim = 4 * arg.width
    c.optimizer.update_rule, c.optimizer.learning_rate, c.optimizer.schedule = arg.optimizer, arg.rate, arg.schedule
    if arg.optimizer == "sgd":  # As published: nothing but the rate.
        c.optimizer.weight_decay = c.optimizer.grad_clip = 0.0
    examples = arg.examples or (len(digits().split("train")) if arg.data == "digits" else MNIST_EXAMPLES)
    for key, value, least in (("groups", arg.groups, 1), ("epochs", arg.epochs, 1), ("validation", arg.validation, 0)):
        if value < least:
            raise InputError(f"{key}={value} is too few. Give {least} or more.")
    if min(arg.n) < 1:
        raise InputError(f"n={'+'.join(map(str, arg.n))}: a group has at least one image. Give numbers above 0.")
    if examples - arg.validation < arg.groups:
        raise InputError(
            f"groups={arg.groups} is more than the {examples - arg.validation} training images (examples={examples} without "
            f"validation={arg.validation}), and leaves an epoch without a step. Lower groups or validation."
        )
    steps = arg.epochs * ((examples - arg.validation) // arg.groups)
    common.set_runs(c, {f"n{n}": _run(n, steps, arg) for n in arg.n})
    return c


def _run(n: int, steps: int, arg) -> dict:
    mixed = n > 1 or not arg.plain
    return {
        "num_instances": n,
        "steps": steps,
        "mux": {"name": arg.mux if mixed else "none"},
        "demux": {"name": arg.demux if mixed else "none"},
        "log_every": max(50, steps // 100),
        "checkpoint": {"every": max(500, steps // 5)},
        "optimizer": {"warmup_steps": 0 if arg.optimizer == "sgd" else steps // 20},
    }
