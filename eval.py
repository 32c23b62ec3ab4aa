"""What the features know: probes of a frozen encoder.

    python eval.py fewshot                          # of the last run, on the data it was trained on
    python eval.py linear --run=runs/NAME --label=hue
    python eval.py rotation | knn | robust | spaces
    python eval.py retrieve --against=runs/OTHER    # an image of nearest neighbors, two runs
    python eval.py table --runs='runs/*'            # all results as one table; --paper: the paper's
    python eval.py curves --runs='runs/*'           # their losses side by side, in curves.png
    python eval.py claims                           # which of the paper's claims hold on factors?

Each task prints a Markdown row for each result and appends a JSON line to RUN/results.jsonl.
Axes: b image, s space, d feature, n sample, r quarter turns, t trial, k class, h w pixel.
"""

import contextlib
import csv
import functools
import glob
import hashlib
import inspect
import io
import itertools
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from json import dumps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import loo
from data import (
    CORRUPTIONS,
    DATASETS,
    IMAGENETC,
    REFERENCE_SIZE,
    ImageSet,
    allocate,
    central_files,
    check_choice,
    check_out,
    check_user_out,
    command_line,
    corrupt,
    dataset_splits,
    decode_cached,
    draw_curves,
    epoch_batches,
    file_stats,
    fingerprint,
    image_grid,
    iter_batches,
    label_names,
    list_files,
    map_file,
    open_dataset,
    optional_write,
    read_tensors,
    resolve_device,
    warn_left_out,
    warn_once,
    write_atomic,
    write_tensors,
)
from loo import UserError, first_line, typed

# ---------------------------------------------------------------- features


class EvalContext(NamedTuple):
    """What a task works on: a run's encoder and a data set."""

    run: Path
    encoder: loo.Encoder
    config: dict
    data: str
    split: dict  # {"train", "test", "val" if there is one: ImageSet of central crops}, not decoded
    find: functools.partial  # open_dataset of this data set
    weights: str  # a hash of the run's
    feature: str
    seed: int
    workers: int
    root: str  # where the data is, or None
    leader_first: object = contextlib.nullcontext  # a context that rank 0 enters first

    @property
    def device(self):
        return self.encoder.w2.device


def open_run(
    run: str = "runs/latest",
    *,
    data: str = None,
    root: str = None,
    feature: str = "v",
    download: bool = False,
    workers: int = None,
    device: str = "auto",
    seed: int = 0,
):
    """
    run: folder of a finished run; runs/latest is the last one
    data: factors, folder, one of the paper's sets or of torchvision's; by default the run's own
    root: where that data is
    feature: v (the backbone's), z (all spaces) or the name of one space
    download: let torchvision fetch the data
    workers: processes that decode images, by default one for each core
    device: auto, cpu or cuda
    seed: of held-out parts, shots and orders
    json: print the JSON lines and nothing else
    """
    encoder, config = open_encoder(run, feature, device)
    name = check_choice("data", data or config["data"], DATASETS)
    if root:
        root = str(Path(root).resolve())
    elif name == config["data"]:
        root = config["root"]
    split_seed = config.get("split_seed", config["seed"])  # a run of before: split by its seed
    splits = dataset_splits(name, root, split_seed)
    if splits == ("train",):
        raise UserError(f"{root} has images to train on alone: evaluations need val or test too")
    if "train" not in splits:
        raise UserError(f"--data={name} has no training split; `robust --data=imagenet100` uses it")
    settings = dict(size=config["size"], canvas=config["canvas"], split_seed=split_seed)
    find = functools.partial(open_dataset, name, root=root, download=download, **settings)
    split = {s: find(s, central=True) for s in splits}
    split["test"] = split.pop("test", None) or split.pop(splits[-1])
    run, weights = Path(run).resolve(), hash_weights(run)
    flags = dict(feature=feature, seed=seed, workers=workers, root=root)
    return EvalContext(run, encoder, config, name, split, find, weights, **flags)


def open_encoder(run, feature, device):
    """A run's encoder and config; UserError where there is none, or these flags do not fit it."""
    if not Path(run).exists():
        configs = sorted(Path("runs").glob("*/config.json"))
        others = [str(path.parent) for path in configs if not path.parent.is_symlink()]
        there = f"; there are {', '.join(others)}" if others else ""
        raise UserError(f"{run}: no such run; train one with `python loo.py train`{there}")
    encoder, config = loo.load_encoder(run, resolve_device(device))
    spaces = loo.get_method(config).spaces
    check_choice("feature", feature, ("v", "z", *spaces) if spaces else ("v",))
    return encoder, config


def hash_weights(run):
    """A hash of a run's encoder."""
    weights = [(Path(run) / file).read_bytes() for file in ("backbone.pt", "heads.pt")]
    return hashlib.sha1(b"".join(weights)).hexdigest()


def on_device(encoder, dataset, workers=None, batch=256, count=None, named=5):
    """This rank's part of the (first `count`) images, on the encoder's device.

    Yields rows (b,), images (b 3 h w) in [0, 1]. named: see iter_batches.
    """
    part = loo.rank(), loo.world_size()
    for rows, images, _ in iter_batches(dataset, workers, batch, part, count, named):
        yield rows, images.to(encoder.w2.device, non_blocking=True).float() / 255


@torch.no_grad()
def features(encoder, dataset, turns=(0,), workers=None, batch=256):
    """The frozen encoder on an ImageSet of central crops, decoded batch by batch. Ranks share it.

    turns: every image is seen once for each, in quarter turns.
    -> v ((r n) d), z (s (r n) c) on the CPU, and the rows (n,) of the images that could be read.
    """
    encoder.eval()
    n, (spaces, dim, _) = len(dataset.images), encoder.w2.shape
    v = torch.zeros(len(turns), n, encoder.features)
    z = torch.zeros(spaces, len(turns), n, dim)
    seen = torch.zeros(n)
    for rows, images in on_device(encoder, dataset, workers, batch):
        for r, turn in enumerate(turns):
            some_v, some_z = loo.encode(encoder, images.rot90(turn, (2, 3)))
            v[r, rows] = some_v.float().cpu()  # (b d)
            z[:, r, rows] = some_z.float().cpu()  # (s b c)
        seen[rows] = 1
    v, z = map(loo.all_reduce_sum, (v, z))
    rows = readable_rows(seen)
    v = rearrange(v[:, rows], "r n d -> (r n) d")
    return v, rearrange(z[:, :, rows], "s r n c -> s (r n) c"), rows


def readable_rows(seen):
    """seen (n,), 1 where this rank read an image -> rows (m,) that any rank read.

    UserError where none is.
    """
    rows = loo.all_reduce_sum(seen).nonzero().squeeze(1)
    if not len(rows):
        raise UserError(f"none of the {len(seen)} images can be read")
    return rows


def cached_features(ctx, split, turns=(0,)):
    """v ((r n) d), z (s (r n) c) and labels {name: ((r n),)} of a split's images that can be read.

    Two more labels: "rotation", the quarter turns, and "image", the row in the split.
    Computed once for a run, data set, split and turns.
    """
    dataset = ctx.split[split]
    mtimes = file_stats(dataset, "st_mtime_ns")
    key = repr(((ctx.data, ctx.weights), split, turns, fingerprint(dataset)))
    key += os.environ.get("LOOC_MEGAPIXELS", "")
    name = hashlib.sha1(key.encode()).hexdigest()[:16]
    path = ctx.run / "features" / f"{ctx.data}-{split}-{name}.pt"
    cached_mtimes = None
    with contextlib.suppress(UserError):  # not there, or not whole: computed again
        *cached, cached_mtimes = read_tensors(path)
    if loo.all_reduce_max(cached_mtimes is None or not torch.equal(cached_mtimes, mtimes)):
        cached = features(ctx.encoder, dataset, turns, ctx.workers)
        if loo.rank() == 0:
            with optional_write(f"the features in {path.parent}"):
                write_tensors(path, (*cached, mtimes))
    elif lost := len(dataset.images) - len(cached[-1]):
        count = f"{lost} of the {len(dataset.images)} {split} images"
        warn_once(f"{count} could not be read when their features were computed")
    v, z, rows = cached
    check_features(split, select_feature(v, z, ctx.config, ctx.feature)[: len(rows)])
    labels = {name: y[rows].repeat(len(turns)) for name, y in dataset.labels.items()}
    labels["rotation"] = torch.tensor(turns).repeat_interleave(len(rows))
    labels["image"] = rows.repeat(len(turns))
    return v, z, labels


COLLAPSED = 1e-3  # of the mean; untrained encoders deviate by 0.2 and more


def check_features(split, x):
    """UserError where features x (n ...) are not finite; a warning if test ones hardly differ."""
    check_all_finite(f"features of the {split} images", x)
    mean, deviation = x.mean(0).norm(), x.std(0, correction=0).norm()
    if split == "test" and len(x) > 1 and deviation <= COLLAPSED * mean:
        figures = f"norm {mean:.1e}, deviation {deviation:.1e}"
        cause = "a collapsed encoder, or equal images"
        warn_once(f"all test images have nearly the same features ({figures}): {cause}")


def check_all_finite(what, *tensors):
    """UserError where a number in these tensors is not finite."""
    parts = itertools.chain(*(x.split(4096) for x in tensors))  # isfinite copies what it reads
    if not all(part.isfinite().all() for part in parts):
        raise UserError(f"{what} are not finite: is an image very thin, or --lr too high?")


def load_features(ctx, split, turns=(0,)):
    """The chosen feature of a split, (n d), and its labels, on the encoder's device."""
    v, z, labels = cached_features(ctx, split, turns)
    x = select_feature(v, z, ctx.config, ctx.feature).to(ctx.device)
    return x, {name: y.to(ctx.device) for name, y in labels.items()}


def select_feature(v, z, config, feature):
    """v (n d), z (s n c) -> (n ...): "v", "z" (all spaces side by side) or one space by its name.

    A space is its Conv5 where it has one (LooC++), else its embedding.
    """
    if feature == "v":
        return v
    if feature == "z":
        return rearrange(z, "s n c -> n (s c)")
    method = loo.get_method(config)
    space = method.spaces.index(feature)
    if method.heads == "conv5":
        return rearrange(v, "n (s d) -> s n d", s=len(method.spaces))[space]
    return z[space]


def space_features(ctx, split, turns, layer):
    """What `spaces` compares, {space: (n ...)}: Conv5, or a layer, hidden or output; and labels."""
    v, z, labels = cached_features(ctx, split, turns)
    method = loo.get_method(ctx.config)
    if method.heads == "conv5" or layer == "output":
        return {name: select_feature(v, z, ctx.config, name) for name in method.spaces}, labels
    w, b = ctx.encoder.w1.cpu(), ctx.encoder.b1.cpu()
    return {name: F.relu(F.linear(v, w[s], b[s])) for s, name in enumerate(method.spaces)}, labels


# ---------------------------------------------------------------- probes


def logistic(x, y, k, l2, *, iterations=300, start=None):
    """Multinomial logistic regression by L-BFGS: x (n d), y (n,) of k classes -> w (k d), b (k,).

    Minimizes mean cross-entropy + l2 / 2 * |w|^2 in at most so many iterations, from `start`
    (w, b) or zero. At the minimum it is scikit-learn's LogisticRegression with C = 1 / (n l2).
    """
    x, y = x.detach(), y.long()
    w, b = start or (x.new_zeros(k, x.shape[1]), x.new_zeros(k))
    w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
    stop = dict(max_iter=iterations, tolerance_grad=1e-6, tolerance_change=1e-10)
    optimizer = torch.optim.LBFGS([w, b], history_size=20, line_search_fn="strong_wolfe", **stop)

    def closure():
        optimizer.zero_grad()
        # x @ w with w (d k) took three times as long for four classes.
        loss = F.cross_entropy(F.linear(x, w, b), y) + l2 / 2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), b.detach()


