"""Leave-one-out contrastive learning (LooC), the method of Xiao, Wang, Efros and Darrell:
"What Should Not Be Contrastive in Contrastive Learning", ICLR 2021.

One training step:

    query, keys, _ = augment_groups(images, method.groups, method.share, generator)
    q = encode(encoder_q, query)[1]                           # (s b c)
    ema(encoder_k, encoder_q, momentum)
    k = encode(encoder_k, keys.flatten(0, 1))[1]              # (s (v b) c), no gradient
    k = rearrange(k, "s (v b) c -> s v b c", v=len(keys))
    loss = multi_space_loss(q, k, queue, method.role, tau)    # (s,), minimize the mean
    queue, queue_ptr = queue_update(queue, queue_ptr, positive_keys(k, method.role))

train_step also shuffles the keys, for BatchNorm: see key_permutation and SplitBatchNorm2d.

    python loo.py train                               # LooC (color, rotation) on generated images
    python loo.py train --data=folder --root=DIR      # on your own images
    python loo.py methods --groups=color,rotation     # every method of the paper as a small table

The commands and `default_config` need data.py; the method, the encoder and train_step do not.

Axes in every shape: b image (B of all processes, m of those read), v key view, g group, s space,
d feature, c embedding or color channel, n queue slot or view, f filter, h w pixel.
"""

import collections
import contextlib
import datetime
import hashlib
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
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial, wraps
from json import dumps, loads
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import einsum, rearrange, repeat
from torch import nn

# ---------------------------------------- methods: each is a small table


class Method(NamedTuple):
    """A method of the paper as data (section 3)."""

    # The augmentation groups. Each has a space of its own beside Z_0.
    groups: tuple
    # (v g) bool: key view v copies the query's parameters of group g.
    share: torch.Tensor
    # (s v) int: to space s, key view v is 1 positive, -1 a negative of the same image, 0 unused.
    role: torch.Tensor
    # "mlp": the spaces share the whole backbone; "conv5": each has its own layer4 (LooC++).
    heads: str
    # (s,) names: "all" is Z_0, which is invariant to all groups; the others keep their group.
    spaces: tuple


def methods(groups, same=()):
    """The paper's methods (section 3, tables 1 and 4) -> {name: Method}.

    same: the groups whose parameters moco_same's key copies from the query.
    """
    check_tuples(groups=groups, same=same)
    groups = tuple(groups)
    n = len(groups)
    share_none = torch.zeros(1, n, dtype=torch.bool)
    share_same = torch.tensor([[group in same for group in groups]], dtype=torch.bool)
    share_one_each = torch.cat([share_none, torch.eye(n, dtype=torch.bool)])
    positive = torch.ones(1, 1, dtype=torch.long)
    role = 2 * torch.eye(n + 1, dtype=torch.long) - 1
    role[0, 1:] = 0  # Z_0 is invariant to all groups: it sees k_0 alone
    spaces = ("all", *groups)
    copies = tuple(f"all{i}" for i in range(n + 1))
    return {
        "moco": Method(groups, share_none, positive, "mlp", ("all",)),
        "moco_same": Method(groups, share_same, positive, "mlp", ("all",)),
        "looc": Method(groups, share_one_each, role, "mlp", spaces),
        "looc++": Method(groups, share_one_each, role, "conv5", spaces),
        "moco++": Method(groups, share_none, positive.repeat(n + 1, 1), "conv5", copies),
        "supervised": Method(groups, share_none[:0], positive[:0, :0], "mlp", ()),
    }


# ---------------------------------------- loss and queue


def multi_space_loss(q, k, queue, role, tau):
    """The contrastive loss of each space, averaged over images.

    q (s b c), k (s v b c), queue (s n c), all of unit norm; no gradient reaches k
    role (s v), or (s v b) where it differs by image: 1 the positive, one in each space and the same
        for all images; -1 a negative, 0 unused. LooC with one group has [[1, 0], [-1, 1]]
    tau: 0.2 in the paper
    -> (s,), float32 at least, also under autocast. Their mean is L_q of section 3.
    """
    own, queued, positive = space_logits(q, k, queue, role, tau)
    partition = torch.logaddexp(own.logsumexp(2), queued.logsumexp(2))  # (s b)
    return (partition - own.gather(2, positive).squeeze(2)).mean(1)


def space_logits(q, k, queue, role, tau):
    """Logits of each query in each space, arguments as in multi_space_loss.

    -> own (s b v), against every key of its own image, -inf where role is 0; queued (s b n),
    against the queue; positive (s b 1), the index of the positive among own.
    """
    role = torch.as_tensor(role)
    check_shapes(q=(q, "s b c"), k=(k, "s v b c"), queue=(queue, "s n c"), role=(role, "s v [b]"))
    if not torch.is_tensor(tau) and not 0 < tau < math.inf:
        raise ValueError(f"tau is {tau}: expected a number above 0")
    positive = positive_view(role).to(q.device)[:, None, None].expand(-1, q.shape[1], 1)
    # Divide q and not the logits, which are many more.
    q = at_least_float32(q) / tau
    k, queue, role = k.detach().to(q.dtype), queue.to(q.dtype), role.to(q.device)
    with torch.autocast(q.device.type, enabled=False):
        own = einsum(q, k, "s b c, s v b c -> s b v")
        queued = einsum(q, queue, "s b c, s n c -> s b n")
    unused = rearrange(role == 0, "s v ... -> s (...) v")  # (s 1 v) or (s b v)
    return own.masked_fill(unused, -math.inf), queued, positive


def positive_keys(k, role):
    """k (s v b c), role (s v) or (s v rows) -> (s b c) each space's positive, which its queue gets.

    The images of role may be others than those of k: it has one positive for all.
    """
    role = torch.as_tensor(role)
    check_shapes(k=(k, "s v b c"), role=(role, "s v [rows]"))
    return k[torch.arange(len(k), device=k.device), positive_view(role).to(k.device)]


def queue_update(queue, pointer, keys):
    """Replace the oldest slots of each space's queue (section 3).

    queue (s n c), pointer to the oldest slot, keys (s b c) -> queue, pointer. b may exceed n.
    A first queue is F.normalize(torch.randn(s, n, c), dim=-1), its pointer 0.
    """
    check_shapes(queue=(queue, "s n c"), keys=(keys, "s b c"))
    n, b = queue.shape[1], keys.shape[1]
    slots = (pointer + torch.arange(b, device=queue.device))[-n:] % n
    newest = keys[:, -n:].detach().to(queue.dtype)
    return queue.index_copy(1, slots, newest), (pointer + b) % n


# ---------------------------------------- the training step


def train_step(state, images, aspect, config, textures=None):
    """One step of section 3, or of a contrastive baseline -> State, (loss, q, k, queue, role).

    state: init_state(config) at first
    images (m c h w) in [0, 1]; aspect (m,) or None; textures (m copy c h w) or None. In one process
    m is config["batch"], which config["splits"] divides; of several, each has the images that
        rank_rows names
    config: RECIPES["factors"] | dict(method="looc", groups=("color", "rotation"), same=(), seed=0,
        always=("crop", "flip", "blur", "color"), drop_equal=False, device="cpu",
        precision="float32", compile=False), or what default_config() makes of `train`'s flags.
    Encoders and optimizer change in place. Learning rate and `total` are for train_loop to set. The
    views depend on (seed, step) alone. loss (s,); the rest are contrast_metrics' arguments.
    """
    method, step = get_method(config), state.step
    rows = rank_rows(config, step)
    ema(state.encoder_k, state.encoder_q, config["momentum"])
    # inference_mode is no_grad with less bookkeeping: a tenth of the augmentation's time on a CPU.
    with torch.inference_mode():
        query, keys, params = training_views(images, config, step, aspect, textures, rows)
    # Not in inference_mode, which some versions of torch.compile do not support.
    with torch.no_grad(), autocast(config):
        k = encode(state.encoder_k, rearrange(keys, "v b c h w -> (v b) c h w"))[1]
    with autocast(config):
        q = encode(state.encoder_q, query)[1]
    k_all = all_gather(rearrange(k, "s (v b) c -> s v b c", v=len(method.share)))  # (s v B c)
    k_all = k_all[:, :, move_like(images, key_permutation(config, step).argsort())]  # unshuffled
    role = method.role
    if config["drop_equal"] and (role < 0).any():
        role = drop_equal(role, params, method.groups)
    role = move_like(images, role)
    k = k_all[:, :, move_like(images, rows.query)]  # (s v b c), of this process's queries
    loss = multi_space_loss(q, k, state.queue, role, config["tau"])
    optimizer_step(state.optimizer, loss.mean())
    positives = positive_keys(k_all, role)  # (s B c)
    queue, queue_ptr = queue_update(state.queue, state.queue_ptr, positives)
    compared = (loss.detach(), q.detach(), k, state.queue, role)
    return state._replace(queue=queue, queue_ptr=queue_ptr, step=step + 1), compared


# ---------------------------------------- views: sample parameters, then apply them


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
    sampling=None,
):
    """The query view and the key views of section 3.

    images (b c h w) float in [0, 1]
    groups: names in GROUPS, such as color and rotation
    share (v g) bool: key view v copies the query's parameters of group g. LooC with two groups has
        [[0, 0], [1, 0], [0, 1]]: the first key shares nothing
    generator: torch.Generator() on the CPU, so that the views are the same on every device
    always: other names in GROUPS, drawn independently for every view; a group among them stays a
        group. Add "color" if it is none, as `train` does, or images can be matched by their colors
    size: side of the square views in pixels. By default h, or the images stay if nothing resamples
    aspect (b,): width / height of each image before it was squashed into a square, by default 1
    textures (b copy c h w): stylized copies of the images, for the group "texture"
    rows: a Rows, when `images`, aspect and textures are m rows of a global batch; b is then the
        number of its queries
    sampling: other arguments of the sample functions in GROUPS, as {"rotation": {"p": 0.75}}
    -> query (b c size size), keys (v b c size size), params {group: {parameter: (1+v, b, ...)}},
    row 0 the query's. ValueError for images that are not in [0, 1] or not float32 or float64, for
    an unknown name, a number out of range, texture without textures, shapes that do not fit.
    """
    check_tuples(groups=groups, always=always)
    groups, always = tuple(groups), tuple(always)
    share = torch.as_tensor(share)
    sampling = dict(sampling or {})
    check_views(images, groups, share, always, size, aspect, textures, rows, sampling)
    rows = rows or all_rows(len(images))
    v, b = len(share), len(rows.query)
    if textures is not None:
        sampling["texture"] = {"copies": textures.shape[1]} | sampling.get("texture", {})
    params = sample_groups(rows.total, groups, share, generator, always, sampling)
    # All views go through the operations as one batch, n = (1 + v) b: the query's, then the keys'.
    row = torch.cat([rows.query, rows.key.repeat(v)])  # (n,) in the global batch
    view = torch.arange(1 + v).repeat_interleave(b)  # (n,)
    index = torch.searchsorted(rows.images, row)  # (n,) in `images`
    chosen = map_params(params, lambda x: x[view, row])
    views = apply_groups(images, index, chosen, size, aspect, textures)
    query, keys = views[:b], views[b:].unflatten(0, (v, b))
    return query, keys, map_params(params, lambda x: x[:, rows.query])


def sample_groups(total, groups, share, generator, always, sampling):
    """The first half of augment_groups, arguments as there: numbers, no pixels.

    -> {group: {parameter: (1+v, total, ...)}} in the order of GROUPS, row 0 the query's.
    """
    share, params = share.bool().cpu(), {}
    n = (1 + len(share)) * total
    for name in [name for name in GROUPS if name in {*groups, *always}]:
        sample, _ = GROUPS[name]
        flat = sample(n, generator, **sampling.get(name, {}))
        check_sampled(name, flat, n)
        shape = 1 + len(share), total
        params[name] = {key: x.unflatten(0, shape) for key, x in flat.items()}
        if name in groups:
            copies = share[:, groups.index(name)]  # (v,)
            for x in params[name].values():
                x[1:][copies] = x[0]
    return params


def apply_groups(images, index, params, size=None, aspect=None, textures=None):
    """The second half of augment_groups: view i is of image index[i], by row i of the parameters.

    images (b c h w), index (n,), params {group: {parameter: (n ...)}} -> (n c size size).
    """
    index = move_like(images, index)
    x = images.index_select(0, index)
    aspect = None if aspect is None else move_like(images, aspect[index])
    # What these two need beside their parameters.
    extra = {resample: (size, aspect), texture: (textures, index)}
    names = list(params)
    while names:
        name = names.pop(0)
        apply, merged = GROUPS[name][1], dict(params[name])
        # Neighbors with one function, as crop, flip and rotation, go together if they can.
        while names and GROUPS[names[0]][1] is apply and merged.keys().isdisjoint(params[names[0]]):
            merged |= params[names.pop(0)]
        x = apply(x, merged, *extra.get(apply, ()))
        check_shapes({"n": len(index)}, **{f"what GROUPS[{name!r}] makes": (x, "n c h w")})
    if size and x.shape[-2:] != (size, size):  # no group resampled
        x = resample(x, {}, size)
    return x


