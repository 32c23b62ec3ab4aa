"""Where pixels come from: data sets by name, as fixed-size uint8 canvases. Everything random happens later, on the training device.

    python data.py sheet                       # docs/factors.png, a labelled sheet of the pictures drawn by code
    python data.py sheet --data=folder --root=DIR --out=sheet.png

Axes, one legend for the whole project: b image, v key view, g group, s space, d feature, c embedding (or colour channel),
n queue slot or sample, t trial, h w pixel.
"""
import difflib
import functools
import hashlib
import inspect
import io
import math
import os
import random
import sys
from pathlib import Path
from typing import NamedTuple

import fire
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision.transforms.functional import pil_to_tensor, to_pil_image


fire.decorators.FIRE_METADATA = "_fire"   # under its own name, --help lists it as a sub-command


class UserError(ValueError):
    """Bad input: the command line prints it as one line and exits with code 2."""


class Data(NamedTuple):
    images: torch.Tensor   # (n 3 h w) uint8 canvases, h == w; a picture that is not square is squashed into its canvas
    aspect: torch.Tensor   # (n,) float, width / height of the picture before it was squashed
    labels: dict           # {label: (n,) int64}
    classes: dict          # {label: names of its classes}


def generator(*key):
    """A CPU generator that depends on nothing but `key`, e.g. ("views", seed, step): so any step can be drawn again."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(32))


def batches(n, batch, seed, epoch):
    """The epoch's order of n images -> (steps b) int64, the incomplete last batch dropped."""
    return torch.randperm(n, generator=generator("order", seed, epoch))[: n - n % batch].view(-1, batch)


# ---------------------------------------------------------------- factors: pictures drawn by code from known factors

# An object is up to four tapered strokes (x0, y0, x1, y1, radius0, radius1), y up, folded at x = 0: a flip never changes
# what an object is, and any rotation by a quarter turn does.
OBJECTS = {
    "arrow": [(0, -.85, 0, .55, .12, .12), (0, .7, .55, .2, .15, .12)],
    "tee": [(0, -.8, 0, .6, .15, .15), (0, .65, .7, .65, .17, .17)],
    "tree": [(0, -.85, 0, -.3, .12, .12), (0, -.2, 0, .85, .6, .03)],
    "lollipop": [(0, .4, 0, .4, .45, .45), (0, -.9, 0, .2, .09, .09)],
    "mushroom": [(0, .35, .45, .15, .4, .2), (0, -.75, 0, .1, .2, .16)],
    "cup": [(0, -.6, .4, -.6, .2, .2), (.5, -.5, .6, .7, .17, .13)],
    "fork": [(0, -.9, 0, 0, .14, .14), (0, 0, .5, .3, .14, .14), (.5, .3, .5, .8, .14, .1)],
    "anchor": [(0, -.6, 0, .4, .12, .12), (0, -.7, .7, -.2, .16, .1), (0, .7, 0, .7, .24, .24), (0, .3, .3, .3, .1, .1)],
    "heart": [(0, -.75, .32, .25, .08, .38)],
    "crown": [(0, -.55, .6, -.55, .2, .2), (0, -.4, 0, .55, .2, .05), (.65, -.4, .75, .6, .17, .05)],
    "person": [(0, .65, 0, .65, .26, .26), (0, .3, 0, -.2, .2, .17), (.05, -.2, .3, -.85, .13, .13), (0, .3, .6, -.05, .1, .1)],
    "bell": [(0, .4, 0, -.1, .3, .5), (0, -.45, .65, -.45, .12, .12), (0, -.75, 0, -.75, .17, .17), (0, .8, 0, .8, .1, .1)],
}
TEXTURES = ("plain", "stripes", "checks", "dots")
HUES = 16      # neighbouring bins are 0.0625 of the circle apart: closer than the 0.1 that colour jitter moves
FACTORS = {"train": 8192, "val": 2048, "test": 4096}