def lbfgs_probe(x, y, k, seed, turns=1, grid=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5)):
    """Choose the L2 weight on a random fifth of the training images, then train on all of them.

    x ((r n) d) standardized, y ((r n),) from 0 to k - 1, below 0 without a label: left out. Row
    t n + i of r = turns is turn t of image i; all turns of an image are on one side of the fifth,
    which `seed` draws -> w (k d), b (k,), of logits F.linear(x, w, b).
    """
    x, y = labeled(x, y)
    check_all_finite("inputs of the probe", x)
    n = len(x) // turns
    order = torch.randperm(n, generator=loo.make_generator("held out", seed))
    offsets = n * torch.arange(turns)[:, None]
    fifth = max(n // 5, min(1, n - 1))
    held, rest = (order[:fifth] + offsets).flatten(), (order[fifth:] + offsets).flatten()
    x_held, y_held, x_rest, y_rest = x[held], y[held], x[rest], y[rest]
    tried, solution = [], None
    # From strong to weak, each from the solution before. 60 iterations need not converge: they
    # only tell which is best, of equals the strongest.
    for l2 in grid:
        solution = logistic(x_rest, y_rest, k, l2, iterations=60, start=solution)
        tried.append((accuracy(F.linear(x_held, *solution), y_held), l2, solution))
    _, l2, best = max(tried, key=lambda one: one[0])
    return logistic(x, y, k, l2, start=best)


def sgd_probe(ctx, dataset, labels, k, d, epochs=None, lr=30.0, area=0.08, batch=256):
    """The paper's protocol: SGD on crops and flips of decoded images through the frozen encoder.

    labels (n,) of k classes, None for rotation; features of length d -> w (k d), b (k,).
    lr x0.1 at 60% and 80%, no weight decay; area: of the smallest crop, as a share of the image.
    Ranks share each batch. On a GPU the features of the crops are of bfloat16.
    """
    if epochs is None:
        epochs = 100 if ctx.data == "inat2019" else 200
    labeled_rows = loo.training_rows(dataset, labels)
    n = len(labeled_rows)
    if n < batch:
        raise UserError(f"--protocol=paper takes {batch} images or more, not {n}: leave it out")
    own = loo.rank_slice(batch)
    part = loo.Rows(batch, own, own, own)
    w = torch.randn(k, d, generator=loo.make_generator("probe", ctx.seed)) * 0.01
    w, b = w.to(ctx.device).requires_grad_(), torch.zeros(k, device=ctx.device, requires_grad=True)
    for weights in (w, b):  # ranks sum their gradients
        weights.register_hook(lambda gradient: loo.all_reduce_sum(gradient.clone()))
    optimizer = torch.optim.SGD([w, b], lr, momentum=0.9)
    on_gpu = ctx.device.type == "cuda"
    precision = "bfloat16" if on_gpu and loo.fast_bfloat16(ctx.device) else "float32"
    config = ctx.config | dict(device=ctx.device, precision=precision)
    for epoch in range(epochs):
        drops = (epoch >= 0.6 * epochs) + (epoch >= 0.8 * epochs)
        optimizer.param_groups[0]["lr"] = lr * 0.1**drops
        batches = (labeled_rows[rows[own]] for rows in epoch_batches(n, batch, ctx.seed, epoch))
        loaded = loo.get_batches(dataset, config, batches)
        for i, (rows, images, aspect, _) in enumerate(loaded):
            generator = loo.make_generator("probe", ctx.seed, epoch, i)
            y = None if labels is None else labels[rows]
            x, y = augmented_batch(ctx, config, images, aspect, y, area, generator, part)
            loss = F.cross_entropy(F.linear(x, w, b), y) * (len(y) / batch)
            loo.optimizer_step(optimizer, loss)
    check_all_finite("weights of the probe", w, b)
    return w.detach(), b.detach()


@torch.no_grad()
def augmented_batch(ctx, config, images, aspect, y, area, generator, part):
    """Features (b d) of cropped and flipped images, and their labels (b,), on their device.

    part: Rows, which images of the global batch these are; area: of the smallest crop.
    y: the labels, or None to give every image a random quarter turn, which is its label. It is
    flipped first: a flip after a turn by 90 degrees would make it one by 270.
    """
    no_views, always = torch.zeros(0, 0, dtype=torch.bool), ("crop", "flip")
    crop = dict(size=config["size"], aspect=aspect, sampling={"crop": {"area": area}}, rows=part)
    images, _, _ = loo.augment_groups(images, (), no_views, generator, always=always, **crop)
    if y is None:
        y = torch.randint(4, (part.total,), generator=generator)[part.query]
        images = loo.resample(images, {"turns": y})
    with loo.autocast(config):
        v, z = loo.encode(ctx.encoder, images)
    return select_feature(v, z, config, ctx.feature).float(), loo.move_like(images, y)


def fit_few_shot(x, y, k, iterations=250, lr=0.03, generator=None, batch=64):
    """All trials as one batched problem, Adam: x (t n d), y (t n) -> w (t d k), b (t 1 k).

    Logits are x @ w + b. Trials do not touch each other. Starts at zero and takes all samples at
    each step; with a generator, starts as nn.Linear does and takes random batches.
    """
    t, n, d = x.shape
    w, b = x.new_zeros(t, d, k), x.new_zeros(t, 1, k)
    if generator:
        for start in (w, b):
            start.copy_(loo.uniform(-1, 1, *start.shape, generator=generator) * d**-0.5)
    optimizer = torch.optim.Adam([w.requires_grad_(), b.requires_grad_()], lr)
    trial = torch.arange(t, device=x.device)[:, None]
    for _ in range(iterations):
        some, labels = x, y
        if generator and n > batch:
            rows = torch.rand(t, n, generator=generator).argsort(1)[:, :batch].to(x.device)
            some, labels = x[trial, rows], y[trial, rows]
        logits = rearrange(torch.baddbmm(b, some, w), "t n k -> (t n) k")
        loss = F.cross_entropy(logits, labels.flatten(), reduction="sum") / labels.shape[1]
        loo.optimizer_step(optimizer, loss)
    check_all_finite("weights of the probe", w, b)
    return w.detach(), b.detach()


def sample_shots(y, k, shots, trials, seed, label="the label", names=()):
    """Rows of `shots` samples of each of k classes, drawn anew for each trial -> (t n).

    n = shots x the classes that have images: one without any stays a class that is never right.
    UserError if one has fewer than `shots`, by its name in `names`.
    """
    if min(shots, trials) < 1:
        raise ValueError(f"shots={shots} trials={trials}: expected 1 or more")
    counts = torch.bincount(y[y >= 0], minlength=k)
    of_class = [(y == c).nonzero().squeeze(1) for c in range(k) if counts[c]]
    fewest = min(map(len, of_class), default=0)
    if fewest < shots:
        short = counts.tolist().index(fewest)
        few = f"{label} {names[short] if names else short} has only {fewest} to train on"
        raise UserError(f"--shots={shots}: {few}; take fewer, or other labels by --label")
    generator = loo.make_generator("shots", seed, shots)
    drawn = [
        rows[torch.randperm(len(rows), generator=generator)[:shots]]
        for _ in range(trials)
        for rows in of_class
    ]
    return torch.cat(drawn).view(trials, -1)


def knn_predict(x, y, k, test, neighbours=20, tau=0.07):
    """kNN, weighted by exp(cosine similarity / tau): x (n d), y (n,), test (m d) -> votes (m k).

    y: of k classes, from 0 to k - 1; neighbours: how many vote.
    The nearest neighbor's vote is scaled to 1, which changes no order and never underflows.
    """
    if neighbours < 1 or not tau > 0:
        raise ValueError(f"neighbours={neighbours} tau={tau}: expected 1 or more, and above 0")
    x, votes = F.normalize(x, dim=1), []
    for some in F.normalize(test, dim=1).split(1024):
        similarity, rows = (some @ x.T).topk(min(neighbours, len(x)), dim=1)
        weights = ((similarity - similarity[:, :1]) / tau).exp()
        votes.append(x.new_zeros(len(some), k).scatter_add_(1, y[rows], weights))
    return torch.cat(votes)


def accuracy(logits, y, top=1):
    """logits (n k), y (n,) -> percent whose class is among the `top` largest."""
    return correct(logits, y, top).mean().item() * 100


def correct(logits, y, top=1):
    """logits (n k), y (n,) -> (n,) 1 where the class is among the `top` largest, else 0."""
    return (logits.topk(min(top, logits.shape[1]), dim=1).indices == y[:, None]).any(1).double()


def restrict_classes(logits, classes):
    """logits (n k) with only these classes to choose from."""
    return torch.full_like(logits, -math.inf).index_copy(1, classes, logits[:, classes])


def labeled(x, y):
    """x (n ...), y (n,) -> both, of the samples that have the label alone."""
    known = y >= 0
    if not known.any():
        raise UserError("no image that can be read has the label: name another by --label")
    return (x, y) if known.all() else (x[known], y[known])  # x may be large: no needless copy


def standardize(train, *others):
    """Standardize all, (n d) each, in place -> the training samples' mean and deviation, (d,)."""
    mean, deviation = train.mean(0), train.std(0, correction=min(1, len(train) - 1))
    deviation = deviation.clamp(min=1e-6)
    for x in (train, *others):
        x.sub_(mean).div_(deviation)
    return mean, deviation


# ---------------------------------------------------------------- intervals


def ci95(values, pseudo_values=(0.0, 0.0, 100.0, 100.0)):
    """Half of the 95% interval of the mean of percentages, (n,); infinite for no values.

    Around the mean it reaches as far as the normal interval with these values beside them, by
    default two wrong and two right (Agresti and Coull 1998): six right of six are not 100.0 +- 0.0.
    It is too wide for values between 0 and 100 if there are only a few.
    """
    values = torch.as_tensor(values).double()
    if len(values) == 0:
        return math.inf
    wider = torch.cat([values, values.new_tensor(pseudo_values)])
    shift = abs(wider.mean() - values.mean()).item()
    return shift + 1.96 * wider.std().item() / math.sqrt(len(wider))


def t_ci95(values, comparisons=1):
    """Half of Student's 95% interval of the mean of a list, infinite for one value.

    Also for equal values: a few that are equal do not say that all are.
    comparisons: as one of so many intervals, all of which hold with 95% (Bonferroni).
    """
    n = len(values)
    if n < 2:
        return math.inf
    deviation = torch.tensor(values, dtype=torch.float64).std().item()
    if deviation < 1e-9:  # equal but for rounding
        return math.inf
    return t_quantile(n - 1, 0.025 / comparisons) * deviation / math.sqrt(n)


@functools.cache
def t_quantile(df, tail=0.025):
    """The t above which Student's distribution of `df` degrees of freedom has this probability."""
    at = torch.linspace(0, math.pi / 2, 2_000_001, dtype=torch.float64)[:-1].tan()
    density = torch.distributions.StudentT(torch.tensor(df, dtype=torch.float64)).log_prob(at)
    half = torch.cumulative_trapezoid(density.exp(), at)
    return at[int((half < 0.5 - tail).sum())].item()


def paired_ci95(right, other):
    """Difference in points and half of its 95% interval, image by image.

    right, other: (n,) each, the share of an image's views that were classified right, 0 to 1. One
    more image that differs each way is assumed, see ci95 (as Bonett and Price 2012).
    """
    right, other = torch.as_tensor(right).double(), torch.as_tensor(other).double()
    loo.check_shapes(right=(right, "n"), other=(other, "n"))
    if not all(((x >= 0) & (x <= 1 + 1e-6)).all() for x in (right, other)):
        raise ValueError("right or other holds something else than shares from 0 to 1")
    difference = (right - other) * 100
    return difference.mean().item(), ci95(difference, (-100.0, 100.0))


# ---------------------------------------------------------------- tasks


# Flags of tasks that change what a result is: values other than the default are named beside it.
SETTINGS = {"epochs", "lr", "area", "neighbours", "trials", "pictures"}


def task(function):
    """Make a task a command, with its own flags, those of `open_run` and --json."""
    own, common = (inspect.signature(f).parameters for f in (function, open_run))

    @functools.wraps(function)
    def command(json=False, **flags):
        begun = time.perf_counter()
        common_flags = {k: flags.pop(k) for k in common if k in flags}
        device = resolve_device(common_flags.get("device", "auto"))
        with loo.init_distributed(device) as leader_first:
            ctx = open_run(**common_flags)._replace(leader_first=leader_first)
            changed = [k for k in flags if k in SETTINGS and flags[k] != own[k].default]
            settings = [f"{k} {flags[k]}" for k in changed]
            report(ctx, function.__name__, function(ctx, **flags), settings, json, begun)

    keyword = inspect.Parameter.KEYWORD_ONLY
    json_flag = inspect.Parameter("json", keyword, default=False, annotation=bool)
    _, *own_flags = (p.replace(kind=keyword) for p in own.values())
    run, *others = common.values()
    command.__signature__ = inspect.Signature([run, *own_flags, *others, json_flag])
    command.__doc__ = f"{function.__doc__.rstrip()}\n{open_run.__doc__}"
    return typed(command)


def class_names(ctx, label):
    """The classes of a label; UserError where there is nothing to tell apart."""
    if label == "rotation":
        return ["0", "90", "180", "270"]
    names = ctx.split["train"].classes[label]
    if len(names) < 2:
        raise UserError(f"--label={label}: all images of {ctx.data} are of one class, name another")
    if not is_labeled(ctx, label):
        raise UserError(f"--label={label}: no image of train or none of test has it: name another")
    return names


def is_labeled(ctx, label):
    """Whether images of both train and test have the label."""
    return all((ctx.split[split].labels[label] >= 0).any() for split in ("train", "test"))


def select_labels(ctx, label, more=(), least=1):
    """The named labels, or else all that tell images apart and `more`; UserError below `least`."""
    classes = ctx.split["train"].classes
    whole = ",".join(label)
    label = (whole,) if whole in classes else label  # a name may have commas
    for name in label:
        class_names(ctx, check_choice("label", name, (*classes, *more)))
    known = [name for name in label_names(classes) if is_labeled(ctx, name)]
    labels = list(dict.fromkeys(label)) or [*known, *more]
    if len(labels) < least:
        problem = f"{ctx.root or ctx.data} has no label on images of both train and test"
        others = "without labels there are the tasks rotation, spaces and retrieve --turn"
        raise UserError(f"{problem}: give each class a sub-folder; {others}")
    return labels


def result(logits, y, label, turns=1, **more):
    """logits ((r n) k), y ((r n),) -> a result. Images without the label do not count.

    Its interval is over the n images, all turns of each; n_test counts every turn. largest: percent
    of the largest class, which a constant answer has right; balanced: the mean over classes.
    """
    logits, y = labeled(logits, y)
    right = correct(logits, y).view(turns, -1).mean(0) * 100
    top5 = accuracy(logits, y, 5) if logits.shape[1] > 5 else None
    found = dict(label=label, top1=right.mean().item(), top5=top5, ci95=ci95(right), n_test=len(y))
    counts, recall = class_recall(logits, y)
    largest, balanced = counts.max() / counts.sum() * 100, recall[counts > 0].mean()
    return found | dict(largest=largest.item(), balanced=balanced.item()) | more


def class_recall(logits, y):
    """logits (n k), y (n,) -> samples of each class (k,), and percent of them that are right."""
    k = logits.shape[1]
    counts = torch.bincount(y, minlength=k)
    right = torch.bincount(y, correct(logits, y), minlength=k)
    return counts, right / counts * 100


def probe(ctx, labels, turns, protocol, per_class=False, save=None, **flags):
    """A linear classifier for each label, by either protocol -> results.

    per_class: name the accuracy of each class. save: a file that keeps the classifier. flags: of
    the paper's protocol, None for the default.
    """
    fast = check_choice("protocol", protocol, ("fast", "paper")) == "fast"
    flags = {name: value for name, value in flags.items() if value is not None}
    if fast and flags:
        raise UserError("--epochs, --lr and --area are of the paper's protocol: --protocol=paper")
    test, y_test = load_features(ctx, "test", turns)
    if fast:
        train, y = load_features(ctx, "train", turns)
        mean, deviation = standardize(train, test)
        fit = functools.partial(lbfgs_probe, train, seed=ctx.seed, turns=len(turns))
    else:
        # Where training left the decoded images, if it did.
        with ctx.leader_first():
            shared = loo.world_size() > 1
            train = decode_cached(ctx.find("train"), ctx.workers, ctx.run.parent, shared)
        y = train.labels
        fit = functools.partial(sgd_probe, ctx, train, d=test.shape[1], **flags)
    for label in labels:
        classes, y_train = class_names(ctx, label), y.get(label)  # None: images are turned later
        w, b = fit(y_train, k=len(classes))
        logits = F.linear(test, w, b)
        n_train = len(loo.training_rows(train, y_train))
        found = result(logits, y_test[label], label, len(turns), n_train=n_train, protocol=protocol)
        if per_class:
            found |= class_table(*labeled(logits, y_test[label]), classes)
        yield found
        if save and loo.rank() == 0:
            if fast:  # of features as they are
                w, b = w / deviation, b - w @ (mean / deviation)
            head = dict(label=label, classes=list(map(str, classes)), w=w.cpu(), b=b.cpu())
            head |= dict(feature=ctx.feature, run=str(ctx.run), weights=ctx.weights)
            write_tensors(Path(save), head)


def class_table(logits, y, classes):
    """The accuracy of each class, as data and as a table to print; logits (n k), y (n,)."""
    counts, recall = class_recall(logits, y)
    rows = [
        {"class": str(name), "n_test": int(n), "top1": float(share) if n else None}
        for name, n, share in zip(classes, counts, recall)
    ]
    lines = [table_head(["class", "test", "top-1"]), *(table_row(row.values()) for row in rows)]
    return dict(per_class=rows, note="\n".join(lines))


@task
def linear(
    ctx,
    label: tuple = (),
    protocol: str = "fast",
    epochs: int = None,
    lr: float = None,
    area: float = None,
    per_class: bool = False,
    save: str = None,
):
    """A linear classifier on frozen features (section 4).

    Args:
        label: labels with commas between; every label if none is named
        protocol: fast (L-BFGS on cached features, L2 chosen on a held-out fifth) or paper (SGD on
            augmented images)
        epochs: of the paper's protocol: 200, or 100 on inat2019
        lr: of the paper's protocol: 30
        area: of the paper's protocol, the smallest crop as a share of the image: 0.08
        per_class: print the accuracy of each class too
        save: a file to keep the classifier in, for `embed --classify=FILE`
    """
    labels = select_labels(ctx, label)
    if save and len(labels) > 1:
        raise UserError(f"--save={save} keeps one classifier: name a label, as --label={labels[0]}")
    if save:
        check_user_out(save, ())
        if Path(save).exists():
            read_classifier(save)  # UserError where it is another kind of file
    yield from probe(ctx, labels, (0,), protocol, per_class, save, epochs=epochs, lr=lr, area=area)


@task
def rotation(ctx, protocol: str = "fast", epochs: int = None, lr: float = None, area: float = None):
    """Which of four quarter turns an image was given (section 4); each is shown in all four.

    Args:
        protocol: fast or paper, as in linear
        epochs: of the paper's protocol
        lr: of the paper's protocol
        area: of the paper's protocol
    """
    yield from probe(ctx, ["rotation"], (0, 1, 2, 3), protocol, epochs=epochs, lr=lr, area=area)


@task
def knn(ctx, label: tuple = (), neighbours: int = 20):
    """Weighted nearest neighbors by cosine similarity.

    Args:
        label: labels with commas between; every label if none is named
        neighbours: how many vote
    """
    (x, y), (test, y_test) = load_features(ctx, "train"), load_features(ctx, "test")
    for name in select_labels(ctx, label):
        known, y_known = labeled(x, y[name])
        votes = knn_predict(known, y_known, len(class_names(ctx, name)), test, neighbours)
        found = result(votes, y_test[name], name, n_train=len(known), protocol="knn")
        yield found | {"top5": None}  # fewer than five classes may have a vote


@task
def fewshot(
    ctx, label: tuple = (), shots: tuple = (5, 10), trials: int = 10, protocol: str = "fast"
):
    """A linear classifier of all classes from a few images of each, from train + val (section 4).

    Mean and 95% interval over trials, or over the first trial's test images where all trials give
    one figure. 250 steps of Adam, at a learning rate of 0.03.

    Args:
        label: labels with commas between; every label if none is named
        shots: images of each class
        trials: independent draws
        protocol: fast (features standardized by all of train + val, a start at zero, all shots at
            each step) or paper (features as they are, a random start, batches of 64)
    """
    fast = check_choice("protocol", protocol, ("fast", "paper")) == "fast"
    shots = [str(n) for n in shots]
    if not shots or not all(n.isdecimal() and int(n) for n in shots):
        raise UserError(f"--shots={','.join(shots)}: expected numbers of images, as 5,10")
    pool = [load_features(ctx, s) for s in ("train", "val") if s in ctx.split]
    test, y_test = load_features(ctx, "test")
    x = torch.cat([x for x, _ in pool])
    if fast:
        standardize(x, test)
    # All draws come first, so that too few images are found out before any result.
    counts, drawn, lacking = dict.fromkeys(map(int, shots)), [], []
    for name in select_labels(ctx, label):
        y, classes = torch.cat([labels[name] for _, labels in pool]), class_names(ctx, name)
        k = len(classes)
        try:
            rows = [sample_shots(y, k, n, trials, ctx.seed, name, classes) for n in counts]
        except UserError as error:
            if label:
                raise
            lacking.append(error)
            continue
        drawn += [(name, k, n, y, some) for n, some in zip(counts, rows)]
    if not drawn:
        raise lacking[0]
    for error in lacking:
        warn_once(f"left out: {error}")
    for name, k, n, y, rows in drawn:
        generator = None if fast else loo.make_generator("few shots", ctx.seed, n)
        w, b = fit_few_shot(x[rows], y[rows], k, generator=generator)
        each = [result(test @ w[t] + b[t], y_test[name], name) for t in range(trials)]
        top1 = [one["top1"] for one in each]
        found = each[0] | dict(shots=n, n_train=rows.shape[1])
        for key in ("top1", "balanced", "top5"):
            if found[key] is not None:  # top5 of few classes
                found[key] = sum(one[key] for one in each) / trials
        if len(set(top1)) > 1:  # else the test images are few, and the first trial's will do
            found["ci95"] = t_ci95(top1)
        yield found | dict(protocol="adam" if fast else protocol)


CELLS = list(itertools.product(CORRUPTIONS, range(1, 6)))
# {summary: which of CELLS it is the mean of}
SUMMARIES = {name: [n == name for n, _ in CELLS] for name in CORRUPTIONS}
for name, members in {**IMAGENETC, "all corruptions": CORRUPTIONS}.items():
    SUMMARIES[name] = [n in members for n, _ in CELLS]
    SUMMARIES[f"{name}, severity 3+"] = [n in members and level >= 3 for n, level in CELLS]


def corrupted_images(ctx, published, count=None):
    """Yields the index of one of CELLS, rows (b,), images (b 3 h w) in [0, 1], labels {name: (b,)}.

    published: an ImageSet for each cell; where there are none, the test images are corrupted here,
    a batch at a time, with draws that depend on the batch's first row. count: images to see.
    """
    for i, dataset in enumerate(published or [ctx.split["test"]]):
        for rows, images in on_device(ctx.encoder, dataset, ctx.workers, count=count):
            labels = {name: y[rows] for name, y in dataset.labels.items()}
            if published:
                yield i, rows, images, labels
                continue
            for cell, (name, severity) in enumerate(CELLS):
                generator = loo.make_generator("corrupt", name, severity, int(rows[0]))
                yield cell, rows, corrupt(images, name, severity, generator), labels


@task
def robust(
    ctx,
    label: tuple = (),
    source: str = None,
    corrupted: str = None,
    objectnet: str = None,
    pictures: int = None,
):
    """A linear classifier trained on clean images, tested on others.

    Those are corrupted images (ImageNet-C), and new viewpoints and backgrounds: ObjectNet's
    (section 4), or those of factors. The interval is that of the mean over images, each with all
    its corruptions.

    Args:
        label: labels with commas between; every label if none is named
        source: generated (the 15 corruptions made here from the test images) or folder (the
            published ImageNet-C); folder on imagenet100
        corrupted: where ImageNet-C is, for source=folder
        objectnet: where ObjectNet is, to test on its 13 classes too
        pictures: how many to see corrupted, by default all
    """
    # Every set is opened before hours are spent on the first.
    source, published, shifted = robust_datasets(ctx, source, corrupted, objectnet)
    ctx = ctx._replace(split=ctx.split | shifted)
    labels = select_labels(ctx, label)
    test = (published or [ctx.split["test"]])[0]  # all cells are of the same images
    for name in labels:
        if (test.labels[name][:pictures] < 0).all():
            raise UserError(f"--pictures={pictures}: these test images have no {name}, take more")
    train, y = load_features(ctx, "train")
    mean, deviation = standardize(train)
    heads = {}
    for name in labels:
        heads[name] = lbfgs_probe(train, y[name], len(class_names(ctx, name)), ctx.seed)

    def logits_of(name, x):
        return F.linear((x - mean) / deviation, *heads[name])

    scale = f"{ctx.config['size']} / {REFERENCE_SIZE}"
    note = None if published else f"the lengths in the corruptions are scaled by {scale}"
    on_whole = whole_results(ctx, ("test", *shifted), labels, logits_of)
    on_corrupted = corrupted_results(ctx, test, published, labels, logits_of, pictures)
    for found in itertools.chain(on_whole, on_corrupted):
        n_train = int((y[found["label"]] >= 0).sum())
        yield found | dict(protocol=source, n_train=n_train, note=note)
        note = None  # once is enough


def robust_datasets(ctx, source, corrupted, objectnet):
    """`robust`'s source, the published ImageSet of each of CELLS or none, and {name: ImageSet} of
    new viewpoints. UserError where the flags do not fit together.
    """
    source = source or ("folder" if ctx.data == "imagenet100" else "generated")
    check_choice("source", source, ("folder", "generated"))
    if (source == "folder") != bool(corrupted):
        raise UserError("--source=folder needs --corrupted=DIR; without it, --source=generated")
    if (corrupted or objectnet) and ctx.data != "imagenet100":
        raise UserError(f"--data={ctx.data}: ImageNet-C and ObjectNet go with --data=imagenet100")
    open_central = functools.partial(open_dataset, size=ctx.config["size"], central=True)
    cells = [f"{name}/{severity}" for name, severity in CELLS] if corrupted else []
    published = [open_central("imagenetc100", cell, root=corrupted) for cell in cells]
    shifted = {}
    if objectnet:
        shifted["objectnet13"] = open_central("objectnet13", "test", root=objectnet)
    elif ctx.data == "factors":
        shifted["new viewpoint"] = ctx.find("viewpoint", central=True)
    return source, published, shifted


def whole_results(ctx, splits, labels, logits_of):
    """Results on images as they are; on ObjectNet also with only its classes to choose from."""
    for split in splits:
        on = "clean" if split == "test" else split
        x, y = load_features(ctx, split)
        for name in labels:
            logits = logits_of(name, x)
            yield result(logits, y[name], name, on=on)
            if on == "objectnet13":
                logits = restrict_classes(logits, y[name].unique())
                yield result(logits, y[name], name, on=f"{on}, of its 13")


def corrupted_results(ctx, test, published, labels, logits_of, count):
    """For each label and each of SUMMARIES a result, over the images that could be read."""
    n = len(test.images)
    right = {name: torch.zeros(len(CELLS), n, 2) for name in labels}  # top-1 and top-5
    seen = torch.zeros(n)  # an image is there in all cells or in none
    for cell, rows, images, y in corrupted_images(ctx, published, count):
        x = select_feature(*loo.encode(ctx.encoder, images), ctx.config, ctx.feature).float()
        seen[rows] = 1
        for name in labels:
            logits = logits_of(name, x).cpu()
            for i, top in enumerate((1, 5)):
                right[name][cell, rows, i] = correct(logits, y[name], top).float()
    seen = loo.all_reduce_sum(seen) > 0
    for name in labels:
        known = seen & (test.labels[name] >= 0)
        of_cells = loo.all_reduce_sum(right[name])[:, known].double() * 100
        for on, cells in SUMMARIES.items():
            each = of_cells[cells].mean(0)  # (n 2)
            top1, top5 = each.mean(0).tolist()
            found = dict(label=name, on=on, top1=top1, ci95=ci95(each[:, 0]), n_test=len(each))
            yield found | dict(top5=top5 if len(class_names(ctx, name)) > 5 else None)


@task
def spaces(ctx, label: tuple = (), layer: str = "output", margin: float = 1.0):
    """Which invariances a task wants (the paper's table on concatenating spaces).

    Linear classifiers on Z_0 (the space named all), on Z_0 with any of the other spaces beside it,
    and on each space alone; every one is compared with Z_0 alone, on the same images.

    The verdicts, a line for each label under the table, leave one space out: the accuracy of all
    spaces minus that of all but the group's. A label "wants" a group if the whole paired 95%
    interval is above zero, however small the gain, and is "better without" it if below. If the
    interval spans zero, it "does not care" where all of it is within the margin, else one "cannot
    tell". Intervals are over test images, of one run; each verdict is at 95% by itself.

    Args:
        label: labels with commas between, rotation is one; all of them if none is named
        layer: of LooC's heads: hidden or output (LooC++ has its Conv5)
        margin: points of accuracy that do not matter
    """
    groups = check_spaces(ctx, layer)
    sizes = range(len(groups) + 1)
    with_all = [("all", *some) for n in sizes for some in itertools.combinations(groups, n)]
    alone = [(group,) for group in groups]
    on = None if ctx.config["method"] == "looc++" else layer
    for name in select_labels(ctx, label, ("rotation",)):
        turns = (0, 1, 2, 3) if name == "rotation" else (0,)
        train, y = space_features(ctx, "train", turns, layer)
        test, y_test = space_features(ctx, "test", turns, layer)
        k, y = len(class_names(ctx, name)), y[name].to(ctx.device)
        right = {}  # {subset of spaces: how often each image was classified right, (n,)}
        for subset in with_all + alone:
            x = torch.cat([train[space] for space in subset], 1).to(ctx.device)
            x_test = torch.cat([test[space] for space in subset], 1).to(ctx.device)
            standardize(x, x_test)
            head = lbfgs_probe(x, y, k, ctx.seed, len(turns))
            logits, y_logits = labeled(F.linear(x_test, *head).cpu(), y_test[name])
            right[subset] = correct(logits, y_logits).view(len(turns), -1).mean(0)
            gain, half = 0.0, 0.0  # of Z_0 over itself
            if subset != ("all",):
                gain, half = paired_ci95(right[subset], right[("all",)])
            found = result(logits, y_logits, name, len(turns), gain=gain, gain95=half, on=on)
            found |= dict(feature="+".join(subset), n_train=int((y >= 0).sum()))
            if subset == with_all[-1]:
                says = ", ".join(verdicts(right, groups, margin))
                found["note"] = f"{name} {says}; in brackets: all spaces over all but the group's"
            yield found


def check_spaces(ctx, layer):
    """The groups that have a space; UserError where `spaces` has nothing to compare."""
    check_choice("layer", layer, ("hidden", "output"))
    if ctx.feature != "v":
        raise UserError(f"--feature={ctx.feature}: spaces compares all of them")
    method, names = ctx.config["method"], loo.get_method(ctx.config).spaces
    if len(names) < 2 or names[0] != "all":
        raise UserError(f"{ctx.run.name} has only the spaces of {method}: use a looc or looc++ run")
    if method == "looc" and layer == "hidden" and not ctx.config["hidden"]:
        raise UserError(f"--layer=hidden: {ctx.run.name} has linear heads; use --layer=output")
    return names[1:]


def verdicts(right, groups, margin):
    """Whether a label wants each of the groups, in words; `right` as in `spaces`."""
    every = ("all", *groups)
    for group in groups:
        others = tuple(space for space in every if space != group)
        yield verdict(group, *paired_ci95(right[every], right[others]), margin)


def verdict(group, gain, half, margin):
    """What an interval of the gain says about a group, in words."""
    if gain > half:
        says = "wants"
    elif gain < -half:
        says = "is better without"
    elif abs(gain) + half < margin:
        says = "does not care about"
    else:
        says = "cannot tell about"
    return f"{says} {group} ({gain:+.1f} +- {half:.1f})"


@task
def retrieve(
    ctx,
    against: str = None,
    label: tuple = (),
    queries: int = 8,
    classes: tuple = (),
    neighbours: int = 5,
    turn: bool = False,
    out: str = None,
):
    """Nearest neighbors among the test images by cosine similarity: RUN/retrieve.png (section 4).

    top-1 is the share of neighbors that have the query's label, over all test images. Images that
    are not labeled do not count.

    Args:
        against: another run, shown beside this one; its numbers are printed, not kept
        label: labels to count; every label if none is named
        queries: rows of the image
        classes: a row for each of these classes of the first label instead. A part of its name is
            enough; another image of the class for each time that it is named
        neighbours: of each query
        turn: give every image a random quarter turn first, and count rotation too: does a neighbor
            have the query's orientation?
        out: where to write the image
    """
    labels = select_labels(ctx, label, least=1 if classes else 0) + ["rotation"] * turn
    path = Path(out or ctx.run / "retrieve.png")
    check_user_out(path)
    runs = [ctx, open_other(ctx, against)] if against else [ctx]
    near, y = zip(*(nearest_images(run, neighbours, turn) for run in runs))
    order = torch.randperm(len(near[0]), generator=loo.make_generator("queries", ctx.seed))
    rows = order[:queries]
    if classes:
        rows = choose_queries(order, y[0][labels[0]], class_names(ctx, labels[0]), classes)
    for run, neighbors, known in zip(runs, near, y):
        of_run = dict(run=run.run.name, method=run.config["method"], groups=run.config["groups"])
        of_run |= dict(on="turned" if turn else None, protocol="cosine")
        of_run["keep"] = run is ctx  # the other may have been trained on some of these images
        for name in labels:
            same = label_share(known[name], neighbors)
            found = dict(label=name, top1=same.mean().item(), ci95=ci95(same), n_test=len(same))
            yield found | of_run
    if loo.rank() == 0:
        heads = ["query"]
        for run in runs:
            heads += [f"nearest in {run.run.name}", *[""] * (neighbours - 1)]
        with contextlib.nullcontext() if out else optional_write(path):
            save_neighbors(ctx, near, y[0], labels[:2], rows, heads, path)
            print(f"wrote {path}", file=sys.stderr)


def open_other(ctx, against):
    """Another run on the same images, also where a folder is split by the run's split_seed."""
    encoder, config = open_encoder(against, ctx.feature, str(ctx.device))
    if config["size"] != ctx.config["size"]:
        raise UserError(f"--against={against} was trained at another --size than {ctx.run.name}")
    run, weights = Path(against).resolve(), hash_weights(against)
    return ctx._replace(run=run, encoder=encoder, config=config, weights=weights)


def nearest_images(ctx, k, turn):
    """Every test image and its k nearest by cosine similarity -> near (m k), labels {name: (m,)}.

    turn: every image is in a quarter turn of its own.
    """
    turns = (0, 1, 2, 3) if turn else (0,)
    v, z, y = cached_features(ctx, "test", turns)
    every = torch.arange(len(v) // len(turns))  # (m,)
    if k >= len(every):
        raise UserError(f"--neighbours={k}: there are {len(every)} test images that can be read")
    drawn = torch.randint(len(turns), every.shape, generator=loo.make_generator("turns", ctx.seed))
    chosen = drawn * len(every) + every
    x = F.normalize(select_feature(v, z, ctx.config, ctx.feature)[chosen], dim=1)
    near = []
    for some, rows in zip(x.split(1024), every.split(1024)):
        # An image is not a neighbor of itself.
        similarity = (some @ x.T).scatter(1, rows[:, None], -2)
        near.append(similarity.topk(k).indices)
    return torch.cat(near), {name: labels[chosen] for name, labels in y.items()}


def label_share(y, near):
    """y (n,), near (n k) -> (m,) percent of an image's labeled neighbors that have its label.

    m: the images that have a label, and neighbors with one.
    """
    known = (y[near] >= 0) & (y >= 0)[:, None]
    share = ((y[near] == y[:, None]) & known).double().sum(1) / known.sum(1) * 100
    return share[known.any(1)]


def choose_queries(order, y, names, classes):
    """The first image in `order` (m,) of each of these classes, the second of one named twice, ...

    y (m,): the classes of all images, -1 if not known; a part of a name will do -> (queries,)
    """
    rows = []
    for i, part in enumerate(classes):
        wanted = torch.tensor([c for c, name in enumerate(names) if part in str(name)])
        found, place = order[torch.isin(y[order], wanted)], classes[:i].count(part)
        if place >= len(found):
            known = ", ".join(map(str, names))
            raise UserError(f"--classes={part}: {len(found)} test images of it; classes: {known}")
        rows.append(found[place])
    return torch.stack(rows)


def save_neighbors(ctx, near, y, labels, rows, heads, path):
    """Write a PNG: test images (rows,), and their neighbors (m k) in each run of `near`."""
    images = ctx.split["test"].images

    def display_image(i):
        row = int(y["image"][i])
        image = images[row] if torch.is_tensor(images) else images[row][0]
        return image.rot90(int(y["rotation"][i]), (1, 2))

    shown = torch.cat([rows[:, None], *(one[rows] for one in near)], 1)  # (queries 1+runs*k)
    grid = torch.stack([display_image(i) for i in shown.flatten()]) / 255
    words = {name: [*class_names(ctx, name), ""] for name in labels}  # -1, not labeled, is the last
    titles = []
    for i in rows:
        known = [str(words[name][y[name][i]]) for name in labels]
        titles.append(", ".join(filter(None, known)))
    zoom = max(1, 64 // ctx.config["size"])
    image_grid(grid.unflatten(0, shown.shape), titles, heads, path, zoom=zoom)


@typed
def embed(
    root: str = None,
    out: str = "features.csv",
    *,
    run: str = "runs/latest",
    feature: str = None,
    classify: str = None,
    workers: int = None,
    device: str = "auto",
):
    """Embed every image in a folder and below: a row for each file, in the order of their names.

    The rows stream through a file beside OUT, so any number of images fits. Images that cannot be
    read are named and left out.

    Args:
        root: the folder
        out: a .csv file (file, f0, f1, ...), or .npz or .pt (files, features)
        run: folder of a finished run; runs/latest is the last one
        feature: v (the backbone's), z (all spaces) or the name of one space; by default v, or what
            the classifier reads
        classify: a classifier that `linear --save` wrote; it adds a class and its probability
        workers: processes that decode images, by default one for each core
        device: auto, cpu or cuda
    """
    out = Path(out)
    check_user_out(out, WRITERS)
    if not root or not Path(root).is_dir():
        problem = f"--root={root}: no such folder; " if root else ""
        raise UserError(f"{problem}embed needs --root=DIR, a folder of images")
    with loo.init_distributed(resolve_device(device)) as leader_first:
        encoder, config = open_encoder(run, feature or "v", device)
        head = read_classifier(classify, run, feature) if classify else {}
        feature = feature or head.get("feature", "v")
        paths, others = list_files(Path(root))
        if not paths:
            raise UserError(f"--root={root}: no images in this folder and below")
        warn_left_out(Path(root), others)
        part = Path(os.path.realpath(out)).with_name(f"{out.name}.rows.part")
        try:
            rows, x = embed_files(encoder, config, feature, paths, part, workers, leader_first)
            if loo.rank() == 0:
                files = [paths[i].relative_to(root).as_posix() for i in rows]
                classes = classify_rows(head, x) if head else {}
                content = dict(files=files, **classes, features=x)
                write_atomic(out, functools.partial(WRITERS[out.suffix.lower()], content))
                print(f"wrote {out}: {len(rows)} of {len(paths)} images, {x.shape[1]} features")
        finally:
            if loo.rank() == 0:
                with contextlib.suppress(OSError):  # not there, or on a read-only disk
                    part.unlink()


@torch.no_grad()
def embed_files(encoder, config, feature, paths, part, workers, leader_first):
    """The features of these images, in a file `part` that all ranks map.

    -> rows (m,) of the images that could be read, features (m d).
    """
    size, n = config["size"], len(paths)
    files = ImageSet(central_files(paths, size), None, {}, {})

    def embed_batch(images):
        return select_feature(*loo.encode(encoder, images), config, feature).float().cpu()

    d = embed_batch(torch.zeros(1, 3, size, size, device=encoder.w2.device)).shape[1]
    with leader_first():
        if loo.rank() == 0:
            write_atomic(part, functools.partial(allocate, size=4 * n * d))
    x, seen = map_file(part, n, d, dtype=torch.float32), torch.zeros(n)
    for rows, images in on_device(encoder, files, workers, batch=64, named=None):
        some = embed_batch(images)
        named = f"{paths[rows[0]]}, or of the next {len(rows) - 1} images"
        check_all_finite(f"features of {named}", some)
        x[rows] = some
        seen[rows] = 1
    rows = readable_rows(seen)
    if loo.rank() == 0:
        # Close the gaps, in place: the rows ascend, so no row is overwritten before it is read.
        for to, some in zip(torch.arange(len(rows)).split(4096), rows.split(4096)):
            x[to] = x[some]
    return rows, map_file(part, len(rows), d, dtype=torch.float32)


def read_classifier(path, run=None, feature=None):
    """What `linear --save` wrote; UserError for another file, or for another run or feature."""
    head = read_tensors(path)
    try:
        loo.check_types(head, dict(feature=str, weights=str))
        k, (_, d) = len(head["classes"]), head["w"].shape
        loo.check_shapes(dict(k=k, d=d), w=(head["w"], "k d"), b=(head["b"], "k"))
        check_all_finite("its weights", head["w"], head["b"])
    except (LookupError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: expected a file that `linear --save` wrote") from None
    if run and head["weights"] != hash_weights(run):
        raise UserError(f"--classify={path} was trained on --run={head.get('run')}, not {run}")
    if feature not in (None, head["feature"]):
        raise UserError(f"--feature={feature}: {path} reads the feature {head['feature']}")
    return head | dict(w=head["w"].float(), b=head["b"].float())


def classify_rows(head, x):
    """Features (n d) -> the most probable class of each, and its probability."""
    tops = [F.linear(some, head["w"], head["b"]).softmax(1).max(1) for some in x.split(4096)]
    classes = [head["classes"][i] for top in tops for i in top.indices]
    return {"class": classes, "probability": torch.cat([top.values for top in tops])}


def write_csv(content, file):
    """A column for each feature; nine digits give every float32 back."""
    text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")
    names = [name for name in content if name not in ("files", "features")]
    *columns, x = content.values()
    writer = csv.writer(text)
    writer.writerow(["file", *names, *(f"f{i}" for i in range(x.shape[1]))])
    for *cells, row in zip(*columns, x):
        cells = [cell if isinstance(cell, str) else f"{cell:.6f}" for cell in cells]
        writer.writerow([*cells, *(f"{value:.9g}" for value in row.tolist())])
    text.detach()


def write_npz(content, file):
    np.savez(file, **content)


WRITERS = {".csv": write_csv, ".npz": write_npz, ".pt": torch.save}


# ---------------------------------------------------------------- report and table

# The keys of a line in results.jsonl, in order.
KEYS = ("run", "task", "data", "root", "label", "on", "feature", "method", "groups", "protocol")
KEYS += ("shots", "top1", "top5", "ci95", "largest", "balanced", "n_train", "n_test", "seed")
KEYS += ("seconds",)
# What a line must have to be read again, see loo.check_types; the rest may be absent or null.
TYPES = dict(task=str, data=str, label=str, feature=str, method=str, groups=[str], protocol=str)
MAYBE = dict(shots=int, on=str, root=str, images=str, tested=str, labeled=str)
MAYBE |= dict.fromkeys(("top1", "top5"), loo.NUMBER)
# The printed columns and their heads; OPTIONAL ones only where the first result has a value.
PRINTED = dict(run="run", data="data", task="task", label="label", on="on", feature="feature")
PRINTED |= dict(protocol="protocol", shots="shots", top1="top-1", top5="top-5", ci95="+- 95%")
PRINTED |= dict(largest="largest class", balanced="mean of classes", gain="over all alone")
PRINTED |= dict(gain95="+- 95%", n_train="train", n_test="test", seconds="seconds")
OPTIONAL = ("on", "shots", "largest", "balanced", "gain", "gain95", "n_train")


def report(ctx, task_name, results, settings, json, begun):
    """Print each result, as a Markdown row or a JSON line, and append it to RUN/results.jsonl.

    results: dicts of KEYS and more. Two keys are no part of the line: `keep`, False for what is
    printed only, and `note`, a line to print under the table. settings: words to add to `protocol`.
    """
    columns, notes = [], []
    common = dict(run=ctx.run.name, task=task_name, data=ctx.data, root=ctx.root, protocol="fast")
    common |= dict(feature=ctx.feature, seed=ctx.seed)
    if ctx.data == "folder":
        common["images"], common["tested"] = (fingerprint(ctx.split[s]) for s in ("train", "test"))
        count, mark = ctx.config["held"].get("root", (0, ""))
        if ctx.root == ctx.config["root"] and mark not in ("", common["images"]):
            changed = f"other training images than the run's {count}, by name or size"
            warn_once(f"{ctx.root} holds {changed}: it may have been trained on test images")
    common |= {key: ctx.config[key] for key in ("method", "groups")}
    for found in results:
        if loo.rank():
            continue
        keep, note = found.pop("keep", True), found.pop("note", None)
        line = dict.fromkeys(KEYS) | common | found
        if ctx.data == "folder" and line["label"] != "rotation":
            line["labeled"] = label_mark(ctx.split["test"], line["label"])
        line["protocol"] = ", ".join([line["protocol"], *settings])
        line["seconds"] = round(time.perf_counter() - begun, 1)
        begun = time.perf_counter()
        for key, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[key] = None  # JSON has no NaN
        if keep:
            with optional_write(f"the results in {ctx.run}"):
                append_line(ctx.run / "results.jsonl", dumps(line))
        if json:
            print(dumps(line), flush=True)
            continue
        if not columns:
            columns = [k for k in PRINTED if k not in OPTIONAL or line.get(k) is not None]
            print(table_head([PRINTED[k] for k in columns]))
        print(table_row([line[k] for k in columns]), flush=True)
        if note:
            notes.append(note)
    if notes:
        print("\n" + "\n".join(notes))


def label_mark(dataset, label):
    """What the images are labeled, as a hash."""
    names = repr(dataset.classes[label]).encode("utf-8", "surrogateescape")
    return hashlib.sha1(names + dataset.labels[label].numpy().tobytes()).hexdigest()


def append_line(path, text):
    """Append a line to a file; one that a kill cut short stays alone."""
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "a") as file:
        file.write("\n" * cut + text + "\n")


def format_value(x):
    if x is None:
        return "-"
    return f"{x:.1f}" if isinstance(x, float) else str(x)


def table_row(cells):
    cells = [format_value(x).replace("|", r"\|") for x in cells]  # a class may be named so
    return f"| {' | '.join(cells)} |"


def table_head(names):
    return f"{table_row(names)}\n{'|---' * len(names)}|"


# Settings that `table` does not tell apart, or names in another column.
NAMED = {"seed", "method", "groups", "label", "textures"} | loo.FREE_FLAGS


@typed
def table(runs: tuple = ("runs/*",), paper: bool = False):
    """One Markdown table from the results of many runs: a row a method, a column a task and label.

    Runs that differ in nothing but seed share a row: mean +- half of the 95% interval over runs.
    What else differs is named.

    Args:
        runs: run folders or patterns, with commas between
        paper: the paper's tables instead, what it reports beside what these runs give
    """
    lines = read_results(runs)
    differs = list(differing_settings([config for config, _ in lines]))
    cells, shown = defaultdict(dict), {}
    for config, line in lines:
        row, column = row_key(config, line, differs), column_key(config, line)
        cells[row, column][line["seed"]] = line["top1"]
        cell, out = (row, column, line["seed"]), config["out"]
        if shown.get(cell, out) != out:
            same = f"{shown[cell]} and {out} have the same settings and seed"
            warn_once(f"{same}: the table shows the second")
        shown[cell] = out
    if paper:
        return print_papers_tables([pair for pair in lines if pair[0]["data"] == "imagenet100"])
    rows, columns = sorted({r for r, _ in cells}), sorted({c for _, c in cells})
    several = len({data for data, *_ in columns}) > 1
    heads = ["method", "groups", "feature", "differs in", "seeds"]
    for data, *column in columns:
        heads.append(column_name(*column) + (f" on {data}" if several else ""))
    print(table_head(heads))
    for row in rows:
        print(table_row([*row, *row_cells(cells, row, columns)]))


def read_results(runs):
    """(config, line) for each line of the results, oldest run first, so the last one counts.

    Those on the same images have one root, wherever these were; other test images, or other labels
    of the same, are named there.
    """
    pairs = []
    for path in sorted(find_files(runs, "results.jsonl"), key=os.path.getmtime):
        pairs += results_of(path.parent)
    if not pairs:
        names = ",".join(runs)
        raise UserError(f"--runs={names}: no results to read; `python eval.py linear` writes some")
    roots = {}  # {mark of the images: root}
    marks = {}  # {(key, root, label): the first mark}

    def unify(holder, mark):
        if mark not in roots:
            taken = holder["root"] in roots.values()  # the folder has changed since
            roots[mark] = holder["root"] + f" ({mark[:6]})" * taken
        holder["root"] = roots[mark]

    for config, line in pairs:
        if config["data"] == "folder" and config["root"] and "root" in config["held"]:
            unify(config, config["held"]["root"][1])
            if line.get("images"):
                unify(line, line["images"])
            for what, key in (("test images", "tested"), ("labels", "labeled")):
                mark, place = line.get(key), (key, line["root"], line["label"])
                if mark and mark != marks.setdefault(place, mark):
                    line["root"] += f" ({what} {mark[:6]})"
    return pairs


def read_config(run, *needed):
    """config.json of a run folder, `out` the folder; {}, with a warning, where it is no run's."""
    try:
        return loo.read_config(run, needed) | {"out": str(run)}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        warn_once(f"{run}: its config.json is no run's ({first_line(error)}); it is left out")
        return {}


def read_lines(path, **types):
    """The results in a file; types: of what they must have beside TYPES."""
    lines = loo.read_jsonl(path, TYPES | MAYBE | types, MAYBE)
    return [line for line in lines if line.get("top1") is not None]


def results_of(run):
    """(config, line) for each result in a run folder; `seed` the training's, `out` the folder."""
    lines = read_lines(run / "results.jsonl")
    config = lines and read_config(run, "seed", "data", "method", "groups")
    absent = {"root": config["root"], "shots": None} if config else {}
    return [(config, absent | line | {"seed": config["seed"]}) for line in lines if config]


def own_results(run):
    """The results of a run on the data that it was trained on."""
    return [line for config, line in results_of(run) if line.get("root") == config["root"]]


def find_files(runs, name):
    """The files of that name in run folders or patterns, each once: runs/latest is a link."""
    files, unread = set(), set(runs)
    # The name of a folder may hold commas and brackets.
    for i, j in itertools.combinations(range(len(runs) + 1), 2):
        pattern = f"{','.join(runs[i:j])}/{name}"
        found = glob.glob(pattern) + glob.glob(pattern.replace("[", "[[]"))
        files |= {Path(file).resolve() for file in found}
        unread -= set(runs[i:j] if found else ())
    for word in sorted(unread) if files else ():
        warn_once(f"--runs={word}: no {name} there")
    return sorted(files)


@typed
def curves(runs: tuple = ("runs/*",), out: str = "curves.png"):
    """Draw the logs of several runs: a panel for each quantity and space, a color for each run.

    Args:
        runs: run folders or patterns, with commas between
        out: where to write the image
    """
    check_user_out(out)
    logs = {}
    for file in find_files(runs, "log.jsonl"):
        config = read_config(file.parent, "method", "groups", "batch")
        if config:
            logs[file.parent] = loo.read_curves(config, file.parent, config["batch"])
    if not any(logs.values()):
        raise UserError(f"--runs={','.join(runs)}: no log; `python loo.py train` writes one")
    top = os.path.commonpath([run.parent for run in logs])
    spaces = dict.fromkeys(itertools.chain(*(log["loss"] for log in logs.values())))
    # A column a space: a panel without curves keeps its place.
    panels = {f"{quantity} of {space}": {} for quantity in ("loss", "top-1") for space in spaces}
    for run, log in logs.items():
        for quantity, of_spaces in log.items():
            for space, curve in of_spaces.items():
                panel = panels.setdefault(f"{quantity} of {space}", {})
                panel[str(run.relative_to(top))] = curve
    draw_curves(panels, out, "images seen", len(spaces))
    print(f"wrote {out}")


def differing_settings(configs):
    """Yield the settings in which these configs differ, of those that no other column names."""
    for key in sorted(set().union(*configs) - NAMED):
        if len({repr(setting(config, key)) for config in configs}) > 1:
            yield key


def setting(config, key):
    """A setting as `table` compares it."""
    if key in ("root", "split_seed") and config["data"] != "folder":
        return None  # a published set is the same wherever it is
    if key != "always":
        return config.get(key)
    # A named group leaves this list: only what is there beside the groups tells runs apart.
    changed = set(config["always"]).symmetric_difference(loo.ALWAYS) - set(config["groups"])
    signs = [("+" if name in config["always"] else "-") + name for name in sorted(changed)]
    return " ".join(["default", *signs])


def row_key(config, line, differs):
    method = line["method"]
    if method == "supervised":
        method += f" ({config['label']})"
    settings = ", ".join(f"{key} {setting(config, key)}" for key in differs)
    return method, ", ".join(line["groups"]), line["feature"], settings


def column_key(config, line):
    data, root = line["data"], line.get("root", config["root"])
    if data == "folder" and root not in (None, config["root"]):
        data += f" {root}"
    on = line.get("on") or ""
    return data, line["task"], line["label"], line["shots"] or 0, on, line["protocol"]


PLAIN = {"fast", "adam", "knn", "cosine", "generated"}  # protocols of default flags


def column_name(task, label, shots, on, protocol):
    name = task if task == label else f"{task} {label}"
    if shots:
        name += f", {shots} shots"
    if on:
        name += f" {on}"
    return name if protocol in PLAIN else f"{name} ({protocol})"


def row_cells(cells, row, columns):
    """A row of {(row, column): {seed: value}}: how many seeds ("4 to 5" if they differ), means."""
    values = [list(cells[row, column].values()) for column in columns]
    counts = [len(some) for some in values if some] or [0]
    seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
    return [seeds, *map(mean_cell, values)]


def mean_cell(values, sign=""):
    """Their mean +- half of its 95% interval; sign="+" also marks a mean above zero."""
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):{sign}.1f}"
    half = t_ci95(values)
    return mean if half == math.inf else f"{mean} +- {half:.1f}"


# Where the paper's columns are in results.jsonl: task, data, label, shots, on, value.
COLUMNS = {
    "rotation": ("rotation", "imagenet100", "rotation", None, None, "top1"),
    "IN-100 top-1": ("linear", "imagenet100", "class", None, None, "top1"),
    "iNat-1k top-1": ("linear", "inat2019", "class", None, None, "top1"),
    "CUB-200 top-1": ("linear", "cub200", "class", None, None, "top1"),
    "Flowers 5-shot": ("fewshot", "flowers102", "class", 5, None, "top1"),
    "Flowers 10-shot": ("fewshot", "flowers102", "class", 10, None, "top1"),
    "ON-13 top-1": ("robust", "imagenet100", "class", None, "objectnet13", "top1"),
    "ON-13 top-5": ("robust", "imagenet100", "class", None, "objectnet13", "top5"),
    "IN-100 top-5": ("linear", "imagenet100", "class", None, None, "top5"),
    "iNat-1k top-5": ("linear", "inat2019", "class", None, None, "top5"),
    "CUB-200 top-5": ("linear", "cub200", "class", None, None, "top5"),
}
CORRUPTED = []
for on in list(SUMMARIES)[len(CORRUPTIONS) :]:
    CORRUPTED.append("IN-C " + on.replace("all corruptions", "all"))
    COLUMNS[CORRUPTED[-1]] = ("robust", "imagenet100", "class", None, on, "top1")

PAIR = ("color", "rotation")
RT = ("rotation", "texture")
ALL3 = ("color", "rotation", "texture")
SPACES = ["all", "all+color", "all+rotation", "all+texture", "all+color+rotation"]
SPACES += ["all+color+texture", "all+rotation+texture", "all+color+rotation+texture"]

# The rows of tables 1 to 5 of the paper, {name: (method, groups, feature, reported figures)}.
# * is a figure that we know from others alone.
TABLE1 = {
    "MoCo": ("moco", ("color",), "v", 61.1, 81.0),
    "MoCo + rotation": ("moco", PAIR, "v", 43.3, 79.4),
    "MoCo + rotation, same for q and k": ("moco_same", PAIR, "v", "45.5*", "77.5*"),
    "LooC + rotation": ("looc", ("rotation",), "v", "65.2*", "80.2*"),
}
TABLE2 = {
    "MoCo (color)": ("moco", ("color",), "v", "36.2*", "36.7*", "67.9*", "77.3*", 81.0),
    "LooC (color)": ("looc", ("color",), "v", "41.2*", "40.1*", "68.2*", "77.6*", "81.1*"),
    "LooC (rotation)": ("looc", ("rotation",), "v", "40.0*", "38.8*", "70.1*", "79.3*", "80.2*"),
    "LooC (color, rotation)": ("looc", PAIR, "v", "44.0*", "39.6*", "70.9*", "80.8*", "79.2*"),
    "LooC++ (color, rotation)": ("looc++", PAIR, "v", "46.1*", "39.3*", "68.1*", "78.8*", "81.2*"),
}
TABLE3 = {
    "supervised": ("supervised", None, "v"),
    "MoCo": ("moco", ("color",), "v"),
    "LooC (rotation)": ("looc", ("rotation",), "v"),
    "LooC (texture)": ("looc", ("texture",), "v"),
    "LooC (rotation, texture)": ("looc", RT, "v"),
    "LooC++ (rotation, texture)": ("looc++", RT, "v"),
}
TABLE4 = {
    "MoCo (color)": ("moco", ("color",), "v"),
    "MoCo (color, rotation)": ("moco", PAIR, "v"),
    "MoCo (all)": ("moco", ALL3, "v"),
    "MoCo++ (color, rotation)": ("moco++", PAIR, "v"),
    "LooC (color, rotation)": ("looc", PAIR, "v"),
    "LooC++ (color, rotation)": ("looc++", PAIR, "v"),
}
TABLE5 = {name: ("looc++", ALL3, name) for name in SPACES}

FEW_SHOT = ("Flowers 5-shot", "Flowers 10-shot")
TRANSFER = ("iNat-1k top-1", "CUB-200 top-1")
TOP5 = ("IN-100 top-5", "iNat-1k top-5")
TABLES = (  # title, columns, rows
    ("Table 1: rotation", ("rotation", "IN-100 top-1", "IN-100 top-5"), TABLE1),
    ("Table 2: transfer", (*TRANSFER, *FEW_SHOT, "IN-100 top-1", *TOP5, "CUB-200 top-5"), TABLE2),
    ("Table 3: robustness", ("ON-13 top-1", "ON-13 top-5", *CORRUPTED), TABLE3),
    ("Table 4: all augmentations", ("IN-100 top-1", "iNat-1k top-1", *FEW_SHOT, *TOP5), TABLE4),
    ("Table 5: spaces of LooC++", ("rotation", "IN-100 top-1", *TRANSFER, *TOP5), TABLE5),
)


def print_papers_tables(lines):
    """TABLES: what the paper reports, and beside it what lines, (config, result), give."""
    differs = ", ".join(differing_settings([config for config, _ in lines]))
    if differs:
        raise UserError(f"--paper: these runs differ in {differs}: name fewer with --runs")
    results = [line for _, line in lines]
    for title, columns, rows in TABLES:
        heads = ["method"]
        for column in columns:
            heads += [f"{column}, reported", f"{column}, these runs"]
        print(f"{title}\n\n{table_head(heads)}")
        for name, row in rows.items():
            cells = [name]
            for column, reported in itertools.zip_longest(columns, row[3:]):
                cells += [reported, papers_cell(results, row, column)]
            print(table_row(cells))
        print()
    print("* as reported by others, not confirmed; in parentheses: not the paper's protocol")


def papers_cell(results, row, column):
    """What these runs give: by the paper's protocol where there is one, else by another, named."""
    found = by_protocol(results, row, COLUMNS[column])
    if not found:
        return "-"
    protocol = next(p for p in ("paper", "folder", *found) if p in found)
    mark = {"paper": "", "folder": " (fast)", "adam": " (fast)"}.get(protocol, f" ({protocol})")
    return mean_cell(list(found[protocol].values())) + mark


def by_protocol(lines, row, column):
    """The results of a cell of TABLES, {protocol: {seed: value}}; the last line counts."""
    method, groups, feature, *_ = row
    task, data, label, shots, on, value = column
    wanted = dict(method=method, data=data, label=label, shots=shots, on=on)
    wanted["task"] = task if feature == "v" else "spaces"
    found = defaultdict(dict)
    for line in lines:
        same = all(line.get(key) == wanted[key] for key in wanted)
        same_feature = set(line["feature"].split("+")) == set(feature.split("+"))
        same_groups = groups is None or set(groups) == set(line["groups"])
        if same and same_feature and same_groups and line.get(value) is not None:
            found[line["protocol"]][line["seed"]] = line[value]
    return found


# ---------------------------------------------------------------- claims

FACTOR_LABELS = ("object", "hue", "species", "texture")
SHIFTS = ("new viewpoint", *IMAGENETC, "all corruptions")
# The columns of TABLES on factors.
ON_FACTORS = {
    "rotation": ("rotation", "factors", "rotation", None, None, "top1"),
    **{label: ("linear", "factors", label, None, None, "top1") for label in FACTOR_LABELS},
    "species 5-shot": ("fewshot", "factors", "species", 5, None, "top1"),
    "species 10-shot": ("fewshot", "factors", "species", 10, None, "top1"),
    **{f"object, {on}": ("robust", "factors", "object", None, on, "top1") for on in SHIFTS},
}

# What the paper says of each table, {claim: [(row, sign, other rows, columns), ...]}, said of each
# of these rows and columns. The sign is > for more than, >= for at most MARGIN points less.
MARGIN = 1
LABELS2 = ("hue", "species", "species 5-shot", "species 10-shot", "rotation", "texture", "object")
LABELS5 = ("rotation", "object", "hue", "texture")
NEW_VIEW, CORRUPTED_ALL = "object, new viewpoint", "object, all corruptions"
CHANGED = ["hue", "species", "rotation"]
CLAIMS1 = {
    "adding rotation to MoCo lowers rotation accuracy": [
        ("MoCo", ">", ["MoCo + rotation"], ["rotation"])
    ],
    "sharing the rotation between query and key does not bring it back": [
        ("MoCo", ">", ["MoCo + rotation, same for q and k"], ["rotation"])
    ],
    "LooC brings it back": [
        ("LooC + rotation", ">", ["MoCo + rotation"], ["rotation"]),
        ("LooC + rotation", ">", ["MoCo + rotation, same for q and k"], ["rotation"]),
        ("LooC + rotation", ">=", ["MoCo"], ["rotation"]),
    ],
}
CLAIMS2 = {
    "LooC (color) beats MoCo on what color changes, without losing object": [
        ("LooC (color)", ">", ["MoCo (color)"], ["hue", "species"]),
        ("LooC (color)", ">=", ["MoCo (color)"], ["object"]),
    ],
    "LooC (color, rotation) beats MoCo on what color and rotation change, without losing object": [
        ("LooC (color, rotation)", ">", ["MoCo (color)"], CHANGED),
        ("LooC (color, rotation)", ">=", ["MoCo (color)"], ["object"]),
    ],
    "LooC++, all spaces side by side, is best or tied on all labels at once": [
        ("LooC++ (color, rotation)", ">=", list(TABLE2)[:-1], LABELS2)
    ],
}
CLAIMS3 = {
    "rotation helps under new viewpoints": [("LooC (rotation)", ">", ["MoCo"], [NEW_VIEW])],
    "texture helps under corruptions": [("LooC (texture)", ">", ["MoCo"], [CORRUPTED_ALL])],
    "both together help on both": [
        ("LooC (rotation, texture)", ">", ["MoCo"], [NEW_VIEW, CORRUPTED_ALL])
    ],
}
CLAIMS4 = {
    "LooC beats MoCo with the same groups, without losing object": [
        ("LooC (color, rotation)", ">", ["MoCo (color, rotation)"], CHANGED),
        ("LooC (color, rotation)", ">=", ["MoCo (color, rotation)"], ["object"]),
    ],
    "LooC (color, rotation) beats MoCo with all groups, without losing object": [
        ("LooC (color, rotation)", ">", ["MoCo (all)"], CHANGED),
        ("LooC (color, rotation)", ">=", ["MoCo (all)"], ["object"]),
    ],
    "MoCo++, as wide as LooC++, does not close the gap": [
        ("LooC++ (color, rotation)", ">", ["MoCo++ (color, rotation)"], CHANGED),
        ("LooC++ (color, rotation)", ">=", ["MoCo++ (color, rotation)"], ["object"]),
    ],
}
CLAIMS5 = {}
for label, group in (("hue", "color"), ("rotation", "rotation"), ("texture", "texture")):
    others = [f"all+{other}" for other in ALL3 if other != group]
    claim = f"of two spaces, {label} prefers {group} for the second"
    CLAIMS5[claim] = [(f"all+{group}", ">", others, [label])]
claim = "all spaces side by side are best or tied on all labels at once"
CLAIMS5[claim] = [(SPACES[-1], ">=", SPACES[:-1], LABELS5)]
# For each of TABLES: its columns on factors, and the claims.
CLAIMS = (
    (("rotation", "object"), CLAIMS1),
    (LABELS2, CLAIMS2),
    (("object", *(f"object, {on}" for on in SHIFTS)), CLAIMS3),
    (("object", "hue", "species", "texture", "rotation"), CLAIMS4),
    (LABELS5, CLAIMS5),
)

CORRUPTED_PICTURES = 1024  # test images that `claims` sees corrupted: all take four times as long
BUDGETS = {"small": {}, "large": dict(arch="resnet18", size=64, epochs=100)}  # flags of `train`


@typed
def claims(
    budget: str = "small",
    *,
    data: str = "factors",
    root: str = None,
    labels: tuple = None,
    seeds: int = 5,
    first: int = 31,
    jobs: int = 1,
    out: str = None,
    results: str = None,
):
    """Train and judge the rows of the paper's tables; say whether each claim holds.

    It runs the commands that it prints, one after the other. What is there already is not done
    again, and a training that was stopped goes on where it was. A cell is the mean +- half of
    Student's 95% interval over seeds. A claim is decided by differences within a seed. It holds
    when the intervals of all its comparisons lie above zero (of "without losing" and "tied", above
    -1 point), it does not hold when one lies below, widened for how many they are (Bonferroni),
    else one cannot tell.

    Args:
        budget: small (the default recipe, minutes a run on a CPU) or large (ResNet-18, 64 pixels,
            100 epochs, for a GPU)
        data: factors, or another data set
        root: its folder
        labels: what stands for the labels of factors there, as hue=tone,object=kind. Needed but for
            factors; `object` is needed. Cells of other labels, and runs with texture, are left out
        seeds: how many
        first: the first of them; no setting was ever chosen on 21 to 99
        jobs: 1, because the commands run one after the other
        out: where the runs are, and the results of all of them in one file, OUT/BUDGET.jsonl; by
            default runs/claims, with the data set's name if it is not factors
        results: print the tables of such a file, and train nothing
    """
    check_choice("budget", budget, BUDGETS)
    labels = parse_labels(check_choice("data", data, DATASETS), labels)
    tables = claimed_tables(data, labels)
    name = Path(root).resolve().name if root else data
    out = out or ("runs/claims" if data == "factors" else f"runs/claims-{name}")
    place = {} if data == "factors" else {"data": data}
    if root:
        place["root"] = root
    if loo.asked_processes() > 1:
        raise UserError("claims starts processes of its own: start it as one process")
    chosen = range(first, first + seeds)
    if results:
        return print_claims(chosen_results(results, budget, chosen, data), tables, name)
    if place:  # refused before anything runs
        known = open_dataset(data, "train", root=root).classes
        for label in labels.values():
            check_choice("labels", label, known)
    folder = Path(out) / budget
    check_out(folder, folder=True)
    check_out(Path(out) / f"{budget}.jsonl")
    # An error where it cannot be written, before anything runs.
    Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)
    chains = missing_commands(folder, chosen, BUDGETS[budget] | place, tables)
    try:
        run_all(chains)
    finally:  # the tables so far, whatever ended it
        lines = []
        for run in sorted(folder.glob("*/")):
            if not run.suffix:  # --fresh moves a run aside to NAME.1
                lines += [line | {"budget": budget} for line in own_results(run)]
        text = "".join(dumps(line) + "\n" for line in lines)
        write_atomic(Path(out) / f"{budget}.jsonl", text.encode())
        if lines := [line for line in lines if line["seed"] in chosen]:
            print_claims(lines, tables, name)


