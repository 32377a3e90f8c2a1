"""Convolutions, normalisations and parametrizations."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from zoo.entries import CE, ZOO, Entry, Net, entry, free, images, linears, net, vectors


def _residual_net(norm):
    def run(m, x):
        h = F.relu(m.n1(m.c1(x)))
        h = F.relu(m.n2(m.c2(h)) + m.n3(m.short(h)))
        return m.head(F.adaptive_avg_pool2d(h, 1).flatten(1))

    c1, c2 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
    parts = {"c1": c1, "c2": c2, "short": nn.Conv2d(4, 6, 1, stride=2, bias=False), "head": nn.Linear(6, 3)}
    return Net(run, n1=norm(4), n2=norm(6), n3=norm(6), **parts)


ZOO["resnet_in_train_mode"] = Entry(lambda: (_residual_net(nn.BatchNorm2d), *images(4), CE), mixes=True)


@entry()
def resnet_in_eval_mode():
    model, X, y = _residual_net(nn.BatchNorm2d), *images(4)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(8, 2, 6, 6))
    return model.eval(), X, y, CE


@entry()
def instance_norm():
    layers = nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)), *images(), CE


@entry()
def depthwise_separable():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, padding="same", padding_mode="circular"),
        nn.Hardswish(),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding=2, padding_mode="reflect"),
        *(nn.GroupNorm(2, 4), nn.SiLU(), nn.LocalResponseNorm(2), nn.Softplus()),
        nn.Conv2d(4, 6, 1),
        *(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    )
    return model, *images(), CE


@entry(class_axis=-1)
def volumes():
    model = nn.Sequential(
        nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1), groups=2),
        nn.ELU(),
        nn.ConvTranspose3d(4, 2, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1), output_padding=(0, 1, 0), groups=2),
    )
    X = torch.randn(2, 2, 3, 4, 3)
    with torch.no_grad():
        y = torch.randn_like(model(X)).flatten(2)
    return Net(lambda m, x: m.m(x).flatten(2), m=model), X, y, nn.MSELoss()


@entry()
def unet_segmentation():
    def run(m, x):
        a = F.leaky_relu(m.down1(x))
        b = F.leaky_relu(m.down2(F.max_pool2d(a, 2)))
        up = m.up(b) + F.interpolate(b[:, :3], scale_factor=2, mode="bilinear")
        return m.head(torch.cat([a, up], 1))

    down = {"down1": nn.Conv2d(2, 3, 3, padding=1), "down2": nn.Conv2d(3, 4, 3, padding=1)}
    model = Net(run, **down, up=nn.ConvTranspose2d(4, 3, 2, stride=2), head=nn.Conv2d(6, 3, 1))
    y = torch.randint(3, (3, 4, 4))
    y[0, :2] = y[2, 3] = -1
    return model, torch.rand(3, 2, 4, 4), y, nn.CrossEntropyLoss(ignore_index=-1, weight=torch.tensor([1.0, 0.3, 2.0]))


@net(
    images,
    stem=nn.Conv2d(2, 4, 2, 2),
    mix=nn.Conv2d(4, 4, 3, padding=1, groups=4),
    norm=nn.LayerNorm(4),
    gamma=free(4),
    **linears(up=(4, 8), down=(8, 4), head=(4, 3)),
)
def channel_norm_and_layer_scale(m, x):
    """ConvNeXt's block: depthwise convolution, channels last, a scale for each channel."""
    x = m.stem(x)
    h = m.norm(m.mix(x).permute(0, 2, 3, 1))
    x = x + (m.gamma * m.down(F.gelu(m.up(h)))).permute(0, 3, 1, 2)
    return m.head(x.mean((2, 3)))


@entry()
def weight_norm_of_old_and_new():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = nn.utils.weight_norm(nn.Conv2d(2, 3, 3), dim=0)
        last = nn.utils.weight_norm(nn.Linear(50, 3), dim=None)
    wn = parametrizations.weight_norm
    new = wn(nn.Conv2d(3, 3, 1)), nn.Tanh(), wn(nn.ConvTranspose2d(3, 2, 2), dim=1)
    return nn.Sequential(first, nn.Tanh(), *new, nn.Flatten(), last), *images(), CE


@entry(surrogate=True)
def spectral_norm_in_train_mode():
    """Each forward pass makes one step of the power iteration from the caller's buffers."""
    sn = parametrizations.spectral_norm
    return nn.Sequential(sn(nn.Linear(6, 8), n_power_iterations=2), nn.Tanh(), nn.Linear(8, 3)), *vectors(), CE


@entry()
def frozen_batch_norm_under_training():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU6(inplace=True), nn.Flatten(), nn.Linear(48, 3))
    model[1].eval()
    model[1].weight.requires_grad_(False)
    return model, *images(), CE


# in PyTorch 2.6 sampling has no second derivative, and our operators raise its error
@net(images, exists=torch.__version__ >= (2, 7), pose=nn.Linear(72, 6), head=nn.Linear(72, 3))
def spatial_transformer(m, x):
    theta = m.pose(x.flatten(1)).view(-1, 2, 3) / 10 + torch.eye(2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return m.head(F.grid_sample(x, grid, align_corners=False).flatten(1))


@net(images, hyper=nn.Linear(2, 54), bias=free(3), head=nn.Linear(48, 3))
def dynamic_convolution(m, x):
    """A hypernetwork makes one kernel for each image."""
    n = len(x)
    kernels = m.hyper(x.mean((2, 3))).view(n * 3, 2, 3, 3)
    h = F.conv2d(x.flatten(0, 1)[None], kernels, groups=n).view(n, 3, 4, 4)
    return m.head((h + m.bias.view(1, 3, 1, 1)).tanh().flatten(1))


@net(images, conv=nn.Conv2d(2, 4, 3), down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1), head=nn.Linear(64, 3))
def squeeze_and_excite(m, x):
    """With weights that are standardised."""
    W = m.conv.weight
    W = (W - W.mean((1, 2, 3), keepdim=True)) / W.std((1, 2, 3), keepdim=True)
    h = F.conv2d(x, W, m.conv.bias)
    gate = m.up(F.relu(m.down(h.mean((2, 3), keepdim=True)))).sigmoid()
    return m.head((h * gate).flatten(1))


@net(images, conv=nn.Conv2d(2, 4, 3), head=nn.Linear(4, 3))
def convolution_of_one_image_at_a_time(m, x):
    return torch.stack([m.head(m.conv(image).tanh().mean((1, 2))) for image in x])


@entry(class_axis=-1)
def pixel_shuffle_super_resolution():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Mish(), nn.Conv2d(4, 4, 3, padding=1), nn.PixelShuffle(2))
    return model, torch.rand(2, 2, 3, 3), torch.rand(2, 1, 6, 6), nn.MSELoss(reduction="sum")
