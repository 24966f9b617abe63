"""The trainer: start, stop, resume, refuse."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from datamux_jax import curves, optimizer, saved, workdir
from datamux_jax.data import pipeline
from datamux_jax.errors import InputError, Interrupted
from datamux_jax.metrics_log import MetricsLog, Work, read_lines
from datamux_jax.plan import prepare
from datamux_jax.runs import load_run
from datamux_jax.train import train
from tests.conftest import small_config, text_config


def params_of(run):
    return load_run(run).params


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_what_it_promises(tmp_path, capsys):
    config = small_config(steps=150, log_every=50, optimizer__learning_rate=3e-3, checkpoint__every=100)
    train(config, tmp_path / "run")
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [50, 100, 150]
    assert logged[-1]["loss"] < 0.9 * logged[0]["loss"]
    assert len(logged[0]["accuracy_per_slot"]) == 2
    assert logged[-1]["learning_rate"] < logged[0]["learning_rate"]
    assert logged[-1]["instances_per_second"] > 0
    assert {"config.json", "format.json", "metrics.jsonl", "checkpoints", "tensorboard"} <= {
        p.name for p in (tmp_path / "run").iterdir()
    }
    shown = capsys.readouterr()
    assert "150/150" in shown.out
    assert shown.err == ""


class StopAt:
    """Asks for a stop after some steps, as a signal would."""

    def __init__(self, steps):
        self.left = steps

    def __enter__(self):
        def stop():
            self.left -= 1
            return self.left < 0

        return stop

    def __exit__(self, *error):
        pass


def stopped(config, run, steps):
    """Trains until a signal comes after `steps` steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datamux_jax.train.stop_signals", lambda: StopAt(steps))
        with pytest.raises(Interrupted, match="The same command goes on"):
            train(config, run)


@pytest.mark.parametrize("make", [small_config, pytest.param(text_config, marks=pytest.mark.slow)])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path, make):
    config = make(model__dropout_rate=0.1, steps=9, **({"retrieval_loss_coeff": 0.1} if make is text_config else {}))
    train(config, tmp_path / "whole")
    for steps in (3, 2):
        stopped(config, tmp_path / "parts", steps)
    train(config, tmp_path / "parts")
    chex.assert_trees_all_equal(params_of(tmp_path / "whole"), params_of(tmp_path / "parts"))
    whole, parts = lines(tmp_path / "whole"), lines(tmp_path / "parts")
    assert [line["step"] for line in parts][-1] == whole[-1]["step"]
    assert parts[-1]["loss"] == whole[-1]["loss"]