def chosen_results(path, budget, seeds, data):
    """The lines of one budget, these seeds and a data set; UserError where there are none."""
    if not Path(path).is_file():
        raise UserError(f"--results={path}: no such file; leave the flag out to train")
    lines, held = [], set()
    for line in read_lines(Path(path), seed=int):
        held.add(f"{line['data']} {line.get('budget')} {line['seed']}")
        if (line["data"], line.get("budget")) == (data, budget) and line["seed"] in seeds:
            lines.append(line)
    if not lines:
        asked = f"--data={data} --budget={budget} and seeds {seeds[0]} to {seeds[-1]}"
        there = ", ".join(sorted(held)) or "no results"
        raise UserError(f"--results={path} has nothing of {asked}; it holds {there}")
    return lines


def parse_labels(data, words):
    """Words such as hue=tone -> {label of factors: its counterpart}; of factors all, themselves."""
    if data == "factors":
        if words:
            raise UserError(f"--labels={','.join(words)} is for another data set than factors")
        return {label: label for label in FACTOR_LABELS}
    pairs = dict(word.partition("=")[::2] for word in words or ())
    for label in pairs:
        check_choice("labels", label, FACTOR_LABELS)
    if not pairs.get("object") or not all(pairs.values()):
        raise UserError(f"--labels names the labels of {data}, as hue=tone,object=kind")
    return pairs