# ---------------------------------------- the parts of a step, and the supervised baseline


class State(NamedTuple):
    """All that decides the next step, beside the configuration; init_state makes the first one.

    The supervised baseline leaves the key encoder idle, the others the classifier.
    """

    encoder_q: nn.Module
    encoder_k: nn.Module
    classifier: nn.Module
    optimizer: torch.optim.Optimizer
    queue: torch.Tensor  # (s n c) unit norm
    queue_ptr: int  # the queue's oldest slot
    step: int
    total: torch.Tensor  # (s,) the loss summed since the last line of the log


class Rows(NamedTuple):
    """Which part of a global batch of `total` images one process works on."""

    total: int
    images: torch.Tensor  # (m,) ascending: the rows that it has read
    query: torch.Tensor  # (b,) the rows of its query views
    key: torch.Tensor  # (b,) the rows of its key views


def all_rows(n):
    """The Rows of a process that has the whole batch of n."""
    every = torch.arange(n)
    return Rows(n, every, every, every)


def map_params(params, change):
    """`change` each parameter of {group: {parameter: tensor}}."""
    return {name: dict(zip(group, map(change, group.values()))) for name, group in params.items()}


def training_views(images, config, step, aspect=None, textures=None, rows=None):
    """augment_groups as a configuration says."""
    method = get_method(config)
    generator = make_generator("views", config["seed"], step)
    options = dict(always=config["always"], size=config["size"], sampling=config.get("sampling"))
    options |= dict(aspect=aspect, textures=textures, rows=rows)
    return augment_groups(images, method.groups, method.share, generator, **options)


def rank_rows(config, step):
    """The rows of the global batch that this process works on, its keys shuffled -> Rows.

    A process reads the images of its queries and of its keys and makes the views of both, so that
    only embeddings travel between processes.
    """
    query = rank_slice(config["batch"])
    # The supervised baseline has no keys.
    supervised = config["method"] == "supervised"
    key = query if supervised else key_permutation(config, step)[query]
    return Rows(config["batch"], torch.cat([query, key]).unique(), query, key)


def key_permutation(config, step):
    """(B,) the order in which the key encoder sees the global batch (MoCo's shuffled BatchNorm).

    So a query and its positive key are normalized among different images.
    """
    generator = make_generator("shuffle", config["seed"], step)
    return torch.randperm(config["batch"], generator=generator)


@torch.no_grad()
def ema(encoder_k, encoder_q, momentum):
    """The key encoder follows the query encoder, as in MoCo: parameters only, no buffers."""
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}: expected 0 to 1")
    parameters_k, parameters_q = list(encoder_k.parameters()), list(encoder_q.parameters())
    torch._foreach_lerp_(parameters_k, parameters_q, 1 - momentum)


def optimizer_step(optimizer, loss):
    """One step down the gradient of loss ()."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def drop_equal(role, params, groups):
    """role (s v) -> (s v b): a negative that drew the query's parameters by chance is not used.

    Rotations often do; the paper does not speak of it. params as augment_groups returns them.
    """
    b = next(iter(params[groups[0]].values())).shape[1]
    role = repeat(torch.as_tensor(role), "s v -> s v b", b=b).clone()
    for space, group in enumerate(groups, 1):
        equal = torch.ones(role.shape[1:], dtype=torch.bool)  # (v b)
        for x in params[group].values():
            equal &= rearrange(x[1:] == x[0], "v b ... -> v b (...)").all(2)
        role[space].masked_fill_(equal & (role[space] < 0), 0)
    return role


def supervised_step(state, images, aspect, labels, config, textures=None):
    """One step of the supervised baseline -> State, (loss (1,),); its views are the query's.

    Arguments as in train_step; labels (b,), or None to learn the rotation that was drawn.
    """
    rows = rank_rows(config, state.step)
    query, _, params = training_views(images, config, state.step, aspect, textures, rows)
    if labels is None:
        labels = move_like(images, params["rotation"]["turns"][0])
    with autocast(config):
        logits = state.classifier(encode(state.encoder_q, query)[0])
    loss = F.cross_entropy(at_least_float32(logits), labels)
    optimizer_step(state.optimizer, loss)
    return state._replace(step=state.step + 1), (loss.detach()[None],)


# ---------------------------------------- what is given: one clear ValueError if it does not fit

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_views(images, groups, share, always, size, aspect, textures, rows, sampling):
    """ValueError for arguments of augment_groups that do not fit, as it says."""
    known = {"g": len(set(groups)), "b": len(images if rows is None else rows.images)}
    known |= {"c": 3} if "color" in {*groups, *always} else {}
    given = dict(images=(images, "b c h w"), share=(share, "v g"))
    given |= {} if aspect is None else dict(aspect=(aspect, "b"))
    given |= {} if textures is None else dict(textures=(textures, "b copy c h w"))
    check_shapes(known, **given)
    check_images(images, (torch.float32, torch.float64))
    if not (share.bool() == share).all():
        raise ValueError("share holds something else than 0 and 1")
    if aspect is not None and aspect.device.type == "cpu" and not (aspect > 0).all():
        raise ValueError("aspect holds something else than numbers above 0")
    if size is not None and not (hasattr(size, "__index__") and size > 0):
        raise ValueError(f"size is {size!r}: expected the side of a square view in pixels")
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError("images require a gradient, which views do not pass on: images.detach()")
    if unknown := {*groups, *always, *sampling} - GROUPS.keys():
        unknown = ", ".join(sorted(unknown))
        raise ValueError(f"no such augmentation: {unknown}; there are {', '.join(GROUPS)}")
    for name, arguments in sampling.items():
        for key in {"p", "area", "gray"} & arguments.keys():
            if not 0 <= arguments[key] <= 1:
                raise ValueError(f"sampling: {name} {key} is {arguments[key]}, expected 0 to 1")


def check_sampled(name, params, n):
    """ValueError unless a group's sample function gave n rows of each parameter."""
    of_tensors = isinstance(params, dict) and all(map(torch.is_tensor, params.values()))
    if not of_tensors or any(x.shape[:1] != (n,) for x in params.values()):
        raise ValueError(f"GROUPS[{name!r}][0] must return {{parameter: tensor}}, {n} rows in each")


def check_tuples(**flags):
    """ValueError where a tuple of names is a single one, for a string is iterable too, or a set."""
    for flag, names in flags.items():
        if isinstance(names, (str, os.PathLike, set, frozenset)):  # a set has no order
            raise ValueError(f"{flag} is {names!r}: expected a tuple, as ('color', 'rotation')")


def check_shapes(lengths=(), **tensors):
    """ValueError unless each of tensors {name: (tensor, axes)} has these axes, see the legend.

    An axis has one length in all of them; lengths {axis: length} are known beforehand. An axis in
    brackets, as in "s v [b]", may be absent.
    """
    lengths = dict(lengths)
    for name, (x, axes) in tensors.items():
        letters = axes.replace("[", "").replace("]", "").split()
        if not torch.is_tensor(x):
            raise ValueError(f"{name} is a {type(x).__name__}: expected a tensor ({axes})")
        fits = len(letters) - axes.count("[") <= x.ndim <= len(letters)
        if not fits or any(lengths.setdefault(a, n) != n for a, n in zip(letters, x.shape)):
            known = " ".join(f"{a}={lengths[a]}" for a in letters if a in lengths)
            found = f"{name} has the shape {tuple(x.shape)}"
            raise ValueError(f"{found}, expected ({axes}){' with ' * bool(known)}{known}")


def positive_view(role):
    """role (s v) or (s v b) -> (s,) the key view that is each space's positive.

    ValueError unless there is one, for all images the same. On a GPU nothing is checked, because
    it must not wait.
    """
    positive = rearrange(role == 1, "s v ... -> s v (...)")  # (s v 1) or (s v b)
    if role.device.type == "cpu":
        if role.dtype == torch.bool or not torch.isin(role, torch.tensor([-1, 0, 1])).all():
            raise ValueError("role holds something else than 1, 0 and -1: see Method")
        of_all = positive.all(2)
        if not of_all.equal(positive.any(2)) or (of_all.sum(1) != 1).any():
            raise ValueError("role needs one positive (1) in each space, for all images the same")
    return positive[..., 0].int().argmax(1)


def check_images(images, dtypes, margin=0.0, name="images"):
    """ValueError unless images (b c h w) are of these dtypes, in [0, 1] up to the margin.

    On a GPU only the dtype is checked, because it must not wait.
    """
    advice = f"give floats in [0, 1], as {name}.float() / 255"
    if images.dtype not in dtypes:
        known = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} are {images.dtype}, expected {known}: {advice}")
    if images.device.type == "cpu" and images.numel():
        low, high = images.detach().aminmax()
        if not (low >= -margin and high <= 1 + margin):  # nor is NaN
            raise ValueError(f"{name} are between {low:.3g} and {high:.3g}: {advice}")


# ---------------------------------------- encoder: a backbone, and a head for each space


IMAGENET_NORM = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation


def encode(encoder, images):
    """images (b c h w) in [0, 1] -> feature (b d), embeddings (s b c) of unit norm.

    Normalizes by ImageNet's mean and deviation. LooC++'s feature is its spaces' Conv5 outputs,
    (b (s d)).
    ValueError for images that are not in [0, 1] or not floating point.
    """
    check_shapes({"c": 3}, images=(images, "b c h w"))
    check_images(images, FLOATS, margin=0.25)  # views may leave [0, 1] a little
    images = images.to(next(encoder.parameters()).dtype)  # float64 of numpy, say
    return encoder(normalize(images))


def normalize(images):
    """images (b 3 h w) in [0, 1] -> (b 3 h w) by ImageNet's mean and deviation."""
    norm = torch.tensor(IMAGENET_NORM, dtype=images.dtype)
    mean, std = move_like(images, norm)[:, :, None, None]
    return (images - mean) / std


class Encoder(nn.Module):
    """Backbone and heads (section 3). The spaces share layer4 ("mlp"), or each has one ("conv5").

    arch, stem, splits, size: see backbone; "conv5" needs a ResNet.
    hidden: width of a head's hidden layer, 0 for linear heads; dim: c.
    """

    def __init__(
        self,
        arch="resnet50",
        stem="imagenet",
        spaces=1,
        heads="mlp",
        hidden=2048,
        dim=128,
        splits=1,
        size=224,
    ):
        super().__init__()
        if heads not in ("mlp", "conv5") or stem not in CHOICES["stem"]:
            raise ValueError(f"heads={heads} stem={stem}: expected mlp or conv5, imagenet or cifar")
        # Build each layer4 separately: copies would start identical.
        count = spaces if heads == "conv5" else 1
        nets = [backbone(arch, stem, splits, size) for _ in range(count)]
        linear = {name: x for name, x in nets[0].named_modules() if isinstance(x, nn.Linear)}
        self.classifier = list(linear)[-1]  # its name in the network; we have none
        d = linear[self.classifier].in_features
        is_resnet = isinstance(nets[0], torchvision.models.ResNet)
        if heads == "conv5" and not is_resnet:
            raise ValueError(f"heads=conv5 arch={arch}: expected a ResNet")
        if is_resnet:
            *layers, _, _, _ = nets[0].named_children()  # without layer4, avgpool and fc
            self.trunk = nn.Sequential(collections.OrderedDict(layers))
            self.tops = nn.ModuleList(net.layer4 for net in nets)
        else:
            self.trunk = nets[0]
            self.trunk.set_submodule(self.classifier, nn.Identity())
            self.tops = nn.ModuleList([nn.Unflatten(1, (d, 1, 1))])  # the feature as a map
        self.features = d * len(nets)
        self.w1, self.b1 = init_linear(spaces, d, hidden)
        self.w2, self.b2 = init_linear(spaces, hidden or d, dim)

    def forward(self, images):
        x = self.trunk(images)
        v = torch.stack([top(x).mean((2, 3)) for top in self.tops])  # (1 b d), or (s b d)
        spaces, dim = self.w2.shape[:2]
        z = v.new_zeros(0, len(x), dim)
        if spaces:
            heads = torch.vmap(mlp)
            z = heads(v.expand(spaces, -1, -1), self.w1, self.b1, self.w2, self.b2)  # (s b c)
        return rearrange(v, "s b d -> b (s d)"), F.normalize(at_least_float32(z), dim=-1)


def mlp(v, w1, b1, w2, b2):
    """One space's head, v (b d) -> (b c): two layers, or one where w1 is empty."""
    if len(w1):
        v = F.relu(F.linear(v, w1, b1))
    return F.linear(v, w2, b2)


