"""What the features know: probes of a frozen encoder.

    python eval.py fewshot                               # of the last run, on the data it was trained on
    python eval.py linear --run=runs/NAME --label=hue
    python eval.py rotation | knn
    python eval.py table --runs='runs/*'                 # all results so far as one Markdown table

Each task prints a Markdown row for each result and appends a JSON line to RUN/results.jsonl.
Axes: b image, s space, d feature, n sample, t trial, k class, h w pixel.
"""
import functools
import glob
import hashlib
import inspect
import json as json_
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange

import data as pixels
import loo
from data import Data, UserError, choose

# ---------------------------------------------------------------- features


@torch.no_grad()
def features(encoder, images, aspect, size, share=.875, batch=512):
    """images (n 3 h w) uint8 canvases, aspect (n,) -> v (n d), z (s n c) on the CPU: the frozen encoder on central crops.

    share: of the picture's short side that the crop keeps; 1 for small pictures.
    """
    device = next(encoder.parameters()).device
    encoder.eval()
    out = []
    for some, shape in zip(images.split(batch), aspect.split(batch)):
        v, z = loo.encode(encoder, centre(some.to(device).float() / 255, shape.to(device), size, share))
        out.append((v.float().cpu(), z.float().cpu()))
    v, z = zip(*out)
    return torch.cat(v), torch.cat(z, 1)


def centre(images, aspect, size, share):
    """The central square, `share` of the short side -> (b 3 size size)."""
    side = share * aspect.clamp(max=1)
    return loo.resample(images, {"area": (side ** 2 / aspect)[:, None], "ratio": torch.ones_like(side)[:, None],
                                 "place": torch.full((len(side), 2), .5, device=side.device)}, size, aspect)


def turned(found):
    """Every picture by 0, 1, 2 and 3 quarter turns -> Data of 4n with the label rotation."""
    images = torch.cat([found.images.rot90(k, (2, 3)) for k in range(4)])
    aspect = torch.cat([found.aspect, 1 / found.aspect] * 2)
    return Data(images, aspect, {"rotation": torch.arange(4).repeat_interleave(len(found.images))}, {"rotation": ["0", "90", "180", "270"]})


def pick(v, z, config, feature):
    """v (n d), z (s n c) -> (n ...): "v" the backbone feature, "z" all spaces side by side, or one space by its name: its Conv5
    where it has one (LooC++), else its embedding."""
    method = loo.method_of(config)
    choose("feature", feature, ("v", *(["z"] if method.spaces else []), *method.spaces))
    if feature in ("v", "z"):
        return v if feature == "v" else rearrange(z, "s n c -> n (s c)")
    space = method.spaces.index(feature)
    return rearrange(v, "n (s d) -> s n d", s=len(method.spaces))[space] if method.heads == "conv5" else z[space]


# ---------------------------------------------------------------- probes


def logistic(x, y, k, l2, iterations=500, start=None):
    """Multinomial logistic regression by L-BFGS: x (n d), y (n,) of k classes -> w (d k), b (k,).

    Minimises mean cross-entropy + l2 / 2 * |w|^2, as scikit-learn's LogisticRegression at C = 1 / (n l2), from `start` (w, b).
    """
    w, b = (p.clone().requires_grad_() for p in start or (x.new_zeros(x.shape[1], k), x.new_zeros(k)))
    optimizer = torch.optim.LBFGS([w, b], max_iter=iterations, history_size=20, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ w + b, y) + l2 / 2 * w.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return w.detach(), b.detach()


