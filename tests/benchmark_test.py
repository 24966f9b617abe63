"""The benchmark: what is measured at which batch, what it leaves, and that the contenders compute what we compute."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import benchmark as benchmark_config
from datamux_jax import (
    benchmark_inputs,
    benchmark_memory,
    benchmark_report,
    benchmark_run,
    breakdown,
    contender_models,
    contenders,
    experiment,
    workdir,
)
from datamux_jax.benchmark_networks import Entry, Network, Timed, smaller
from datamux_jax.config import with_instances
from datamux_jax.errors import InputError
from tests.conftest import small_config, text_config
from tests.launch_test import ROOT, assert_refused, run

SETTINGS = benchmark_run.Settings(scopes=("device", "end_to_end"), windows=2, seconds=0.0001, batches=1)
ABOUT = {"title": "Small", "command": "python -m launch.benchmark", "results": []}


def entry(n, **changes):
    return Entry(f"n{n}", "own", text_config(n, eval__batch_groups=4, **changes))


def configured(arg):
    return experiment.expand(benchmark_config.get_config(arg))


@pytest.fixture
def no_networks(monkeypatch):
    """In the place of networks: functions that return numbers; the second network is the faster one."""

    class Fake:
        def __init__(self, one):
            self.n = one.config.num_instances

        def timed(self, groups, batches):
            size = groups * self.n
            calls = {"device": lambda: np.zeros(size), "end_to_end": lambda: [0.0] * size}
            return Timed(calls, {"device": size, "end_to_end": size * batches}, 1.5, 0.5, 1000 * size, 7)

    monkeypatch.setattr(benchmark_run, "built", lambda one, settings: (Fake(one), None))


def test_equal_groups_and_equal_instances(monkeypatch):
    entries = benchmark_run.own_entries(configured("n=1+2+5+40"), "predict")
    groups = benchmark_run.groups_of(entries, "groups", SETTINGS)
    assert groups == {"n1": 8, "n2": 8, "n5": 8, "n40": 8}
    equal = benchmark_run.groups_of(entries, "instances", SETTINGS)
    assert equal == {"n1": 40, "n2": 20, "n5": 8, "n40": 1}
    asked = benchmark_run.groups_of(entries, "instances", dataclasses.replace(SETTINGS, instances=80))
    assert asked == {"n1": 80, "n2": 40, "n5": 16, "n40": 2}
    with pytest.raises(InputError, match=r"--instances=60 is not a multiple .*\(1, 2, 5, 40\) on 1 .* Give a multiple of 40"):
        benchmark_run.groups_of(entries, "instances", dataclasses.replace(SETTINGS, instances=60))
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    shared = benchmark_run.groups_of(entries[:2], "instances", SETTINGS)
    assert shared == {"n1": 8, "n2": 4}
    with pytest.raises(InputError, match=r"--instances=12 is not .*\(1, 2\) on 4 device\(s\). Give a multiple of 8"):
        benchmark_run.groups_of(entries[:2], "instances", dataclasses.replace(SETTINGS, instances=12))
    entries[0].config.eval.batch_groups = 9
    with pytest.raises(InputError, match=r"different eval.batch_groups: n1 9, n2 8"):
        benchmark_run.groups_of(entries, "groups", SETTINGS)


def test_the_files_have_every_window_and_where_it_was_measured(no_networks, tmp_path):
    results = [{"name": f"n{n}", "num_instances": n, "metric": "accuracy", "value": 0.9, "std": 0.01} for n in (1, 2)]
    contents = benchmark_run.run([entry(1), entry(2)], SETTINGS, tmp_path / "out", ABOUT | {"results": results})
    saved = workdir.read_json(tmp_path / "out" / "benchmark.json")
    assert saved == json.loads(json.dumps(contents))
    assert saved["complete"]
    assert saved["reference"] == "n1"
    assert {row["name"] + row["balance"] + row["scope"] for row in saved["rows"]} == {
        name + balance + scope for name in ("n1", "n2") for balance in ("groups", "instances") for scope in SETTINGS.scopes
    }
    for row in saved["rows"]:
        assert len(row["windows"]) == 2
        assert row["instances_per_second"] == pytest.approx(np.median(row["windows"]))
        assert row["instances_per_call"] == row["groups"] * row["num_instances"]
        assert row["ratio"] == 1 or row["name"] == "n2"
    assert {"cpu", "threads", "memory_bytes", "backend", "load_before", "load_after"} <= saved["machine"].keys()
    assert saved["versions"]["jax"] == jax.__version__
    assert (tmp_path / "out" / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "out" / "benchmark.md").read_text()
    assert "## Prediction, equal instances, end to end" in text
    assert "| n2  | 2 | 90.0 ± 1.0" in text
    with pytest.raises(InputError, match="holds a measurement, which is not overwritten"):
        benchmark_run.run([entry(1)], SETTINGS, tmp_path / "out", ABOUT)


def test_ratios_are_per_n_also_where_the_reference_mixes(no_networks, tmp_path):
    contents = benchmark_run.run([entry(2), entry(4)], SETTINGS, tmp_path, ABOUT)
    lines = (tmp_path / "benchmark.md").read_text().splitlines()
    (first, second) = (next(line for line in lines if line.startswith(f"| n{n}")).split("|") for n in (2, 4))
    ratio = next(row["ratio"] for row in contents["rows"] if row["name"] == "n4")
    assert [cell.strip() for cell in first[8:10]] == ["1.00x", "1.00"]
    assert float(second[9]) == pytest.approx(ratio / 2, abs=0.006)


def test_a_process_that_is_killed_is_an_error_of_the_user():
    with pytest.raises(InputError, match="was killed, which happens where memory runs out"):
        benchmark_memory.in_own_process(os._exit, 1)


def test_what_was_measured_before_a_kill_stays(no_networks, tmp_path, monkeypatch):
    measure = benchmark_run.measure

    def killed(*args, after, **options):
        def once(result):
            after(result)
            raise KeyboardInterrupt

        measure(*args, after=once, **options)

    monkeypatch.setattr(benchmark_run, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        benchmark_run.run([entry(1), entry(2)], SETTINGS, tmp_path, ABOUT)
    saved = workdir.read_json(tmp_path / "benchmark.json")
    assert not saved["complete"]
    assert [len(row["windows"]) for row in saved["rows"]] == [1] * 8


def test_a_profiler_that_fails_costs_no_measurement(no_networks, tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(breakdown, "trace", broken)
    settings = dataclasses.replace(SETTINGS, profile=tmp_path / "trace")
    with pytest.raises(RuntimeError, match="no profiler"):
        benchmark_run.run([entry(1)], settings, tmp_path / "out", ABOUT)
    assert workdir.read_json(tmp_path / "out" / "benchmark.json")["complete"]
    assert (tmp_path / "out" / "benchmark.md").exists()


# Says, whenever a process is to be started, whether this one has taken the device.
TAKEN = """
import dataclasses, pathlib, sys
from jax._src import xla_bridge
from configs import benchmark
from datamux_jax import benchmark_memory, benchmark_run, experiment

