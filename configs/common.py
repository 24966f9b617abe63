"""The base config: every key there is, with its default and its meaning. Experiments override; nothing may be added.

A config file defines `get_config(arg=None)`, where `arg` is what follows the colon in `--config=configs/langid.py:n=1+2,steps=500`.
Single keys are overridden on the command line: `--config.steps=100 --config.optimizer.learning_rate=3e-4`. Such a flag holds for
every run of the experiment, also where the config file sets the key for one run alone.
"""

import ml_collections

from datamux_jax.errors import InputError


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The defaults: the plain Transformer on the digits."""
    parse_arg(arg)
    c = ml_collections.ConfigDict()

    # What is run. An experiment is a list of runs, each with a folder of its own; no runs: one run, in the workdir itself.
    c.runs = ()  # Names of the runs, in order.
    c.overrides = ml_collections.ConfigDict()  # Name of a run -> nested dict of the keys in which it differs.
    c.title = ""  # Heading of the report.
    c.baseline = ""  # Plain reference to measure beside the runs: "char_tfidf", or "" for none.

    # Training.
    c.seed = 0  # Of initialisation, data order, dropout and everything else that is drawn.
    # "classification", "regression" or "tagging"; "retrieval", the token-retrieval warm-up; "states", the hidden states of the plain
    # network distill.teacher as a warm-up; "mlm" or "electra", pre-training.
    c.objective = "classification"
    # "classification": "cross_entropy"; or "squared", DataMUX's loss for images: targets +-1 for tanh of the logits.
    c.task_loss = "cross_entropy"
    c.num_instances = 1  # N, instances mixed into one row.
    c.batch_groups = 64  # B, mixed rows a step, all devices together; B * N examples a step.
    c.steps = 2000  # Updates in all.
    c.task_loss_coeff = (
        1.0  # Weight of the task loss (MLM, replaced-token detection and states too), in all objectives but "retrieval".
    )
    c.retrieval_loss_coeff = 0.0  # Weight of token retrieval beside it (text only; DataMUX: 0.9 and 0.1).
    c.retrieval_percentage = 1.0  # Share of positions that carry the retrieval loss.
    c.mask_rate = 0.15  # Share of the tokens that MLM and ELECTRA ask for.
    c.generator_loss_coeff = 1.0  # ELECTRA: weight of the generator's loss,
    c.discriminator_loss_coeff = 50.0  # and of the discriminator's.
    c.dtype = "float32"  # Of the computation, or "bfloat16"; parameters and optimizer are always float32.
    c.accumulation = 1  # Micro-batches that a batch is computed in; the update is that of the whole batch (dropout aside).
    # What a block keeps for the backward pass: "none" computes nothing again, "dots" all but products with parameters, "full" all.
    c.remat = "none"
    # MiB of vocabulary logits and their gradient, in float32, that a device holds at a time. More are computed in pieces, each of them
    # again for the backward pass.
    c.logits_mib = 2048
    # "xla", or "cudnn": cuDNN's fused attention, which never writes the scores, on NVIDIA GPUs with dtype "bfloat16" and no dropout on
    # attention weights.
    c.attention = "xla"
    # Compile one encoder block instead of num_layers. Costs a copy of the encoder's parameters a step, and what a block keeps for the
    # backward pass is written to memory: docs/plans.md has an example.
    c.scan_layers = False
    c.resume = ""  # Folder of a run whose whole state (optimizer and data position too) a new run continues.
    c.init_from = ""  # Folder of a run whose parameters a new run starts from; relative to the workdir first.
    c.log_every = 50  # Steps between lines in metrics.jsonl.
    c.tensorboard = True  # Write the same numbers for TensorBoard, into the run's folder.
    c.wandb = ""  # Project on Weights & Biases to write them to, with the extra `wandb`; "": none.

    # Learning from another network: its outputs beside the labels (datamux_jax/distill.py), or its hidden states (teacher.py).
    c.distill = ml_collections.ConfigDict()
    # Folder of a run that was trained on the same task, as a rule with N = 1; relative to the workdir first; "": none. Of "states": a
    # plain network of the same sizes and tokenizer, a run, the folder of a published encoder, or "minilm".
    c.distill.teacher = ""
    c.distill.layers = 1.0  # "states": weight of the layers below the last one.
    c.distill.weight = 0.5  # Share w of the task loss that the teacher gives: (1 - w) * labels + w * teacher.
    c.distill.temperature = 2.0  # T by which logits are divided; regression has none.

    c.data = ml_collections.ConfigDict()
    # Examples with labels (datamux_jax/data/sources.py): "digits"; "mnist", or what comes in its format; "cldr",
    # language identification; "glue"; "tagging"; "table", columns of a TSV, CSV, JSON lines or Parquet file.
    # Running text for pre-training (datamux_jax/data/corpus.py): "files" or "tfds".
    c.data.source = "digits"
    # "glue", "tagging" and "mnist": a folder with the data set's files, or the data_dir of TensorFlow Datasets, or "" for its default
    # one; "tfds": that too. "files": a file, a folder or a pattern (books/*.txt).
    c.data.path = ""
    # "glue": the task (datamux_jax/data/glue.py); "tagging": "ewt" or "conll2003", or "" for other files; "mnist":
    # the data set of TensorFlow Datasets, "" for mnist; "tfds": the data set, such as
    # "wikipedia/20230601.en", "wiki40b/en", "lm1b" or "c4/en".
    c.data.name = ""
    c.data.train_file = ""  # "table" and "tagging": the file of the split "train",
    c.data.validation_file = ""  # of "validation"; "table" without one: a validation_share of the training rows is held out;
    c.data.test_file = ""  # and of "test".
    # "table": "tsv", "csv", "jsonl" or "parquet"; "tagging": "conll", columns between spaces, or "conllu"; "": by the file's ending.
    c.data.format = ""
    # "table", TSV and CSV: the first row names the columns; False: their names are their numbers, from "1".
    c.data.header = True
    # "table": the column of the texts; "tagging", CoNLL: the number of the column of the words, "" for the first.
    c.data.text = ""
    c.data.text_pair = ""  # "table": the column of second texts; "": there are none.
    # "table": the column of the labels; "tagging": the number of their column, "" for the last; in CoNLL-U "upos" (also "") or "xpos".
    c.data.label = ""
    c.data.validation_examples = 0  # "digits" and "mnist": the last so many training images are the split "validation".
    # "digits" and "mnist": pixels of a side; larger images are cut about the middle, smaller ones enlarged. 0: as they are. Rows of
    # pixels are positions of the encoder.
    c.data.image_size = 0
    c.data.numbers = False  # "table": labels are numbers, for regression, and not classes.
    c.data.text_key = "text"  # "tfds": the feature that holds the text.
    c.data.document = "paragraph"  # "files": what a document is; paragraphs end at an empty line. Or "line", or "file".
    c.data.train_split = "train"
    # Running text: split to score, where the source has one; "": every k-th document is held out, as split "validation".
    c.data.validation_split = ""
    c.data.validation_share = 0.01  # Share of the documents, or of the rows of a "table", that is held out then.
    # "bytes"; "wordpiece" or "bpe", trained on the running text; "minilm", of the installed package; or a tokenizer.json, a vocab.txt,
    # or a folder with one (a run, too).
    c.data.tokenizer = "bytes"
    c.data.vocab_size = 8192  # Of a tokenizer that is trained.
    c.data.lowercase = True  # Of a tokenizer that is trained.
    # L, positions of an example, special tokens included. Of a longer text the end is cut off, of a pair the end of whichever is
    # longer; words that are cut off are not tagged. 0: the source's own (feature sources only).
    c.data.length = 0
    # Texts of similar length are trained on together, and evaluated so, in batches cut to the smallest of the lengths 16, 32, ... L
    # that holds them: less padding to compute, one compilation each. Prediction does so anyway. False: all lengths are mixed, in rows
    # of L.
    c.data.buckets = False
    c.data.cache = ""  # Folder of tokenised running text; "": $DATAMUX_CACHE, else ~/.cache/datamux_jax.

    c.model = ml_collections.ConfigDict()
    # "encoder", the Transformer; or for images "lenet" or "mlp" (datamux_jax/backbones/vision.py). Of this section "mlp" reads
    # hidden_size and num_layers, "lenet" nothing.
    c.model.backbone = "encoder"
    # "bert", "roberta" or "electra": positions, special tokens and heads (datamux_jax/families.py). configs/models.py has the sizes.
    c.model.family = "bert"
    c.model.hidden_size = 128  # D
    c.model.num_layers = 3
    c.model.num_heads = 4
    c.model.mlp_dim = 512
    c.model.embedding_size = 0  # E, the width at which instances are mixed; 0: D.
    c.model.max_positions = 0  # Rows of the position table; 0: as many as the data need.
    c.model.tied_decoder = True  # The vocabulary decoder is the word embedding table; BERT: True, RoBERTa and ELECTRA: False.
    c.model.type_vocab_size = 0  # Token types (BERT: 2, of which type 0 is used).
    c.model.dropout_rate = 0.0
    c.model.attention_dropout_rate = 0.0
    c.model.layer_norm_eps = 1e-6
    c.model.init_stddev = 0.0  # Of kernels and tables (BERT: 0.02); 0: Glorot-normal kernels, tables 0.02.
    c.model.pool = "mean"  # What classification reads: "first", "mean" or "demuxed_mean" (datamux_jax/model.py).

    c.mux = ml_collections.ConfigDict()
    # Or "gaussian_hadamard", "binary_hadamard", "random_ortho", "random_ortho_low_rank", "contextual", "gaussian_attention". For
    # "lenet" and "mlp": the first four, on the whole image, or "gaussian", "learnable", "identity", "graded", "orthogonal",
    # "learnable_matrix", "nonlinear", "nonlinear_expand", "rotation", "remap" (datamux_jax/image_mixing.py).
    c.mux.name = "none"
    c.mux.norm = 0.0  # L2 norm of the instance vectors; 0: sqrt(E), unit variance. Published code: 1, in warm-up 20.
    c.mux.epsilon = 0.0  # Overlap of neighbouring chunks of "binary_hadamard", in chunks.
    c.mux.learned = False  # Train the multiplexer's own parameters.
    c.mux.attend_padding = False  # Attention sees positions where all instances are padding; published networks: True.

    c.demux = ml_collections.ConfigDict()
    c.demux.name = "none"  # Or "rsa", "index", "mlp"; for "lenet" and "mlp": "mlp", layers of each instance's own, or "rsa".
    c.demux.num_layers = 2  # K of "rsa", dense layers before the last one.
    c.demux.form = "paper"  # Of "rsa": LayerNorm after every layer; "bert" or "electra": as the published code of that family.
    c.demux.prefix = "extend"  # Of "index": the prefix makes rows longer; "cut": it takes the place of the last tokens.

    c.generator = ml_collections.ConfigDict()  # ELECTRA's generator.
    c.generator.kind = "uniform"  # Random tokens; or a learned one, "plain" or "muxed".
    c.generator.hidden_size = 64
    c.generator.num_layers = 3
    c.generator.num_heads = 2
    c.generator.mlp_dim = 256
    c.generator.embedding_size = 0  # 0: that of the model. Equal sizes share the embeddings.

    c.optimizer = ml_collections.ConfigDict()
    # Or "published": AdamW as the published code has it, epsilon beside the uncorrected moment; or "sgd".
    c.optimizer.update_rule = "adamw"
    c.optimizer.learning_rate = 1e-3  # Peak.
    c.optimizer.schedule = "cosine"  # After the warm-up: "constant", "linear" or "cosine", down to 0 at the last step.
    c.optimizer.warmup_steps = 100
    c.optimizer.momentum = 0.0  # Of "sgd".
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.01  # Not on biases and LayerNorm.
    c.optimizer.grad_clip = 1.0  # Largest global gradient norm; 0: no clipping.

    c.mesh = ml_collections.ConfigDict()  # Devices along each axis; -1 for one of them: all that are left.
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = 500  # Steps; the last step is always saved.
    c.checkpoint.keep = 2  # Newest checkpoints that stay.
    c.checkpoint.keep_best = (
        0  # Best ones that stay besides; if not 0, the best is what evaluation, prediction and init_from use.
    )
    # What is best, a metric of the evaluations ("matthews", where the data are scored so): the lowest loss or error, the highest
    # of anything else.
    c.checkpoint.best = "loss"

    c.eval = ml_collections.ConfigDict()
    c.eval.split = "test"  # Of running text: "validation".
    c.eval.every = 0  # Steps between evaluations during training, in one grouping; 0: none. A checkpoint is saved at each.
    c.eval.examples = 0  # Of the split, scored in training and after it: the first ones; 0: all. Of running text: chunks.
    c.eval.groupings = 5  # Random groupings; who is mixed with whom changes predictions.
    c.eval.every_slot = False  # Score every example in every slot of its group; costs N times as much.
    c.eval.batch_groups = 64  # Groups a batch, also in prediction and in the benchmark.

    c.benchmark = ml_collections.ConfigDict()
    c.benchmark.windows = 15  # Timed windows a run, interleaved between the runs.
    c.benchmark.seconds = 0.3  # Length of a window.
    return c.lock()


def parse_arg(arg: str | None, **defaults):
    """Reads `n=2,steps=500` against typed defaults; a tuple of numbers is written `1+2+4`, none of them as nothing.

    Args:
      arg: the text after the colon of `--config=FILE:arg`, or None.
      **defaults: the arguments that the config file knows.

    Returns:
      A namespace with the defaults, overridden.

    Raises:
      InputError: an unknown argument, or a value of the wrong type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, equals, text = part.partition("=")
        if name not in defaults or not equals:
            known = ", ".join(f"{key}={_written(value)}" for key, value in defaults.items()) or "none"
            raise InputError(
                f"The config argument {part!r} does not exist, or has no value. Known arguments, with their defaults: {known}."
            )
        default = defaults[name]
        try:
            if isinstance(default, tuple):
                values[name] = tuple(type(default[0])(item) for item in text.split("+") if item)
            elif isinstance(default, bool):
                values[name] = {"true": True, "false": False}[text.lower()]
            else:
                values[name] = type(default)(text)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"The config argument {name}={text!r} cannot be read. Write it like its default, {name}={_written(default)}."
            ) from error
    return ml_collections.ConfigDict(values)


def instances(n: int) -> dict:
    """The keys that make a network of `n` instances."""
    mixed = n != 1
    return {
        "num_instances": n,
        "mux": {"name": "gaussian_hadamard" if mixed else "none"},
        "demux": {"name": "rsa" if mixed else "none"},
    }


def set_runs(config: ml_collections.ConfigDict, overrides: dict[str, dict]) -> None:
    """Makes `config` an experiment of the given runs: name -> nested dict of the keys in which the run differs."""
    if not overrides:
        raise InputError("The config arguments leave no run to do. Name at least one number of instances, for instance n=2.")
    config.runs = tuple(overrides)
    with config.unlocked():
        config.overrides = ml_collections.ConfigDict(overrides)


def _written(value) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