def fast_probe(x, y, k, seed, grid=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5)):
    """The L2 weight chosen on a fifth of the training samples, then all of them: x (n d), y (n,) -> w (d k), b (k,)."""
    order = torch.randperm(len(x), generator=pixels.generator("held out", seed))
    held, rest = order[: len(x) // 5], order[len(x) // 5:]
    held, rest, y_held, y_rest = x[held], x[rest], y[held], y[rest]
    tried, start = [], None
    for l2 in grid:                              # from strong to weak, each from the one before: the short way down
        start = logistic(rest, y_rest, k, l2, 60, start)
        tried.append((accuracy(held @ start[0] + start[1], y_held), l2, start))
    _, l2, start = max(tried, key=lambda one: one[0])
    return logistic(x, y, k, l2, 300, start)


def paper_probe(encoder, found, label, config, seed, feature, epochs=200, lr=30., batch=256):
    """The paper's protocol: SGD on crops and flips through the frozen encoder, lr 30, x0.1 at 60% and 80%, no weight decay
    -> w (d k), b (k,)."""
    device = next(encoder.parameters()).device
    encoder.eval()
    y, k, n = found.labels[label], len(found.classes[label]), len(found.images)
    always = ("crop",) if label == "rotation" else ("crop", "flip")   # a flip would turn 90 degrees into 270
    if n < batch:
        raise UserError(f"--protocol=paper takes batches of {batch}, the training split has {n} pictures: use the default protocol")
    d = pick(torch.zeros(1, encoder.features), torch.zeros(len(encoder.w1), 1, encoder.w2.shape[1]), config, feature).shape[1]
    layer = torch.nn.Linear(d, k, device=device)
    layer.weight.data.copy_(torch.randn(k, d, generator=pixels.generator("probe", seed)) * .01)
    layer.bias.data.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum=.9)
    for epoch in range(epochs):
        for i, rows in enumerate(pixels.batches(n, batch, seed, epoch)):
            with torch.no_grad():
                images, _, _ = loo.augment_groups(found.images[rows].to(device).float() / 255, (), torch.zeros(0, 0, dtype=torch.bool),
                                                  pixels.generator("probe", seed, epoch, i), always=always,
                                                  size=config["size"], aspect=found.aspect[rows].to(device))
                x = pick(*loo.encode(encoder, images), config, feature).float()
            optimizer.param_groups[0]["lr"] = lr * .1 ** ((epoch >= .6 * epochs) + (epoch >= .8 * epochs))
            loo.descend(optimizer, F.cross_entropy(layer(x), y[rows].to(device)))
    return layer.weight.detach().T.cpu(), layer.bias.detach().cpu()


def few_shot(x, y, k, iterations=250, lr=.03):
    """All trials at once as one batched problem, Adam: x (t n d), y (t n) -> w (t d k), b (t 1 k). Trials do not touch each other."""
    t, n, d = x.shape
    w, b = x.new_zeros(t, d, k).requires_grad_(), x.new_zeros(t, 1, k).requires_grad_()
    optimizer = torch.optim.Adam([w, b], lr)
    for _ in range(iterations):
        loss = F.cross_entropy(rearrange(torch.baddbmm(b, x, w), "t n k -> (t n) k"), y.flatten(), reduction="sum") / n
        loo.descend(optimizer, loss)
    return w.detach(), b.detach()


def shots_of(y, k, shots, trials, seed):
    """Rows of `shots` samples of each of k classes, drawn anew for each trial -> (t n), n = k shots. UserError if a class has fewer."""
    counts = torch.bincount(y, minlength=k)
    if counts.min() < shots:
        raise UserError(f"--shots={shots}: a class has only {int(counts.min())} training pictures")
    g = pixels.generator("shots", seed, shots)
    rows = [(y == c).nonzero().squeeze(1) for c in range(k)]
    return torch.stack([torch.cat([r[torch.randperm(len(r), generator=g)[:shots]] for r in rows]) for _ in range(trials)])


def nearest(x, y, k, test, neighbours=20, tau=.07):
    """Weighted kNN on cosine similarity: x (n d), y (n,), test (m d) -> votes (m k), each neighbour's weight exp(similarity / tau)."""
    x, votes = F.normalize(x, dim=1), []
    for some in F.normalize(test, dim=1).split(1024):
        similar, rows = (some @ x.T).topk(min(neighbours, len(x)), dim=1)
        votes.append(torch.zeros(len(some), k).scatter_add_(1, y[rows], ((similar - 1) / tau).exp()))
    return torch.cat(votes)