def started(function, *args):
    print(xla_bridge.backends_are_initialized(), flush=True)
    if getattr(function, "__name__", "") == "alone" and args[-1] == 2:  # The last one: N = 4, equal instances.
        sys.exit()
    return {} if args else 1

benchmark_memory.in_own_process = started
entries = benchmark_run.own_entries(experiment.expand(benchmark.get_config("1x64,n=1+4,length=16,groups=8")), "predict")
benchmark_run.run(entries, benchmark_run.Settings(memory="process"), pathlib.Path(sys.argv[1]), {})
"""


def test_the_device_is_free_when_processes_start_that_measure_their_memory(tmp_path):
    command = [sys.executable, "-c", TAKEN, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line in ("True", "False")]
    assert said == ["False"] * (1 + 4)  # How many devices there are; then two networks at two balances.


def test_a_network_its_stages_and_the_predictor_say_the_same():
    network = Network(entry(2), "predict")
    timed = network.timed(4)
    logits = np.asarray(timed.calls["device"]())
    assert timed.instances == {"device": 8, "end_to_end": 8}
    assert timed.calls["end_to_end"]().shape == (8, logits.shape[-1])
    assert timed.program_bytes > 4 * timed.parameters > 0
    stages = breakdown.stages(network, 4)
    assert tuple(stages) == breakdown.STAGES
    np.testing.assert_allclose(np.asarray(stages[breakdown.UNMIX]()), logits, atol=1e-5)


@pytest.mark.slow
def test_training_steps_go_on_from_each_other():
    """At two batch sizes, each of which takes the old state's memory."""
    network = Network(Entry("n2", "own", small_config()), "train")
    first, second = network.timed(2), network.timed(4)
    assert first.instances["device"] == 4
    assert second.instances["end_to_end"] == 8
    before = int(network.state.step)
    for timed in (first, second):
        timed.calls["device"]()
        timed.calls["end_to_end"]()
    assert int(network.state.step) == before + 4


