"""T2T-ViT: tokens made of overlapping patches, then a slim vision transformer (Yuan et al. 2021, arXiv:2101.11986).

Parameters have the names of the weights that the authors published.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

TOKEN_WIDTH = 64
"""Of the tokens-to-token module, whatever the width of the transformer behind it."""
FEATURES = 32
"""Random features of its attention."""
DROPOUT = 0.1
"""Of its two token transformers; the blocks behind it have none."""


class TokenPerformer(nn.Module):
    """A transformer block in linear time: tokens `(N, T, width_in)` to `(N, T, TOKEN_WIDTH)`, one head.

    The kernel exp(q·k) of attention is the mean, over random directions w, of phi(q) phi(k) with phi(x) = exp(w·x - |x|²/2)
    (Choromanski et al. 2021, arXiv:2009.14794). Keys meet values first, so no T x T matrix is made. Width changes on the
    way: the shortcut past attention is the values, not the input.
    """

    def __init__(self, width_in: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width_in)
        self.kqv = nn.Linear(width_in, 3 * TOKEN_WIDTH)
        self.proj = nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH)
        self.dp = nn.Dropout(DROPOUT)
        self.norm2 = nn.LayerNorm(TOKEN_WIDTH)
        self.mlp = nn.Sequential(nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH), nn.GELU(), nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH), nn.Dropout(DROPOUT))
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(FEATURES, TOKEN_WIDTH)) * math.sqrt(FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self.random_features(k), self.random_features(q)
        total = q @ k.sum(dim=1, keepdim=True).transpose(1, 2)  # (N, T, 1)
        attended = q @ (k.transpose(1, 2) @ v) / (total + 1e-8)
        x = v + self.dp(self.proj(attended))
        return x + self.mlp(self.norm2(x))

    def random_features(self, x: torch.Tensor) -> torch.Tensor:
        """phi, `(N, T, FEATURES)`."""
        return torch.exp(x @ self.w.T - (x * x).sum(dim=-1, keepdim=True) / 2) / math.sqrt(FEATURES)


class TokensToToken(nn.Module):
    """An image `(N, 3, S, S)` to tokens `(N, (S/16)², width)`: three soft splits, and a token transformer between them."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.sides = (side // 4, side // 8)
        self.attention1 = TokenPerformer(3 * 7 * 7)
        self.attention2 = TokenPerformer(TOKEN_WIDTH * 3 * 3)
        self.project = nn.Linear(TOKEN_WIDTH * 3 * 3, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention1(soft_split(x, 7, 4))
        x = self.attention2(soft_split(as_map(x, self.sides[0]), 3, 2))
        return self.project(soft_split(as_map(x, self.sides[1]), 3, 2))


def soft_split(x: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """Overlapping patches of a map `(N, C, H, W)`, one a token: `(N, H/stride · W/stride, C · size²)`."""
    return functional.unfold(x, size, stride=stride, padding=(size - stride + 1) // 2).transpose(1, 2)


def as_map(x: torch.Tensor, side: int) -> torch.Tensor:
    """Tokens `(N, side², C)` as a map `(N, C, side, side)`."""
    return x.transpose(1, 2).unflatten(2, (side, side))


class Attention(nn.Module):
    """Self-attention over `(N, T, width)`; queries, keys and values have no bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class T2tVit(nn.Module):
    """Images `(N, 3, side, side)` to logits `(N, classes)`.

    Args:
        width: Of the transformer. depth: Its blocks. heads: Of its attention. mlp_ratio: Hidden width of its MLPs, in widths.
        classes: How many.
        side: Of the image, a multiple of 16.
    """

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: int, classes: int = 1000, side: int = 224) -> None:
        super().__init__()
        self.tokens_to_token = TokensToToken(width, side)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sinusoids((side // 16) ** 2 + 1, width)[None])
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens_to_token(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), tokens), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # the norm looks at one token at a time: the others' would not be read


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """Fixed position embedding, `(positions, width)`: sines and cosines in turn (Vaswani et al. 2017, section 3.5)."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1).float()


def t2t_vit_7(classes: int = 1000) -> nn.Module:
    """T2T-ViT-7 with random weights: 4.3 M parameters; 1.15 G multiply-adds at 224x224, a quarter of them before the first block."""
    return T2tVit(width=256, depth=7, heads=4, mlp_ratio=2, classes=classes)


def t2t_vit_14(classes: int = 1000) -> nn.Module:
    """T2T-ViT-14 with random weights: 21.5 M parameters; 4.8 G multiply-adds at 224x224."""
    return T2tVit(width=384, depth=14, heads=6, mlp_ratio=3, classes=classes)


for factory in (t2t_vit_7, t2t_vit_14):
    factory.input_shape = (3, 224, 224)
    factory.preprocess = "imagenet"
