"""What a user would pick instead of multiplexing: a smaller network, Hugging Face BERT in PyTorch, or ONNX Runtime.

They compute what our plain network computes, with its weights, on the same token batches and with as many threads; `agreement` holds
that against the numbers. Packages come with `pip install 'datamux_jax[bench]'` and are imported where they are used.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from datamux_jax import benchmark_inputs, contender_models
from datamux_jax.backbones.vision import VISION
from datamux_jax.benchmark_networks import SMALL, Entry, Network, Timed, seconds_of, smaller
from datamux_jax.config import with_instances
from datamux_jax.errors import InputError, choose
from datamux_jax.inference import OBJECTIVES

TORCH, ONNX = ("torch", "transformers"), ("torch", "transformers", "onnx", "onnxscript", "onnxruntime")
# Name -> what must be installed, and what it is.
OTHERS = {
    "torch": (TORCH, "Hugging Face BERT in PyTorch, eager mode, float32"),
    "torch-bf16": (TORCH, "Hugging Face BERT in PyTorch, eager mode, bfloat16"),
    "onnx": (ONNX, "Hugging Face BERT in ONNX Runtime, float32"),
    "onnx-int8": (ONNX, "Hugging Face BERT in ONNX Runtime, int8 weights and dynamic quantisation"),
}
OURS = ("plain", *SMALL)
TOLERANCE = 1e-3  # Of float32 logits of equal weights, beside 1.


def entries(names: Sequence[str], config: Any, step: str) -> list[Entry]:
    """The contenders that the flag names, checked.

    Args:
      names: `plain`, `narrow` or `shallow`, as they are or with numbers of instances (`narrow:1+2+5`), and keys of `OTHERS`.
      config: of the network that they are compared with; mux, demux and task are its.
      step: "predict" or "train".

    Raises:
      InputError: an unknown name, a package that is missing, or a network that the contender cannot be.
    """
    found = []
    for name in names:
        kind, _, numbers = name.partition(":")
        choose((*OURS, *OTHERS), kind, "The contender --contenders =")
        if kind in OTHERS:
            _check(name, config, step)
            found.append(Entry(kind, kind, with_instances(config, 1)))
            continue
        if not all(re.fullmatch("[0-9]+", part) and int(part) for part in (numbers or "1").split("+")):
            raise InputError(f"--contenders={name}: {numbers!r} are no numbers of instances. Write them as in {kind}:1+2+5.")
        sized = config if kind == "plain" else smaller(config, kind)
        for n in map(int, (numbers or "1").split("+")):
            label = kind if n == 1 else f"{kind}-n{n}"
            found.append(Entry(label, "own" if kind == "plain" else kind, with_instances(sized, n)))
    return found


def _check(name: str, config: Any, step: str) -> None:
    if name not in OTHERS:
        raise InputError(f"--contenders={name}: this network mixes nothing. Write {name.partition(':')[0]}.")
    missing = [package for package in OTHERS[name][0] if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"--contenders={name} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. Run "
            f"pip install 'datamux_jax[bench]', or leave it out."
        )
    m = config.model
    if (
        m.family != "bert"
        or m.backbone in VISION
        or config.data.source in ("digits", "mnist")
        or m.embedding_size not in (0, m.hidden_size)
    ):
        raise InputError(
            f"--contenders={name} is BERT on tokens, but model.family = {m.family!r}, data.source = {config.data.source!r}, "
            f"model.embedding_size = {m.embedding_size}. Leave it out, or measure such a network."
        )
    if config.objective not in OBJECTIVES:
        raise InputError(
            f"--contenders={name} has a classifier, but objective = {config.objective!r}. Leave it out, or measure a task."
        )
    if step == "train" and name.startswith("onnx"):
        raise InputError(f"--contenders={name} cannot train. Leave it out, or measure --step=predict.")
    if jax.default_backend() != "cpu":
        raise InputError(
            f"--contenders={name} runs on the CPU, but JAX runs on {jax.default_backend()}: the two cannot be compared. "
            "Leave it out, or set JAX_PLATFORMS=cpu."
        )


def threads() -> int:
    """CPU threads that every contender gets: as many as XLA takes, one for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Other:
    """An entry of `OTHERS`, with the weights of our plain network of the same config.

    Args:
      entry: what it is.
      ours: the plain network, for prediction.
      step: "predict" or "train".
    """

    def __init__(self, entry: Entry, ours: Network, step: str) -> None:
        import torch

        torch.set_num_threads(threads())
        self.entry, self.format, self.step = entry, ours.format, step
        self.forward: Callable[[Any, Any], np.ndarray]
        start = time.perf_counter()
        module = contender_models.hf_module(entry.config, ours.run, ours.format)
        self.parameters = sum(value.numel() for value in module.parameters())
        bfloat16 = entry.kind.endswith("bf16")
        if entry.kind.startswith("onnx"):
            self.forward = contender_models.onnx_session(
                module, ours.format.length, threads(), int8=entry.kind.endswith("int8")
            )
        else:
            # Training keeps float32 parameters, and computes in bfloat16.
            module = module.to(torch.bfloat16) if bfloat16 and step == "predict" else module
            self.forward = functools.partial(contender_models.torch_forward, module)
        self.setup_seconds = time.perf_counter() - start
        if step == "train":
            self.update = contender_models.torch_update(module, entry.config, bfloat16=bfloat16)

    def timed(self, groups: int, batches: int = 1) -> Timed:
        """Batches of `groups` rows; end to end, a call handles `batches` of them."""
        fmt = self.format
        shapes: dict[str, tuple[int, ...]] = {"inputs": (groups, fmt.length), "mask": (groups, fmt.length)}
        if self.step == "train":
            shapes["label"] = (groups, fmt.length) if fmt.token_labels else (groups,)
        dtypes = {"label": np.dtype(np.float32 if fmt.numbers else np.int64)}
        wanted = {name: jax.ShapeDtypeStruct(shape, dtypes.get(name, "int32")) for name, shape in shapes.items()}
        raw = benchmark_inputs.raw_inputs(fmt, groups)

        def encoded() -> Any:
            return [
                array.astype(np.int64) if name != "label" else array
                for name, array in benchmark_inputs.batch(fmt, raw, wanted).items()
            ]

        act: Callable[..., Any] = self.update if self.step == "train" else self.forward
        device = functools.partial(act, *encoded())
        first = seconds_of(device)
        calls: dict[str, Callable[[], Any]] = {
            "device": device,
            "end_to_end": lambda: [act(*encoded()) for _ in range(batches)],
        }
        return Timed(
            calls, {"device": groups, "end_to_end": groups * batches}, self.setup_seconds, first, None, self.parameters
        )


def agreement(other: Other, ours: Network, rows: int = 2) -> float:
    """The largest difference between the logits of another implementation and those of our plain network of equal weights.

    Raises:
      InputError: the other one is float32 too, and they are not the same function.
    """
    placed = ours.prediction_batch(rows * jax.device_count())
    expected = np.asarray(ours.predictor(rows * jax.device_count()).forward(ours.run.params, placed))[:, 0]
    got = other.forward(*(np.array(placed[name])[:, 0] for name in ("inputs", "mask")))
    error = float(np.abs(got - expected).max())
    exact = other.entry.kind in ("torch", "onnx") and ours.run.config.dtype == "float32"
    if exact and not error <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise InputError(
            f"--contenders={other.entry.kind} gives other logits than our plain network of the same weights, by up to {error:.2g}: it "
            "is not the same network, and its time says nothing. Leave it out, and report this."
        )
    return error
