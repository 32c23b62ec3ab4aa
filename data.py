"""Where pixels come from: data sets by name, as fixed-size uint8 canvases. Everything random happens later, on the training device.

    python data.py sheet                       # docs/factors.png, a labelled sheet of the pictures drawn by code
    python data.py check --data=cub200 --root=DIR   # is a downloaded set whole?
    python data.py pack --data=folder --root=DIR    # decode once, for later trainings
    python data.py stylize --data=folder --root=DIR # copies without their texture, for --groups=texture

Axes, one legend for the whole project: b image, v key view, g group, s space, d feature, c embedding (or colour channel),
n queue slot or sample, t trial, h w pixel.
"""

import difflib
import functools
import hashlib
import inspect
import io
import json
import math
import os
import signal
import struct
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import fire
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, rgb_to_grayscale, to_pil_image

from loo import UserError, generator, grayscale, uniform

fire.decorators.FIRE_METADATA = "_fire"  # under its own name, --help lists it as a sub-command


class ImageSet(NamedTuple):
    images: (
        torch.Tensor
    )  # (n 3 h w) uint8 canvases, h == w; a picture that is not square is squashed into its canvas.
    # Or Canvases, which decode them when asked: see `stream` and `decoded`
    aspect: (
        torch.Tensor
    )  # (n,) float, width / height of the picture before it was squashed; 1 until it is decoded
    labels: dict  # {label: (n,) int64}
    classes: dict  # {label: names of its classes}
    missing: tuple = ()  # which of the set's pictures could not be read and were left out
    textures: torch.Tensor = None  # (n copy 3 h w) uint8, stylised copies of the pictures


def label_names(classes):
    """classes {label: names of its classes} -> the labels that tell pictures apart."""
    return [label for label, names in classes.items() if len(names) > 1]


def epoch_batches(n, batch, seed, epoch):
    """The epoch's order of n images -> (steps b) int64, the incomplete last batch dropped."""
    return torch.randperm(n, generator=generator("order", seed, epoch))[: n - n % batch].view(
        -1, batch
    )


# ---------------------------------------------------------------- factors: pictures drawn by code from known factors

# An object is up to four tapered strokes (x0, y0, x1, y1, radius0, radius1), y up, folded at x = 0: a flip never changes
# what an object is, and any rotation by a quarter turn does.
OBJECTS = {
    "arrow": [(0, -0.85, 0, 0.55, 0.12, 0.12), (0, 0.7, 0.55, 0.2, 0.15, 0.12)],
    "tee": [(0, -0.8, 0, 0.6, 0.15, 0.15), (0, 0.65, 0.7, 0.65, 0.17, 0.17)],
    "tree": [(0, -0.85, 0, -0.3, 0.12, 0.12), (0, -0.2, 0, 0.85, 0.6, 0.03)],
    "lollipop": [(0, 0.4, 0, 0.4, 0.45, 0.45), (0, -0.9, 0, 0.2, 0.09, 0.09)],
    "mushroom": [(0, 0.35, 0.45, 0.15, 0.4, 0.2), (0, -0.75, 0, 0.1, 0.2, 0.16)],
    "cup": [(0, -0.6, 0.4, -0.6, 0.2, 0.2), (0.5, -0.5, 0.6, 0.7, 0.17, 0.13)],
    "fork": [
        (0, -0.9, 0, 0, 0.14, 0.14),
        (0, 0, 0.5, 0.3, 0.14, 0.14),
        (0.5, 0.3, 0.5, 0.8, 0.14, 0.1),
    ],
    "anchor": [
        (0, -0.6, 0, 0.4, 0.12, 0.12),
        (0, -0.7, 0.7, -0.2, 0.16, 0.1),
        (0, 0.7, 0, 0.7, 0.24, 0.24),
        (0, 0.3, 0.3, 0.3, 0.1, 0.1),
    ],
    "heart": [(0, -0.75, 0.32, 0.25, 0.08, 0.38)],
    "crown": [
        (0, -0.55, 0.6, -0.55, 0.2, 0.2),
        (0, -0.4, 0, 0.55, 0.2, 0.05),
        (0.65, -0.4, 0.75, 0.6, 0.17, 0.05),
    ],
    "person": [
        (0, 0.65, 0, 0.65, 0.26, 0.26),
        (0, 0.3, 0, -0.2, 0.2, 0.17),
        (0.05, -0.2, 0.3, -0.85, 0.13, 0.13),
        (0, 0.3, 0.6, -0.05, 0.1, 0.1),
    ],
    "bell": [
        (0, 0.4, 0, -0.1, 0.3, 0.5),
        (0, -0.45, 0.65, -0.45, 0.12, 0.12),
        (0, -0.75, 0, -0.75, 0.17, 0.17),
        (0, 0.8, 0, 0.8, 0.1, 0.1),
    ],
}
TEXTURES = ("plain", "stripes", "checks", "dots")
HUES = 16  # neighbouring bins are 0.0625 of the circle apart: closer than the 0.1 that colour jitter moves
FACTORS = {"train": 8192, "val": 2048, "test": 4096, "viewpoint": 4096}


def factors(split, size=32, count=None):
    """Pictures of one object each, drawn from known factors -> Data of `count` (FACTORS[split]) pictures (n 3 size size).

    Labels: object (12), hue (16 bins), texture (4 fills), species = object x hue (192). Nuisances: position, scale, tilt, light, background,
    noise. Every object has details of its own (bent strokes, four gray marks), so that an image can be told from all others without its colour;
    light from above (within some 17 degrees) makes a turn change more than its outline. Splits are disjoint draws; "viewpoint" stands for what
    ObjectNet is to ImageNet: objects turned further in the picture plane (a deviation of 40 degrees, not 11) on other backgrounds (coloured, not
    nearly gray).
    """
    n = count or FACTORS[split]
    g = generator("factors", split)
    rand = lambda *shape, low=0.0, high=1.0: torch.rand(n, *shape, generator=g) * (high - low) + low
    normal = lambda *shape, std=1.0: torch.randn(n, *shape, generator=g) * std
    obj, hue, fill = (
        torch.randint(k, (n,), generator=g) for k in (len(OBJECTS), HUES, len(TEXTURES))
    )
    table = torch.tensor(
        [(strokes * 4)[:4] for strokes in OBJECTS.values()]
    )  # repeating a stroke draws nothing new
    strokes = table[obj] + normal(4, 6) * torch.tensor(
        [0.05, 0.1, 0.1, 0.1, 0.03, 0.03]
    )  # (n 4 6), bent
    strokes[..., 4:] *= rand(1, 1, low=0.6, high=1.5)  # all of an object's radii thinner or thicker
    look = dict(
        strokes=strokes,
        marks=torch.cat(
            [rand(4, 2, low=-0.8, high=0.8), rand(4, 1, low=0.15, high=0.3), rand(4, 1)], -1
        ),
        fill=fill,
        fill_angle=rand(high=math.tau),
        fill_period=rand(low=0.4, high=0.9),
        fill_depth=rand(low=0.4, high=0.9),
        fill_shift=rand(2),
        hue=(hue + rand(low=0.2, high=0.8)) / HUES,
        saturation=rand(low=0.4),
        value=rand(low=0.5),
        centre=normal(2, std=0.08),
        scale=rand(low=0.75, high=1.0),
        tilt=normal(std=0.2),
        light=normal(std=0.3),
        relief=rand(low=0.8, high=1.6),
        ground=torch.stack([rand(), rand(high=0.1), rand(low=0.25, high=0.85)], -1),
        horizon=normal(std=0.3),
        haze=rand(low=-0.02, high=0.08),
    )
    if split == "viewpoint":
        look |= dict(
            tilt=normal(std=0.7),
            ground=torch.stack([rand(), rand(high=0.3), rand(low=0.25, high=0.85)], -1),
        )
    noise = generator("noise", split, size)
    images = torch.cat(
        [
            render({k: v[i : i + 256] for k, v in look.items()}, size, noise)
            for i in range(0, n, 256)
        ]
    )
    labels = dict(object=obj, hue=hue, texture=fill, species=obj * HUES + hue)
    classes = dict(
        object=list(OBJECTS),
        hue=[f"hue {i}" for i in range(HUES)],
        texture=list(TEXTURES),
        species=[f"{o} {i}" for o in OBJECTS for i in range(HUES)],
    )
    return ImageSet(images, torch.ones(n), labels, classes)