def test_killed_equals_uninterrupted_bit_for_bit(tmp_path):
    """SIGKILL at a moment of its own choosing, in a process of its own."""
    config = small_config(steps=400, checkpoint__every=50, log_every=10)
    train(config, tmp_path / "whole")
    script = (
        "import sys; from pathlib import Path; from absl import logging; logging.set_verbosity(logging.ERROR);"
        "from tests.conftest import small_config; from datamux_jax.train import train;"
        "train(small_config(steps=400, checkpoint__every=50, log_every=10), Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    saves = tmp_path / "killed" / saved.FOLDER
    deadline = time.monotonic() + 120
    while not any(saves.glob("[0-9]*/commit_success.txt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train(config, tmp_path / "killed")
    chex.assert_trees_all_equal(params_of(tmp_path / "whole"), params_of(tmp_path / "killed"))
    both = [[(line["step"], line["loss"]) for line in lines(tmp_path / name)] for name in ("whole", "killed")]
    assert both[0] == both[1]


LONG = """
import sys
from pathlib import Path
from absl import logging
logging.set_verbosity(logging.ERROR)
from tests.conftest import text_config
from datamux_jax.errors import Interrupted
from datamux_jax.train import train
config = text_config(steps=300, checkpoint__every=7, log_every=1, model__dropout_rate=0.1, retrieval_loss_coeff=0.1)
try:
    train(config, Path(sys.argv[1]))
except Interrupted:
    sys.exit(130)
"""


@pytest.mark.slow
def test_killed_and_stopped_at_random_steps_equals_uninterrupted_bit_for_bit(tmp_path):
    """Five times SIGKILL, at random steps and in the middle of a checkpoint, and twice SIGTERM, which repeats no step."""

    def start(folder):
        return subprocess.Popen(
            [sys.executable, "-c", LONG, str(folder)], cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL
        )

    def count():
        file = tmp_path / "parts" / "metrics.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    assert start(tmp_path / "whole").wait() == 0
    rng = np.random.default_rng(time.time_ns())
    for kind in rng.permutation(["kill", "kill", "kill", "writing", "writing", "stop", "stop"]):
        process, goal = start(tmp_path / "parts"), count() + int(rng.integers(5, 40))
        while process.poll() is None and count() < goal:
            time.sleep(0.002)
        while kind == "writing" and process.poll() is None and not any((tmp_path / "parts" / "checkpoints").glob("*tmp*")):
            time.sleep(0.0005)
        process.send_signal(signal.SIGTERM if kind == "stop" else signal.SIGKILL)
        assert process.wait() == (130 if kind == "stop" else -signal.SIGKILL), kind
        if kind == "stop":
            assert saved.newest_step(tmp_path / "parts") == count(), "no step is repeated"
    assert start(tmp_path / "parts").wait() == 0
    chex.assert_trees_all_equal(params_of(tmp_path / "whole"), params_of(tmp_path / "parts"))
    both = [[(line["step"], line["loss"]) for line in lines(tmp_path / name)] for name in ("whole", "parts")]
    assert both[0] == both[1]


def test_a_finished_run_is_left_alone(digits_run):
    before = {p: p.stat().st_mtime_ns for p in digits_run.rglob("*") if p.is_file()}
    train(small_config(), digits_run)
    assert before == {p: p.stat().st_mtime_ns for p in digits_run.rglob("*") if p.is_file()}


def test_a_step_is_compiled_once(tmp_path, monkeypatch):
    traces = []
    from datamux_jax import objectives

    original = objectives.OBJECTIVES["classification"]

    def counting(model, config, generator):
        objective = original(model, config, generator)

        def traced(*args):
            traces.append(1)
            return objective(*args)

        return traced

    monkeypatch.setitem(objectives.OBJECTIVES, "classification", counting)
    train(small_config(), tmp_path / "run")
    assert len(traces) == 1


def test_another_config_is_refused_with_the_difference(digits_run):
    before = (digits_run / "config.json").read_text()
    with pytest.raises(InputError, match=r"optimizer.learning_rate: 0.001 there, 0.01 now.*nothing was changed"):
        train(small_config(optimizer__learning_rate=0.01), digits_run)
    assert (digits_run / "config.json").read_text() == before


def test_what_changes_no_number_may_change(digits_run):
    train(small_config(log_every=3, logits_mib=7), digits_run)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not the folder of a run"):
        train(small_config(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_left_by_a_kill_at_the_very_start_is_taken(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").write_text("{")
    train(small_config(), tmp_path / "run")


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="this is a file"):
        train(small_config(), tmp_path / "file" / "run")


def test_what_failed_half_way_leaves_the_old_file_and_no_rest(tmp_path):
    workdir.write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        workdir.write_text(tmp_path / "a", "new \ud800")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1_000_000))
    with pytest.raises(InputError, match=r"has 1 MB left, but this run needs about \d+ MB"):
        train(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_later_is_explained(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
    with pytest.raises(InputError, match=r"disk is full.*Free some space"):
        train(small_config(), tmp_path / "run")


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    with workdir.lock(tmp_path), pytest.raises(InputError, match="Another process"), workdir.lock(tmp_path):
        pass


def test_divergence_stops_and_names_the_term(tmp_path):
    config = small_config()
    log = MetricsLog(tmp_path, 0, config)
    with pytest.raises(InputError, match="task_loss is not finite at step 3"):
        log.add(3, {"task_loss": (np.float32("nan"), np.float32(1))}, Work(8))


def test_a_resumed_log_drops_lines_past_its_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    MetricsLog(tmp_path, 4, small_config())
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_init_from_takes_parameters_and_starts_at_step_zero(tmp_path, text_run):
    config = text_config(objective="retrieval", init_from=str(text_run), steps=2, optimizer__learning_rate=1e-30)
    train(config, tmp_path / "next")
    there, here = params_of(text_run), params_of(tmp_path / "next")
    del there["classifier"]  # Retrieval needs none.
    chex.assert_trees_all_close(here, there, atol=1e-12)


def test_resume_continues_the_whole_state(tmp_path):
    config = small_config(steps=8, checkpoint__every=2)
    train(config, tmp_path / "whole")
    stopped(config, tmp_path / "first", 4)
    train(small_config(steps=8, checkpoint__every=2, resume=str(tmp_path / "first")), tmp_path / "second")
    chex.assert_trees_all_equal(params_of(tmp_path / "whole"), params_of(tmp_path / "second"))


def test_a_line_says_the_same_whether_the_run_was_interrupted_within_its_window_or_not(tmp_path):
    config = small_config(steps=8, log_every=4, checkpoint__every=8)
    train(config, tmp_path / "whole")
    stopped(config, tmp_path / "parts", 6)
    train(config, tmp_path / "parts")
    clocks = {"instances_per_second", "tokens_per_second", "data_wait_share"}
    both = [
        [{k: v for k, v in line.items() if k not in clocks} for line in lines(tmp_path / name)] for name in ("whole", "parts")
    ]
    assert both[0] == both[1]


def test_training_in_length_buckets_goes_on_with_the_same_batches_and_counts_what_it_reads(tmp_path):
    config = text_config(data__length=20, data__buckets=True, steps=8, log_every=4)
    train(config, tmp_path / "whole")
    stopped(config, tmp_path / "parts", 3)
    train(config, tmp_path / "parts")
    chex.assert_trees_all_equal(params_of(tmp_path / "whole"), params_of(tmp_path / "parts"))
    plan = prepare(config)
    data = pipeline.train_iterator(plan.arrays, groups=8, instances=2, seed=0, buckets=plan.buckets)
    lengths = [batch["mask"].shape[-1] for batch in itertools.islice(data, 8)]
    assert set(lengths) == {16, 20}
    for line, expected in zip(lines(tmp_path / "whole"), (lengths[1:4], lengths[4:]), strict=True):  # The first step compiles.
        assert line["tokens_per_second"] / line["instances_per_second"] == pytest.approx(np.mean(expected))


def test_buckets_of_inputs_that_are_all_as_long_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"data.buckets = True.*'digits' all have the same length"):
        train(small_config(data__buckets=True), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"was another training.*seed = 0 there, 1 here"),
        ({"batch_groups": 4}, r"batch_groups = 8 there, 4 here"),
        ({"optimizer__update_rule": "published"}, r"update_rule = 'adamw' there, 'published' here"),
        ({"optimizer__grad_clip": 0.0}, r"grad_clip = 1.0 there, 0.0 here"),
        ({"model__layer_norm_eps": 1e-5}, r"layer_norm_eps = 1e-06 there, 1e-05 here"),
    ],
)
def test_resume_goes_on_with_the_same_training_only(tmp_path, digits_run, changes, message):
    with pytest.raises(InputError, match=message):
        train(small_config(steps=12, resume=str(digits_run), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_keys_that_may_change_reach_the_saved_config(tmp_path):
    train(small_config(steps=2), tmp_path)
    train(small_config(steps=2, checkpoint__keep=3, log_every=1), tmp_path)
    assert workdir.load_config(tmp_path).checkpoint.keep == 3
    assert workdir.load_config(tmp_path).log_every == 1


def test_a_second_trainer_changes_nothing(tmp_path):
    train(small_config(steps=2), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.glob("*.json")}
    with workdir.lock(tmp_path), pytest.raises(InputError, match="Another process is training"):
        train(small_config(steps=2, checkpoint__keep=7), tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.glob("*.json")}


def test_data_that_change_between_stop_and_restart_are_noticed(tmp_path, monkeypatch):
    stopped(small_config(), tmp_path, 4)
    original = pipeline.splits_of

    def changed(config, fmt):
        splits = original(config, fmt)
        return {**splits, "train": {name: array[1:] for name, array in splits["train"].items()}}

    monkeypatch.setattr(pipeline, "splits_of", changed)
    with pytest.raises(InputError, match="began on other data"):
        train(small_config(), tmp_path)


EIGHT = """
import sys
from pathlib import Path
from datamux_jax.train import train
from tests.conftest import text_config
train(text_config(1, objective="retrieval", steps=1, optimizer__warmup_steps=0, mesh__fsdp=8, mesh__data=1), Path(sys.argv[1]))
"""


def test_init_from_needs_neither_the_devices_nor_the_heads_of_the_other_run(tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, "-c", EIGHT, str(tmp_path / "first")], check=True, timeout=200, env=environment, cwd=root)
    rate = {"optimizer__warmup_steps": 0, "optimizer__learning_rate": 1e-30}
    train(text_config(1, init_from=str(tmp_path / "first"), steps=1, **rate), tmp_path / "next")
    there, here = params_of(tmp_path / "first"), params_of(tmp_path / "next")
    assert "decoder" in there
    assert "decoder" not in here
    chex.assert_trees_all_close(here["backbone"], there["backbone"], atol=1e-12)


def test_the_norm_in_the_log_is_of_what_is_trained():
    gradients = {"mux": {"instance_embedding": np.full(9, 10.0, "float32")}, "out": {"kernel": np.full(4, 2.0, "float32")}}
    assert float(optimizer.norm(gradients, learn_mux=False)) == pytest.approx(4.0)
    assert float(optimizer.norm(gradients, learn_mux=True)) == pytest.approx((16 + 900) ** 0.5)


def test_init_from_another_shape_lists_what_differs(tmp_path, text_run):
    with pytest.raises(InputError, match=r"mux/instance_embedding is \(2, 16\) there and \(3, 16\) here"):
        train(text_config(3, init_from=str(text_run)), tmp_path / "next")
    with pytest.raises(InputError, match=r"Missing there: nothing. Surplus there: .*demux/keys"):
        train(text_config(1, init_from=str(text_run)), tmp_path / "plain")


def test_resume_must_leave_something_to_do_and_fit(tmp_path, digits_run):
    with pytest.raises(InputError, match=r"stands at step 6, so nothing is left to do with steps = 6"):
        train(small_config(resume=str(digits_run)), tmp_path / "run")
    with pytest.raises(InputError, match=r"resume = .* does not fit this model.*demux/keys is \(2, 16\) there"):
        train(small_config(3, resume=str(digits_run)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_init_from_nowhere_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"init_from = 'nowhere' exists neither in"):
        train(small_config(init_from="nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_happens_while_it_trains_is_written_down(tmp_path):
    config = text_config(steps=8, log_every=4, eval__every=4, eval__examples=60, retrieval_loss_coeff=0.1)
    train(config, tmp_path, profile=(3, 4))
    logged = lines(tmp_path)
    assert [line["step"] for line in logged if "loss" in line] == [4, 8]
    line = next(line for line in logged if "loss" in line)
    expected = {"loss", "task_loss", "retrieval_loss", "learning_rate", "gradient_norm", "accuracy", "retrieval_accuracy"}
    expected |= {"retrieval_accuracy_per_slot", "instances_per_second", "tokens_per_second", "data_wait_share"}
    assert expected <= set(line)
    assert 0 <= line["data_wait_share"] <= 1
    assert [line["step"] for line in logged if "eval_accuracy" in line] == [4, 8]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"retrieval_accuracy_per_slot/1" in events.read_bytes()
    assert b"eval_accuracy" in events.read_bytes()
    assert len(line["retrieval_accuracy_per_slot"]) == 2


def test_weights_and_biases_must_be_installed_to_be_used(tmp_path):
    with pytest.raises(InputError, match=r"wandb = 'mine' logs to.*datamux_jax\[wandb\]"):
        train(small_config(wandb="mine"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_curves_of_training_and_evaluation(tmp_path):
    config = text_config(steps=4, log_every=1, eval__every=2, eval__examples=60)
    train(config, tmp_path / "run")
    assert [step for step, _ in curves.points(read_lines(tmp_path / "run"), "accuracy")] == [1, 2, 3, 4]
    assert [step for step, _ in curves.points(read_lines(tmp_path / "run"), "eval_accuracy")] == [2, 4]
    assert curves.points(read_lines(tmp_path / "nothing"), "accuracy") == []
    assert curves.plot(tmp_path / "curves.png", {"a": tmp_path / "run"}, "title")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert not curves.plot(tmp_path / "none.png", {"a": tmp_path / "nothing"}, "title")


def test_retrieval_needs_tokens(tmp_path):
    with pytest.raises(InputError, match=r"needs tokens, but.*Use a text source"):
        train(small_config(objective="retrieval"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_schedules(name):
    rate = optimizer.schedule(small_config(steps=10, optimizer__schedule=name))
    assert rate(0) == 0
    assert rate(1) == pytest.approx(5e-4)
    assert rate(2) == pytest.approx(1e-3)
    assert rate(10) == pytest.approx(1e-3 if name == "constant" else 0, abs=1e-9)


def test_frozen_leaves_stay_and_decay_spares_norms_and_biases(digits_run):
    params = params_of(digits_run)
    tx = optimizer.make(small_config(optimizer__weight_decay=1.0, optimizer__warmup_steps=0))
    updates, _ = tx.update(jax.tree.map(lambda p: p * 0, params), tx.init(params), params)
    assert not np.any(updates["mux"]["instance_embedding"])
    assert np.all(updates["demux"]["keys"] != 0)
    decayed = optimizer.decayed(params)
    jax.tree.map(lambda u, d: (np.any(u) and not d) and pytest.fail("decayed"), updates, {**decayed, "mux": decayed["mux"]})
    assert not decayed["classifier"]["out"]["bias"]
    assert not decayed["embeddings"]["norm"]["scale"]
    assert decayed["classifier"]["out"]["kernel"]


@pytest.mark.parametrize(
    "changes", [{"mux__name": "binary_hadamard"}, {"demux__form": "bert"}, {"model__layer_norm_eps": 1e-12}]
)
def test_init_from_parameters_that_would_compute_something_else_is_refused(tmp_path, text_run, changes):
    key = next(iter(changes)).replace("__", ".")
    with pytest.raises(InputError, match=f"would compute something else: {key} = "):
        train(text_config(init_from=str(text_run), retrieval_loss_coeff=0.1, **changes), tmp_path / "next")
    assert not (tmp_path / "next").exists()