@pytest.mark.parametrize("task", ["classification", "tagging"])
def test_rows_are_full(task):
    config = configured(f"1x64,n=2,length=24,task={task},demux=index")["n2"]
    fmt = benchmark_inputs.format_for(config)
    assert fmt.vocab_size == 30522
    assert fmt.tokenizer.vocab_size <= fmt.tokens.index - 1 < fmt.vocab_size
    raw = benchmark_inputs.raw_inputs(fmt, 8)
    shapes = {name: jax.ShapeDtypeStruct((4, 2, 24), "int32") for name in ("inputs", "mask")}
    made = benchmark_inputs.batch(fmt, raw, shapes)
    assert made["inputs"].shape == (4, 2, 24)
    assert made["mask"].all()
    assert len({row.tobytes() for row in made["inputs"].reshape(8, 24)}) == 8


def test_smaller_networks_are_those_of_the_plan():
    base = configured("n=1+5")["n5"]
    narrow, shallow = smaller(base, "narrow").model, smaller(base, "shallow").model
    assert (narrow.hidden_size, narrow.num_layers, narrow.num_heads, narrow.mlp_dim) == (384, 12, 6, 1536)
    assert (shallow.hidden_size, shallow.num_layers, shallow.num_heads) == (768, 4, 12)
    assert (base.model.hidden_size, base.model.num_layers) == (768, 12)
    found = contenders.entries(["plain", "narrow:1+5", "shallow"], base, "predict")
    assert [one.name for one in found] == ["plain", "narrow", "narrow-n5", "shallow"]
    assert [one.config.demux.name for one in found] == ["none", "none", "rsa", "none"]
    assert found[0].config.retrieval_loss_coeff == 0
    base.model.num_heads = 3
    with pytest.raises(InputError, match=r"halves model.num_heads = 3, which is odd"):
        smaller(base, "narrow")


def test_a_missing_package_is_refused_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"needs torch, transformers, which are not installed. Run pip install 'datamux_jax\[bench\]'"
    ):
        contenders.entries(["torch"], configured("n=2")["n2"], "predict")


@pytest.mark.parametrize(
    ("name", "changes", "step", "message"),
    [
        ("tensorflow", {}, "predict", "'tensorflow' does not exist. Choose one of: narrow"),
        ("narrow:two", {}, "predict", "'two' are no numbers of instances"),
        ("narrow:²", {}, "predict", "'²' are no numbers of instances"),
        ("torch:2", {}, "predict", "this network mixes nothing. Write torch"),
        ("onnx", {}, "train", "cannot train"),
        ("torch", {"model.family": "electra"}, "predict", "model.family = 'electra'"),
        ("torch", {"objective": "mlm"}, "predict", "objective = 'mlm'"),
    ],
)
def test_contenders_that_cannot_be_are_refused(monkeypatch, name, changes, step, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    config = configured("n=2")["n2"]
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
        contenders.entries([name], config, step)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "evaluate"}, "'evaluate' does not exist"),
        ({"memory": "peak"}, "'peak' does not exist"),
        ({"balances": ("rows",)}, "'rows' does not exist"),
        ({"scopes": ()}, "The value --scope = '' does not exist"),
        ({"windows": 0}, "--windows=0"),
        ({"balances": ("groups",), "instances": 40}, "--instances=40 is for --balance=instances, which is not measured"),
        ({"scopes": ("device",), "batches": 3}, "--batches=3 is for --scope=end_to_end, which is not measured"),
        ({"step": "train", "breakdown": True}, "Leave out --breakdown"),
        ({"balances": ("groups", "groups")}, "--balance=groups,groups names one twice"),
        ({"scopes": ("device", "end_to_end", "device")}, "--scope=device,end_to_end,device names one twice"),
        ({"profile": Path(__file__)}, r"--profile=.*_test\.py cannot be written: this is a file"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        benchmark_run.check_settings([entry(1)], dataclasses.replace(SETTINGS, **changes), tmp_path)


def test_what_predicts_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"objective = 'retrieval', which predicts nothing"):
        benchmark_run.check_settings([entry(2, objective="retrieval")], SETTINGS, tmp_path)
    runs = {"a": entry(2, objective="retrieval").config, "b": entry(4, objective="retrieval").config}
    with pytest.raises(InputError, match=r"No run learns a task, only 'retrieval'"):
        benchmark_run.own_entries(runs, "predict")
    with pytest.raises(InputError, match="--contenders names n1 twice"):
        benchmark_run.check_settings([entry(1), entry(1)], SETTINGS, tmp_path)


