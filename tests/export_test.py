"""Exported predictors: the same predictions without the network's code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import datamux_jax
from datamux_jax import export
from datamux_jax.errors import InputError
from datamux_jax.train import train
from tests.conftest import text_config
from tests.launch_test import assert_refused, run

ROOT = Path(__file__).parents[1]
TEXTS = ["guten Morgen", "bonjour", "", "x" * 500, *(f"phrase {i}" for i in range(40))]

# What an exported predictor must do without: the network, its training and their libraries.
READER = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in NAMES or name.split(".")[0] in ("flax", "optax", "orbax"):
            raise ImportError(name + " is blocked")

NAMES = {"datamux_jax." + name for name in (
    "model build mux demux layers heads backbones objectives losses step train checkpoint runs plan predict export optimizer"
).split()}
sys.meta_path.insert(0, Blocked())
import datamux_jax
predictor = datamux_jax.load_exported(sys.argv[1])
texts = json.loads(sys.argv[2])
print(json.dumps([predictor.logits(texts, ensemble=k).tolist() for k in (1, 2)]))
"""


@pytest.fixture(scope="module")
def exports(text_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "text"
    said = export.export_run(text_run, folder)
    assert "classification, N = 2" in said
    return folder


def test_the_same_predictions_without_the_network_code(text_run, exports):
    predictor = datamux_jax.load(text_run)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(exports), json.dumps(TEXTS)],
        cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for k, logits in zip((1, 2), json.loads(done.stdout), strict=True):
        np.testing.assert_allclose(logits, predictor.logits(TEXTS, ensemble=k), atol=1e-6)


def test_what_prediction_does_not_read_is_left_out(text_run, exports):
    params = np.load(exports / "params.npz")
    assert any(name.startswith("classifier/") for name in params.files)
    assert not any(name.startswith("decoder/") or "retrieval" in name for name in params.files)


def test_features_are_exported_too(digits_run, tmp_path):
    export.export_run(digits_run, tmp_path / "export", ("cpu",))
    images = np.random.default_rng(0).random((35, 8, 8), np.float32)
    predictions = datamux_jax.load_exported(tmp_path / "export").logits(images)
    np.testing.assert_allclose(predictions, datamux_jax.load(digits_run).logits(images), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("mux", "demux", "prefix"), [("contextual", "index", "cut"), ("random_ortho", "mlp", "extend")])
def test_every_kind_of_network_lowers_for_every_platform(tmp_path, mux, demux, prefix):
    changes = {"mux__name": mux, "demux__name": demux, "demux__prefix": prefix, "data__length": 20}
    train(text_config(steps=2, retrieval_loss_coeff=0.1, **changes), tmp_path / "run")
    export.export_run(tmp_path / "run", tmp_path / "export", export.PLATFORMS)
    exported, predictor = datamux_jax.load_exported(tmp_path / "export"), datamux_jax.load(tmp_path / "run")
    np.testing.assert_allclose(exported.logits(TEXTS), predictor.logits(TEXTS), atol=1e-6)
    assert exported.lengths == (16, 20)


def test_from_the_command_line(text_run, tmp_path):
    made = run("convert", f"--workdir={text_run}", f"--to_stablehlo={tmp_path / 'export'}", "--platforms=cpu")
    assert (made.returncode, made.stderr) == (0, "")
    (tmp_path / "in.txt").write_text("guten Morgen\nbonjour\n")
    by_export = run("predict", f"--workdir={tmp_path / 'export'}", f"--input={tmp_path / 'in.txt'}")
    by_run = run("predict", f"--workdir={text_run}", f"--input={tmp_path / 'in.txt'}")
    assert (by_export.returncode, by_export.stderr, by_export.stdout) == (0, by_run.stderr, by_run.stdout)
    assert by_run.stderr.startswith("2 rows read, 2 predicted")
    assert_refused(run("convert", f"--workdir={text_run}", f"--to_stablehlo={tmp_path / 'export'}"), "is not an empty folder")
    assert_refused(run("convert", f"--workdir={text_run}"), "Say either what to read")


def test_folders_that_are_none_are_refused(exports, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"holds no export\.json"):
        datamux_jax.load_exported(tmp_path)
    with pytest.raises(InputError, match="The platform 'abacus' does not exist"):
        export.export_run(tmp_path, tmp_path / "new", ("abacus",))
    manifest = json.loads((exports / "export.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in exports.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    (copy / "tokenizer").symlink_to(exports / "tokenizer")
    (copy / "export.json").write_text(json.dumps({**manifest, "platforms": ["tpu"]}))
    with pytest.raises(InputError, match="exported for tpu, but jax uses cpu here"):
        datamux_jax.load_exported(copy)
    (copy / "export.json").write_text(json.dumps(manifest))
    (copy / "program-12.bin").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        datamux_jax.load_exported(copy)
