"""Labelled grey images: MNIST, and what else comes in its format, from idx files or TensorFlow Datasets; and their sizes."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from datamux_jax.data import tfds_tasks, tfds_text
from datamux_jax.data.examples import TEST, TRAIN, VALIDATION, Examples, Files, Source
from datamux_jax.errors import InputError, brief

SIZES = ("validation_examples", "image_size")  # Keys that every source of images reads.
KEYS = ("path", "name", *SIZES)
MNIST = "mnist"
# Of each split the beginnings of the names of its files of images and labels.
IDX_FILES = {TRAIN: ("train-images", "train-labels"), TEST: ("t10k-images", "t10k-labels")}
IDX_ENDINGS = ("ubyte", "ubyte.gz")
UNSIGNED_BYTES = 8  # Type code of idx.


def find(data: Any) -> Files:
    """The idx files that `config.data` names: the images and the labels of each split; none for TensorFlow Datasets.

    Args:
      data: `config.data`; reads `path`: a folder with the four idx files, or the data_dir of TensorFlow Datasets ("": the default one),
        and `name`, the data set there ("": mnist).

    Raises:
      InputError: no such folder, or not all four files.
    """
    if tfds_tasks.prepared_in(data.name or MNIST, data.path):
        return {}
    folder = Path(data.path).expanduser()
    files = {split: tuple(_idx_file(folder, start) for start in starts) for split, starts in IDX_FILES.items()}
    missing = [
        start for split, starts in IDX_FILES.items() for start, file in zip(starts, files[split], strict=True) if file is None
    ]
    if missing:
        problem = f"has no file {' and no file '.join(_idx_names(start)[0] for start in missing)} in it"
        raise InputError(
            f"data.path = {data.path!r} {problem if folder.is_dir() else 'is no folder'}. Name a folder with the four files of MNIST "
            f"({', '.join(_idx_names(start)[0] for starts in IDX_FILES.values() for start in starts)}; each may end in .gz), or the "
            f"data_dir in which TensorFlow Datasets has {data.name or MNIST} prepared."
        )
    if data.name:
        raise InputError(
            f"data.name = {data.name!r} names a data set of TensorFlow Datasets, but data.path = {data.path!r} holds idx files. Leave "
            "one of them empty."
        )
    return {split: tuple(file for file in each if file is not None) for split, each in files.items()}


def _idx_names(start: str) -> list[str]:
    """What the file may be called, the usual name first."""
    dimensions = 3 if start.endswith("images") else 1
    return [f"{start}{between}idx{dimensions}-{ending}" for ending in IDX_ENDINGS for between in "-."]


def _idx_file(folder: Path, start: str) -> Path | None:
    return next((folder / name for name in _idx_names(start) if (folder / name).is_file()), None)


def read(data: Any, files: Files) -> Source:
    """The splits, pixels between 0 and 1; the last `data.validation_examples` training images are `validation`, if that is not 0.

    Raises:
      InputError: a damaged file, files that do not belong together, or a prepared data set that cannot be read.
    """
    of_files = {split: _of_idx(*paths) for split, paths in files.items()}
    raw = of_files or _of_tfds(data.name or MNIST, data.path)
    classes = 1 + max(int(labels.max()) for _, labels in raw.values())
    splits = {
        split: Examples((images / 255).astype(np.float32), labels.astype(np.int32)) for split, (images, labels) in raw.items()
    }
    return Source(held_out(splits, data.validation_examples), tuple(str(label) for label in range(classes)))


def held_out(splits: Mapping[str, Examples], count: int) -> dict[str, Examples]:
    """The last `count` training examples as the split `validation`; all splits as they are for 0.

    Raises:
      InputError: there are not so many.
    """
    if not count:
        return dict(splits)
    train = splits[TRAIN]
    if count >= len(train):
        raise InputError(
            f"data.validation_examples = {count:,} holds out as many images as there are or more: {len(train):,} to train on. Lower it."
        )
    parts = {TRAIN: slice(0, -count), VALIDATION: slice(-count, None)}
    assert isinstance(train.inputs, np.ndarray), "images"
    return {**splits, **{split: Examples(train.inputs[part], train.labels[part]) for split, part in parts.items()}}


def _of_idx(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(numbers) or not len(pixels):
        raise InputError(
            f"{images} has {len(pixels):,} images, but {labels} has {len(numbers):,} labels. Take both from the same data set, whole."
        )
    return pixels, numbers


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes in an idx file: big-endian magic number `0, 0, type, dimensions`, sizes, values.

    Args:
      path: the file; read with gzip if its name ends in .gz.
      dimensions: that the array must have.

    Raises:
      InputError: the file cannot be read, is no such idx file, or is shorter or longer than its sizes say.
    """
    again = "Download or copy it anew."
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {brief(error)} {again}") from error
    magic, header = bytes((0, 0, UNSIGNED_BYTES, dimensions)), 4 + 4 * dimensions
    if content[:4] != magic or len(content) < header:
        raise InputError(
            f"{path} is no idx file with {dimensions} dimension{'s' if dimensions > 1 else ''} of bytes: it starts with "
            f"{list(content[:4])} in place of {list(magic)}, or ends within its header. {again}"
        )
    shape = np.frombuffer(content, ">u4", dimensions, 4).tolist()
    if len(content) != header + math.prod(shape):
        raise InputError(
            f"{path} says that it holds {' x '.join(map(str, shape))} bytes, but {len(content) - header:,} follow its header. {again}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _of_tfds(name: str, folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Grey images and labels of the splits `train` and `test` of TensorFlow Datasets."""
    builder = tfds_text.open_builder(name, folder)
    features = builder.info.features
    if "label" not in features or "image" not in features or features["image"].shape[2:] != (1,):
        raise InputError(
            f"data.name = {name!r} has no grey images with labels; its features are {', '.join(features)}. Name a data "
            "set like mnist, fashion_mnist, kmnist or emnist."
        )
    raw = {}
    for split in (TRAIN, TEST):
        found = list(tfds_tasks.each_record(builder, split))
        raw[split] = np.stack([np.asarray(one["image"])[..., 0] for one in found]), np.array([one["label"] for one in found])
    return raw


def fitted(images: np.ndarray, size: int) -> np.ndarray:
    """Square images `[n, H, W]` brought to `size` x `size`: cut about the middle where larger, enlarged where smaller.

    Enlarging interpolates linearly between the centres of pixels.
    """
    for axis in (1, 2):
        length = images.shape[axis]
        if length > size:
            start = (length - size) // 2
            images = images.take(range(start, start + size), axis)
        elif length < size:
            images = np.moveaxis(np.tensordot(images, _enlarging(length, size), (axis, 1)), -1, axis)
    return images


def _enlarging(length: int, size: int) -> np.ndarray:
    """`[size, length]`: what each new pixel takes from the old ones."""
    centre = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(length))).astype(np.float32)
