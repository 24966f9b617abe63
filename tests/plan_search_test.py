"""Searching plans: which are tried, how they rank, and what is said of those that fail."""

import dataclasses
import json
import subprocess
import sys

import pytest

from datamux_jax import plan_report, plan_search, planner, sharding, topology
from datamux_jax.errors import InputError
from datamux_jax.planner import Estimate, Times
from datamux_jax.refusal import OutOfMemory
from tests.conftest import small_config, text_config
from tests.launch_test import ROOT, assert_refused


def fake(rates, needs=None, refused=None):
    """An estimator: instances/s and GiB by `(data, fsdp, tensor, accumulation)`, and what it was asked.

    `refused`: GiB of what the compiler itself finds too large, of 15.75; None where it does not say.
    """
    asked = []

    def estimator(config):
        key = (*(config.mesh[axis] for axis in sharding.AXES), config.accumulation)
        asked.append(key)
        if key in (refused or {}):
            gib = refused[key]
            sizes = () if gib is None else (int(gib * 2**30), int(15.75 * 2**30))
            raise OutOfMemory("too large", *sizes)
        if key not in rates:
            raise RuntimeError("the compiler is gone\nsecond line")
        seconds = config.batch_groups * config.num_instances / rates[key]
        gib = (needs or {}).get(key, 1)
        return Estimate(
            4, config.batch_groups * config.num_instances, {"total": gib * 2**30}, 16 * 2**30, 1e9,
            Times(seconds, seconds, 0.0, 0.0, None, planner.BY_CYCLES), [], 12,
        )  # fmt: skip

    return estimator, asked


def place(row):
    return (*row.mesh.values(), row.config.accumulation)


def test_search_tries_meshes_that_divide_and_ranks_what_fits_first():
    config = text_config(batch_groups=16)
    machine = topology.parse("v5e:2x2")
    rates = {(4, 1, 1, 1): 900, (4, 1, 1, 2): 500, (2, 2, 1, 1): 700, (1, 4, 1, 1): 800, (1, 2, 2, 1): 100}
    estimator, asked = fake(rates, {(4, 1, 1, 1): 20})
    rows = plan_search.ranked(plan_search.search("run", config, machine, estimator))
    assert asked[:2] == [(4, 1, 1, 1), (4, 1, 1, 2)]  # More micro-batches only where memory lacks,
    assert (2, 2, 1, 2) not in asked
    assert (2, 1, 2, 1) in asked
    assert (2, 1, 2, 2) not in asked  # not where the compiler fails.
    assert all(tensor in (1, 2) for _, _, tensor, _ in asked)  # Two heads.
    order = [place(row) for row in rows if row.estimate]
    assert order == [(1, 4, 1, 1), (2, 2, 1, 1), (4, 1, 1, 2), (1, 2, 2, 1), (4, 1, 1, 1)]
    assert [row.fits for row in rows[:5]] == [True] * 4 + [False]
    assert rows[-1].problem == "RuntimeError: the compiler is gone."
    text = plan_report.comparison(rows, machine)
    assert "no, 4.00 GiB lack" in text
    assert "the compiler is gone" in text


def test_what_the_compiler_finds_too_large_says_by_how_much(tmp_path):
    config = text_config(batch_groups=16)
    machine = topology.parse("v5e:2x2")
    refused = {(4, 1, 1, 1): 40, (4, 1, 1, 2): 17.25, (4, 1, 1, 4): 16.5, (2, 2, 1, 1): None, (2, 1, 2, 1): 17}
    estimator, asked = fake({(2, 2, 1, 2): 700, (1, 4, 1, 1): 800, (2, 1, 2, 2): 600}, {(2, 1, 2, 2): 17}, refused)
    found = list(plan_search.search("run", config, machine, estimator))
    assert asked[:3] == [(4, 1, 1, 1), (4, 1, 1, 2), (4, 1, 1, 4)]
    rows = plan_search.ranked(found)
    assert [place(row) for row in rows if row.fits] == [(1, 4, 1, 1), (2, 2, 1, 2)]
    assert [(place(row), row.lack / 2**30) for row in rows if row.lack] == [
        ((4, 1, 1, 4), 0.75), ((2, 1, 2, 2), 1.0), ((2, 1, 2, 1), 1.25), ((4, 1, 1, 2), 1.5), ((4, 1, 1, 1), 24.25),
    ]  # fmt: skip
    assert place(rows[7]) == (2, 2, 1, 1)  # Nothing says how much it lacks,
    assert not rows[8].too_large  # and of these nothing is known.
    text = plan_report.comparison(rows, machine).splitlines()
    line = next(line for line in text if "no, 24.25 GiB lack" in line)
    assert "| 40.00 |" in line
    assert line.count("|") == text[0].count("|")
    assert any("no, too large" in line for line in text)
    problems = [line for line in text if line.startswith("run, N = 2")]
    assert problems[0] == "run, N = 2, data=2 fsdp=2: too large"
    assert [problem.partition(": ")[2] for problem in problems[1:]] == ["RuntimeError: the compiler is gone."] * 2
    file = tmp_path / "plans.json"
    plan_report.write_json(file, found, machine, "train")
    first = json.loads(file.read_text())["plans"][0]
    assert first["out_of_memory"] == {"used": 40 * 2**30, "capacity": int(15.75 * 2**30)}
    assert first["lack"] == 24.25 * 2**30