def init_linear(spaces, d, out):
    """nn.Linear's initialization for each space -> weight (s out d), bias (s out)."""
    bound = d**-0.5
    weight = torch.empty(spaces, out, d).uniform_(-bound, bound)
    bias = torch.empty(spaces, out).uniform_(-bound, bound)
    # An empty parameter gets no gradient, and DistributedDataParallel would wait for it.
    used = bool(spaces * out > 0)
    return nn.Parameter(weight, requires_grad=used), nn.Parameter(bias, requires_grad=used)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with separate training statistics for each of `splits` equal parts of the batch.

    It is shuffled BatchNorm on one device: batch statistics cannot tell which key is the positive.
    Running statistics move once a pass, towards the mean over the splits.
    """

    def __init__(self, features, splits=1):
        super().__init__(features)
        self.splits = splits

    def forward(self, x):  # ((splits b) f h w)
        if not self.training or self.splits == 1:
            return super().forward(x)
        splits = self.splits
        if len(x) % splits:
            problem = f"a batch of {len(x)} does not divide into {splits} BatchNorm splits"
            raise ValueError(f"{problem}: drop the loader's last batch, or take fewer splits")
        mean = self.running_mean.repeat(splits, 1)  # (splits f)
        var = self.running_var.repeat(splits, 1)
        affine, settings = (self.weight, self.bias), (True, self.momentum, self.eps)
        parts = zip(x.chunk(splits), mean, var)  # batch_norm updates its mean and var in place
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            out = torch.cat([F.batch_norm(*part, *affine, *settings) for part in parts])
        else:  # keys: each part is written to its place, which saves the copy of torch.cat
            out, unused = torch.empty_like(x), mean.new_empty(2, len(self.weight))
            for (part, *stats), place in zip(parts, out.chunk(splits)):
                torch.native_batch_norm(part, *affine, *stats, *settings, out=(place, *unused))
        self.running_mean.copy_(mean.mean(0))
        self.running_var.copy_(var.mean(0))
        self.num_batches_tracked += 1
        return out


def backbone(arch, stem="imagenet", splits=1, size=224):
    """A classification network of torchvision, or "small": a quarter of ResNet-18's width, one
    block a stage.

    stem: "cifar" is SimCLR's for small images, ResNets only; splits: see SplitBatchNorm2d;
    size: of the images. Without dropout and stochastic depth, whose draws would not be a function
    of (seed, step).
    """
    if arch == "small":
        block = torchvision.models.resnet.BasicBlock
        net = torchvision.models.ResNet(block, [1, 1, 1, 1])
        net.inplanes = 16
        net.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        net.bn1, net.maxpool = nn.BatchNorm2d(16), nn.Identity()
        for i, stride in enumerate((1, 2, 2, 1)):
            setattr(net, f"layer{i + 1}", net._make_layer(block, 16 << i, 1, stride=stride))
        net.fc = nn.Linear(128, 1)
    else:
        sized = {"vit": {"image_size": size}, "maxvit": {"input_size": (size, size)}}
        net = torchvision.models.get_model(arch, **sized.get(arch.split("_")[0], {}))
    if stem == "cifar":  # no stride before layer2
        net.conv1 = nn.Conv2d(3, net.bn1.num_features, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    for module in net.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):  # which keeps its eps and momentum
            module.__class__, module.splits = SplitBatchNorm2d, splits
    return net


# ---------------------------------------- augmentation operations
# sample_x(b, generator, ...) -> params {parameter: (b ...)}, on the CPU; p: its probability.
# x(images (b 3 h w) on any device, params) -> (b 3 h w), nothing random.


def make_generator(*key):
    """A CPU generator seeded by `key` alone, such as ("views", seed, step)."""
    key = tuple(part.item() if hasattr(part, "item") else part for part in key)  # numpy's numbers
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(32))


def uniform(low, high, *shape, generator):
    """Numbers in [low, high) of this shape, on the CPU."""
    return torch.rand(*shape, generator=generator) * (high - low) + low


def move_like(images, x):
    """x on the images' device, and in their precision if it is floating point."""
    dtype = images.dtype if x.is_floating_point() else x.dtype
    return x.to(images.device, dtype, non_blocking=True)


def at_least_float32(x):
    """x in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sample_texture(b, generator, p=0.5, copies=1):
    """Which of the stylized copies an image becomes; -1: it stays as it is."""
    stylized = torch.rand(b, generator=generator) < p
    copy = (torch.rand(b, generator=generator) * copies).long()
    return {"copy": torch.where(stylized, copy, -1)}


def texture(images, params, textures, index):
    """Style transfer, made beforehand: some images become a stylized copy (section 3).

    images (n c h w), image i of row index[i] of textures (b copy c h w) -> (n c h w).
    ValueError without textures.
    """
    if textures is None:
        raise ValueError("the group texture needs `textures`, the stylized copies (b copy c h w)")
    rows = (params["copy"] >= 0).nonzero().squeeze(1)
    copy, rows = move_like(images, params["copy"][rows]), move_like(images, rows)
    out = images.clone()
    copies = textures[index[rows], copy]
    check_images(copies, (images.dtype,), name="textures")
    out[rows] = copies
    return out


def sample_crop(b, generator, area=0.2):
    """Random resized crop: ten attempts at area and ratio, and the place in the room left.

    area: the smallest, as a share of the image.
    """
    areas = uniform(area, 1, b, 10, generator=generator)
    log_ratio = uniform(math.log(3 / 4), math.log(4 / 3), b, 10, generator=generator)
    place = torch.rand(b, 2, generator=generator)
    return {"area": areas, "ratio": log_ratio.exp(), "place": place}


def sample_flip(b, generator, p=0.5):
    """A horizontal flip."""
    return {"flip": torch.rand(b, generator=generator) < p}


def sample_rotation(b, generator, p=0.5):
    """Counter-clockwise quarter turns: 1, 2 or 3 with probability p, else 0."""
    turns = torch.randint(1, 4, (b,), generator=generator)
    return {"turns": torch.where(torch.rand(b, generator=generator) < p, turns, 0)}


def resample(images, params, size=None, aspect=None):
    """Crop, flip and rotate at once, as two small matrix products an image.

    images (b c h w); params: any of area, ratio, place; flip; turns; aspect (b,) width / height of
    the image before it was squashed into a square -> (b c size size), antialiased as torchvision's.
    """
    b, _, h, w = images.shape
    size = size or h
    upright = torch.zeros(b, dtype=torch.long)
    params = {"turns": upright, "flip": upright.bool()} | params
    # Found on the CPU, so that no GPU is waited for.
    odd = move_like(images, (params["turns"] % 2 == 1).nonzero().squeeze(1))
    params = {key: move_like(images, x) for key, x in params.items()}
    turns, flip = params["turns"], params["flip"]
    zeros, ones = images.new_zeros(b), images.new_ones(b)
    top, left, height, width = zeros, zeros, ones, ones  # the whole image
    if "area" in params:
        top, left, height, width = crop_box(params, ones if aspect is None else aspect)
    # Half a turn mirrors both axes; an odd turn is a mirror and a transpose.
    mirror_rows = (turns == 2) | (turns == 3)
    mirror_cols = flip ^ ((turns == 1) | (turns == 2))
    rows = resize_matrix(top, height, mirror_rows, h, size)
    cols = resize_matrix(left, width, mirror_cols, w, size)
    out = separable_matmul(images, rows, cols)
    out[odd] = out[odd].mT
    return out


def crop_box(params, aspect):
    """The first attempt that fits, else the largest box in the middle, as torchvision does.

    params area, ratio (b 10), place (b 2); aspect (b,)
    -> top, left, height, width (b,) as shares of the image.
    """
    aspect = aspect[:, None]
    width = (params["area"] * params["ratio"] / aspect).sqrt()
    height = (params["area"] / params["ratio"] * aspect).sqrt()
    fits = (width <= 1) & (height <= 1)
    first = fits.int().argmax(1, keepdim=True)
    none = ~fits.any(1, keepdim=True)
    box = torch.cat([width.gather(1, first), height.gather(1, first)], 1)
    largest = torch.cat([(4 / 3 / aspect).clamp(max=1), (aspect * 4 / 3).clamp(max=1)], 1)
    width, height = torch.where(none, largest, box).unbind(1)
    top, left = torch.where(none, 0.5, params["place"]).unbind(1)
    return top * (1 - height), left * (1 - width), height, width


def resize_matrix(start, extent, mirror, n, size):
    """Antialiased linear interpolation along one axis of n pixels, as a matrix.

    start, extent (b,): the box as shares of n; mirror (b,) bool -> (b size n), row i weighs the
    pixels behind output pixel i.
    """
    start, extent = start[:, None, None] * n, extent[:, None, None] * n
    # A box of a very long image is one pixel wide at least, so that there is one inside.
    narrow = (1 - extent).clamp(min=0)
    start, extent = start - narrow / 2, extent + narrow
    step = extent / size
    center = torch.arange(size, device=start.device)[:, None] + 0.5
    center = torch.where(mirror[:, None, None], size - center, center)
    center = start + step * center  # (b size 1), in pixels
    pixel = torch.arange(n, device=start.device) + 0.5
    # Pixels outside the box have no weight, as if it was cropped first. 1e-4 forgives rounding.
    inside = (pixel > start - 1e-4) & (pixel < start + extent + 1e-4)
    distance = (pixel - center).abs_()
    weight = distance.div_(-step.clamp(min=1)).add_(1).clamp_(min=0).mul_(inside)
    return weight.div_(weight.sum(-1, keepdim=True))


def separable_matmul(images, rows, cols):
    """rows (b k h) @ images (b c h w) @ cols^T (b l w) -> (b c k l), contiguous."""
    wide = rearrange(images, "b c h w -> b (c h) w") @ cols.mT
    return rows[:, None] @ rearrange(wide, "b (c h) l -> b c h l", c=images.shape[1])


def sample_color(b, generator, p=0.8, gray=0.2):
    """Color jitter with probability p, then grayscale with probability `gray`, as in MoCo v2.

    order (b 4): which adjustment comes when, as an index into JITTER; -1 without jitter.
    """
    jitter = torch.rand(b, generator=generator) < p

    def around(center, reach):
        drawn = uniform(center - reach, center + reach, b, generator=generator)
        return torch.where(jitter, drawn, center)

    params = {"brightness": around(1, 0.4), "contrast": around(1, 0.4)}
    params |= {"saturation": around(1, 0.4), "hue": around(0, 0.1)}
    order = torch.rand(b, len(JITTER), generator=generator).argsort(1)
    params["order"] = torch.where(jitter[:, None], order, -1)
    params["gray"] = torch.rand(b, generator=generator) < gray
    return params


def color(images, params):
    """Color jitter in each image's own order, then grayscale; (b 3 h w) -> (b 3 h w).

    Images with the same adjustment at the same position go together. The CPU knows which they are,
    so no GPU is waited for.
    """
    out = images.clone()
    factors = {name: move_like(images, params[name]) for name in JITTER}
    for position in params["order"].unbind(1):  # (b,)
        for i, (name, adjust) in enumerate(JITTER.items()):
            rows = move_like(images, (position == i).nonzero().squeeze(1))
            adjusted = adjust(out.index_select(0, rows), factors[name].index_select(0, rows))
            out.index_copy_(0, rows, adjusted)
    rows = move_like(images, params["gray"].nonzero().squeeze(1))
    gray = grayscale(out.index_select(0, rows)).expand(-1, 3, -1, -1)
    return out.index_copy_(0, rows, gray)


def grayscale(images):
    """(b 3 h w) -> (b 1 h w), ITU-R 601."""
    r, g, b = images.unbind(1)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)[:, None]


def blend(images, other, factor):
    """images (b 3 h w), other (b 1 h w) or (b 1 1 1), factor (b,) -> (b 3 h w) in [0, 1].

    Factor 0 is other, 1 is images, above 1 is more than images.
    """
    factor = factor[:, None, None, None]
    return (images * factor).add_(other * (1 - factor)).clamp_(0, 1)


def adjust_brightness(images, factor):
    """(b 3 h w), factor (b,) -> (b 3 h w); this and the next two are torchvision's adjust_*."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images, factor):
    """(b 3 h w), factor (b,) -> (b 3 h w)."""
    # The mean of the gray image is the gray of the mean.
    return blend(images, grayscale(images.mean((2, 3), keepdim=True)), factor)


def adjust_saturation(images, factor):
    """(b 3 h w), factor (b,) -> (b 3 h w)."""
    return blend(images, grayscale(images), factor)


def adjust_hue(images, shift):
    """(b 3 h w), shift (b,) as a share of the color circle -> (b 3 h w): to HSV and back."""
    r, g, b = images.unbind(1)
    high = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    chroma = high - low
    # In sixths of the circle, 0 to 3: the distance from red, whichever channel is the highest.
    from_red = (g + b).sub_(r).sub_(low).div_(chroma.clamp(min=1e-8)).add_(1)
    hue = torch.copysign(from_red, g - b).add_(6 * shift[:, None, None])
    # Wrap into [-3, 3]; `%` takes twice as long.
    hue.sub_((hue / 6).round_(), alpha=6)
    out = torch.empty_like(images)
    for channel, offset in zip(out.unbind(1), (0, 2, -2)):
        torch.sub(hue, offset, out=channel)
    out.abs_().sub_(3).abs_().clamp_(1, 2)
    return out.mul_(chroma[:, None]).add_(low.sub_(chroma)[:, None])


