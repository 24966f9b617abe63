"""MUX-BERT pre-training: token retrieval, then masked language modelling (MUX-PLMs, section 3.3).

    python -m launch.train --config=configs/muxbert.py:base,n=5,tfds=wikipedia/20230601.en --workdir=runs/muxbert

Learning rate (1e-4, linear, 10,000 steps of warm-up), AdamW and 512 tokens are those of the published code, which has 128 groups a step
and does not say how long its two stages were. Arguments:

    base            a size, first and without a name: small, base, large or LAYERSxWIDTH, the width a multiple of 64
    n=1+2+5         numbers of instances; 1 is the plain network
    files=          a file, folder or pattern of text; or tfds= a data set of TensorFlow Datasets
    init=           weights that the first stage starts from (retrieval=0: pre-training itself), with their sizes and tokenizer: the
                    folder of a run or of a published encoder, or minilm
    tokenizer=      wordpiece (default) or bpe, trained on the text; bytes; or a file or folder with one
    vocab=          size of a trained vocabulary
    length=         tokens of a chunk
    groups=         mixed rows a step
    retrieval=      steps of the first stage
    steps=          of the second
    stage=          retrieval or pretraining alone; both by default
    rate=           learning rate
    dropout=        of activations and of attention
    family=roberta  RoBERTa's conventions

Fine-tuning starts from `RUN/nN` with `init_from`, and `data.tokenizer` naming the same folder.
"""

from configs import pretraining
from datamux_jax.errors import InputError


def get_config(arg=None):
    family = "roberta" if "family=roberta" in (arg or "").split(",") else "bert"
    c, arg = pretraining.base(arg, family, **pretraining.STAGES, family="bert")
    if arg.family != family:
        raise InputError(
            f"family={arg.family!r} does not exist here. Choose bert or roberta; configs/muxelectra.py is for ELECTRA."
        )
    if arg.init:
        pretraining.check_family(c, arg, ("roberta",) if family == "roberta" else ("bert", "roberta"))
    c.title = f"MUX-{c.model.family.upper()}: retrieval, then masked language modelling"
    pretraining.stages(c, arg, {"objective": "mlm", "task_loss_coeff": 1.0, "retrieval_loss_coeff": 0.0})
    return c
