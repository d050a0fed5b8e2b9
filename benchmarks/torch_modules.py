"""Small PyTorch modules of the architectures that people export, with random weights.

Written by hand after the models they are named for, so that exporters and fusions meet the same
patterns; only the sizes are tiny.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES, VOCABULARY, LENGTH = 5, 24, 6


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, CLASSES)
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    )


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(inputs, outputs, 3, stride)
        self.second = _conv_norm(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def resnet() -> nn.Module:
    """The layers of ResNet-18: a stem, eight basic blocks in four stages, a linear head."""
    widths = (4, 4, 6, 6, 8)
    blocks = [
        BasicBlock(widths[i] if first else widths[i + 1], widths[i + 1], 2 if first and i else 1)
        for i in range(4)
        for first in (True, False)
    ]
    return nn.Sequential(
        *(_conv_norm(3, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)),
    )


def _conv_norm(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))
        return x * F.hardsigmoid(self.up(scale))


class InvertedResidual(nn.Module):
    def __init__(self, width: int, hidden: int, outputs: int, stride: int, act: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(_conv_norm(width, hidden, 1), act),
            *(_conv_norm(hidden, hidden, 3, stride, groups=hidden), act, SqueezeExcite(hidden)),
            _conv_norm(hidden, outputs, 1),
        )
        self.residual = stride == 1 and width == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet() -> nn.Module:
    """MobileNetV3: depthwise convolutions, squeeze and excite, HardSwish."""
    return nn.Sequential(
        *(_conv_norm(3, 4, 3, 2), nn.Hardswish()),
        InvertedResidual(4, 8, 4, 1, nn.ReLU()),
        InvertedResidual(4, 12, 6, 2, nn.Hardswish()),
        InvertedResidual(6, 12, 6, 1, nn.Hardswish()),
        *(_conv_norm(6, 16, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(16, 16), nn.Hardswish(), nn.Dropout(), nn.Linear(16, CLASSES)),
    )


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (n, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width, 1e-6)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.scale * self.down(F.gelu(self.up(h)))
        return x + h.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    """ConvNeXt: a patchifying stem, depthwise blocks with LayerNorm, downsampling between."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 2, 2), ChannelNorm(6), ConvNextBlock(6)),
        *(ChannelNorm(6), nn.Conv2d(6, 8, 2, 2), ConvNextBlock(8)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, CLASSES)),
    )


WIDTH, HEADS = 16, 2


def by_heads(x: Tensor, heads: int) -> Tensor:
    """(n, tokens, width) to (n, heads, tokens, size of a head)."""
    return x.view(x.shape[0], x.shape[1], heads, -1).permute(0, 2, 1, 3)


def joined(x: Tensor) -> Tensor:
    """The inverse of ``by_heads``."""
    x = x.permute(0, 2, 1, 3).contiguous()
    return x.view(x.shape[0], x.shape[1], WIDTH)


class ViTBlock(nn.Module):
    """torch's own MultiheadAttention, whose query, key and value are one stored tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 10, WIDTH) * 0.1)
        self.blocks = nn.Sequential(ViTBlock(), ViTBlock())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1) + self.positions
        return self.head(self.norm(self.blocks(h))[:, 0])


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.output = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-12), nn.LayerNorm(WIDTH, 1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (by_heads(part(x), HEADS) for part in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS) + bias
        mixed = joined(torch.matmul(scores.softmax(-1), v))
        x = self.norm1(self.output(mixed) + x)
        return self.norm2(self.down(F.gelu(self.up(x))) + x)


class Bert(nn.Module):
    """Post-norm encoder over token ids with a padding mask, pooler and classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(LENGTH + 2, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, 1e-12)
        self.layers = nn.ModuleList([BertLayer(), BertLayer()])
        self.pooler, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("order", torch.arange(LENGTH + 2)[None])

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = self.order[:, : ids.shape[1]]
        h = self.words(ids) + self.places(places) + self.kinds(torch.zeros_like(ids))
        h = self.norm(h)
        bias = (1.0 - mask[:, None, None, :].to(h.dtype)) * -10000.0
        for layer in self.layers:
            h = layer(h, bias)
        return self.head(torch.tanh(self.pooler(h[:, 0])))


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.randn(outputs) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.bias.shape[0])


class Gpt2Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.merged, self.output = Conv1D(WIDTH, 3 * WIDTH), Conv1D(WIDTH, WIDTH)
        self.up, self.down = Conv1D(WIDTH, 2 * WIDTH), Conv1D(2 * WIDTH, WIDTH)
        causal = torch.tril(torch.ones(LENGTH, LENGTH, dtype=torch.bool))
        self.register_buffer("causal", causal[None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (by_heads(p, HEADS) for p in self.merged(self.norm1(x)).split(WIDTH, dim=2))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(WIDTH // HEADS)
        seen = self.causal[:, :, : x.shape[1], : x.shape[1]]
        scores = torch.where(seen, scores, torch.full([], -1e4, dtype=scores.dtype))
        x = x + self.output(joined(torch.matmul(scores.softmax(-1), v)))
        h = self.up(self.norm2(x))
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h.pow(3.0))))
        return x + self.down(h)


