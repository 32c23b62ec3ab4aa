"""Leave-one-out contrastive learning (LooC): "What Should Not Be Contrastive in Contrastive Learning", ICLR 2021.

    python loo.py train                                  # LooC (color, rotation) on pictures drawn by code
    python loo.py train --data=folder --root=DIR         # on your own pictures
    python loo.py methods --groups=color,rotation        # every method of the paper as a small table

Axes, one legend for the whole project: b image, v key view, g group, s space, d feature, c embedding (or colour channel),
n queue slot or sample, t trial, h w pixel.
"""

import collections
import contextlib
import ctypes
import datetime
import inspect
import io
import itertools
import math
import os
import random
import re
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from json import dumps, loads
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import einsum, rearrange, repeat
from torch import nn

try:
    import fcntl
except ImportError:  # Windows: no lock on a run folder
    fcntl = None


class UserError(ValueError):
    """Bad input: the command line prints it as one line and exits with this code."""

    code = 2


def generator(*key):
    """A CPU generator that depends on nothing but `key`, e.g. ("views", seed, step): so any step can be drawn again."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(32))


# ---------------------------------------------------------------- methods: a method of the paper is a small table


class Method(NamedTuple):
    groups: tuple  # the augmentation groups, one space each beside Z_0
    share: torch.Tensor  # (v g) bool: key view v copies the query's draw of group g
    role: (
        torch.Tensor
    )  # (s v) int: key view v is to space s 1 positive, -1 negative of the same image, 0 unused
    heads: str  # "mlp": spaces share the whole backbone; "conv5": each has its own layer4 (the "++" methods)
    spaces: tuple  # (s,) names: "all" is Z_0, the others are what they depend on


def methods(groups, same=()):
    """The paper's methods (its section 3 and tables 1 and 4) for these groups -> {name: Method}."""
    n = len(groups)
    none, eye = torch.zeros(1, n, dtype=torch.bool), torch.eye(n, dtype=torch.bool)
    share = torch.cat([none, eye])
    role = 2 * torch.eye(n + 1, dtype=torch.long) - 1
    role[0, 1:] = 0  # Z_0 is invariant to everything: it sees k_0 alone
    one, every = torch.ones(1, 1, dtype=torch.long), torch.ones(n + 1, 1, dtype=torch.long)
    names = ("all", *groups)
    return {
        "moco": Method(groups, none, one, "mlp", names[:1]),
        "moco_same": Method(
            groups,
            torch.tensor([[g in same for g in groups]], dtype=torch.bool),
            one,
            "mlp",
            names[:1],
        ),
        "looc": Method(groups, share, role, "mlp", names),
        "looc++": Method(groups, share, role, "conv5", names),
        "moco++": Method(groups, none, every, "conv5", tuple(f"all{i}" for i in range(n + 1))),
        "supervised": Method(groups, none[:0], one[:0, :0], "mlp", ()),
    }


def get_method(config):
    """The Method that a configuration names."""
    return methods(config["groups"], config["same"])[config["method"]]


# ---------------------------------------------------------------- augmentations: draw first, apply later
# draw_x(b, generator) -> {parameter: (b ...)}, on the CPU; x(images (b 3 h w) anywhere, draw on the CPU) -> (b 3 h w), nothing random


def uniform(low, high, *shape, generator):
    return torch.rand(*shape, generator=generator) * (high - low) + low


def sample_texture(b, generator):
    """A stylised copy with probability 0.5, and which of them as a share of their number."""
    stylised = torch.rand(b, generator=generator) < 0.5
    return {
        "stylised": stylised,
        "copy": torch.where(stylised, torch.rand(b, generator=generator), 0.0),
    }


def sample_crop(b, generator):
    """Random-resized-crop's ten attempts: area and shape of the box, and where it goes in the room that is left."""
    return {
        "area": uniform(0.2, 1, b, 10, generator=generator),
        "ratio": uniform(math.log(3 / 4), math.log(4 / 3), b, 10, generator=generator).exp(),
        "place": torch.rand(b, 2, generator=generator),
    }


def sample_flip(b, generator):
    return {"flip": torch.rand(b, generator=generator) < 0.5}


def sample_rotation(b, generator):
    """Counter-clockwise quarter turns: none with probability 0.5, else 1, 2 or 3."""
    turns = torch.randint(1, 4, (b,), generator=generator)
    return {"turns": torch.where(torch.rand(b, generator=generator) < 0.5, turns, 0)}


def sample_color(b, generator):
    """Colour jitter with probability 0.8 (else the order of its four ops is -1), then grayscale with probability 0.2, as MoCo v2."""
    jitter = torch.rand(b, generator=generator) < 0.8
    around = lambda middle, reach: torch.where(
        jitter, uniform(middle - reach, middle + reach, b, generator=generator), middle
    )
    return {
        "brightness": around(1, 0.4),
        "contrast": around(1, 0.4),
        "saturation": around(1, 0.4),
        "hue": around(0, 0.1),
        "order": torch.where(
            jitter[:, None], torch.rand(b, len(JITTER), generator=generator).argsort(1), -1
        ),
        "gray": torch.rand(b, generator=generator) < 0.2,
    }


def sample_blur(b, generator):
    return {
        "blur": torch.rand(b, generator=generator) < 0.5,
        "sigma": uniform(0.1, 2.0, b, generator=generator),
    }


def move_like(images, parameter):
    """A drawn parameter, or rows, where the images are and in their precision."""
    return parameter.to(
        images.device,
        images.dtype if parameter.is_floating_point() else parameter.dtype,
        non_blocking=True,
    )


def resample(images, draw, size=None, aspect=None):
    """Crop, flip and rotate in one go: two small matrix products a picture.

    images (b c h w); draw: any of area, ratio, place; flip; turns; aspect (b,) width / height of the pictures behind the
    canvases -> (b c size size), antialiased as torchvision's resize.
    """
    b, c, h, w = images.shape
    size = size or h
    odd = (
        move_like(images, (draw["turns"] % 2 == 1).nonzero().squeeze(1)) if "turns" in draw else ()
    )  # found on the CPU: no GPU is waited for
    draw = {k: move_like(images, p) for k, p in draw.items()}
    zeros, ones = images.new_zeros(b), images.new_ones(b)
    top, left, height, width = zeros, zeros, ones, ones  # all of the canvas
    if "area" in draw:
        top, left, height, width = crop_box(draw, ones if aspect is None else aspect)
    turns, flip = draw.get("turns", zeros), draw.get("flip", zeros.bool())
    rows = resize_matrix(top, height, (turns == 2) | (turns == 3), h, size)
    cols = resize_matrix(left, width, flip ^ ((turns == 1) | (turns == 2)), w, size)
    out = separable_matmul(images, rows, cols)
    if len(odd):
        out[odd] = out[odd].mT
    return out


def separable_matmul(images, rows, cols):
    """rows @ images @ cols^T of each picture and channel: images (b c h w), rows (b k h), cols (b l w) -> (b c k l), contiguous."""
    wide = rearrange(images, "b c h w -> b (c h) w") @ cols.mT
    return rows[:, None] @ rearrange(wide, "b (c h) l -> b c h l", c=images.shape[1])


def crop_box(draw, aspect):
    """The first attempt that fits, else the largest box in the middle -> top, left, height, width (b,) as shares of the canvas."""
    aspect = aspect[:, None]
    width, height = (
        (draw["area"] * draw["ratio"] / aspect).sqrt(),
        (draw["area"] / draw["ratio"] * aspect).sqrt(),
    )
    fallback = torch.cat([(4 / 3 / aspect).clamp(max=1), (aspect * 4 / 3).clamp(max=1)], 1)
    fits = (width <= 1) & (height <= 1)
    first, none = fits.int().argmax(1, keepdim=True), ~fits.any(1, keepdim=True)
    box = torch.cat([width.gather(1, first), height.gather(1, first)], 1)
    width, height = torch.where(none, fallback, box).unbind(1)
    top, left = torch.where(none, 0.5, draw["place"]).unbind(1)
    return top * (1 - height), left * (1 - width), height, width


def resize_matrix(start, extent, mirror, n, size):
    """(b size n): row i weighs the n pixels behind output pixel i of the box [start, start + extent] (shares of n)."""
    start, extent = start[:, None, None] * n, extent[:, None, None] * n
    step = extent / size
    at = torch.arange(size, device=start.device)[:, None] + 0.5
    at = start + step * torch.where(
        mirror[:, None, None], size - at, at
    )  # (b size 1) centres, in pixels
    pixel = torch.arange(n, device=start.device) + 0.5
    # As of a picture that was cropped first: what lies outside the box has no weight. 1e-4 forgives rounding.
    inside = (pixel > start - 1e-4) & (pixel < start + extent + 1e-4)
    weight = (pixel - at).abs_().div_(-step.clamp(min=1)).add_(1).clamp_(min=0).mul_(inside)
    return weight.div_(weight.sum(-1, keepdim=True))


