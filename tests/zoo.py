"""Architectures for the tests: tiny configurations with random weights; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from fxopt.frontends.capture.program import Program, export
from fxopt.frontends.to_onnx import onnx_graph_of
from fxopt.frontends.torch_export import graph_of
from fxopt.ir.graph import Graph
from fxopt.ir.shapes import infer

BATCH, SEQUENCE = 2, 12


@dataclass(frozen=True)
class Case:
    """A model in evaluation mode, example inputs by argument name, and its dynamic dimensions."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]

    def resized(self, **sizes: int) -> dict[str, torch.Tensor]:
        """The inputs at other sizes of the named dimensions (rows are repeated)."""
        found = {}
        for name, tensor in self.inputs.items():
            for axis, dimension in self.dynamic.get(name, {}).items():
                size = sizes.get(dimension, tensor.shape[axis])
                tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
            found[name] = tensor
        return found


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.inner_norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + torch.relu(self.inner_norm(self.inner(x)))
        return self.head(x.mean((2, 3)))


def mlp() -> Case:
    return Case(Mlp().eval(), {"x": torch.randn(BATCH, 16)}, {"x": {0: "batch"}})


def cnn() -> Case:
    model = Cnn()
    for norm in (model.stem_norm, model.inner_norm):
        norm.running_mean = torch.randn(16)
        norm.running_var = torch.rand(16) + 0.5
    return Case(model.eval(), {"x": torch.randn(BATCH, 3, 8, 8)}, {"x": {0: "batch"}})


def encoder() -> Case:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return Case(model, {"src": torch.randn(BATCH, SEQUENCE, 64)}, {"src": {0: "batch", 1: "seq"}})


_HEADS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_HEADS, "vocab_size": 128, "max_position_embeddings": 64}
_IMAGE = {**_HEADS, "image_size": 32, "patch_size": 8}


def _transformer(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    made.config.use_cache = False
    module: nn.Module = made.eval()
    return module


def _text(model: nn.Module) -> Case:
    ids = torch.randint(3, 128, (BATCH, SEQUENCE))
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    mask[1, -3:] = 0
    axes = {0: "batch", 1: "seq"}
    return Case(model, {"input_ids": ids, "attention_mask": mask}, {"input_ids": axes, "attention_mask": axes})


def _pixels(model: nn.Module) -> Case:
    return Case(model, {"pixel_values": torch.randn(BATCH, 3, 32, 32)}, {"pixel_values": {0: "batch"}})


def bert() -> Case:
    return _text(_transformer("BertForSequenceClassification", "BertConfig", **_TEXT))


def distilbert() -> Case:
    options = {
        "dim": 64,
        "hidden_dim": 128,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 64,
    }
    return _text(_transformer("DistilBertForSequenceClassification", "DistilBertConfig", **options))


def gpt2() -> Case:
    options = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64}
    return _text(_transformer("GPT2LMHeadModel", "GPT2Config", **options))


def llama() -> Case:
    return _text(_transformer("LlamaForCausalLM", "LlamaConfig", **_TEXT, num_key_value_heads=2))


def qwen2() -> Case:
    return _text(_transformer("Qwen2ForCausalLM", "Qwen2Config", **_TEXT, num_key_value_heads=2))


def opt() -> Case:
    options = {"ffn_dim": 128, "word_embed_proj_dim": 64, "vocab_size": 128, "max_position_embeddings": 64}
    heads = {key: value for key, value in _HEADS.items() if key != "intermediate_size"}
    return _text(_transformer("OPTForCausalLM", "OPTConfig", **heads, **options))


def vit() -> Case:
    return _pixels(_transformer("ViTForImageClassification", "ViTConfig", **_IMAGE))


def deit() -> Case:
    return _pixels(_transformer("DeiTForImageClassification", "DeiTConfig", **_IMAGE))


BUILDERS: dict[str, Callable[[], Case]] = {
    build.__name__: build for build in (mlp, cnn, encoder, bert, distilbert, gpt2, llama, qwen2, opt, vit, deit)
}


def case(name: str) -> Case:
    """The architecture of this name, with the same weights each time."""
    torch.manual_seed(0)
    return BUILDERS[name]()


ORIGINS = ("torch", "opset 20", "opset 23")


@cache
def program(name: str) -> Program:
    """The architecture, captured with its dynamic dimensions."""
    made = case(name)
    return export(made.model, made.inputs, made.dynamic)


@cache
def graph(name: str, origin: str) -> Graph:
    """The architecture as a graph of one of the `ORIGINS`, shapes inferred; do not change it, take a copy."""
    if origin == "torch":
        made = graph_of(program(name), name)
    else:
        made, _ = onnx_graph_of(program(name), name, int(origin.split()[1]), verify=False)
    infer(made, {"batch": BATCH, "seq": SEQUENCE})
    return made
