"""Texts to fixed-length rows of token ids. Table `TOKENIZERS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from datamux_jax.families import SpecialTokens


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes after four special tokens: no vocabulary to train, nothing out of vocabulary.

    A row is `[CLS] byte byte ...`, cut or padded to the length asked for.
    """

    pad_id: int = 0
    cls_id: int = 1
    sep_id: int = 2
    mask_id: int = 3
    first_byte_id: int = 4

    @property
    def vocab_size(self) -> int:
        return self.first_byte_id + 256

    def special_tokens(self, num_instances: int) -> tuple[SpecialTokens, int]:
        """The special ids, and the vocabulary size with room for the prefix of the index demultiplexer behind the bytes.

        The size is rounded up to a multiple of 8, so that the table divides over the axes of usual meshes.
        """
        filler = self.vocab_size
        tokens = SpecialTokens(
            pad=self.pad_id, cls=self.cls_id, sep=self.sep_id, mask=self.mask_id, mlp_first=self.cls_id,
            filler=filler, index=filler + num_instances, index_cls=self.cls_id,
        )  # fmt: skip
        return tokens, -(-(filler + 1 + num_instances) // 8) * 8

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask, both `[n, length]` int32; the mask is 1 at real tokens, `[CLS]` included."""
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        sizes = np.empty(len(texts), np.int32)
        for row, text in enumerate(texts):
            codes = np.frombuffer(text.encode("utf-8", "replace")[: length - 1], np.uint8)
            ids[row, 0] = self.cls_id
            ids[row, 1 : 1 + len(codes)] = codes.astype(np.int32) + self.first_byte_id
            sizes[row] = 1 + len(codes)
        return ids, (np.arange(length) < sizes[:, None]).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text behind token ids, specials left out; bytes that are not UTF-8 become U+FFFD."""
        codes = [int(i) - self.first_byte_id for i in ids if 0 <= int(i) - self.first_byte_id < 256]
        return bytes(codes).decode("utf-8", "replace")


TOKENIZERS = {"bytes": ByteTokenizer}