def texture(images, draw, textures, at):
    """Style transfer (section 3), made beforehand: textures (b copy c h w) are the stylised copies; images (n c h w), image i is of picture
    at[i] of the b -> (n c h w). ValueError without textures."""
    if textures is None:
        raise ValueError("the group texture needs `textures`, the stylised copies (b copy c h w)")
    rows = draw["stylised"].nonzero().squeeze(1)
    copy = (draw["copy"][rows] * textures.shape[1]).long()
    out, rows = images.clone(), move_like(images, rows)
    out[rows] = textures[at[rows], move_like(images, copy)]
    return out


def grayscale(images):
    """(b 3 h w) -> (b 1 h w), ITU-R 601."""
    r, g, b = images.unbind(1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]


def blend(images, other, factor):
    """images (b 3 h w), other (b 1 h w) or (b 1 1 1), factor (b,): 0 is other, 1 is images, beyond is more than images -> (b 3 h w) in [0, 1]."""
    factor = factor[:, None, None, None]
    return (
        (images * factor).add_(other * (1 - factor)).clamp_(0, 1)
    )  # addcmul would take longer than both


def adjust_brightness(images, factor):
    """(b 3 h w), factor (b,) -> (b 3 h w); as contrast and saturation, torchvision's adjust_*."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images, factor):
    return blend(
        images, grayscale(images.mean((2, 3), keepdim=True)), factor
    )  # the mean of the gray is the gray of the mean


def adjust_saturation(images, factor):
    return blend(images, grayscale(images), factor)


def adjust_hue(images, shift):
    """(b 3 h w), shift (b,) as a share of the colour circle -> (b 3 h w): to HSV, turn, and back."""
    r, g, b = images.unbind(1)
    high, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    from_red = (
        (g + b).sub_(r).sub_(low).div_(chroma.clamp(min=1e-8)).add_(1)
    )  # sixths of the circle, 0 to 3: no branch on which is highest
    at = torch.copysign(from_red, g - b).add_(6 * shift[:, None, None])
    at.sub_((at / 6).round_(), alpha=6)  # in [-3, 3]; `%` would be twice as slow
    out = torch.empty_like(images)
    for channel, offset in zip(out.unbind(1), (0, 2, -2)):
        torch.sub(at, offset, out=channel)
    return (
        out.abs_().sub_(3).abs_().clamp_(1, 2).mul_(chroma[:, None]).add_(low.sub_(chroma)[:, None])
    )


JITTER = (
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    adjust_hue,
)  # torchvision's ColorJitter draws their order for each picture


def color(images, draw):
    """Colour jitter in each picture's own order, then grayscale; (b 3 h w) -> (b 3 h w).

    The pictures whose turn it is for an op go together; the draw says on the CPU which, so no GPU is waited for.
    """
    factors, out = (
        {op: move_like(images, draw[op.__name__.removeprefix("adjust_")]) for op in JITTER},
        images.clone(),
    )
    for turn in draw["order"].unbind(1):  # (b,) the op whose turn it is, -1 none
        for i, op in enumerate(JITTER):
            rows = move_like(images, (turn == i).nonzero().squeeze(1))
            out.index_copy_(
                0, rows, op(out.index_select(0, rows), factors[op].index_select(0, rows))
            )
    gray = move_like(images, draw["gray"].nonzero().squeeze(1))
    return out.index_copy_(0, gray, grayscale(out.index_select(0, gray)).expand(-1, 3, -1, -1))


def blur(images, draw):
    """Gaussian blur, edges reflected. sigma is in pixels of a 224-pixel picture and shrinks with it: below 34 pixels nothing is blurred."""
    b, c, h, w = images.shape
    if 2.0 * w / 224 < 0.3:  # no neighbour would weigh 1/255
        return images
    some = draw["blur"].nonzero().squeeze(1)
    rows, cols = (
        gaussian_matrix(move_like(images, draw["sigma"][some]) * w / 224, n) for n in (h, w)
    )
    out, some = images.clone(), move_like(images, some)
    out[some] = separable_matmul(images[some], rows, cols)
    return out


def gaussian_matrix(sigma, n):
    """(b n n): row i weighs the n pixels around pixel i; what falls over an edge is reflected."""
    at = torch.arange(n, device=sigma.device)
    bell = lambda distance: (-0.5 * (distance / sigma[:, None, None]) ** 2).exp()
    mirror = bell(at[:, None] + at) * (at > 0) + bell(2 * (n - 1) - at[:, None] - at) * (at < n - 1)
    weight = bell(at[:, None] - at) + mirror
    return weight / weight.sum(-1, keepdim=True)


# name: (draw, apply), in the order of application. An augmentation of your own is one more row: with --groups=NAME it gets a
# view, a space and a queue. Neighbours with the same `apply` are applied together.
GROUPS = {
    "texture": (sample_texture, texture),
    "crop": (sample_crop, resample),
    "flip": (sample_flip, resample),
    "rotation": (sample_rotation, resample),
    "color": (sample_color, color),
    "blur": (sample_blur, blur),
}


def augment_groups(
    images,
    groups,
    share,
    generator,
    *,
    always=("crop", "flip", "blur"),
    size=None,
    aspect=None,
    textures=None,
    rows=None,
):
    """The query view and the key views of section 3.

    images (b c h w) float in [0, 1]; groups: names in GROUPS; share (v g) bool, True where key view v copies the query's draw
    of group g; `always` are drawn independently for every view: put color there if it is no group, as `train` does, or pictures
    can be matched by their colours; size: of the views, by default h; aspect (b,) width / height before the picture was squashed
    into its canvas; textures (b copy c h w) stylised copies, for the group of that name; rows (first, total): images are rows
    first.. of a global batch of `total`, and get its draws.
    -> query (b c size size), keys (v b c size size), draws {group: {parameter: (1+v b ...)}}, row 0 the query's.
    Raises ValueError for an unknown name, and for the group texture without textures.
    """
    first, total = rows or (0, len(images))
    draws = map_params(
        sample_groups(total, groups, share, generator, always),
        lambda x: x[:, first : first + len(images)],
    )
    at = torch.arange(len(images)).repeat(1 + len(share))
    views = apply_groups(
        images,
        at,
        map_params(draws, lambda x: rearrange(x, "v b ... -> (v b) ...")),
        size,
        aspect,
        textures,
    )
    views = rearrange(views, "(v b) c h w -> v b c h w", b=len(images))
    return views[0], views[1:], draws


def sample_groups(b, groups, share, generator, always):
    """The first half of augment_groups: numbers, no pixels -> {group: {parameter: (1+v b ...)}}, in the order of GROUPS."""
    if unknown := {*groups, *always} - GROUPS.keys():
        raise ValueError(
            f"no such augmentation: {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}"
        )
    draws = {}
    for name in sorted({*groups, *always}, key=list(GROUPS).index):
        flat = GROUPS[name][0]((1 + len(share)) * b, generator)
        draws[name] = {k: rearrange(x, "(v b) ... -> v b ...", b=b) for k, x in flat.items()}
        if name in groups:
            copies = share[:, groups.index(name)].cpu()
            for x in draws[name].values():
                x[1:][copies] = x[0]
    return draws


def map_params(draws, change):
    """`change` of each drawn parameter: {group: {parameter: (v b ...)}} -> the same with change's shapes."""
    return {name: {k: change(x) for k, x in draw.items()} for name, draw in draws.items()}


def apply_groups(images, at, draws, size=None, aspect=None, textures=None):
    """The second half of augment_groups: view i is of picture at[i], by row i of the draws. images (b c h w), at (n,), draws {group: {parameter:
    (n ...)}} -> views (n c size size)."""
    at = move_like(images, at)
    x = images.index_select(0, at)
    more = {
        resample: (size, None if aspect is None else aspect[at]),
        texture: (textures, at),
    }  # what is not drawn
    for apply, names in itertools.groupby(draws, key=lambda name: GROUPS[name][1]):
        x = apply(x, {k: p for name in names for k, p in draws[name].items()}, *more.get(apply, ()))
    if size and x.shape[-2:] != (size, size):  # nothing that resamples was asked for
        x = resample(x, {}, size)
    return x


