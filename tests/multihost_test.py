"""Several processes that train together on loopback: the numbers of one process, stopped and continued with other numbers of hosts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datamux_jax import distributed
from datamux_jax.errors import InputError

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config=configs/langid.py:n=2,retrieval=,warmup=0,finetune=60", "--config.model.hidden_size=16", "--config.model.num_layers=1",
    "--config.model.num_heads=2", "--config.model.mlp_dim=32", "--config.batch_groups=8", "--config.log_every=1", "--config.baseline=",
    "--config.eval.groupings=1", "--config.checkpoint.every=25", "--config.tensorboard=False", "--config.model.dropout_rate=0.1",
    "--config.eval.every=20", "--config.eval.examples=300",
]  # fmt: skip


def start(workdir, processes, *flags, last=(), program=("-m", "launch.train", *SMALL)):
    """Starts processes that share four devices; `last` are flags of the last one alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    devices = f"--xla_force_host_platform_device_count={4 // processes}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices}
    command = [sys.executable, *program, f"--workdir={workdir}", *flags]
    several = [f"--coordinator=localhost:{port}", f"--num_processes={processes}"] if processes > 1 else []
    return [
        subprocess.Popen(
            [*command, *several, *([f"--process_id={index}"] if several else []), *(last if index == processes - 1 else ())],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(processes)
    ]  # fmt: skip


def finish(started):
    outputs = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "n2" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def stop_midway(workdir, started):
    """SIGTERM to the last process alone, as if one host of a pod were preempted."""
    lines = workdir / "n2" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and (not lines.exists() or lines.read_text().count("\n") < 10):
        time.sleep(0.05)
    started[-1].send_signal(signal.SIGTERM)
    return finish(started)


def agree(tmp_path, processes):
    for code, _, err in finish(start(tmp_path / "one", 1)):
        assert code == 0, err
    interrupted = stop_midway(tmp_path / "several", start(tmp_path / "several", processes))
    assert [code for code, _, _ in interrupted] == [130] * processes, interrupted
    assert "the state is saved" in interrupted[0][1]
    done = len(losses(tmp_path / "several"))
    assert 10 <= done < 60
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one")[:done], rel=1e-5)
    return done


def test_two_processes_give_the_losses_of_one_and_one_goes_on_where_two_stopped(tmp_path):
    agree(tmp_path, 2)
    ((code, _, err),) = finish(start(tmp_path / "several", 1))
    assert code == 0, err
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_four_processes_give_the_losses_of_one_and_two_go_on_with_another_mesh(tmp_path):
    agree(tmp_path, 4)
    for code, _, err in finish(start(tmp_path / "several", 2, "--config.mesh.fsdp=2")):
        assert code == 0, err
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_what_one_process_refuses_stops_all(tmp_path):
    """A folder that is not a run: only process 0 looks, and the other one must not wait for ever."""
    (tmp_path / "thesis.txt").write_text("precious")
    ended = finish(start(tmp_path, 2))
    assert [code for code, _, _ in ended] == [2, 2]
    assert "is not the folder of a run" in ended[0][2]
    assert "Process 0 cannot go on, so all stop" in ended[1][2]


def test_processes_with_other_configs_do_not_train_together(tmp_path):
    ended = finish(start(tmp_path / "run", 2, last=["--config.seed=1"]))
    assert [code for code, _, _ in ended] == [2, 2]
    assert all("Processes differ from process 0 (the config: process 1; the flags: process 1)" in err for _, _, err in ended)
    assert not (tmp_path / "run").exists(), "nothing is written"


CUT_OFF = """
import sys
from orbax.checkpoint import Checkpointer
from launch import cli, train
restore = Checkpointer.restore
def fail(self, folder, **arguments):
    if folder.parent.name == "50" and "--process_id=1" in sys.argv:
        raise OSError("this host has lost the disk")
    return restore(self, folder, **arguments)
Checkpointer.restore = fail
cli.run(train.main)
"""


@pytest.mark.slow
def test_a_checkpoint_of_which_one_process_cannot_read_its_part_is_used_by_none(tmp_path):
    for code, _, err in finish(start(tmp_path / "run", 2, "--config.checkpoint.keep=3", "--config.checkpoint.every=10")):
        assert code == 0, err
    before = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "n2" / "checkpoints" / "60")
    program = ("-c", CUT_OFF, *SMALL)
    ended = finish(start(tmp_path / "run", 2, "--config.checkpoint.keep=3", "--config.checkpoint.every=10", program=program))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "step 50 in" in ended[0][1]
    assert "The one of step 40 is used" in ended[0][1], ended[0][1]
    assert losses(tmp_path / "run") == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "localhost:1"}, r"--num_processes=-1.*all three are needed"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, r"--process_id=2 is not below --num_processes=2"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        distributed.initialize(**arguments)


def test_where_nothing_tells_of_others_the_way_out_is_named():
    script = "from datamux_jax import distributed; distributed.initialize(multihost=True)"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert "InputError: This process cannot find the others" in ended.stderr
