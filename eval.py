"""What the features know: probes of a frozen encoder.

    python eval.py fewshot                               # of the last run, on the data it was trained on
    python eval.py linear --run=runs/NAME --label=hue
    python eval.py rotation | knn | robust | spaces
    python eval.py retrieve --against=runs/OTHER         # a picture of nearest neighbours, two runs side by side
    python eval.py table --runs='runs/*'                 # all results so far as one Markdown table; --paper: as the paper's tables
    python eval.py claims                                # train the rows of the paper's tables on factors: which of its claims hold?

Each task prints a Markdown row for each result and appends a JSON line to RUN/results.jsonl.
Axes: b image, s space, d feature, n sample, r quarter turns, t trial, k class, h w pixel.
"""

import contextlib
import functools
import glob
import hashlib
import inspect
import itertools
import json as json_
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

import data as pixels
import loo
from data import check_choice
from loo import UserError

# ---------------------------------------------------------------- features


@torch.no_grad()
def features(encoder, found, turns=(0,), workers=2, batch=256):
    """The frozen encoder on a Data of central crops, decoded batch by batch -> v ((r n) d), z (s (r n) c) on the CPU, and the rows (n,)
    of the pictures that could be read. turns: every picture is seen once for each, in quarter turns. Ranks share the work."""
    encoder.eval()
    n, (spaces, dim, _) = len(found.images), encoder.w2.shape
    v, z, seen = (
        torch.zeros(len(turns), n, encoder.features),
        torch.zeros(spaces, len(turns), n, dim),
        torch.zeros(n),
    )
    for rows, crops in on_device(encoder, found, workers, batch):
        some_v, some_z = zip(*(loo.encode(encoder, crops.rot90(turn, (2, 3))) for turn in turns))
        v[:, rows], z[:, :, rows] = (
            torch.stack(some_v).float().cpu(),
            torch.stack(some_z, 1).float().cpu(),
        )  # (r b d), (s r b c)
        seen[rows] = 1
    v, z, seen = map(loo.all_reduce_sum, (v, z, seen))
    rows = seen.nonzero().squeeze(1)
    return (
        rearrange(v[:, rows], "r n d -> (r n) d"),
        rearrange(z[:, :, rows], "s r n c -> s (r n) c"),
        rows,
    )


def on_device(encoder, found, workers=2, batch=256, count=None):
    """This rank's part of the (first `count`) pictures of a Data on the encoder's device: yields rows (b,), images (b 3 h w) in [0, 1]."""
    for rows, images, _ in pixels.iter_batches(
        found, workers, batch, (loo.rank(), loo.world_size()), count
    ):
        yield rows, images.to(device_of(encoder), non_blocking=True).float() / 255


def device_of(encoder):
    return next(encoder.parameters()).device


def feature_names(config):
    spaces = loo.get_method(config).spaces
    return ("v", *["z"] * bool(spaces), *spaces)


def select_feature(v, z, config, feature):
    """v (n d), z (s n c) -> (n ...): "v" the backbone feature, "z" all spaces side by side, or one space by its name: its Conv5
    where it has one (LooC++), else its embedding."""
    method = loo.get_method(config)
    if feature in ("v", "z"):
        return v if feature == "v" else rearrange(z, "s n c -> n (s c)")
    space = method.spaces.index(feature)
    return (
        rearrange(v, "n (s d) -> s n d", s=len(method.spaces))[space]
        if method.heads == "conv5"
        else z[space]
    )


def space_features(encoder, v, z, config, layer):
    """What `spaces` compares, {space: (n ...)}: LooC++'s Conv5, or of LooC's heads the "hidden" layer or the "output"."""
    names, conv5 = loo.get_method(config).spaces, loo.get_method(config).heads == "conv5"
    if conv5 or layer == "output":
        return {name: select_feature(v, z, config, name) for name in names}
    w, b = encoder.w1.detach().cpu(), encoder.b1.detach().cpu()
    return {name: F.relu(F.linear(v, w[s], b[s])) for s, name in enumerate(names)}


# ---------------------------------------------------------------- probes


def logistic(x, y, k, l2, iterations=500, start=None):
    """Multinomial logistic regression by L-BFGS: x (n d), y (n,) of k classes -> w (k d), b (k,).

    Minimises mean cross-entropy + l2 / 2 * |w|^2, as scikit-learn's LogisticRegression at C = 1 / (n l2), from `start` (w, b).
    """
    w, b = (
        p.clone().requires_grad_() for p in start or (x.new_zeros(k, x.shape[1]), x.new_zeros(k))
    )
    optimizer = torch.optim.LBFGS(
        [w, b],
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = (
            F.cross_entropy(F.linear(x, w, b), y) + l2 / 2 * w.square().sum()
        )  # with w (d k) four classes took three times as long
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), b.detach()