# ---------------------------------------------------------------- encoder: one trunk, a head for each space


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose training statistics are those of `splits` equal parts of the batch, each on its own.

    With MoCo's shuffled keys this keeps the batch statistics from telling which key belongs to a query, on one device too.
    Running statistics move once a pass, towards the mean over the splits.
    """

    def __init__(self, features, splits=1):
        super().__init__(features)
        self.splits = splits

    def forward(self, x):  # (splits b) f h w
        if not self.training or self.splits == 1:
            return super().forward(x)
        if len(x) % self.splits:
            raise ValueError(
                f"a batch of {len(x)} does not divide into {self.splits} BatchNorm splits"
            )
        mean, var = (
            s.repeat(self.splits, 1) for s in (self.running_mean, self.running_var)
        )  # (splits f)
        parts = [
            F.batch_norm(
                part, mean[i], var[i], self.weight, self.bias, True, self.momentum, self.eps
            )  # moves mean[i], var[i] in place
            for i, part in enumerate(x.chunk(self.splits))
        ]
        self.running_mean.copy_(mean.mean(0))
        self.running_var.copy_(var.mean(0))
        self.num_batches_tracked += 1
        return torch.cat(parts)


def resnet(arch, stem, norm):
    """A torchvision ResNet by name, or `small`: a quarter of ResNet-18's width, one block a stage, for 32x32 on a CPU."""
    if arch == "small":
        block = torchvision.models.resnet.BasicBlock
        net = torchvision.models.ResNet(block, [1, 1, 1, 1], norm_layer=norm)
        net.inplanes = 16
        net.conv1, net.bn1, net.maxpool = (
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
            norm(16),
            nn.Identity(),
        )
        for i in range(4):
            setattr(
                net,
                f"layer{i + 1}",
                net._make_layer(block, 16 << i, 1, stride=2 if i in (1, 2) else 1),
            )
        net.fc = nn.Linear(128, 1)
    else:
        net = torchvision.models.get_model(arch, norm_layer=norm)
    if stem == "cifar":  # SimCLR's stem for small pictures: no striding before layer2
        net.conv1, net.maxpool = (
            nn.Conv2d(3, net.bn1.num_features, 3, padding=1, bias=False),
            nn.Identity(),
        )
    return net


def mlp(v, w1, b1, w2, b2):
    """One space's head, v (b d) -> (b c): 2 layers with ReLU (section 3), or w2 alone if w1 is empty. vmap runs it for all spaces at once."""
    return F.linear(F.relu(F.linear(v, w1, b1)) if len(w1) else v, w2, b2)


class Encoder(nn.Module):
    """Backbone and heads. `tops` are layer4: one that all spaces share ("mlp") or one a space ("conv5", LooC++)."""

    def __init__(
        self,
        arch="resnet50",
        stem="imagenet",
        spaces=1,
        heads="mlp",
        hidden=2048,
        dim=128,
        splits=1,
    ):
        super().__init__()
        norm = partial(SplitBatchNorm2d, splits=splits)
        nets = [resnet(arch, stem, norm) for _ in range(spaces if heads == "conv5" else 1)]
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.trunk = nn.Sequential(
            collections.OrderedDict((name, getattr(nets[0], name)) for name in names)
        )
        self.tops = nn.ModuleList(
            net.layer4 for net in nets
        )  # separately built, or they would start identical
        d = nets[0].fc.in_features
        self.features = d * len(nets)
        self.w1, self.b1 = init_linear(spaces, d, hidden)
        self.w2, self.b2 = init_linear(spaces, hidden or d, dim)

    def forward(self, images):
        x = self.trunk(images)
        v = torch.stack([top(x).mean((2, 3)) for top in self.tops])  # (1 b d), or (s b d)
        z = v.new_zeros(0, len(x), self.w2.shape[1])
        if spaces := len(self.w1):
            z = torch.vmap(mlp)(
                v.expand(spaces, -1, -1), self.w1, self.b1, self.w2, self.b2
            )  # (s b c)
        return rearrange(v, "s b d -> b (s d)"), F.normalize(at_least_float32(z), dim=-1)


def init_linear(spaces, d, out):
    """nn.Linear's own start, once for each space -> weight (s out d), bias (s out). Empty ones take no gradient: ranks would wait for it."""
    bound = d**-0.5
    return [
        nn.Parameter(
            torch.empty(spaces, *shape).uniform_(-bound, bound), requires_grad=spaces * out > 0
        )
        for shape in ((out, d), (out,))
    ]


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def encode(encoder, images):
    """images (b c h w) in [0, 1] -> v (b d) backbone feature, z (s b c) unit norm.

    Normalises by ImageNet's mean and deviation itself. LooC++'s v is the concatenation of its spaces' Conv5, (b (s d)).
    """
    mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return encoder((images - mean) / std)


# ---------------------------------------------------------------- loss and queue


def space_logits(q, k, queue, role, tau):
    """near (s b v): the query against the same image's keys, unused ones -inf; far (s b n): against the queue; positive (s b 1): which key
    view is the positive."""
    q, role = (
        at_least_float32(q) / tau,
        role.to(q.device),
    )  # here, and not on the logits: they are large
    k, queue = k.to(q.dtype), queue.to(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        near = einsum(q, k, "s b c, s v b c -> s b v")
        far = einsum(q, queue, "s b c, s n c -> s b n")
    near = near.masked_fill(rearrange(role == 0, "s v ... -> s (...) v"), -math.inf)
    return near, far, positive_view(role)[:, None, None].expand(-1, near.shape[1], 1)


def multi_space_loss(q, k, queue, role, tau):
    """L_q of section 3 for each space, the mean over images; their mean over spaces is the paper's loss.

    q (s b c), k (s v b c), queue (s n c), all unit norm; role (s v), or (s v b) where it differs by image -> (s,).
    Float32 at least, whatever the autocast.
    """
    near, far, positive = space_logits(q, k, queue, role, tau)
    return (
        torch.logaddexp(near.logsumexp(2), far.logsumexp(2)) - near.gather(2, positive).squeeze(2)
    ).mean(1)


def positive_view(role):
    """role (s v) or (s v b) -> (s,) the one key view that is each space's positive, for every image, and fills its queue."""
    view = (role == 1).int().argmax(1)
    return view if role.ndim == 2 else view[:, 0]


def queue_update(queue, pointer, keys):
    """queue (s n c), pointer to its oldest slot, keys (s b c) -> queue with the keys in it, pointer; b may exceed n."""
    n, b = queue.shape[1], keys.shape[1]
    slots = (pointer + torch.arange(b, device=queue.device))[-n:] % n
    return queue.index_copy(1, slots, keys[:, -n:].to(queue.dtype)), (pointer + b) % n


@torch.no_grad()
def contrast_metrics(q, k, queue, role, tau):
    """How a space is doing, each (s,): how often the positive beats every near and every far negative, and the softmax's
    mass on the near and on the far negatives. Near mass is what pushes a space to keep its group."""
    near, far, positive = space_logits(q, k, queue, role, tau)
    best, near = (
        near.gather(2, positive),
        near.scatter(2, positive, -math.inf),
    )  # (s b 1), and its rivals (s b v)
    near_wins, far_wins = (best > near).all(2), (best > far).all(2)
    _, mass_near, mass_far = (
        torch.cat([best, near, far], 2).softmax(2).split([1, near.shape[2], far.shape[2]], 2)
    )
    return {
        "win": (near_wins & far_wins).float().mean(1),
        "win_near": near_wins.float().mean(1),
        "win_far": far_wins.float().mean(1),
        "mass_near": mass_near.sum(2).mean(1),
        "mass_far": mass_far.sum(2).mean(1),
    }


@torch.no_grad()
def ema(key, query, momentum):
    """The key encoder follows the query encoder: parameters only, as MoCo."""
    torch._foreach_lerp_(list(key.parameters()), list(query.parameters()), 1 - momentum)


# ---------------------------------------------------------------- ranks: one process a device, as torchrun starts them


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_slice(b):
    """This rank's rows of a global batch."""
    return torch.arange(b).chunk(world_size())[rank()]


def all_gather(x):
    """(s v b c) of each rank -> (s v B c), in the order of ranks. No gradient flows back: for keys only."""
    if not dist.is_initialized():
        return x
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())
    ]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, 2)


@torch.no_grad()
def all_reduce_mean(tensors):
    """In place, over ranks; all on one device. -> tensors"""
    if dist.is_initialized():
        flat = all_reduce_sum(torch.cat([x.flatten() for x in tensors])) / world_size()
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(mean.view_as(x))
    return tensors


def all_reduce_sum(x):
    """x summed over ranks, in place; on the CPU or each on its own GPU."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_reduce_max(number):
    """The largest of the ranks' numbers, so that all do the same."""
    if dist.is_initialized():
        dist.all_reduce(
            number := torch.tensor(number), dist.ReduceOp.MAX
        )  # on the CPU, by Gloo: the GPU does not wait for it
    return int(number)


def unwrap_model(module):
    """The module inside DistributedDataParallel."""
    return getattr(module, "module", module)


def wrap_ddp(module):
    """Gradients become their mean over ranks. BatchNorm's running statistics stay apart until they are saved: see `save`."""
    if not dist.is_initialized() or not any(p.requires_grad for p in module.parameters()):
        return module
    wrap = nn.parallel.DistributedDataParallel
    buffers = (
        "forward_sync_buffers"
        if "forward_sync_buffers" in inspect.signature(wrap).parameters
        else "broadcast_buffers"
    )  # its newer name
    return wrap(module, **{buffers: False})


class PeerLost(UserError):
    code = 1


