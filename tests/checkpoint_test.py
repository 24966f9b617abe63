"""Checkpoints: which stay, which are used, and what happens to damaged ones."""

import contextlib
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from datamux_jax import saved
from datamux_jax.checkpoint import Checkpoints, checksums
from datamux_jax.errors import InputError
from datamux_jax.evaluate import evaluate_run
from datamux_jax.runs import load_run
from datamux_jax.saved import FOLDER, newest_step
from datamux_jax.train import train
from tests.conftest import small_config

# Where orbax fails to read, coroutines of its own stay behind that Python complains about later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = {"steps": 8, "checkpoint__every": 2, "checkpoint__keep": 3}


def steps_of(run):
    return sorted(int(path.name) for path in (run / FOLDER).iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(small_config(**STEPS), run)
    return run


@pytest.fixture
def stopped(whole, tmp_path):
    """The run as it was at step 6 of 8."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / FOLDER / "8")
    return tmp_path / "run"


def truncate(step):
    """Cuts the largest file, where the arrays are."""
    largest = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as handle:
        handle.truncate(largest.stat().st_size // 2)


def flip(step):
    """Changes one byte in the middle of every file with arrays: what a disk does when it rots."""
    for path in step.rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)


def remove(step):
    shutil.rmtree(step / "rest")


def empty(step):
    """What is left when a disk was full and nobody noticed."""
    for path in step.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


SLOW = [pytest.param(damage, marks=pytest.mark.slow) for damage in (remove, empty)]


@pytest.mark.parametrize("damage", [truncate, flip, *SLOW])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(stopped, whole, damage, capsys):
    damage(stopped / FOLDER / "6")
    train(small_config(**STEPS), stopped)
    shown = capsys.readouterr().out
    assert "The checkpoint of step 6 in" in shown
    assert "is damaged" in shown
    assert "The one of step 4 is used." in shown
    chex.assert_trees_all_equal(load_run(whole).params, load_run(stopped).params)
    assert (stopped / FOLDER / "6.damaged1").is_dir(), "nothing is thrown away"
    assert steps_of(stopped) == [4, 6, 8]
    both = [[json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, stopped)]
    assert both[0] == both[1]


def test_a_damaged_checkpoint_is_not_used_for_evaluation_either(stopped, capsys):
    flip(stopped / FOLDER / "6")
    assert load_run(stopped).step == 4
    assert "The one of step 4 is used." in capsys.readouterr().out
    assert steps_of(stopped) == [4, 6], "reading changes nothing"


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    flip(tmp_path / "run" / FOLDER / "8")
    train(small_config(**STEPS), tmp_path / "run")
    assert "The checkpoint of step 8 in" in capsys.readouterr().out
    assert load_run(tmp_path / "run").step == 8
    chex.assert_trees_all_equal(load_run(whole).params, load_run(tmp_path / "run").params)


def test_what_is_deleted_while_it_is_read_is_not_damaged(stopped, monkeypatch, capsys):
    """Another process trains there: it deletes the step that was to be read, and has written another one."""
    params = load_run(stopped).params
    looks = []

    def steps(run):
        looks.append(run)
        return [5] if len(looks) < 3 else [4]

    monkeypatch.setattr(saved, "steps", steps)
    with contextlib.closing(Checkpoints(stopped, read_only=True)) as reader:
        step, restored = reader.restore_params(params)
    assert step == 4
    chex.assert_trees_all_equal_shapes(restored, params)
    assert "damaged" not in capsys.readouterr().out


def test_without_an_intact_checkpoint_all_reasons_are_given(stopped):
    for step in steps_of(stopped):
        truncate(stopped / FOLDER / str(step))
    with pytest.raises(InputError, match=r"No checkpoint in .* can be read \(step 6: .*; step 4: .*"):
        train(small_config(**STEPS), stopped)


def test_checksums_see_every_bit_and_no_sharding():
    key = jax.random.key(0)
    tree = {"a": jax.random.normal(key, (4, 6)), "b": jnp.arange(5), "key": key, "scalar": jnp.float32(2)}
    first = checksums(tree)
    assert set(first) == {"a", "b", "key", "scalar"}
    mesh = jax.make_mesh((1,), ("x",))
    moved = {**tree, "a": jax.device_put(tree["a"], jax.NamedSharding(mesh, jax.P("x")))}
    assert checksums(moved) == first
    assert checksums({**tree, "a": tree["a"].at[3, 5].add(1e-6)})["a"] != first["a"]
    assert checksums({**tree, "a": tree["a"].at[0, 0].set(tree["a"][0, 1]).at[0, 1].set(tree["a"][0, 0])})["a"] != first["a"]
    assert checksums({**tree, "a": tree["a"].at[0, 0].multiply(-1)})["a"] != first["a"]
    assert checksums({**tree, "key": jax.random.key(1)})["key"] != first["key"]


def test_the_last_and_the_best_stay_and_the_best_is_used(tmp_path):
    params = {"w": jnp.zeros(3)}
    config = small_config(checkpoint__keep=2, checkpoint__keep_best=1, checkpoint__best="accuracy")
    saves = Checkpoints(tmp_path, config)
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8)):
        saves.save(step, {"w": jnp.full(3, float(step))}, {"step": jnp.int32(step)}, {"next": step}, {"accuracy": accuracy})
    saves.save(5, {"w": jnp.full(3, 5.0)}, {"step": jnp.int32(5)}, {"next": 5})
    saves.wait()
    assert steps_of(tmp_path) == [2, 4, 5]
    assert (saved.chosen_step(tmp_path, config), saved.newest_step(tmp_path)) == (2, 5)
    step, restored = saves.restore_params(params)
    assert (step, restored["w"].tolist()) == (2, [2.0] * 3)
    step, _, rest, position = saves.restore(params, {"step": jnp.int32(0)})
    assert (step, int(rest["step"]), position) == (5, 5, {"next": 5})
    saves.close()
    config = small_config(checkpoint__keep=1, checkpoint__keep_best=1, checkpoint__best="task_loss")
    losses = Checkpoints(tmp_path / "losses", config)
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.7)):
        losses.save(step, params, scores={"task_loss": loss})
    losses.wait()
    assert (steps_of(tmp_path / "losses"), saved.chosen_step(tmp_path / "losses", config)) == ([2, 3], 2)


def test_a_run_that_keeps_the_best_is_evaluated_at_the_best(tmp_path):
    config = small_config(
        steps=12, eval__every=3, checkpoint__keep=1, checkpoint__keep_best=1, checkpoint__best="accuracy", eval__examples=100
    )
    train(config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    assert sorted(scored) == [3, 6, 9, 12]
    best = max(scored.values())
    assert scored[load_run(tmp_path).step] == best
    assert steps_of(tmp_path)[-1] == 12
    assert evaluate_run(tmp_path)["step"] == load_run(tmp_path).step
    assert evaluate_run(tmp_path)["examples"] == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint__keep_best": 1}, r"keep_best = 1 needs evaluations.*eval.every"),
        (
            {"checkpoint__keep_best": 1, "eval__every": 2, "checkpoint__best": "f1"},
            r"checkpoint.best = 'f1' does not.*accuracy",
        ),
    ],
)
def test_what_is_best_must_be_known_beforehand(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train(small_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_divergence_leaves_the_last_good_checkpoint_newest(tmp_path):
    config = small_config(steps=50, checkpoint__every=1, optimizer__learning_rate=1e30, optimizer__grad_clip=0.0)
    with pytest.raises(InputError, match=r"\w+ is not finite at step \d+"):
        train(config, tmp_path)
    assert newest_step(tmp_path) >= 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_run(tmp_path).params))


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The write fails in the background; the run stops with the reason, and the older checkpoint stays good."""
    from orbax.checkpoint import CheckpointManager

    original = CheckpointManager.wait_until_finished
    failures = [OSError(28, "No space left on device")]

    def wait(self):
        if failures and self.latest_step() == 4:
            raise failures.pop()
        original(self)

    monkeypatch.setattr(CheckpointManager, "wait_until_finished", wait)
    with pytest.raises(InputError, match=r"disk is full.*it goes on from the last one"):
        train(small_config(steps=4, checkpoint__every=2), tmp_path)
    assert not failures
    assert load_run(tmp_path).step >= 2