def render(look, size, noise):
    """One picture for each row of `look` (a dict of (n ...) parameters) -> (n 3 size size) uint8."""
    p = {
        k: v[..., None, None] for k, v in look.items()
    }  # (n ... 1 1): parameters broadcast over pixels
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = axis[None, None, :], -axis[None, :, None]  # y is up
    pixel = 2 / size / p["scale"]  # one pixel in the object's units: the width of an edge
    u, v = (x - p["centre"][:, 0]) / p["scale"], (y - p["centre"][:, 1]) / p["scale"]
    cos, sin = p["tilt"].cos(), p["tilt"].sin()
    u, v = cos * u + sin * v, cos * v - sin * u  # the object's own frame, (n h w)

    x0, y0, x1, y1, r0, r1 = p["strokes"].unbind(2)  # (n 4 1 1) each
    px, py, ax, ay = u.abs()[:, None] - x0, v[:, None] - y0, x1 - x0, y1 - y0
    t = ((px * ax + py * ay) / (ax * ax + ay * ay).clamp(min=1e-6)).clamp(0, 1)
    outside = (torch.hypot(px - t * ax, py - t * ay) - torch.lerp(r0, r1, t)).amin(
        1
    )  # distance to the outline, (n h w)
    inside = (0.5 - outside / pixel).clamp(0, 1)

    cos, sin = p["fill_angle"].cos(), p["fill_angle"].sin()
    f1 = (cos * u + sin * v) / p["fill_period"] + p["fill_shift"][:, 0]
    f2 = (cos * v - sin * u) / p["fill_period"] + p["fill_shift"][:, 1]
    w1, w2 = (f1 * math.tau).sin(), (f2 * math.tau).sin()
    fills = torch.stack(
        [
            torch.zeros_like(w1),
            (3 * w1).tanh(),
            (5 * w1 * w2).tanh(),
            (6 * (w1 * w2).abs() - 3).tanh(),
        ],
        1,
    )
    fill = fills[torch.arange(len(fills)), look["fill"]]

    mx, my, radius, gray = p["marks"].unbind(2)  # (n 4 1 1) each
    spots = (0.5 - (torch.hypot(u[:, None] - mx, v[:, None] - my) - radius) / pixel[:, None]).clamp(
        0, 1
    )
    height = (-outside / 0.3).clamp(-0.1, 1)  # a rounded relief, lit from above
    dy, dx = torch.gradient(height, spacing=2 / size, dim=(1, 2))
    facing = -(dx * p["light"].sin() - dy * p["light"].cos()) * p["scale"] * 0.3
    body = hsv(p["hue"], p["saturation"], p["value"] * (1 + p["fill_depth"] * fill))
    for spot, shade in zip(spots.unbind(1), gray.unbind(1)):
        body = torch.lerp(body, shade[:, None], spot[:, None])
    body = body * (1 + p["relief"] * facing)[:, None]

    far = ((y - p["horizon"]) * 8).sigmoid()  # sky above a faint horizon
    under = F.pad(outside, (0, 0, size // 16, 0), value=1e3)[:, :size]
    shadow = (0.5 - under / pixel / 3).clamp(0, 1) * 0.15
    ground = hsv(*p["ground"].unbind(1)) * (1 - shadow + p["haze"] * (far - 0.5))[:, None]
    image = torch.lerp(ground, body, inside[:, None])
    image = image + 0.02 * torch.randn(image.shape, generator=noise)
    return (image * 255).round().clamp(0, 255).byte()


def hsv(hue, saturation, value):
    """(n h w) each, broadcast against one another -> rgb (n 3 h w)."""
    k = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + (hue * 6)[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


# ---------------------------------------------------------------- data sets by name

# torchvision's own classes, read (and with --download fetched) by them: name: (class, {split: arguments})
TORCHVISION = {
    "cifar10": ("CIFAR10", {"train": dict(train=True), "test": dict(train=False)}),
    "cifar100": ("CIFAR100", {"train": dict(train=True), "test": dict(train=False)}),
    "stl10": (
        "STL10",
        {
            "pretrain": dict(split="train+unlabeled"),
            "train": dict(split="train"),
            "test": dict(split="test"),
        },
    ),
    "dtd": ("DTD", {s: dict(split=s) for s in ("train", "val", "test")}),
    "pets": ("OxfordIIITPet", {"train": dict(split="trainval"), "test": dict(split="test")}),
    "food101": ("Food101", {"train": dict(split="train"), "test": dict(split="test")}),
}


def open_dataset(
    name,
    split,
    *,
    root=None,
    size=32,
    canvas=None,
    central=False,
    download=False,
    seed=0,
    whole=True,
):
    """The `split` ("pretrain", "train", "val" or "test") of a data set -> Data, not decoded yet (`factors`: drawn).

    Each picture whole on a canvas (of side `canvas`, by default so large that its central crop has `size`), for training; or, central=True,
    that crop alone, (3 size size), for evaluation. seed: of the folder's own split; whole=False takes a published set with pictures missing.
    Raises UserError when the data is not there.
    """
    check_choice("data", name, NAMES)
    if (
        split == "pretrain" and "pretrain" not in TORCHVISION.get(name, ((), ()))[1]
    ):  # of all sets, stl10 alone has it
        split = "train"
    if name == "factors":
        if root:
            raise UserError(
                f"--root={root}: factors is drawn by code and reads no folder; use --data=folder for pictures of your own"
            )
        return factors(split, size)
    read, mend = read_image, ""
    if name in TORCHVISION:
        read = read_item
        source, labels, classes = from_torchvision(name, split, root, download)
    else:
        if download:
            root = fetch_archives(name, root or "downloads")
        root = check_root(root, name)
        source, labels, classes = (
            folder(split, root, seed) if name == "folder" else published(name, split, root)
        )
    if name in PUBLISHED:
        mend = "download it again, a part of a published set gives a number that means nothing"
        if whole:
            check_complete(name, split, source, labels)
    if name == "objectnet13":
        read = functools.partial(read_image, border=2)  # it is red, to be cut off
    side, share = (
        (size, crop_pct(name)) if central else (canvas or round(size / crop_pct(name)), None)
    )
    images = ImageFiles(source, read, side, share, mend)
    return ImageSet(
        images,
        torch.ones(len(labels)),
        {"class": torch.as_tensor(labels).long()},
        {"class": list(classes)},
    )


def load_dataset(
    name,
    split,
    *,
    root=None,
    seed=0,
    workers=2,
    cache=None,
    shared=False,
    texture=False,
    textures=None,
    device="cpu",
    **where,
):
    """The same, decoded: what training reads. cache, shared: see `decoded`; texture: with stylised copies, see `with_textures`."""
    files = open_dataset(name, split, root=root, seed=seed, **where)
    found = decode_all(files, workers, cache, shared)
    return (
        with_textures(name, files, found, root, textures, cache, workers, device, seed)
        if texture
        else found
    )


def crop_pct(name):
    """The share of a picture's short side that evaluations look at: all of the sets that are small or centred already."""
    return 1 if name in ("factors", "cifar10", "cifar100", "imagenetc100") else 0.875


def dataset_splits(name, root=None):
    """The splits a data set has, in order; the last one is what evaluations test on."""
    if name == "folder":
        if not (check_root(root) / "train").is_dir():
            return ("train", "val")
        others = tuple(s for s in ("val", "test") if (Path(root) / s).is_dir())
        if not others:
            raise UserError(
                f"{root} has a train folder, so evaluations need a val or test folder beside it"
            )
        return ("train", *others)
    return tuple(
        ("train", "val", "test")
        if name == "factors"
        else PUBLISHED[name][0]
        if name in PUBLISHED
        else (s for s in TORCHVISION[name][1] if s != "pretrain")
    )


def check_root(root, name="folder"):
    if (
        name == "flowers102" and Path("downloads/flowers-102").is_dir()
    ):  # where --download leaves it
        root = root or "downloads"
    if not root or not Path(root).is_dir():
        holds = (
            f"with what {PUBLISHED[name][1]} gives"
            if name in PUBLISHED
            else "with one sub-folder of pictures for each class"
        )
        raise UserError(
            (f"--root={root}: no such folder; " if root else "")
            + f"--data={name} needs --root=DIR {holds}"
        )
    return Path(root)


def forbid_inside(flag, out, root):
    """UserError where the folder `out` lies in a tree of classes, and would be one of them the next time."""
    where, tree = Path(out).resolve(), Path(root).resolve()
    if (
        not (tree / "train").is_dir()
        and where.is_relative_to(tree)
        and not is_hidden(where.relative_to(tree))
    ):
        raise UserError(
            f"--{flag}={out} lies in --root={root}, where it would be read as a class: name a folder outside it"
        )


PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def image_paths(folder):
    """The pictures in a folder and below, sorted; nothing hidden, such as the ._NAME that macOS leaves beside a file."""
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in PICTURES and not is_hidden(p.relative_to(folder))
    )


def is_hidden(path):
    return any(part.startswith(".") for part in path.parts)


def folder(split, root, seed=0):
    """An ImageFolder tree: root/train and root/val, or one tree of which a seeded hash of each file's relative path keeps 80%
    for train. -> paths, labels, class names."""
    one_tree = not (root / "train").is_dir()
    top = root if one_tree else root / split
    if not top.is_dir():
        raise UserError(
            f"{top}: no such folder; {root} has a train folder, so it needs {split} beside it"
        )
    named = lambda where: sorted(
        p.name for p in where.iterdir() if p.is_dir() and not p.name.startswith(".")
    )
    classes, here = (
        named(root if one_tree else root / "train"),
        named(top),
    )  # a class has the same number in every split
    for c in here:
        if c not in classes:
            raise UserError(f"{top / c}: a class that {root / 'train'} does not have")
    if classes and not here:
        raise UserError(
            f"{top}: no sub-folders; it needs those of {root / 'train'}, one for each class"
        )
    files = {c: image_paths(top / c) for c in here}
    if not classes:  # pictures without labels, enough to train on
        classes, files = ["."], {".": image_paths(top)}
    for c, found in files.items():
        if not found:
            raise UserError(
                f"{top / c}: no pictures in this folder (expected {', '.join(sorted(PICTURES))})"
            )
    place = lambda path: (
        int(
            hashlib.sha1(f"{seed}/{path.relative_to(root).as_posix()}".encode()).hexdigest()[:8], 16
        )
        / 2**32
    )
    chosen = [
        (p, i)
        for i, c in enumerate(classes)
        for p in files.get(c, ())
        if not one_tree or (place(p) < 0.8) == (split == "train")
    ]
    if not chosen:
        raise UserError(f"{root}: too few pictures to split into train and val")
    return *zip(*chosen), classes


def from_torchvision(name, split, root, download):
    """A data set of torchvision's -> itself, labels, class names."""
    kind, arguments = TORCHVISION[name]
    root = root or "downloads"
    try:
        found = getattr(torchvision.datasets, kind)(
            root, download=download, **arguments[check_choice("split", split, tuple(arguments))]
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--data={name}: not found under {root}; name its folder with --root=DIR or fetch it with --download "
            f"({first_line(error)})"
        ) from None
    labels = next(getattr(found, a) for a in ("targets", "labels", "_labels") if hasattr(found, a))
    labels = torch.as_tensor(labels).long()
    return found, labels, getattr(found, "classes", range(int(labels.max()) + 1))


def read_item(found, i):
    return to_rgb(found[i][0])


def read_image(paths, i, border=0):
    """Picture i without `border` pixels at each side; UserError names the file."""
    try:
        with Image.open(paths[i]) as picture:
            picture = to_rgb(picture)
            return (
                picture.crop((border, border, picture.width - border, picture.height - border))
                if border
                else picture
            )
    except Exception as error:
        raise UserError(f"{paths[i]}: {first_line(error)}") from None


def to_rgb(picture):
    """A PIL picture of any mode -> RGB, turned as its EXIF orientation says, transparency on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError(
            "its pixels are floating point, of which nobody says what is white: save it with 8 or 16 bits"
        )
    if picture.mode.startswith("I"):  # 16 bits: convert() would clip, not scale
        picture = picture.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
            "RGB"
        )
    return picture.convert("RGB")


class ImageFiles(torch.utils.data.Dataset):
    """read(source, i) -> PIL picture, as (canvas (3 side side) uint8, aspect, what was wrong with it or ""). source: paths, or a data set.

    The whole picture, squashed; or its central square, `share` of the short side, as it is. mend: where every picture must be readable, what
    to do about one that is not.
    """

    def __init__(self, source, read, side, share=None, mend=""):
        self.source, self.read, self.side, self.share, self.mend = source, read, side, share, mend

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        try:
            picture = self.read(self.source, i)
        except Exception as error:  # whatever the reader raises: Pillow alone has OSError, SyntaxError, struct.error, ...
            return (
                torch.zeros(3, self.side, self.side, dtype=torch.uint8),
                1.0,
                str(error) or type(error).__name__,
            )
        w, h = picture.size
        box, aspect = None, w / h
        if self.share:
            half, aspect = min(w, h) * self.share / 2, 1.0
            box = (w / 2 - half, h / 2 - half, w / 2 + half, h / 2 + half)
        return (
            pil_to_tensor(
                picture.resize(
                    (self.side, self.side), Image.Resampling.BICUBIC, box, reducing_gap=3
                )
            ),
            aspect,
            "",
        )


def iter_batches(found, workers=2, batch=256, part=(0, 1), count=None):
    """The (first `count`) pictures of a Data in order, decoded in `workers` processes a few batches ahead and never kept: yields
    rows (b,), images (b 3 h w) uint8, aspect (b,). part (i, of): every of-th batch from the i-th on.

    A picture that cannot be read is named in a warning and left out; in a published set, or when none can, UserError.
    """
    every = torch.arange(len(found.images))[:count].split(batch)[part[0] :: part[1]]
    if torch.is_tensor(found.images):
        yield from ((rows, found.images[rows], found.aspect[rows]) for rows in every)
        return
    n, wrong = sum(map(len, every)), []
    loader = torch.utils.data.DataLoader(
        found.images,
        batch_sampler=[rows.tolist() for rows in every],
        num_workers=workers if n > 256 else 0,
    )
    for rows, (images, aspect, errors) in zip(every, loader):
        good = torch.tensor([not error for error in errors])
        rows = rows[good]
        wrong += filter(None, errors)
        if wrong and found.images.mend:
            raise UserError(f"{wrong[0]}; {found.images.mend}")
        if len(rows):
            yield rows, images[good], aspect[good].float()
    if wrong and len(wrong) == n:
        raise UserError(f"none of the {n} pictures can be read; the first: {wrong[0]}")
    for error in wrong[:5]:
        print(f"warning: unreadable: {error}", file=sys.stderr)
    if len(wrong) > 5:
        print(f"warning: {len(wrong) - 5} more pictures cannot be read", file=sys.stderr)


def decode_all(found, workers=2, cache=None, shared=False):
    """Data whose pictures are all decoded, once: images (n 3 side side) uint8.

    cache: a folder. There they are kept as a memory map, for the next run and for other processes, if over 4 GiB or `shared`.
    UserError when more than 1% (but one picture at least) cannot be read.
    """
    if torch.is_tensor(found.images):
        return found
    n, side = len(found.images), found.images.side
    size = n * 3 * side * side
    path = Path(cache) / f"{fingerprint(found)[:16]}.canvases" if cache else None
    in_memory = not cache or (size <= 4 << 30 and not shared and not path.exists())
    if in_memory:
        images = torch.empty(n, 3, side, side, dtype=torch.uint8)
        rows, aspect = decode(found, images, workers)
    else:
        index, aside = path.with_suffix(".pt"), path.with_suffix(f".{os.urandom(4).hex()}")
        if not (index.exists() and path.exists() and path.stat().st_size == size):
            path.parent.mkdir(parents=True, exist_ok=True)
            print(f"decoding {n} pictures, once: {path}", file=sys.stderr, flush=True)
            try:
                with open(aside, "wb") as file:
                    if hasattr(
                        os, "posix_fallocate"
                    ):  # a full disk is found now, not when a page of the map is written
                        os.posix_fallocate(file.fileno(), 0, size)
                rows, aspect = decode(found, memory_map(aside, n, side), workers)
                aside.replace(path)
                write_tensors(index, (rows, aspect))  # written last: what it names is whole
            except OSError as error:
                raise UserError(
                    f"cannot write {path}, which needs {size / 2**20:.1f} MB: {error.strerror}"
                ) from None
            finally:
                aside.unlink(missing_ok=True)
        rows, aspect = read_tensors(index)
        images = memory_map(path, n, side)
    missing = tuple(sorted(set(range(n)) - set(rows.tolist())))
    return ImageSet(
        images[: len(rows)],
        aspect,
        {k: y[rows] for k, y in found.labels.items()},
        found.classes,
        missing,
    )


def memory_map(path, n, side):
    """The file as images (n 3 side side) uint8."""
    shared = os.access(
        path, os.W_OK
    )  # between processes, which needs the right to write; from a read-only disk a map of its own
    return torch.from_file(
        str(path), shared=shared, size=n * 3 * side * side, dtype=torch.uint8
    ).view(n, 3, side, side)


def decode(found, images, workers):
    """Decodes into images (n 3 side side), without gaps -> rows (m,) of the pictures that could be read, aspect (m,)."""
    seen, aspects, at = [], [], 0
    for rows, some, aspect in iter_batches(found, workers, 64):
        images[at : at + len(rows)] = some
        at += len(rows)
        seen.append(rows), aspects.append(aspect)
    if len(images) - at > max(1, len(images) // 100):
        raise UserError(
            f"{len(images) - at} of {len(images)} pictures cannot be read, named above: more than 1%, mend or remove them"
        )
    return torch.cat(seen), torch.cat(aspects)


def fingerprint(found):
    """What a cache of these pictures depends on: their pixels, or the names, sizes and times of their files."""
    if torch.is_tensor(found.images):
        return hashlib.sha1(found.images.numpy()).hexdigest()
    source = found.images.source  # paths, or a data set of torchvision's
    real = functools.cache(os.path.realpath)  # of folders: the same pictures through a link
    files = (
        [
            (os.path.join(real(p.parent), p.name), (stat := p.stat()).st_size, stat.st_mtime_ns)
            for p in source
        ]
        if isinstance(source, (tuple, list))
        else repr(source)
    )
    return hashlib.sha1(repr((files, found.images.side, found.images.share)).encode()).hexdigest()


# ---------------------------------------------------------------- corruptions: the 15 of ImageNet-C, in batches, on any device

# Hendrycks and Dietterich, ICLR 2019. The constants are the published ones, for pictures of 224 x 224: every length among them (radius,
# sigma, distance) is scaled by side / 224 for others. Each picture has its own draws, made on the CPU. The published pictures were also
# saved as JPEG at quality 85; ours are not. Each function: images (b c h w) in [0, 1], h == w, a CPU generator, its constants -> (b c h w).
# Axes beside the project's: k kernel, t point along a motion.
REFERENCE_SIZE = 224  # of the pictures that the constants are for


def corrupt(images, name, severity, generator):
    """images (b 3 h w) in [0, 1], a name of CORRUPTIONS, severity 1 to 5, a CPU generator -> (b 3 h w) in [0, 1], in steps of 1 / 255."""
    function, constants = CORRUPTIONS[name]
    return function(images, generator, *constants[severity - 1]).clamp(0, 1).mul(255).round() / 255


def scale(images):
    """How many pixels of these images one pixel of the constants is."""
    return images.shape[-1] / REFERENCE_SIZE


def gaussian_noise(images, generator, std):
    return images + std * torch.randn(images.shape, generator=generator).to(images)


def shot_noise(images, generator, photons):
    """Each value becomes a count of photons, `photons` of them are 1 on average."""
    return torch.poisson(images.cpu() * photons, generator).to(images) / photons


def impulse_noise(images, generator, share):
    """This share of all values becomes 0 or 1, half and half."""
    u = torch.rand(images.shape, generator=generator).to(images)
    return images.masked_fill(u < share / 2, 0).masked_fill(u >= 1 - share / 2, 1)


def bilinear_weights(points, reach):
    """points (... t), in pixels -> (... k t): how much each point gives to each of the pixels -reach .. reach (k = 2 reach + 1), as in bilinear
    interpolation. It keeps a shape of any fractional size a kernel without stairs, and one much smaller than a pixel still a blur."""
    pixel = torch.arange(-reach, reach + 1, device=points.device)
    return (1 - (pixel[:, None] - points[..., None, :]).abs()).clamp(min=0)


def convolve(images, kernels, border):
    """images (b c h w), kernels (b k k), or (1 k k) for all -> (b c h w). By FFT: kernels are up to 83 x 83."""
    k = kernels.shape[-1]
    padded = F.pad(images, (k // 2,) * 4, border)
    size = padded.shape[-2:]
    spectrum = (
        torch.fft.rfft2(padded)
        * torch.fft.rfft2(kernels / kernels.sum((1, 2), keepdim=True), s=size)[:, None]
    )
    return torch.fft.irfft2(spectrum, s=size)[
        ..., k - 1 :, k - 1 :
    ]  # what comes before mixes opposite borders


def gaussian_filter(images, sigma):
    """Gaussian blur, mirrored at the border -> (b c h w): a matrix product a side, so sigma may be larger than the picture."""
    n = images.shape[-1]
    reach = math.ceil(4 * sigma)
    pixel = torch.arange(n, device=images.device)
    at = torch.arange(-reach, n + reach, device=images.device)
    weight = torch.softmax(-(((at - pixel[:, None]) / sigma) ** 2) / 2, 1)
    folded = torch.minimum(
        at % (2 * n), -(at + 1) % (2 * n)
    )  # mirrored again and again, where it takes more than once
    matrix = torch.zeros_like(weight[:, :n]).index_add_(1, folded, weight)
    return matrix @ images @ matrix.T


def defocus_blur(images, generator, radius):
    """The average over a disk. Its edge is smooth by half a pixel: the same as the published blurring of the kernel."""
    radius = radius * scale(images)
    points = (torch.linspace(-1, 1, 257, device=images.device)[:-1] + 1 / 256) * radius
    weights = bilinear_weights(points, math.ceil(radius))
    disk = (points[:, None] ** 2 + points**2 <= radius**2).float()
    return convolve(images, (weights @ disk @ weights.T)[None], "reflect")


def glass_blur(images, generator, sigma, distance, times):
    """Gaussian blur, then `times` over all pixels from the last to the first: each takes the colour that a pixel at most `distance`
    away has by now; then the same blur again. As published: the code means to swap the two colours, but numpy only copies one.

    A distance with a fraction is rounded up for that share of the pixels.
    """
    b, c, h, w = images.shape
    whole, fraction = divmod(distance * scale(images), 1)
    edge = whole + (fraction > 0)  # so wide a border keeps its colours
    sigma = sigma * scale(images)
    images = gaussian_filter(images, sigma).flatten(2)
    own = torch.arange(h * w).view(h, w)
    y, x = own // w, own % w
    inside = (y > edge) & (y <= h - edge) & (x > edge) & (x <= w - edge)
    for _ in range(times):
        far = whole + (torch.rand(b, 2, h, w, generator=generator) < fraction)
        dy, dx = (uniform(-1, 1, b, 2, h, w, generator=generator) * far).floor().long().unbind(1)
        source = torch.where(inside, own + dy * w + dx, own).flatten(1).to(images.device)
        # a source further on has already taken its colour from elsewhere: six times doubled, the jump goes 64 sources back
        back = torch.maximum(source, own.flatten().to(source))
        for _ in range(6):
            back = back.gather(1, back)
        source = source.gather(1, back)
        images = images.gather(2, source[:, None].expand(b, c, h * w))
    return gaussian_filter(images.view(b, c, h, w), sigma)


def motion_blur_kernel(images, angle, radius, sigma, border="replicate"):
    """Each image along its angle (b,), in degrees: to one side, by half a Gaussian of `sigma`, cut at 2 radius -> (b c h w)."""
    length = 2 * radius * scale(images)
    far = torch.linspace(0, 1, 2 * radius * math.ceil(scale(images)) + 1, device=images.device)
    weight = (-((far * 2 * radius / sigma) ** 2) / 2).exp()
    angle = angle.to(images).deg2rad()[:, None]
    rows, columns = (
        bilinear_weights(far * length * along, math.ceil(length))
        for along in (angle.sin(), angle.cos())
    )
    return convolve(images, rows * weight @ columns.mT, border)


def motion_blur(images, generator, radius, sigma):
    return motion_blur_kernel(
        images, uniform(-45, 45, len(images), generator=generator), radius, sigma
    )


def zoom_blur(images, generator, step, count):
    """The average of the image and of `count` zooms into its middle: by 1, 1 + step, 1 + 2 step ..."""
    total = images
    for i in range(count):
        theta = torch.eye(2, 3, device=images.device) / (1 + i * step)
        total = total + F.grid_sample(
            images,
            F.affine_grid(theta.expand(len(images), 2, 3), images.shape, align_corners=False),
            padding_mode="border",
            align_corners=False,
        )
    return total / (count + 1)


def resize(images, size):
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def snow(images, generator, mean, std, zoom, threshold, radius, sigma, keep):
    """Flakes are what exceeds `threshold` in coarse noise, smeared, and once more turned by 180 degrees; below them the image is bleached."""
    cells = (
        torch.randn(
            len(images), 1, *[math.ceil(REFERENCE_SIZE / zoom)] * 2, generator=generator
        ).to(images)
        * std
        + mean
    )
    flakes = F.interpolate(
        cells, (REFERENCE_SIZE, REFERENCE_SIZE), mode="bilinear", align_corners=True
    )
    flakes = F.threshold(flakes, threshold, 0).clamp(0, 1)
    flakes = motion_blur_kernel(
        resize(flakes, images.shape[-1]),
        uniform(-135, -45, len(images), generator=generator),
        radius,
        sigma,
    )
    bleached = torch.maximum(images, grayscale(images) * 1.5 + 0.5)
    return keep * images + (1 - keep) * bleached + flakes + flakes.rot90(2, (2, 3))


def plasma(b, side, decay, generator):
    """Clouds by the diamond-square algorithm -> (b 1 side side), the published cut of 224 from a field of 256, which spans [0, 1].

    Every pass doubles a grid that goes round on both axes: first the middles of its cells, then those of their sides, are the mean of
    their four neighbours plus noise, which is `decay` ** 2 smaller each time.
    """
    grid, noise = torch.zeros(b, 1, 1), 1.0
    full = 1 << (side * 8 // 7 - 1).bit_length()
    while grid.shape[-1] < full:
        around = lambda cross: cross / 4 + noise * uniform(-1, 1, *grid.shape, generator=generator)
        below, right = grid.roll(-1, 1), grid.roll(-1, 2)
        middle = around(grid + below + right + below.roll(-1, 2))
        top, left = (
            around(grid + right + middle + middle.roll(1, 1)),
            around(grid + below + middle + middle.roll(1, 2)),
        )
        grid = rearrange(
            torch.stack([grid, top, left, middle]), "(y x) b h w -> b (h y) (w x)", y=2
        )
        noise /= decay**2
    low, high = grid.amin((1, 2), keepdim=True), grid.amax((1, 2), keepdim=True)
    return resize(((grid - low) / (high - low))[:, None, : full * 7 // 8, : full * 7 // 8], side)


def fog(images, generator, amount, decay):
    clouds = plasma(len(images), images.shape[-1], decay, generator).to(images)
    lightest = images.amax((1, 2, 3), keepdim=True)
    return (images + amount * clouds) * lightest / (lightest + amount)


def frost(images, generator, keep, amount):
    """Adds ice. The published photographs of it are replaced by drawn ones, with their range of lightness and color and their contrast:
    blades (dots smeared along an angle, then slightly across) of four angles over clouds, from dark and blue to white."""
    b, side = len(images), images.shape[-1]
    dots = torch.rand(4 * b, 1, side, side, generator=generator) * (
        torch.rand(4 * b, 1, side, side, generator=generator) < 0.006 / scale(images) ** 2
    )
    angle = uniform(0, 360, 4 * b, generator=generator)
    blades = motion_blur_kernel(
        motion_blur_kernel(dots.to(images), angle, 15, 10, "circular"), angle + 30, 6, 4, "circular"
    )
    blades = rearrange(blades, "(b n) 1 h w -> b n h w", n=4).amax(1, keepdim=True)
    relief = (
        F.instance_norm(blades) * 0.9
        + F.instance_norm(plasma(b, side, 1.5, generator).to(images)) * 0.45
    )
    dark, light = torch.tensor([[0.34, 0.49, 0.55], [0.81, 0.82, 0.86]]).to(images)[
        :, None, :, None, None
    ]
    whiteness = torch.rand(b, 1, 1, 1, generator=generator).to(images)
    return keep * images + amount * (
        torch.lerp(dark, light, whiteness) + (0.19 - 0.09 * whiteness) * relief
    )


def brightness(images, generator, amount):
    """Adds to HSV's value, which scales a colour as a whole; black has none and becomes gray."""
    value = images.amax(1, keepdim=True)
    lighter = (value + amount).clamp(max=1)
    return torch.where(value > 0, images * lighter / value, lighter)


def contrast(images, generator, factor):
    return torch.lerp(images.mean((2, 3), keepdim=True), images, factor)


def elastic_transform(images, generator, alpha, sigma, shift):
    """An affine map that moves three points by up to `shift` each way, then noise of +-alpha, blurred by sigma, moves every pixel by itself.

    alpha scales with the area: what is left of noise after a blur goes down with sigma, so the displacements scale as every length.
    """
    b, s = len(images), scale(images)
    third = (
        torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) * 2 / 3
    )  # of the way from the middle to the corners
    moved = F.pad(
        third + uniform(-shift, shift, b, 3, 2, generator=generator) * 2 / REFERENCE_SIZE,
        (0, 1),
        value=1,
    )
    theta = torch.linalg.solve(moved, third.expand(b, 3, 2)).mT.to(images)
    noise = uniform(-1, 1, b, 2, *images.shape[2:], generator=generator).to(images)
    local = rearrange(
        gaussian_filter(noise, sigma * s) * alpha * s * 2 / REFERENCE_SIZE, "b xy h w -> b h w xy"
    )
    for grid in (
        F.affine_grid(theta, images.shape, align_corners=False),
        F.affine_grid(torch.eye(2, 3).expand(b, 2, 3).to(images), images.shape, align_corners=False)
        + local,
    ):
        images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    return images


def pixelate(images, generator, share):
    """`share` of the pixels each way: every block, as wide as they need be, becomes its mean."""
    n = images.shape[-1]
    block = ((torch.arange(n, device=images.device) + 0.5) * int(n * share) / n).long()
    same = (block[:, None] == block).float()
    mean = same / same.sum(1)
    return mean @ images @ mean.T


def jpeg_compression(images, generator, quality):
    def coded(image):
        file = io.BytesIO()
        to_pil_image(image).save(file, "JPEG", quality=quality)
        return pil_to_tensor(Image.open(file))

    return (
        torch.stack([coded(image) for image in (images * 255).round().byte().cpu()]).to(images)
        / 255
    )


CORRUPTIONS = {  # name: (function, its constants at severity 1 to 5)
    "gaussian_noise": (gaussian_noise, [(0.08,), (0.12,), (0.18,), (0.26,), (0.38,)]),
    "shot_noise": (shot_noise, [(60,), (25,), (12,), (5,), (3,)]),
    "impulse_noise": (impulse_noise, [(0.03,), (0.06,), (0.09,), (0.17,), (0.27,)]),
    "defocus_blur": (defocus_blur, [(3,), (4,), (6,), (8,), (10,)]),
    "glass_blur": (glass_blur, [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)]),
    "motion_blur": (motion_blur, [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]),
    "zoom_blur": (zoom_blur, [(0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11)]),
    "snow": (
        snow,
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
    ),
    "frost": (frost, [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)]),
    "fog": (fog, [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)]),
    "brightness": (brightness, [(0.1,), (0.2,), (0.3,), (0.4,), (0.5,)]),
    "contrast": (contrast, [(0.4,), (0.3,), (0.2,), (0.1,), (0.05,)]),
    "elastic_transform": (
        elastic_transform,
        [
            (488, 170.8, 24.4),
            (488, 19.52, 48.8),
            (12.2, 2.44, 4.88),
            (17.08, 2.44, 4.88),
            (29.28, 2.44, 4.88),
        ],
    ),
    "pixelate": (pixelate, [(0.6,), (0.5,), (0.4,), (0.3,), (0.25,)]),
    "jpeg_compression": (jpeg_compression, [(25,), (18,), (15,), (10,), (7,)]),
}


