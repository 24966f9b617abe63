"""DataMUX's image networks: transformations, LeNet, the published loss, MNIST's files, and training."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.signal import correlate2d

import datamux_jax
from configs import vision
from datamux_jax import analysis, classifier, convert, experiment, export, image_mixing, losses, optimizer
from datamux_jax.backbones.vision import MLP, LeNet, halved
from datamux_jax.build import count_params
from datamux_jax.config import validate
from datamux_jax.data import builtin, images, sources
from datamux_jax.errors import InputError
from datamux_jax.plan import prepare
from datamux_jax.runs import load_run
from tests.conftest import small_config
from tests.tfds_tasks_test import prepare as prepare_tfds

RNG = np.random.default_rng(0)


def mixed(name, x, **options):
    """Parameters of one image transformation, and what it makes of `x`."""
    module = image_mixing.IMAGE_MIXING[name](**options)
    y, variables = jax.jit(module.init_with_output)(jax.random.key(0), x)
    return {key: np.asarray(p) for key, p in variables.get("params", {}).items()}, np.asarray(y)


@pytest.mark.parametrize(
    ("name", "parameter"), [("gaussian", "instance_embedding"), ("learnable", "kernel"), ("identity", ""), ("graded", "")]
)
def test_kernels_are_sums_of_convolutions(name, parameter):
    x = RNG.normal(size=(2, 3, 5, 6)).astype(np.float32)
    params, y = mixed(name, x)
    kernels = params[parameter] if parameter else [np.full((3, 3), i + 1 if name == "graded" else 1) for i in range(3)]
    expected = [sum(correlate2d(row[i], kernels[i], "same") for i in range(3)) for row in x]
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_matrices_are_rotations_of_the_flattened_image():
    x = RNG.normal(size=(2, 2, 3, 4)).astype(np.float32)
    for name, parameter in (("orthogonal", "instance_embedding"), ("learnable_matrix", "matrix")):
        params, y = mixed(name, x)
        w = params[parameter]
        np.testing.assert_allclose(w @ w.transpose(0, 2, 1), np.broadcast_to(np.eye(12), w.shape), atol=1e-5)
        np.testing.assert_allclose(np.linalg.det(w), 1, atol=1e-4)
        np.testing.assert_allclose(y.reshape(2, 12), np.einsum("nij,bnj->bi", w, x.reshape(2, 2, 12)), atol=1e-5)


@pytest.mark.parametrize(("name", "channels"), [("nonlinear", 1), ("nonlinear_expand", 8)])
def test_nonlinear_is_two_convolutions_with_tanh(name, channels):
    x = RNG.normal(size=(2, 2, 4, 5)).astype(np.float32)
    p, y = mixed(name, x)
    expected = np.zeros((2, 4, 5, channels))
    for b in range(2):
        for i in range(2):
            first = [np.tanh(correlate2d(x[b, i], p["first_kernel"][i, :, :, 0, c], "same")) for c in range(16)]
            for f in range(channels):
                second = sum(correlate2d(first[c], p["second_kernel"][i, :, :, c, f], "same") for c in range(16))
                expected[b, ..., f] += np.tanh(second)
    np.testing.assert_allclose(y.reshape(expected.shape), expected, atol=1e-5)
    assert sorted(p) == ["first_kernel", "second_kernel"]
    np.testing.assert_allclose([p[name].std() for name in sorted(p)], 1, atol=0.1)


def test_rotation_turns_and_remap_puts_into_tiles():
    x = RNG.normal(size=(2, 4, 8, 8)).astype(np.float32)
    expected = sum((1 - 2 * i) * np.rot90(x[:, i], i, axes=(1, 2)) for i in range(4))
    np.testing.assert_allclose(mixed("rotation", x)[1], expected, atol=1e-5)
    source, within = image_mixing.turned((3, 3), 45)
    assert within.all()
    assert source.tolist() == [[1, 2, 5], [0, 4, 8], [3, 6, 7]]  # Corners come from edges, to the left.
    assert not image_mixing.turned((5, 5), 45)[1][0, 0]
    _, canvas = mixed("remap", x)
    for i in range(4):
        np.testing.assert_array_equal(canvas[:, :2, 2 * i : 2 * i + 2], x[:, i, ::4, ::4])
    assert not canvas[:, 2:].any()
    with pytest.raises(InputError, match=r"N = 17 images of 8x8"):
        mixed("remap", np.zeros((1, 17, 8, 8)))


@pytest.mark.parametrize(("network", "count"), [(LeNet(), 30_240), (LeNet(6), 29_176), (MLP(50, 2), 400 * 50 + 50 * 50 + 100)])
def test_sizes_of_the_networks(network, count):
    out, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((3, 20, 20)))
    assert count_params(variables) == count
    assert out.shape == ((3, 50) if isinstance(network, MLP) else (3, 84))


# By themselves; the others where mux.learned says so.
LEARNED = {"learnable", "learnable_matrix", "nonlinear", "nonlinear_expand"}
UNTRAINED = {"rotation", "remap"}  # Without parameters.


@pytest.mark.parametrize("backbone", ["mlp", pytest.param("lenet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("demux", ["mlp", "rsa"])
@pytest.mark.parametrize("mux", sorted(classifier.MIXERS))
def test_every_combination_gives_logits_and_gradients_to_all_that_learns(mux, demux, backbone):
    """The contract of multiplexed networks, for images: shapes, and gradients of every trained leaf and of no frozen one."""
    for learned in (False, True) if (demux, backbone) == ("mlp", "mlp") and mux not in UNTRAINED else (False,):
        config = one_run(f"{backbone},n=2,mux={mux},demux={demux}" + (",width=12,depth=1" if backbone == "mlp" else ""))
        config.mux.learned = learned
        classifier.check(config)
        network = classifier.build_classifier(config, num_classes=3)
        x, mask = RNG.uniform(size=(4, 2, 20, 20)).astype(np.float32), np.ones((4, 2, 20), np.int32)

        def loss(params, network=network, x=x, mask=mask):
            logits = network.apply({"params": params}, x, mask)["logits"]
            return jnp.square(logits - jnp.arange(3.0)).sum(), logits

        params = jax.jit(network.init)(jax.random.key(0), x, mask)["params"]
        gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
        assert logits.shape == (4, 2, 3)
        moved = {jax.tree_util.keystr(path): bool((leaf != 0).any()) for path, leaf in jax.tree.leaves_with_path(gradients)}
        frozen = {path for path in moved if "instance_embedding" in path}
        assert bool(frozen) == (mux not in LEARNED | UNTRAINED)
        assert moved == {path: learned or path not in frozen for path in moved}


def test_lenet_takes_channels_and_larger_images_but_no_smaller_ones():
    for shape in ((3, 20, 20, 8), (3, 28, 28)):
        assert jax.eval_shape(LeNet().init_with_output, jax.random.key(0), jnp.zeros(shape))[0].shape == (3, 84)
    with pytest.raises(InputError, match=r"at least 20x20 pixels, but got 8x8. Set data.image_size = 20"):
        jax.eval_shape(LeNet().init, jax.random.key(0), jnp.zeros((3, 8, 8)))
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    assert halved(x)[0, ..., 0].tolist() == [[6, 8]]


class Says:
    """A network that gives these logits."""

    def __init__(self, logits):
        self.logits = jnp.asarray(logits)

    def apply(self, *args, **kwargs):
        return self.logits


def test_the_published_loss_by_hand():
    y = RNG.uniform(-1, 1, size=(3, 2, 4)).astype(np.float32)
    logits = np.arctanh(y)
    label = RNG.integers(0, 4, size=(3, 2))
    batch = {"label": jnp.asarray(label), "weight": jnp.ones((3, 2)), "mask": None}
    sums, outputs = losses.squared_loss(Says(logits), {}, None, batch, {}, True)
    target = np.where(np.arange(4) == label[..., None], 1, -1)
    of_instances = (0.5 * (y - target) ** 2).mean((0, 2))
    np.testing.assert_allclose(losses.mean(sums, "task_loss"), of_instances.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"][0], (y.argmax(-1) == label).sum(0))
    np.testing.assert_array_equal(outputs, logits)
    filled = {**batch, "weight": jnp.asarray([[1, 1], [1, 1], [0, 0]])}
    sums, _ = losses.squared_loss(Says(logits), {}, None, filled, {}, True)
    np.testing.assert_allclose(losses.mean(sums, "task_loss"), (0.5 * (y - target) ** 2)[:2].mean((0, 2)).sum(), rtol=1e-5)


def test_sgd_is_its_formula_and_leaves_frozen_parameters_alone():
    changes = {"update_rule": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0, "grad_clip": 0.0}
    config = small_config(**{f"optimizer__{key}": value for key, value in changes.items()})
    config.optimizer.weight_decay = 0.5
    config.optimizer.momentum = 0.5
    tx = optimizer.make(config)
    params = {"kernel": jnp.ones(2), "first_bias": jnp.ones(2), "instance_embedding": jnp.ones(2)}
    gradients = jax.tree.map(lambda p: 2 * p, params)
    first, state = tx.update(gradients, tx.init(params), params)
    second, _ = tx.update(gradients, state, params)
    np.testing.assert_allclose([first["kernel"][0], second["kernel"][0]], [-0.25, -0.375], rtol=1e-6)
    np.testing.assert_allclose([first["first_bias"][0], second["first_bias"][0]], [-0.2, -0.3], rtol=1e-6)
    assert not second["instance_embedding"].any()


def test_images_are_cut_about_the_middle_or_enlarged():
    x = np.arange(2 * 6 * 6, dtype=np.float32).reshape(2, 6, 6)
    np.testing.assert_array_equal(images.fitted(x, 4), x[:, 1:5, 1:5])
    np.testing.assert_array_equal(images.fitted(x, 6), x)
    twice = images.fitted(np.array([[[0.0, 4.0], [8.0, 12.0]]], np.float32), 4)[0]
    assert twice[0].tolist() == [0, 1, 3, 4]
    assert twice[:, 0].tolist() == [0, 2, 6, 8]
    assert images.fitted(np.ones((1, 30, 3), np.float32), 20).shape == (1, 20, 20)


def idx(array):
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder with the four files, two of them packed; and their arrays."""
    arrays = {}
    for start, count in (("train", 12), ("t10k", 6)):
        arrays[start] = RNG.integers(0, 256, size=(count, 28, 28)), np.arange(count) % 10
        (tmp_path / f"{start}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(arrays[start][0])))
        (tmp_path / f"{start}-labels.idx1-ubyte").write_bytes(idx(arrays[start][1]))
    return tmp_path, arrays


def load(path, **changes):
    settings = {"data__source": "mnist", "data__path": str(path)} | {f"data__{key}": v for key, v in changes.items()}
    return sources.load(small_config(**settings).data)


def test_idx_files_are_read_and_images_held_out(mnist):
    folder, arrays = mnist
    source = load(folder)
    assert source.label_names == tuple("0123456789")
    assert set(source.splits) == {"train", "test"}
    np.testing.assert_allclose(source.split("train").inputs, arrays["train"][0] / 255, atol=1e-6)
    assert source.split("test").inputs.dtype == np.float32
    assert source.split("test").labels.tolist() == [0, 1, 2, 3, 4, 5]
    parts = load(folder, validation_examples=5)
    assert parts.split("train").labels.tolist() == [0, 1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(parts.split("validation").inputs, source.split("train").inputs[-5:])
    with pytest.raises(InputError, match=r"data.validation_examples = 12 .* 12 to train on"):
        load(folder, validation_examples=12)
    assert len(sources.load(small_config(data__validation_examples=100).data).split("validation")) == 100  # Digits too.


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda good: b"",
            r"train-images.*no idx file with 3 dimensions of bytes: it starts with \[\] in place of \[0, 0, 8, 3\]",
        ),
        (lambda good: b"\0\0\x08\x01" + good[4:], r"starts with \[0, 0, 8, 1\]"),
        (lambda good: b"<!DOCTYPE html>" + good, r"starts with \[60, 33, 68, 79\]"),
        (lambda good: good[:10], r"or ends within its header"),
        (
            lambda good: good[:-1],
            r"says that it holds 12 x 28 x 28 bytes, but 9,407 follow its header. Download or copy it anew",
        ),
        (lambda good: good + b"\0", r"9,409 follow"),
        (lambda good: idx(np.zeros((11, 28, 28))), r"has 11 images, but .*train-labels.* has 12 labels"),
    ],
)
def test_damaged_idx_files_are_refused_by_name(mnist, damage, message):
    folder, arrays = mnist
    (folder / "train-images-idx3-ubyte.gz").unlink()
    (folder / "train-images-idx3-ubyte").write_bytes(damage(idx(arrays["train"][0])))
    with pytest.raises(InputError, match=message):
        load(folder)


