"""Plans for TPU pods: compiled for real topologies without any of their chips."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time

import jax
import pytest

from configs import muxbert
from datamux_jax import experiment, plan_report, plan_search, planner, program, refusal, sharding, topology
from datamux_jax.errors import InputError
from datamux_jax.program import Collective, Program
from datamux_jax.refusal import OutOfMemory
from tests.conftest import small_config, text_config
from tests.launch_test import ROOT, assert_refused, run

PROGRAM = """
%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ar = f32[8]{0} all-reduce(%x), channel_id=7, replica_groups={{0,1,2,3}}, to_apply=%add
  %mul = f32[8]{0} fusion(%ar), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"100"}}
  %sorted = f32[8]{0} sort(%mul), dimensions={0}, to_apply=%less
}
%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.14 = s32[]{:T(128)} constant(12)
  ROOT %lt.0 = pred[]{:T(512)} compare(%get-tuple-element.16, %constant.14), direction=LT
}
%fused.1 (a: bf16[2,3,8]) -> bf16[2,3,4] {
  %a = bf16[2,3,8]{2,1,0} parameter(0)
  %b = bf16[1,8,4]{2,1,0} parameter(1)
  %inside = f32[8]{0} custom-call(%a), custom_call_target="AssumeGatherIndicesInBound"
  ROOT %conv = bf16[2,3,4]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=b0f_0io->b0f
}
%all-reduce-scatter.3 (a: f32[64,4]) -> f32[4,4] {
  %all-reduce.9 = (f32[64,4]{1,0}, f32[2]{0}) all-reduce(%a, %b), channel_id=1, replica_groups=[4,16]<=[64], to_apply=%add
}
%async.5 (a: bf16[4,8]) -> bf16[64,8] {
  %all-gather.1 = bf16[64,8]{1,0:T(8,128)} all-gather(%a), channel_id=3, dimensions={0}
}
ENTRY %main (p: bf16[4,8]) -> f32[8] {
  %all-gather-start.1 = (bf16[4,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%p), channel_id=3, replica_groups=mesh['a'=2,'b'=16] {'b'}
  %all-gather.2 = bf16[64,8]{1,0} all-gather(%q), channel_id=4, replica_groups=mesh['a'=2,'b'=16] {'b'}, dimensions={0}
  %f = bf16[4,8]{1,0} fusion(%p), kind=kCustom, calls=%async.5
  %scattered = f32[4,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3
  %one = bf16[4,8]{1,0} custom-call(%f), custom_call_target="ConcatBitcast"
  %sent = (f32[2,8]{1,0}, u32[], token[]) send(%f), channel_id=9, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %last = f32[8]{0} fusion(%one), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"7"}}
  %w = (s32[], f32[8]) while(%t), condition=%cond.1, body=%body.1
}
"""


def test_collectives_are_counted_once_each_with_their_bytes_and_members():
    found = {(one.kind, one.overlapped): one for one in Program.read(PROGRAM).collectives()}
    assert {key: (one.shape, one.count, one.bytes, one.members) for key, one in found.items()} == {
        ("all-gather", True): ("bf16[64,8]", 1, 1024, 16),  # Stands in two places.
        ("all-gather", False): ("bf16[64,8]", 1, 1024, 16),
        ("reduce-scatter", False): ("f32[64,4] f32[2]", 1, 1032, 16),
        ("all-reduce", False): ("f32[8]", 12, 32, 4),  # In the loop.
        ("all-reduce between slices", False): ("f32[2,8]", 1, 64, 0),
    }


def test_loops_multiply_cycles_products_and_unpriced_results():
    read = Program.read(PROGRAM)
    assert read.loops()
    assert read.cycles() == 12 * 100 + 7
    assert read.flops() == 13 * 2 * (2 * 3 * 4) * 8  # The fusion in the loop, and the last one.
    assert read.unpriced_bytes() == 12 * 32 + 64  # The sort, and a fusion without cycles; not what waits for others.
    assert read.unknown() == 1  # Calls within fusions do not count.
    assert read.uncounted() == 0
    endless = Program.read(PROGRAM.replace("direction=LT", "direction=NE"))
    assert (endless.uncounted(), endless.cycles()) == (1, 100 + 7)


def test_convolutions_skip_padding_and_dilation():
    """Heads as a spatial axis: how TPUs write batched products."""
    text = """
