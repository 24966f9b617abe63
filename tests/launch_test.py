"""The commands, as a user types them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from datamux_jax.data import sources

ROOT = Path(__file__).parents[1]


def run(module, *flags, stdin=None):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", f"launch.{module}", *map(str, flags)],
        cwd=ROOT, env=environment, input=stdin, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def assert_refused(result, message):
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stdout == ""


SMALL = [
    "--config.steps=6", "--config.optimizer.warmup_steps=2", "--config.model.hidden_size=16", "--config.model.num_layers=1",
    "--config.model.mlp_dim=32", "--config.batch_groups=8", "--config.benchmark.windows=2", "--config.benchmark.seconds=0.01",
    "--config.eval.groupings=2",
]  # fmt: skip


def test_train_evaluate_predict(tmp_path):
    folder = tmp_path / "out"
    trained = run("train", "--config=configs/quickstart.py:n=1+2", f"--workdir={folder}", *SMALL)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    assert "| n2  | 2 |" in trained.stdout
    assert (folder / "report.png").exists()

    again = run("train", "--config=configs/quickstart.py:n=1+2", f"--workdir={folder}", *SMALL)
    assert again.returncode == 0, again.stderr
    assert "6/6" not in again.stdout

    other = run("train", "--config=configs/quickstart.py:n=1+2", f"--workdir={folder}", *SMALL, "--config.seed=1")
    assert_refused(other, "seed: 0 there, 1 now")

    predictions = tmp_path / "train.tsv"
    evaluated = run(
        "evaluate", f"--workdir={folder / 'n2'}", "--eval_groupings=3", "--split=train", f"--predictions={predictions}"
    )
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stderr == ""
    assert "of the train split, each in 3 random groupings" in evaluated.stdout
    rows = len(predictions.read_text().splitlines()) - 1
    assert f"Measured on {rows:,} examples" in evaluated.stdout

    np.save(tmp_path / "images.npy", sources.load("digits").split("test").inputs[:5])
    predicted = run("predict", f"--workdir={folder / 'n2'}", f"--input={tmp_path / 'images.npy'}")
    assert predicted.returncode == 0, predicted.stderr
    assert predicted.stderr == ""
    rows = [line.split("\t") for line in predicted.stdout.splitlines()]
    assert len(rows) == 5
    assert all(label.isdigit() and 0 <= float(probability) <= 1 for label, probability in rows)


def test_loading_from_python_is_quiet(text_run):
    script = f"import datamux_jax; print(len(datamux_jax.load({str(text_run)!r})(['guten Morgen'])))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_predict_reads_lines_and_never_overwrites(text_run, tmp_path):
    output = tmp_path / "out.tsv"
    flags = [f"--workdir={text_run}", "--input=-", f"--output={output}"]
    first = run("predict", *flags, stdin="guten Morgen\nbonjour\n")
    assert first.returncode == 0, first.stderr
    assert [line.split("\t")[2] for line in output.read_text().splitlines()] == ["guten Morgen", "bonjour"]
    before = output.read_text()
    assert_refused(run("predict", *flags, stdin="hello\n"), "exists and is not overwritten")
    assert output.read_text() == before


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (
            "train",
            ["--config=configs/quickstart.py", "--config.speed=3"],
            'sets \'speed\', which is no config key. Did you mean "seed" instead of "speed"?',
        ),
        ("train", ["--config=configs/quickstart.py", "--config.mux.name=hadamar"], "'hadamar' does not exist"),
        ("train", ["--config=configs/quickstart.py:n=0"], "num_instances = 0 is not positive"),
        ("train", ["--config=configs/quickstart.py:m=3"], "'m=3' does not exist, or has no value"),
        ("train", ["--config=configs/none.py"], "config file cannot be read"),
        ("train", ["--config=configs/quickstart.py", "--config.steps=many"], "many"),
        ("train", ["--config=configs/quickstart.py", "--sped=3"], "sped"),
        ("train", ["--config=configs/quickstart.py", "extra"], "Unexpected argument 'extra'"),
        ("evaluate", [], "does not exist"),
        ("predict", ["--input=nowhere.txt"], "--input=nowhere.txt cannot be read"),
    ],
)
def test_bad_flags_end_with_one_paragraph(tmp_path, module, flags, message):
    folder = tmp_path / "out"
    assert_refused(run(module, *flags, f"--workdir={folder}"), message)
    assert not folder.exists()
