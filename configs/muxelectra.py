"""MUX-ELECTRA pre-training: token retrieval, then replaced-token detection (MUX-PLMs, section 3.3).

    python -m launch.train --config=configs/muxelectra.py:base,n=5,tfds=wikipedia/20230601.en --workdir=runs/muxelectra

Arguments as in `configs/muxbert.py`, and `generator=` uniform (random tokens, the released default), plain or muxed. A learned
generator is a quarter as wide as the discriminator, as in ELECTRA. The loss is that of the published code: generator, plus 50 times
(0.9 replaced-token detection + 0.1 retrieval).
"""

from configs import pretraining


def get_config(arg=None):
    c, arg = pretraining.base(arg, "electra", **pretraining.STAGES, generator="uniform")
    if arg.init:
        pretraining.check_family(c, arg, ("electra",))
    c.title = "MUX-ELECTRA: retrieval, then replaced-token detection"
    c.generator.kind = arg.generator
    c.generator.num_layers = c.model.num_layers
    c.generator.hidden_size = max(c.model.hidden_size // 4, 64)
    c.generator.num_heads = max(c.generator.hidden_size // 64, 1)
    c.generator.mlp_dim = 4 * c.generator.hidden_size
    coefficients = {"task_loss_coeff": 0.9, "retrieval_loss_coeff": 0.1}
    c.generator.embedding_size = c.model.embedding_size or c.model.hidden_size
    pretraining.stages(c, arg, {"objective": "electra"} | coefficients)
    for name in c.runs:
        if name == "n1":  # A plain network retrieves nothing, and has no multiplexer for a muxed generator.
            c.overrides[name].retrieval_loss_coeff = 0.0
            with c.unlocked():
                c.overrides[name].generator = {"kind": "plain" if arg.generator == "muxed" else arg.generator}
    return c