def lbfgs_probe(x, y, k, seed, turns=1, grid=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5)):
    """The L2 weight chosen on a fifth of the training pictures, each with all its turns, then all of them: x ((r n) d), y ((r n),) of k classes
    -> w (k d), b (k,)."""
    n = len(x) // turns
    order = torch.randperm(n, generator=loo.generator("held out", seed))
    held, rest = (
        (some + n * torch.arange(turns)[:, None]).flatten()
        for some in (order[: n // 5], order[n // 5 :])
    )
    held, rest, y_held, y_rest = x[held], x[rest], y[held], y[rest]
    tried, start = [], None
    for l2 in grid:  # from strong to weak, each from the one before: the short way down
        start = logistic(rest, y_rest, k, l2, 60, start)
        tried.append((accuracy(F.linear(held, *start), y_held), l2, start))
    _, l2, start = max(tried, key=lambda one: one[0])
    return logistic(x, y, k, l2, 300, start)


def sgd_probe(b, found, label, k, d, epochs, lr, batch=256):
    """The paper's protocol: SGD on crops and flips of the decoded pictures `found` through the frozen encoder, lr x0.1 at 60% and 80%, no
    weight decay; k classes of `label`, a feature of d -> w (k d), b (k,). label "rotation": every picture is given a random quarter turn, and
    not flipped (that would turn 90 degrees into 270)."""
    device, turn, n = device_of(b.encoder), label == "rotation", len(found.images)
    if n < batch:
        raise UserError(
            f"--protocol=paper takes batches of {batch}, the training split has {n} pictures: use the default protocol"
        )
    layer = torch.nn.Linear(d, k, device=device)
    layer.weight.data.copy_(torch.randn(k, d, generator=loo.generator("probe", b.seed)) * 0.01)
    layer.bias.data.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=0.9)
    for epoch in range(epochs):
        for i, rows in enumerate(pixels.epoch_batches(n, batch, b.seed, epoch)):
            g = loo.generator("probe", b.seed, epoch, i)
            with torch.no_grad():
                images, _, _ = loo.augment_groups(
                    found.images[rows].to(device).float() / 255,
                    (),
                    torch.zeros(0, 0, dtype=torch.bool),
                    g,
                    always=("crop",) if turn else ("crop", "flip"),
                    size=b.config["size"],
                    aspect=found.aspect[rows].to(device),
                )
                y = (
                    torch.randint(4, (batch,), generator=g) if turn else found.labels[label][rows]
                ).to(device)
                x = select_feature(
                    *loo.encode(b.encoder, loo.resample(images, {"turns": y}) if turn else images),
                    b.config,
                    b.feature,
                ).float()
            optimizer.param_groups[0]["lr"] = lr * 0.1 ** (
                (epoch >= 0.6 * epochs) + (epoch >= 0.8 * epochs)
            )
            loo.optimizer_step(optimizer, F.cross_entropy(layer(x), y))
    return layer.weight.detach(), layer.bias.detach()


def fit_few_shot(x, y, k, iterations=250, lr=0.03):
    """All trials at once as one batched problem, Adam: x (t n d), y (t n) -> w (t d k), b (t 1 k). Trials do not touch each other."""
    t, n, d = x.shape
    w, b = x.new_zeros(t, d, k).requires_grad_(), x.new_zeros(t, 1, k).requires_grad_()
    optimizer = torch.optim.Adam([w, b], lr)
    for _ in range(iterations):
        loss = (
            F.cross_entropy(
                rearrange(torch.baddbmm(b, x, w), "t n k -> (t n) k"), y.flatten(), reduction="sum"
            )
            / n
        )
        loo.optimizer_step(optimizer, loss)
    return w.detach(), b.detach()


def sample_shots(y, k, shots, trials, seed):
    """Rows of `shots` samples of each of k classes, drawn anew for each trial -> (t n), n = k shots. UserError if a class has fewer."""
    counts = torch.bincount(y, minlength=k)
    if counts.min() < shots:
        raise UserError(f"--shots={shots}: a class has only {int(counts.min())} training pictures")
    g = loo.generator("shots", seed, shots)
    rows = [(y == c).nonzero().squeeze(1) for c in range(k)]
    return torch.stack(
        [
            torch.cat([r[torch.randperm(len(r), generator=g)[:shots]] for r in rows])
            for _ in range(trials)
        ]
    )


def knn_predict(x, y, k, test, neighbours=20, tau=0.07):
    """Weighted kNN on cosine similarity: x (n d), y (n,), test (m d) -> votes (m k), each neighbour's weight exp(similarity / tau)."""
    x, votes = F.normalize(x, dim=1), []
    for some in F.normalize(test, dim=1).split(1024):
        similar, rows = (some @ x.T).topk(min(neighbours, len(x)), dim=1)
        votes.append(
            x.new_zeros(len(some), k).scatter_add_(1, y[rows], ((similar - 1) / tau).exp())
        )
    return torch.cat(votes)


def accuracy(logits, y, top=1):
    """logits (n k), y (n,) -> percent whose class is among the `top` largest."""
    return correct(logits, y, top).mean().item() * 100


def correct(logits, y, top=1):
    """logits (n k), y (n,) -> (n,) 1 where the class is among the `top` largest, else 0."""
    return (logits.topk(min(top, logits.shape[1]), dim=1).indices == y[:, None]).any(1).double()


def standardise(train, *others):
    """All by the training samples' mean and deviation, (n d) each."""
    mean, deviation = moments(train)
    return [(x - mean) / deviation for x in (train, *others)]


def moments(x):
    """x (n d) -> mean (d,), deviation (d,), never zero."""
    return x.mean(0), x.std(0).clamp(min=1e-6)


def ci95(values):
    """Half of the 95% interval of the mean of many values, (n,)."""
    return 1.96 * values.std().item() / math.sqrt(len(values))


def t_ci95(values, of=1):
    """Half of Student's 95% interval of the mean of a list, infinite for one value. of: as one of so many intervals, all of which hold with
    95% (Bonferroni)."""
    n = len(values)
    return (
        t_quantile(n - 1, 0.025 / of)
        * torch.tensor(values, dtype=torch.float64).std().item()
        / math.sqrt(n)
        if n > 1
        else math.inf
    )


@functools.cache
def t_quantile(freedom, tail=0.025):
    """The t beyond which Student's distribution has this much left."""
    at = torch.linspace(0, math.pi / 2, 2_000_001, dtype=torch.float64)[:-1].tan()
    half = torch.cumulative_trapezoid(
        torch.distributions.StudentT(torch.tensor(freedom, dtype=torch.float64)).log_prob(at).exp(),
        at,
    )
    return at[int((half < 0.5 - tail).sum())].item()


# ---------------------------------------------------------------- tasks


class EvalContext(NamedTuple):
    """What a task works on: a run's encoder and a data set."""

    run: Path
    encoder: loo.Encoder
    config: dict
    data: str
    split: (
        dict  # {"train", "test", and "val" where there is one: Data of central crops}, not decoded
    )
    feature: str
    seed: int
    workers: int
    root: str  # where the data is, or None
    weights: str  # a hash of the run's
    find: functools.partial  # data.find of this data set
    leader_first: object = contextlib.nullcontext  # a context that rank 0 enters first


def open_run(
    run: str = "runs/latest",
    *,
    data: str = None,
    root: str = None,
    feature: str = "v",
    download: bool = False,
    workers: int = 2,
    device: str = "auto",
    seed: int = 0,
):
    """
    run: folder of a finished run; runs/latest is the last one
    data: factors, folder, one of the paper's sets (python data.py check) or of torchvision's; by default what the run was trained on
    root: where that data is
    feature: v (the backbone's), z (all spaces) or the name of one space
    download: let torchvision fetch the data
    workers: processes that decode pictures
    device: auto, cpu or cuda
    seed: of held-out parts, shots and orders
    json: print the JSON lines and nothing else
    """
    if not Path(run).exists():
        others = sorted(
            str(p.parent) for p in Path("runs").glob("*/config.json") if not p.parent.is_symlink()
        )
        raise UserError(
            f"--run={run}: no such run; train one with `python loo.py train`"
            + f"; there are {', '.join(others)}" * bool(others)
        )
    if workers < 0:
        raise UserError(f"--workers={workers}: expected 0 or more")
    device = pixels.resolve_device(device)
    encoder, config = loo.load_encoder(run, device)
    check_choice("feature", feature, feature_names(config))
    name = check_choice("data", data or config["data"], pixels.NAMES)
    root = str(Path(root).resolve()) if root else config["root"] if name == config["data"] else None
    splits = pixels.dataset_splits(name, root)
    if "train" not in splits:
        raise UserError(
            f"--data={name} has nothing to train a classifier on; it is what `python eval.py robust --data=imagenet100` tests on"
        )
    find = functools.partial(
        pixels.open_dataset,
        name,
        root=root,
        size=config["size"],
        canvas=config["canvas"],
        download=download,
        seed=config["seed"],
    )
    split = {s: find(s, central=True) for s in splits}
    split["test"] = split.pop("test", None) or split.pop(splits[-1])
    weights = hashlib.sha1(
        b"".join((Path(run) / f).read_bytes() for f in ("backbone.pt", "heads.pt"))
    ).hexdigest()
    return EvalContext(
        Path(run).resolve(),
        encoder,
        config,
        name,
        split,
        feature,
        seed,
        workers,
        root,
        weights,
        find,
    )


def cached_features(b, split, turns=(0,)):
    """The split's v ((r n) d), z (s (r n) c) and labels {name: ((r n),)} of the pictures that could be read; also "rotation", the turns,
    and "picture", which of the split it is. Computed once for a run, data set, split and turns."""
    found = b.split[split]
    name = hashlib.sha1(
        repr(((b.data, b.root, b.weights), split, turns, pixels.fingerprint(found))).encode()
    ).hexdigest()[:16]
    path = b.run / "features" / f"{b.data}-{split}-{name}.pt"
    try:
        kept = pixels.read_tensors(path)
    except UserError:  # not there, or not whole
        kept = None
    if loo.all_reduce_max(kept is None):
        kept = features(b.encoder, found, turns, b.workers)
        if loo.rank() == 0:
            pixels.write_tensors(path, kept)
    v, z, rows = kept
    own = {
        "rotation": torch.tensor(turns).repeat_interleave(len(rows)),
        "picture": rows.repeat(len(turns)),
    }
    return v, z, {k: y[rows].repeat(len(turns)) for k, y in found.labels.items()} | own


def load_features(b, split, turns=(0,)):
    """The chosen feature of a split, (n d), and its labels, on the encoder's device."""
    v, z, y = cached_features(b, split, turns)
    device = device_of(b.encoder)
    return select_feature(v, z, b.config, b.feature).to(device), {
        k: labels.to(device) for k, labels in y.items()
    }


def class_names(b, label):
    """The classes of a label; UserError where there is nothing to tell apart."""
    names = ["0", "90", "180", "270"] if label == "rotation" else b.split["train"].classes[label]
    if len(names) < 2:
        raise UserError(
            f"--label={label}: the pictures of {b.data} are all of one class, there is nothing to tell apart"
        )
    return names


def task(function):
    """A task as a command: its own flags and those of `bench`; prints and keeps each result that it yields."""
    own, common = (list(inspect.signature(f).parameters.values()) for f in (function, open_run))
    names = {p.name for p in common}

    @functools.wraps(function)
    def command(*args, json=False, **flags):
        begun = time.perf_counter()
        with loo.init_distributed(
            pixels.resolve_device(flags.get("device", "auto"))
        ) as leader_first:
            b = open_run(*args, **{k: v for k, v in flags.items() if k in names})._replace(
                leader_first=leader_first
            )
            columns, said = (), []
            for found in function(b, **{k: v for k, v in flags.items() if k not in names}):
                if loo.rank():
                    continue
                keep = found.pop("keep", True)
                said += filter(None, [found.pop("say", None)])
                line = (
                    dict(
                        run=b.run.name,
                        task=function.__name__,
                        data=b.data,
                        root=b.root,
                        label=None,
                        on=None,
                        feature=b.feature,
                        method=b.config["method"],
                        groups=b.config["groups"],
                        protocol="fast",
                        shots=None,
                        top1=None,
                        top5=None,
                        ci95=None,
                        n_train=None,
                        n_test=None,
                        seed=b.seed,
                        seconds=round(time.perf_counter() - begun, 1),
                    )
                    | found
                )
                begun = time.perf_counter()
                if keep:
                    kept = b.run / "results.jsonl"
                    cut = kept.exists() and kept.read_bytes()[-1:] not in (b"", b"\n")
                    with open(kept, "a") as file:
                        file.write(
                            "\n" * cut + json_.dumps(line) + "\n"
                        )  # a line that a kill cut short stays alone
                if not columns:
                    columns = [
                        k
                        for k in PRINTED
                        if k not in ("on", "shots", "gain", "gain95", "n_train")
                        or line.get(k) is not None
                    ]
                    if not json:
                        print(
                            f"| {' | '.join(PRINTED[k] for k in columns)} |\n"
                            + "|---" * len(columns)
                            + "|"
                        )
                print(
                    json_.dumps(line)
                    if json
                    else "| " + " | ".join(format_value(line[k]) for k in columns) + " |",
                    flush=True,
                )
            if said and not json:
                print("\n" + "\n".join(said))

    json_flag = inspect.Parameter(
        "json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool
    )
    command.__signature__ = inspect.Signature(
        [
            common[0],
            *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own[1:]),
            *common[1:],
            json_flag,
        ]
    )
    command.__doc__ = f"{function.__doc__.rstrip()}\n{open_run.__doc__}"
    return command