ENTRY %main (p: bf16[2,128,256]) -> bf16[2,128,4,64] {
  %a = bf16[2,128,1,256]{3,2,1,0} parameter(0)
  %b = bf16[256,4,64]{2,1,0} parameter(1)
  %c = bf16[2,128,4,64]{3,2,1,0} convolution(%a, %b), window={size=1x4 pad=0_0x3_3 rhs_reversal=0x1}, dim_labels=0b1f_i1o0->0b1f
}
"""
    text = text.replace("bf16[256,4,64]", "bf16[256,4,64,1]")
    assert Program.read(text).flops() == 2 * 2 * 128 * 256 * 4 * 64


def test_positions_of_a_window_are_those_that_trying_all_of_them_finds():
    draw = random.Random(0)
    for _ in range(2000):
        size, kernel, out = (draw.randint(1, 9) for _ in range(3))
        stride, lhs, rhs = (draw.randint(1, 6) for _ in range(3))
        low = draw.randint(-12, 12)
        places = [position * stride + element * rhs - low for element in range(kernel) for position in range(out)]
        tried = sum(at in range(0, size * lhs, lhs) for at in places)
        assert program._positions(size, kernel, out, low, stride, lhs, rhs) == tried, (size, kernel, out, low, stride, lhs, rhs)


def test_a_window_as_wide_as_a_large_batch_is_counted_at_once():
    """A batch as a spatial axis, as TPUs write attention: each group meets its own, once."""
    groups = 2**17
    began = time.monotonic()
    assert program._positions(groups, groups, groups, 0, groups - 1, groups, groups - 1) == groups
    assert program._positions(groups, groups, groups, groups - 1, 1, 1, 1) == groups * (groups + 1) // 2
    assert time.monotonic() - began < 10


def test_a_collective_takes_the_time_of_its_ring():
    gather = Collective("all-gather", "bf16[64,8]", 2, 1000, 4, False)
    assert gather.seconds(1e3, 1.0) == pytest.approx(2 * 0.75)
    assert dataclasses.replace(gather, kind="all-reduce").seconds(1e3, 1.0) == pytest.approx(4 * 0.75)
    assert dataclasses.replace(gather, kind="all-reduce between slices").seconds(1e3, 10.0) == pytest.approx(200)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "the generation 'v9'"),
        ("v5e", "no shape of v5e"),
        ("v5e:0x2", "no shape of v5e"),
        ("v5e:2x2x2", "which has 2 axes"),
        ("v5e:3x3", "Choose 1x1, 2x2"),
        ("v5e:32x32", "no shape"),
        ("v5p:4x4", "which has 3 axes"),
        ("v5p:4x4x6", "multiples of 4"),
        ("v5e:axb", "no shape"),
    ],
)
def test_impossible_machines_are_refused_before_the_compiler_sees_them(name, message):
    with pytest.raises(InputError, match=message):
        topology.parse(name)


def test_links_of_slices_that_are_no_rings_count_once():
    full = {name: topology.parse(name).link_speed for name in ("v5e:16x16", "v6e:16x16", "v4:4x4x8", "v5p:4x4x4")}
    assert list(full.values()) == [topology.CHIPS[name[: name.index(":")]].link_speed for name in full]
    for name in ("v5e:8x16", "v5e:2x2", "v5p:2x2x4", "v4:2x2x2"):
        assert topology.parse(name).link_speed == topology.CHIPS[name[: name.index(":")]].link_speed / 2


def test_a_chip_has_the_speeds_of_its_generation():
    """Bytes/s along an axis, both directions together, and to other slices ("How to Scale Your Model", TPU specs)."""
    speeds = {name: (chip.link_speed, chip.slice_speed) for name, chip in topology.CHIPS.items()}
    assert speeds == {"v4": (9e10, 6.25e9), "v5e": (9e10, 3.125e9), "v5p": (1.8e11, 6.25e9), "v6e": (1.8e11, 12.5e9)}


def test_what_leaves_a_slice_takes_the_network_of_its_chip():
    """Without loops and cycles in the program, what is left of its time is waiting."""
    text = """
