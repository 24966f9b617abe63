"""The table of published sizes: exact parameter counts."""

import jax
import pytest

from configs import common, models
from datamux_jax.build import build, count_params, init_params
from datamux_jax.families import FAMILIES, published_tokens

# Parameters of the encoder, embeddings included, pooler not, as counted from the modules of transformers 5.23 (`BertModel` and its
# relatives, `add_pooling_layer=False`).
ENCODER = {
    "bert_small": 28_500_992,
    "bert_base": 108_891_648,
    "bert_large": 334_092_288,
    "roberta_small": 42_808_320,
    "roberta_base": 124_055_040,
    "roberta_large": 354_310_144,
    "electra_small": 13_483_008,
    "electra_base": 108_891_648,
    "electra_large": 334_092_288,
}


def abstract(name, n=1, **changes):
    config = common.get_config()
    config.model.update(models.SIZES[name])
    config.num_instances = n
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    size = FAMILIES[config.model.family].vocab_size
    tokens = published_tokens(config.model.family, size, n)
    model = build(config, num_classes=2, vocab_size=size, max_length=128, tokens=tokens)
    return jax.eval_shape(lambda key: init_params(model, key, (1, n, 128), "int32"), jax.random.key(0))


def test_every_size_is_counted():
    assert set(models.SIZES) == set(ENCODER)


@pytest.mark.parametrize("name", ENCODER)
def test_encoders_have_exactly_the_published_number_of_parameters(name):
    params = abstract(name)
    assert count_params({key: params[key] for key in ("embeddings", "backbone")}) == ENCODER[name]


@pytest.mark.parametrize("name", ENCODER)
def test_multiplexing_adds_exactly_keys_vectors_and_dense_layers(name):
    n, layers = 5, 3
    mixed = {"mux__name": "gaussian_hadamard", "demux__name": "rsa", "demux__num_layers": layers, "objective": "mlm"}
    params = abstract(name, n, **mixed)
    m = models.SIZES[name]
    d, e = m["hidden_size"], m["embedding_size"] or m["hidden_size"]
    vocab = FAMILIES[m["family"]].vocab_size
    square, norm = d * d + d, 2 * d
    demux = n * d + (square + d * d) + (layers - 1) * square + layers * norm + 2 * (square + norm)
    decoder = vocab + (0 if m["tied_decoder"] else d * vocab)
    assert count_params(params["mux"]) == n * e
    assert count_params(params["demux"]) == demux
    assert count_params(params) == ENCODER[name] + n * e + demux + decoder