# ---------------------------------------------------------------- stylised copies: what the group `texture` draws from


def fractal_noise(n, size, decay, generator):
    """Smooth noise of all scales -> (n size size), mean 0, deviation 1; more decay is softer."""
    octaves = [
        torch.randn(n, 1, k, k, generator=generator) * k**-decay
        for k in (4 << i for i in range(12))
        if k <= size
    ]
    out = sum(
        F.interpolate(octave, size=size, mode="bicubic", align_corners=False)[:, 0]
        for octave in octaves
    )
    return (out - out.mean((1, 2), keepdim=True)) / out.std((1, 2), keepdim=True)


def procedural_textures(n, size, seed=0):
    """Textures drawn by code, the styles when there is no folder of them -> (n 3 size size) in [0, 1]; 14 patterns in turn, each with its own
    colours, angle, scale, warp and relief."""
    g = generator("materials", seed)
    rand = lambda *shape, low=0.0, high=1.0: torch.rand(n, *shape, generator=g) * (high - low) + low
    x, y = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="xy")
    angle, scale, warp = (
        rand(1, 1, low=low, high=high) for low, high in ((0, math.tau), (2.5, 9), (0, 0.25))
    )
    soft, fine, bend_x, bend_y = (
        fractal_noise(n, size, decay, g) for decay in (1.5, 0.5, 1.2, 1.2)
    )
    bend_x, bend_y = bend_x * warp, bend_y * warp
    u, v = (
        (angle.cos() * x + angle.sin() * y + bend_x) * scale,
        (angle.cos() * y - angle.sin() * x + bend_y) * scale,
    )
    zigzag = lambda t: (t - t.floor() - 0.5).abs() * 4 - 1
    cell, brick = torch.hypot(u - u.round(), v - v.round()), u + 0.5 * (v.floor() % 2)
    seeds = torch.cdist(
        torch.stack([x + bend_x / 2, y + bend_y / 2], -1).flatten(1, 2),
        rand(36, 2, low=-1.2, high=1.2),
    )
    near, next_ = seeds.topk(2, largest=False).values.view(n, size, size, 2).unbind(3)
    patterns = [
        (math.tau * u).sin(),
        (4 * (math.tau * u).sin() * (math.tau * v).sin()).tanh(),
        ((0.3 - cell) * 12).tanh(),  # stripes checks dots
        (
            (
                torch.minimum(
                    0.5 - (brick - brick.round()).abs(), 0.5 - (v - v.floor() - 0.5).abs()
                )
                - 0.07
            )
            * 30
        ).tanh(),  # bricks
        (math.tau * torch.hypot(u, 0.35 * v)).sin(),
        (3 * u + 2.5 * soft).sin(),
        soft,
        near * 9 - 1.2,  # wood marble clouds cells
        ((next_ - near) * 14 - 0.6).tanh(),
        zigzag(u + zigzag(v) * 0.35),  # cracks chevrons
        torch.where((u.floor() + v.floor()) % 2 > 0, zigzag(u * 2), zigzag(v * 2)),
        (fine * 3 - 1.5).tanh(),  # weave lichen
        (cell * math.tau * 1.5).cos(),
        (1 - soft.abs() * 3).clamp(-1, 1),
    ]  # scales veins
    which = torch.arange(n)
    height = (
        torch.stack(patterns)[which % len(patterns), which] + fine * rand(1, 1, low=0.02, high=0.35)
    ).clamp(-1.5, 1.5)
    dark, middle, light = hsv(
        *(
            rand(3, low=low, high=high).T.reshape(3 * n, 1, 1)
            for low, high in ((0, 1), (0.1, 0.9), (0.1, 1))
        )
    ).view(3, n, 3, 1, 1)
    t = height[:, None] / 1.5
    image = torch.where(
        t < 0,
        torch.lerp(dark / 2, middle, (t + 1).clamp(max=1)),
        torch.lerp(middle, (light + 1) / 2, t.clamp(min=0)),
    )
    dy, dx = torch.gradient(height, dim=(1, 2))
    return (
        image * (1 + (dx - dy) * rand(1, 1, high=0.8) * size / 64).clamp(0.4, 1.6)[:, None]
    ).clamp(0, 1)


