"""Published checkpoints, in and out."""

import itertools
import json
import os
import pickle
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import common
from datamux_jax import convert, hf, hf_config, hf_names, sharding, start
from datamux_jax.build import build, init_params
from datamux_jax.errors import InputError
from datamux_jax.evaluate import evaluate_run
from datamux_jax.families import FAMILIES
from datamux_jax.model import call
from datamux_jax.runs import load_run
from datamux_jax.saved import newest_step
from datamux_jax.train import train
from tests import golden
from tests.conftest import text_config
from tests.golden_test import FOLDER
from tests.launch_test import assert_refused
from tests.launch_test import run as run_command

N, VOCAB = 3, {"bert": 701, "electra": 701, "roberta": 50265}
PLAIN = [
    (family, name) for family in FAMILIES for name in hf_config.ARCHITECTURES[family, False] if name != "BertForPreTraining"
]
MULTIPLEXED = [
    (family, name, mux, demux)
    for family in FAMILIES
    for name, mux, demux in itertools.product(
        hf_config.ARCHITECTURES[family, True], hf_config.MUX_NAMES.values(), hf_config.PUBLISHED_DEMUX[family]
    )
    if mux in hf_config.PUBLISHED_MUX[name]
]


def published(family, name, mux="", demux="", **changes):
    """A config.json as the published code writes it, of a tiny model."""
    config = {
        "architectures": [name],
        "model_type": family,
        "hidden_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 24,
        "type_vocab_size": FAMILIES[family].type_vocab_size,
        "vocab_size": VOCAB[family],
        "layer_norm_eps": FAMILIES[family].layer_norm_eps,
        "id2label": {"0": "no", "1": "yes", "2": "maybe"},
        "pad_token_id": 1 if family == "roberta" else 0,
    }
    if family == "electra" and mux != "gaussian_attention" and "ortho" not in mux:
        config["embedding_size"] = 6
    if mux:
        config |= {
            "num_instances": N,
            "muxing_variant": {ours: theirs for theirs, ours in hf_config.MUX_NAMES.items()}[mux],
            "demuxing_variant": {ours: theirs for theirs, ours in hf_config.DEMUX_NAMES.items()}[demux],
            "num_hidden_demux_layers": 3,
        }
    return config | changes


def network(description):
    """Config, format, model and random parameters of a published description."""
    config = hf_config.to_config(description, "config.json", common.get_config())
    fmt = convert._format(config, description)
    model = build(config, num_classes=len(fmt.label_names), vocab_size=fmt.vocab_size, max_length=fmt.length, tokens=fmt.tokens)
    shapes = jax.eval_shape(lambda key: init_params(model, key, (1, config.num_instances, 8), "int32"), jax.random.key(0))
    leaves, tree = jax.tree.flatten(sharding.unbox(shapes))
    rng = np.random.default_rng(0)
    return config, fmt, model, jax.tree.unflatten(tree, [rng.normal(size=x.shape).astype("f") for x in leaves])


def write(folder, description, state):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(description))
    hf.write_state(folder / "model.safetensors", state)
    return folder


@pytest.mark.parametrize(("family", "name", "mux", "demux"), MULTIPLEXED + [(*row, "", "") for row in PLAIN])
def test_export_then_import_is_the_identity(family, name, mux, demux):
    description = published(family, name, mux, demux)
    config, fmt, model, params = network(description)
    again = hf_config.from_config(
        config, vocab_size=fmt.vocab_size, positions=model.num_positions, labels=fmt.label_names, pad=fmt.tokens.pad
    )
    assert {key: again[key] for key in description} == description
    state = hf.export_state(params, config)
    blank = jax.tree.map(np.zeros_like, params)
    back, stayed, _ = hf.import_state(state, hf_config.to_config(again, "config.json", common.get_config()), blank, "file")
    assert stayed == []
    chex.assert_trees_all_equal(back, params)
    # Files in which shared tensors stand once, under any of their names, are the same checkpoint.
    for alias, key in hf_names.aliases(config).items():
        once = {k: v for k, v in state.items() if k != key} if alias in state else state
        chex.assert_trees_all_equal(hf.import_state(once, config, blank, "file")[0], params)