ENTRY %main (p: f32[1000]) -> f32[1000] {
  %sent = (f32[1000]{0}, u32[], token[]) send(%p), channel_id=9, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""
    read = Program.read(text)
    for name, speed in (("v5e:2x2", 3.125e9), ("v6e:2x2", 12.5e9), ("v5p:2x2x1", 6.25e9)):
        times = planner._times(read, {}, read.collectives(), topology.parse(name, slices=2))
        assert times.waiting == pytest.approx(4000 / speed)


def test_machines_know_their_devices_and_clocks():
    assert topology.parse("v5e:16x16", slices=2).devices == 512
    assert topology.parse("v4:4x4x8").devices == 128
    assert topology.CHIPS["v5e"].clock == pytest.approx(1.5e9, rel=0.01)
    assert topology.CHIPS["v5p"].clock == pytest.approx(1.75e9, rel=0.01)
    assert topology.CHIPS["v4"].clock == pytest.approx(1.05e9, rel=0.01)
    with pytest.raises(InputError, match="--slices=0"):
        topology.parse("v5e:2x2", slices=0)


@pytest.mark.parametrize(
    ("changes", "step", "slices", "message"),
    [
        ({"mesh__data": 3}, "train", 1, "does not cover the 4 devices"),
        ({"batch_groups": 6}, "train", 1, "A batch of 6 groups does not divide"),
        ({"mesh__data": 2, "mesh__fsdp": 2}, "trian", 1, "'trian' does not exist"),
        ({"mesh__data": 2, "mesh__fsdp": 4}, "train", 2, None),
        ({"mesh__data": 1, "mesh__fsdp": 8}, "train", 2, "mesh.data = 1 does not divide over --slices=2"),
        ({"objective": "retrieval"}, "predict", 1, "--step=predict needs a task"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(changes, step, slices, message):
    config = text_config(**changes)
    machine = topology.parse("v5e:2x2", slices)
    if message is None:
        planner.check(config, step, machine)
        return
    with pytest.raises(InputError, match=message):
        planner.check(config, step, machine)


@pytest.fixture
def no_libtpu(monkeypatch):
    from jax.experimental import topologies

    def missing(*_, **__):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)


@pytest.mark.parametrize("step", ["train", "evaluate", "predict"])
def test_without_libtpu_shapes_and_shardings_are_left(no_libtpu, step):
    config = text_config(batch_groups=16, mesh__data=2, mesh__fsdp=8)
    machine = topology.parse("v5e:4x4")
    plan = planner.plan_for(config, machine, step)
    found = planner.estimate(plan, machine, step)
    assert not found.compiled
    assert found.times is None
    assert found.collectives == []
    assert found.capacity == 16 * 2**30
    leaves = jax.tree.leaves(plan.abstract.params)
    whole = sum(4 * leaf.size for leaf in leaves)
    # The optimizer has two numbers a parameter; fsdp splits all but tables and small vectors.
    assert found.memory["total"] < 3 * whole if step == "train" else found.memory["total"] > whole
    assert found.instances == 16 * 2
    assert found.flops > 0
    text = plan_report.details(plan_search.Row("", plan_search.with_mesh(config, {}), found), found, machine)
    assert "activations apart" in text
    assert "Collectives" not in text


def test_a_step_is_compiled_for_devices_that_are_there_too():
    """A CPU has no capacity and no time here."""
    config = small_config(1, eval__batch_groups=4)
    plan = planner.assemble(config, planner.format_of(config), sharding.inference_mesh(jax.devices()[:1]))
    found = planner.estimate(plan, None, "predict")
    assert found.compiled
    assert (found.capacity, found.left, found.times, found.instances) == (None, 0, None, 4)
    assert found.memory["total"] > sum(4 * leaf.size for leaf in jax.tree.leaves(plan.abstract.params))
    model = planner.STEPS["predict"].flops(plan)
    assert found.flops == pytest.approx(model, rel=0.05)


WITHOUT = """
import runpy, sys
sys.modules["libtpu"] = None
runpy.run_module("launch.plan", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--n=1,2"], ["--search"]])
def test_the_command_says_what_it_can_tell_without_libtpu(more):
    flags = ["--config=configs/muxbert.py:base,n=5,files=.,retrieval=0", "--topology=v5e:16x16", *more]
    # Where libtpu is installed, importing jax says where, and commands that are started inherit that.
    environment = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    command = [sys.executable, "-c", WITHOUT, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if more == ["--search"]:
        assert_refused(done, "libtpu is not installed: pip install libtpu")
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("libtpu is not installed, so nothing was compiled")
    assert done.stdout.count("not known") == 2 + 1


# As libtpu 0.0.52 has them: the first is what it says here, the second what it says after scheduling.
TOO_LARGE = [
    (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(145.50G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org/xla/errors/error_1000 for more "
        "details.",
        145.5,
    ),
    (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.25G of 15.75G hbm. "
        "Exceeded hbm capacity by 1.50G. HLO module: jit_step. Memory usage report: \n\nTotal hbm usage >= 17.50G:",
        17.25,
    ),
]


@pytest.mark.parametrize(("text", "used"), TOO_LARGE)
def test_the_compilers_words_say_how_much_memory_lacks(text, used):
    found = refusal.refusal(RuntimeError(text), topology.parse("v5e:1x1"))
    assert isinstance(found, OutOfMemory)
    assert (found.used, found.capacity, found.lack) == (used * 2**30, 15.75 * 2**30, (used - 15.75) * 2**30)
    assert f"needs {used:.2f}G of the 15.75G that a device has, {used - 15.75:.2f}G too much" in str(found)


def test_other_refusals_are_not_about_memory():
    found = refusal.refusal(RuntimeError("INTERNAL: Mosaic failed\nmore"), None)
    assert not isinstance(found, OutOfMemory)
    assert str(found).startswith("The compiler refuses the step for these devices: INTERNAL: Mosaic failed.")
    unsaid = refusal.refusal(RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM, somehow."), None)
    assert isinstance(unsaid, OutOfMemory)
    assert unsaid.lack is None
    small = refusal.refusal(
        RuntimeError("Ran out of memory on HBM: (900.00M) exceeds available HBM (512K)"), topology.parse("v5e:1x1")
    )
    assert (small.used, small.capacity) == (900 * 2**20, 512 * 2**10)


def planned(config, name, step="train", slices=1):
    pytest.importorskip("libtpu")
    machine = topology.parse(name, slices)
    return planner.estimate(planner.plan_for(config, machine, step), machine, step)


def tiny(arguments="", **keys):
    """A training step of MUX-BERT that compiles in seconds; wide enough for the matrix units."""
    config = experiment.expand(muxbert.get_config(f"2x128,n=2,files=.,retrieval=0,length=64,dropout=0,vocab=512{arguments}"))[
        "n2"
    ]
    config.dtype = "bfloat16"
    for key, value in keys.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


@pytest.mark.slow
def test_cycles_agree_with_the_compilers_own_time_where_it_has_one():
    found = planned(tiny(batch_groups=8), "v5e:1x1")
    assert found.times.source == planner.BY_CYCLES
    assert found.times.optimal / 3 < found.times.computing < 30 * found.times.optimal  # Small operations have a cost each.
    assert found.times.total >= found.flops / topology.CHIPS["v5e"].flops
    assert found.collectives == []


@pytest.mark.slow
def test_scanned_and_unrolled_layers_have_the_same_operations():
    one, other = (planned(tiny(batch_groups=8, scan_layers=scan), "v5e:2x2") for scan in (False, True))
    assert other.flops == pytest.approx(one.flops, rel=0.02)
    assert other.times.optimal is None  # It would count the loop once.
    assert 0.5 < other.times.computing / one.times.computing < 2


@pytest.mark.slow
def test_micro_batches_have_the_operations_of_the_whole_batch():
    one, other = (planned(tiny(batch_groups=8, accumulation=count), "v5e:1x1") for count in (1, 4))
    assert other.flops == pytest.approx(one.flops, rel=0.05)


@pytest.mark.slow
def test_the_compiler_of_a_tpu_says_how_much_too_large_a_step_is():
    """So that its words are still those that `TOO_LARGE` has."""
    with pytest.raises(OutOfMemory) as caught:
        planned(tiny(batch_groups=1024, data__length=512, scan_layers=True), "v5e:1x1")
    assert caught.value.capacity == pytest.approx(16 * 2**30, rel=0.05)
    assert caught.value.lack > 2**30


@pytest.mark.slow
def test_gathers_on_sparse_cores_are_read():
    """Many gathered numbers go to the SparseCores of a v5p, in instructions that jaxlib 0.10.2 cannot read."""
    found = planned(tiny(num_instances=5, batch_groups=32, data__length=512), "v5p:2x2x1")
    assert found.times.source == planner.BY_CYCLES
    assert found.flops > 1e9


@pytest.mark.slow
def test_slices_talk_through_their_hosts():
    found = planned(tiny(batch_groups=8), "v5e:2x2", slices=2)
    assert found.devices == 8
    between = [one for one in found.collectives if one.kind.endswith("between slices")]
    assert between
    alone = sum(one.count * one.bytes for one in between) / 3.125e9
    inside = sum(one.seconds(4.5e10, 1.0) for one in found.collectives if one not in between and not one.overlapped)
    assert not any(one.overlapped for one in between)
    assert found.times.waiting == pytest.approx(alone + inside)


@pytest.mark.slow
@pytest.mark.parametrize("step", ["evaluate", "predict"])
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2"])
def test_evaluation_and_prediction_are_planned(step, name):
    found = planned(text_config(), name, step)
    assert found.devices == 4
    assert found.instances == 2 * 16
    assert 0 < found.left < found.capacity
    assert found.times.total > 0


@pytest.mark.slow
def test_the_command_refuses_plans_and_compares(tmp_path):
    pytest.importorskip("libtpu")
    flags = [
        "--config=configs/muxbert.py:2x128,n=2,files=.,retrieval=0,length=64,groups=8,vocab=512",
        "--config.dtype=bfloat16",
    ]
    refused = run("plan", *flags, "--topology=v5e:2x2", "--mesh=data=3")
    assert_refused(refused, "does not cover the 4 devices")
    file = tmp_path / "plans.json"
    done = run("plan", *flags, "--topology=v5e:2x2", "--n=1,2", "--mesh=data=4;data=2,fsdp=2", f"--json={file}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| yes ") == 4
    assert len(json.loads(file.read_text())["plans"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(256, 1, 1), (16, 16, 1), (8, 16, 2)])
def test_the_step_of_muxbert_base_compiles_for_a_pod(mesh):
    """256 groups of 5 x 512 tokens: what is gathered are parameters, at most forwards and backwards, never activations of the batch."""
    config = experiment.expand(muxbert.get_config("base,n=5,files=.,retrieval=0"))["n5"]
    config.dtype = "bfloat16"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    found = planned(config, "v5e:16x16")
    assert found.devices == 256
    assert found.memory["total"] < found.capacity == 16 * 2**30
    groups, layers = 256 // mesh[0] // mesh[1], 12
    gathered = [one for one in found.collectives if one.kind == "all-gather"]
    for one in gathered:
        sizes = [int(size) for size in one.shape.partition("[")[2].partition("]")[0].split(",") if size]
        assert not (512 in sizes and sizes[0] > groups * 5 and len(sizes) > 2), one
    if mesh[1] > 1:
        kernels = [one for one in gathered if one.shape.startswith(("bf16[768,3072", "bf16[768,1536"))]
        assert kernels, "parameters are split over fsdp"
        assert sum(one.count for one in kernels) <= 2 * layers, kernels
        assert any(one.kind == "reduce-scatter" for one in found.collectives)
    else:
        assert not gathered