@contextlib.contextmanager
def init_distributed(device, patience=60):
    """Join the other processes that torchrun started, over NCCL between GPUs, Gloo between CPUs; nothing happens without it.

    -> a context in which rank 0 goes first, however long it takes. UserError when one is not there after `patience` seconds, or is lost.
    """
    import data as pixels

    if "WORLD_SIZE" not in os.environ:
        yield contextlib.nullcontext
        return
    try:
        store, me, size = next(
            dist.rendezvous("env://", timeout=datetime.timedelta(seconds=patience))
        )
        store.set(f"rank {me}", "here")
        store.wait([f"rank {i}" for i in range(size)], datetime.timedelta(seconds=patience))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} processes were announced, and not all came within {patience} s "
            f"({pixels.first_line(error)}): start as torchrun does, all of them, with the same MASTER_ADDR and MASTER_PORT"
        ) from None
    gpu = torch.device(device)
    if gpu.type == "cuda":
        torch.cuda.set_device(gpu.index or 0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu.type == "cuda" else "gloo",
        store=store,
        rank=me,
        world_size=size,
    )
    turns = itertools.count()

    @contextlib.contextmanager
    def leader_first():
        turn = f"turn {next(turns)}"
        if me:
            store.wait([turn], datetime.timedelta(days=7))
        yield
        if not me:
            store.set(turn, "done")

    try:
        yield leader_first
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not re.search(
            "gloo|nccl|connection|peer", str(error), re.IGNORECASE
        ):
            raise
        raise PeerLost(
            f"another process was lost: its own last words say why ({pixels.first_line(error)})"
        ) from None
    dist.destroy_process_group()


# ---------------------------------------------------------------- training

# Defaults of a data set; any of them is also a flag. `factors` also serves folders and small sets: minutes on a CPU.
# `imagenet100` is the paper's section 4; factors departs from it so that near negatives weigh among few far ones (a short queue, a low tau) and
# the key encoder keeps up within 1,152 steps (momentum).
RECIPES = {
    "factors": dict(
        arch="small",
        stem="imagenet",
        size=32,
        epochs=18,
        batch=128,
        lr=0.1,
        schedule="cosine",
        queue=128,
        tau=0.1,
        momentum=0.99,
        weight_decay=5e-4,
        hidden=512,
        dim=64,
        splits=8,
    ),
    "imagenet100": dict(
        arch="resnet50",
        stem="imagenet",
        size=224,
        epochs=500,
        batch=256,
        lr=0.03,
        schedule="300,400",
        queue=16384,
        tau=0.2,
        momentum=0.999,
        weight_decay=1e-4,
        hidden=2048,
        dim=128,
        splits=8,
    ),
}


class State(NamedTuple):
    """All that decides what comes next, beside the configuration. "supervised" leaves the key encoder idle, the others the classifier."""

    query: Encoder
    key: Encoder
    classifier: nn.Linear
    optimizer: torch.optim.Optimizer
    queue: torch.Tensor  # (s n c) unit norm
    pointer: int  # the queue's oldest slot
    step: int
    total: torch.Tensor  # (s,) loss summed since the last line of the log


def build_encoder(config, splits=1):
    """The encoder a configuration names, as it starts."""
    method = get_method(config)
    return Encoder(
        config["arch"],
        config["stem"],
        len(method.spaces),
        method.heads,
        config["hidden"],
        config["dim"],
        splits,
    )


