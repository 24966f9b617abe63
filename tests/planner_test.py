"""Plans for TPU pods: compiled for real topologies without any of their chips."""

import importlib.util

import pytest

from configs import muxbert
from datamux_jax import experiment, planner
from datamux_jax.errors import InputError

PROGRAM = """
%body.1 (p: (f32[8])) -> (f32[8]) {
  %ar = f32[8]{0} all-reduce(%x), channel_id=7, to_apply=%add
}
%all-reduce-scatter.3 (a: f32[64,4]) -> f32[4,4] {
  %all-reduce.9 = (f32[64,4]{1,0}, f32[2]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
}
%async.5 (a: bf16[4,8]) -> bf16[64,8] {
  %all-gather.1 = bf16[64,8]{1,0:T(8,128)} all-gather(%a), channel_id=3, dimensions={0}
}
ENTRY %main (p: bf16[4,8]) -> f32[8] {
  %all-gather-start.1 = (bf16[4,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%p), channel_id=3, dimensions={0}
  %all-gather.2 = bf16[64,8]{1,0} all-gather(%q), channel_id=4, dimensions={0}
  %w = (f32[8]) while(%t), condition=%cond.1, body=%body.1
}
"""


def test_collectives_are_counted_once_each_with_their_bytes():
    found = {(one.kind, one.shape): (one.count, one.bytes, one.in_loop) for one in planner.collectives(PROGRAM)}
    assert found == {
        ("all-gather", "bf16[64,8]"): (2, 1024, False),
        ("reduce-scatter", "f32[64,4] f32[2]"): (1, 1032, False),
        ("all-reduce", "f32[8]"): (1, 32, True),
    }


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_way_out_is_named():
    with pytest.raises(InputError, match=r"--topology=v5e:4x4: .*pip install libtpu"):
        planner.topology_devices("v5e:4x4")


@pytest.fixture(scope="module")
def pod():
    pytest.importorskip("libtpu")
    return planner.topology_devices("v5e:16x16")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(256, 1, 1), (16, 16, 1), (8, 16, 2)])
def test_the_step_of_muxbert_base_compiles_for_a_pod(pod, mesh):
    """256 groups of 5 x 512 tokens: what is gathered are parameters, at most forwards and backwards, never activations of the batch."""
    config = experiment.expand(muxbert.get_config("base,n=5,files=.,retrieval=0"))["n5"]
    config.dtype = "bfloat16"
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    plan = planner.plan_for(config, pod)
    found = planner.estimate(plan, "v5e:16x16")
    print(planner.table(plan, found))
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
        assert all(one.count <= 2 * layers for one in kernels), kernels
        assert any(one.kind == "reduce-scatter" for one in found.collectives)
    else:
        assert not gathered