def test_accuracies_are_read_from_runs_and_experiments(tmp_path):
    score = {"metrics": ["accuracy"], "num_instances": 2, "accuracy": 0.8, "accuracy_std": 0.02}
    (tmp_path / "n2").mkdir()
    workdir.write_json(tmp_path / "n2" / "metrics.json", score)
    workdir.write_json(tmp_path / "report.json", {"scores": {"n2": score, "warmup": {"metrics": [], "num_instances": 2}}})
    expected = {"name": "n2", "num_instances": 2, "metric": "accuracy", "value": 0.8, "std": 0.02}
    for file in ("n2/metrics.json", "report.json"):
        assert benchmark_report.read_results([str(tmp_path / file)]) == [expected]
    workdir.write_json(tmp_path / "other.json", {"loss": 1})
    with pytest.raises(InputError, match=r"other\.json holds no evaluation"):
        benchmark_report.read_results([str(tmp_path / "other.json")])


def test_the_command_asks_for_what_it_needs(tmp_path):
    assert_refused(run("benchmark", f"--output={tmp_path / 'out'}"), "Say what to measure: either --config=FILE")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Of the other libraries.
@pytest.mark.parametrize("kind", list(contenders.OTHERS))
@pytest.mark.parametrize("task", ["classification", "tagging"])
def test_contenders_compute_what_our_plain_network_computes(kind, task):
    for package in contenders.OTHERS[kind][0]:
        pytest.importorskip(package)
    config = configured(f"2x64,n=1+2,length=16,task={task},vocab=2000,pool={'mean' if kind == 'torch' else 'first'}")["n2"]
    config.model.init_stddev = 0.2  # Logits that differ.
    (one,) = contenders.entries([kind], config, "predict")
    other, error = benchmark_run.built(one, SETTINGS)
    assert error < (1e-4 if kind in ("torch", "onnx") else 0.5)
    timed = other.timed(3, batches=2)
    assert timed.instances == {"device": 3, "end_to_end": 6}
    logits = timed.calls["device"]()
    # Tokenised, as from raw texts, in another batch: the same rows, the same logits. Int8 scales activations by the batch.
    np.testing.assert_allclose(timed.calls["end_to_end"]()[1], logits, atol=1e-5)
    if kind == "torch":
        plain = Network(dataclasses.replace(one, kind="own"), "predict")
        other.forward = lambda inputs, mask: np.float32(0)
        with pytest.raises(InputError, match="is not the same network"):
            contenders.agreement(other, plain)


def test_torch_leaves_out_of_decay_what_we_leave_out():
    torch = pytest.importorskip("torch")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.LayerNorm = torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)

    module = Layer()
    decaying, rest = contender_models.decay_groups(module, 0.1)
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert [value is module.dense.weight for value in decaying["params"]] == [True]
    assert len(rest["params"]) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torch", "torch-bf16"])
def test_a_contender_learns(kind):
    pytest.importorskip("transformers")
    config = with_instances(configured("1x64,n=2,length=16,vocab=2000")["n2"], 1)
    config.optimizer.learning_rate = 1e-3
    (one,) = contenders.entries([kind], config, "train")
    other, _ = benchmark_run.built(one, dataclasses.replace(SETTINGS, step="train"))
    step = other.timed(4).calls["device"]
    losses = [step() for _ in range(40)]  # Of 20, one run in a few ends above the half: torch draws dropout without a seed.
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_memory_of_a_process_of_its_own():
    """Twice as many groups need more; compiling does not count."""
    found = []
    for groups in (8, 512):
        config = workdir.plain(small_config(model__mlp_dim=1024))
        fields = {"name": "n2", "kind": "own", "path": None}
        found.append(benchmark_memory.in_own_process(benchmark_run.alone, fields, config, SETTINGS, groups))
    assert found[0]["peak_rss_bytes"] > found[0]["idle_rss_bytes"] > 2**20
    assert found[1]["peak_rss_bytes"] > found[0]["peak_rss_bytes"] + 2**24


@pytest.mark.slow
def test_trained_runs_are_measured_with_their_accuracy(digits_run, tmp_path):
    evaluated = run("evaluate", f"--workdir={digits_run}")
    assert evaluated.returncode == 0, evaluated.stderr
    flags = [f"--workdir={digits_run}", f"--results={digits_run / 'metrics.json'}", f"--output={tmp_path / 'out'}"]
    done = run("benchmark", *flags, "--scope=device,end_to_end", "--contenders=plain", f"--profile={tmp_path / 'trace'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    saved = workdir.read_json(tmp_path / "out" / "benchmark.json")
    assert [row["name"] for row in saved["rows"]] == ["n2"] * 4 + ["plain"] * 4
    assert saved["reference"] == "plain"
    assert saved["results"][0]["value"] == workdir.read_json(digits_run / "metrics.json")["accuracy"]
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert "accuracy, times 100" in done.stdout