def claimed_tables(data, labels):
    """TABLES and CLAIMS on a data set: (title, rows, {name: column}, claims) each.

    labels: {label of factors: its counterpart}. What has none there is left out, and on other sets
    than factors also shifts and runs with texture.
    """
    here = {}  # {name on factors: (name, column) here}
    for name, (task, _, label, shots, on, value) in ON_FACTORS.items():
        if label == "rotation" or (label in labels and (data == "factors" or not on)):
            counterpart = labels.get(label, label)
            column = (task, data, counterpart, shots, on, value)
            here[name] = (name.replace(label, counterpart), column)
    tables = []
    for (title, _, rows), (shown, said) in zip(TABLES, CLAIMS):
        if data != "factors":
            rows = {name: row for name, row in rows.items() if "texture" not in (row[1] or ALL3)}
        claims = {}
        for claim, comparisons in said.items():
            kept = []
            for row, sign, others, some in comparisons:
                some = [here[name][0] for name in some if name in here]
                if some and {row, *others} <= set(rows):
                    kept.append((row, sign, others, some))
            if len(kept) == len(comparisons):
                claims[claim.replace("object", labels["object"])] = kept
        if claims:
            columns = dict(here[name] for name in shown if name in here)
            tables.append((title, rows, columns, claims))
    return tables


