"""The example models as plain torch modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention over [batch, tokens, dim], with separate query, key and value projections."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def _split_heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [batch, heads, tokens, dim / heads]."""
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [batch, tokens, dim]."""
        query = self._split_heads(self.query(x))
        key = self._split_heads(self.key(x))
        value = self._split_heads(self.value(x))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


class TransformerBlock(nn.Module):
    """A pre-norm transformer block: attention and a GELU MLP, each with a residual connection."""

    def __init__(self, dim: int, heads: int, hidden: int, causal: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, causal)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [batch, tokens, dim]."""
        attended: Tensor = x + self.attention(self.attention_norm(x))
        output: Tensor = attended + self.mlp(self.mlp_norm(attended))
        return output


class DigitsViT(nn.Module):
    """Vision transformer for 8x8 digits: 16 patches of 2x2 pixels, mean pooling, 10 classes."""

    def __init__(self, dim: int = 64, heads: int = 4, layers: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=2, stride=2)
        # Strong initial positions: with the usual 0.02, validation accuracy is two points lower.
        self.positions = nn.Parameter(0.5 * torch.randn(1, 16, dim))
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, hidden, causal=False) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Image float32 [batch, 1, 8, 8] in [0, 1] -> logits [batch, 10]."""
        tokens = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


class ConvBlock(nn.Sequential):
    """A 3x3 convolution without bias, batch normalisation and ReLU; keeps height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to their input before the last ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels)
        self.second = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same shape."""
        return F.relu(x + self.norm(self.second(self.first(x))))


class DigitsCNN(nn.Module):
    """Convolutional network for 8x8 digits with one residual block, global average pooling and 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvBlock(1, 32),
            ConvBlock(32, 64),
            nn.MaxPool2d(2),
            ResidualBlock(64),
            ConvBlock(64, 96),
            nn.AdaptiveAvgPool2d(1),
        )
        self.head = nn.Linear(96, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Image float32 [batch, 1, 8, 8] in [0, 1] -> logits [batch, 10]."""
        logits: Tensor = self.head(self.features(image).flatten(1))
        return logits


class ByteLM(nn.Module):
    """Byte-level GPT: 256 symbols, learned positions, causal attention over at most `context` bytes."""

    def __init__(self, dim: int = 192, heads: int = 6, layers: int = 3, hidden: int = 704, context: int = 256) -> None:
        super().__init__()
        self.context = context
        self.symbols = nn.Embedding(256, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, hidden, causal=True) for _ in range(layers)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)
        for embedding in (self.symbols, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes int64 [batch, seq] -> logits of each next byte, float32 [batch, seq, 256]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded = self.symbols(tokens) + self.positions(positions)
        logits: Tensor = self.head(self.norm(self.blocks(embedded)))
        return logits