def golden_folder(tmp_path, name="muxbert_sequence_gaussian_indexpos_n5"):
    pair, data = golden.load(FOLDER / f"{name}.json")
    return write(tmp_path / name, golden.published_config(pair), golden.fill(pair)), pair, data


def test_a_run_is_written_used_and_exported_again(tmp_path):
    source, pair, data = golden_folder(tmp_path)
    (source / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]))
    message = convert.import_run(source, tmp_path / "run", common.get_config())
    assert "bert, N = 5, gaussian_hadamard, rsa, objective classification" in message
    run = load_run(tmp_path / "run")
    assert newest_step(tmp_path / "run") == 0
    assert run.format.tokenizer.decode(run.format.encode(["hello"])["inputs"][0]) == "hello"
    h = call(run.model, run.params, "encode", data["input_ids"].reshape(2, 5, 12), data["attention_mask"].reshape(2, 5, 12))
    logits = call(run.model, run.params, "classify", h, data["attention_mask"].reshape(2, 5, 12))
    np.testing.assert_allclose(np.asarray(logits).reshape(10, 3), data["logits"], atol=1e-5)

    assert "MuxedBertForSequenceClassification" in convert.export_run(tmp_path / "run", tmp_path / "out")
    exported, wanted = load_file(tmp_path / "out" / "model.safetensors"), golden.fill(pair)
    assert set(exported) == set(wanted) == set(pair["state"])
    for key, value in wanted.items():
        np.testing.assert_array_equal(exported[key], value)
    assert (tmp_path / "out" / "vocab.txt").exists()
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        convert.export_run(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_multiplexing_starts_from_a_plain_encoder(tmp_path, family, bare):
    """With or without the `bert.` prefix; with heads of another task, which are left alone."""
    description = published(family, {"bert": "BertModel", "roberta": "RobertaModel", "electra": "ElectraModel"}[family])
    config, _, _, params = network(description)
    state = {key: value for key, value in hf.export_state(params, config).items() if key.startswith(f"{family}.")}
    state[f"{family}.pooler.dense.weight"] = np.zeros((12, 12), "f")
    state[f"{family}.embeddings.position_ids"] = np.zeros((1, 24), "f")
    if bare:
        state = {key.removeprefix(f"{family}."): value for key, value in state.items()}
    else:
        state["classifier.weight"] = np.zeros((5, 12), "f")
    convert.import_run(write(tmp_path / "plain", description, state), tmp_path / "run", common.get_config())
    plain = load_run(tmp_path / "run")
    chex.assert_trees_all_equal(plain.params["backbone"], params["backbone"])
    chex.assert_trees_all_equal(plain.params["embeddings"], params["embeddings"])

    # A multiplexed network of the same sizes starts from it: the encoder is taken over, the rest is fresh.
    goal = published(
        family, next(iter(hf_config.ARCHITECTURES[family, True])), "gaussian_hadamard", hf_config.PUBLISHED_DEMUX[family][0]
    )
    _, _, _, fresh = network(goal)
    on_device = jax.tree.map(jnp.asarray, fresh)
    mixed, left = start.init_from(tmp_path / "run", on_device)
    assert "fresh: " in left
    assert "mux/instance_embedding" in left
    chex.assert_trees_all_equal(mixed["backbone"], params["backbone"])
    chex.assert_trees_all_equal(mixed["embeddings"], params["embeddings"])
    chex.assert_trees_all_equal(mixed["mux"], fresh["mux"])
    chex.assert_trees_all_equal(mixed["demux"], fresh["demux"])


def test_a_config_that_says_nothing_about_the_task(tmp_path):
    source, pair, _ = golden_folder(tmp_path)
    description = golden.published_config(pair) | {"architectures": ["SomethingElse"]}
    (source / "config.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=r"MuxedBertForSequenceClassification.*--objective"):
        convert.import_run(source, tmp_path / "run", common.get_config())
    assert not (tmp_path / "run").exists()
    assert "objective tagging" in convert.import_run(source, tmp_path / "run", common.get_config(), objective="tagging")


def test_a_pre_trained_checkpoint_gets_a_fresh_head_for_a_task(tmp_path):
    source, _, _ = golden_folder(tmp_path, "muxbert_mlm_gaussian_indexpos_n2")
    message = convert.import_run(source, tmp_path / "run", common.get_config(), objective="classification")
    assert "Fresh, as the checkpoint has none: classifier/out/bias, classifier/out/kernel." in message


def spoil(source, change):
    state = load_file(source / "model.safetensors")
    change(state)
    save_file({key: np.ascontiguousarray(value) for key, value in state.items()}, source / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("classifier.bias"), "Missing: classifier.bias. Surplus: nothing"),
        (lambda s: s.update({"extra.weight": s["classifier.bias"]}), "Surplus: extra.weight"),
        (
            lambda s: s.update({"classifier.weight": s["classifier.weight"][:2]}),
            r"classifier.weight is \[2, 32\] there and \[3, 32\] here",
        ),
        (
            lambda s: s.update({"retrieval_head.decoder.bias": s["retrieval_head.bias"] + 1}),
            "retrieval_head.decoder.bias and retrieval_head.bias differ",
        ),
    ],
)
def test_keys_that_do_not_fit_are_all_listed(tmp_path, change, message):
    source, _, _ = golden_folder(tmp_path)
    spoil(source, change)
    with pytest.raises(InputError, match=message):
        convert.import_run(source, tmp_path / "run", common.get_config())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2Model"]}, "'gpt2'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"muxing_variant": "fft"}, "muxing_variant = 'fft'"),
        ({"demuxing_variant": "fft"}, "demuxing_variant = 'fft'"),
        ({"retrieval_loss_vocab_scale": 2}, "retrieval_loss_vocab_scale = 2"),
        ({"hidden_size": None}, "no key 'hidden_size'"),
        ({"demuxing_variant": "index", "vocab_size": 300}, "feeds the token ids .*680"),
    ],
)
def test_configs_that_cannot_be_computed_are_refused(tmp_path, changes, message):
    source, pair, _ = golden_folder(tmp_path)
    description = {key: value for key, value in (golden.published_config(pair) | changes).items() if value is not None}
    (source / "config.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match=message):
        convert.import_run(source, tmp_path / "run", common.get_config())


def test_damaged_and_missing_files(tmp_path):
    source, _, _ = golden_folder(tmp_path)
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no complete safetensors file"):
        convert.import_run(source, tmp_path / "run", common.get_config())
    (source / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"neither model.safetensors nor pytorch_model.bin"):
        convert.import_run(source, tmp_path / "run", common.get_config())
    (source / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        convert.import_run(source, tmp_path / "run", common.get_config())
    (source / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config\.json"):
        convert.import_run(source, tmp_path / "run", common.get_config())


def test_bin_without_torch_says_how_to_go_on(tmp_path, monkeypatch):
    source, _, _ = golden_folder(tmp_path)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="only with torch, which is not installed"):
        convert.import_run(source, tmp_path / "run", common.get_config())


class Exploit:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.slow
def test_bin_is_read_with_torch_and_nothing_is_unpickled(tmp_path):
    import torch

    source, _, _ = golden_folder(tmp_path)
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save({key: torch.from_numpy(value) for key, value in state.items()}, source / "pytorch_model.bin")
    convert.import_run(source, tmp_path / "run", common.get_config())
    chex.assert_trees_all_equal(dict(hf.read_state(source)), dict(state))

    exploit = Exploit()
    exploit.path = str(tmp_path / "owned")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(exploit))
    with pytest.raises(InputError, match="cannot be read as a file of plain weights"):
        convert.import_run(source, tmp_path / "other", common.get_config())
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in golden.pairs(FOLDER)])
def test_exported_files_load_in_torch_without_missing_or_surplus_keys(tmp_path, name):
    """Into modules with the published state keys, as recorded from the published classes."""
    import torch
    from safetensors.torch import load_file as load_torch

    source, pair, _ = golden_folder(tmp_path, name)
    convert.import_run(source, tmp_path / "run", common.get_config())
    convert.export_run(tmp_path / "run", tmp_path / "out")
    module = torch.nn.Module()
    for key, rule in pair["state"].items():
        *parents, leaf = key.split(".")
        node = module
        for part in parents:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node._modules[part]
        node.register_parameter(leaf, torch.nn.Parameter(torch.zeros(rule["shape"])))
    module.load_state_dict(load_torch(tmp_path / "out" / "model.safetensors"), strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demux__form": "paper"}, "another rsa stack"),
        ({"mux__attend_padding": False}, "whose attention leaves padding out"),
        ({"mux__name": "gaussian_attention", "objective": "mlm"}, "no class MuxedBertForMaskedLM with"),
        ({"demux__name": "mlp"}, "no bert class with the demultiplexer 'mlp'"),
        (
            {"model__family": "roberta", "demux__name": "index", "objective": "mlm"},
            "no multiplexed roberta class for objective = 'mlm'",
        ),
        ({"model__pool": "mean"}, "no pooling like model.pool = 'mean'"),
        ({"model__tied_decoder": False}, "no bert class with tied_decoder = False"),
        ({"model__type_vocab_size": 0}, "no class without token types"),
    ],
)
def test_what_the_published_code_has_no_class_for_is_not_exported(changes, message):
    usual = {"demux__form": "bert", "model__pool": "first", "model__type_vocab_size": 2, "mux__attend_padding": True}
    with pytest.raises(InputError, match=message):
        hf_config.from_config(text_config(**(usual | changes)), vocab_size=300, positions=12, labels=("a", "b"), pad=0)