# A result's keys and the heads of their columns.
PRINTED = dict(
    run="run",
    data="data",
    task="task",
    label="label",
    on="on",
    feature="feature",
    protocol="protocol",
    shots="shots",
    top1="top-1",
    top5="top-5",
    ci95="+- 95%",
    gain="over all alone",
    gain95="+- 95%",
    n_train="train",
    n_test="test",
    seconds="seconds",
)


def format_value(x):
    return "-" if x is None else f"{x:.1f}" if isinstance(x, float) else str(x)


def select_labels(b, label, more=(), least=1):
    """The labels that are named, or else all that tell pictures apart, and `more`. UserError where they are fewer than `least`."""
    classes = b.split["train"].classes
    found = [check_choice("label", one, (*classes, *more)) for one in label] or [
        *pixels.label_names(classes),
        *more,
    ]
    if len(found) < least:
        raise UserError(
            f"the pictures of {b.root or b.data} have no labels, which a sub-folder for each class would give them; without labels there are "
            "the tasks rotation, spaces and retrieve --turn"
        )
    return found


def result(logits, y, label, n_train, turns=1, **more):
    """logits ((r n) k), y ((r n),) -> a result with the interval of the mean over pictures, each with all its turns."""
    right = correct(logits, y).view(turns, -1).mean(0) * 100
    return dict(
        label=label,
        top1=right.mean().item(),
        top5=accuracy(logits, y, 5) if logits.shape[1] > 5 else None,
        n_train=n_train,
        n_test=len(y),
        ci95=ci95(right),
        **more,
    )


def probe(b, labels, turns, protocol, epochs, lr):
    """A linear classifier for each label, by either protocol -> results."""
    check_choice("protocol", protocol, ("fast", "paper"))
    if protocol == "fast" and (epochs, lr) != (None, None):
        raise UserError("--epochs and --lr are of the paper's protocol: add --protocol=paper")
    epochs, lr = (
        (100 if b.data == "inat2019" else 200) if epochs is None else epochs,
        30.0 if lr is None else lr,
    )
    if epochs < 1 or lr <= 0:
        raise UserError(f"--epochs={epochs} --lr={lr}: expected 1 or more, and more than 0")
    test, y_test = load_features(b, "test", turns)
    if protocol == "fast":
        train, y = load_features(b, "train", turns)
        train, test = standardise(train, test)
    else:
        with b.leader_first():
            train = pixels.decode_all(
                b.find("train"), b.workers, b.run.parent, shared=loo.world_size() > 1
            )  # where training left them, if it did
    for label in labels:
        k = len(class_names(b, label))
        head = (
            lbfgs_probe(train, y[label], k, b.seed, len(turns))
            if protocol == "fast"
            else sgd_probe(b, train, label, k, test.shape[1], epochs, lr)
        )
        yield result(
            F.linear(test, *head),
            y_test[label],
            label,
            len(train if protocol == "fast" else train.images),
            len(turns),
            protocol=protocol,
        )


@task
def linear(b, label: tuple = (), protocol: str = "fast", epochs: int = None, lr: float = None):
    """A linear classifier on frozen features (section 4); every label of the data set if none is named.

    Args:
        label: labels with commas between
        protocol: fast (L-BFGS on cached features, L2 chosen on a held-out fifth) or paper (SGD on augmented pictures)
        epochs: of the paper's protocol: 200, or 100 on inat2019
        lr: of the paper's protocol: 30
    """
    yield from probe(b, select_labels(b, label), (0,), protocol, epochs, lr)


@task
def rotation(b, protocol: str = "fast", epochs: int = None, lr: float = None):
    """Which of four quarter turns a picture was given (section 4): every picture is shown in all four.

    Args:
        protocol: fast or paper, as in linear
        epochs: of the paper's protocol
        lr: of the paper's protocol
    """
    yield from probe(b, ["rotation"], (0, 1, 2, 3), protocol, epochs, lr)


@task
def knn(b, label: tuple = (), neighbours: int = 20):
    """Weighted nearest neighbours by cosine similarity.

    Args:
        label: labels with commas between; every label if none is named
        neighbours: how many vote
    """
    if neighbours < 1:
        raise UserError(f"--neighbours={neighbours}: expected 1 or more")
    (x, y), (test, y_test) = load_features(b, "train"), load_features(b, "test")
    for name in select_labels(b, label):
        yield result(
            knn_predict(x, y[name], len(class_names(b, name)), test, neighbours),
            y_test[name],
            name,
            len(x),
            protocol="knn",
        ) | {"top5": None}  # fewer may have a vote


@task
def fewshot(b, label: tuple = (), shots: tuple = (5, 10), trials: int = 10):
    """A linear classifier of all classes from a few pictures of each, drawn from train + val (section 4); mean and 95% interval over trials.
    Features are standardised by all of train + val, without their labels.

    Args:
        label: labels with commas between; every label if none is named
        shots: pictures of each class
        trials: independent draws
    """
    if not shots or not all(n.isdecimal() and int(n) for n in map(str, shots)) or trials < 2:
        raise UserError(
            f"--shots={','.join(map(str, shots))} --trials={trials}: expected numbers of pictures, as 5,10, and two trials or more"
        )
    pool = [load_features(b, s) for s in ("train", "val") if s in b.split]
    test, y_test = load_features(b, "test")
    x, test = standardise(
        torch.cat([x for x, _ in pool]), test
    )  # by all of the pool, labels unseen
    y = {name: torch.cat([labels[name] for _, labels in pool]) for name in select_labels(b, label)}
    classes = {name: len(class_names(b, name)) for name in y}
    drawn = {
        (name, n): sample_shots(y[name], classes[name], n, trials, b.seed)
        for name in y
        for n in map(int, shots)
    }  # too few pictures: before any result
    for (name, n), rows in drawn.items():
        k = classes[name]
        w, bias = fit_few_shot(x[rows], y[name][rows], k)
        logits = [test @ one + c for one, c in zip(w, bias)]
        top1, top5 = ([accuracy(one, y_test[name], top) for one in logits] for top in (1, 5))
        yield dict(
            label=name,
            shots=n,
            top1=sum(top1) / trials,
            top5=sum(top5) / trials if k > 5 else None,
            ci95=t_ci95(top1),
            n_train=n * k,
            n_test=len(test),
            protocol="adam",
        )