def missing_commands(out, seeds, flags, tables):
    """A list of missing commands for each run of the tables; UserError for other settings."""
    wanted = wanted_cells(tables)
    chains = []
    for seed, (method, groups) in itertools.product(seeds, wanted):
        run = out / f"{method}-{'+'.join(groups)}-{seed}"
        given = dict(method=method, groups=groups, seed=seed, out=str(run)) | flags
        if method == "supervised":
            given["label"] = "object"
        if (run / "config.json").exists() and (saved := read_config(run, "seed")):
            loo.check_same_config(loo.default_config(**given), saved, run)
        chain = [] if (run / "heads.pt").exists() else [command_of("loo.py", "train", **given)]
        lines = own_results(run)
        for name, cells in wanted[method, groups].items():
            if all(seed in default_cell(lines, row, column) for row, column in cells):
                continue
            options = dict(run=run, seed=seed)
            if name != "rotation":
                options["label"] = tuple(dict.fromkeys(column[2] for _, column in cells))
            if name == "robust":
                options["pictures"] = CORRUPTED_PICTURES
            chain.append(command_of("eval.py", name, **options))
        chains.append(chain)
    return chains


def wanted_cells(tables):
    """The cells of the tables, {(method, groups): {task: [(row, column), ...]}}."""
    wanted = defaultdict(lambda: defaultdict(list))
    for _, rows, columns, _ in tables:
        for row, column in itertools.product(rows.values(), columns.values()):
            method, groups, feature, *_ = row
            task = column[0] if feature == "v" else "spaces"
            wanted[method, groups or ("color",)][task].append((row, column))
    return wanted