@pytest.mark.slow
def test_a_run_on_another_vocabulary_is_not_exported(tmp_path):
    usual = {
        "demux__form": "bert",
        "model__pool": "first",
        "model__type_vocab_size": 2,
        "retrieval_loss_coeff": 0.1,
        "mux__attend_padding": True,
    }
    train(text_config(steps=1, optimizer__warmup_steps=0, **usual), tmp_path / "run")
    with pytest.raises(InputError, match="uses other special tokens"):
        convert.export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_feature_runs_are_not_exported(digits_run, tmp_path):
    with pytest.raises(InputError, match="reads feature vectors"):
        convert.export_run(digits_run, tmp_path / "out")


def test_sources(tmp_path):
    with pytest.raises(InputError, match="neither a folder nor a name"):
        convert.find_source(str(tmp_path / "nothing" / "here"))
    assert convert.find_source(str(tmp_path)) == tmp_path


def test_hub_names_are_pinned(monkeypatch):
    class Hub:
        class HfApi:
            def model_info(self, name):
                return type("Info", (), {"sha": "a" * 40})()

        @staticmethod
        def snapshot_download(name, revision, allow_patterns):
            assert "model.safetensors" in allow_patterns
            return f"/cache/{name}/{revision}"

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.raises(InputError, match=f"--revision={'a' * 40}"):
        convert.find_source("princeton-nlp/muxbert", "main")
    assert str(convert.find_source("princeton-nlp/muxbert", "b" * 40)) == f"/cache/princeton-nlp/muxbert/{'b' * 40}"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install 'datamux_jax\[hub\]'"):
        convert.find_source("princeton-nlp/muxbert", "b" * 40)