# Each image has them in an order of its own, as in torchvision's ColorJitter.
JITTER = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


SMALLEST_BLURRED = 34  # side in pixels; below, no neighbor would weigh 1/255


def sample_blur(b, generator, p=0.5):
    """Gaussian blur; sigma in pixels of a 224-pixel image."""
    blurred = torch.rand(b, generator=generator) < p
    return {"blur": blurred, "sigma": uniform(0.1, 2.0, b, generator=generator)}


def blur(images, params):
    """Gaussian blur, edges reflected; (b c h w) -> (b c h w); sigma shrinks with the image."""
    h, w = images.shape[2:]
    if w < SMALLEST_BLURRED:
        return images
    rows = params["blur"].nonzero().squeeze(1)
    sigma = move_like(images, params["sigma"][rows]) * w / 224
    out, rows = images.clone(), move_like(images, rows)
    out[rows] = separable_matmul(images[rows], gaussian_matrix(sigma, h), gaussian_matrix(sigma, w))
    return out


def gaussian_matrix(sigma, n):
    """sigma (b,) -> (b n n): row i weighs the n pixels around pixel i, with reflected edges."""
    at = torch.arange(n, device=sigma.device)

    def bell(distance):
        return (-0.5 * (distance / sigma[:, None, None]) ** 2).exp()

    row = at[:, None]
    reflected = bell(row + at) * (at > 0) + bell(2 * (n - 1) - row - at) * (at < n - 1)
    weight = bell(row - at) + reflected
    return weight / weight.sum(-1, keepdim=True)


# name: (sample, apply), in the order of application. An augmentation of your own is one more row:
# with --groups=NAME it gets a view, a space and a queue. Neighbors with the same `apply` are
# applied together.
GROUPS = {
    "texture": (sample_texture, texture),
    "crop": (sample_crop, resample),
    "flip": (sample_flip, resample),
    "rotation": (sample_rotation, resample),
    "color": (sample_color, color),
    "blur": (sample_blur, blur),
}


# ---------------------------------------- recipes and configuration

# Defaults of a data set; each of them is also a flag. `factors` also serves folders and small sets
# and takes minutes on a CPU. It departs from the paper: a short queue and a low tau give the own
# negatives weight among few queued ones, with the lower momentum the key encoder keeps up within
# 2,304 steps, and linear heads and weaker augmentations learn more in so few; see docs/claims.md.
# `imagenet100` is the paper's (section 4); its canvas keeps most of what the crops of a photograph
# of 500 x 375 show, see docs/paper.md.
RECIPES = {
    "factors": dict(arch="small", stem="imagenet", size=32, hidden=0, dim=128, splits=4)
    | dict(epochs=18, batch=64, lr=0.1, schedule="cosine", weight_decay=1e-3)
    | dict(queue=128, tau=0.07, momentum=0.99)
    | dict(sampling={"crop": {"area": 0.4}, "color": {"gray": 0.1}}),
    "imagenet100": dict(arch="resnet50", stem="imagenet", size=224, hidden=2048, dim=128, splits=8)
    | dict(epochs=500, batch=256, lr=0.03, schedule="300,400", weight_decay=1e-4)
    | dict(queue=16384, tau=0.2, momentum=0.999, canvas=384),
}

# Squeezenets have no last linear layer, the other two have several outputs in training.
NETWORKS = torchvision.models.list_models(
    torchvision.models, exclude=("squeezenet*", "googlenet", "inception*")
)
CHOICES = {
    "recipe": RECIPES,
    "method": methods(()),
    "arch": ("small", *NETWORKS),
    "stem": ("imagenet", "cifar"),
    "precision": ("auto", "float32", "bfloat16", "float64"),
    "cache": ("auto", "device", "host", "none"),
}


class UserError(ValueError):
    """Bad input: the command line prints it as one line and exits with this code."""

    code = 2


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def lacks_memory(error):
    """Whether an exception says that this much memory, of the machine or a GPU, cannot be had."""
    words = "allocate|out of memory|overflow|ALLOC_FAILED"
    of_torch = isinstance(error, (RuntimeError, TypeError)) and re.search(words, str(error), re.I)
    return isinstance(error, MemoryError) or bool(of_torch)


def data_module():
    """The data.py of this project; UserError where `import data` finds another module."""
    try:
        import data
    except ImportError:
        data = None
    if not hasattr(data, "DATASETS"):
        found = getattr(data, "__file__", None) or [*getattr(data, "__path__", ["nothing"])][0]
        own = Path(__file__).with_name("data.py")
        raise UserError(f"`import data` finds {found}, not {own}: put its folder first in sys.path")
    return data


def typed(function):
    """Give a command's flags the types and ranges of its signature, also when Python calls it."""

    @wraps(function)
    def command(*args, **flags):
        data_module().WARNED.clear()
        given = inspect.signature(function).bind(*args, **flags).arguments
        with own_settings():
            return function(**data_module().parse_flags(function, given))

    return command


@contextlib.contextmanager
def own_settings():
    """torch's global settings as a new process has them: a notebook may have changed them."""
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        try:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        except RuntimeError:  # it was set by its newer names
            for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def default_config(**flags):
    """The configuration that `train` makes of these flags, plain data. UserError if wrong."""
    defaults = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    flags = data_module().parse_flags(train, defaults | flags)
    from data import DATASETS, check_choice, check_out, forbid_inside, resolve_device

    packed = flags.pop("packed")
    flags.pop("fresh")
    method, data, groups = flags["method"], flags["data"], flags["groups"]
    flags["recipe"] = flags["recipe"] or (data if data in RECIPES else "factors")
    for flag, words in (CHOICES | {"data": DATASETS}).items():
        if flags[flag] is not None:
            check_choice(flag, flags[flag], words)
    check_groups(groups=groups, always=flags["always"], same=flags["same"])
    recipe = RECIPES[flags["recipe"]]
    config = {name: recipe.get(name) if value is None else value for name, value in flags.items()}
    if flags["schedule"] is None and recipe["schedule"] != "cosine":
        share = config["epochs"] / recipe["epochs"]
        drops = [float(epoch) * share for epoch in recipe["schedule"].split(",")]
        config["schedule"] = ",".join(f"{epoch:g}" for epoch in drops)
    if flags["canvas"] is None:
        config["canvas"] = recipe_canvas(data, config["size"], flags["recipe"])
    config["out"] = flags["out"] or f"runs/{method}-{'+'.join(groups) or 'none'}-{data}"
    drawn = {*groups, *flags["always"]}
    config["sampling"] = parse_sampling(flags["sampling"], drawn, recipe.get("sampling", {}))
    check_out(config["out"], folder=True)
    out = Path(config["out"])
    files = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if files and not files & {"config.json", "checkpoint.pt", "checkpoint.old.pt"}:
        # --fresh would move them away.
        raise UserError(f"--out={out} is not empty and holds no run: name another folder")
    if os.path.islink(config["out"]):  # runs/latest will be another run
        config["out"] = os.path.relpath(os.path.realpath(config["out"]))
    config["groups"], config["same"] = list(groups), list(flags["same"])
    config["always"] = [name for name in flags["always"] if name not in groups]
    config["device"] = resolve_device(flags["device"])
    if config["precision"] == "auto":
        # On a CPU, a convolution in bfloat16 of a map of a pixel or two leaves the gradients of
        # weights that see padding alone unwritten.
        safe = on_gpu(config) or config["size"] >= (8 if config["arch"] == "small" else 32)
        config["precision"] = "bfloat16" if safe and fast_bfloat16(config["device"]) else "float32"
    check_config(config, packed)
    if data == "folder" and flags["root"]:
        forbid_inside(config["out"], flags["root"])
    for folder in ("root", "textures"):
        config[folder] = config[folder] and str(Path(config[folder]).resolve())
    if config["init"] not in (None, "imagenet"):
        # Links stay: runs/latest will be another run when this one goes on.
        config["init"] = os.path.abspath(config["init"])
    return config


def recipe_canvas(data, size, recipe=None):
    """The side of the images that a recipe stores for views of this size; None: see open_dataset.

    Of photographs alone: evaluations crop them.
    """
    recipe = RECIPES.get(recipe or data, {})
    if "canvas" in recipe and data_module().DATASETS[data].crop_pct < 1:
        return round(recipe["canvas"] * size / recipe["size"])


def check_groups(**flags):
    """UserError where a flag, such as groups=("color",), names no augmentation, or a feature."""
    for flag, names in flags.items():
        for name in names:
            data_module().check_choice(flag, name, GROUPS)
            if name in ("all", "v", "z"):  # one of your own
                raise UserError(f"--{flag}={name}: features have this name; rename it in GROUPS")


def parse_sampling(words, drawn, default):
    """Words such as rotation.p=0.75, added to the default {"crop": {"area": 0.4}} -> such a table,
    None if nothing is in it.

    drawn: names of augmentations, the rest of the default is left out. UserError where a word names
    another, or none of its parameters.
    """
    data = data_module()
    sampling, known = {}, []
    for group in [group for group in GROUPS if group in drawn]:
        if group in default:
            sampling[group] = dict(default[group])
        _, _, *names = inspect.signature(GROUPS[group][0]).parameters
        known += [f"{group}.{name}" for name in names if name != "copies"]
    for word in words or ():
        name, _, value = word.partition("=")
        group, _, parameter = data.check_choice("sampling", name, known).partition(".")
        limits = data.RANGES.get(parameter, data.RANGES[float])
        number = data.parse_flag(f"sampling={name}", float, value, limits)
        sampling.setdefault(group, {})[parameter] = number
    return sampling or None


def check_config(config, packed):
    """UserError where flags that are right one by one do not fit together."""
    method, data, groups, same = (config[name] for name in ("method", "data", "groups", "same"))
    textures, batch, splits = config["textures"], config["batch"], config["splits"]
    processes = asked_processes()
    named = ",".join(groups)
    if len(set(groups)) < len(groups):
        raise UserError(f"--groups={named} names a group twice")
    if method == "moco_same" and not set(same) & set(groups):
        raise UserError(f"--same={','.join(same)} shares none of --groups={named}")
    if not groups and method in ("looc", "looc++"):
        raise UserError(f"--method={method} needs at least one group, as in --groups=color")
    if packed and not Path(packed).is_dir():
        raise UserError(f"--packed={packed}: no such folder; `python data.py pack` writes it")
    if data == "factors" and config["canvas"]:
        raise UserError(f"--canvas={config['canvas']}: factors is drawn at --size, use that")
    if textures and (data == "factors" or "texture" not in groups + config["always"]):
        raise UserError(f"--textures={textures}: needs --groups=color,texture, not --data=factors")
    check_network(config)
    if batch % splits or batch == splits:
        raise UserError(f"--batch={batch} is not --splits={splits} parts of two images or more")
    if splits % processes:
        problem = f"--splits={splits} does not divide among {processes} processes"
        raise UserError(f"{problem}: start fewer, or change --splits, and with it the training")
    schedule = config["schedule"]
    number = r" *\d*\.?\d+ *"
    if not re.fullmatch(f"cosine|{number}(,{number})*", schedule):
        raise UserError(f"--schedule={schedule}: expected cosine, or epochs, as 300,400")


