"""`Multiplexed` around any Flax module, and groups of flat batches."""

import re
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import datamux_jax
from datamux_jax import demux, image_mixing, mixing, multiplexed, mux, unmixing
from datamux_jax.data.builtin import digits
from datamux_jax.errors import InputError
from datamux_jax.layers import Spec


def images(groups=3, n=2, *shape):
    return jax.random.normal(jax.random.key(0), (groups, n, *(shape or (4, 4))))


def wrapped(backbone, n=2, *, mixer=None, head=None):
    return datamux_jax.Multiplexed(mixer or mixing.GaussianHadamard(), backbone, unmixing.InstanceMLP(n), n, head=head)


def fresh(module, *args):
    """Variables and output, in one program: op by op takes many times as long."""
    y, variables = jax.jit(module.init_with_output)(jax.random.key(1), *args)
    return nn.unbox(variables), y


class Flat(nn.Module):
    """A small network of whatever shape."""

    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(8)(x.reshape(len(x), -1)))


def test_the_example_of_the_docstring_runs():
    lines = multiplexed.Multiplexed.__doc__.split("\n\n        import ")[1].splitlines()
    code = "\n".join(line.removeprefix(" " * 8) for line in ["import " + lines[0], *lines[1:]]).split("Further arguments")[0]
    names = {}
    exec(code.rsplit("\n    ", 1)[0] if code.endswith("    ") else code, names)
    assert names["logits"].shape == (30, 10)


@pytest.mark.parametrize("role", ["mux", "backbone", "demux", "head"])
def test_a_class_in_place_of_a_module_is_refused(role):
    parts = {"mux": mixing.GaussianHadamard(), "backbone": Flat(), "demux": unmixing.InstanceMLP(2), "head": nn.Dense(3)}
    with pytest.raises(InputError, match=rf"^{role} = Flat is a class\. Give a module of it: {role} = Flat\(\.\.\.\)\.$"):
        datamux_jax.Multiplexed(**(parts | {role: Flat}), num_instances=2)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", mixing.MIXING)
def test_mixing_of_any_rank_is_its_formula(name, last):
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 6)).astype(np.float32)
    variables, mixed = fresh(mixing.MIXING[name](last=last), x)
    p = np.asarray(variables["params"]["instance_embedding"])
    rows = x.reshape(2, 3, *((-1, 6) if last else (1, -1)))
    if "hadamard" in name:
        expected = sum(p[i] * rows[:, i] for i in range(3)) / 3
    else:
        expected = sum(rows[:, i] @ p[i].T for i in range(3)) / np.sqrt(3)
    np.testing.assert_allclose(mixed, expected.reshape(2, 2, 2, 6), atol=1e-5)


@pytest.mark.parametrize(
    "mux", [mixing.GaussianHadamard(), mixing.RandomOrtho(), image_mixing.Gaussian(), image_mixing.Rotation()]
)
def test_bytes_are_mixed_as_numbers(mux):
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4)).astype(np.uint8)
    variables, mixed = fresh(mux, x.astype(np.float32))
    np.testing.assert_allclose(mux.apply(variables, x), mixed, atol=1e-3)


def test_frozen_parameters_have_no_gradient_unless_learned():
    x = np.ones((1, 2, 3), np.float32)
    for learned in (False, True):
        apply = mixing.GaussianHadamard(learned=learned).apply
        gradient = jax.jit(jax.grad(lambda v, f=apply: (f({"params": {"instance_embedding": v}}, x) ** 2).sum()))(x[0])
        assert bool((gradient != 0).any()) == learned


def test_instance_mlp_and_keys_are_one_function_for_each_instance():
    h = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    variables, unmixed = fresh(unmixing.InstanceMLP(2, num_layers=2), h)
    p = jax.tree.map(np.asarray, variables["params"]["instances"])
    for i in range(2):
        z = h
        for layer in ("Dense_0", "Dense_1"):
            z = np.tanh(z @ p[layer]["kernel"][i] + p[layer]["bias"][i])
        np.testing.assert_allclose(unmixed[:, i], z, atol=1e-5)
    variables, of_keys = fresh(unmixing.Keys(2), h)
    spec = Spec(4, 0, 1, 0, dropout_rate=0.0, layer_norm_eps=1e-6, init_stddev=0.0)
    inner = jax.jit(demux.RSA(spec, 2).apply)({"params": variables["params"]["rsa"]}, h)
    np.testing.assert_allclose(of_keys, inner, atol=1e-5)
    one_position = jax.jit(unmixing.Keys(2).apply)(variables, h[:, 2])
    np.testing.assert_allclose(one_position, inner[:, :, 2], atol=1e-4)  # Every position alike, whatever the rank.