class Gpt2(nn.Module):
    """Causal decoder; the output matrix is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Gpt2Block(), Gpt2Block())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.head(self.norm(self.blocks(self.words(ids) + self.places(places))))


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def turned(x: Tensor) -> Tensor:
    """The halves of every head exchanged, one with the other sign."""
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], dim=-1)


class LlamaBlock(nn.Module):
    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        narrow = WIDTH // heads * groups
        self.norm1, self.norm2 = RMSNorm(), RMSNorm()
        self.query, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(WIDTH, narrow, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor) -> Tensor:
        h = self.norm1(x)
        q = by_heads(self.query(h), self.heads)
        k, v = (by_heads(part(h), self.groups) for part in (self.key, self.value))
        q, k = (part * cos + turned(part) * sin for part in (q, k))
        k, v = (self.repeated(part) for part in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(WIDTH // self.heads) + bias
        x = x + self.output(joined(torch.matmul(scores.softmax(-1), v)))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def repeated(self, x: Tensor) -> Tensor:
        """Every head of keys and values once per query head that shares it."""
        n, groups, tokens, size = x.shape
        times = self.heads // self.groups
        x = x[:, :, None].expand(n, groups, times, tokens, size)
        return x.reshape(n, self.heads, tokens, size)


class Llama(nn.Module):
    """RMSNorm, rotary positions, grouped queries, SwiGLU, no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([LlamaBlock(4, 2), LlamaBlock(4, 2)])
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("frequencies", 100.0 ** (-torch.arange(2) / 2))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.words(ids)
        places = torch.arange(ids.shape[1], device=ids.device)
        angles = self.frequencies[None, :, None] @ places[None, None, :].to(h.dtype)
        angles = torch.cat([angles, angles], 1).transpose(1, 2)
        bias = torch.where(places[None] <= places[:, None], 0.0, -1e4)
        for block in self.blocks:
            h = block(h, angles.cos(), angles.sin(), bias)
        return self.head(self.norm(h))


class LstmClassifier(nn.Module):
    """Two bidirectional LSTM layers between an embedding with a projection and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.project = nn.Embedding(VOCABULARY, 12), nn.Linear(12, 8)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.hidden, self.head = nn.Linear(12, 12), nn.Linear(12, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(torch.tanh(self.project(self.words(ids))))
        return self.head(F.relu(self.hidden(states[:, -1])))


@dataclass(frozen=True)
class Architecture:
    """A module and what it takes.

    Args:
        make: the module with random weights; the caller sets the seed.
        inputs: by name, random inputs of n samples.
        fusion: what onnxruntime.transformers.optimizer is told that it is.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Mapping[str, Tensor]]
    fusion: str = "bert"


def images(*shape: int) -> Callable[[int], Mapping[str, Tensor]]:
    return lambda n: {"x": torch.randn(n, *shape)}


def token_ids(n: int) -> Mapping[str, Tensor]:
    return {"ids": torch.randint(VOCABULARY, (n, LENGTH))}


def padded_ids(n: int) -> Mapping[str, Tensor]:
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (n, 1))
    mask = (torch.arange(LENGTH) < lengths).to(torch.int64)
    return {**token_ids(n), "mask": mask}


ARCHITECTURES = {
    "mlp": Architecture(mlp, images(12)),
    "lenet": Architecture(lenet, images(1, 14, 14)),
    "resnet": Architecture(resnet, images(3, 24, 24)),
    "mobilenet": Architecture(mobilenet, images(3, 16, 16)),
    "convnext": Architecture(convnext, images(3, 12, 12)),
    "vit": Architecture(ViT, images(3, 12, 12), "vit"),
    "bert": Architecture(Bert, padded_ids),
    "gpt2": Architecture(Gpt2, token_ids, "gpt2"),
    "llama": Architecture(Llama, token_ids, "gpt2"),
    "lstm": Architecture(LstmClassifier, token_ids),
}


def made(name: str, seed: int = 0) -> nn.Module:
    """The module in evaluation mode; signals do not fade, and norms do something."""
    torch.manual_seed(seed)
    module = ARCHITECTURES[name].make()
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, nn.BatchNorm2d):
            with torch.no_grad():
                part.weight.uniform_(0.5, 1.5)
                part.bias.normal_(0, 0.2)
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 1.5)
        elif isinstance(part, nn.LayerNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.1)
    return module.eval()