def restrict_classes(logits, classes):
    """logits (n k) with only these classes to choose from."""
    return torch.full_like(logits, -math.inf).index_copy(1, classes, logits[:, classes])


CELLS = list(itertools.product(pixels.CORRUPTIONS, range(1, 6)))
SUMMARIES = {  # name: which cells it is the mean of
    **{name: [n == name for n, _ in CELLS] for name in pixels.CORRUPTIONS},
    **{
        name + more: [n in members and severity >= least for n, severity in CELLS]
        for name, members in (
            *pixels.IMAGENETC.items(),
            ("all corruptions", tuple(pixels.CORRUPTIONS)),
        )
        for more, least in (("", 1), (", severity 3+", 3))
    },
}


def corrupted_pictures(b, published, count=None):
    """Yields the index of a cell of CELLS, rows (b,), images (b 3 h w) in [0, 1] and labels {name: (b,)}.

    published: a Data for each cell; where there are none, the (first `count`) test pictures are corrupted here, a batch at a time.
    """
    for cell, found in enumerate(published):
        for rows, crops in on_device(b.encoder, found, b.workers, count=count):
            yield cell, rows, crops, {k: y[rows] for k, y in found.labels.items()}
    if not published:
        for rows, crops in on_device(b.encoder, b.split["test"], b.workers, count=count):
            labels = {k: y[rows] for k, y in b.split["test"].labels.items()}
            for cell, (name, severity) in enumerate(CELLS):
                yield (
                    cell,
                    rows,
                    pixels.corrupt(
                        crops,
                        name,
                        severity,
                        loo.generator("corrupt", name, severity, int(rows[0])),
                    ),
                    labels,
                )


@task
def robust(
    b,
    label: tuple = (),
    source: str = None,
    corrupted: str = None,
    objectnet: str = None,
    pictures: int = None,
):
    """A linear classifier trained on clean pictures, tested on corrupted ones (ImageNet-C) and on new viewpoints and backgrounds:
    ObjectNet's (section 4), or those of factors.

    The interval is that of the mean over pictures, each with all its corruptions.

    Args:
        label: labels with commas between; every label if none is named
        source: generated (the 15 corruptions made here from the test pictures) or folder (the published ImageNet-C); folder on imagenet100
        corrupted: source=folder: where ImageNet-C is
        objectnet: where ObjectNet is, to test on its 13 classes too
        pictures: how many to see corrupted, by default all
    """
    if pictures is not None and pictures < 1:
        raise UserError(f"--pictures={pictures}: expected 1 or more")
    source = check_choice(
        "source",
        source or ("folder" if b.data == "imagenet100" else "generated"),
        ("folder", "generated"),
    )
    if (source == "folder") != bool(corrupted):
        raise UserError(
            "--source=folder reads the published ImageNet-C: name it with --corrupted=DIR, or make the corruptions here with --source=generated"
        )
    if (corrupted or objectnet) and b.data != "imagenet100":
        raise UserError(
            f"ImageNet-C and ObjectNet have the classes of imagenet100, not of {b.data}: use --data=imagenet100, or --source=generated"
        )
    where = dict(
        size=b.config["size"], central=True
    )  # all is found before hours are spent on the first of it
    published = (
        [
            pixels.open_dataset("imagenetc100", f"{name}/{severity}", root=corrupted, **where)
            for name, severity in CELLS
        ]
        if corrupted
        else []
    )
    beyond = (
        {"objectnet13": pixels.open_dataset("objectnet13", "test", root=objectnet, **where)}
        if objectnet
        else {"new viewpoint": b.find("viewpoint", central=True)}
        if b.data == "factors"
        else {}
    )
    labels, (train, y), (test, y_test) = (
        select_labels(b, label),
        load_features(b, "train"),
        load_features(b, "test"),
    )
    n = len((published[0] if published else b.split["test"]).images)
    mean, deviation = moments(train)
    head = {
        one: lbfgs_probe((train - mean) / deviation, y[one], len(class_names(b, one)), b.seed)
        for one in labels
    }
    logits_of = lambda one, x: F.linear((x - mean) / deviation, *head[one])
    right, there = (
        {one: torch.zeros(len(CELLS), n, 2) for one in labels},
        torch.zeros(n),
    )  # top-1 and top-5; a picture is there in all cells or in none
    for one in labels:
        say = (
            f"the lengths in the corruptions' constants are scaled by {b.config['size']} / {pixels.REFERENCE_SIZE}"
            if not published and one == labels[-1]
            else None
        )
        yield result(
            logits_of(one, test), y_test[one], one, len(train), on="clean", protocol=source, say=say
        )
    for on, found in beyond.items():
        v, z, rows = features(b.encoder, found, workers=b.workers)
        for one in labels:
            logits, truth = (
                logits_of(one, select_feature(v, z, b.config, b.feature).to(train)).cpu(),
                found.labels[one][rows],
            )
            yield result(logits, truth, one, len(train), on=on, protocol=source)
            if objectnet:
                yield result(
                    restrict_classes(logits, truth.unique()),
                    truth,
                    one,
                    len(train),
                    on=f"{on}, of its 13",
                    protocol=source,
                )
    for cell, rows, crops, truth in corrupted_pictures(b, published, pictures):
        with torch.no_grad():
            x = select_feature(*loo.encode(b.encoder, crops), b.config, b.feature).float()
        there[rows] = 1
        for one in labels:
            logits = logits_of(one, x).cpu()
            right[one][cell, rows] = torch.stack(
                [correct(logits, truth[one]), correct(logits, truth[one], 5)], 1
            ).float()
    there = loo.all_reduce_sum(there) > 0
    for one in labels:
        of_cells = loo.all_reduce_sum(right[one])[:, there].double() * 100
        for on, cells in SUMMARIES.items():
            each = of_cells[cells].mean(0)  # (n 2)
            top1, top5 = each.mean(0).tolist()
            yield dict(
                label=one,
                on=on,
                protocol=source,
                top1=top1,
                top5=top5 if len(class_names(b, one)) > 5 else None,
                ci95=ci95(each[:, 0]),
                n_train=len(train),
                n_test=len(each),
            )