def test_damaged_gzip_missing_files_and_unread_keys_are_refused(mnist):
    folder, _ = mnist
    packed = folder / "t10k-images-idx3-ubyte.gz"
    for content in (packed.read_bytes()[:-20], b"no gzip", packed.read_bytes()[:30] + b"x" * 40):
        packed.write_bytes(content)
        with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte.gz cannot be read: .* Download or copy it anew"):
            load(folder)
    with pytest.raises(InputError, match=r"data.name = 'kmnist' .* holds idx files"):
        load(folder, name="kmnist")
    packed.unlink()
    with pytest.raises(InputError, match=r"has no file t10k-images-idx3-ubyte in it"):
        load(folder)
    with pytest.raises(InputError, match=r"is no folder. Name a folder with the four files of MNIST"):
        load(folder / "absent")
    with pytest.raises(InputError, match=r"data.image_size = 20 is set, but data.source = 'cldr' does not read it"):
        sources.load(small_config(data__source="cldr", data__image_size=20).data)


def test_mnist_of_tensorflow_datasets(monkeypatch, tmp_path):
    image = RNG.integers(0, 256, size=(28, 28, 1)).astype(np.uint8)
    rows = [{"image": tmp_path / "7.png", "label": 7}, {"image": tmp_path / "9.png", "label": 9}]
    for name, pixels in (("7", image), ("9", 255 - image)):  # Files are kept as they are; arrays would be packed by TensorFlow.
        Image.fromarray(pixels[..., 0]).save(tmp_path / f"{name}.png")
    prepare_tfds(monkeypatch, tmp_path, "mnist", {"train": rows, "test": rows[:1]})
    source = load(tmp_path)
    assert sorted(source.split("train").labels.tolist()) == [7, 9]
    np.testing.assert_allclose(source.split("test").inputs[0], image[..., 0] / 255, atol=1e-6)
    assert source.label_names == tuple("0123456789")
    (tmp_path / "glue" / "sst2").mkdir(parents=True)
    with pytest.raises(InputError, match=r"not there"):
        load(tmp_path, name="glue/sst2")


