"""The networks of `contenders.py` in other libraries: Hugging Face BERT in PyTorch, and exported to ONNX Runtime."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from datamux_jax import hf
from datamux_jax.data.formats import Format
from datamux_jax.data.pipeline import IGNORED
from datamux_jax.runs import Run


def hf_module(config: Any, run: Run, fmt: Format) -> Any:
    """Hugging Face BERT with a classifier, a torch module `(input_ids, attention_mask) -> logits`, with the weights of `run`."""
    import torch
    import transformers

    m, params = config.model, jax.device_get(run.params)
    bert = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=fmt.vocab_size,
            hidden_size=m.hidden_size,
            num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_heads,
            intermediate_size=m.mlp_dim,
            max_position_embeddings=run.model.num_positions,
            type_vocab_size=max(1, m.type_vocab_size),
            layer_norm_eps=m.layer_norm_eps,
            hidden_dropout_prob=m.dropout_rate,
            attention_probs_dropout_prob=m.attention_dropout_rate,
        ),
        add_pooling_layer=False,
    )
    state = {key: torch.tensor(value) for key, value in hf.export_state(params, config).items()}
    state = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    if not m.type_vocab_size:
        state["embeddings.token_type_embeddings.weight"] = torch.zeros(1, m.hidden_size)
    bert.load_state_dict(state)
    weights = params["classifier"]["out"]
    head = torch.nn.Linear(m.hidden_size, weights["bias"].size)
    head.load_state_dict({"weight": torch.tensor(weights["kernel"].T), "bias": torch.tensor(weights["bias"])})
    tagging, first = config.objective == "tagging", m.pool == "first"

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.head, self.dropout = bert, head, torch.nn.Dropout(m.dropout_rate)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            h = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            if not tagging and first:
                h = h[:, 0]
            elif not tagging:
                weight = attention_mask.to(h.dtype)[..., None]
                h = (h * weight).sum(1) / weight.sum(1)
            return self.head(self.dropout(h)).float()

    return Classifier().eval()


def torch_forward(module: Any, inputs: Any, mask: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return np.asarray(module(torch.as_tensor(inputs), torch.as_tensor(mask)).numpy())


def decay_groups(module: Any, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of a torch module by their decay: none for biases and LayerNorm, as `optimizer.decayed` has it."""
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for name, value in module.named_parameters():
        parts[not (name.endswith("bias") or "LayerNorm" in name)].append(value)
    return [{"params": parts[True], "weight_decay": weight_decay}, {"params": parts[False], "weight_decay": 0.0}]


def torch_update(module: Any, config: Any, *, bfloat16: bool) -> Callable[[Any, Any, Any], float]:
    """An AdamW step on the task loss, as ours: same clipping, decay and dropout; bfloat16 by autocast."""
    import torch

    o = config.optimizer
    rule = torch.optim.AdamW(decay_groups(module, o.weight_decay), lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps)

    def loss_of(logits: Any, label: Any) -> Any:
        if config.objective == "regression":
            return torch.nn.functional.mse_loss(logits[:, 0], label)
        classes = logits.shape[-1]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, classes), label.reshape(-1).long(), ignore_index=IGNORED)

    def update(inputs: Any, mask: Any, label: Any) -> float:
        module.train()
        rule.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = module(torch.as_tensor(inputs), torch.as_tensor(mask))
        loss = loss_of(logits, torch.as_tensor(label))
        loss.backward()
        if o.grad_clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), o.grad_clip)
        rule.step()
        return float(loss.detach())

    return update


def onnx_session(module: Any, length: int, threads: int, *, int8: bool) -> Callable[[Any, Any], np.ndarray]:
    """Exports a torch module, quantises it if asked to, and gives a function of numpy ids and mask, `[B, length]` each."""
    import onnxruntime
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rows = {0: torch.export.Dim("rows", min=1, max=2**16)}
    # Two tensors: of one that is passed twice the exporter makes one input.
    example = torch.zeros((2, length), dtype=torch.int64), torch.ones((2, length), dtype=torch.int64)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Without this its threads would still be spinning in the window of the next contender.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "float32.onnx"
        torch.onnx.export(
            module,
            example,
            file,
            input_names=["input_ids", "attention_mask"],
            dynamo=True,
            dynamic_shapes=(rows, rows),
            verbose=False,
        )
        if int8:
            quantize_dynamic(file, file.with_name("int8.onnx"), weight_type=QuantType.QInt8)
            file = file.with_name("int8.onnx")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward(inputs: Any, mask: Any) -> np.ndarray:
        feeds = {"input_ids": np.asarray(inputs, np.int64), "attention_mask": np.asarray(mask, np.int64)}
        return np.asarray(session.run(None, feeds)[0])

    return forward


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what exporting logs: advice about packages that no one asked for."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