def factors(split, size=32, count=None):
    """Pictures of one object each, drawn from known factors -> Data of `count` (FACTORS[split]) pictures (n 3 size size).

    Labels: object (12), hue (16 bins), texture (4 fills), species = object x hue (192). Nuisances: position, scale, tilt,
    light, background, noise. Every object has details of its own (bent strokes, four gray marks), so that an image can be told
    from all others without its colour. Splits are disjoint draws.
    """
    n = count or FACTORS[split]
    g = generator("factors", split)
    rand = lambda *shape, low=0., high=1.: torch.rand(n, *shape, generator=g) * (high - low) + low
    normal = lambda *shape, std=1.: torch.randn(n, *shape, generator=g) * std
    obj, hue, fill = (torch.randint(k, (n,), generator=g) for k in (len(OBJECTS), HUES, len(TEXTURES)))
    table = torch.tensor([(strokes * 4)[:4] for strokes in OBJECTS.values()])   # repeating a stroke draws nothing new
    look = dict(
        strokes=(table[obj] + normal(4, 6) * torch.tensor([.05, .1, .1, .1, .03, .03])) * torch.cat([torch.ones(n, 1, 4), rand(1, 1, low=.6, high=1.5).expand(n, 1, 2)], 2),
        marks=torch.cat([rand(4, 2, low=-.8, high=.8), rand(4, 1, low=.15, high=.3), rand(4, 1)], -1),
        fill=fill, fill_angle=rand(high=math.tau), fill_period=rand(low=.4, high=.9), fill_depth=rand(low=.2, high=.6), fill_shift=rand(2),
        hue=(hue + rand(low=.2, high=.8)) / HUES, saturation=rand(low=.4), value=rand(low=.5),
        centre=normal(2, std=.08), scale=rand(low=.75, high=1.), tilt=normal(std=.2), light=normal(std=.5), relief=rand(low=.2, high=.5),
        ground=torch.stack([rand(), rand(high=.1), rand(low=.25, high=.85)], -1), horizon=normal(std=.3), haze=rand(low=-.02, high=.08))
    noise = generator("noise", split, size)
    images = torch.cat([render({k: v[i:i + 256] for k, v in look.items()}, size, noise) for i in range(0, n, 256)])
    labels = dict(object=obj, hue=hue, texture=fill, species=obj * HUES + hue)
    classes = dict(object=list(OBJECTS), hue=[f"hue {i}" for i in range(HUES)], texture=list(TEXTURES),
                   species=[f"{o} {i}" for o in OBJECTS for i in range(HUES)])
    return Data(images, torch.ones(n), labels, classes)