def test_it_is_mix_then_backbone_once_then_unmix_then_one_head():
    x = images()
    variables, y = fresh(wrapped(Flat(), head=nn.Dense(5)), x)
    p = jax.tree.map(np.asarray, variables["params"])
    mixed = np.einsum("np,bnp->bp", p["mux"]["instance_embedding"], x.reshape(3, 2, 16)) / 2
    h = np.tanh(mixed @ p["backbone"]["Dense_0"]["kernel"] + p["backbone"]["Dense_0"]["bias"])
    own = p["demux"]["instances"]["Dense_0"]
    z = np.tanh(np.einsum("bd,nde->bne", h, own["kernel"]) + own["bias"])
    np.testing.assert_allclose(y, z @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-5)
    assert p["head"]["kernel"].shape == (8, 5)


def test_instances_permuted_with_their_parameters_permute_the_outputs():
    x = images(3, 4)
    model = wrapped(Flat(), 4)
    variables, y = fresh(model, x)
    order = np.array([2, 0, 3, 1])
    of_instances = {key: jax.tree.map(lambda p: p[order], variables["params"][key]) for key in ("mux", "demux")}
    permuted = jax.jit(model.apply)({"params": {**variables["params"], **of_instances}}, x[:, order])
    np.testing.assert_allclose(permuted, y[:, order], atol=1e-6)


def test_one_instance_is_the_module_itself_or_mixed_alone():
    x = images(3, 1)
    plain = datamux_jax.Multiplexed(None, Flat(), None, 1)
    variables, y = fresh(plain, x)
    alone = jax.jit(Flat().apply)({"params": variables["params"]["backbone"]}, x[:, 0])
    np.testing.assert_allclose(y[:, 0], alone, atol=1e-6)
    assert jax.eval_shape(wrapped(Flat(), 1).init_with_output, jax.random.key(1), x)[0].shape == (3, 1, 8)
    with pytest.raises(InputError, match=r"num_instances = 2 with mux = None .* needs both"):
        datamux_jax.Multiplexed(None, Flat(), None, 2).init(jax.random.key(1), images())


def test_the_multiplexers_of_text_fit_too():
    spec = Spec(8, 0, 1, 0, dropout_rate=0.0)
    model = datamux_jax.Multiplexed(mux.RandomOrtho(spec, 2), nn.Dense(8), demux.RSA(spec, 2), 2)
    assert jax.eval_shape(model.init_with_output, jax.random.key(1), images(3, 2, 5, 8))[0].shape == (3, 2, 5, 8)


class Busy(nn.Module):
    """Reads `train`, has batch statistics, and draws dropout."""

    @nn.compact
    def __call__(self, x, train=False, *, scale=1.0):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return scale * nn.Dropout(0.5, deterministic=not train)(nn.Dense(6)(x))


def test_arguments_streams_and_collections_reach_the_backbone():
    x = images(3, 2, 6)
    model = wrapped(Busy(), head=nn.Dropout(0.5, deterministic=False))
    variables = jax.jit(model.init)({"params": jax.random.key(1), "dropout": jax.random.key(2)}, x)
    rngs = {"dropout": jax.random.key(3)}
    apply = jax.jit(model.apply, static_argnums=2, static_argnames=("mutable", "scale"))
    y, changed = apply(variables, x, True, scale=0.0, mutable=("batch_stats",), rngs=rngs)
    old, new = (v["batch_stats"]["backbone"]["BatchNorm_0"]["mean"] for v in (variables, changed))
    assert (old != new).any()
    assert y.shape == (3, 2, 6)
    full = apply({**variables, **changed}, x, False, rngs=rngs)
    assert ((full[:, 0] == 0) != (full[:, 1] == 0)).any()  # Dropout of the head is drawn for each instance.


class Dropping(nn.Module):
    """A head that reads `train`."""

    @nn.compact
    def __call__(self, z, train=False):
        return nn.Dropout(0.5, deterministic=not train)(z)