def guided_filter(images, radius, flat=0.003, times=2):
    """images (b c h w) without their texture: He et al.'s guided filter, by their own luminance -> (b c h w). What varies less than `flat` within
    `radius` pixels becomes even, edges stay."""
    box = lambda x: F.avg_pool2d(F.pad(x, (radius,) * 4, mode="reflect"), 2 * radius + 1, stride=1)
    for _ in range(times):
        guide = rgb_to_grayscale(images)
        middle, mean = box(guide), box(images)
        slope = (box(guide * images) - middle * mean) / (
            box(guide * guide) - middle * middle + flat
        )
        images = box(slope) * guide + box(mean - slope * middle)
    return images


def match_color(images, style):
    """images (b 3 h w) with the mean and covariance of the colours of style (b 3 h w)."""

    def moments(x):
        mean = x.flatten(2).mean(2, keepdim=True)
        return mean, (x.flatten(2) - mean) @ (x.flatten(2) - mean).mT / x[
            0, 0
        ].numel() + 1e-4 * torch.eye(3, device=x.device)

    def power(matrix, p):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag_embed(values.clamp(min=1e-6) ** p) @ vectors.mT

    (mean, cov), (want, like) = moments(images), moments(style)
    return (power(like, 0.5) @ power(cov, -0.5) @ (images.flatten(2) - mean) + want).view_as(images)