def render(look, size, noise):
    """One picture for each row of `look` (a dict of (n ...) parameters) -> (n 3 size size) uint8."""
    p = {k: v[..., None, None] for k, v in look.items()}            # (n ... 1 1): parameters broadcast over pixels
    axis = (torch.arange(size) + .5) * 2 / size - 1
    x, y = axis[None, None, :], -axis[None, :, None]                # y is up
    pixel = 2 / size / p["scale"]                                   # one pixel in the object's units: the width of an edge
    u, v = (x - p["centre"][:, 0]) / p["scale"], (y - p["centre"][:, 1]) / p["scale"]
    cos, sin = p["tilt"].cos(), p["tilt"].sin()
    u, v = cos * u + sin * v, cos * v - sin * u                     # the object's own frame, (n h w)

    x0, y0, x1, y1, r0, r1 = p["strokes"].unbind(2)                 # (n 4 1 1) each
    px, py, ax, ay = u.abs()[:, None] - x0, v[:, None] - y0, x1 - x0, y1 - y0
    t = ((px * ax + py * ay) / (ax * ax + ay * ay).clamp(min=1e-6)).clamp(0, 1)
    outside = (torch.hypot(px - t * ax, py - t * ay) - torch.lerp(r0, r1, t)).amin(1)   # distance to the outline, (n h w)
    inside = (.5 - outside / pixel).clamp(0, 1)

    cos, sin = p["fill_angle"].cos(), p["fill_angle"].sin()
    f1 = (cos * u + sin * v) / p["fill_period"] + p["fill_shift"][:, 0]
    f2 = (cos * v - sin * u) / p["fill_period"] + p["fill_shift"][:, 1]
    w1, w2 = (f1 * math.tau).sin(), (f2 * math.tau).sin()
    fills = torch.stack([torch.zeros_like(w1), (3 * w1).tanh(), (5 * w1 * w2).tanh(), (6 * (w1 * w2).abs() - 3).tanh()], 1)
    fill = fills[torch.arange(len(fills)), look["fill"]]

    mx, my, radius, gray = p["marks"].unbind(2)                     # (n 4 1 1) each
    spots = (.5 - (torch.hypot(u[:, None] - mx, v[:, None] - my) - radius) / pixel[:, None]).clamp(0, 1)
    height = (-outside / .3).clamp(-.1, 1)                          # a rounded relief, lit from above
    dy, dx = torch.gradient(height, spacing=2 / size, dim=(1, 2))
    facing = -(dx * p["light"].sin() - dy * p["light"].cos()) * p["scale"] * .3
    body = hsv(p["hue"], p["saturation"], p["value"] * (1 + p["fill_depth"] * fill))
    for spot, shade in zip(spots.unbind(1), gray.unbind(1)):
        body = torch.lerp(body, shade[:, None], spot[:, None])
    body = body * (1 + p["relief"] * facing)[:, None]

    far = ((y - p["horizon"]) * 8).sigmoid()                        # sky above a faint horizon
    under = F.pad(outside, (0, 0, size // 16, 0), value=1e3)[:, :size]
    shadow = (.5 - under / pixel / 3).clamp(0, 1) * .15
    ground = hsv(*p["ground"].unbind(1)) * (1 - shadow + p["haze"] * (far - .5))[:, None]
    image = torch.lerp(ground, body, inside[:, None])
    image = image + .02 * torch.randn(image.shape, generator=noise)
    return (image * 255).round().clamp(0, 255).byte()


def hsv(hue, saturation, value):
    """(n h w) each, broadcast against one another -> rgb (n 3 h w)."""
    k = (torch.tensor([5., 3., 1.])[:, None, None] + (hue * 6)[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


# ---------------------------------------------------------------- data sets by name

# torchvision's own classes, read (and with --download fetched) by them: name: (class, {split: arguments})
TORCHVISION = {
    "cifar10": ("CIFAR10", {"train": dict(train=True), "test": dict(train=False)}),
    "cifar100": ("CIFAR100", {"train": dict(train=True), "test": dict(train=False)}),
    "stl10": ("STL10", {"pretrain": dict(split="train+unlabeled"), "train": dict(split="train"), "test": dict(split="test")}),
    "flowers102": ("Flowers102", {s: dict(split=s) for s in ("train", "val", "test")}),
    "dtd": ("DTD", {s: dict(split=s) for s in ("train", "val", "test")}),
    "pets": ("OxfordIIITPet", {"train": dict(split="trainval"), "test": dict(split="test")}),
    "food101": ("Food101", {"train": dict(split="train"), "test": dict(split="test")}),
}
NAMES = ("factors", "folder", *TORCHVISION)


def load(name, split, *, root=None, size=32, canvas=None, download=False, workers=2, seed=0, cache=None):
    """The `split` ("pretrain", "train", "val" or "test") of a data set -> Data.

    canvas: side of the canvases (default `size`, or 8/7 of it where evaluations take the central 7/8); seed: of the
    folder's own split; cache: a folder for the memory map of a set over 4 GiB. Raises UserError when the data is not there.
    """
    choose("data", name, NAMES)
    if name == "factors":
        if root:
            raise UserError(f"--root={root}: factors is drawn by code and reads no folder; use --data=folder for pictures of your own")
        return factors("train" if split == "pretrain" else split, size)
    fetch, labels, names = (folder if name == "folder" else from_torchvision)(name, split, root=root, download=download, seed=seed)
    images, aspect, labels = canvases(fetch, labels, canvas or round(size / kept(name)), workers, cache and Path(cache) / f"{name}-{split}.canvases")
    return Data(images, aspect, {"class": labels}, {"class": names})


def kept(name):
    """The share of a picture's short side that evaluations look at: all of the sets that are small and centred already."""
    return 1 if name in ("factors", "cifar10", "cifar100") else .875


def splits(name, root=None):
    """The splits a data set has, in order; the last one is what evaluations test on."""
    if name == "folder":
        if not (folder_of(root) / "train").is_dir():
            return ("train", "val")
        others = tuple(s for s in ("val", "test") if (Path(root) / s).is_dir())
        if not others:
            raise UserError(f"{root} has a train folder, so evaluations need a val or test folder beside it")
        return ("train", *others)
    return tuple(FACTORS) if name == "factors" else tuple(s for s in TORCHVISION[name][1] if s != "pretrain")


def folder_of(root):
    if not root or not Path(root).is_dir():
        raise UserError(f"--root={root or ''}: no such folder; --data=folder needs --root=DIR with one sub-folder of pictures for each class")
    return Path(root)


PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def folder(name, split, *, root, seed=0, **_):
    """An ImageFolder tree: root/train and root/val, or one tree of which a seeded hash of each file's relative path keeps 80%
    for train. -> fetch(i) PIL picture, labels, class names."""
    split, root = "train" if split == "pretrain" else split, folder_of(root)
    whole = not (root / "train").is_dir()
    top = root if whole else root / split
    if not top.is_dir():
        raise UserError(f"{top}: no such folder; {root} has a train folder, so it needs {split} beside it")
    named = lambda where: sorted(p.name for p in where.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes, here = named(root if whole else root / "train"), named(top)   # a class has the same number in every split
    for c in here:
        if c not in classes:
            raise UserError(f"{top / c}: a class that {root / 'train'} does not have")
    files = {c: sorted(p for p in (top / c).rglob("*") if p.suffix.lower() in PICTURES) for c in here}
    if not classes:                              # pictures without labels, enough to train on
        classes, files = ["."], {".": sorted(p for p in top.iterdir() if p.suffix.lower() in PICTURES)}
    for c, found in files.items():
        if not found:
            raise UserError(f"{top / c}: no pictures in this folder (expected {', '.join(sorted(PICTURES))})")
    share = lambda path: int(hashlib.sha1(f"{seed}/{path.relative_to(root).as_posix()}".encode()).hexdigest()[:8], 16) / 2 ** 32
    chosen = [(p, i) for i, c in enumerate(classes) for p in files.get(c, ()) if not whole or (share(p) < .8) == (split == "train")]
    if not chosen:
        raise UserError(f"{root}: too few pictures to split into train and val")
    paths, labels = zip(*chosen)
    return functools.partial(read_picture, paths), torch.tensor(labels), classes


def from_torchvision(name, split, *, root=None, download=False, **_):
    """A data set of torchvision's -> fetch(i) PIL picture, labels, class names."""
    kind, arguments = TORCHVISION[name]
    root = root or "downloads"
    arguments = arguments["train"] if split == "pretrain" and split not in arguments else arguments[choose("split", split, tuple(arguments))]
    try:
        found = getattr(torchvision.datasets, kind)(root, download=download, **arguments)
    except ModuleNotFoundError as error:
        raise UserError(f"--data={name}: torchvision needs `pip install {error.name}` to read its labels") from None
    except (RuntimeError, OSError) as error:
        raise UserError(f"--data={name}: not found under {root}; name its folder with --root=DIR or fetch it with --download "
                        f"({str(error).splitlines()[0]})") from None
    labels = next(getattr(found, a) for a in ("targets", "labels", "_labels") if hasattr(found, a))
    labels = torch.as_tensor(labels).long()
    return functools.partial(read_item, found), labels, list(getattr(found, "classes", range(int(labels.max()) + 1)))


def read_item(found, i):
    return upright(found[i][0])


def read_picture(paths, i):
    try:
        with Image.open(paths[i]) as picture:
            return upright(picture)
    except Exception as error:
        raise UserError(f"{paths[i]}: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def upright(picture):
    """A PIL picture of any mode -> RGB, turned as its EXIF orientation says, transparency on white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):             # 16 bits: convert() would clip, not scale
        picture = picture.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


class Canvases(torch.utils.data.Dataset):
    """fetch(i) -> PIL picture, as (canvas (3 h w) uint8, aspect, what was wrong with it or "")."""

    def __init__(self, fetch, n, side):
        self.fetch, self.n, self.side = fetch, n, side

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        try:
            picture = self.fetch(i)
        except Exception as error:               # whatever the reader raises: Pillow alone has OSError, SyntaxError, struct.error, ...
            return torch.zeros(3, self.side, self.side, dtype=torch.uint8), 1., str(error) or type(error).__name__
        canvas = picture.resize((self.side, self.side), Image.Resampling.BICUBIC, reducing_gap=3)
        return pil_to_tensor(canvas), picture.width / picture.height, ""


def canvases(fetch, labels, side, workers, cache):
    """Decode every picture once, in `workers` processes -> images (n 3 side side) uint8, aspect (n,), labels (n,).

    A picture that cannot be read is named in a warning and left out; when none can, UserError.
    """
    n, shape = len(labels), (len(labels), 3, side, side)
    if cache and math.prod(shape) > 4 << 30:
        cache.parent.mkdir(parents=True, exist_ok=True)
        images = torch.from_file(str(cache), shared=True, size=math.prod(shape), dtype=torch.uint8).view(shape)
    else:
        images = torch.empty(shape, dtype=torch.uint8)
    aspect, good = torch.ones(n), torch.ones(n, dtype=torch.bool)
    loader = torch.utils.data.DataLoader(Canvases(fetch, n, side), 64, num_workers=workers if n > 256 else 0)
    at, wrong = 0, []
    for some, shapes, errors in loader:
        rows = slice(at, at := at + len(some))
        images[rows], aspect[rows] = some, shapes.float()
        good[rows] = torch.tensor([not e for e in errors])
        wrong += filter(None, errors)
    if not good.any():
        raise UserError(f"none of the {n} pictures can be read; the first: {wrong[0]}")
    for error in wrong[:5]:
        print(f"warning: skipped {error}", file=sys.stderr)
    if len(wrong) > 5:
        print(f"warning: skipped {len(wrong) - 5} more pictures that cannot be read", file=sys.stderr)
    return (images, aspect, labels) if not wrong else (images[good], aspect[good], labels[good])


# ---------------------------------------------------------------- the command line, for all three modules


def nearest(word, words):
    """ "did you mean ...? " with the nearest of words, or nothing where none is near."""
    return "".join(f"did you mean {near}? " for near in difflib.get_close_matches(str(word), words, 1, .6))


def choose(flag, word, words):
    """word if it is one of words, else UserError with the nearest."""
    if word not in words:
        raise UserError(f"--{flag}={word}: {nearest(word, words)}expected one of {', '.join(words)}")
    return word


def whole(text):
    return int(str(text).replace("_", ""))


def yes(text):
    return {"true": True, "false": False}[str(text).lower()]


def words(text):
    return tuple(w for w in str(text).split(",") if w)


PARSERS = {int: (whole, "a whole number"), float: (float, "a number, such as 0.03"), bool: (yes, "true or false"),
           tuple: (words, "words with commas between"), str: (str, "text")}


def command_line(commands, argv=None):
    """Run commands[argv[0]] with the flags in argv. All flags are checked against the function's signature, and typed by it,
    before anything runs; UserError becomes one line and exit code 2."""
    argv = ["--help" if word == "-h" else word for word in (sys.argv[1:] if argv is None else argv)]
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in commands:
            raise UserError(f"{argv[0]}: no such command; {nearest(argv[0], commands)}there are {', '.join(commands)}")
        if argv and argv[0] in commands and "--help" not in argv:
            check_flags(argv[0], inspect.signature(commands[argv[0]]).parameters, argv[1:])
        command = fire.Fire({name: bound(f) for name, f in commands.items()}, argv, name=Path(sys.argv[0]).name, serialize=lambda _: None)
        if isinstance(command, Bound):
            command.call()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_flags(command, parameters, argv):
    for word in argv:
        if not word.startswith("--"):
            if "=" in word:
                raise UserError(f"{word}: flags begin with two dashes, as in --{word.lstrip('-')}")
            continue
        flag = word[2:].partition("=")[0].replace("-", "_")
        if flag not in parameters and not (flag.startswith("no") and flag[2:] in parameters):
            flags = ["--" + p for p in parameters]
            raise UserError(f"--{flag}: {command} has no such flag; " + (nearest("--" + flag, flags).strip() or f"it has {', '.join(flags)}"))


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

    return fire.decorators.SetParseFns(**{name: parser(name, p.annotation) for name, p in inspect.signature(function).parameters.items()})(bind)


def device_of(flag):
    """"auto", "cpu", "cuda" or "cuda:1" -> the device's name; UserError where this machine has none."""
    kind, _, index = flag.partition(":")
    choose("device", kind, ("auto", "cpu", "cuda"))
    count = torch.cuda.device_count()
    if kind == "cuda" and (not index.isdigit() and index or int(index or 0) >= count):
        raise UserError(f"--device={flag}: this machine shows {count} CUDA devices; leave the flag out, or --device=cpu")
    return flag if kind != "auto" else "cuda" if count else "cpu"


def write(path, content):
    """Whole or not at all: bytes to a temporary file beside it, flushed, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


# ---------------------------------------------------------------- pictures for people


def picture_grid(images, row_names, column_names, path, zoom=1):
    """images (r k 3 h w) in [0, 1], or uint8 -> a PNG with a name at each row and above each column, written whole or not at all."""
    rows, cols, _, h, w = images.shape
    images = images if images.dtype == torch.uint8 else (images * 255).round().byte()
    images = images.cpu().repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
    left, top, gap = 12 + int(max(map(ImageFont.load_default().getlength, row_names))), 20, 3
    sheet = Image.new("RGB", (left + cols * (w * zoom + gap), top + rows * (h * zoom + gap)), "white")
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
    write(Path(path), buffer.getvalue())


def sheet(data: str = "factors", root: str = None, out: str = "docs/factors.png", size: int = 48, columns: int = 16, download: bool = False):
    """A labelled sheet of a data set: a row for each of its first classes, a few of its pictures in each."""
    found = load(data, "train", root=root, size=size, download=download)
    label = next(iter(found.labels))
    names = found.classes[label][:20]
    if data == "factors":
        columns, heads = HUES, found.classes["hue"]
        rows = [[((found.labels["object"] == o) & (found.labels["hue"] == h)).nonzero()[0, 0] for h in range(HUES)] for o in range(len(OBJECTS))]
    else:
        rows = {name: (found.labels[label] == c).nonzero()[:, 0] for c, name in enumerate(names)}
        names = [name for name, r in rows.items() if len(r)]
        rows, heads = [rows[name].repeat(columns)[:columns].tolist() for name in names], [""] * columns
    picture_grid(found.images[torch.tensor(rows)], names, heads, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    command_line({"sheet": sheet})
