"""Looking inside a run: statistics against hand computations, networks whose interference is known, and the command."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax import analysis, scoring, sharding, workdir
from datamux_jax.analysis import companions, layerwise, parts, pictures, points, tables, written
from datamux_jax.build import build_second
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError
from datamux_jax.layers import Attention, Spec
from datamux_jax.losses import NO_LABEL
from datamux_jax.model import call
from datamux_jax.plan import build_model
from datamux_jax.runs import Run, load_run
from datamux_jax.train import train
from tests.conftest import fresh_params, small_config, text_config
from tests.launch_test import run as launch


@pytest.fixture(scope="module")
def digits(digits_run):
    run = load_run(digits_run)
    return run, analysis.examples_of(run, "test", 40)


@pytest.fixture(scope="module")
def phrases(text_run):
    run = load_run(text_run)
    return run, analysis.examples_of(run, "test", 40)


def with_leaves(run, change):
    """The run with every parameter replaced by `change(path, value)`."""
    params = jax.tree_util.tree_map_with_path(lambda path, x: change(jax.tree_util.keystr(path), x), run.params)
    return dataclasses.replace(run, params=params)


def fresh_run(config, path=Path("fresh")):
    """An untrained run and its test split."""
    fmt, splits = pipeline.load(config)
    model = build_model(config, fmt)
    shape = (1, config.num_instances, *fmt.input_shape)
    params = fresh_params(model, shape, fmt.input_dtype, build_second(config, model))
    mesh = sharding.inference_mesh()
    return Run(path, config, fmt, model, params, 0, mesh), splits["test"]


def test_attention_weights_are_those_that_attention_used():
    """Put to work by hand, they give what the module gave; heads are 4 wide, so the weights of 11 keys come in three pieces."""
    length = 11
    module = Attention(Spec(hidden_size=8, num_layers=1, num_heads=2, mlp_dim=8, init_stddev=0.5))
    x = jax.random.normal(jax.random.key(0), (2, length, 8))
    mask = jnp.arange(length) < jnp.array([[length], [2]])
    variables = sharding.unbox(jax.jit(module.init)(jax.random.key(1), x, mask))
    assert set(variables) == {"params"}
    y, kept = jax.jit(lambda p: module.apply(p, x, mask, mutable=["intermediates"]))(variables)
    weights = kept["intermediates"]["weights"][0]
    assert weights.shape == (2, 2, length, length)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert (weights[1, :, :, 2:] == 0).all()
    p = variables["params"]
    v = jnp.einsum("bld,dhw->blhw", x, p["value"]["kernel"]) + p["value"]["bias"]
    by_hand = jnp.einsum("bhqk,bkhw,hwd->bqd", weights, v, p["out"]["kernel"]) + p["out"]["bias"]
    np.testing.assert_allclose(by_hand, y, atol=1e-6)


def test_uniform_attention_has_the_entropy_of_its_positions(phrases):
    run, arrays = phrases
    run = with_leaves(run, lambda path, x: jnp.zeros_like(x) if "backbone" in path and "['query']" in path else x)
    mask = (np.arange(12) < np.array([[3, 5], [12, 1], [2, 2], [7, 9], [4, 11], [6, 6]])[..., None]).astype(np.int32)
    batch = {"inputs": arrays["inputs"][:12].reshape(6, 2, 12), "mask": mask, "weight": np.ones((6, 2), np.float32)}
    batch["weight"][5] = 0  # A group that only fills up.
    sums = jax.jit(lambda params: layerwise.layer_sums(run.model, params, batch))(run.params)
    real = mask.max(1)[:5]
    lengths = real.sum(-1)
    assert lengths.tolist() == [5, 12, 2, 9, 11]
    total, count = sums["entropy"]
    assert count.tolist() == [lengths.sum()]
    np.testing.assert_allclose(total[0], (lengths * np.log(lengths)).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["largest_entropy"][0], total, rtol=1e-5)
    h = np.asarray(jax.jit(lambda params: call(run.model, params, "encode", batch["inputs"], mask))(run.params))[:5]
    np.testing.assert_allclose(sums["norm"][0][0], (np.linalg.norm(h, axis=-1) * real).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["magnitude"][0][0], (np.abs(h).mean(-1) * real).sum(), rtol=1e-5)


def test_scanned_layers_are_seen_one_by_one():
    run, arrays = fresh_run(small_config(2, model__num_layers=2, model__init_stddev=0.5))
    arrays = scoring.first_examples(arrays, 40)
    found = analysis.layer_statistics(run, arrays)
    assert [len(values) for values in found.values()] == [2] * 4
    assert len({round(value, 4) for value in found["entropy"]}) == 2
    assert max(found["entropy"]) < found["largest_entropy"][0] == pytest.approx(np.log(8))
    config = run.config.copy_and_resolve_references()
    config.scan_layers, config.remat = True, "full"
    scanned = build_model(config, run.format)
    assert scanned.spec.scan
    assert analysis.layer_statistics(dataclasses.replace(run, model=scanned), arrays) == found


def test_an_instance_that_is_alone_in_the_mixture_feels_nobody(digits):
    """The second instance is multiplied by zero: the first has the row for itself, and the second one's state is the first one's."""
    run, arrays = digits
    alone = with_leaves(run, lambda path, x: x.at[0].set(1).at[1].set(0) if "instance_embedding" in path else x)
    found = analysis.interference(alone, arrays, companions=6)
    assert found["similarity_per_slot"][0] == pytest.approx(1, abs=1e-5)
    assert found["chance_per_slot"][0] < 0.99
    assert found["changed_per_slot"][0] == found["accuracy_std_per_slot"][0] == 0
    assert found["similarity_per_slot"][1] == pytest.approx(found["chance_per_slot"][1], abs=0.05)
    assert found["changed_per_slot"][1] > 0
    mixed = analysis.interference(run, arrays, companions=6)
    for slot in range(2):
        assert mixed["chance_per_slot"][slot] < mixed["similarity_per_slot"][slot] < 0.999
    assert (found["examples"], found["companions"]) == (40, 6)


def test_similarities_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    draws, examples, slots, positions = 4, 5, 2, 3
    states = rng.normal(size=(draws, examples, slots, positions, 6)) + 1
    states /= np.linalg.norm(states, axis=-1, keepdims=True)
    weight = rng.integers(0, 2, (examples, slots, positions)).astype(float)
    found = companions._similarities((states * weight[..., None]).sum(0).astype(np.float32), weight, draws)
    for slot in range(slots):
        own, others = [], []
        for p in range(positions):
            there = [m for m in range(examples) if weight[m, slot, p]]
            for a in there:
                one = states[:, a, slot, p]
                own += [one[i] @ one[j] for i in range(draws) for j in range(draws) if i != j]
                others += [(one @ states[:, b, slot, p].T).mean() for b in there if b != a]
        assert found["similarity_per_slot"][slot] == pytest.approx(np.mean(own), abs=1e-6)
        assert found["chance_per_slot"][slot] == pytest.approx(np.mean(others), abs=1e-6)


def test_changed_predictions_are_those_that_differ_from_most():
    guesses = np.array([[1, 0], [1, 0], [2, 0], [1, 3]])[:, :, None, None]  # Four draws of two examples in one slot.
    found = companions._predictions(guesses, np.array([1, 0])[:, None, None], np.ones((2, 1, 1)), True)
    assert found["changed"] == found["changed_per_slot"][0] == 0.25
    assert found["accuracy"] == pytest.approx(6 / 8)
    assert found["accuracy_std"] == pytest.approx(np.std([1, 1, 0.5, 0.5]))
    numbers = companions._predictions(guesses.astype(float), np.zeros((2, 1, 1)), np.ones((2, 1, 1)), False)
    assert numbers["spread"] == pytest.approx(np.sqrt((np.var([1, 1, 2, 1]) + np.var([0, 0, 0, 3])) / 2))
    assert numbers["squared_error"] == pytest.approx((1 + 1 + 4 + 1 + 9) / 8)


def test_every_example_stands_once_in_every_slot_and_never_beside_itself():
    order = parts.rotations(7, 4, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(order, axis=0), np.arange(7)[:, None] + np.zeros(4, int))
    assert all(len(set(group)) == 4 for group in order.tolist())


def test_retrieval_by_position_adds_up_to_that_of_the_evaluation(phrases):
    run, arrays = phrases
    # A few steps of training need not have taught anything: a network that prefers the commonest token is sometimes right.
    commonest = np.bincount(arrays["inputs"][:, 1:][arrays["mask"][:, 1:] == 1]).argmax()
    run = with_leaves(run, lambda path, x: x.at[commonest].add(10.0) if path == "['decoder']['bias']" else x)
    found = analysis.retrieval_by_position(run, arrays)
    step = scoring.scoring_step(run.config, run.model, None)
    right, count = scoring.score(step, run.params, arrays, run.config, run.mesh, seed=0).totals["retrieval_accuracy"]
    assert 0 < found["accuracy"] == pytest.approx(right.sum() / count.sum())
    assert found["per_slot"] == pytest.approx(list(right / count))
    assert found["per_position"][0] is None
    np.testing.assert_array_equal(found["counts"], arrays["mask"].sum(0) * (np.arange(12) > 0))
    there = [share * n for share, n in zip(found["per_position"], found["counts"], strict=True) if n]
    assert sum(there) == pytest.approx(right.sum())
    assert found["trained"]
    assert tables.ranges([0, 3, 3, 2, 0]) == [(1, 2), (2, 3), (3, 4)]
    assert tables.ranges([0] + [1] * 20) == [(1, 4), (4, 7), (7, 10), (10, 13), (13, 16), (16, 19), (19, 21)]


def test_components_are_the_directions_of_most_variance():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5)) * [0.1, 3, 0.1, 0.5, 0.1] + 7
    xy, share = points.components(x)
    assert abs(np.corrcoef(xy[:, 0], x[:, 1])[0, 1]) > 0.999
    assert share[0] == pytest.approx(xy[:, 0].var() / x.var(0).sum())
    assert share[0] + share[1] > 0.99
    group = (x[:, 1] > 7).astype(int)
    assert points.between(x, group) > 0.5
    assert points.between(x, rng.permutation(group)) == pytest.approx(0, abs=0.02)
    assert points.between(x, rng.permutation(200) // 4) == pytest.approx(0, abs=0.12)  # Unadjusted: about 0.25.
    assert points.between(np.repeat(x[:2], 3, axis=0), np.repeat([0, 1], 3)) == pytest.approx(1)


SLOW = ("retrieval", "regression", "mlm", "electra")
OBJECTIVES = ["tagging", *[pytest.param(name, marks=pytest.mark.slow) for name in SLOW]]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_read(objective, tmp_path, monkeypatch):
    run, arrays = fresh_run(text_config(2, objective=objective, model__init_stddev=0.5, demux__name="index"))
    arrays = dict(scoring.first_examples(arrays, 20))
    rng = np.random.default_rng(0)
    if objective == "regression":
        arrays["label"] = rng.normal(size=20).astype(np.float32)
    if objective == "tagging":
        arrays["label"] = np.where(arrays["mask"] > 0, rng.integers(0, 3, arrays["mask"].shape), NO_LABEL).astype(np.int32)
        arrays["label"][:, 0] = NO_LABEL
    found = analysis.interference(run, arrays, companions=2)
    assert -1 < found["chance"] < found["similarity"] < 1
    assert ("spread" in found) == (objective == "regression")
    assert ("accuracy" in found) == (objective != "regression")
    if objective == "tagging":
        monkeypatch.setattr(companions, "POSITIONS", arrays["inputs"].shape[1] // 2)
        some = analysis.interference(run, arrays, companions=2)
        assert 0 < abs(some["similarity"] - found["similarity"]) < 0.1
        assert some["accuracy"] == found["accuracy"]
    mixed, states = analysis.projection(run, arrays)
    assert states.xy.shape == (40, 2)
    assert sorted(states.slot.tolist()) == [0] * 20 + [1] * 20
    if objective in ("regression", "tagging"):
        assert set(states.mark.ravel().tolist()) <= set(arrays["label"].ravel().tolist())
    contents = {"objective": objective, "num_instances": 2}
    assert "| slot | similarity | chance |" in "\n".join(tables.of_interference(found, contents))
    pictures.interference(tmp_path / "a.png", found, "A")
    pictures.projection(tmp_path / "b.png", mixed, states, "B", None if objective == "regression" else str, "label")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))


def test_positions_that_not_all_instances_share_are_drawn_too(tmp_path):
    run, arrays = fresh_run(text_config(2, objective="tagging", model__init_stddev=0.5))
    arrays = dict(scoring.first_examples(arrays, 20))
    arrays["label"] = np.full(arrays["mask"].shape, NO_LABEL, np.int32)
    arrays["label"][:10, 1] = 0
    arrays["label"][10:, 2] = 1  # No position has tags of both halves; of one half it has.
    mixed, states = analysis.projection(run, {name: array[[0, 10]] for name, array in arrays.items()})
    assert set(mixed.mark.ravel().tolist()) <= {0, 1, NO_LABEL}
    assert NO_LABEL in mixed.mark
    assert NO_LABEL not in states.mark
    pictures.projection(tmp_path / "a.png", mixed, states, "A", ("zero", "one").__getitem__, "tag")


def test_positions_are_spread_over_the_tokens_that_there_are(monkeypatch):
    run, arrays = fresh_run(text_config(2, objective="retrieval"))
    arrays = {name: array[:4].copy() for name, array in arrays.items()}
    length = arrays["mask"].shape[1]
    arrays["mask"][:, 4:] = 0
    assert companions.spread(run, arrays, length).tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(companions, "POSITIONS", 2)
    assert companions.spread(run, arrays, length).tolist() == [0, 2]
    assert companions.spread(run, arrays, 1).tolist() == [0]
    arrays["label"] = np.full_like(arrays["mask"], NO_LABEL)
    arrays["label"][:, [2, 5]] = 1
    run.config.objective = "tagging"
    assert companions.spread(run, arrays, length).tolist() == [2, 5]


def test_marks_of_positions_without_a_token_are_none():
    run, arrays = fresh_run(text_config(2, objective="retrieval", model__init_stddev=0.5))
    arrays = {name: array[:2].copy() for name, array in arrays.items()}
    arrays["inputs"][:], arrays["mask"][:] = 7, 0
    arrays["mask"][0, 1], arrays["mask"][1, 2] = 1, 1  # No position has tokens of both.
    mixed, states = analysis.projection(run, arrays)
    assert NO_LABEL in mixed.mark
    assert set(states.mark.tolist()) == {7}


def test_interference_of_any_function():
    """Instances that are kept apart, and instances that are lost in the mean of their group."""
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    apart = analysis.interference_of(lambda x: x, x, instances=4, companions=5, groups=8)
    assert (apart["similarity"], apart["changed"]) == (pytest.approx(1, abs=1e-5), 0)
    assert abs(apart["chance"]) < 0.1
    lost = analysis.interference_of(lambda x: np.broadcast_to(x.mean(1, keepdims=True), x.shape), x, instances=4, companions=5)
    assert 0 < lost["similarity"] < 0.5
    assert lost["changed"] > 0.3
    assert len(lost["similarity_per_slot"]) == len(lost["changed_per_slot"]) == 4
    with pytest.raises(InputError, match=r"gave shape \[32, 6\] for inputs \[32, 4, 6\]"):
        analysis.interference_of(lambda x: x[:, 0], x, instances=4)
    for instances in (1, 26):  # Of 26 there are 51 others at least, so that companions differ.
        with pytest.raises(InputError, match="50 examples leave nothing to compare"):
            analysis.interference_of(lambda x: x, x, instances=instances)
    with pytest.raises(InputError, match=r"gave shape \[64, 4, 6\] for inputs \[32, 4, 6\]"):
        analysis.interference_of(lambda x: np.concatenate([x, x]), x, instances=4)
    with pytest.raises(InputError, match="groups = 0"):
        analysis.interference_of(lambda x: x, x.tolist(), instances=4, groups=0)


@pytest.fixture(scope="module")
def family(digits_run, tmp_path_factory):
    """An experiment of the digits run as `n2`, and a plain network beside it."""
    folder = tmp_path_factory.mktemp("family") / "experiment"
    train(small_config(1), folder / "n1")
    shutil.copytree(digits_run, folder / "n2")
    config = small_config(2)
    config.runs = ("n1", "n2")
    workdir.write_json(folder / workdir.CONFIG, workdir.plain(config))
    return folder


def test_the_command_compares_with_the_plain_run_beside(family):
    result = launch("analyze", f"--workdir={family / 'n2'}", "--examples=30", "--companions=3")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    contents = json.loads((family / "n2" / "analysis.json").read_text())
    text = (family / "n2" / "analysis.md").read_text()
    assert text in result.stdout
    assert contents["layers"]["against"]["run"] == str(family / "n1")
    assert "| layer | norm, N = 2 |" in text
    assert "norm, N = 1" in text
    assert contents["interference"]["companions"] == 3
    assert "no vocabulary head" in contents["retrieval"]["left_out"] in text
    assert contents["projection"]["demultiplexed"]["points"] == 60
    names = {path.name for path in (family / "n2").glob("analysis*")}
    assert names == {"analysis.md", "analysis.json", *(f"analysis-{p}.png" for p in ("layers", "interference", "projection"))}


def test_a_plain_run_has_layers_alone(family, tmp_path, capsys):
    contents = analysis.analyze(family / "n1", output=tmp_path / "out", examples=30)
    assert contents["layers"]["not_against"] == "this is one itself."
    assert all(
        "N = 1 has one instance in each row" in contents[part]["left_out"]
        for part in ("interference", "retrieval", "projection")
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"analysis.md", "analysis.json", "analysis-layers.png"}
    assert "Written to" in capsys.readouterr().out
    run = load_run(family / "n1")
    with pytest.raises(InputError, match="N = 1 has one instance in each row"):
        analysis.interference(run, analysis.examples_of(run, "test", 5))


def test_texts_have_all_parts(text_run, tmp_path, capsys):
    contents = analysis.analyze(text_run, output=tmp_path, examples=20, companions=2, groupings=2)
    shown = capsys.readouterr().out
    assert "no trained one with objective = 'classification'" in shown
    assert "| slot | all " in shown
    assert len(list(tmp_path.glob("analysis-*.png"))) == 4
    assert sum(contents["retrieval"]["counts"]) % 2 == 0  # Two groupings of the same examples.


def deeper(run):
    """The run, as one of a network with one more layer."""
    config = run.config.copy_and_resolve_references()
    config.model.num_layers += 1
    return dataclasses.replace(run, config=config)


def test_layers_of_another_network_beside_are_not_compared(family, tmp_path, monkeypatch):
    monkeypatch.setattr(written, "load_run", lambda path: deeper(load_run(path)) if path.name == "n1" else load_run(path))
    contents = analysis.analyze(family / "n2", output=tmp_path, examples=20, companions=2)
    assert contents["layers"]["not_against"] == f"{family / 'n1'} has other layers."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"companions": 1}, "companions = 1 is too few"),
        ({"examples": 1}, "There are 1 examples"),
        ({"examples": 3}, "There are 3 examples, .* at least 4"),
        ({"split": "dev"}, "'dev' does not exist"),
        ({"against": "n2"}, "is a run with N = 2"),
        ({"against": "other"}, "reads other inputs"),
        ({"against": "deep"}, "has other layers than .*'encoder' with 2 layers beside 'encoder' with 1"),
        ({"against": "nothing"}, "is not the folder of a run"),
        ({"output": "n1/config.json"}, "this is a file"),
        ({"path": "experiment"}, "is an experiment of several runs"),
    ],
)
def test_what_cannot_be_done_is_refused(family, text_run, options, message, tmp_path, monkeypatch):
    places = {name: family / name for name in ("n2", "n1/config.json")}
    if options.get("against") == "deep":
        monkeypatch.setattr(
            written, "load_run", lambda path: deeper(load_run(family / "n1")) if path.name == "deep" else load_run(path)
        )
    (family / "deep").mkdir(exist_ok=True)
    places |= {"deep": family / "deep", "other": text_run, "nothing": family / "n3", "experiment": family}
    given = {"path": family / "n2", "output": tmp_path / "out"} | {name: places.get(x, x) for name, x in options.items()}
    with pytest.raises(InputError, match=message):
        analysis.analyze(**given)
    assert not (tmp_path / "out").exists()