def random_features(images, filters=48):
    """A bank of fixed random 5 x 5 filters, half of them blind to the mean, with ReLU, at every scale: enough to tell textures apart
    (Ustyuzhaninov et al. 2017). (b 3 h w) -> [(b f h w), ...] from fine to coarse, and which of them is the content."""
    bank = torch.randn(filters, 3, 5, 5, generator=generator("filters"))
    bank[::2] -= bank[::2].mean((1, 2, 3), keepdim=True)
    bank = (bank / bank.flatten(1).norm(dim=1)[:, None, None, None]).to(images)
    maps, content = [], 0
    while images.shape[-1] >= 8:
        content = len(maps) if images.shape[-1] >= 32 else content
        maps.append(F.relu(F.conv2d(F.pad(images - 0.5, (2,) * 4, mode="reflect"), bank)))
        images = F.avg_pool2d(images, 2)
    return maps, content


def vgg_features(net, images):
    """conv1_1, 2_1, 3_1, 4_1, 4_2 and 5_1 of torchvision's VGG-19 (Gatys et al. 2016): (b 3 h w) -> [(b f h w), ...],
    and which of them is the content: conv4_2."""
    mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    maps, x = [], (images - mean) / std
    for i, layer in enumerate(net.features[:30]):
        x = layer(x)
        if i in (1, 6, 11, 20, 22, 29):
            maps.append(x)
    return maps, 4


def gram(maps):
    """(b f h w) -> (b f f)"""
    maps = maps.float().flatten(2)
    return maps @ maps.mT / maps.shape[2]