def test_the_command(tmp_path):
    source, _, _ = golden_folder(tmp_path)
    done = run_command("convert", f"--source={source}", f"--workdir={tmp_path / 'run'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert "gaussian_hadamard" in done.stdout
    done = run_command("convert", f"--workdir={tmp_path / 'run'}", f"--to_hf={tmp_path / 'out'}")
    assert (done.returncode, done.stderr) == (0, "")
    again = run_command("convert", f"--source={source}", f"--workdir={tmp_path / 'out'}")
    assert_refused(again, "holds a run already")
    assert_refused(run_command("convert", f"--workdir={tmp_path / 'run'}"), "--source=DIR")


def test_half_precision_files_are_read(tmp_path):
    source, pair, _ = golden_folder(tmp_path)
    state = golden.fill(pair)
    import ml_dtypes

    save_file({key: value.astype(ml_dtypes.bfloat16) for key, value in state.items()}, source / "model.safetensors")
    for key, value in hf.read_state(source).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, state[key].astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize(("family", "name"), [("bert", "BertForMaskedLM"), ("electra", "ElectraForPreTraining")])
def test_published_baselines_are_plain_although_their_configs_carry_multiplexing_keys(tmp_path, family, name):
    description = published(family, name)
    config, _, _, params = network(description)
    carried = {
        "num_instances": 1,
        "muxing_variant": "gaussian_hadamard",
        "demuxing_variant": "index_pos",
        "gaussian_hadamard_norm": None,
    }
    source = write(tmp_path / "source", description | carried, hf.export_state(params, config))
    assert "plain" in convert.import_run(source, tmp_path / "run", common.get_config())
    chex.assert_trees_all_equal(load_run(tmp_path / "run").params, params)


def test_older_names_of_layer_norm_are_read(tmp_path):
    source, pair, _ = golden_folder(tmp_path)
    renamed = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in golden.fill(pair).items()
    }
    assert any(key.endswith("gamma") for key in renamed)
    hf.write_state(source / "model.safetensors", renamed)
    convert.import_run(source, tmp_path / "run", common.get_config())