@pytest.mark.parametrize("backbone", [Busy(), Flat()])
def test_flags_reach_every_part_that_has_them(backbone):
    x = images(3, 2, 6)
    rngs = {"dropout": jax.random.key(3)}
    model = wrapped(backbone, head=Dropping())
    variables = model.init(jax.random.key(1), x)

    def dropped(train):
        y = model.apply(variables, x, train=train, rngs=rngs, mutable=["batch_stats"])[0]
        return float((y == 0).mean())

    assert dropped(False) < 0.01
    assert 0.2 < dropped(True) < 0.9
    sequential = wrapped(Flat(), head=nn.Sequential([nn.Dense(4)]))
    with pytest.raises(TypeError, match="unexpected keyword argument 'train'"):  # Nobody has it.
        sequential.init(jax.random.key(1), x, train=True)


class Tuple(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x, x


class Fails(nn.Module):
    how: Callable

    @nn.compact
    def __call__(self, x):
        return self.how(x)


class OneRow(nn.Module):
    """Drops the axis of groups."""

    @nn.compact
    def __call__(self, x):
        return x[0]


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (wrapped(Flat()), (3, 4, 5), r"shape \[3, 4, 5\], but this network mixes 2 .* \[groups, 2, ...\].*group\(x, 2\)"),
        (wrapped(Flat()), (3,), r"shape \[3\], but this network mixes 2"),
        (wrapped(Flat()), (3, 2), r"GaussianHadamard takes inputs \[groups, N, ...\] with at least one axis"),
        (
            wrapped(Flat(), mixer=OneRow()),
            (3, 2, 5),
            r"mux OneRow must make one mixed input of each group.*gave shape \[2, 5\]",
        ),
        (
            wrapped(nn.Conv(2, (3, 3)), mixer=mixing.GaussianHadamard()),
            (3, 2, 5),
            r"backbone Conv failed on input of shape \[3, 5\], which the mux GaussianHadamard made of inputs .*shape \[5\]: .*If it",
        ),
        *(
            (wrapped(Fails(how)), (3, 2, 5), rf"backbone Fails failed on input of shape \[3, 5\], .*: {error}: .* choose a mux")
            for how, error in (
                (lambda x: x[:, :, 0], "IndexError"),
                (lambda x: x.shape[3], "IndexError"),
                (lambda x: x.swapaxes(1, 2), "(Value|Index)Error"),
                (lambda x: nn.max_pool(x, (2, 2)), "AssertionError"),
                (lambda x: jnp.einsum("bhwc->bc", x), "ValueError"),
                (lambda x: x.reshape(7, -1), "TypeError"),
            )
        ),
        (
            wrapped(Flat(), head=Fails(lambda z: z[:, :, 0])),
            (3, 2, 5),
            r"head Fails failed on states .*\[3, 2, 8\].*IndexError",
        ),
        (wrapped(Tuple()), (3, 2, 5), r"backbone Tuple must keep the axis of groups.* it gave a tuple"),
        (wrapped(OneRow()), (3, 2, 5), r"backbone OneRow must .* it got \[3, 5\].* but it gave shape \[5\]"),
        (
            datamux_jax.Multiplexed(mixing.GaussianHadamard(), Flat(), unmixing.InstanceMLP(3), 2),
            (3, 2, 5),
            r"demux InstanceMLP must give.*\[3, 8\] one array \[3, 2, ...\], but it gave shape \[3, 3, 8\]",
        ),
        (wrapped(image_mixing.Remap()), (3, 2, 4, 4), r"Remap takes images"),
        (wrapped(Flat(), mixer=image_mixing.Gaussian()), (3, 2, 5), r"Gaussian takes images \[groups, N, height, width\]"),
        (wrapped(Flat(), mixer=image_mixing.Remap()), (3, 2, 5, 5), r"Remap .* 5x5 pixels"),
        (wrapped(Flat(), mixer=mixing.BinaryHadamard()), (3, 2, 1), r"2 instances a chunk of 1 numbers"),
        (wrapped(Flat(), head=nn.Conv(2, (3, 3, 3))), (3, 2, 5), r"head Conv failed on states of all.* shape \[3, 2, 8\]"),
    ],
)
def test_errors_say_which_shape_was_expected_where(model, shape, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_what_is_not_about_shapes_is_left_as_it_is():
    for wrong in ("trian", "axis"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{wrong}'"):
            wrapped(Flat()).init(jax.random.key(0), jnp.zeros((3, 2, 5)), **{wrong: True})


class OwnError(ValueError):
    pass


def test_errors_of_a_modules_own_keep_their_type_and_say_where():
    def refuse(_):
        raise OwnError("Set vocab_size in the config")

    with pytest.raises(OwnError, match="Set vocab_size") as caught:
        wrapped(Fails(refuse)).init(jax.random.key(0), jnp.zeros((3, 2, 5)))
    assert caught.value.__notes__[0].startswith(
        "The backbone Fails was fed input of shape [3, 5], which the mux GaussianHadamard made"
    )


def test_other_shapes_than_at_first_are_refused_when_applied():
    model = wrapped(Flat())
    variables, _ = fresh(model, images())
    with pytest.raises(InputError, match=r"mux GaussianHadamard failed on inputs of shape \[3, 2, 5, 5\]"):
        model.apply(variables, images(3, 2, 5, 5))
    with pytest.raises(InputError, match="mixes 2 instances"):
        model.apply(variables, images(3, 3))


def test_missing_random_streams_are_flax_errors():
    model = wrapped(Busy())
    variables, _ = fresh(model, images(3, 2, 6))
    with pytest.raises(Exception, match="PRNG") as caught:
        model.apply(variables, images(3, 2, 6), True, mutable=["batch_stats"])
    assert not isinstance(caught.value, InputError)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_groups_and_back(count):
    x = np.arange(count * 2).reshape(count, 2)
    for array in (x, jnp.asarray(x)):
        grouped = datamux_jax.group(array, 3)
        assert grouped.shape == (-(-count // 3), 3, 2)
        np.testing.assert_array_equal(datamux_jax.ungroup(grouped, count), x)
    filler = grouped.reshape(-1, 2)[count:]
    np.testing.assert_array_equal(filler, x[np.arange(len(filler)) % count])


def test_groups_of_nothing_and_other_counts_are_refused():
    assert datamux_jax.group([1, 2, 3], 2).tolist() == [[1, 2], [3, 1]]
    for x, n in ((np.zeros((0, 2)), 2), (np.zeros((3, 2)), 0), (np.float32(1), 1)):
        with pytest.raises(InputError, match=re.escape(f"shape {list(x.shape)} makes no groups of {n}")):
            datamux_jax.group(x, n)
    for count in (4, 7, 0):
        with pytest.raises(InputError, match=f"count = {count} inputs"):
            datamux_jax.ungroup(np.zeros((2, 3, 1))[:, :], count) if count != 4 else datamux_jax.ungroup(
                np.zeros((1, 3, 1)), count
            )


class MLPMixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32)(x)
        for _ in range(2):
            y = nn.Dense(x.shape[1])(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x).swapaxes(1, 2))))
            x = x + y.swapaxes(1, 2)
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return nn.LayerNorm()(x).reshape(len(x), -1)