def accuracy(logits, y, top=1):
    """logits (n k), y (n,) -> percent whose class is among the `top` largest."""
    return (logits.topk(top, dim=1).indices == y[:, None]).any(1).double().mean().item() * 100


def standardise(train, test):
    """Both by the training samples' mean and deviation, (n d) each."""
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    return (train - mean) / deviation, (test - mean) / deviation


def interval(values):
    """Half of Student's 95% interval of the mean of a list; None for one value."""
    n = len(values)
    if n < 2:
        return None
    at = torch.linspace(0, 100, 200_001, dtype=torch.float64)
    half = torch.cumulative_trapezoid(torch.distributions.StudentT(torch.tensor(n - 1., dtype=torch.float64)).log_prob(at).exp(), at)
    return at[int((half < .475).sum())].item() * torch.tensor(values, dtype=torch.float64).std().item() / math.sqrt(n)


# ---------------------------------------------------------------- tasks


class Bench(NamedTuple):
    """What a task works on: a run's encoder and a data set."""
    run: Path
    encoder: loo.Encoder
    config: dict
    data: str
    split: dict       # {"train", "test", and "val" where there is one: Data}
    feature: str
    seed: int
    key: tuple        # what the cached features depend on, beside the split


def bench(run: str = "runs/latest", *, data: str = None, root: str = None, feature: str = "v", download: bool = False, workers: int = 2,
          device: str = "auto", seed: int = 0):
    """
        run: folder of a finished run; runs/latest is the last one
        data: factors, folder, or a torchvision set; by default what the run was trained on
        root: where that data is
        feature: v (the backbone's), z (all spaces) or the name of one space
        download: let torchvision fetch the data
        workers: processes that decode pictures
        device: auto, cpu or cuda
        seed: of held-out parts, shots and orders
        json: print the JSON lines and nothing else
    """
    if not Path(run).exists():
        raise UserError(f"--run={run}: no such run; train one with `python loo.py train`" + near_run(run))
    device = pixels.device_of(device)
    encoder, config = loo.load_encoder(run, device)
    pick(torch.zeros(1, encoder.features), torch.zeros(len(encoder.w1), 1, 1), config, feature)   # a wrong name ends it here
    name = choose("data", data or config["data"], pixels.NAMES)
    root = root or (config["root"] if name == config["data"] else None)
    splits = pixels.splits(name, root)
    split = {s: pixels.load(name, s, root=root, size=config["size"], canvas=config["canvas"], download=download, workers=workers,
                            seed=config["seed"], cache=run) for s in splits}
    split["test"] = split.pop("test", None) or split.pop(splits[-1])
    weights = hashlib.sha1(b"".join((Path(run) / f).read_bytes() for f in ("backbone.pt", "heads.pt"))).hexdigest()
    return Bench(Path(run).resolve(), encoder, config, name, split, feature, seed, (name, root, weights))


def near_run(run):
    found = sorted(str(p.parent) for p in Path("runs").glob("*/config.json") if not p.parent.is_symlink())
    return f"; there are {', '.join(found)}" if found else ""


def frozen(b, split, found):
    """The split's features, (n d), computed once for a run, data set and split."""
    name = hashlib.sha1(repr((b.key, split, hashlib.sha1(found.images.numpy()).digest())).encode()).hexdigest()[:16]
    path = b.run / "features" / f"{b.data}-{split}-{name}.pt"
    if not path.exists():
        loo.write_tensors(path, features(b.encoder, found.images, found.aspect, b.config["size"], pixels.kept(b.data)))
    return pick(*torch.load(path, weights_only=True), b.config, b.feature)


