"""The commands, as a user types them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from datamux_jax.data import builtin

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

    np.save(tmp_path / "images.npy", builtin.digits().split("test").inputs[:5])
    predicted = run("predict", f"--workdir={folder / 'n2'}", f"--input={tmp_path / 'images.npy'}")
    assert predicted.returncode == 0, predicted.stderr
    assert predicted.stderr == "5 rows read, 5 predicted, 0 of them cut to what the model reads; 0 damaged.\n"
    header, *rows = [line.split("\t") for line in predicted.stdout.splitlines()]
    assert header == ["row", "label", "probability", "truncated", "error"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert all(label.isdigit() and 0 <= float(probability) <= 1 for _, label, probability, _, _ in rows)


@pytest.mark.parametrize("goes_on", [True, False])
def test_who_interrupts_reads_whether_the_command_goes_on(goes_on):
    program = f"from launch import cli\ndef main(argv): raise KeyboardInterrupt\ncli.run(main, goes_on=lambda: {goes_on})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert ("the same command goes on from there" in done.stderr) == goes_on


def test_a_training_that_is_told_to_end_while_it_evaluates_says_that_it_goes_on(tmp_path):
    program = (
        "import os, signal\n"
        "from datamux_jax import experiment\n"
        "experiment.run = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "import runpy; runpy.run_module('launch.train', run_name='__main__')"
    )
    flags = ["--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "the same command goes on from there" in done.stderr


def test_loading_from_python_is_quiet(text_run):
    script = f"import datamux_jax; print(len(datamux_jax.load({str(text_run)!r})(['guten Morgen'])))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_predict_reads_lines_and_never_overwrites(text_run, tmp_path):
    output = tmp_path / "out.tsv"
    workdir = shutil.copytree(text_run, tmp_path / "run")
    flags = [f"--workdir={workdir}", "--input=-", f"--output={output}", "--echo"]
    first = run("predict", *flags, stdin="guten Morgen\n\nbonjour\n")
    assert (first.returncode, first.stderr) == (0, "")
    summary = "3 rows read, 2 predicted, 1 of them cut to what the model reads; 1 damaged, see the column 'error'"
    assert first.stdout.endswith(f"{output}: {summary} (1: has no text in the column 'text').\n")
    header, *rows = [line.split("\t") for line in output.read_text().splitlines()]
    assert header == ["row", "label", "probability", "truncated", "error", "input_text"]
    assert [row[5] for row in rows] == ["guten Morgen", "", "bonjour"]
    assert rows[1][:5] == ["2", "", "", "", "has no text in the column 'text'"]
    before = output.read_bytes()
    again = run("predict", *flags, stdin="guten Morgen\n\nbonjour\n")
    assert (again.returncode, again.stdout) == (0, f"{output} is complete: 3 rows{first.stdout.partition(': 3 rows')[2]}")
    assert_refused(run("predict", *flags, stdin="hello\n"), "is another input: its first 3 rows are no longer those")
    assert_refused(run("predict", *flags, "--ensemble=2", stdin="hello\n"), "ensemble: 1 there, 2 now")
    (tmp_path / "out.tsv.state.json").unlink()
    assert_refused(run("predict", *flags, stdin="hello\n"), "exists and is not overwritten")
    assert output.read_bytes() == before


@pytest.mark.parametrize("to_file", [True, False])
def test_a_prediction_of_damaged_rows_alone_is_no_success(text_run, tmp_path, to_file):
    source, output = tmp_path / "in.tsv", tmp_path / "out.tsv"
    source.write_text("key\tsentence\na\t\nb\t\n")
    flags = [f"--workdir={text_run}", f"--input={source}", "--text=sentence"] + [f"--output={output}"] * to_file
    for _ in range(2):
        done = run("predict", *flags)
        assert done.returncode == 2, done.stderr
        assert f"error: None of the 2 rows of --input={source} could be predicted" in done.stderr
        written = output.read_text() if to_file else done.stdout
        assert written.splitlines()[1:] == [f"{row}\t\t\t\thas no text in the column 'sentence'" for row in (1, 2)]


def test_a_column_that_is_not_there_is_named_by_its_flag(text_run, tmp_path):
    source = tmp_path / "in.tsv"
    source.write_text("sentence\nguten Morgen\n")
    assert_refused(
        run("predict", f"--workdir={text_run}", f"--input={source}"), "Name one of them with --text, as the file writes it"
    )


def test_a_complete_output_looks_at_its_input_again(text_run, tmp_path):
    workdir = shutil.copytree(text_run, tmp_path / "run")
    source, output = tmp_path / "in.txt", tmp_path / "out.tsv"
    source.write_text("guten Morgen\nbonjour\n")
    flags = [f"--workdir={workdir}", f"--input={source}", f"--output={output}"]
    assert run("predict", *flags).returncode == 0
    state = output.with_name("out.tsv.state.json")
    old = {key: value for key, value in json.loads(state.read_text()).items() if key != "input"}  # Of an earlier version.
    state.write_text(json.dumps(old))
    before = output.read_bytes()
    assert f"{output} is complete: 2 rows read" in run("predict", *flags).stdout
    with source.open("a") as handle:
        handle.write("buongiorno\n")
    assert_refused(run("predict", *flags), "is another input: it has more than those 2 rows now")
    source.write_text("guten Morgen\nbonjour\n")
    assert f"{output} is complete: 2 rows read" in run("predict", *flags).stdout
    # It is that of the file as it is now, which needs no network to be known.
    for params in (workdir / "checkpoints").glob("*/params"):
        shutil.rmtree(params)
    assert f"{output} is complete: 2 rows read" in run("predict", *flags).stdout
    assert output.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_a_prediction_that_is_killed_goes_on_and_ends_with_the_same_bytes(text_run, tmp_path, ending):
    rows = [f"{i}\tphrase {i}" if i % 97 else f"{i}" for i in range(60_000)]
    (tmp_path / "in.tsv").write_text("id\ttext\n" + "".join(row + "\n" for row in rows))
    whole, killed = tmp_path / f"whole.{ending}", tmp_path / f"killed.{ending}"
    flags = [f"--workdir={text_run}", f"--input={tmp_path / 'in.tsv'}", "--id=id"]
    assert run("predict", *flags, f"--output={whole}").returncode == 0
    state = tmp_path / f"killed.{ending}.state.json"
    kills = 0
    for wanted in (1, 20_000, 40_000):
        command = [sys.executable, "-m", "launch.predict", *flags, f"--output={killed}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (state.exists() and json.loads(state.read_text())["counts"]["rows"] >= wanted):
            time.sleep(0.01)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    assert not killed.exists()
    assert run("predict", *flags, f"--output={killed}").returncode == 0
    assert killed.read_bytes() == whole.read_bytes()


# What is wrong with the flags -> module, flags, and what the error says.
BAD_FLAGS = {
    "unknown key": (
        "train",
        ["--config=configs/quickstart.py", "--config.speed=3"],
        'sets \'speed\', which is no config key. Did you mean "seed" instead of "speed"?',
    ),
    "unknown choice": ("train", ["--config=configs/quickstart.py", "--config.mux.name=hadamar"], "'hadamar' does not exist"),
    "value": ("train", ["--config=configs/quickstart.py:n=0"], "num_instances = 0 is not positive"),
    "argument": ("train", ["--config=configs/quickstart.py:m=3"], "'m=3' does not exist, or has no value"),
    "config file": ("train", ["--config=configs/none.py"], "config file cannot be read"),
    "type": ("train", ["--config=configs/quickstart.py", "--config.steps=many"], "many"),
    "flag": ("train", ["--config=configs/quickstart.py", "--sped=3"], "sped"),
    "no flag": ("train", ["--config=configs/quickstart.py", "extra"], "Unexpected argument 'extra'"),
    "workdir": ("evaluate", [], "does not exist"),
    "input": ("predict", ["--input=nowhere.txt"], "--input=nowhere.txt cannot be read"),
}
# Imports what takes long once, and runs every command in a child of its own.
ALL_OF_THEM = """
import json, os, runpy, sys, warnings
import datamux_jax.experiment, datamux_jax.predict, datamux_jax.stream
warnings.simplefilter("ignore")  # Of forks: no device was touched yet.
for name, module, flags in json.loads(sys.stdin.read()):
    if not (child := os.fork()):
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[1]}/{name}.{stream}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv = [module, *flags]
        runpy.run_module(f"launch.{module}", run_name="__main__")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(f"{sys.argv[1]}/{name}.code", "w") as handle:
        handle.write(str(code))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What each of `BAD_FLAGS` ended with; and the folder that none may write to."""
    folder, untouched = tmp_path_factory.mktemp("refusals"), tmp_path_factory.mktemp("untouched") / "out"
    commands = [(name, module, [*flags, f"--workdir={untouched}"]) for name, (module, flags, _) in BAD_FLAGS.items()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    driver = [sys.executable, "-c", ALL_OF_THEM, str(folder)]
    done = subprocess.run(
        driver, cwd=ROOT, env=environment, input=json.dumps(commands), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for name in BAD_FLAGS:
        code, out, err = ((folder / f"{name}.{part}").read_text() for part in ("code", "out", "err"))
        found[name] = subprocess.CompletedProcess(name, int(code), out, err)
    return found, untouched


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags_end_with_one_paragraph(refusals, name):
    found, untouched = refusals
    assert_refused(found[name], BAD_FLAGS[name][2])
    assert not untouched.exists()