def test_a_plain_classifier_of_another_kind_is_left_out_and_said_so(tmp_path):
    description = published("bert", "BertForSequenceClassification")
    config, _, _, params = network(description | {"architectures": ["BertForMaskedLM"]})
    state = {key: value for key, value in hf.export_state(params, config).items() if key.startswith("bert.")}
    state |= {
        "classifier.weight": np.ones((3, 12), "f"),
        "classifier.bias": np.ones(3, "f"),
        "bert.pooler.dense.bias": np.ones(12, "f"),
    }
    source = write(tmp_path / "source", description, state)
    message = convert.import_run(source, tmp_path / "run", common.get_config(), objective="classification")
    assert "Fresh, as the checkpoint has none: classifier/out/bias, classifier/out/kernel." in message
    assert "Left out, heads of something else: classifier.bias, classifier.weight." in message


def test_a_discriminator_becomes_a_classifier(tmp_path):
    source, _, _ = golden_folder(tmp_path, "muxelectra_rtd_gaussian_indexpos_n2")
    message = convert.import_run(source, tmp_path / "run", common.get_config(), objective="classification")
    assert "classifier/hidden/bias" in message
    assert "Left out, heads of something else: discriminator_predictions.dense.bias" in message


def test_a_folder_that_holds_a_run_is_left_alone(tmp_path):
    source, _, _ = golden_folder(tmp_path)
    convert.import_run(source, tmp_path / "run", common.get_config())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(InputError, match="holds a run already"):
        convert.import_run(source, tmp_path / "run", common.get_config())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_what_a_converted_run_is_not_for(tmp_path):
    source, _, _ = golden_folder(tmp_path)
    convert.import_run(source, tmp_path / "run", common.get_config())
    with pytest.raises(InputError, match="parameters but no training state"):
        train(text_config(5, resume=str(tmp_path / "run")), tmp_path / "next")
    assert not (tmp_path / "next").exists()
    with pytest.raises(InputError, match="does not read what its data source"):
        evaluate_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_demux_layers": 1}, "uses two layers for retrieval"),
        ({"num_instances": None}, "no key 'num_instances'"),
        ({"hidden_size": "x"}, "hidden_size = 'x', which is no whole number"),
        ({"num_attention_heads": 3}, "not divisible by model.num_heads = 3"),
    ],
)
def test_configs_are_checked_like_our_own(tmp_path, changes, message):
    source, pair, _ = golden_folder(tmp_path)
    (source / "config.json").write_text(json.dumps(golden.published_config(pair) | changes))
    with pytest.raises(InputError, match=message):
        convert.import_run(source, tmp_path / "run", common.get_config())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"demux__name": "index", "objective": "mlm"}, "demux.prefix = 'extend'"),
        ({"demux__name": "index", "demux__prefix": "cut"}, "demux.prefix = 'cut'"),
        (
            {"model__family": "electra", "mux__name": "gaussian_attention", "demux__form": "electra"},
            "no class MuxedElectraForSequenceClassification",
        ),
        (
            {"model__family": "electra", "mux__name": "random_ortho", "demux__form": "electra", "model__embedding_size": 8},
            "mixes at the hidden",
        ),
    ],
)
def test_classes_are_told_apart_on_export(changes, message):
    usual = {"demux__form": "bert", "model__pool": "first", "model__type_vocab_size": 2, "mux__attend_padding": True}
    with pytest.raises(InputError, match=message):
        hf_config.from_config(text_config(**(usual | changes)), vocab_size=300, positions=12, labels=("a", "b"), pad=0)