def task(function):
    """A task as a command: its own flags and those of `bench`; prints and keeps each result that it yields."""
    own, common = (list(inspect.signature(f).parameters.values()) for f in (function, bench))
    names = {p.name for p in common}

    @functools.wraps(function)
    def command(*args, json=False, **flags):
        begun = time.perf_counter()
        b = bench(*args, **{k: v for k, v in flags.items() if k in names})
        if not json:
            print("| run | data | task | label | feature | protocol | shots | top-1 | top-5 | +- 95% | train | test | seconds |\n" + "|---" * 13 + "|")
        for result in function(b, **{k: v for k, v in flags.items() if k not in names}):
            line = dict(run=b.run.name, task=function.__name__, data=b.data, label=None, feature=b.feature, method=b.config["method"],
                        groups=b.config["groups"], protocol="fast", shots=None, top1=None, top5=None, ci95=None, n_train=None, n_test=None,
                        seed=b.seed, seconds=round(time.perf_counter() - begun, 1)) | result
            begun = time.perf_counter()
            with open(b.run / "results.jsonl", "a") as file:
                file.write(json_.dumps(line) + "\n")
            keys = ("run", "data", "task", "label", "feature", "protocol", "shots", "top1", "top5", "ci95", "n_train", "n_test", "seconds")
            print(json_.dumps(line) if json else "| " + " | ".join(cell(line[k]) for k in keys) + " |", flush=True)

    json_flag = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    command.__signature__ = inspect.Signature([common[0], *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own[1:]), *common[1:], json_flag])
    command.__doc__ = f"{function.__doc__.rstrip()}\n{bench.__doc__}"
    return command


def cell(x):
    return "-" if x is None else f"{x:.1f}" if isinstance(x, float) else str(x)


def labels_of(b, label):
    return [choose("label", one, tuple(b.split["train"].labels)) for one in label] or list(b.split["train"].labels)


def result(logits, y, label, n_train, **more):
    """logits (m k), y (m,) -> a result with its binomial interval."""
    top1 = accuracy(logits, y)
    return dict(label=label, top1=top1, top5=accuracy(logits, y, 5) if logits.shape[1] > 5 else None, n_train=n_train, n_test=len(y),
                ci95=196 * math.sqrt(top1 / 100 * (1 - top1 / 100) / len(y)), **more)


def probe(b, train, test, names, suffix, protocol, epochs):
    """A linear classifier for each label in names, by either protocol -> results."""
    choose("protocol", protocol, ("fast", "paper"))
    if epochs < 1:
        raise UserError(f"--epochs={epochs}: expected 1 or more")
    x, y = standardise(frozen(b, "train" + suffix, train), frozen(b, "test" + suffix, test))
    for label in names:
        k = len(train.classes[label])
        if k < 2:
            raise UserError(f"--label={label}: the pictures of {b.data} are all of one class, there is nothing to tell apart")
        if protocol == "fast":
            w, bias = fast_probe(x, train.labels[label], k, b.seed)
            logits = y @ w + bias
        else:
            w, bias = paper_probe(b.encoder, train, label, b.config, b.seed, b.feature, epochs)
            logits = frozen(b, "test" + suffix, test) @ w + bias
        yield result(logits, test.labels[label], label, len(x), protocol=protocol)


@task
def linear(b, label: tuple = (), protocol: str = "fast", epochs: int = 200):
    """A linear classifier on frozen features (section 4); every label of the data set if none is named.

    Args:
        label: labels with commas between
        protocol: fast (L-BFGS on cached features, L2 chosen on a held-out fifth) or paper (SGD on augmented pictures)
        epochs: of the paper's protocol
    """
    yield from probe(b, b.split["train"], b.split["test"], labels_of(b, label), "", protocol, epochs)


@task
def rotation(b, protocol: str = "fast", epochs: int = 200):
    """Which of four quarter turns a picture was given (section 4): every picture is shown in all four.

    Args:
        protocol: fast or paper, as in linear
        epochs: of the paper's protocol
    """
    yield from probe(b, turned(b.split["train"]), turned(b.split["test"]), ["rotation"], "-turned", protocol, epochs)


@task
def knn(b, label: tuple = (), neighbours: int = 20):
    """Weighted nearest neighbours by cosine similarity.

    Args:
        label: labels with commas between; every label if none is named
        neighbours: how many vote
    """
    if neighbours < 1:
        raise UserError(f"--neighbours={neighbours}: expected 1 or more")
    train, test = b.split["train"], b.split["test"]
    x, y = frozen(b, "train", train), frozen(b, "test", test)
    for name in labels_of(b, label):
        yield result(nearest(x, train.labels[name], len(train.classes[name]), y, neighbours), test.labels[name], name, len(x), protocol="knn")