class GRU(nn.Module):
    """Over the rows of an image."""

    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.GRUCell(96))(nn.Dense(32)(x))[:, -1]


@pytest.mark.slow
def test_the_page_about_your_own_network_runs_and_its_convolutional_net_learns():
    page = (Path(__file__).parents[1] / "docs" / "your_own_network.md").read_text(encoding="utf-8")
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), names)
    assert names["accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [MLPMixer(), GRU()], ids=lambda module: type(module).__name__)
def test_networks_that_it_has_never_seen_learn_two_digits_at_once(backbone):
    source = digits()
    train, test = source.split("train"), source.split("test")
    model = wrapped(backbone, mixer=mixing.RandomOrtho(), head=nn.Dense(10))
    x = datamux_jax.group(test.inputs, 2)
    params = jax.jit(model.init)(jax.random.key(0), x)
    tx = optax.adam(2e-3)

    @jax.jit
    def step(params, state, x, label):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), label).mean()

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(40):
        order = rng.permutation(len(train))
        for rows in np.split(order[: len(order) // 64 * 64], len(order) // 64):
            params, state = step(params, state, *(datamux_jax.group(a[rows], 2) for a in (train.inputs, train.labels)))
    guess = datamux_jax.ungroup(jax.jit(model.apply)(params, x).argmax(-1), len(test))
    assert (guess == test.labels).mean() > 0.9