def command_of(script, name, **flags):
    """A command as it is typed after `python`, in a list."""
    values = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in flags.items()}
    return [script, name, *(f"--{k}={v}" for k, v in values.items())]


def default_cell(lines, row, column):
    """A cell of TABLES, {seed: value}, by the protocol in which `claims` runs its task."""
    robust = f"generated, pictures {CORRUPTED_PICTURES}"
    protocol = {"fewshot": "adam", "robust": robust}.get(column[0], "fast")
    return by_protocol(lines, row, column)[protocol]


def run_all(chains):
    """Run lists of commands one after the other. UserError at the end where some failed.

    A command that fails ends its own list, the others go on. A signal stops all.
    """
    total, started, failed, begun = sum(map(len, chains)), 0, [], time.perf_counter()
    with loo.catch_signals() as asked:
        for chain in chains:
            for command in chain:
                started += 1
                words, seconds = f"python {shlex.join(command)}", time.perf_counter() - begun
                print(f"[{started}/{total}, {seconds:.0f} s] {words}", flush=True)
                code, output = run_command(command, asked)
                if asked:
                    print("stopped: the same command goes on from here", file=sys.stderr)
                    raise SystemExit(128 + asked[0])
                if code:
                    last = (output.splitlines() or ["-"])[-1]
                    failed.append(f"{words} ended with {code}: {last}")
                    print(output, file=sys.stderr)
                    break
    if failed:
        hint = "the same command goes on with what is left"
        raise UserError(f"{len(failed)} of {started} commands failed; {hint}; first: {failed[0]}")