@task
def spaces(b, label: tuple = (), layer: str = "output", margin: float = 1.0):
    """Which invariances a task wants (the paper's table on concatenating spaces): a linear classifier on Z_0, the space named all, with any of
    the other spaces beside it and on each space alone, every one against Z_0 alone, on the same pictures.

    The verdicts, a line for each label under the table, compare spaces of one size: what a group's space, invariant to all but that group, knows more than Z_0,
    invariant to that group too. It "wants" a group if the whole paired 95% interval is above zero, is "better without" it if below. If the
    interval spans zero it "does not care" where all of it is within the margin, else one "cannot tell". Intervals are over test pictures, of one run.

    Args:
        label: labels with commas between, rotation is one; every label and rotation if none is named
        layer: of LooC's heads: hidden or output (LooC++ has its Conv5)
        margin: points of accuracy that do not matter
    """
    check_choice("layer", layer, ("hidden", "output"))
    if b.feature != "v":
        raise UserError(f"--feature={b.feature}: spaces compares all of them")
    all_, *groups = loo.get_method(b.config).spaces or ("none",)
    if all_ != "all" or not groups:
        raise UserError(
            f"{b.run.name} was trained with {b.config['method']}, which has no space for each augmentation: use a looc or looc++ run"
        )
    if b.config["method"] == "looc" and layer == "hidden" and not b.config["hidden"]:
        raise UserError(
            f"--layer=hidden: the heads of {b.run.name} are linear (--hidden=0); only their output is there"
        )
    for one in select_labels(b, label, ("rotation",)):
        turns = (0, 1, 2, 3) if one == "rotation" else (0,)
        (v, z, y), (v_test, z_test, y_test) = (
            cached_features(b, "train", turns),
            cached_features(b, "test", turns),
        )
        train, test = (
            space_features(b.encoder, v, z, b.config, layer),
            space_features(b.encoder, v_test, z_test, b.config, layer),
        )
        subsets = [
            ("all", *some)
            for r in range(len(groups) + 1)
            for some in itertools.combinations(groups, r)
        ] + [(g,) for g in groups]
        right, gain = {}, {}
        for some in subsets:
            x, x_test = standardise(
                *(
                    torch.cat([part[name] for name in some], 1).to(device_of(b.encoder))
                    for part in (train, test)
                )
            )
            logits = F.linear(
                x_test,
                *lbfgs_probe(x, y[one].to(x.device), len(class_names(b, one)), b.seed, len(turns)),
            ).cpu()
            right[some] = correct(logits, y_test[one]).view(len(turns), -1).mean(0)
            gain[some] = paired_ci95(right[some], right["all",])
            line = result(
                logits,
                y_test[one],
                one,
                len(x),
                len(turns),
                feature="+".join(some),
                on=None if b.config["method"] == "looc++" else layer,
                gain=gain[some][0],
                gain95=gain[some][1],
            )
            say = (
                f"{one} " + ", ".join(verdict(g, *gain[g,], margin) for g in groups)
                if some == subsets[-1]
                else None
            )
            yield line | dict(say=say)


def paired_ci95(right, other):
    """(n,) each, how often a picture was classified right -> difference in points and half of its 95% interval, picture by picture."""
    difference = (right - other) * 100
    return difference.mean().item(), ci95(difference)


def verdict(group, gain, half, margin):
    says = (
        "wants"
        if gain > half
        else "is better without"
        if gain < -half
        else "does not care about"
        if abs(gain) + half < margin
        else "cannot tell about"
    )
    return f"{says} {group} ({gain:+.1f} +- {half:.1f})"


