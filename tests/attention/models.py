"""Models of `transformers` with tiny configurations and random weights: what attention each of them has."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from tests.attention.entries import Expected

BATCH, SEQUENCE, DECODED = 2, 12, 7
BASE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**BASE, "vocab_size": 128, "max_position_embeddings": 64}
SHARED = {**TEXT, "num_key_value_heads": 2}
CODER = {
    "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 128,
}  # fmt: skip
LATENT = {
    **TEXT, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "first_k_dense_replace": 1, "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A class and a configuration; `expected` is what its own spelling ("eager") holds.

    `inputs` is "text", "image", "encoder-decoder" or "sound"; `without` names what cannot be made of it.
    """

    kind: str
    config: str
    options: dict[str, Any]
    expected: tuple[Expected | str, ...]
    inputs: str = "text"
    without: tuple[str, ...] = ()
    fixed: bool = False  # the sequence length cannot be dynamic
    script: tuple[Expected | str, ...] = ()  # where the old exporter writes masks in a way that tells less

    def module(self, implementation: str) -> nn.Module:
        """The model in evaluation mode."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        config.use_cache = False
        made: nn.Module = getattr(transformers, self.kind)._from_config(config, attn_implementation=implementation)
        return made.eval()

    def sample(self) -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
        """(inputs by name, dynamic axes)"""
        torch.manual_seed(1)
        found, axes = INPUTS[self.inputs]()
        if self.fixed:
            axes = {name: {0: "batch"} for name in axes}
        return found, axes

    def wanted(self, origin: str) -> tuple[Expected | str, ...]:
        """What is expected in a graph of an origin."""
        return self.script if origin == "script" and self.script else self.expected


def text() -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    mask = torch.ones(BATCH, SEQUENCE, dtype=torch.int64)
    mask[1, -3:] = 0
    axes = {0: "batch", 1: "seq"}
    ids = torch.randint(3, 128, (BATCH, SEQUENCE))
    return {"input_ids": ids, "attention_mask": mask}, {"input_ids": axes, "attention_mask": axes}


def both() -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    found, axes = text()
    decoded = torch.randint(3, 128, (BATCH, DECODED))
    return {**found, "decoder_input_ids": decoded}, {**axes, "decoder_input_ids": {0: "batch", 1: "dec"}}


def image() -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}, {"pixel_values": {0: "batch"}}


def sound() -> tuple[dict[str, torch.Tensor], dict[str, dict[int, str]]]:
    decoded = torch.randint(3, 128, (BATCH, DECODED))
    axes = {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "dec"}}
    return {"input_features": torch.randn(BATCH, 8, 20), "decoder_input_ids": decoded}, axes


INPUTS: dict[str, Callable[[], Any]] = {"text": text, "encoder-decoder": both, "image": image, "sound": sound}

CAUSAL = Expected("causal + padding", 0.25)
ROTARY = replace(CAUSAL, rotary=(16, 16), groups=2)
MODELS = {
    "bert": Model("BertModel", "BertConfig", TEXT, (Expected("padding", 0.25),)),
    "gpt2": Model("GPT2Model", "GPT2Config",
                  {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 128, "n_positions": 64}, (CAUSAL,)),
    "llama": Model("LlamaModel", "LlamaConfig", SHARED, (ROTARY,)),
    "mistral": Model("MistralModel", "MistralConfig", {**SHARED, "sliding_window": 4, "head_dim": 16},
                     (replace(ROTARY, mask="banded + padding"),)),
    "gemma2": Model("Gemma2Model", "Gemma2Config", {**SHARED, "head_dim": 16, "sliding_window": 4},
                    (replace(ROTARY, mask="banded + padding", scale=1 / 16, softcap=50.0),), without=("sdpa",)),
    "gpt_oss": Model(
        "GptOssModel", "GptOssConfig",
        {**SHARED, "head_dim": 16, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
        (Expected("banded + padding", 0.25, 2, sink=True), "its probabilities softmax_1 are taken by"),
        without=("sdpa", "dynamo", "script"),
    ),
    "t5": Model("T5Model", "T5Config",
                {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 128},
                (Expected("general"), Expected("general"), Expected("padding")), "encoder-decoder", without=("sdpa dynamo",)),
    "bloom": Model("BloomModel", "BloomConfig", {"hidden_size": 64, "n_layer": 1, "n_head": 4, "vocab_size": 128},
                   (Expected("general", 0.25),), without=("sdpa",)),
    "mpt": Model("MptModel", "MptConfig",
                 {"d_model": 64, "n_heads": 4, "n_layers": 1, "max_seq_len": 64, "vocab_size": 128},
                 (Expected("general", 0.25),), without=("sdpa",), fixed=True),
    "deepseek_v2": Model("DeepseekV2Model", "DeepseekV2Config", LATENT,
                         (Expected("causal + padding", 24**-0.5, rotary=(8, 8)),), without=("dynamo", "script")),
    "deepseek_v3": Model("DeepseekV3Model", "DeepseekV3Config", {**LATENT, "n_group": 1, "topk_group": 1},
                         (Expected("causal + padding", 24**-0.5),)),
    "bart": Model("BartModel", "BartConfig", {**CODER, "max_position_embeddings": 64},
                  (Expected("padding", 0.25), Expected("causal", 0.25), Expected("padding", 0.25)), "encoder-decoder",
                  script=(Expected("padding", 0.25), CAUSAL, Expected("padding", 0.25))),
    "whisper": Model(
        "WhisperModel", "WhisperConfig",
        {**CODER, "max_source_positions": 10, "max_target_positions": 20, "num_mel_bins": 8, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        (Expected(scale=0.25), Expected("general", 0.25), Expected(scale=0.25)), "sound", without=("script",),
    ),
    "vit": Model("ViTModel", "ViTConfig", {**BASE, "image_size": 32, "patch_size": 8}, (Expected(scale=0.25),), "image"),
    "swin": Model("SwinModel", "SwinConfig",
                  {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4},
                  (Expected(scale=8**-0.5), Expected("general", 8**-0.5)), "image", without=("sdpa dynamo",)),
    "swinv2": Model("Swinv2Model", "Swinv2Config",
                    {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 4},
                    ("the scores are multiplied by",), "image", without=("sdpa",)),
    "gptj": Model("GPTJModel", "GPTJConfig",
                  {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 128, "n_positions": 64, "rotary_dim": 8},
                  (replace(CAUSAL, rotary=(8, 8)),)),
    "gpt_neox": Model("GPTNeoXModel", "GPTNeoXConfig", TEXT, (replace(CAUSAL, rotary=(4, 4)),)),
    "falcon": Model("FalconModel", "FalconConfig",
                    {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128, "alibi": False},
                    (replace(ROTARY, groups=4),)),
    "phi3": Model("Phi3Model", "Phi3Config", {**SHARED, "pad_token_id": 0}, (ROTARY,)),
    "qwen3": Model("Qwen3Model", "Qwen3Config", {**SHARED, "head_dim": 16}, (ROTARY,)),
    "opt": Model("OPTModel", "OPTConfig",
                 {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 128,
                  "word_embed_proj_dim": 64, "vocab_size": 128, "max_position_embeddings": 64}, (CAUSAL,)),
    "deberta_v2": Model("DebertaV2Model", "DebertaV2Config",
                        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
                        (Expected("general", 48**-0.5),), without=("sdpa",)),
}  # fmt: skip