def run_command(command, asked):
    """Run one command until it ends, or until a signal is in the list `asked` -> code, output."""
    words = [sys.executable, Path(__file__).with_name(command[0]), *command[1:]]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
        try:
            while process.poll() is None and not asked:
                time.sleep(0.1)
        finally:
            process.terminate()  # if it still runs; a trainer saves its last step first
            process.wait()
        output.seek(0)
        return process.returncode, output.read()


def print_claims(lines, tables, name):
    """Print each of claimed_tables on the data set `name`, and what `lines` say of its claims."""
    verdicts = []
    for title, rows, columns, said in tables:
        print(f"{title}, on {name}\n\n{table_head(['method', 'seeds', *columns])}")
        cells = {}
        for row, column in itertools.product(rows, columns):
            cells[row, column] = default_cell(lines, rows[row], columns[column])
        for row in rows:
            print(table_row([row, *row_cells(cells, row, columns)]))
        print()
        for claim, comparisons in said.items():
            decision, evidence = judge_claim(cells, comparisons)
            print(f"- {claim}: **{decision}**. {evidence}")
            verdicts.append(decision)
        print()
    counts = [f"{v} {verdicts.count(v)}" for v in ("holds", "does not hold", "cannot tell")]
    print(f"{len(verdicts)} claims: {', '.join(counts)}")


