"""BERT, RoBERTa and ELECTRA: what the published code fixes for each, beside sizes. Table `FAMILIES`.

All three share one encoder class; they differ in padding and position ids, in the token ids that multiplexing itself puts into a
row, in heads, and in whether the vocabulary decoder is tied to the word embeddings.
"""

from __future__ import annotations

import dataclasses

from datamux_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning to the network.

    Attributes:
      pad: padding; carries no retrieval loss in fine-tuning.
      cls: start of a sequence; what the rsa demultiplexer puts on position 0.
      sep: end of a sequence.
      mask: [MASK].
      mlp_first: what the mlp demultiplexer puts on position 0.
      filler: in the prefix of the index demultiplexer, everywhere but on an instance's own position.
      index: index token of instance 0; instance `i` has `index - i`.
      index_cls: the CLS-like token that ends the prefix.
    """

    pad: int
    cls: int
    sep: int
    mask: int
    mlp_first: int
    filler: int
    index: int
    index_cls: int


@dataclasses.dataclass(frozen=True)
class Family:
    """One family's conventions, as the published code has them.

    Attributes:
      prefix: of its encoder's names in published checkpoints.
      layer_norm_eps: of every LayerNorm.
      type_vocab_size: token types, of which type 0 is used.
      positions_from_pads: RoBERTa's position ids: they count real tokens from `pad + 1`, and a pad gets `pad` itself.
      tied_decoder: the vocabulary decoder is the word embedding table.
      vocab_size: of the published vocabulary.
      max_positions: rows of the published position table.
    """

    prefix: str
    layer_norm_eps: float
    type_vocab_size: int
    positions_from_pads: bool
    tied_decoder: bool
    vocab_size: int
    max_positions: int


FAMILIES = {
    "bert": Family("bert", 1e-12, 2, False, True, 30522, 512),
    "roberta": Family("roberta", 1e-5, 1, True, False, 50265, 514),
    "electra": Family("electra", 1e-12, 2, False, False, 30522, 512),
}


def published_tokens(family: str, vocab_size: int, num_instances: int = 1, *, demux: str = "none") -> SpecialTokens:
    """Special ids in a published vocabulary of `family`.

    Args:
      family: key of `FAMILIES`.
      vocab_size: `V`; RoBERTa's index tokens are counted down from its end.
      num_instances: `N`.
      demux: key of `DEMUX`; what it puts into rows must exist.

    Raises:
      InputError: the vocabulary lacks a token that the demultiplexer puts into rows.
    """
    if family == "roberta":
        tokens = SpecialTokens(
            pad=1, cls=0, sep=2, mask=50264, mlp_first=49923, filler=50000, index=vocab_size - 2, index_cls=49923
        )
    else:
        tokens = SpecialTokens(pad=0, cls=101, sep=102, mask=103, mlp_first=101, filler=680, index=678, index_cls=101)
    index = (tokens.filler, tokens.index, tokens.index - num_instances + 1, tokens.index_cls)
    fed = {"index": index, "rsa": (tokens.cls,), "mlp": (tokens.mlp_first,), "none": ()}[demux]
    wrong = [token for token in fed if not 0 <= token < vocab_size]
    if wrong:
        ids = ", ".join(map(str, sorted(set(fed))))
        raise InputError(
            f"demux.name = {demux!r} of family {family!r} feeds the token ids {ids} (num_instances = {num_instances}), but the "
            f"vocabulary has {vocab_size}. Use the family's published vocabulary, or fewer instances."
        )
    return tokens


@dataclasses.dataclass(frozen=True)
class HeadForm:
    """Layers of a classification head: dropout, optionally a hidden layer (gelu, optionally LayerNorm, dropout), output layer."""

    hidden: bool = False
    norm: bool = False
    dropout: bool = True


def head_form(family: str, demux: str, level: str) -> HeadForm:
    """The classification head that the published code puts on demultiplexed states.

    Args:
      family: key of `FAMILIES`.
      demux: key of `DEMUX`.
      level: `sequence` or `token`.
    """
    if family == "electra":
        return HeadForm(hidden=level == "sequence")
    if family == "roberta" and demux != "none":  # DataMUX. No dropout in its heads.
        return HeadForm(hidden=level == "sequence" or demux == "mlp", norm=demux == "mlp", dropout=False)
    return HeadForm()


def retrieval_start(family: str, demux: str, level: str) -> int:
    """First position of a row that carries the retrieval loss, index prefix aside.

    Position 0 counts, although the token there is always the same, but for DataMUX's mlp demultiplexer and MUX-ELECTRA in sequence
    classification.
    """
    return int(level == "sequence" and (family == "electra" or (family == "roberta" and demux == "mlp")))