@task
def retrieve(
    b,
    against: str = None,
    label: tuple = (),
    queries: int = 8,
    neighbours: int = 5,
    turn: bool = False,
    out: str = None,
):
    """Nearest neighbours among the test pictures, by cosine similarity, as one picture: RUN/retrieve.png (section 4).

    top-1 is the share of neighbours that have the query's label, over all test pictures.

    Args:
        against: another run, shown beside this one; its numbers are printed, not kept
        label: labels to count; every label if none is named
        queries: rows of the picture
        neighbours: of each query
        turn: give every picture a random quarter turn first, and count rotation too: does a neighbour stand as the query does?
        out: where to write the picture
    """
    if min(queries, neighbours) < 1:
        raise UserError(f"--queries={queries} --neighbours={neighbours}: expected 1 or more")
    if neighbours >= len(b.split["test"].images):
        raise UserError(
            f"--neighbours={neighbours}: there are {len(b.split['test'].images)} test pictures"
        )
    labels, path = (
        [*select_labels(b, label, least=0), *["rotation"] * turn],
        Path(out or b.run / "retrieve.png"),
    )
    if path.is_dir():
        raise UserError(f"--out={out} is a folder; name a .png file")
    both = [b]
    if against:
        other = open_run(
            against,
            data=b.data,
            root=b.root,
            feature=b.feature,
            workers=b.workers,
            device=str(device_of(b.encoder)),
            seed=b.seed,
        )
        if other.config["size"] != b.config["size"]:
            raise UserError(
                f"--against={against} sees pictures of {other.config['size']} pixels, {b.run.name} of {b.config['size']}: name runs of one --size"
            )
        both.append(
            other._replace(split=b.split)
        )  # a folder that splits itself does so by each run's seed
    near, y = zip(*(neighbours_of(one, neighbours, turn) for one in both))
    rows = torch.randperm(len(near[0]), generator=loo.generator("queries", b.seed))[:queries]
    shown = torch.cat(
        [rows[:, None], *(one[rows] for one in near)], 1
    )  # (queries 1 + runs * neighbours)
    pictures = torch.stack(
        [
            torch.stack([display_image(b, y[0]["picture"][i], y[0]["rotation"][i]) for i in row])
            for row in shown
        ]
    )
    titles = [
        ", ".join(str(class_names(b, name)[y[0][name][i]]) for name in labels[:2]) for i in rows
    ]
    heads = [
        "query",
        *(
            head
            for one in both
            for head in (f"nearest in {one.run.name}", *[""] * (neighbours - 1))
        ),
    ]
    if loo.rank() == 0:
        pixels.image_grid(pictures, titles, heads, path, zoom=max(1, 64 // b.config["size"]))
    for one, found, known_labels in zip(both, near, y):
        for name in labels:
            same = (known_labels[name][found] == known_labels[name][:, None]).double().mean(
                1
            ) * 100  # (m,)
            yield dict(
                run=one.run.name,
                method=one.config["method"],
                groups=one.config["groups"],
                label=name,
                on="turned" if turn else None,
                protocol="cosine",
                top1=same.mean().item(),
                ci95=ci95(same),
                n_test=len(same),
                keep=one is b,
            )  # the other may have been trained on some of these
    if loo.rank() == 0:
        print(f"wrote {path}", file=sys.stderr)


def neighbours_of(b, k, turn):
    """Every test picture, in a quarter turn of its own if `turn`, and its k nearest by cosine similarity -> near (m k), labels {name: (m,)}."""
    v, z, y = cached_features(b, "test", (0, 1, 2, 3) if turn else (0,))
    m = len(v) // (4 if turn else 1)
    chosen = torch.randint(
        4 if turn else 1, (m,), generator=loo.generator("turns", b.seed)
    ) * m + torch.arange(m)
    x = F.normalize(select_feature(v, z, b.config, b.feature)[chosen], dim=1)
    near = [
        (some @ x.T).scatter(1, rows[:, None], -2).topk(k).indices
        for some, rows in zip(x.split(1024), torch.arange(m).split(1024))
    ]
    return torch.cat(near), {name: labels[chosen] for name, labels in y.items()}


def display_image(b, i, turns):
    """Test picture i as the encoder sees it, (3 h w) uint8."""
    images = b.split["test"].images
    return (images[i] if torch.is_tensor(images) else images[i][0]).rot90(int(turns), (1, 2))


NAMED = {
    "seed",
    "out",
    "device",
    "precision",
    "workers",
    "download",
    "method",
    "groups",
    "label",
    "cache",
    "compile",
    "save_every",
    "textures",
}  # not told apart by `table`, or named by it otherwise
ALWAYS = inspect.signature(loo.train).parameters["always"].default


def table(runs: tuple = ("runs/*",), paper: bool = False):
    """One Markdown table from the results of many runs: a row for each method, a column for each task and label.

    Runs that differ in nothing but seed share a row: mean +- half of the 95% interval over runs. What else differs is named.

    Args:
        runs: run folders or patterns, with commas between
        paper: the paper's tables instead, what it reports beside what these runs give
    """
    found = {
        Path(p).resolve() for pattern in runs for p in glob.glob(f"{pattern}/results.jsonl")
    }  # runs/latest once
    if not found:
        raise UserError(
            f"--runs={','.join(runs)}: no results there; `python eval.py linear --run=DIR` writes some"
        )
    configs = {p: json_.loads((p.parent / "config.json").read_text()) for p in found}
    lines = [
        (configs[p], line)
        for p in sorted(found, key=lambda p: p.stat().st_mtime)
        for line in loo.read_jsonl(p)
    ]

    def value(c, k):
        if k == "root" and c["data"] != "folder":  # a published set is the same wherever it is
            return None
        if (
            k == "always"
        ):  # a named group leaves this list: only what is beside that tells runs apart
            changed = sorted({*c["always"], *c["groups"]} ^ {*ALWAYS, *c["groups"]})
            return "default" + "".join(
                f" {'+' if name in c['always'] else '-'}{name}" for name in changed
            )
        return c.get(k)

    unlike = lambda configs: [
        k
        for k in sorted({k for c in configs for k in c} - NAMED)
        if len({repr(value(c, k)) for c in configs}) > 1
    ]
    if paper:
        lines = [(config, line) for config, line in lines if config["data"] == "imagenet100"]
        if differs := unlike([config for config, _ in lines]):
            raise UserError(
                f"--paper: these runs differ in {', '.join(differs)}: name those that belong together with --runs"
            )
        return papers_tables([line | {"seed": config["seed"]} for config, line in lines])
    cells, differs = defaultdict(dict), unlike(list(configs.values()))
    for config, line in lines:
        setting = ", ".join(f"{k} {value(config, k)}" for k in differs)
        method = (
            f"{line['method']} ({config['label']})"
            if line["method"] == "supervised"
            else line["method"]
        )
        row = (method, ", ".join(line["groups"]), line["feature"], setting)
        elsewhere = line["data"] == "folder" and line.get("root", config["root"]) not in (
            None,
            config["root"],
        )
        column = (
            line["data"] + f" {line.get('root')}" * elsewhere,
            line["task"],
            line["label"],
            line["shots"] or 0,
            line.get("on") or "",
            line["protocol"],
        )
        cells[row, column][config["seed"]] = line["top1"]  # the last one counts
    rows, columns = sorted({r for r, _ in cells}), sorted({c for _, c in cells})
    several = len({c[0] for c in columns}) > 1
    head = [column_name(*column) + f" on {column[0]}" * several for column in columns]
    print(
        "| method | groups | feature | differs in | seeds | "
        + " | ".join(head)
        + " |\n"
        + "|---" * (5 + len(head))
        + "|"
    )
    for row in rows:
        values = [list(cells[row, c].values()) for c in columns]
        print(
            f"| {' | '.join(row)} | {seeds_in(values)} | "
            + " | ".join(map(mean_cell, values))
            + " |"
        )


def column_name(data, task, label, shots, on, protocol):
    return "".join(
        [
            task if task == label else f"{task} {label}",
            f", {shots} shots" if shots else "",
            f" {on}" if on else "",
            f" ({protocol})" if protocol in ("paper", "folder") else "",
        ]
    )


# Where the paper's columns are found in results.jsonl: task, data, label, shots, on, value.
COLUMNS = {
    "rotation": ("rotation", "imagenet100", "rotation", None, None, "top1"),
    **{
        f"{short} top-{n}": ("linear", data, "class", None, None, f"top{n}")
        for short, data in (
            ("IN-100", "imagenet100"),
            ("iNat-1k", "inat2019"),
            ("CUB-200", "cub200"),
        )
        for n in (1, 5)
    },
    **{f"Flowers {n}-shot": ("fewshot", "flowers102", "class", n, None, "top1") for n in (5, 10)},
    **{
        f"ON-13 top-{n}": ("robust", "imagenet100", "class", None, "objectnet13", f"top{n}")
        for n in (1, 5)
    },
    **{
        f"IN-C {c}{more}": (
            "robust",
            "imagenet100",
            "class",
            None,
            c.replace("all", "all corruptions") + more,
            "top1",
        )
        for c in (*pixels.IMAGENETC, "all")
        for more in ("", ", severity 3+")
    },
}
ALL3 = ("color", "rotation", "texture")

# Tables 1 to 5 of the paper: title, columns, {row: (method, groups, feature, reported figures)}. The figures are the paper's.
TABLES = (
    (
        "Table 1: rotation",
        ("rotation", "IN-100 top-1"),
        {
            "MoCo": ("moco", ("color",), "v", 61.1, 81.0),
            "MoCo + rotation": ("moco", ("color", "rotation"), "v", 43.3, 79.4),
            "MoCo + rotation, same for q and k": (
                "moco_same",
                ("color", "rotation"),
                "v",
                45.5,
                77.5,
            ),
            "LooC + rotation": ("looc", ("rotation",), "v", 65.2, 80.2),
        },
    ),
    (
        "Table 2: transfer",
        ("iNat-1k top-1", "CUB-200 top-1", "Flowers 5-shot", "Flowers 10-shot", "IN-100 top-1"),
        {
            "MoCo (color)": ("moco", ("color",), "v", 36.2, 36.7, 67.9, 77.3, 81.0),
            "LooC (color)": ("looc", ("color",), "v", 41.2, 40.1, 68.2, 77.6, 81.1),
            "LooC (rotation)": ("looc", ("rotation",), "v", 40.0, 38.8, 70.1, 79.3, 80.2),
            "LooC (color, rotation)": (
                "looc",
                ("color", "rotation"),
                "v",
                44.0,
                39.6,
                70.9,
                80.8,
                79.2,
            ),
            "LooC++ (color, rotation)": (
                "looc++",
                ("color", "rotation"),
                "v",
                46.1,
                39.3,
                68.1,
                78.8,
                81.2,
            ),
        },
    ),
    (
        "Table 3: robustness",
        ("ON-13 top-1", "ON-13 top-5", *(c for c in COLUMNS if c.startswith("IN-C"))),
        {
            "supervised": ("supervised", None, "v"),
            "MoCo": ("moco", ("color",), "v"),
            "LooC (rotation)": ("looc", ("rotation",), "v"),
            "LooC (texture)": ("looc", ("texture",), "v"),
            "LooC (rotation, texture)": ("looc", ("rotation", "texture"), "v"),
            "LooC++ (rotation, texture)": ("looc++", ("rotation", "texture"), "v"),
        },
    ),
    (
        "Table 4: all augmentations",
        ("IN-100 top-1", "iNat-1k top-1", "Flowers 5-shot", "Flowers 10-shot"),
        {
            "MoCo (color)": ("moco", ("color",), "v"),
            "MoCo (color, rotation)": ("moco", ("color", "rotation"), "v"),
            "MoCo (all)": ("moco", ALL3, "v"),
            "MoCo++ (color, rotation)": ("moco++", ("color", "rotation"), "v"),
            "LooC (color, rotation)": ("looc", ("color", "rotation"), "v"),
            "LooC++ (color, rotation)": ("looc++", ("color", "rotation"), "v"),
        },
    ),
    (
        "Table 5: spaces of LooC++",
        ("rotation", "IN-100 top-1", "iNat-1k top-1", "CUB-200 top-1"),
        {
            "+".join(some): ("looc++", ALL3, "+".join(some))
            for r in range(4)
            for some in (("all", *rest) for rest in itertools.combinations(ALL3, r))
        },
    ),
)


def by_protocol(lines, row, column):
    """Where the results hold a cell of TABLES, {protocol: {seed: value}}; the last of equal lines counts."""
    (method, groups, feature, *_), (task, data, label, shots, on, value) = row, column
    task, found = task if feature == "v" else "spaces", defaultdict(dict)
    for line in lines:
        if (
            (
                line["method"],
                line["task"],
                line["data"],
                line["label"],
                line["shots"],
                line.get("on"),
            )
            == (method, task, data, label, shots, on)
            and set(line["feature"].split("+")) == set(feature.split("+"))
            and (groups is None or set(groups) == set(line["groups"]))
        ):
            found[line["protocol"]][line["seed"]] = line[value]
    return found


def papers_tables(lines):
    """Prints TABLES: what the paper reports and what these runs give, each in its own column. lines: results, `seed` the training's."""

    def cell_of(row, column):
        found = by_protocol(lines, row, COLUMNS[column])
        protocol = next((p for p in ("paper", "folder", *found) if p in found), None)
        return (
            mean_cell(list(found[protocol].values()))
            + f" ({protocol})" * (protocol in ("fast", "generated") and row[2] == "v")
            if protocol
            else "-"
        )

    for title, columns, rows in TABLES:
        heads = " | ".join(f"{c}, reported by the paper | {c}, these runs" for c in columns)
        print(f"{title}\n\n| method | {heads} |\n" + "|---" * (1 + 2 * len(columns)) + "|")
        for name, row in rows.items():
            values = itertools.zip_longest(columns, row[3:])
            print(
                f"| {name} | "
                + " | ".join(
                    f"{'-' if told is None else told} | {cell_of(row, c)}" for c, told in values
                )
                + " |"
            )
        print()


def seeds_in(cells):
    """How many values the cells of a row have, those that have any: "5", or "4 to 5" where they differ."""
    counts = [len(values) for values in cells if values] or [0]
    return " to ".join(map(str, sorted({min(counts), max(counts)})))


def mean_cell(values):
    return (
        "-"
        if not values
        else f"{sum(values) / len(values):.1f}"
        + (f" +- {t_ci95(values):.1f}" if len(values) > 1 else "")
    )


# ---------------------------------------------------------------- claims: does it do what the paper says?

# The columns of TABLES on factors.
ON_FACTORS = {
    **{
        label: ("linear", "factors", label, None, None, "top1")
        for label in ("object", "hue", "texture", "species")
    },
    "rotation": ("rotation", "factors", "rotation", None, None, "top1"),
    **{f"species {n}-shot": ("fewshot", "factors", "species", n, None, "top1") for n in (5, 10)},
    **{
        f"object, {on}": ("robust", "factors", "object", None, on, "top1")
        for on in ("new viewpoint", *pixels.IMAGENETC, "all corruptions")
    },
}

# For each of TABLES: its columns on factors, and what the paper says of it, {claim: [(row, sign, other rows, columns), ...]}. The sign is > for
# more than, >= for at most MARGIN points less; where several rows or columns are named, with & between, it is said of each.
MARGIN = 1
CLAIMS = (
    (
        ("rotation", "object"),
        {
            "adding rotation to MoCo lowers rotation accuracy": [
                ("MoCo", ">", "MoCo + rotation", "rotation")
            ],
            "sharing the rotation between query and key does not bring it back": [
                ("MoCo", ">", "MoCo + rotation, same for q and k", "rotation")
            ],
            "LooC brings it back": [
                (
                    "LooC + rotation",
                    ">",
                    "MoCo + rotation & MoCo + rotation, same for q and k",
                    "rotation",
                ),
                ("LooC + rotation", ">=", "MoCo", "rotation"),
            ],
        },
    ),
    (
        ("hue", "species", "species 5-shot", "species 10-shot", "rotation", "texture", "object"),
        {
            "LooC (color) beats MoCo on what color changes, without losing object": [
                ("LooC (color)", ">", "MoCo (color)", "hue & species"),
                ("LooC (color)", ">=", "MoCo (color)", "object"),
            ],
            "LooC (color, rotation) beats MoCo on what color and rotation change, without losing object": [
                ("LooC (color, rotation)", ">", "MoCo (color)", "hue & species & rotation"),
                ("LooC (color, rotation)", ">=", "MoCo (color)", "object"),
            ],
            "LooC++, all spaces side by side, is best or tied on all labels at once": [
                (
                    "LooC++ (color, rotation)",
                    ">=",
                    "MoCo (color) & LooC (color) & LooC (rotation) & LooC (color, rotation)",
                    "hue & species & species 5-shot & species 10-shot & rotation & texture & object",
                )
            ],
        },
    ),
    (
        ("object", *(c for c in ON_FACTORS if c.startswith("object, "))),
        {
            "rotation helps under new viewpoints": [
                ("LooC (rotation)", ">", "MoCo", "object, new viewpoint")
            ],
            "texture helps under corruptions": [
                ("LooC (texture)", ">", "MoCo", "object, all corruptions")
            ],
            "both together help on both": [
                (
                    "LooC (rotation, texture)",
                    ">",
                    "MoCo",
                    "object, new viewpoint & object, all corruptions",
                )
            ],
        },
    ),
    (
        ("object", "hue", "species", "texture", "rotation"),
        {
            "LooC beats MoCo with the same groups, without losing object": [
                (
                    "LooC (color, rotation)",
                    ">",
                    "MoCo (color, rotation)",
                    "hue & species & rotation",
                ),
                ("LooC (color, rotation)", ">=", "MoCo (color, rotation)", "object"),
            ],
            "LooC (color, rotation) beats MoCo with all groups, without losing object": [
                ("LooC (color, rotation)", ">", "MoCo (all)", "hue & species & rotation"),
                ("LooC (color, rotation)", ">=", "MoCo (all)", "object"),
            ],
            "MoCo++, as wide as LooC++, does not close the gap": [
                (
                    "LooC++ (color, rotation)",
                    ">",
                    "MoCo++ (color, rotation)",
                    "hue & species & rotation",
                ),
                ("LooC++ (color, rotation)", ">=", "MoCo++ (color, rotation)", "object"),
            ],
        },
    ),
    (
        ("rotation", "object", "hue", "texture"),
        {
            **{
                f"of two spaces, {label} prefers {one} for the second": [
                    (f"all+{one}", ">", " & ".join(f"all+{g}" for g in ALL3 if g != one), label)
                ]
                for label, one in (
                    ("hue", "color"),
                    ("rotation", "rotation"),
                    ("texture", "texture"),
                )
            },
            "all spaces side by side are best or tied on all labels at once": [
                (
                    "all+color+rotation+texture",
                    ">=",
                    " & ".join(
                        name for name in TABLES[4][2] if name != "all+color+rotation+texture"
                    ),
                    "rotation & object & hue & texture",
                )
            ],
        },
    ),
)

BUDGETS = {"small": {}, "large": dict(arch="resnet18", size=64, epochs=100)}  # flags of `train`


def claims(
    budget: str = "small",
    *,
    seeds: int = 5,
    first: int = 21,
    jobs: int = None,
    out: str = "runs/claims",
    results: str = None,
):
    """Train and judge the rows of the paper's tables on factors, print the tables, and whether each claim of the paper holds.

    It runs the commands that it prints. What is there already is not done again, and a training that was stopped goes on where it was. A cell is the
    mean +- half of Student's 95% interval over seeds. A claim is decided by differences within a seed: it holds when the intervals of all its
    comparisons lie above zero (of "without losing" and "tied", above -1 point), it does not hold when one lies below, widened for how many
    they are (Bonferroni), else one cannot tell.

    Args:
        budget: small (the default recipe, minutes a run on a CPU) or large (ResNet-18, 64 pixels, 100 epochs, for a GPU)
        seeds: how many
        first: the first of them; no setting was ever chosen on 21 and above
        jobs: commands at a time; by default one for each core and 8 at most, or one on a GPU
        out: where the runs are, and the results of all of them in one file, OUT/BUDGET.jsonl
        results: print the tables of such a file, and train nothing
    """
    check_choice("budget", budget, tuple(BUDGETS))
    if seeds < 1 or (jobs is not None and jobs < 1):
        raise UserError(f"--seeds={seeds} --jobs={jobs}: expected 1 or more")
    if "WORLD_SIZE" in os.environ:
        raise UserError("claims starts processes of its own: call it with python, not torchrun")
    if results and not Path(results).is_file():
        raise UserError(f"--results={results}: no such file; leave the flag out to train")
    chosen = range(first, first + seeds)
    if results:
        there = loo.read_jsonl(Path(results))
        if not (
            lines := [
                line for line in there if line.get("budget") == budget and line["seed"] in chosen
            ]
        ):
            held = sorted({f"{line.get('budget')} {line['seed']}" for line in there})
            raise UserError(
                f"--results={results} has nothing of --budget={budget} and seeds {first} to {chosen[-1]}; it holds {', '.join(held) or 'no results'}"
            )
        return claimed_tables(lines)
    folder, cores = (
        Path(out) / budget,
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    )
    chains, jobs = (
        missing_commands(folder, chosen, BUDGETS[budget]),
        jobs or (1 if torch.cuda.is_available() else min(cores, 8)),
    )
    try:
        run_all(list(filter(None, chains)), jobs, max(1, cores // jobs))
    finally:  # the tables so far, whatever ended it
        runs = [
            run for run in sorted(folder.glob("*/")) if not run.suffix
        ]  # --fresh moves a run aside to NAME.1
        lines = [line | {"budget": budget} for run in runs for line in results_of(run)]
        pixels.write_atomic(
            Path(f"{out}/{budget}.jsonl"),
            "".join(json_.dumps(line) + "\n" for line in lines).encode(),
        )
        if lines := [line for line in lines if line["seed"] in chosen]:
            claimed_tables(lines)


def results_of(run):
    """The results in a run folder, `seed` the training's."""
    if not (run / "results.jsonl").exists():
        return []
    seed = json_.loads((run / "config.json").read_text())["seed"]
    return [line | {"seed": seed} for line in loo.read_jsonl(run / "results.jsonl")]


def missing_commands(out, seeds, flags):
    """What the rows of TABLES need on factors -> for each run a list of the commands that are not done yet, seed by seed. UserError where
    a run was trained with other settings."""
    wanted = defaultdict(
        lambda: defaultdict(list)
    )  # {(method, groups): {task: [(row, column), ...]}}
    for (_, _, rows), (columns, _) in zip(TABLES, CLAIMS):
        for row, column in itertools.product(rows.values(), columns):
            method, groups, feature, *_ = row
            wanted[method, groups or ("color",)][
                ON_FACTORS[column][0] if feature == "v" else "spaces"
            ].append((row, ON_FACTORS[column]))

    def work(kind):
        name, groups = kind
        method = loo.methods(groups)[name]
        return method.heads == "conv5", len(method.share)

    chains, longest = (
        [],
        sorted(wanted, key=work, reverse=True),
    )  # first, so that no core waits for it at the end
    for seed, (method, groups) in itertools.product(seeds, longest):
        run = out / f"{method}-{'+'.join(groups)}-{seed}"
        given = dict(
            method=method,
            groups=groups,
            seed=seed,
            out=str(run),
            **{"label": "object"} if method == "supervised" else {},
            **flags,
        )
        if (run / "config.json").exists():
            loo.check_same_config(
                loo.default_config(**given), json_.loads((run / "config.json").read_text()), run
            )
        chain = [] if (run / "heads.pt").exists() else [command_of("loo.py", "train", **given)]
        lines = results_of(run)
        for task, cells in wanted[method, groups].items():
            label = (
                {}
                if task == "rotation"
                else {"label": tuple(dict.fromkeys(label for _, (_, _, label, *_) in cells))}
            )
            if not all(seed in factors_cell(lines, *cell) for cell in cells):
                chain.append(
                    command_of(
                        "eval.py",
                        task,
                        run=run,
                        seed=seed,
                        **label,
                        **{"pictures": 1024} if task == "robust" else {},
                    )
                )
        chains.append(chain)
    return chains


def command_of(*words, **flags):
    """As it is typed after `python`, in a list."""
    return [
        *words,
        *(f"--{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in flags.items()),
    ]


def factors_cell(lines, row, column):
    """A cell of TABLES on factors, {seed: value}, by the protocol that its task has when none is named."""
    return by_protocol(lines, row, column)[
        {"fewshot": "adam", "robust": "generated"}.get(column[0], "fast")
    ]


def run_all(chains, jobs, threads):
    """Run lists of commands, each list in order, `jobs` commands at a time of `threads` threads each. UserError at the end where some failed;
    a signal stops all, and what trains saves itself."""
    chains, running, failed, started, begun = list(chains), {}, [], 0, time.perf_counter()
    total = sum(map(len, chains))
    with loo.catch_signals() as asked:
        try:
            while (chains or running) and not asked:
                while chains and len(running) < jobs:
                    command, *rest = chains.pop(0)
                    started += 1
                    print(
                        f"[{started}/{total}, {time.perf_counter() - begun:.0f} s] python {shlex.join(command)}",
                        flush=True,
                    )
                    said = tempfile.TemporaryFile("w+")
                    process = subprocess.Popen(
                        [sys.executable, Path(__file__).with_name(command[0]), *command[1:]],
                        stdout=said,
                        stderr=said,
                        env={"OMP_NUM_THREADS": str(threads)} | os.environ,
                        start_new_session=True,
                    )
                    running[process] = command, rest, said
                time.sleep(0.1)
                for process in [p for p in running if p.poll() is not None]:
                    command, rest, said = running.pop(process)
                    if process.returncode:  # its own chain ends, the others go on
                        said.seek(0)
                        text, total = said.read(), total - len(rest)
                        failed.append(
                            f"python {shlex.join(command)} ended with {process.returncode}: {(text.splitlines() or ['-'])[-1]}"
                        )
                        print(text, file=sys.stderr)
                    elif rest:
                        chains.insert(0, rest)
        finally:
            for process in running:  # a trainer saves its last step first
                process.terminate()
            for process in running:
                process.wait()
    if asked:
        print("stopped; all that was done is kept, and the same command goes on", file=sys.stderr)
        raise SystemExit(128 + asked[0])
    if failed:
        raise UserError(
            f"{len(failed)} of {total} commands failed; the same command goes on with what is left; the first: {failed[0]}"
        )


def claimed_tables(lines):
    """Prints TABLES on factors, and under each what becomes of the paper's claims. lines: results, `seed` the training's."""
    verdicts = []
    for (title, _, rows), (columns, said) in zip(TABLES, CLAIMS):
        cells = {
            (name, c): factors_cell(lines, row, ON_FACTORS[c])
            for (name, row), c in itertools.product(rows.items(), columns)
        }
        print(
            f"{title}, on factors\n\n| method | seeds | {' | '.join(columns)} |\n"
            + "|---" * (2 + len(columns))
            + "|"
        )
        for name in rows:
            values = [list(cells[name, c].values()) for c in columns]
            print(f"| {name} | {seeds_in(values)} | " + " | ".join(map(mean_cell, values)) + " |")
        print()
        for claim, comparisons in said.items():
            verdict, evidence = judge_claim(cells, comparisons)
            print(f"- {claim}: **{verdict}**. {evidence}")
            verdicts.append(verdict)
        print()
    print(
        f"{len(verdicts)} claims: "
        + ", ".join(f"{v} {verdicts.count(v)}" for v in ("holds", "does not hold", "cannot tell"))
    )


def judge_claim(cells, comparisons):
    """cells {(row, column): {seed: value}}, comparisons as in CLAIMS -> "holds", "does not hold" or "cannot tell", and the (three weakest of
    the) comparisons that decided it: differences within a seed, their mean and half of its 95% interval, and with how many seeds it is so."""
    found = defaultdict(list)
    pairs = [
        (row, other, column, -MARGIN * (sign == ">="))
        for row, sign, others, columns in comparisons
        for other, column in itertools.product(others.split(" & "), columns.split(" & "))
    ]
    for row, other, column, least in pairs:
        ours, theirs = cells[row, column], cells[other, column]
        gains = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        mean = sum(gains) / max(1, len(gains))
        half, wide = t_ci95(gains), t_ci95(gains, len(pairs))
        # All must be above, so each is asked at 95%; one below is enough, which among many happens by chance
        verdict = (
            "holds"
            if mean - half > least
            else "does not hold"
            if mean + wide < least
            else "cannot tell"
        )
        bound = mean + wide if verdict == "does not hold" else mean - half
        number = (
            f"{mean:+.1f} +- {half:.1f}" if len(gains) > 1 else f"{mean:+.1f}" if gains else "-"
        )
        above = f" above {least}" if least else ""
        found[verdict].append(
            (
                bound - least,
                f"{column} {number} ({sum(g > least for g in gains)} of {len(gains)} seeds{above}), {row} over {other}",
            )
        )
    verdict = next(v for v in ("does not hold", "cannot tell", "holds") if v in found)
    shown = [text for _, text in sorted(found[verdict])]
    return verdict, "; ".join(shown[:3]) + f"; and {len(shown) - 3} more" * (len(shown) > 3)


if __name__ == "__main__":
    pixels.command_line(
        {
            f.__name__: f
            for f in (linear, rotation, fewshot, knn, robust, spaces, retrieve, table, claims)
        }
    )