def judge_claim(cells, comparisons):
    """Decide a claim -> "holds", "does not hold" or "cannot tell", and the evidence.

    cells {(row, column): {seed: value}}, comparisons as in CLAIMS. The evidence is the three
    weakest of the comparisons that decided it.
    """
    count = sum(len(others) * len(columns) for _, _, others, columns in comparisons)
    found = defaultdict(list)
    for row, sign, others, columns in comparisons:
        least = -MARGIN if sign == ">=" else 0
        for other, column in itertools.product(others, columns):
            ours, theirs = cells[row, column], cells[other, column]
            gains = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            decision, distance, text = compare(gains, least, count)
            found[decision].append((distance, f"{column} {text}, {row} over {other}"))
    decision = next(d for d in ("does not hold", "cannot tell", "holds") if d in found)
    shown = [text for _, text in sorted(found[decision])]
    more = f"; and {len(shown) - 3} more" if len(shown) > 3 else ""
    return decision, "; ".join(shown[:3]) + more


def compare(gains, least, comparisons):
    """Decide one of so many comparisons -> decision, how far its bound is above `least`, text.

    gains: differences within a seed. The text has their mean, half of its 95% interval, and with
    how many seeds the gain is above `least`.
    """
    mean = sum(gains) / max(1, len(gains))
    # All must be above, so each is asked at 95%. One below is enough, which is likelier among many.
    half, wide = t_ci95(gains), t_ci95(gains, comparisons)
    decision, bound = "cannot tell", mean - half
    if mean - half > least:
        decision = "holds"
    elif mean + wide < least:
        decision, bound = "does not hold", mean + wide
    above = f" above {least}" if least else ""
    seeds = f"{sum(gain > least for gain in gains)} of {len(gains)} seeds{above}"
    return decision, bound - least, f"{mean_cell(gains, sign='+')} ({seeds})"


if __name__ == "__main__":
    tasks = (linear, rotation, fewshot, knn, robust, spaces, retrieve, embed, table, curves, claims)
    command_line({f.__name__: f for f in tasks})