@task
def fewshot(b, label: tuple = (), shots: tuple = (5, 10), trials: int = 10):
    """A linear classifier of all classes from a few pictures of each, drawn from train + val; mean and 95% interval over trials.

    Args:
        label: labels with commas between; every label if none is named
        shots: pictures of each class
        trials: independent draws
    """
    if not all(str(n).isdigit() and int(n) for n in shots) or trials < 2:
        raise UserError(f"--shots={','.join(map(str, shots))} --trials={trials}: expected numbers of pictures, as 5,10, and two trials or more")
    pool = [b.split[s] for s in ("train", "val") if s in b.split]
    x, test = torch.cat([frozen(b, s, b.split[s]) for s in ("train", "val") if s in b.split]), b.split["test"]
    x, y_x = standardise(x, frozen(b, "test", test))
    for name in labels_of(b, label):
        y, k = torch.cat([p.labels[name] for p in pool]), len(pool[0].classes[name])
        for n in map(int, shots):
            rows = shots_of(y, k, n, trials, b.seed)
            w, bias = few_shot(x[rows], y[rows], k)
            logits = [y_x @ one + c for one, c in zip(w, bias)]
            top1, top5 = ([accuracy(one, test.labels[name], top) for one in logits] for top in (1, min(5, k)))
            yield dict(label=name, shots=n, top1=sum(top1) / trials, top5=sum(top5) / trials if k > 5 else None, ci95=interval(top1),
                       n_train=n * k, n_test=len(y_x), protocol="adam")


def table(runs: tuple = ("runs/*",)):
    """One Markdown table from the results of many runs: a row for each method, a column for each task and label.

    Runs that differ in nothing but seed share a row: mean +- half of the 95% interval over runs. What else differs is named.

    Args:
        runs: run folders or patterns, with commas between
    """
    cells, found = defaultdict(dict), {Path(p).resolve() for pattern in runs for p in glob.glob(f"{pattern}/results.jsonl")}   # runs/latest once
    configs = {p: json_.loads((p.parent / "config.json").read_text()) for p in found}
    differs = [k for k in sorted({k for c in configs.values() for k in c} - NAMED) if len({repr(c.get(k)) for c in configs.values()}) > 1]
    for path in sorted(found, key=lambda p: p.stat().st_mtime):
        for line in loo.read_lines(path):
            setting = ", ".join(f"{k} {configs[path].get(k)}" for k in differs)
            row = (line["method"], ", ".join(line["groups"]), line["feature"], setting)
            column = (line["data"], line["task"], line["label"], line["shots"] or 0, line["protocol"])
            cells[row, column][configs[path]["seed"]] = line["top1"]   # the last one counts
    if not cells:
        raise UserError(f"--runs={','.join(runs)}: no results there; `python eval.py linear --run=DIR` writes some")
    rows, columns = sorted({r for r, _ in cells}), sorted({c for _, c in cells})
    head = [f"{t} {l}" + (f", {s} shots" if s else "") + (f" ({p})" if p == "paper" else "") + (f" on {d}" if len({c[0] for c in columns}) > 1 else "")
            for d, t, l, s, p in columns]
    print("| method | groups | feature | differs in | seeds | " + " | ".join(head) + " |\n" + "|---" * (5 + len(head)) + "|")
    for row in rows:
        values = [list(cells[row, c].values()) for c in columns]
        print(f"| {' | '.join(row)} | {max(map(len, values))} | " + " | ".join(mean_cell(v) for v in values) + " |")


NAMED = {"seed", "out", "device", "precision", "workers", "root", "download", "method", "groups", "always"}   # not told apart by `table`, or in a column


def mean_cell(values):
    return "-" if not values else f"{sum(values) / len(values):.1f}" + (f" +- {interval(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    pixels.command_line({"linear": linear, "rotation": rotation, "fewshot": fewshot, "knn": knn, "table": table})