def test_a_search_checks_all_candidates_first_and_says_when_none_could_be_made():
    machine = topology.parse("v5e:2x2")
    assert plan_search.searched({"a": text_config(batch_groups=16)}, [1, 2], machine)[1][0] == "a"
    with pytest.raises(InputError, match="float99"):
        plan_search.searched({"": text_config(batch_groups=16, dtype="float99")}, [], machine)
    estimator, _ = fake({}, refused={(4, 1, 1, 1): 40})
    rows = list(plan_search.search("run", text_config(batch_groups=16), machine, estimator))
    plan_search.check_any(rows)  # That one is too large is something to know.
    with pytest.raises(InputError, match=r"None of 1 plans could be made\. The first: RuntimeError: the compiler is gone"):
        plan_search.check_any(rows[-1:])


def test_several_n_and_meshes_are_one_table_and_one_file(tmp_path):
    config = text_config(batch_groups=16)
    machine = topology.parse("v5e:2x2")
    meshes = plan_search.read_meshes("data=4;data=-1,fsdp=2")
    chosen = plan_search.candidates({"": config}, plan_search.read_counts("1,4"), meshes, machine, "train")
    assert [(one.num_instances, one.mux.name, one.demux.name) for _, one in chosen[1:3]] == [
        (1, "none", "none"),
        (4, "gaussian_hadamard", "rsa"),
    ]
    assert [(one.mesh.data, one.mesh.fsdp) for _, one in chosen] == [(4, 1), (2, 2), (4, 1), (2, 2)]
    estimator, _ = fake({(4, 1, 1, 1): 100, (2, 2, 1, 1): 50})
    rows = list(plan_search.sweep(chosen, lambda one: dataclasses.replace(estimator(one), instances=16 * one.num_instances)))
    rows[2] = dataclasses.replace(
        rows[2], estimate=dataclasses.replace(rows[2].estimate, times=Times(0.2, 0.2, 0, 0, None, ""))
    )
    text = plan_report.comparison(rows, machine)
    assert "320" in text
    assert "3.20x = 0.80 N" in text
    file = tmp_path / "plans.json"
    plan_report.check_json(file)
    plan_report.write_json(file, rows, machine, "train")
    written = json.loads(file.read_text())
    assert written["topology"] == "v5e:2x2"
    assert [one["num_instances"] for one in written["plans"]] == [1, 1, 4, 4]
    assert written["plans"][2]["estimate"]["instances_per_second"] == pytest.approx(320)
    with pytest.raises(InputError, match="exists and is not overwritten"):
        plan_report.check_json(file)


@pytest.mark.parametrize("text", ["data", "data=4;", "model=4", "data=four", "data=4,,fsdp=1"])
def test_meshes_that_cannot_be_read_are_refused(text):
    with pytest.raises(InputError, match="cannot be read at"):
        plan_search.read_meshes(text)


@pytest.mark.parametrize("text", ["", "a", "1,", "1;2", "-1"])
def test_counts_that_cannot_be_read_are_refused(text):
    with pytest.raises(InputError, match="is no list of numbers"):
        plan_search.read_counts(text)


def test_a_batch_that_no_mesh_divides_is_refused():
    with pytest.raises(InputError, match="divides over none of the meshes"):
        plan_search.meshes_of(small_config(batch_groups=3, model__num_heads=1), topology.parse("v5e:2x2"))
    with pytest.raises(InputError, match="0 is no number of instances"):
        plan_search.with_instances(small_config(), 0)


# The machine and the compiler stand still; the third plan is interrupted.
STOPPED = """
import runpy, sys
from datamux_jax import planner, topology
topology.devices_of = lambda machine: []
planner.plan_for = lambda config, *_: config
def estimate(config, machine, step, asked=[]):
    asked.append(config)
    if len(asked) == 3:
        raise KeyboardInterrupt
    times = planner.Times(0.5, 0.5, 0.0, 0.0, None, planner.BY_CYCLES)
    return planner.Estimate(4, 16 * len(asked), {"total": 2**30}, 16 * 2**30, 1e9, times, [])
planner.estimate = estimate
runpy.run_module("launch.plan", run_name="__main__")
"""
FAILED = STOPPED.replace("raise KeyboardInterrupt", "pass").replace("times =", "raise ValueError('gone')\n    times =")
SEARCHED = ["--config=configs/muxbert.py:2x64,n=2,files=.,retrieval=0,groups=16", "--topology=v5e:2x2", "--search"]


def planned_by(script, *flags):
    """The command, with parts of it replaced by `script`."""
    command = [sys.executable, "-c", script, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_an_interrupted_search_shows_what_there_is():
    done = planned_by(STOPPED, *SEARCHED)
    assert done.returncode == 130, done.stderr
    assert "Interrupted after 2 plans:" in done.stdout
    assert done.stdout.count("| yes ") == 2
    assert done.stdout.index("| 64 ") < done.stdout.index("| 32 ")  # Instances a second: ranked.


def test_a_search_without_any_plan_is_an_error():
    done = planned_by(FAILED, *SEARCHED)
    assert done.returncode == 2
    assert done.stdout.count("no estimate") > 2
    assert "error: None of" in done.stderr
    assert "ValueError: gone" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.dtype=float99"], "float99"),
        (["--config.mesh.fsdp=2"], "so --config.mesh.fsdp=2 would be lost"),
        (["--config.accumulation=2"], "so --config.accumulation=2 would be lost"),
        (["--nosearch", "--mesh=data=4", "--config.mesh.fsdp=2"], "the meshes that it lists, so --config.mesh.fsdp=2"),
    ],
)
def test_what_a_search_would_override_or_cannot_plan_is_refused_first(flags, message):
    assert_refused(planned_by(STOPPED, *SEARCHED, *flags), message)
