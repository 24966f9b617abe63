"""Shared by all tests: a small config, a small trained run, and CPU devices without surprises."""

import os
import tempfile

# Before jax is imported, and for the commands that tests start: CPU only, quiet, and every program compiled once a session.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="datamux-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest
from absl import logging

from configs import common

logging.set_verbosity(logging.ERROR)


def small_config(n: int = 2, **changes):
    """A network that compiles fast, on the digits; `changes` are dotted keys with `__` for the dot."""
    config = common.get_config()
    config.update(common.instances(n))
    config.model.update({"hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32})
    config.update({"batch_groups": 8, "steps": 6, "log_every": 2})
    config.optimizer.warmup_steps = 2
    config.checkpoint.every = 4
    config.eval.update({"groupings": 2, "batch_groups": 16})
    config.benchmark.update({"windows": 2, "seconds": 0.01})
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


def text_config(n: int = 2, **changes):
    """The same on phrases."""
    return small_config(n, **{"data__source": "cldr", "data__length": 12, **changes})


def fresh_params(model, inputs_shape, inputs_dtype="int32", generator=None):
    """Parameters of a new network; compiled, since initialising op by op takes many times as long."""
    import jax

    from datamux_jax import sharding
    from datamux_jax.build import init_params

    make = jax.jit(lambda key: sharding.unbox(init_params(model, key, inputs_shape, inputs_dtype, generator)))
    return make(jax.random.key(0))


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a small trained run on digits, N = 2."""
    from datamux_jax.train import train

    folder = tmp_path_factory.mktemp("digits") / "run"
    train(small_config(), folder)
    return folder


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """The folder of a small trained run on phrases, N = 2, classification with retrieval."""
    from datamux_jax.train import train

    folder = tmp_path_factory.mktemp("text") / "run"
    train(text_config(retrieval_loss_coeff=0.1), folder)
    return folder
