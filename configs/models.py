"""Published model sizes: name -> the keys of `config.model` in which it differs from the base config.

Sources: BERT small, ELECTRA and RoBERTa small and large as in the configs of the MUX-PLMs code (small BERT: Turc et al. 2019); BERT
base and large: Devlin et al. 2018; RoBERTa base: Liu et al. 2019, also DataMUX; ELECTRA: Clark et al. 2020 with the large
embedding of base and large. Counts of parameters: `tests/sizes_test.py`.
"""

from datamux_jax.families import FAMILIES


def size(family: str, layers: int, hidden: int, heads: int, mlp: int, embedding: int = 0) -> dict:
    """The keys of one size of a family."""
    known = FAMILIES[family]
    return {
        "family": family,
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "mlp_dim": mlp,
        "embedding_size": embedding,
        "max_positions": known.max_positions,
        "type_vocab_size": known.type_vocab_size,
        "layer_norm_eps": known.layer_norm_eps,
        "tied_decoder": known.tied_decoder,
        "dropout_rate": 0.1,
        "attention_dropout_rate": 0.1,
        "init_stddev": 0.02,
        "pool": "first",
    }


SIZES = {
    "bert_small": size("bert", 4, 512, 8, 2048),
    "bert_base": size("bert", 12, 768, 12, 3072),
    "bert_large": size("bert", 24, 1024, 16, 4096),
    "roberta_small": size("roberta", 4, 512, 8, 3072),
    "roberta_base": size("roberta", 12, 768, 12, 3072),
    "roberta_large": size("roberta", 24, 1024, 16, 4096),
    "electra_small": size("electra", 12, 256, 4, 1024, embedding=128),
    "electra_base": size("electra", 12, 768, 12, 3072),
    "electra_large": size("electra", 24, 1024, 16, 4096),
}