def one_run(arg, **changes):
    """The config of a single run of `configs/vision.py`."""
    config = vision.get_config(arg)
    (run,) = experiment.expand(config).values()
    for key, value in changes.items():
        run.update_from_flattened_dict({key.replace("__", "."): value})
    return run


def test_the_config_is_the_published_protocol():
    config = one_run("lenet,mux=nonlinear_expand,n=8,data=FOLDER,seed=3")
    assert (config.steps, config.batch_groups, config.seed) == (15 * 60_000 // 32, 32, 3)
    assert (config.mux.name, config.demux.name, config.task_loss) == ("nonlinear_expand", "mlp", "squared")
    assert (config.optimizer.update_rule, config.optimizer.learning_rate, config.optimizer.schedule) == ("sgd", 0.1, "constant")
    assert (config.data.source, config.data.path, config.data.image_size) == ("mnist", "FOLDER", 20)
    assert one_run("lenet,n=1").mux.name == "none"
    assert one_run("lenet,n=1,plain=false").mux.name == "nonlinear_expand"
    rows = one_run("transformer,n=2,data=FOLDER,validation=10000,size=0")
    assert (rows.model.backbone, rows.eval.split, rows.steps) == ("encoder", "validation", 15 * (50_000 // 32))
    for arg in ("lenet,n=2", "mlp,n=2,width=10,depth=1,mux=random_ortho,demux=rsa", "transformer,n=4"):
        validate(one_run(arg))
    with pytest.raises(
        InputError, match=r"Name the network first.*'n=2' does not exist. Choose one of: lenet, mlp, transformer"
    ):
        vision.get_config("n=2")
    for arg, message in (
        ("groups=0", "groups=0 is too few. Give 1 or more"),
        ("epochs=-1", "epochs=-1 is too few"),
        ("validation=-5", "validation=-5 is too few. Give 0 or more"),
        ("n=0+2", r"n=0\+2: a group has at least one image"),
        ("groups=2000", r"groups=2000 is more than the \d+ training images .*Lower groups or validation"),
        ("data=FOLDER,examples=40,validation=20", r"groups=32 is more than the 20 training images \(examples=40 without"),
    ):
        with pytest.raises(InputError, match=message):
            vision.get_config(f"lenet,{arg}")
    digits = one_run("lenet,n=8,mux=nonlinear_expand")
    assert (digits.optimizer.learning_rate, digits.steps) == (1.0, 30 * (len(builtin.digits().split("train")) // 32))
    # Flags hold for all runs of an experiment, the plain one too.
    plain = one_run("lenet,n=1,mux=gaussian_hadamard", mux__norm=1.0)
    validate(plain)
    with pytest.raises(InputError, match="width"):
        vision.get_config("lenet,width=500")


@pytest.mark.parametrize(
    ("arg", "changes", "message"),
    [
        ("lenet,n=2,mux=remap", {"mux__learned": True}, r"mux.learned = True asks mux.name = 'remap' to learn"),
        ("lenet,n=2", {"model__pool": "first"}, r"model.pool = 'first' is for Transformers"),
        ("lenet,n=2", {"mux__norm": 2.0}, r"mux.norm = 2.0 is a setting of mux.name = 'gaussian_hadamard'"),
        ("lenet,n=2", {"mux__epsilon": 0.5}, r"mux.epsilon = 0.5 is a setting of mux.name = 'binary_hadamard'"),
        (
            "lenet,n=2",
            {"demux__num_layers": 5},
            r"demux.num_layers = 5 is a setting of demux.name = 'rsa', and demux.name = 'mlp'",
        ),
        ("lenet,n=2", {"demux__form": "electra"}, r"demux.form = 'electra' is a setting of demux.name = 'rsa'"),
        ("lenet,n=2", {"model__num_layers": 9}, r"model.num_layers = 9 is for Transformers, and model.backbone = 'lenet'"),
        ("mlp,n=2", {"model__family": "roberta"}, r"model.family = 'roberta' is for Transformers"),
        ("lenet,n=2,mux=contextual", {}, r"mux.name = 'contextual' does not exist.*nonlinear_expand"),
        ("lenet,n=2,demux=index", {}, r"demux.name = 'index' does not exist. Choose one of: mlp, rsa"),
        ("transformer,n=2,mux=remap", {}, r"mux.name = 'remap' does not exist"),
        ("lenet,n=2", {"remat": "full"}, r"remat = 'full' is for Transformers"),
        ("lenet,n=2", {"objective": "retrieval"}, r"classifies images, but objective = 'retrieval'"),
        ("lenet,n=2", {"model__backbone": "vgg"}, r"model.backbone = 'vgg' does not exist"),
        ("lenet,n=2", {"task_loss": "hinge"}, r"task_loss = 'hinge' does not exist. Choose one of: cross_entropy, squared"),
        ("transformer,n=2,loss=squared", {"objective": "regression"}, r"task_loss = 'squared' is a loss of classification"),
        ("lenet,n=1", {"num_instances": 2}, r"plain network for one instance.*nonlinear_expand"),
        ("lenet,n=2", {"data__source": "cldr", "data__image_size": 0, "data__length": 8}, r"'lenet' takes images"),
        ("lenet,n=2,size=0", {}, r"at least 20x20 pixels, but got 8x8"),
        ("lenet,n=17,mux=remap", {}, r"N = 17 images"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(arg, changes, message):
    with pytest.raises(InputError, match=message):
        prepare(one_run(arg, **changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a small experiment: LeNet, N = 2, a few steps."""
    folder = tmp_path_factory.mktemp("vision") / "lenet"
    config = vision.get_config("lenet,n=2,mux=remap,groups=8,epochs=1")
    config.steps = 4
    config.eval.update({"groupings": 1, "examples": 40, "batch_groups": 16})
    config.benchmark.update({"windows": 1, "seconds": 0.01})
    experiment.run(config, folder, {"steps": 4})
    return folder


def test_a_run_is_trained_evaluated_measured_and_used(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["scores"]["n2"]["examples"] == 40
    assert report["throughput"]["n2"]["instances_per_call"] == 32
    predictor = datamux_jax.load(finished / "n2")
    eight, twenty = RNG.uniform(size=(3, 8, 8)), RNG.uniform(size=(3, 20, 20))
    assert len(predictor(eight)) == 3
    np.testing.assert_allclose(predictor.logits(images.fitted(eight, 20)), predictor.logits(eight), atol=1e-5)
    assert predictor.probabilities(np.pad(twenty, ((0, 0), (4, 4), (4, 4)))).shape == (3, 10)
    with pytest.raises(
        InputError, match=r"has pixels from 0 to 255, where 0 \(background\) to 1 are read.*Divide by the largest value"
    ):
        predictor(np.array([[[0.0, 255.0]] * 2]).repeat(10, 1).repeat(10, 2))
    export.export_run(finished / "n2", finished / "exported", ("cpu",))
    exported = datamux_jax.load_exported(finished / "exported")
    np.testing.assert_allclose(exported.logits(eight), predictor.logits(eight), atol=1e-5)
    with pytest.raises(InputError, match="reads feature vectors; the published code reads tokens only"):
        convert.export_run(finished / "n2", finished / "hf")


def test_a_look_inside_leaves_out_what_images_lack(finished, tmp_path):
    contents = analysis.analyze(finished / "n2", output=tmp_path, examples=20, companions=2)
    assert set(contents["layers"]) == {"norm", "magnitude", "not_against"}
    assert [len(contents["layers"][name]) for name in ("norm", "magnitude")] == [4, 4]
    assert "| layer | norm, N = 2 | magnitude, N = 2 |" in (tmp_path / "analysis.md").read_text()
    assert "no vocabulary head" in contents["retrieval"]["left_out"]
    assert len(contents["interference"]["accuracy_per_slot"]) == 2
    assert contents["projection"]["demultiplexed"]["points"] == 40
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"analysis-layers.png", "analysis-interference.png", "analysis-projection.png"}
    run = load_run(finished / "n2")
    arrays = analysis.examples_of(run, "test", 4)
    found = analysis.layer_statistics(run, arrays)
    x = arrays["inputs"][np.random.default_rng(0).permutation(4)].reshape(2, 2, 20, 20)  # Grouping 0.
    h = run.model.apply({"params": run.params}, x, arrays["mask"][:4].reshape(2, 2, -1), method="encode")
    np.testing.assert_allclose(found["norm"][-1], np.linalg.norm(h, axis=-1).mean(), rtol=1e-4)
    np.testing.assert_allclose(found["magnitude"][-1], np.abs(h).mean(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arg",
    [
        "lenet,n=2",
        "lenet,n=2,mux=gaussian_hadamard,demux=rsa,loss=cross_entropy,optimizer=adamw,rate=0.002,epochs=30",
        "mlp,n=2",
    ],
)
def test_networks_learn_two_digits_at_once(arg, tmp_path):
    config = vision.get_config(arg)
    config.benchmark.update({"windows": 1, "seconds": 0.01})
    scores = experiment.run(config, tmp_path / "run")["scores"]
    assert scores["n2"]["accuracy"] > 0.9