def check_network(config):
    """UserError where a network has no such heads or stem, or cannot see views of this size."""
    method, arch, stem, size = (config[name] for name in ("method", "arch", "stem", "size"))
    resnet = arch == "small" or "resne" in arch
    if not resnet and (stem == "cifar" or get_method(config).heads == "conv5"):
        raise UserError(f"--method={method} --stem={stem} --arch={arch}: expected a ResNet")
    try:
        encode(meta_encoder(config), torch.empty(2, 3, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        if lacks_memory(error):
            raise
        problem = f"--arch={arch} cannot see views of --size={size} ({first_line(error)})"
        raise UserError(f"{problem}; 224 will do") from None


def on_gpu(config):
    return torch.device(config["device"]).type == "cuda"


def dtype_of(config):
    """The precision of weights and images. (bfloat16 is autocast's: the weights are float32.)"""
    if config["precision"] not in ("float32", "bfloat16", "float64"):
        raise ValueError(f"precision is {config['precision']}: expected float32, bfloat16, float64")
    return torch.float64 if config["precision"] == "float64" else torch.float32


def autocast(config):
    device = torch.device(config["device"]).type
    return torch.autocast(device, torch.bfloat16, enabled=config["precision"] == "bfloat16")


def fast_bfloat16(device):
    """Whether the device has bfloat16: GPUs of Ampere or later, CPUs with AVX-512 bf16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def learning_rate(config, epoch):
    """At a fractional epoch: "cosine", or a tenth after each epoch listed ("300,400")."""
    if config["schedule"] == "cosine":
        return config["lr"] * (1 + math.cos(math.pi * epoch / config["epochs"])) / 2
    return config["lr"] * 0.1 ** sum(epoch >= float(at) for at in config["schedule"].split(","))


def get_method(config):
    """The Method that a configuration names."""
    table = methods(config["groups"], config["same"])
    if config["method"] not in table:
        raise ValueError(f"method is {config['method']!r}: expected one of {', '.join(table)}")
    return table[config["method"]]


def build_encoder(config, splits=1):
    """The encoder that a configuration names, before any training."""
    method = get_method(config)
    own = {name: config[name] for name in ("arch", "stem", "hidden", "dim", "size")}
    return Encoder(spaces=len(method.spaces), heads=method.heads, splits=splits, **own)


def meta_encoder(config):
    """The encoder that a configuration names, as shapes without numbers."""

    def to_meta(module, name, parameter):
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    # Under torch.device("meta") RegNet could not compute its widths.
    register = nn.modules.module.register_module_parameter_registration_hook
    with register(to_meta), torch.random.fork_rng(devices=[]):
        return build_encoder(config).to("meta")


def init_state(config, classes=0):
    """The state before the first step. The queue holds random directions until keys fill it."""
    device, dtype = config["device"], dtype_of(config)
    method = get_method(config)
    splits = config["splits"] // world_size()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        encoder_q = build_encoder(config, splits)
        classifier = nn.Linear(encoder_q.features, classes) if classes else nn.Identity()
        # All key views pass together, and each has its own BatchNorm splits.
        encoder_k = build_encoder(config, splits * max(len(method.share), 1)).requires_grad_(False)
    encoder_k.load_state_dict(encoder_q.state_dict())
    for module in (encoder_q, encoder_k, classifier):
        module.to(device, dtype, memory_format=torch.channels_last)
    if config["compile"]:
        encoder_q.compile()
        encoder_k.compile()
    weights = [*encoder_q.parameters(), *classifier.parameters()]
    sgd = partial(torch.optim.SGD, momentum=0.9, fused=True)
    optimizer = sgd(weights, config["lr"], weight_decay=config["weight_decay"])
    shape = len(method.spaces), config["queue"], config["dim"]
    queue = torch.randn(shape, generator=make_generator("queue", config["seed"]))
    queue = F.normalize(queue, dim=-1).to(device, dtype)
    total = torch.zeros(max(len(method.spaces), 1), device=device, dtype=dtype)
    encoder_q, classifier = wrap_ddp(encoder_q), wrap_ddp(classifier)
    return State(encoder_q, encoder_k, classifier, optimizer, queue, 0, 0, total)


def training_labels(dataset, config):
    """What "supervised" learns -> labels (n,), None of "rotation"; number of classes; name."""
    data = data_module()
    known = (*data.label_names(dataset.classes), "rotation")
    label = data.check_choice("label", config["label"] or known[0], known)
    if config["method"] != "supervised":
        return None, 0, config["label"]
    if label != "rotation":
        return dataset.labels[label], len(dataset.classes[label]), label
    if "rotation" not in config["groups"]:
        raise UserError("--label=rotation: name rotation in --groups, so that it is drawn")
    return None, 4, label


def training_rows(dataset, labels):
    """The images to train on -> rows (m,): all of them, or those that have the label to learn."""
    if labels is None:
        return torch.arange(len(dataset.images))
    return (labels >= 0).nonzero().squeeze(1)


# ---------------------------------------- the loop and its log

LOG_LINES = 200  # of a run
NUMBER = int, float
LOGGED = {"step": int, "loss": [NUMBER], "lr": NUMBER, "win": [NUMBER]}  # see check_types
FEW_STEPS = 1000  # with fewer, features hardly differ from random ones


@typed
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
    sampling: tuple = None,
    label: str = None,
    download: bool = False,
    arch: str = None,
    init: str = None,
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
    split_seed: int = 0,
    workers: int = None,
    device: str = "auto",
    precision: str = "auto",
    compile: bool = False,
    cache: str = "auto",
    packed: str = None,
    textures: str = None,
    fresh: bool = False,
):
    """Train an encoder: LooC, LooC++, or one of the paper's baselines (its sections 3 and 4).

    What is left out comes from the data set's row of RECIPES. The run folder holds config.json,
    log.jsonl, curves.png, views.png, checkpoint.pt, backbone.pt (torchvision's names) and heads.pt.
    A run that was stopped goes on from its checkpoint.

    Args:
        method: looc, looc++, moco, moco_same, moco++ or supervised; see `python loo.py methods`
        groups: augmentation groups, one space each; with moco, what it becomes invariant to
        data: factors, folder, a set of the paper (see `python data.py check`) or torchvision's
        root: the folder of the data
        out: run folder, by default runs/METHOD-GROUPS-DATA
        recipe: whose defaults to take, by default the data set's own, else those of factors
        always: augmentations drawn anew for every view, without a space; groups leave this list
        same: moco_same only: the groups whose draw query and key share
        sampling: how augmentations are drawn, as rotation.p=0.75,crop.area=0.3 (see loo.GROUPS)
        label: supervised only: the label to learn, or rotation
        download: let torchvision fetch the data
        arch: small, or a torchvision network such as resnet18 or vit_b_16, without its dropout
        init: weights to start from: a state dict's file, a run folder, or imagenet (torchvision's)
        stem: imagenet, or cifar for small images (ResNets only)
        size: side of a view in pixels
        canvas: side of the stored images; imagenet100's recipe has 384 for --size=224
        epochs: passes over the data
        batch: images a step
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
        seed: of everything random in training
        split_seed: of a folder's own split: runs of one split_seed have the same test images
        workers: processes that decode images, by default one for each core
        device: auto, cpu or cuda
        precision: auto, float32 (no TF32), bfloat16, or float64 (to check that two runs agree)
        compile: torch.compile the encoders: slow to start, then often faster; see `bench --compile`
        cache: where decoded images are: device, host (memory), none (a memory map on disk), or auto
        packed: the folder that `python data.py pack` wrote, by default the run folder's parent
        textures: the folder that `python data.py stylize` wrote, for the group texture
        fresh: start over; a run already in the folder is moved aside
    """
    config = default_config(**locals())
    from data import decode_cached, label_names, open_dataset, with_textures

    tune_backends()
    out = Path(config["out"])
    if canvas is None and not fresh and left_canvas(out):
        config["canvas"] = None
    where = {k: config[k] for k in ("size", "canvas", "split_seed", "download")}
    split = "train" if method == "supervised" else "pretrain"
    folder = packed or out.parent  # of decoded images
    start = {}
    with init_distributed(config["device"]) as leader_first, contextlib.ExitStack() as stack:
        with leader_first():
            if not fresh and any(out.glob("checkpoint*.pt")):
                check_same_run(config, out)
            elif not fresh and (out / "backbone.pt").exists():
                problem = f"{out} holds a trained run without its checkpoint.pt: it cannot go on"
                advice = f"name another --out (--init={out} goes on from its weights), or --fresh"
                raise UserError(f"{problem}; {advice}")
            elif config["init"]:
                start = start_weights(config)
            shared = world_size() > 1 or cache == "none" or bool(packed)
            root = config["root"]  # one name in all messages
            files = open_dataset(data, split, root=root, **where)
            dataset = decode_cached(files, workers, folder, shared)
            if "texture" in config["groups"] + config["always"]:
                options = workers, config["device"], split_seed
                dataset = with_textures(data, files, dataset, root, textures, folder, *options)
            dataset, place = place_dataset(dataset, config)
            config["held"] = dict(dataset.held)
            labels, classes, config["label"] = training_labels(dataset, config)
            n = len(training_rows(dataset, labels))
            if labels is not None:  # they may change while a run is stopped
                content = repr((dataset.classes[config["label"]], labels.tolist()))
                config["held"] |= {"label": [n, hashlib.sha1(content.encode()).hexdigest()]}
            if n < (b := config["batch"]):
                having = "" if labels is None else f" that have a {config['label']}"
                problem = f"--batch={b} is more than the {n} training images{having}"
                raise UserError(f"{problem}: take a smaller one, a multiple of --splits")
            if rank() == 0:
                if fresh and out.exists() and any(out.iterdir()):
                    with lock_folder(out):
                        print(f"moved the run that was there to {move_aside(out)}")
                stack.enter_context(lock_folder(out))
        asked = stack.enter_context(catch_signals())
        state = load_checkpoint(init_state(config, classes), config, out)
        if start and state.step == 0:
            for encoder in (state.encoder_q, state.encoder_k):
                unwrap_model(encoder).load_state_dict(start, strict=False)  # see check_fit
        all_reduce_max(0)  # wait until every rank has read what was there
        if rank() == 0:
            prepare_folder(state, dataset, config, out)
            print_header(state, dataset, n, place, config, start)
        begun, first = time.perf_counter(), state.step
        state = train_loop(state, dataset, labels, config, out, asked)
        if rank() == 0:
            export(state.encoder_q, out)
            files = "backbone.pt, heads.pt, checkpoint.pt, log.jsonl, curves.png, config.json"
            seconds = time.perf_counter() - begun
            if state.step > first:
                print(f"trained in {seconds:.0f} s; wrote {out}: {files}, views.png")
            task = "linear" if label_names(dataset.classes) else "rotation"
            latest = os.path.realpath(out) == os.path.realpath("runs/latest")
            print(f"next: python eval.py {task}" + ("" if latest else f" --run={out}"))


ALWAYS = inspect.signature(train).parameters["always"].default


def left_canvas(out):
    """Did the run in this folder begin before its recipe had a canvas? Then it keeps its own."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return loads((out / "config.json").read_text()).get("canvas") is None


def prepare_folder(state, dataset, config, out):
    """Write what a run folder holds from the start, and cut its log to the step of `state`."""
    write_atomic = data_module().write_atomic
    # Also of a run that goes on: its images may have moved.
    write_atomic(out / "config.json", dumps(config, indent=1).encode())
    if state.step == 0:
        save_views(dataset, config, out / "views.png")
    link_latest(out, config["root"] if config["data"] == "folder" else None)
    log = read_jsonl(out / "log.jsonl", LOGGED, ["win"])
    kept = [record for record in log if record["step"] <= state.step]
    write_atomic(out / "log.jsonl", "".join(dumps(record) + "\n" for record in kept).encode())


def print_header(state, dataset, n, place, config, start):
    """Print the first lines of a run on n images; see place_dataset and start_weights."""
    batch, queue, out = config["batch"], config["queue"], config["out"]
    spaces = get_method(config).spaces
    steps = config["epochs"] * (n // batch)
    among = f" on {world_size()} processes" if world_size() > 1 else ""
    if state.step == steps:
        print(f"{out} is trained already; --fresh starts over")
    elif state.step:
        print(f"resuming {out} at step {state.step}{among}")
    else:
        where = {"device": "on the device", "host": "in memory", "none": "on disk"}[place]
        known = data_module().label_names(dataset.classes)
        labels = "" if known else ", no labels"
        if "class" in known:
            classes = dataset.classes["class"]
            labels = f", {len(classes)} classes ({classes[0]} to {classes[-1]})"
        parts = "backbone and heads" if "w2" in start else "backbone"
        source = f" ({parts} from {config['init']})" if start else ""
        print(
            f"{config['method']} on {config['data']}: {n} training images {where}{labels}; "
            f"{config['arch']}{source} on views of {config['size']} pixels, "
            f"{steps} steps of {batch}{among}, spaces {', '.join(spaces) or config['label']}; "
            f"{config['device']}, {config['precision']}; see {out}/views.png"
        )
        drawn = [name for name in GROUPS if name in {*config["groups"], *config["always"]}]
        if "blur" in drawn and config["size"] < SMALLEST_BLURRED:
            drawn[drawn.index("blur")] = f"no blur (no effect below {SMALLEST_BLURRED} pixels)"
        print(f"every view draws {', '.join(drawn) or 'nothing'}")
        if spaces:
            full = math.ceil(queue / batch)
            print(f"the queue holds random directions until step {full}, then {queue} keys a space")
        if steps < FEW_STEPS and not start:
            enough = f"--epochs={math.ceil(FEW_STEPS / (n // batch))}"
            print(f"{steps} steps are few to learn from scratch: {enough} makes {FEW_STEPS}")
    unfit = [] if state.step else unfit_splits(config)
    for warning in [*odd_settings(config, n, dataset.aspect), *unfit]:
        print(f"warning: {warning}", file=sys.stderr)
    sys.stdout.flush()


def odd_settings(config, n, aspect):
    """What to warn of before a run on n images of a data set with this aspect (b,) -> lines."""
    epochs, schedule, queue = (config[name] for name in ("epochs", "schedule", "queue"))
    long = (aspect.log2().abs() > 1).double().mean().item()
    if long >= 0.01:
        yield f"{long:.0%} of the images are longer than 2:1: a larger --canvas keeps more of them"
    for group in config["groups"]:
        chance = (config["sampling"] or {}).get(group, {}).get("p", 1)
        if chance == 0 or (group == "blur" and config["size"] < SMALLEST_BLURRED):
            yield f"--groups={group} changes no view, or few: its negatives equal the positive"
    late = [at for at in schedule.split(",") if at != "cosine" and float(at) >= epochs]
    if late:
        yield f"--schedule={schedule}: {', '.join(late)} never come in --epochs={epochs}"
    share = own_key_share(n, config["batch"], queue)
    if get_method(config).spaces and share > 0.1:
        meet = f"{share:.0%} of the queries meet an older key of their own image in it"
        yield f"--queue={queue} is long for {n} images: {meet}"


def unfit_splits(config):
    """What evaluations would refuse, which is better known before the training -> lines."""
    data, name = data_module(), config["data"]
    if name == "factors" or data.DATASETS[name].torchvision:
        return
    where = dict(root=config["root"], split_seed=config["split_seed"])
    splits = data.dataset_splits(name, **where)
    if splits == ("train",):
        yield f"{config['root']} has no images for val or test, which evaluations need"
        return
    for split in splits[1:]:
        try:
            found = data.open_dataset(name, split, **where)
        except UserError as error:
            yield f"evaluations will not start: {error}"
            return
    for label in data.label_names(found.classes):
        if (found.labels[label] < 0).all():
            yield f"no {split} image has the label {label}, which evaluations need"


def own_key_share(n, batch, queue):
    """The expected share of queries whose own image has a key in the queue, of n images."""
    epoch = n // batch * batch  # the images that one epoch sees
    older = (queue - torch.arange(0, epoch, batch)).clamp(min=0).double()  # keys of epochs before
    missed = (1 - epoch / n) ** (older // epoch) * (1 - older % epoch / n)
    return (1 - missed).mean().item()


def save_views(dataset, config, path):
    """Draw the views of a few images, each key with its space and what it shares."""
    n, method = len(dataset.images), get_method(config)
    some = torch.linspace(0, n - 1, min(12, n)).long()  # of all classes, which lie in order
    on_cpu = config | {"device": "cpu", "precision": "float32"}
    _, images, aspect, textures = get_batch(dataset, on_cpu, some)
    query, keys, _ = training_views(images, config, 0, aspect, textures)
    names = ["query"]
    for shared, role in zip(method.share, method.role.T):
        groups = " + ".join(itertools.compress(method.groups, shared)) or "nothing"
        spaces = ", ".join(itertools.compress(method.spaces, role == 1))
        names.append(f"key of space {spaces}: shares {groups}")
    zoom = max(1, 64 // config["size"])
    views = torch.cat([query[None], keys])
    data_module().image_grid(views, names, [""] * len(some), path, zoom)


def batch_rows(config, n, first, steps):
    """The rows of the data set that this rank reads, step by step from step `first`."""
    for step in range(first, steps):
        epoch, i = divmod(step, n // config["batch"])
        if i == 0 or step == first:
            order = data_module().epoch_batches(n, config["batch"], config["seed"], epoch)
        yield order[i][rank_rows(config, step).images]


def get_batch(dataset, config, rows):
    """-> rows (m,), images (m 3 h w) in [0, 1], aspect (m,), textures (m copy 3 h w) or None."""

    # Bytes travel to the training device, not floats.
    def place(x):
        x = x.index_select(0, move_like(x, rows))
        if on_gpu(config) and not x.is_cuda:
            x = x.pin_memory()
        # From a GPU to the CPU a copy must block: nothing after it waits for the GPU.
        return x.to(config["device"], non_blocking=on_gpu(config)).to(dtype_of(config))

    textures = None if dataset.textures is None else place(dataset.textures).div_(255)
    return rows, place(dataset.images).div_(255), place(dataset.aspect), textures


def get_batches(dataset, config, batches):
    """get_batch of each of these rows (m,), on a GPU one ahead of its use."""
    # On a CPU a second thread would only be in the way.
    map_ahead = prefetch if on_gpu(config) else map
    return map_ahead(partial(get_batch, dataset, config), batches)


def prefetch(function, items):
    """map, but a thread computes the next result while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == 2:
                yield waiting.popleft().result()
        yield from (future.result() for future in waiting)


def place_dataset(dataset, config):
    """Move the images to where --cache says -> ImageSet, and where that is.

    "device": by default where it has twice the room; "host", the memory; "none": a map on disk.
    """
    place = config["cache"]
    if place == "auto":
        size = sum(x.numel() for x in (dataset.images, dataset.textures) if x is not None)
        has_room = on_gpu(config) and size < torch.cuda.mem_get_info(config["device"])[0] / 2
        place = "device" if has_room else "none"
    if place == "none" and not dataset.images.is_shared():  # factors is never on disk
        place = "host"
    device = config["device"] if place == "device" else "cpu"

    def move(x):
        return x if x is None or place == "none" else x.to(device, copy=x.is_shared())

    return dataset._replace(images=move(dataset.images), textures=move(dataset.textures)), place


def train_loop(state, dataset, labels, config, out, asked):
    """Do the steps that are left -> State. Logs to out/log.jsonl, saves to out/checkpoint.pt.

    labels (n,), -1 where an image has none, or None. A signal in `asked` ends it when all is saved.
    Raises NonFiniteError, before anything is saved, when the loss or a weight is not finite.
    """
    usable = training_rows(dataset, labels)
    per_epoch = len(usable) // config["batch"]
    steps = config["epochs"] * per_epoch
    log_every = max(1, steps // LOG_LINES)
    save_every = config["save_every"] or 20 * log_every
    marks = [(time.perf_counter(), state.step)]
    batches = (usable[rows] for rows in batch_rows(config, len(usable), state.step, steps))
    for rows, images, aspect, textures in get_batches(dataset, config, batches):
        state.optimizer.param_groups[0]["lr"] = learning_rate(config, state.step / per_epoch)
        if config["method"] == "supervised":
            y = None if labels is None else move_like(images, labels[rows])
            state, (loss, *compared) = supervised_step(state, images, aspect, y, config, textures)
        else:
            state, (loss, *compared) = train_step(state, images, aspect, config, textures)
        state = state._replace(total=state.total + loss)
        number = all_reduce_max(asked[0] if asked else 0)
        logging = state.step % log_every == 0 or state.step == steps
        saving = state.step % save_every == 0 or state.step == steps or number
        if saving or logging:
            all_reduce_mean([state.total])
            check_finite(state)
        if logging:
            record = make_record(state, compared, config, marks, steps, log_every)
            record |= {"unreadable": len(dataset.unreadable)} if dataset.unreadable else {}
            state = state._replace(total=torch.zeros_like(state.total))
            if rank() == 0:
                with open(out / "log.jsonl", "a") as file:
                    file.write(dumps(record) + "\n")
                seldom = state.step % (20 * log_every) == 0 or state.step == steps
                print_record(record, config, steps, seldom)
                if seldom:
                    save_curves(config, out)
        if saving:
            save_checkpoint(state, config, out)
        if number and state.step < steps:
            exit_for_signal(number, state.step)
    return state


@torch.no_grad()
def contrast_metrics(q, k, queue, role, tau):
    """How each space is doing, arguments as in multi_space_loss -> {name: (s,)}.

    win: how often the positive is the top-1 of all keys; win_near: of the own keys; win_far: of the
    queue. mass_near, mass_far: the softmax mass of the own and of the queued negatives.
    The mass on own negatives is what makes a space keep its group.
    """
    own, queued, index = space_logits(q, k, queue, role, tau)
    positive = own.gather(2, index)  # (s b 1)
    own = own.scatter(2, index, -math.inf)  # (s b v), the negatives alone
    top1_own = (positive > own).all(2)
    top1_queued = (positive > queued).all(2)
    softmax = torch.cat([positive, own, queued], 2).softmax(2)
    _, mass_own, mass_queued = softmax.split([1, own.shape[2], queued.shape[2]], 2)
    return {
        "win": (top1_own & top1_queued).float().mean(1),
        "win_near": top1_own.float().mean(1),
        "win_far": top1_queued.float().mean(1),
        "mass_near": mass_own.sum(2).mean(1),
        "mass_far": mass_queued.sum(2).mean(1),
    }


def make_record(state, compared, config, marks, steps, every):
    """A line of log.jsonl. marks: (seconds, step) at the start and at each record before."""
    # A resume does not reset state.total, so its steps are counted from the last record.
    count = (state.step - 1) % every + 1
    record = {"step": state.step, "loss": (state.total / count).tolist()}
    if compared:
        metrics = contrast_metrics(*compared, config["tau"])
        all_reduce_mean([*metrics.values()])
        record |= {name: x.tolist() for name, x in metrics.items()}
    marks.append((time.perf_counter(), state.step))
    (begun, first), (before, previous), (now, step) = marks[0], marks[-2], marks[-1]
    return record | {
        "lr": state.optimizer.param_groups[0]["lr"],
        "images_per_s": config["batch"] * (step - previous) / (now - before),
        "seconds_left": (now - begun) / (step - first) * (steps - step),
    }


def print_record(record, config, steps, seldom):
    """Print a line of progress: on a terminal over the last one, elsewhere only if `seldom`."""
    spaces = get_method(config).spaces or (config["label"],)

    def by_space(key, form):
        return " ".join(f"{name} {x:{form}}" for name, x in zip(spaces, record[key]))

    clock = str(datetime.timedelta(seconds=int(record["seconds_left"]))).removeprefix("0:")
    text = f"step {record['step']}/{steps}  loss {by_space('loss', '.2f')}"
    text += f"  wins {by_space('win', '.0%')}" if "win" in record else ""
    text += f"  lr {record['lr']:.3g}  {record['images_per_s']:.0f} images/s  {clock} left"
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="\n" if record["step"] == steps else "", flush=True)
    elif seldom:
        print(text, flush=True)


def read_curves(config, out, images=1):
    """The log of a run, {quantity: {space: [(steps times images, value), ...]}}."""
    spaces = get_method(config).spaces or (config["label"],)
    panels = collections.defaultdict(lambda: collections.defaultdict(list))
    for record in read_jsonl(out / "log.jsonl", LOGGED, ["win"]):
        x = record["step"] * images
        for title, key in (("loss", "loss"), ("top-1", "win")):
            for space, y in zip(spaces, record.get(key) or ()):
                panels[title][space].append((x, y))
        panels["learning rate"]["all spaces"].append((x, record["lr"]))
    return panels


def save_curves(config, out):
    """Draw the log in curves.png; where that fails, warn and go on."""
    path = out / "curves.png"
    try:
        data_module().draw_curves(read_curves(config, out), path, "step")
    except Exception as error:  # no drawing is worth a training
        print(f"warning: {path} is not drawn: {first_line(error)}", file=sys.stderr)


class NonFiniteError(UserError):
    code = 3


@torch.no_grad()
def check_finite(state):
    """NonFiniteError if a loss or a weight is not finite."""
    norms = torch._foreach_norm(list(state.encoder_q.parameters()))
    if math.isfinite(torch.stack(norms).sum() + state.total.sum()):
        return
    problem = f"the loss or a weight is not finite at step {state.step}, which is not saved"
    raise NonFiniteError(f"{problem}: lower --lr, raise --tau, or take --precision=float32")


STOPPING = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


@contextlib.contextmanager
def catch_signals():
    """A list that gets the signals to stop, so that no step is cut short. SLURM sends SIGUSR1."""
    asked = []
    in_main = threading.current_thread() is threading.main_thread()
    with contextlib.ExitStack() as stack:
        for number in signal.Signals if in_main else ():
            # nohup ignores SIGHUP, and so do we then.
            if number.name in STOPPING and signal.getsignal(number) != signal.SIG_IGN:
                before = signal.signal(number, lambda number, frame: asked.append(number))
                stack.callback(signal.signal, number, before)
        yield asked


def exit_for_signal(number, step):
    """Say how to resume, and exit as a signal does."""
    if rank() == 0:
        launch = ["python"]
        if world_size() > 1:
            of_torchrun = os.environ.get("LOCAL_WORLD_SIZE")
            by_srun = "SLURM_PROCID" in os.environ and not of_torchrun
            count = f"--nproc-per-node={of_torchrun or world_size()}"
            launch = ["srun", "python"] if by_srun else ["torchrun", count]
        print(f"stopped by {signal.Signals(number).name} at step {step}, all is saved")
        words = []
        for before, word in zip(["", *sys.argv], sys.argv):
            value_of_fresh = before == "--fresh" and word.lower() in ("true", "false")
            if not word.startswith("--fresh") and not value_of_fresh:
                words.append(word)
        print(f"resume with: {shlex.join(launch + words)}", flush=True)
    raise SystemExit(128 + number)


def tune_backends():
    """Let cuDNN try its convolutions and take the fastest, and none that rounds float32 to TF32.

    Let glibc keep up to 1 GiB of freed memory, for it is slow to ask the system for it again.
    """
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
            libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at most 32 MiB


# ---------------------------------------- distributed: one process a device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_slice(b):
    """This rank's rows of a global batch of b."""
    return torch.arange(b).chunk(world_size())[rank()]


def all_gather(x):
    """(s v b c) of each rank -> (s v B c), in the order of ranks. For keys: no gradient flows."""
    if not dist.is_initialized():
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts, 2)


def all_reduce_mean(tensors):
    """The mean of each tensor over ranks, in place."""
    for x in tensors:
        all_reduce_sum(x).div_(world_size())
    return tensors


def all_reduce_sum(x):
    """x summed over ranks, in place; x is on the CPU, or on each rank's own GPU."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def all_reduce_max(number):
    """The largest of the ranks' numbers, so that all of them do the same."""
    if dist.is_initialized():
        # On the CPU, by Gloo: nothing waits for the GPU.
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def unwrap_model(module):
    """The module inside DistributedDataParallel."""
    return getattr(module, "module", module)


def wrap_ddp(module):
    """Let gradients become their mean over ranks; BatchNorm's statistics do so when saved."""
    if not dist.is_initialized() or not any(p.requires_grad for p in module.parameters()):
        return module
    ddp = nn.parallel.DistributedDataParallel
    newer = "forward_sync_buffers" in inspect.signature(ddp).parameters
    return ddp(module, **{"forward_sync_buffers" if newer else "broadcast_buffers": False})


def asked_processes():
    """How many processes torchrun or another launcher started; some say 1 and no more."""
    return environ_count("WORLD_SIZE", 1, data_module().launcher_environ())


def environ_count(name, default, env=os.environ):
    """A variable of the environment that counts something; UserError for what is no count."""
    said = env.get(name) or str(default)
    if not re.fullmatch("[1-9][0-9]{0,9}", said):
        raise UserError(f"{name}={said}: expected 1 or more; unset it for {default}")
    return int(said)


class PeerLost(UserError):
    code = 1


@contextlib.contextmanager
def init_distributed(device):
    """Join the processes that torchrun or srun started, or do nothing.

    -> leader_first: a context that rank 0 enters first, however long it takes.
    PeerLost when a process is lost later, or does not answer in 30 times the patience of
    `meet_processes`.
    """
    if asked_processes() == 1:
        yield contextlib.nullcontext
        return
    patience = datetime.timedelta(seconds=environ_count("LOOC_PATIENCE", 60))
    store, me, size = meet_processes(patience)
    gpu, backend = torch.device(device), "gloo"
    if gpu.type == "cuda":
        torch.cuda.set_device(gpu.index or 0)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=me, world_size=size, timeout=30 * patience)
    ended = None
    try:
        yield partial(take_turns, store, me, itertools.count())
    except SystemExit as error:  # after a signal
        ended = error
    except RuntimeError as error:
        of_peers = re.search("gloo|nccl|connection|peer", str(error), re.IGNORECASE)
        if not isinstance(error, dist.DistError) and not of_peers:
            raise
        message = f"another process was lost; its own message says why ({first_line(error)})"
        raise PeerLost(message) from None
    # In a thread, for NCCL may wait for a process that the signal ended.
    closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
    closing.start()
    closing.join(10)
    if ended:
        raise ended


def meet_processes(patience):
    """Wait for all processes -> store, rank, world size. UserError after `patience`."""
    try:
        store, me, size = next(dist.rendezvous("env://", timeout=patience))
        store.set(f"rank {me}", "here")
        store.wait([f"rank {i}" for i in range(size)], patience)
    except (RuntimeError, ValueError) as error:
        within = f"within LOOC_PATIENCE={patience.total_seconds():.0f} s ({first_line(error)})"
        problem = f"not all WORLD_SIZE={os.environ['WORLD_SIZE']} processes came {within}"
        raise UserError(f"{problem}: start all by torchrun or srun, or wait longer") from None
    return store, me, size


@contextlib.contextmanager
def take_turns(store, me, turns):
    """A context that the other ranks enter when rank 0 has left it."""
    turn = f"turn {next(turns)}"
    if me:
        store.wait([turn], datetime.timedelta(days=7))
    yield
    if not me:
        store.set(turn, "done")


# ---------------------------------------- checkpoints and the run folder

VERSION = 2  # of checkpoints
# Version 1 has other names.
VERSION_1 = {"query": "encoder_q", "key": "encoder_k", "pointer": "queue_ptr"}


def save_checkpoint(state, config, out):
    """Write checkpoint.pt whole or not at all; the one before becomes checkpoint.old.pt."""
    # Running statistics are linear in the batches', so their mean over ranks could wait until now.
    buffers = [*state.encoder_q.buffers(), *state.encoder_k.buffers()]
    all_reduce_mean([x for x in buffers if x.is_floating_point()])
    if rank():
        return
    content = dict(config=config, version=VERSION, torch=str(torch.__version__))
    content["threads"] = torch.get_num_threads()
    for name, part in state._asdict().items():
        stateful = hasattr(part, "state_dict")
        content[name] = unwrap_model(part).state_dict() if stateful else part
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic = data_module().write_atomic
    write_atomic(out / "checkpoint.pt", buffer.getvalue(), keep=out / "checkpoint.old.pt")


def load_checkpoint(state, config, out):
    """The state saved in the run folder, or `state` where there is none; UserError if neither."""
    paths = [out / name for name in ("checkpoint.pt", "checkpoint.old.pt") if (out / name).exists()]
    for path in paths:
        try:
            saved = data_module().read_tensors(path, config["device"])
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        try:
            if saved["version"] not in (1, VERSION):
                raise ValueError(f"of version {saved['version']}, not {VERSION}")
            saved = {VERSION_1.get(name, name): x for name, x in saved.items()}
            check_same_config(config, saved["config"], out)
            for part in ("encoder_q", "encoder_k", "classifier", "optimizer"):
                unwrap_model(getattr(state, part)).load_state_dict(saved[part])
            rest = {name: saved[name] for name in ("queue", "queue_ptr", "step", "total")}
            return state._replace(**rest)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            if isinstance(error, UserError) or lacks_memory(error):
                raise
            print(f"warning: {path} holds no such run ({first_line(error)})", file=sys.stderr)
    if paths:
        raise UserError(f"{paths[0]} cannot be read: --fresh moves it aside and starts over")
    return state


# Flags that may differ between the parts of a run.
FREE_FLAGS = {"device", "precision", "compile", "workers", "download", "cache", "out"}
FREE_FLAGS |= {"save_every", "held"}


def check_same_config(config, saved, out):
    """UserError where `saved`, the config of the run in folder `out`, has other settings.

    A folder of images is what it holds, wherever it is: see ImageSet.held.
    """
    before = saved["seed"] if config["data"] == "folder" else config["split_seed"]
    saved = {"split_seed": before} | saved  # a run of before has none
    now, then = config.get("held", {}), saved.get("held", {})
    free = FREE_FLAGS | (now.keys() & then.keys())
    other = {k: v for k, v in config.items() if k not in free and saved.get(k) != v}
    words = [f"--{k}={v} (the run has {saved.get(k)})" for k, v in other.items()]
    for k in sorted(free - FREE_FLAGS):
        if now[k] != then[k]:
            count = f"{now[k][0]} images, by name, size or label other than the run's {then[k][0]}"
            words.append(f"--{k}={config[k]} with {count}")
    if words:
        advice = f"name another --out (--init={out} goes on from its weights), or --fresh"
        raise UserError(f"{out} holds a run with other settings: {', '.join(words)}; {advice}")


def check_same_run(config, out):
    """check_same_config of what is known before images are read, which may take an hour."""
    try:
        saved = read_config(out, ("seed",))
    except (OSError, ValueError, TypeError):
        return  # load_checkpoint will tell
    later = ("root", "textures", "label")
    check_same_config({k: v for k, v in config.items() if k not in later}, saved, out)


@contextlib.contextmanager
def lock_folder(out):
    """Let one trainer use a run folder: a lock that dies with its process."""
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError):  # Windows has no such lock
            import fcntl

            folder = os.open(out, os.O_RDONLY)
            stack.callback(os.close, folder)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"another process is training in {out}"
                raise UserError(f"{problem}: wait for it, or name another folder") from None
            except OSError as error:  # some disks have no locks
                print(f"warning: {out} is not locked: {error.strerror}", file=sys.stderr)
        yield


def move_aside(out):
    """Rename a run folder to the first free name.1, name.2, ... -> its new path."""
    if not out.name:
        raise UserError(f"--fresh cannot move --out={out} aside: start it from another folder")
    paths = (out.with_name(f"{out.name}.{i}") for i in itertools.count(1))
    return out.rename(next(path for path in paths if not path.exists()))


def link_latest(out, root=None):
    """Let runs/latest point at this run, where links can be made and no class of `root` lies."""
    link = Path("runs/latest")
    # Another run may start at the same moment, so the link is replaced in one go.
    own_link = link.with_name(f"latest.{os.getpid()}")
    target = os.path.relpath(os.path.realpath(out), os.path.realpath(link.parent))
    try:
        if root:
            data_module().forbid_inside(link.parent, root)
        link.parent.mkdir(exist_ok=True)
        if link.is_symlink() or not link.exists():
            own_link.symlink_to(target, target_is_directory=True)
            os.replace(own_link, link)
    except (OSError, NotImplementedError, UserError) as error:
        hint = f"name this run to eval.py as --run={out}"
        print(f"warning: no link runs/latest ({first_line(error)}): {hint}", file=sys.stderr)


def read_jsonl(path, types=None, optional=()):
    """The lines of a JSONL file; one that is cut short, or fails check_types, is left out."""
    lines = []
    text = path.read_text(errors="replace") if path.exists() else ""
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = dict(loads(line))
            check_types(record, types or {}, optional)
            lines.append(record)
        except (ValueError, TypeError, RecursionError):
            print(f"warning: {path}, line {number} is not whole and left out", file=sys.stderr)
    return lines


def check_types(record, types, optional=()):
    """ValueError unless a dict from JSON has values of these types {key: type}.

    [type]: a list of such values; what is optional may be absent or null.
    """
    for key, kind in types.items():
        value = record.get(key)
        if value is None and key in optional:
            continue
        if isinstance(kind, list):
            fits = isinstance(value, list) and all(isinstance(x, kind[0]) for x in value)
        else:
            fits = isinstance(value, kind)
        if not fits:
            raise ValueError(f"its {key} is {value!r:.20}")


# What config.json must have for an encoder, and what it may have.
CONFIG_TYPES = dict(method=str, groups=[str], data=str, seed=int, arch=str, stem=str, size=int)
CONFIG_TYPES |= dict(hidden=int, dim=int)
CONFIG_MAYBE = dict(same=[str], always=[str], batch=int, canvas=int, root=str, split_seed=int)
CONFIG_MAYBE |= dict(held=dict)


def read_config(run, needed=tuple(CONFIG_TYPES)):
    """config.json of a run folder; ValueError where it is none of ours, or lacks what is needed."""
    config = dict(loads((Path(run) / "config.json").read_text("utf-8-sig")))
    if lacks := [name for name in needed if name not in config]:
        raise ValueError(f"it lacks {', '.join(lacks)}")
    types = CONFIG_TYPES | CONFIG_MAYBE
    check_types(config, types, types.keys() - needed)
    config = dict(same=[], always=list(ALWAYS), canvas=None, root=None) | config
    if "method" in needed and config["method"] not in methods(()):
        raise ValueError(f"its method is {config['method']}")
    return config | {"held": config.get("held") or {}}


def export(encoder, out):
    """Write backbone.pt, in torchvision's names with Z_0's layer4, and heads.pt, the rest."""
    state = {name: x.cpu() for name, x in unwrap_model(encoder).state_dict().items()}
    for name, part in zip(("backbone.pt", "heads.pt"), split_state(state)):
        data_module().write_tensors(out / name, part)


def split_state(state):
    """An encoder's state dict -> those of backbone.pt and of heads.pt, see `export`."""
    heads = {name: x for name, x in state.items() if not name.startswith("trunk.")}
    backbone = {
        name.removeprefix("trunk.").replace("tops.0.", "layer4."): x
        for name, x in state.items()
        if name.startswith(("trunk.", "tops.0."))
    }
    return backbone, heads


def join_state(backbone, heads, spaces):
    """The inverse of split_state. Without heads, every space's layer4 is the backbone's."""
    state = {}
    for name, x in backbone.items():
        copies = [f"trunk.{name}"]
        if name.startswith("layer4."):
            copies = [name.replace("layer4", f"tops.{space}", 1) for space in range(spaces)]
        state |= dict.fromkeys(copies, x)
    return state | heads


def start_weights(config):
    """The weights that --init names, as an encoder's state dict. UserError if they do not fit.

    A run with the same method, groups and head sizes gives its heads too. The classifier goes.
    """
    init, encoder, saved = config["init"], meta_encoder(config), None
    expected, own_heads = split_state(encoder.state_dict())
    if init == "imagenet":
        content = imagenet_weights(config["arch"])
    elif Path(init).is_dir():
        other, saved = load_encoder(init)
        content = other.state_dict()
    elif Path(init).exists():
        content = data_module().read_tensors(init)
        if isinstance(content, dict) and {"encoder_q", "config"} <= content.keys():
            content, saved = content["encoder_q"], content["config"]  # a run's checkpoint
    else:
        raise UserError(f"--init={init}: no such file; expected a file, a run folder or imagenet")
    tensors, heads = strip_prefix(flatten(content), expected), {}
    if saved:
        for flag in ("arch", "stem"):
            if saved[flag] != config[flag]:
                problem = f"the run has --{flag}={saved[flag]}, not {config[flag]}"
                raise UserError(f"--init={init}: {problem}: give this flag too")
        tensors, other_heads = split_state(content)
        if all(saved[name] == config[name] for name in ("method", "groups", "hidden", "dim")):
            heads = other_heads
    if "encoder.pos_embedding" in tensors and config["arch"].startswith("vit"):
        resize = torchvision.models.vision_transformer.interpolate_embeddings
        with contextlib.suppress(ValueError):  # no square of patches: check_fit names it
            tensors = resize(config["size"], encoder.trunk.patch_size, dict(tensors))
    check_fit(tensors | heads, expected | (own_heads if heads else {}), encoder.classifier, config)
    return join_state(tensors, heads, len(encoder.tops))


def imagenet_weights(arch):
    """The state dict of torchvision's own weights."""
    try:
        return torchvision.models.get_model(arch, weights="DEFAULT").state_dict()
    except Exception as error:  # offline, no weights, or a file that was cut short
        problem = f"--init=imagenet: no weights of --arch={arch} ({first_line(error)})"
        advice = "take another --arch, such as resnet18, or name a file, --init=FILE"
        raise UserError(f"{problem}: {advice}") from None


def flatten(content, prefix=""):
    """Tensors in nested dicts -> {"outer.inner.conv1.weight": tensor}; the rest is left out."""
    if not isinstance(content, dict):
        return {prefix[:-1]: content} if torch.is_tensor(content) else {}
    flat = {}
    for key, x in content.items():
        flat |= flatten(x, f"{prefix}{key}.")
    return flat


def strip_prefix(tensors, expected):
    """The tensors under the prefix, such as "module.encoder_q.", with the most expected names."""
    first = next(iter(expected))
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    known = {p: sum(p + name in tensors for name in expected) for p in prefixes}
    prefix = max(known, key=known.get, default="")
    networks = [p for p, count in known.items() if count > len(expected) / 2]
    if len(networks) > 1:
        taken = f"--init holds several networks, {networks}: {prefix!r} is taken"
        data_module().warn_once(f"{taken}; to take another, save it alone in a file")
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def check_fit(tensors, expected, classifier, config):
    """UserError where tensors, but for the classifier's, have other names or shapes."""
    # Older files do not count batches, nor do we read the count.
    optional = re.compile(rf"{re.escape(classifier)}\.|.*num_batches_tracked$")
    wrong = []
    for name in [name for name in expected | tensors if not optional.match(name)]:
        have, want = (list(x[name].shape) if name in x else "none" for x in (tensors, expected))
        if have != want:
            wrong.append(f"{name} is {have}, expected {want}")
            continue
        weight = tensors[name]
        if weight.is_meta or weight.layout != torch.strided or not weight.is_floating_point():
            wrong.append(f"{name} is a {weight.device.type} {weight.dtype}, expected plain floats")
        elif not weight.float().isfinite().all():
            wrong.append(f"{name} is not finite")
    if wrong:
        flags = " ".join(f"--{flag}={config[flag]}" for flag in ("init", "arch", "stem", "size"))
        raise UserError(f"{flags}: {len(wrong)} weights do not fit: {'; '.join(wrong[:3])}")


def load_encoder(run, device="cpu"):
    """The trained encoder of a run folder, frozen and in eval mode, and its config."""
    run = Path(run).expanduser()
    files = [run / name for name in ("config.json", "backbone.pt", "heads.pt")]
    missing = [path for path in files if not path.exists()]
    if missing and run.is_dir():
        with lock_folder(run):  # UserError while it is training
            pass
    if missing and (run / "checkpoint.pt").exists():
        raise UserError(f"{run} has not finished training: give its command again to go on")
    if missing:
        raise UserError(f"{missing[0]}: no such file; expected a folder that loo.py trained")
    try:
        config = read_config(run)
        backbone, heads = map(data_module().read_tensors, files[1:])
        for name, x in heads.items():  # Z_0's layer4 is in both
            same = name.replace("tops.0.", "layer4.")
            if same != name and not x.equal(backbone[same]):
                raise ValueError("backbone.pt and heads.pt are not of one run")
        encoder = build_encoder(config)
        encoder.load_state_dict(join_state(backbone, heads, len(encoder.tops)))
    # UserError is a ValueError.
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        problem = f"{run} holds no run of ours, or a file that is not whole ({first_line(error)})"
        raise UserError(f"{problem}: give its training's command again, to mend it") from None
    encoder.eval().requires_grad_(False)
    if device == "auto":
        device = data_module().resolve_device(device)
    return encoder.to(device, memory_format=torch.channels_last), config


@typed
def show_methods(groups: tuple = ("color", "rotation"), same: tuple = ("rotation",)):
    """Print the methods: which groups a key view shares, and what it is to each space."""
    check_groups(groups=groups, same=same)
    print(f"groups: {', '.join(groups)}\n")
    print("| method | share (key view x group) | role (space x key view) | heads | feature |")
    print("|---|---|---|---|---|")
    for name, m in methods(groups, same).items():
        feature = "all spaces" if m.heads == "conv5" else "v"
        print(f"| {name} | {m.share.int().tolist()} | {m.role.tolist()} | {m.heads} | {feature} |")


# ---------------------------------------- speed


@typed
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
    """Time the phases of a training step, and the whole step against its network alone.

    The network alone is the same encoder: forward and backward of a batch, and a forward without
    gradient for each key view. Prints medians and quartiles of runs that alternate. In training, a
    thread fetches a batch during the step before: input keeps up where that takes less time.

    Args:
        method: a contrastive one
        groups: augmentation groups
        recipe: whose defaults to take: factors, or imagenet100 (ResNet-50, 224 pixels, batch 256)
        arch: small, or a torchvision network
        size: side of a view in pixels
        batch: images a step
        queue: keys kept in each space
        splits: parts of the batch with BatchNorm statistics of their own
        steps: how often everything is timed
        device: auto, cpu or cuda
        precision: auto, float32 (no TF32) or bfloat16
        compile: with torch.compile, whose time to warm up is printed
        json: print one JSON line and nothing else
    """
    given = {k: v for k, v in locals().items() if k not in ("steps", "json")} | {"data": recipe}
    if method == "supervised":
        raise UserError(f"--method={method}: expected a contrastive method")
    tune_backends()
    config = default_config(**given)
    begun = time.perf_counter()
    phases = bench_phases(config)
    time_once(phases["step"], config)
    time_once(phases["network"], config)
    record = {"steps": steps, "warm_up_s": time.perf_counter() - begun, "memory_gib": None}
    if on_gpu(config):
        record["memory_gib"] = torch.cuda.max_memory_allocated(config["device"]) / 2**30
    if method in ("looc", "looc++") and len(groups) > 1:
        fewer = default_config(**given | {"groups": groups[:-1]})
        phases["one group less"] = bench_phases(fewer)["step"]
    times = {name: [] for name in phases}
    for _ in range(steps + 3):
        for name, phase in phases.items():
            times[name].append(time_once(phase, config))
    # The first backward passes are slow.
    times = {name: torch.tensor(some[3:]) for name, some in times.items()}
    record |= bench_record(config, phases["network"], times)
    print(dumps(record) if json else bench_table(record, times))


def bench_phases(config):
    """What `bench` times -> {name: function}. "step" is all that stand before it in turn.

    "fetch" is from where --cache=auto puts the images, the last two from memory and a disk.
    """
    share = get_method(config).share
    state = init_state(config)
    in_memory = noise_dataset(config)
    dataset, _ = place_dataset(in_memory, config)
    from_disk = file_reader(in_memory.images)
    rows = torch.arange(config["batch"]) * 2
    _, canvases, aspect, textures = get_batch(dataset, config, rows)
    images, _, _ = training_views(canvases, config, 0, aspect, textures)
    state, (_, q, k, _, role) = train_step(state, canvases, aspect, config, textures)
    positives = positive_keys(k, role)

    @torch.inference_mode()
    def augment():
        training_views(canvases, config, 0, aspect, textures)

    def query():
        with autocast(config):
            z = encode(state.encoder_q, images)[1]
        z.sum().backward()

    @torch.no_grad()
    def keys():
        with autocast(config):
            encode(state.encoder_k, images.repeat(len(share), 1, 1, 1))

    def network():
        query()
        with torch.no_grad(), autocast(config):
            # By the query encoder, whose BatchNorm splits are those of one view.
            for _ in share:
                encode(state.encoder_q, images)

    def loss():
        z = q.clone().requires_grad_()
        multi_space_loss(z, k, state.queue, role, config["tau"]).mean().backward()

    def step():
        nonlocal state
        _, images, aspect, textures = get_batch(dataset, config, rows)
        state, _ = train_step(state, images, aspect, config, textures)

    return {
        "fetch": lambda: get_batch(dataset, config, rows),
        "augment": augment,
        "query": query,
        "keys": keys,
        "loss": loss,
        "queue": lambda: queue_update(state.queue, 0, positives),
        "ema": lambda: ema(state.encoder_k, state.encoder_q, config["momentum"]),
        "optimizer": state.optimizer.step,
        "step": step,
        "network": network,
        "fetch, memory": lambda: get_batch(in_memory, config, rows),
        "fetch, disk": lambda: get_batch(in_memory._replace(images=from_disk()), config, rows),
    }


def noise_dataset(config):
    """Two batches of noise in memory, as large as the canvases of --data."""
    data = data_module()
    n = 2 * config["batch"]
    side = config["canvas"] or round(config["size"] / data.DATASETS[config["data"]].crop_pct)
    generator = make_generator("bench")
    images = torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
    textures = images[:, None].clone() if "texture" in config["groups"] else None
    return data.ImageSet(images, torch.ones(n), {}, {}, textures=textures)


def file_reader(images):
    """A function that maps these images anew, from a file (in TMPDIR) that is not in memory."""
    data = data_module()
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    data.write_atomic(Path(folder.name) / "images", images.numpy().tobytes())

    def read():
        path = Path(folder.name) / "images"  # the folder lives as long as this function
        if hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return data.map_file(path, *images.shape)

    return read


def time_once(function, config):
    """Milliseconds of one call, with all the work that it gives to a GPU."""
    wait = torch.cuda.synchronize if on_gpu(config) else torch.cpu.synchronize
    wait(config["device"])
    begun = time.perf_counter()
    function()
    wait(config["device"])
    return (time.perf_counter() - begun) * 1e3


def quartiles(x):
    """x (n,) -> three numbers."""
    return x.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()


def bench_record(config, network, times):
    """bench's JSON line. times {phase: (steps,) milliseconds}."""
    # The import takes half a second, which no other command should pay.
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network()
    keys = ("method", "arch", "size", "batch", "groups", "queue", "compile")
    record = {key: config[key] for key in keys}
    step_ms = quartiles(times["step"])[1]
    record |= dict(step_ms=step_ms, network_ms=quartiles(times["network"])[1])
    record["ratio"] = quartiles(times["step"] / times["network"])[1]
    record["images_per_s"] = config["batch"] / step_ms * 1e3
    record["peak"] = counter.get_total_flops() / step_ms / 1e9 / peak_tflops(config)
    if "one group less" in times:
        record["group_ms"] = (times["step"] - times["one group less"]).median().item()
    device = f"{torch.get_num_threads()} CPU threads"
    if on_gpu(config):
        device = torch.cuda.get_device_name(config["device"])
    return record | dict(dtype=config["precision"], torch=str(torch.__version__), device=device)


def bench_table(record, times):
    """What `bench` prints for people."""
    lines = ["| phase | ms | quartiles |", "|---|---|---|"]
    for name, some in times.items():
        low, middle, high = quartiles(some)
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    low, middle, high = quartiles(times["step"] / times["network"])
    last = f"; the last group costs {record['group_ms']:.1f} ms" if "group_ms" in record else ""
    lines += [
        f"\nwarm-up: {record['warm_up_s']:.1f} s; step / network: {middle:.3f} "
        f"({low:.3f} to {high:.3f}, {record['steps']} pairs); "
        f"{record['images_per_s']:.0f} images/s, {record['peak']:.0%} of the matrix products "
        f"that {record['device']} can do in {record['dtype']}{last}"
    ]
    return "\n".join(lines)


def peak_tflops(config):
    """What a large matrix product reaches on this device, in TFLOP/s."""
    n = 8192 if on_gpu(config) else 1024
    dtype = torch.bfloat16 if config["precision"] == "bfloat16" else dtype_of(config)
    a = torch.randn(n, n, device=config["device"], dtype=dtype)
    milliseconds = [time_once(lambda: (a @ a).sum().item(), config) for _ in range(7)]
    return 2 * n**3 / sorted(milliseconds)[3] / 1e9


if __name__ == "__main__":
    # By its own name, as data.py imports it: one module, not two.
    import loo
    from data import command_line

    command_line({"train": loo.train, "methods": loo.show_methods, "bench": loo.bench})