def init_state(config, classes=0):
    """State before the first step: the key encoder is a copy of the query's, the queue holds random directions."""
    method = get_method(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        query = build_encoder(config, config["splits"] // world_size())
        classifier = nn.Linear(query.features, classes) if classes else nn.Identity()
        key = build_encoder(
            config, config["splits"] // world_size() * max(len(method.share), 1)
        ).requires_grad_(False)  # statistics per (view, split)
    key.load_state_dict(query.state_dict())
    place = partial(
        nn.Module.to,
        device=config["device"],
        dtype=dtype_of(config),
        memory_format=torch.channels_last,
    )
    query, key, classifier = map(place, (query, key, classifier))
    if config["compile"]:
        query.compile(), key.compile()
    queue = torch.randn(
        len(method.spaces),
        config["queue"],
        config["dim"],
        generator=generator("queue", config["seed"]),
    )
    optimizer = torch.optim.SGD(
        [*query.parameters(), *classifier.parameters()],
        config["lr"],
        0.9,
        weight_decay=config["weight_decay"],
        fused=True,
    )
    return State(
        wrap_ddp(query),
        key,
        wrap_ddp(classifier),
        optimizer,
        F.normalize(queue, dim=-1).to(config["device"], dtype_of(config)),
        0,
        0,
        torch.zeros(max(len(method.spaces), 1), device=config["device"], dtype=dtype_of(config)),
    )


def on_gpu(config):
    return torch.device(config["device"]).type == "cuda"


def dtype_of(config):
    """Of weights and pictures; bfloat16 is autocast's."""
    return torch.float64 if config["precision"] == "float64" else torch.float32


def key_permutation(config, step):
    """(B,) the order in which the key encoder sees the global batch, so that a BatchNorm split does not hold the same images for query and key."""
    return torch.randperm(config["batch"], generator=generator("shuffle", config["seed"], step))


def rank_rows(config, step):
    """What this rank reads of the global batch of B -> its rows (m,), and where among them its queries (b,) and keys (b,) are, b = B / ranks. A
    rank draws the keys that its part of the shuffled order asks for, so no images travel between ranks."""
    queries = rank_slice(config["batch"])
    keys = key_permutation(config, step)[queries]
    rows, where = torch.cat([queries, keys]).unique(return_inverse=True)
    return rows, *where.chunk(2)


def contrastive(query, key, images, aspect, config, step, textures=None):
    """The forward pass of section 3. images (m c h w) in [0, 1], aspect (m,), textures: the rows of the global batch that `needed` names, which
    alone is all of it -> q (s b c), k (s v b c) without gradient, the keys that enter the queue (s B c), role (s v [b]).

    Draws and shuffle are those of the global batch and depend on (seed, step) alone.
    """
    B, method = config["batch"], get_method(config)
    rows, q_at, k_at = rank_rows(config, step)
    at, view = (
        torch.cat([q_at, k_at.repeat(len(method.share))]),
        torch.arange(1 + len(method.share)).repeat_interleave(len(q_at)),
    )
    with (
        torch.inference_mode()
    ):  # no_grad without its bookkeeping: a tenth of the augmenting on a CPU
        draws = sample_groups(
            B,
            method.groups,
            method.share,
            generator("views", config["seed"], step),
            config["always"],
        )
        flat = view * B + rows[at]  # (n,): which of the (v B) draws
        views = apply_groups(
            images,
            at,
            map_params(draws, lambda x: x.flatten(0, 1).index_select(0, flat)),
            config["size"],
            aspect,
            textures,
        )
        q_images, k_images = views[: len(q_at)], views[len(q_at) :]  # (b c h w), ((v b) c h w)
        with autocast(config):
            k = encode(key, k_images)[1]
    with autocast(config):
        q = encode(query, q_images)[1]
    k = all_gather(rearrange(k, "s (v b) c -> s v b c", v=len(method.share)))[
        :, :, move_like(images, key_permutation(config, step).argsort())
    ]
    role = method.role
    if config["drop_equal"] and (role < 0).any():
        role = drop_equal(role, map_params(draws, lambda x: x[:, rank_slice(B)]), method)
    role = role.to(q.device)
    return (
        q,
        k[:, :, move_like(images, rank_slice(B))],
        k[torch.arange(len(k), device=k.device), positive_view(role)],
        role,
    )


def drop_equal(role, draws, method):
    """role (s v) -> (s v b): a near negative that drew the query's own parameters by chance (rotation: often) is not used.
    Our option; the paper does not speak of it. (Of texture: plain pictures only. That two draws mean the same copy is not known here.)"""
    role = repeat(
        role, "s v -> s v b", b=next(iter(draws[method.groups[0]].values())).shape[1]
    ).clone()
    for space, name in enumerate(method.groups, 1):
        same = torch.stack(
            [rearrange(x[1:] == x[0], "v b ... -> v b (...)").all(2) for x in draws[name].values()]
        ).all(0)
        role[space].masked_fill_(same & (role[space] < 0), 0)
    return role


def train_step(state, images, aspect, config, textures=None):
    """One step of LooC or a contrastive baseline: images, aspect, textures as `contrastive` -> State, (loss (s,), q, k, queue, role)."""
    ema(state.key, state.query, config["momentum"])
    q, k, positives, role = contrastive(
        state.query, state.key, images, aspect, config, state.step, textures
    )
    loss = multi_space_loss(q, k, state.queue, role, config["tau"])
    optimizer_step(state.optimizer, loss.mean())
    queue, pointer = queue_update(state.queue, state.pointer, positives)
    return state._replace(queue=queue, pointer=pointer, step=state.step + 1), (
        loss.detach(),
        q.detach(),
        k,
        state.queue,
        role,
    )


def supervised_step(state, images, aspect, labels, config, textures=None):
    """The supervised baseline: the query's augmentations, cross-entropy on labels (b,), or on the rotation drawn if None."""
    method = get_method(config)
    images, _, draws = augment_groups(
        images,
        method.groups,
        method.share,
        generator("views", config["seed"], state.step),
        always=config["always"],
        size=config["size"],
        aspect=aspect,
        textures=textures,
        rows=(rank() * len(images), config["batch"]),
    )
    labels = draws["rotation"]["turns"][0].to(images.device) if labels is None else labels
    with autocast(config):
        logits = state.classifier(encode(state.query, images)[0])
    loss = F.cross_entropy(at_least_float32(logits), labels)
    optimizer_step(state.optimizer, loss)
    return state._replace(step=state.step + 1), (loss.detach()[None],)


def optimizer_step(optimizer, loss):
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def tune_malloc():
    """glibc gives a large block back to the system when it is freed, and the next one is faulted in page by page: small operations on a
    CPU can take five times as long as they must. Keep up to 1 GiB instead."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at most 32 MiB


def autocast(config):
    return torch.autocast(
        torch.device(config["device"]).type,
        torch.bfloat16,
        enabled=config["precision"] == "bfloat16",
    )


def learning_rate(config, epoch):
    """At a fractional epoch: "cosine", or x0.1 at each epoch listed ("300,400")."""
    if config["schedule"] == "cosine":
        return config["lr"] * (1 + math.cos(math.pi * epoch / config["epochs"])) / 2
    return config["lr"] * 0.1 ** sum(epoch >= float(at) for at in config["schedule"].split(","))


def train(
    method: str = "looc",
    groups: tuple = ("color", "rotation"),
    data: str = "factors",
    *,
    root: str = None,
    out: str = None,
    recipe: str = None,
    always: tuple = ("crop", "flip", "blur", "color"),
    same: tuple = ("rotation",),
    label: str = None,
    download: bool = False,
    arch: str = None,
    stem: str = None,
    size: int = None,
    canvas: int = None,
    epochs: int = None,
    batch: int = None,
    lr: float = None,
    schedule: str = None,
    queue: int = None,
    tau: float = None,
    momentum: float = None,
    weight_decay: float = None,
    hidden: int = None,
    dim: int = None,
    splits: int = None,
    drop_equal: bool = False,
    save_every: int = None,
    seed: int = 0,
    workers: int = 2,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    cache: str = "auto",
    packed: str = None,
    textures: str = None,
    fresh: bool = False,
):
    """Train an encoder: LooC, LooC++, or one of the paper's baselines (its section 3 and 4).

    What is left out comes from the data set's row of RECIPES. The run folder holds config.json, log.jsonl, views.png,
    checkpoint.pt, backbone.pt (torchvision's names) and heads.pt; a run that was stopped goes on from its checkpoint.

    Args:
        method: looc, looc++, moco, moco_same, moco++ or supervised; see `python loo.py methods`
        groups: augmentation groups, one space each; with moco, what it is made invariant to
        data: factors (drawn by code), folder, imagenet100 or another of the paper's sets (python data.py check), or torchvision's, such as cifar10
        root: where the data is
        out: run folder, by default runs/METHOD-GROUPS-DATA
        recipe: whose defaults to take, by default the data set's own, else those of factors
        always: augmentations drawn independently for every view, without a space; a named group leaves this list
        same: moco_same only: groups of which query and key share the draw
        label: supervised only: the label to learn, or rotation
        download: let torchvision fetch the data
        arch: small, or a torchvision ResNet such as resnet18
        stem: imagenet, or cifar for small pictures
        size: side of a view in pixels
        canvas: side of the stored pictures
        epochs: passes over the data
        batch: pictures a step
        lr: learning rate at the start
        schedule: cosine, or the epochs at which lr falls to a tenth, as 300,400
        queue: keys kept in each space
        tau: temperature
        momentum: of the key encoder
        weight_decay: of SGD
        hidden: width of a head's hidden layer; 0: the heads are linear
        dim: of a space
        splits: parts of the batch with BatchNorm statistics of their own; 1 turns it off
        drop_equal: do not use as negative a view that drew the query's parameters by chance
        save_every: steps between checkpoints, by default a tenth of the training
        seed: of everything random
        workers: processes that decode pictures
        device: auto, cpu or cuda
        precision: auto, float32, bfloat16, or float64 (to check that two runs are the same)
        compile: torch.compile the encoders: minutes before the first step, then faster on some devices; see `bench --compile`
        cache: where the decoded pictures are: device, host (memory), none (a memory map on disk), or auto
        packed: the folder that `python data.py pack` wrote, by default the one that the run folder lies in
        textures: the folder that `python data.py stylize` wrote, for the group texture; factors makes its own
        fresh: start over; a run already in the folder is moved aside
    """
    config = make_config(**locals())
    import data as pixels

    tune_malloc()
    out = Path(config["out"])
    with init_distributed(config["device"]) as leader_first, contextlib.ExitStack() as held:
        with leader_first():
            found = pixels.load_dataset(
                data,
                "train" if method == "supervised" else "pretrain",
                root=root,
                size=config["size"],
                canvas=canvas,
                seed=seed,
                download=download,
                workers=workers,
                cache=packed or out.parent,
                shared=world_size() > 1 or cache == "none" or bool(packed),
                texture="texture" in config["groups"] + config["always"],
                textures=textures,
                device=config["device"],
            )
            found, kept = place_dataset(found, config)
            labels, classes, config["label"] = training_labels(found, config)
            n, batch = len(found.images), config["batch"]
            if n < batch:
                raise UserError(
                    f"--batch={batch} is more than the {n} training pictures of {root or data}: take a smaller multiple of "
                    f"--splits={config['splits']}, two times that at least"
                )
            if rank() == 0:
                if fresh and out.exists():
                    with lock_folder(out):
                        print(f"moved the run that was there to {move_aside(out)}")
                held.enter_context(lock_folder(out))
        asked = held.enter_context(catch_signals())
        state = load_checkpoint(init_state(config, classes), config, out)
        all_reduce_max(0)  # all have read what was there
        if rank() == 0:
            if state.step == 0:
                pixels.write_atomic(out / "config.json", dumps(config, indent=1).encode())
                save_views(found, config, out / "views.png")
            link_latest(out)
            log = [line for line in read_jsonl(out / "log.jsonl") if line["step"] <= state.step]
            pixels.write_atomic(
                out / "log.jsonl", "".join(dumps(line) + "\n" for line in log).encode()
            )
            print_header(state, config, found, kept)
        begun = time.perf_counter()
        query = train_loop(state, found, labels, config, out, asked).query
        if rank() == 0:
            export(query, out)
            print(
                f"trained in {time.perf_counter() - begun:.0f} s; wrote {out}: backbone.pt, heads.pt, checkpoint.pt, log.jsonl, config.json, views.png\n"
                f"next: python eval.py {'fewshot' if pixels.label_names(found.classes) else 'rotation'}"
                + ("" if out.resolve() == Path("runs/latest").resolve() else f" --run={out}")
            )


def print_header(state, config, found, kept):
    """The first lines of a run."""
    import data as pixels

    n, batch, out, spaces = (
        len(found.images),
        config["batch"],
        config["out"],
        get_method(config).spaces,
    )
    steps, among = (
        config["epochs"] * (n // batch),
        f" on {world_size()} processes" if world_size() > 1 else "",
    )
    if state.step:
        print(
            f"{out} is trained already; --fresh starts over"
            if state.step == steps
            else f"resuming {out} at step {state.step}{among}",
            flush=True,
        )
    else:
        place = {"device": "on the device", "host": "in memory", "none": "on disk"}[kept]
        known = pixels.label_names(found.classes)
        labels = (
            f", {len(found.classes['class'])} classes"
            if "class" in known
            else ""
            if known
            else ", no labels"
        )
        print(
            f"{config['method']} on {config['data']}: {n} training pictures {place}{labels}; {config['arch']} on views of {config['size']} pixels, {steps} steps "
            f"of {batch}{among}, spaces {', '.join(spaces) or config['label']}; {config['device']}, {config['precision']}; see {out}/views.png",
            flush=True,
        )
    if spaces and not state.step:
        print(
            f"the queue holds random directions until step {-(-config['queue'] // batch)}, then {config['queue']} keys a space",
            flush=True,
        )
    if spaces and config["queue"] > n:
        print(
            f"warning: --queue={config['queue']} is more than the {n} pictures: it holds keys of the query's own picture as negatives; take a smaller one",
            file=sys.stderr,
        )


def batch_rows(config, n, first, steps):
    """The rows of the data that this rank reads, step by step."""
    import data as pixels

    for at in range(first, steps):
        epoch, i = divmod(at, n // config["batch"])
        if i == 0 or at == first:
            order = pixels.epoch_batches(n, config["batch"], config["seed"], epoch)
        yield order[i][
            rank_slice(config["batch"])
            if config["method"] == "supervised"
            else rank_rows(config, at)[0]
        ]


def get_batch(found, config, rows):
    """-> rows, and on the training device images (m 3 h w) in [0, 1], aspect (m,), textures (m copy 3 h w) or None; bytes travel, not floats."""

    def place(some):
        some = some.index_select(0, rows.to(some.device))
        pinned = some.pin_memory() if on_gpu(config) and not some.is_cuda else some
        return pinned.to(config["device"], non_blocking=True).to(dtype_of(config))

    return (
        rows,
        place(found.images) / 255,
        place(found.aspect),
        None if found.textures is None else place(found.textures) / 255,
    )


def prefetch(function, items):
    """map, but a thread computes the next one while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2:
                yield waiting.popleft().result()
        yield from (one.result() for one in waiting)


def place_dataset(found, config):
    """The pictures where --cache says: on the "device", by default if they take less than half of its free memory; in the "host"'s memory, by
    default below 4 GiB and on one process; or "none", a memory map on disk -> Data, and which it is."""
    cache, mapped = config["cache"], found.images.is_shared()
    if cache == "auto":
        size = sum(x.numel() for x in (found.images, found.textures) if x is not None)
        fits = on_gpu(config) and size < torch.cuda.mem_get_info(config["device"])[0] / 2
        cache = "device" if fits else "none" if mapped else "host"
    if cache == "none" and not mapped:  # factors: drawn, never on disk
        cache = "host"

    def move(x):
        if x is None or cache == "none":
            return x
        return x.to(config["device"]) if cache == "device" else x.clone() if x.is_shared() else x

    return found._replace(images=move(found.images), textures=move(found.textures)), cache


class NonFiniteError(UserError):
    code = 3


def train_loop(state, found, labels, config, out, asked):
    """The steps that are left -> State; labels (n,) of "supervised", else None. Logs to out/log.jsonl and saves to out/checkpoint.pt.

    A signal in `asked` ends it with a last checkpoint. NotFinite, before anything is saved, when loss or weights are not.
    """
    n, batch = len(found.images), config["batch"]
    per_epoch = n // batch
    steps, first, begun = config["epochs"] * per_epoch, state.step, time.perf_counter()
    every = max(1, steps // 200)
    save_every, spaces = config["save_every"] or 20 * every, get_method(config).spaces
    logged_at, logged_step = begun, first
    one_ahead = (
        prefetch if on_gpu(config) else map
    )  # on a CPU a second thread would only be in the way
    for rows, images, aspect, textures in one_ahead(
        partial(get_batch, found, config), batch_rows(config, n, first, steps)
    ):
        lr_now = state.optimizer.param_groups[0]["lr"] = learning_rate(
            config, state.step / per_epoch
        )
        if config["method"] == "supervised":
            state, (loss,) = supervised_step(
                state,
                images,
                aspect,
                None if labels is None else labels[rows].to(config["device"]),
                config,
                textures,
            )
        else:
            state, (loss, *compared) = train_step(state, images, aspect, config, textures)
        state = state._replace(total=state.total + loss)
        number = all_reduce_max(asked[0] if asked else 0)
        saving = state.step % save_every == 0 or state.step == steps or number
        logging = state.step % every == 0 or state.step == steps
        if saving or logging:
            all_reduce_mean([state.total])
            check_finite(state, out)
        if logging:
            line = {
                "step": state.step,
                "loss": (state.total / ((state.step - 1) % every + 1)).tolist(),
            }  # the sum may begin before a resume
            line |= {"unreadable": len(found.missing)} if found.missing else {}
            if spaces:
                watched = contrast_metrics(*compared, config["tau"])
                line |= {
                    k: x.tolist() for k, x in zip(watched, all_reduce_mean([*watched.values()]))
                }
            now = time.perf_counter()
            line |= {
                "lr": lr_now,
                "images_per_s": batch * (state.step - logged_step) / (now - logged_at),
                "seconds_left": (now - begun) / (state.step - first) * (steps - state.step),
            }
            logged_at, logged_step, state = (
                now,
                state.step,
                state._replace(total=torch.zeros_like(state.total)),
            )
            if rank() == 0:
                with open(out / "log.jsonl", "a") as file:
                    file.write(dumps(line) + "\n")
                log_line(
                    line,
                    spaces or (config["label"],),
                    steps,
                    last=state.step == steps,
                    plain=state.step % (20 * every) == 0,
                )
        if saving:
            save_checkpoint(state, config, out)
        if number and state.step < steps:
            if rank() == 0:
                launch = (
                    ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
                    if world_size() > 1
                    else ["python"]
                )
                print(
                    f"stopped by {signal.Signals(number).name} at step {state.step}, all is saved\nresume with: "
                    + shlex.join(
                        [*launch, *(word for word in sys.argv if not word.startswith("--fresh"))]
                    ),
                    flush=True,
                )
            raise SystemExit(128 + number)
    return state


@torch.no_grad()
def check_finite(state, out):
    """NotFinite if a loss or a weight is not finite."""
    weights = (
        torch.stack(torch._foreach_norm(list(state.query.parameters()))).sum() + state.total.sum()
    )
    if not math.isfinite(weights):
        kept = out / "checkpoint.pt"
        raise NonFiniteError(
            f"the loss or a weight is not finite at step {state.step}: lower --lr, raise --tau, or take --precision=float32; "
            + (
                f"{kept} holds the last good step"
                if kept.exists()
                else "no checkpoint was written yet"
            )
        )


@contextlib.contextmanager
def catch_signals():
    """A list that SIGTERM, SIGINT, SIGHUP and SLURM's SIGUSR1 append themselves to, instead of ending the program in the middle of a step."""
    asked, old = [], {}
    if threading.current_thread() is threading.main_thread():
        numbers = [
            getattr(signal, name)
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
            if hasattr(signal, name)
        ]
        old = {
            number: signal.signal(number, lambda number, _: asked.append(number))
            for number in numbers
            if signal.getsignal(number) != signal.SIG_IGN
        }  # as nohup ignores SIGHUP
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lock_folder(out):
    """One trainer a run folder: a lock on it that dies with its process."""
    out.mkdir(parents=True, exist_ok=True)
    if not fcntl:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {out}: wait for it, or name another --out"
            ) from None
        yield
    finally:
        os.close(folder)


def make_config(
    *,
    method,
    groups,
    data,
    recipe,
    out,
    always,
    same,
    label,
    device,
    precision,
    cache,
    packed,
    fresh,
    **flags,
):
    """The flags of `train` checked, and what they leave out filled in from the recipe -> config, plain data. (packed and fresh are not of it.)"""
    import data as pixels

    pixels.check_choice("method", method, tuple(methods(())))
    pixels.check_choice("data", data, pixels.NAMES)
    for name in (*groups, *always, *same):
        pixels.check_choice(
            "groups" if name in groups else "always" if name in always else "same",
            name,
            tuple(GROUPS),
        )
    if len(set(groups)) < len(groups):
        raise UserError(f"--groups={','.join(groups)} names a group twice")
    if method == "moco_same" and not set(same) & set(groups):
        raise UserError(
            f"--same={','.join(same)}: none of --groups={','.join(groups)}, so there is nothing for query and key to share"
        )
    if not groups and method in ("looc", "looc++"):
        raise UserError(
            f"--method={method} leaves one group out: name at least one, as in --groups=color,rotation"
        )
    recipe = pixels.check_choice(
        "recipe", recipe or (data if data in RECIPES else "factors"), tuple(RECIPES)
    )
    config = dict(
        method=method,
        groups=list(groups),
        data=data,
        recipe=recipe,
        always=[a for a in always if a not in groups],
        same=list(same),
        label=label,
        **{k: RECIPES[recipe].get(k) if v is None else v for k, v in flags.items()},
    )
    config["device"] = pixels.resolve_device(device)
    pixels.check_choice("precision", precision, ("auto", "float32", "bfloat16", "float64"))
    config["precision"] = (
        precision
        if precision != "auto"
        else "bfloat16"
        if fast_bfloat16(config["device"])
        else "float32"
    )
    config["cache"] = pixels.check_choice("cache", cache, ("auto", "device", "host", "none"))
    if packed and not Path(packed).is_dir():
        raise UserError(
            f"--packed={packed}: no such folder; `python data.py pack --data={data} --root=DIR --out={packed}` writes it"
        )
    config["root"], config["textures"] = (
        flags[name] and str(Path(flags[name]).resolve()) for name in ("root", "textures")
    )
    config["out"] = out or f"runs/{method}-{'+'.join(groups) or 'none'}-{data}"
    pixels.check_choice(
        "arch",
        config["arch"],
        (
            "small",
            *(a for a in torchvision.models.list_models(module=torchvision.models) if "resne" in a),
        ),
    )
    pixels.check_choice("stem", config["stem"], ("imagenet", "cifar"))
    if data == "factors" and flags["canvas"]:
        raise UserError(
            f"--canvas={flags['canvas']}: factors is drawn as large as it is seen, at --size"
        )
    for flag in (
        "size",
        "epochs",
        "batch",
        "lr",
        "queue",
        "tau",
        "dim",
        "splits",
        "canvas",
        "save_every",
    ):
        if config[flag] is not None and not config[flag] > 0:
            raise UserError(f"--{flag}={config[flag]}: expected more than 0")
    for flag in ("weight_decay", "hidden", "workers"):
        if config[flag] < 0:
            raise UserError(f"--{flag}={config[flag]}: expected 0 or more")
    if config["textures"] and (
        data == "factors" or "texture" not in config["groups"] + config["always"]
    ):
        raise UserError(
            f"--textures={flags['textures']}: name the group that reads it, as in --groups=color,texture; factors makes its own copies"
        )
    if data == "folder" and config["root"]:
        pixels.forbid_inside("out", config["out"], config["root"])
    if Path(config["out"]).is_file():
        raise UserError(f"--out={config['out']} is a file; name a folder")
    if not 0 <= config["momentum"] <= 1:
        raise UserError(
            f"--momentum={config['momentum']}: expected 0 to 1; it is the key encoder's, not SGD's"
        )
    if config["batch"] % config["splits"] or config["batch"] == config["splits"]:
        raise UserError(
            f"--batch={config['batch']} does not divide into --splits={config['splits']} parts of two pictures or more"
        )
    if config["splits"] % (world := int(os.environ.get("WORLD_SIZE", 1))):
        raise UserError(
            f"--splits={config['splits']} does not divide among {world} processes: the parts of a batch with BatchNorm statistics of their "
            f"own belong to the recipe, not to the machine; start a number that divides, or change --splits"
        )
    try:
        learning_rate(config, 0.0)
    except ValueError:
        raise UserError(
            f"--schedule={config['schedule']}: expected cosine, or epochs with commas between, as 300,400"
        ) from None
    return config


def default_config(**flags):
    """The configuration that `train` makes of these flags."""
    return make_config(
        **{name: p.default for name, p in inspect.signature(train).parameters.items()} | flags
    )


def training_labels(found, config):
    """-> labels (n,) or None, how many classes, and the label's name: of "supervised" alone. label "rotation" is drawn with the query."""
    import data as pixels

    if config["method"] != "supervised":
        return None, 0, config["label"]
    known = (*pixels.label_names(found.classes), "rotation")
    label = pixels.check_choice("label", config["label"] or known[0], known)
    if label == "rotation" and "rotation" not in config["groups"]:
        raise UserError("--label=rotation: name rotation in --groups, so that it is drawn")
    return (
        (None, 4, label)
        if label == "rotation"
        else (found.labels[label], len(found.classes[label]), label)
    )


def fast_bfloat16(device):
    """Whether bfloat16 is faster than float32 on this device: GPUs of Ampere or later, CPUs with AVX-512 bf16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def save_views(found, config, path):
    """Rows of the query and key views of a few pictures, each named by its space and what it shares with the query."""
    import data as pixels

    n, method = len(found.images), get_method(config)
    some = torch.linspace(0, n - 1, min(12, n)).long()  # of all classes, where they lie in order
    images, aspect, textures = (
        None if x is None else x[some.to(x.device)].cpu()
        for x in (found.images, found.aspect, found.textures)
    )
    images, textures = images.float() / 255, None if textures is None else textures.float() / 255
    query, keys, _ = augment_groups(
        images,
        method.groups,
        method.share,
        generator("views", config["seed"], 0),
        always=config["always"],
        size=config["size"],
        aspect=aspect,
        textures=textures,
    )
    shared = [
        " + ".join(g for g, same in zip(method.groups, row) if same) or "nothing"
        for row in method.share.tolist()
    ]
    spaces = [
        ", ".join(name for name, row in zip(method.spaces, method.role.tolist()) if row[v] == 1)
        for v in range(len(shared))
    ]
    rows = [
        "query",
        *(f"key of space {names}: shares {groups}" for names, groups in zip(spaces, shared)),
    ]
    pixels.image_grid(
        torch.cat([query[None], keys]),
        rows,
        [""] * len(some),
        path,
        zoom=max(1, 64 // config["size"]),
    )


def log_line(line, spaces, steps, last, plain):
    """One progress line: rewritten in place on a terminal, now and then elsewhere."""
    each = lambda key, form: " ".join(
        f"{name} {value:{form}}" for name, value in zip(spaces, line[key])
    )
    left = time.strftime(
        "%H:%M:%S" if line["seconds_left"] >= 3600 else "%M:%S", time.gmtime(line["seconds_left"])
    )
    text = (
        f"step {line['step']}/{steps}  loss {each('loss', '.2f')}"
        + (f"  wins {each('win', '.0%')}" if "win" in line else "")
        + f"  lr {line['lr']:.3g}  {line['images_per_s']:.0f} images/s  {left} left"
    )
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if last else "", flush=True)
    elif plain or last:
        print(text, flush=True)


# ---------------------------------------------------------------- the run folder


def read_jsonl(path):
    """The lines of a JSONL file; one that was cut short is left out."""
    lines = []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            lines.append(loads(text))
        except ValueError:
            print(f"warning: {path}, line {number} is not whole and left out", file=sys.stderr)
    return lines


VERSION = 1  # of checkpoints


def save_checkpoint(state, config, out):
    """checkpoint.pt, whole or not at all; the one before becomes checkpoint.old.pt. Rank 0 writes.

    Running statistics are linear in the batches', so their mean over ranks could wait until now.
    """
    import data as pixels

    all_reduce_mean(
        [x for part in (state.query, state.key) for x in part.buffers() if x.is_floating_point()]
    )
    if rank():
        return
    parts = {
        k: unwrap_model(v).state_dict() if hasattr(v, "state_dict") else v
        for k, v in state._asdict().items()
    }
    buffer = io.BytesIO()
    torch.save(
        {
            **parts,
            "config": config,
            "version": VERSION,
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
        },
        buffer,
    )
    pixels.write_atomic(out / "checkpoint.pt", buffer.getvalue(), keep=out / "checkpoint.old.pt")


def load_checkpoint(state, config, out):
    """The state saved in the run folder, or the one given where there is none. A run with other settings is a UserError."""
    there = [path for path in (out / "checkpoint.pt", out / "checkpoint.old.pt") if path.exists()]
    if not there:
        if (out / "config.json").exists() or not any(out.iterdir()):
            return state
        raise UserError(f"--out={out} is not empty and holds no run: name another folder")
    saved = next(filter(None, (read_checkpoint(path, config["device"]) for path in there)), None)
    if not saved:
        raise UserError(
            f"{there[0]} cannot be read: start over with --fresh, which keeps the folder under another name"
        )
    check_same_config(config, saved["config"], out)
    for part in ("query", "key", "classifier", "optimizer"):
        unwrap_model(getattr(state, part)).load_state_dict(saved[part])
    return state._replace(**{k: saved[k] for k in ("queue", "pointer", "step", "total")})


def check_same_config(config, saved, out):
    """UserError where what is saved in the run folder `out` was trained with other settings."""
    free = {
        "device",
        "precision",
        "workers",
        "download",
        "out",
        "save_every",
        "cache",
        "compile",
    }  # may change without changing what is trained
    other = [
        f"--{k}={v} (the run has {saved.get(k)})"
        for k, v in config.items()
        if k not in free and saved.get(k) != v
    ]
    if other:
        raise UserError(
            f"{out} holds a run with other settings: {', '.join(other)}; name another --out, or start over with --fresh"
        )


def read_checkpoint(path, device):
    """A checkpoint of this version, or None and a warning that says why not."""
    import data as pixels

    try:
        saved = pixels.read_tensors(path, device)
        if not isinstance(saved, dict) or saved.get("version") != VERSION:
            raise UserError(
                f"{path} is no checkpoint that this program can read: it writes version {VERSION}"
            )
        return saved
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)


def move_aside(out):
    """Rename a run folder to the first free name.1, name.2, ... -> its new path."""
    aside = next(
        p for i in itertools.count(1) if not (p := out.with_name(f"{out.name}.{i}")).exists()
    )
    return out.rename(aside)


def link_latest(out):
    """runs/latest points at the last run."""
    link = Path("runs/latest")
    link.parent.mkdir(exist_ok=True)
    if link.is_symlink() or not link.exists():
        own_link = link.with_name(f"latest.{os.getpid()}")
        own_link.symlink_to(os.path.relpath(out, link.parent), target_is_directory=True)
        os.replace(own_link, link)  # at once: another run may start at the same moment


def export(encoder, out):
    """backbone.pt: a plain state dict in torchvision's names (for conv5 heads with Z_0's layer4); heads.pt: every layer4 and the heads."""
    import data as pixels

    state = {k: v.cpu() for k, v in unwrap_model(encoder).state_dict().items()}
    backbone = {k.removeprefix("trunk."): v for k, v in state.items() if k.startswith("trunk.")}
    backbone |= {
        k.replace("tops.0.", "layer4."): v for k, v in state.items() if k.startswith("tops.0.")
    }
    pixels.write_tensors(out / "backbone.pt", backbone)
    pixels.write_tensors(
        out / "heads.pt", {k: v for k, v in state.items() if not k.startswith("trunk.")}
    )


def load_encoder(run, device="cpu"):
    """The trained encoder of a run folder, in eval mode, and its config."""
    import data as pixels

    run = Path(run)
    for name in ("config.json", "backbone.pt", "heads.pt"):
        if not (run / name).exists():
            if (run / "checkpoint.pt").exists():
                raise UserError(
                    f"{run} has not finished training: give its command again, it goes on where it was"
                )
            raise UserError(
                f"{run / name}: no such file; name a folder that `python loo.py train` has finished, with --run=DIR"
            )
    try:
        config = loads((run / "config.json").read_text())
        state = pixels.read_tensors(run / "heads.pt")
        state |= {
            f"trunk.{k}": v
            for k, v in pixels.read_tensors(run / "backbone.pt").items()
            if not k.startswith("layer4.")
        }
        encoder = build_encoder(config)
        encoder.load_state_dict(state)
    except (
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ValueError,
    ) as error:  # UserError is a ValueError
        raise UserError(
            f"{run} holds no run of ours, or a file that is not whole ({pixels.first_line(error)}); the command it was trained with mends it "
            "from its checkpoint"
        ) from None
    return encoder.eval().to(device, memory_format=torch.channels_last), config


def show_methods(groups: tuple = ("color", "rotation"), same: tuple = ("rotation",)):
    """Print the methods as a table: which key view shares which group with the query, and what it is to each space."""
    import data as pixels

    for name in (*groups, *same):
        pixels.check_choice("groups" if name in groups else "same", name, tuple(GROUPS))
    print(
        f"groups: {', '.join(groups)}\n\n| method | share (key view x group) | role (space x key view) | heads | feature |\n|---|---|---|---|---|"
    )
    for name, m in methods(groups, same).items():
        feature = "all spaces" if m.heads == "conv5" else "v"
        print(f"| {name} | {m.share.int().tolist()} | {m.role.tolist()} | {m.heads} | {feature} |")


# ---------------------------------------------------------------- speed


def bench_phases(config):
    """What `bench` times, {name: a function of no argument}: the phases of a step, "step" (all of them in turn) and "network": the encoder
    alone, forward and backward of one batch and a bare forward for each key view."""
    import data as pixels

    method, b, device = get_method(config), config["batch"], config["device"]
    state = init_state(config)
    bare_key = build_encoder(config, config["splits"]).to(
        device, dtype_of(config), memory_format=torch.channels_last
    )
    if config["compile"]:
        bare_key.compile()
    canvas = round(config["size"] / pixels.crop_pct(config["data"]))
    noise = lambda *shape: torch.randint(
        256, shape, dtype=torch.uint8, generator=generator("bench")
    )
    found, _ = place_dataset(
        pixels.ImageSet(
            noise(2 * b, 3, canvas, canvas),
            torch.ones(2 * b),
            {},
            {},
            textures=noise(2 * b, 1, 3, canvas, canvas) if "texture" in method.groups else None,
        ),
        config,
    )
    images = torch.rand(b, 3, config["size"], config["size"], generator=generator("bench")).to(
        device, dtype_of(config)
    )
    get = lambda: get_batch(found, config, torch.arange(b) * 2)
    _, canvases, aspect, textures = get()
    views = lambda: augment_groups(
        canvases,
        method.groups,
        method.share,
        generator("views", 0, 0),
        always=config["always"],
        size=config["size"],
        aspect=aspect,
        textures=textures,
    )
    q, k, positives, role = (
        x.detach()
        for x in contrastive(state.query, state.key, canvases, aspect, config, 0, textures)
    )

    def query():
        with autocast(config):
            z = encode(state.query, images)[1]
        z.sum().backward()

    @torch.no_grad()
    def forward(encoder, times):
        with autocast(config):
            encode(encoder, images.repeat(times, 1, 1, 1))

    def network():
        query()
        for _ in method.share:
            forward(bare_key, 1)

    def loss():
        z = q.clone().requires_grad_()
        multi_space_loss(z, k, state.queue, role, config["tau"]).mean().backward()

    def whole():
        nonlocal state
        _, images, aspect, textures = get()
        state, _ = train_step(state, images, aspect, config, textures)

    as_step = torch.inference_mode()  # the network alone has no_grad
    return {
        "fetch": get,
        "augment": as_step(views),
        "query": query,
        "keys": as_step(lambda: forward(state.key, len(method.share))),
        "loss": loss,
        "queue": lambda: queue_update(state.queue, 0, positives),
        "ema": lambda: ema(state.key, state.query, config["momentum"]),
        "optimizer": state.optimizer.step,
        "step": whole,
        "network": network,
    }


def bench(
    method: str = "looc",
    groups: tuple = ("color", "rotation"),
    *,
    recipe: str = "factors",
    arch: str = None,
    size: int = None,
    batch: int = None,
    queue: int = None,
    splits: int = None,
    steps: int = 31,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    json: bool = False,
):
    """Time the phases of a training step, and the whole of it against its network alone: the same encoder, forward and backward of a batch
    and a forward without gradient for each key view. Medians and quartiles of runs that alternate.

    Args:
        method: a contrastive one
        groups: augmentation groups
        recipe: whose defaults to take: factors, or imagenet100 (ResNet-50, 224 pixels, batch 256)
        arch: small, or a torchvision ResNet
        size: side of a view in pixels
        batch: pictures a step
        queue: keys kept in each space
        splits: parts of the batch with BatchNorm statistics of their own
        steps: how often everything is timed
        device: auto, cpu or cuda
        precision: auto, float32 or bfloat16
        compile: with torch.compile, whose time to warm up is printed
        json: print one JSON line and nothing else
    """
    given = {k: v for k, v in locals().items() if k not in ("steps", "json")}
    if method == "supervised" or steps < 2:
        raise UserError(
            f"--method={method} --steps={steps}: expected a contrastive method and two steps or more"
        )
    tune_malloc()
    config = default_config(**given, data=recipe)
    wait = partial(torch.cuda.synchronize, config["device"]) if on_gpu(config) else lambda: None
    begun, times, runs = time.perf_counter(), {}, bench_phases(config)
    runs["step"](), runs["network"](), wait()
    warm, memory = (
        time.perf_counter() - begun,
        torch.cuda.max_memory_allocated(config["device"]) / 2**30 if on_gpu(config) else None,
    )
    fewer = method in ("looc", "looc++") and len(groups) > 1
    if fewer:
        runs["one group less"] = bench_phases(
            default_config(**given | {"data": recipe, "groups": groups[:-1]})
        )["step"]
    for i in range(steps + 3):  # the first backward passes are slow
        for name, run in runs.items():
            wait()
            begun = time.perf_counter()
            run()
            wait()
            times.setdefault(name, []).append((time.perf_counter() - begun) * 1e3)
    times = {name: torch.tensor(some[3:]) for name, some in times.items()}
    quartiles = {
        name: some.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        for name, some in times.items()
    }
    ratio = (times["step"] / times["network"]).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    from torch.utils.flop_counter import (
        FlopCounterMode,
    )  # half a second that no other command should pay

    with FlopCounterMode(display=False) as counter:
        runs["network"]()
    line = dict(
        ratio=ratio[1],
        step_ms=quartiles["step"][1],
        network_ms=quartiles["network"][1],
        images_per_s=config["batch"] / quartiles["step"][1] * 1e3,
        peak=counter.get_total_flops() / quartiles["step"][1] / 1e9 / peak_tflops(config),
        method=method,
        arch=config["arch"],
        size=config["size"],
        batch=config["batch"],
        groups=list(groups),
        queue=config["queue"],
        steps=steps,
        dtype=config["precision"],
        compile=compile,
        warm_up_s=warm,
        memory_gib=memory,
        torch=str(torch.__version__),
        device=torch.cuda.get_device_name(config["device"])
        if on_gpu(config)
        else f"{torch.get_num_threads()} CPU threads",
    )
    if fewer:
        line["group_ms"] = (times["step"] - times["one group less"]).median().item()
    if json:
        print(dumps(line))
        return
    print("| phase | ms | quartiles |\n|---|---|---|")
    for name, (low, middle, high) in quartiles.items():
        print(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    print(
        f"\nwarm-up: {warm:.1f} s; step / network: {ratio[1]:.3f} ({ratio[0]:.3f} to {ratio[2]:.3f}, {steps} pairs); "
        f"{line['images_per_s']:.0f} images/s, {line['peak']:.0%} of the matrix products that {line['device']} can do in {line['dtype']}"
        + (f"; the last group costs {line['group_ms']:.1f} ms" if fewer else "")
    )


def peak_tflops(config):
    """Of a large matrix product here, in TFLOP/s."""
    n = 8192 if on_gpu(config) else 1024
    a = torch.randn(
        n,
        n,
        device=config["device"],
        dtype=torch.bfloat16 if config["precision"] == "bfloat16" else dtype_of(config),
    )
    seconds = []
    for _ in range(7):
        begun = time.perf_counter()
        (a @ a).sum().item()
        seconds.append(time.perf_counter() - begun)
    return 2 * n**3 / sorted(seconds)[3] / 1e12


if __name__ == "__main__":
    import loo  # by its own name, as data.py imports it: one module, not two
    from data import command_line

    command_line({"train": loo.train, "methods": loo.show_methods, "bench": loo.bench})