def style_transfer(
    images,
    styles,
    features=random_features,
    steps=10,
    lr=0.01,
    content=0.1,
    strength=0.7,
    keep_color=False,
):
    """Texture randomised, shape kept (Gatys et al. 2016): images, styles (b 3 h w) in [0, 1] -> (b 3 h w) in [0, 1].

    Starts from the picture's structure in the style's colours with the style's fine detail on it, where the optimisation has little left to
    do, then follows the gradient of Gram matrices towards the style and of the content map towards that structure. keep_color: the style
    takes the picture's colours, not the other way.
    """
    size = images.shape[-1]
    with torch.no_grad():
        styles = match_color(styles, images).clamp(0, 1) if keep_color else styles
        plain = match_color(guided_filter(images, max(1, size // 32)), styles)
        coarse = F.interpolate(
            F.avg_pool2d(styles, max(1, size // 8)), size=size, mode="bicubic", align_corners=False
        )
        out = (plain + strength * (styles - coarse)).clamp(0, 1)
        goals = [gram(m) for m in features(styles)[0]]
        maps, at = features(plain.clamp(0, 1))
        keep, push = maps[at], torch.zeros_like(out)
    apart = lambda x, goal: (
        (x.float() - goal).square().flatten(1).mean(1) / goal.float().square().flatten(1).mean(1)
    ).sum()
    for i in range(steps):
        out.requires_grad_()
        with torch.autocast(out.device.type, torch.bfloat16, enabled=out.is_cuda):
            maps, _ = features(out)
        loss = sum(apart(gram(m), goal) for m, goal in zip(maps, goals)) + content * apart(
            maps[at], keep
        )
        (gradient,) = torch.autograd.grad(loss, out)
        with torch.no_grad():  # steps of one size for each picture
            push = 0.8 * push + 0.2 * gradient / (
                gradient.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-12
            )
            out = (out - lr * (1 - i / steps) * push).clamp(0, 1)
    return out.detach()


def copy_paths(path, top, root, count):
    """Where the stylised copies of a picture below `top` are, below `root`: the same path, numbered."""
    where = Path(root) / Path(path).relative_to(top)
    return [
        where.with_name(f"{where.name}.{k}.jpg") for k in range(count)
    ]  # a.png and a.jpg are two pictures


def stylize(
    data: str = "folder",
    root: str = None,
    styles: str = None,
    out: str = "stylised",
    *,
    copies: int = 1,
    size: int = 256,
    split: str = "train",
    features: str = "auto",
    steps: int = 10,
    strength: float = 0.7,
    batch: int = 32,
    device: str = "auto",
    seed: int = 0,
):
    """Write stylised copies of a set's pictures, a tree that mirrors it: texture gone, shape kept. For `python loo.py train --groups=texture
    --textures=OUT`. Goes on where it stopped; each file is written whole or not at all.

    Args:
        data: folder or imagenet100, cub200, inat2019, flowers102
        root: where the data is
        styles: a folder of pictures; without it, textures drawn by code
        out: folder to write to
        copies: of each picture, every one in another style
        size: of a copy's shorter side, in pixels
        split: train, or val or test to look at
        features: vgg19 (torchvision's weights, downloaded once), random, or auto: vgg19 where its weights can be had
        steps: of the optimisation
        strength: of the style's detail at the start
        batch: pictures at once
        device: auto, cpu or cuda
        seed: which style each picture gets
    """
    check_choice("features", features, ("auto", "vgg19", "random"))
    if min(copies, size, steps + 1, batch) < 1 or size < 16:
        raise UserError(
            f"--copies={copies} --size={size} --steps={steps} --batch={batch}: expected 1 or more, and 16 pixels or more"
        )
    if check_choice("data", data, NAMES) == "factors" or data in TORCHVISION:
        raise UserError(
            f"--data={data} is not a tree of pictures: factors makes its copies when it is trained on, torchvision's sets cannot have them"
        )
    found, top = (
        open_dataset(data, split, root=root, size=size, canvas=size, seed=seed),
        check_root(root, data),
    )
    if data == "folder":
        forbid_inside("out", out, top)
    place, paths = resolve_device(device), found.images.source
    to_style, name = style_features(features, place)
    painted = image_paths(Path(styles)) if styles else []
    if styles and not painted:
        raise UserError(f"--styles={styles}: no pictures in this folder")
    drawn = None if styles else procedural_textures(56, size, seed)
    jobs = [
        (i, target)
        for i, path in enumerate(paths)
        for target in copy_paths(path, top, out, copies)
        if not target.exists()
    ]
    print(
        f"{len(paths) * copies - len(jobs)} of {len(paths) * copies} copies are there; styles from {styles or 'code'}, features {name}, {place}",
        flush=True,
    )
    begun, shown = time.perf_counter(), 0
    for start in range(0, len(jobs), batch):
        some = jobs[start : start + batch]
        canvases, aspect, errors = zip(*(found.images[i] for i, _ in some))
        pick = [
            int(
                torch.randint(
                    1 << 30, (1,), generator=generator("style", seed, str(t.relative_to(out)))
                )
            )
            for _, t in some
        ]
        style = [
            drawn[p % len(drawn)]
            if drawn is not None
            else style_of(painted[p % len(painted)], size)
            for p in pick
        ]
        done = style_transfer(
            torch.stack(canvases).to(place) / 255,
            torch.stack(style).to(place),
            to_style,
            steps,
            strength=strength,
        )
        for (_, target), picture, shape, error in zip(
            some, (done * 255).round().byte().cpu(), aspect, errors
        ):
            if error:
                print(f"warning: unreadable: {error}", file=sys.stderr)
                continue
            sides = round(size * max(shape, 1)), round(size * max(1 / shape, 1))
            write_atomic(
                target,
                functools.partial(
                    to_pil_image(picture).resize(sides, Image.Resampling.BICUBIC).save,
                    format="JPEG",
                    quality=95,
                ),
            )
        at, seconds = start + len(some), time.perf_counter() - begun
        if at * 10 // len(jobs) > shown or sys.stdout.isatty():
            shown = at * 10 // len(jobs)
            print(
                f"{at}/{len(jobs)}  {at / seconds:.1f} pictures/s  {seconds / at * (len(jobs) - at) / 60:.0f} minutes left",
                flush=True,
            )
    print(f"wrote {out}; train with --groups=color,rotation,texture --textures={out}")


def style_of(path, size):
    """The middle of a picture as a square, (3 size size) in [0, 1]."""
    try:
        return (
            pil_to_tensor(
                ImageOps.fit(read_image([path], 0), (size, size), Image.Resampling.BICUBIC)
            )
            / 255
        )
    except UserError as error:
        raise UserError(f"{error}; remove it from --styles, and the same command goes on") from None


def style_features(name, device):
    """-> images -> (maps, content), and what it is called."""
    if name != "random":
        try:
            net = (
                torchvision.models.vgg19(weights="DEFAULT").eval().requires_grad_(False).to(device)
            )
            return functools.partial(vgg_features, net), "vgg19"
        except OSError as error:  # URLError is one
            if name == "vgg19":
                raise UserError(
                    f"the weights of VGG-19 cannot be downloaded ({error}): --features=random needs none"
                ) from None
    return random_features, "random"


def with_textures(name, files, found, root, textures, cache, workers=2, device="cpu", seed=0):
    """A decoded Data, `files` before it was decoded, with its stylised copies: those below the folder `textures`; of `factors`, made now
    and kept in `cache`."""
    if name == "factors":
        path = Path(cache) / f"factors-textures-{fingerprint(found)[:16]}.pt"
        if not path.exists():
            n, side, made = len(found.images), found.images.shape[-1], []
            print(f"making stylised copies of {n} pictures, once: {path}", flush=True)
            style = F.interpolate(procedural_textures(56, max(64, side)), size=side, mode="area")
            for rows in torch.arange(n).split(64):
                pick = torch.randint(56, (len(rows),), generator=generator("style", int(rows[0])))
                done = style_transfer(
                    found.images[rows].to(device) / 255, style[pick].to(device), keep_color=True
                )  # hue is another group's
                made.append((done * 255).round().byte().cpu())
            write_tensors(path, torch.cat(made)[:, None])
        return found._replace(textures=read_tensors(path))
    if name in TORCHVISION:
        raise UserError(
            f"--data={name}: torchvision's sets cannot have stylised copies; use a tree of pictures"
        )
    if not textures:
        raise UserError(
            f"--groups=texture needs --textures=DIR, stylised copies of the pictures; write them with "
            f"`python data.py stylize --data={name} --root={root} --seed={seed}`"
        )
    side, top, unread = found.images.shape[-1], check_root(root, name), set(found.missing)
    paths = [p for i, p in enumerate(files.images.source) if i not in unread]
    count = 1
    while copy_paths(paths[0], top, textures, count + 1)[-1].exists():
        count += 1
    copies = [one for p in paths for one in copy_paths(p, top, textures, count)]
    if gone := missing_files(copies):
        raise UserError(
            f"{gone[0]}: no such file; `python data.py stylize --data={name} --root={root} --out={textures} --copies={count} --seed={seed}` "
            "(and the --styles it was made with) writes what is missing"
        )
    canvases = ImageFiles(
        copies, read_image, side, mend="remove it: `python data.py stylize` writes it again"
    )
    images = decode_all(
        ImageSet(canvases, torch.ones(len(copies)), {}, {}),
        workers,
        cache,
        shared=found.images.is_shared(),
    ).images
    return found._replace(textures=images.view(len(paths), -1, 3, side, side))


# ---------------------------------------------------------------- the paper's data sets, each as it is downloaded

# IN-100, the classes of CMC. A picture's label is its class's place in the sorted list, so that all derived sets agree.
IMAGENET100 = sorted(
    """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166 n01983481 n02009229 n02018207 n02085620
n02086240 n02086910 n02087046 n02089867 n02089973 n02090622 n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550 n02107142
n02108089 n02109047 n02113799 n02113978 n02114855 n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212 n02326432 n02396427
n02483362 n02488291 n02701002 n02788148 n02804414 n02859443 n02869837 n02877765 n02974003 n03017168 n03032252 n03062245 n03085013 n03259280
n03379051 n03424325 n03492542 n03494278 n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032
n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531 n04127249 n04136333 n04229816 n04238763
n04336792 n04418357 n04429376 n04435653 n04485082 n04493381 n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838
n13037406 n13040303
""".split()
)
OBJECTNET13 = {
    "bench": "n03891251",
    "bottle_cap": "n02877765",
    "chair": "n04099969",
    "helmet": "n03379051",
    "iron_for_clothes": "n03584829",
    "jeans": "n03594734",
    "keyboard": "n03085013",
    "lampshade": "n03637318",
    "laptop_open": "n03642806",
    "mixing_salad_bowl": "n03775546",
    "safety_pin": "n04127249",
    "vacuum_cleaner": "n04517823",
    "wheel": "n02974003",
}
IMAGENETC = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}

# name: ({split: (classes, pictures)}, where to get it); None where no count is published for these classes
PUBLISHED = {
    "imagenet100": (
        {"train": (100, 126_689), "val": (100, 5_000)},
        "https://image-net.org/challenges/LSVRC/2012 (train, val and the devkit)",
    ),
    "inat2019": (
        {"train": (1010, 265_213), "val": (1010, 3_030)},
        "https://github.com/visipedia/inat_comp/tree/master/2019",
    ),
    "cub200": (
        {"train": (200, 5_994), "test": (200, 5_794)},
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
    ),
    "flowers102": (
        {"train": (102, 1_020), "val": (102, 1_020), "test": (102, 6_149)},
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102 (or --download)",
    ),
    "objectnet13": ({"test": (13, None)}, "https://objectnet.dev"),
    "imagenetc100": (
        {
            f"{corruption}/{severity}": (100, 5_000)
            for names in IMAGENETC.values()
            for corruption in names
            for severity in range(1, 6)
        },
        "https://zenodo.org/records/2235448",
    ),
}
NAMES = ("factors", "folder", *PUBLISHED, *TORCHVISION)


def published(name, split, root):
    """One of the paper's data sets in the layout it is downloaded in -> paths, labels, class names; the paths need not exist."""
    try:
        chosen, classes = READERS[name](check_choice("split", split, dataset_splits(name)), root)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{root}: its tables cannot be read as those of {name} ({type(error).__name__}: {error}); get them at {PUBLISHED[name][1]}"
        ) from None
    if not chosen:
        raise UserError(f"{root}: no pictures of {name} here; get it at {PUBLISHED[name][1]}")
    return *zip(*sorted(chosen, key=lambda one: one[0])), classes


def imagenet100(split, root):
    """The 100 classes out of a tree of them or of all ImageNet, train/WNID/*.JPEG and val/WNID/*.JPEG. val may also lie flat, as in
    its archive: then the devkit (or Kaggle's LOC_val_solution.csv) beside it says what is what."""
    top = first_existing(
        "imagenet100",
        root,
        split,
        f"ILSVRC/Data/CLS-LOC/{split}",
        f"Data/CLS-LOC/{split}",
        f"ILSVRC2012_img_{split}",
    )
    if split == "train" or any((top / wnid).is_dir() for wnid in IMAGENET100):
        return by_wnid(top), IMAGENET100
    label = {wnid: i for i, wnid in enumerate(IMAGENET100)}
    truth = first_existing(
        "imagenet100",
        root,
        "LOC_val_solution.csv",
        *(
            f"{kit}/ILSVRC2012_validation_ground_truth.txt"
            for kit in ("ILSVRC2012_devkit_t12/data", "data")
        ),
    )
    if truth.suffix == ".txt":
        ground = map(int, truth.read_text().split())
        wnid = {
            int(one["ILSVRC2012_ID"][0]): one["WNID"]
            for one in read_mat(truth.with_name("meta.mat"))["synsets"]
        }
        named = {f"ILSVRC2012_val_{i:08d}": wnid[c] for i, c in enumerate(ground, 1)}
    else:
        named = {
            line.split(",")[0]: line.split(",")[1].split()[0]
            for line in truth.read_text().splitlines()[1:]
        }
    return [
        (top / f"{stem}.JPEG", label[c]) for stem, c in named.items() if c in label
    ], IMAGENET100


def inat2019(split, root):
    """train2019.json and val2019.json, as COCO: pictures, species and what belongs together, joined by id."""
    table = json.loads(first_existing("inat2019", root, f"{split}2019.json").read_text())
    species = sorted((c["id"], c["name"]) for c in table["categories"])
    label, category = (
        {c: i for i, (c, _) in enumerate(species)},
        {a["image_id"]: a["category_id"] for a in table["annotations"]},
    )
    return [(root / one["file_name"], label[category[one["id"]]]) for one in table["images"]], [
        name for _, name in species
    ]


def cub200(split, root):
    """CUB-200-2011's tables, joined by picture id; its classes count from 1."""
    top = first_existing("cub200", root, "images.txt", "CUB_200_2011/images.txt").parent
    table = lambda name: dict(
        line.split(maxsplit=1)
        for line in first_existing("cub200", top, name).read_text().splitlines()
    )
    train, species = table("train_test_split.txt"), table("image_class_labels.txt")
    return (
        [
            (top / "images" / file, int(species[i]) - 1)
            for i, file in table("images.txt").items()
            if (train[i] == "1") == (split == "train")
        ],
        [name for _, name in sorted(table("classes.txt").items(), key=lambda one: int(one[0]))],
    )


def flowers102(split, root):
    """Flowers-102: setid.mat numbers the pictures of a split, imagelabels.mat their classes, both from 1."""
    top = first_existing("flowers102", root, "setid.mat", "flowers-102/setid.mat").parent
    names = getattr(
        torchvision.datasets.Flowers102, "classes", range(1, 103)
    )  # since torchvision 0.22
    ids = read_mat(top / "setid.mat")[{"train": "trnid", "val": "valid", "test": "tstid"}[split]]
    labels = read_mat(first_existing("flowers102", top, "imagelabels.mat"))["labels"]
    return [
        (top / "jpg" / f"image_{int(i):05d}.jpg", int(labels[int(i) - 1]) - 1) for i in ids
    ], names


def objectnet13(split, root):
    """The 13 folders of ObjectNet whose classes are in IN-100, with IN-100's labels."""
    top = first_existing(
        "objectnet13", root, "images/bench", "objectnet-1.0/images/bench", "bench"
    ).parent
    return [
        (p, IMAGENET100.index(wnid))
        for name, wnid in OBJECTNET13.items()
        for p in image_paths(top / name)
    ], IMAGENET100


def imagenetc100(split, root):
    """The 100 classes out of ImageNet-C; split names a corruption and its severity. Some archives have a folder a category above."""
    category = next(c for c, names in IMAGENETC.items() if split.split("/")[0] in names)
    top = first_existing("imagenetc100", root, split, f"{category}/{split}")
    return by_wnid(top), IMAGENET100


def by_wnid(top):
    """top/WNID/* of the 100 classes -> (path, label) pairs."""
    return [
        (p, i)
        for i, wnid in enumerate(IMAGENET100)
        if (top / wnid).is_dir()
        for p in image_paths(top / wnid)
    ]


READERS = {
    f.__name__: f for f in (imagenet100, inat2019, cub200, flowers102, objectnet13, imagenetc100)
}


def first_existing(name, root, *places):
    """The first of root/place that exists, else UserError."""
    found = next((root / place for place in places if (root / place).exists()), None)
    if not found:
        raise UserError(
            f"{root}: expected {' or '.join(places)} in it, as --data={name} has it from {PUBLISHED[name][1]}"
        )
    return found


def missing_files(paths):
    """The paths that do not exist, found by one listing a folder."""
    listing = functools.lru_cache(None)(
        lambda folder: set(os.listdir(folder)) if folder.is_dir() else set()
    )
    return [p for p in paths if p.name not in listing(p.parent)]


def check_complete(name, split, paths, labels):
    """UserError unless all pictures of the published set are there: half a set gives a number that means nothing."""
    classes, count = PUBLISHED[name][0][split]
    if missing := missing_files(paths):
        raise UserError(
            f"{name} {split}: {len(missing)} of {len(paths)} pictures are missing, the first is {missing[0]}; get them at {PUBLISHED[name][1]}"
        )
    if len(set(labels)) != classes or count and len(paths) != count:
        raise UserError(
            f"{name} {split}: found {len(paths)} pictures of {len(set(labels))} classes under {paths[0].parent.parent}, published are "
            f"{count or 'pictures'} of {classes}; `python data.py check --data={name} --root=DIR` says more"
        )


def fetch_archives(name, root):
    """--download of the published sets: Flowers-102 through torchvision, the others have conditions to agree to, or a form. -> root"""
    if name != "flowers102":
        raise UserError(
            f"--download: --data={name} cannot be fetched by itself; get it at {PUBLISHED[name][1]}"
            if name in PUBLISHED
            else f"--download: --data={name} is yours to provide"
        )
    Path(root).mkdir(parents=True, exist_ok=True)
    try:
        torchvision.datasets.Flowers102(root, download=True)
    except ModuleNotFoundError:  # all is fetched when it looks for scipy
        pass
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--download: {first_line(error)}; get it at {PUBLISHED[name][1]}"
        ) from None
    return root


MAT_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}


def read_mat(path):
    """A MATLAB 5 file -> {name: value}: numbers as a flat list, text as str, a struct array as a list of dicts. (For it alone scipy
    would be one package more.)"""

    def elements(data):
        at = 0
        while at + 8 <= len(data):
            kind, size = struct.unpack_from("<II", data, at)
            if kind >> 16:  # small: type and size share four bytes, the value has the other four
                yield kind & 0xFFFF, data[at + 4 : at + 4 + (kind >> 16)]
                at += 8
            else:
                yield kind, data[at + 8 : at + 8 + size]
                at += 8 + size + (-size % 8 if kind != 15 else 0)

    def numbers(kind, data):
        if kind in (16, 17):
            return data.decode("utf-8" if kind == 16 else "utf-16-le")
        return [x for (x,) in struct.iter_unpack("<" + MAT_NUMBERS[kind], data)]

    def array(data):
        (_, flags), (_, shape), (_, name), *rest = elements(data)
        kind = flags[0]
        if kind == 2:  # struct: the fields of one after another
            (_, width), (_, fields), *values = rest
            (width,) = struct.unpack("<I", width)
            fields = [
                fields[i : i + width].rstrip(b"\0").decode() for i in range(0, len(fields), width)
            ]
            values = [array(value)[1] for _, value in values]
            value = [
                dict(zip(fields, values[i : i + len(fields)]))
                for i in range(0, len(values), len(fields))
            ]
        else:
            value = numbers(*rest[0]) if rest else []
            value = "".join(map(chr, value)) if kind == 4 and not isinstance(value, str) else value
        return name.decode(), value

    try:
        content = Path(path).read_bytes()[128:]
        inner = [
            next(elements(zlib.decompress(data))) if kind == 15 else (kind, data)
            for kind, data in elements(content)
        ]
        return dict(array(data) for kind, data in inner if kind == 14)
    except (
        OSError,
        struct.error,
        zlib.error,
        ValueError,
        KeyError,
        IndexError,
        StopIteration,
    ) as error:
        raise UserError(
            f"{path}: cannot be read as a MATLAB 5 file ({type(error).__name__}); download it again"
        ) from None


def check(data: str = "factors", root: str = None, sample: int = 64, download: bool = False):
    """Is a data set whole? Counts classes and pictures of each split against the published numbers and opens a sample of the files.

    Args:
        data: imagenet100, inat2019, cub200, flowers102, objectnet13, imagenetc100, folder or a torchvision set
        root: where it is
        sample: files of each split to open
        download: let torchvision fetch the data
    """
    if sample < 1:
        raise UserError(f"--sample={sample}: expected 1 or more")
    wrong, all_splits = [], dataset_splits(check_choice("data", data, NAMES), root)
    if data in PUBLISHED and not download:
        check_root(root, data)
    print(
        "| split | classes | published | pictures | published | missing | opened |\n"
        + "|---" * 7
        + "|"
    )
    for split in all_splits:
        classes, count = PUBLISHED[data][0][split] if data in PUBLISHED else (None, None)
        try:
            found = open_dataset(data, split, root=root, download=download, whole=False)
        except UserError as error:
            wrong.append(str(error))
            print(f"| {split} | 0 | {classes or '-'} | 0 | {count or '-'} | all | - |")
            continue
        n, seen = len(found.images), len(found.labels[next(iter(found.labels))].unique())
        missing = missing_files(found.images.source) if data in PUBLISHED else []
        opened = range(0, 0 if torch.is_tensor(found.images) else n, max(1, n // sample))
        errors = [error for i in opened if (error := found.images[i][2])]
        print(
            f"| {split} | {seen} | {classes or '-'} | {n - len(missing)} | {count or '-'} | {len(missing)} | {len(opened) - len(errors)} of {len(opened)} |",
            flush=True,
        )
        if missing:
            wrong.append(f"{split}: {len(missing)} pictures are missing, the first is {missing[0]}")
        if classes not in (None, seen):
            wrong.append(f"{split}: {seen} classes, published are {classes}")
        if count not in (None, n):
            wrong.append(f"{split}: {n} pictures, published are {count}")
        wrong += errors
    if wrong:
        where = (
            f"; get it at {PUBLISHED[data][1]}"
            if data in PUBLISHED and PUBLISHED[data][1] not in wrong[0]
            else ""
        )
        raise UserError(
            f"{data} is not whole: {wrong[0]}"
            + f" (and {len(wrong) - 1} more findings)" * (len(wrong) > 1)
            + where
        )
    print(
        f"{data} is whole"
        if data in PUBLISHED
        else f"{data}: every file that was opened is a picture"
    )


# ---------------------------------------------------------------- the command line, for all three modules


def suggest(word, words):
    """ "did you mean ...? " with the nearest of words, or nothing where none is near."""
    return "".join(
        f"did you mean {near}? " for near in difflib.get_close_matches(str(word), words, 1, 0.6)
    )


def check_choice(flag, word, words):
    """word if it is one of words, else UserError with the nearest."""
    if word not in words:
        hint = (
            f"did you mean --data=folder --root={word}? "
            if flag == "data" and Path(str(word)).is_dir()
            else suggest(word, words)
        )
        raise UserError(f"--{flag}={word}: {hint}expected one of {', '.join(words)}")
    return word


def parse_bool(text):
    return {"true": True, "false": False}[text.lower()]


def parse_list(text):
    return tuple(w for w in text.split(",") if w)


PARSERS = {
    int: (int, "a whole number"),
    float: (float, "a number, such as 0.03"),
    bool: (parse_bool, "true or false"),
    tuple: (parse_list, "words with commas between"),
    str: (str, "text"),
}


def command_line(commands, argv=None):
    """Run commands[argv[0]] with the flags in argv. All flags are checked against the function's signature, and typed by it,
    before anything runs; UserError becomes one line and exit code 2."""
    # `finally` shall remove what is half written. (Other ranks write nothing, and a handler would wait until rank 0 comes.)
    if (
        os.environ.get("RANK", "0") == "0"
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        and threading.current_thread() is threading.main_thread()
    ):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    argv = ["--help" if word == "-h" else word for word in (sys.argv[1:] if argv is None else argv)]
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in commands:
            raise UserError(
                f"{argv[0]}: no such command; {suggest(argv[0], commands)}there are {', '.join(commands)}"
            )
        if argv and argv[0] in commands and "--help" not in argv:
            check_flags(argv[0], inspect.signature(commands[argv[0]]).parameters, argv[1:])
        command = fire.Fire(
            {name: bound(f) for name, f in commands.items()},
            argv,
            name=Path(sys.argv[0]).name,
            serialize=lambda _: None,
        )
        if isinstance(command, Bound):
            command.call()
    except (
        UserError,
        OSError,
    ) as error:  # OSError: a full disk, a folder that may not be written to
        if (
            os.environ.get("RANK", "0") != "0"
        ):  # mostly the same error as rank 0's; torchrun ends the others when one ends, so it is said once
            time.sleep(5)
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(getattr(error, "code", 2)) from None


def check_flags(command, parameters, argv):
    for before, word in zip(["", *argv], argv):
        if not word.startswith("--"):
            value = before.startswith("--") and "=" not in before  # --flag value
            if not value and (word.startswith("-") or "=" in word):
                raise UserError(f"{word}: flags begin with two dashes, as in --{word.lstrip('-')}")
            continue
        flag = word[2:].partition("=")[0].replace("-", "_")
        if flag not in parameters and not (flag.startswith("no") and flag[2:] in parameters):
            flags = ["--" + p for p in parameters]
            raise UserError(
                f"--{flag}: {command} has no such flag; "
                + (suggest("--" + flag, flags).strip() or f"it has {', '.join(flags)}")
            )


class Bound(NamedTuple):
    """A call to make later. (fire would make it at once if this were callable.)"""

    call: functools.partial


def bound(function):
    """The function as fire should see it: its flags typed by its signature, and a call that only binds them. So a word that
    fire cannot place stops the program before it trains, not after."""

    @functools.wraps(function)
    def bind(*args, **flags):
        return Bound(functools.partial(function, *args, **flags))

    def parser(flag, kind):
        convert, expected = PARSERS[kind]

        def parse(text):
            try:
                return convert(text)
            except (ValueError, KeyError):
                raise UserError(f"--{flag}={text}: expected {expected}") from None

        return parse

    return fire.decorators.SetParseFns(
        **{
            name: parser(name, p.annotation)
            for name, p in inspect.signature(function).parameters.items()
        }
    )(bind)


def resolve_device(flag):
    """ "auto", "cpu", "cuda" or "cuda:1" -> the device's name; UserError where this machine has none."""
    kind, _, index = flag.partition(":")
    check_choice("device", kind, ("auto", "cpu", "cuda"))
    count = torch.cuda.device_count()
    if kind == "cuda" and (index or "0") not in map(str, range(count)):
        raise UserError(
            f"--device={flag}: this machine shows {count} CUDA devices; leave the flag out, or --device=cpu"
        )
    if kind == "cpu" or not count:
        return "cpu"
    local = os.environ.get("LOCAL_RANK", "")  # torchrun's: one process a device
    if local and not index and int(local) >= count:
        raise UserError(
            f"--nproc-per-node: this machine shows {count} CUDA devices, and process {local} has none; start at most {count}"
        )
    return f"cuda:{index or local}" if index or local else "cuda"


def read_tensors(path, device="cpu"):
    """A file of torch.save; no code in it is run. UserError when it is not whole."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # cut short, not a checkpoint, or a pickle that would run code: torch raises what it likes
        raise UserError(f"{path} is cut short, or not ours ({first_line(error)})") from None


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def write_tensors(path, content):
    write_atomic(path, functools.partial(torch.save, content))


def write_atomic(path, content, keep=None):
    """Whole or not at all: bytes, or what content(file) writes, to a temporary file beside it, flushed, renamed. What was there before
    goes to `keep`. UserError when it cannot be written: then what was there still is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
    try:
        with open(aside, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
        needs = "" if callable(content) else f", which needs {len(content) / 2**20:.1f} MB"
        raise UserError(
            f"cannot write {path}{needs}: {getattr(error, 'strerror', None) or error}"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def pack(
    data: str = "folder",
    root: str = None,
    out: str = "runs",
    size: int = 224,
    canvas: int = None,
    workers: int = 2,
    download: bool = False,
    seed: int = 0,
):
    """Decode a training set once, to a memory map that every later `python loo.py train --packed=OUT` on it reads (same data, size and canvas).

    Args:
        data: folder, imagenet100 or another set of pictures
        root: where the data is
        out: folder to write to; runs, the default, is where training looks without --packed
        size: side of a view in pixels
        canvas: side of the stored pictures
        workers: processes that decode pictures
        download: let torchvision fetch the data
        seed: of the folder's own split
    """
    if size < 1 or canvas is not None and canvas < 1 or workers < 0:
        raise UserError(
            f"--size={size} --canvas={canvas} --workers={workers}: expected 1 or more, and 0 workers or more"
        )
    if data == "factors":
        raise UserError("--data=factors is drawn by code: there is nothing to decode")
    if data == "folder":
        forbid_inside("out", out, check_root(root))
    found = open_dataset(
        data, "pretrain", root=root, size=size, canvas=canvas, download=download, seed=seed
    )
    begun = time.perf_counter()
    packed = decode_all(found, workers, out, shared=True)
    n, side, seconds = len(packed.images), found.images.side, time.perf_counter() - begun
    print(
        f"{n} pictures of {side} x {side} ({n * 3 * side**2 / 2**30:.2f} GiB) in {out}, in {seconds:.0f} s; train with --data={data}"
        f"{f' --root={root}' if root else ''} --size={size}{f' --canvas={canvas}' if canvas else ''}{f' --seed={seed}' if seed else ''} --packed={out}"
    )


# ---------------------------------------------------------------- pictures for people


def image_grid(images, row_names, column_names, path, zoom=1):
    """images (r k 3 h w) in [0, 1], or uint8 -> a PNG with a name at each row and above each column, written whole or not at all."""
    rows, cols, _, h, w = images.shape
    images = images if images.dtype == torch.uint8 else (images * 255).round().byte()
    images = images.cpu().repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
    left, top, gap = 12 + int(max(map(ImageFont.load_default().getlength, row_names))), 20, 3
    sheet = Image.new(
        "RGB", (left + cols * (w * zoom + gap), top + rows * (h * zoom + gap)), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for j, name in enumerate(column_names):
        pen.text((left + j * (w * zoom + gap), 4), name, fill="black")
    for i, name in enumerate(row_names):
        y = top + i * (h * zoom + gap)
        pen.text((4, y + h * zoom // 2 - 6), name, fill="black")
        for j in range(cols):
            sheet.paste(to_pil_image(images[i, j]), (left + j * (w * zoom + gap), y))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(Path(path), buffer.getvalue())


def sheet(out: str = "docs/factors.png", size: int = 48):
    """A labelled sheet of `factors`: a row for each object, a column for each hue.

    Args:
        out: the picture to write
        size: of each picture in it, in pixels
    """
    if size < 8:
        raise UserError(f"--size={size}: expected 8 or more")
    found = factors("train", size)
    first = [
        [
            ((found.labels["object"] == o) & (found.labels["hue"] == h)).nonzero()[0, 0]
            for h in range(HUES)
        ]
        for o in range(len(OBJECTS))
    ]
    image_grid(
        found.images[torch.tensor(first)], found.classes["object"], found.classes["hue"], out
    )
    print(f"wrote {out}")


if __name__ == "__main__":
    command_line({"sheet": sheet, "check": check, "pack": pack, "stylize": stylize})
