"""Images: data sets by name, decoded to uint8 tensors; factors, corruptions, stylized copies.

    python data.py sheet                             # docs/factors.png, images drawn by code
    python data.py check --data=cub200 --root=DIR    # is a downloaded set complete?
    python data.py pack --data=folder --root=DIR     # decode once, for later trainings
    python data.py stylize --data=folder --root=DIR  # copies in another texture

All random augmentation happens later, on the training device.
Axes: b image of a batch, n image of a set, c color channel, f filter, h w pixel; in corruptions
also k kernel, t point along a motion. A function's g is its torch.Generator.
"""

import contextlib
import csv
import difflib
import errno
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import numbers
import os
import pickle
import re
import shlex
import signal
import struct
import sys
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import fire
import torch
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL import TiffImagePlugin as tiff
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor, resize, rgb_to_grayscale, to_pil_image
from torchvision.transforms.v2 import functional as v2

import loo
from loo import UserError, first_line, make_generator, typed, uniform

# ---------------------------------------------------------------- data sets by name


class ImageSet(NamedTuple):
    """Images with labels. `open_dataset` gives files, `decode_all` makes a tensor of them."""

    # (n 3 h w) uint8, h == w: squashed if not square, or the central crop. Or ImageFiles.
    images: torch.Tensor
    aspect: torch.Tensor  # (n,) float, width / height before squashing; 1 until it is decoded
    labels: dict  # {label: (n,) int64}, -1 where an image does not have the label
    classes: dict  # {label: class names}
    unreadable: tuple = ()  # indices of images that could not be read and were left out
    textures: torch.Tensor = None  # (n copy 3 h w) uint8, stylized copies of the images
    held: dict = {}  # {flag of a folder: [number of files that were read from it, fingerprint]}


class Source(NamedTuple):
    """A row of the table of data sets."""

    # {split: (classes, images)} as published, None for an unknown count; {split: None} of factors;
    # {split: arguments of its class} of a torchvision set
    splits: dict
    address: str = ""  # where to get a published set
    crop_pct: float = 0.875  # share of the short side that evaluations see
    border: int = 0  # pixels to cut off at each side
    torchvision: str = ""  # torchvision's class, which reads the set and can download it
    fetched: str = ""  # the folder that --download leaves in `downloads`


IMAGENETC = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTED = [f"{c}/{i}" for names in IMAGENETC.values() for c in names for i in range(1, 6)]
TRAIN_FLAG = {"train": dict(train=True), "test": dict(train=False)}
SPLIT_FLAG = {split: dict(split=split) for split in ("train", "val", "test")}
TRAIN_TEST = {split: SPLIT_FLAG[split] for split in ("train", "test")}

DATASETS = {
    "factors": Source(dict.fromkeys(("train", "val", "test")), crop_pct=1),
    "folder": Source({}),
    "imagenet100": Source(
        {"train": (100, 126_689), "val": (100, 5_000)},
        "https://image-net.org/challenges/LSVRC/2012 (train, val and the devkit)",
    ),
    "inat2019": Source(
        {"train": (1010, 265_213), "val": (1010, 3_030)},
        "https://github.com/visipedia/inat_comp/tree/master/2019",
    ),
    "cub200": Source(
        {"train": (200, 5_994), "test": (200, 5_794)},
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
    ),
    "flowers102": Source(
        {"train": (102, 1_020), "val": (102, 1_020), "test": (102, 6_149)},
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102 (or --download)",
        fetched="flowers-102",
    ),
    # its images have a red border
    "objectnet13": Source({"test": (13, None)}, "https://objectnet.dev", border=2),
    "imagenetc100": Source(
        dict.fromkeys(CORRUPTED, (100, 5_000)), "https://zenodo.org/records/2235448", crop_pct=1
    ),
    "cifar10": Source(TRAIN_FLAG, crop_pct=1, torchvision="CIFAR10"),
    "cifar100": Source(TRAIN_FLAG, crop_pct=1, torchvision="CIFAR100"),
    "fashion_mnist": Source(TRAIN_FLAG, crop_pct=1, torchvision="FashionMNIST"),
    "stl10": Source({"pretrain": dict(split="train+unlabeled")} | TRAIN_TEST, torchvision="STL10"),
    "dtd": Source(SPLIT_FLAG, torchvision="DTD"),
    "pets": Source(TRAIN_TEST | {"train": dict(split="trainval")}, torchvision="OxfordIIITPet"),
    "food101": Source(TRAIN_TEST, torchvision="Food101"),
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
    split_seed=0,
    whole=True,
):
    """A split ("pretrain", "train", "val" or "test") -> ImageSet of files (of `factors`: drawn).

    For training, each whole image, squashed to side `canvas` (default: so large that its central
    crop has side `size`). For evaluation (central=True), the central crop alone, (3 size size).
    split_seed: of the folder's own split. whole=False accepts an incomplete published set.
    Raises UserError when the data is not there."""
    source = DATASETS[check_choice("data", name, DATASETS)]
    if split == "pretrain" and split not in source.splits:
        split = "train"
    if name == "factors":
        if root:
            raise UserError(f"--root={root}: factors reads no folder; your images: --data=folder")
        return factors(split, size)
    check_choice("split", split, source.splits or SPLITS)
    if source.torchvision:
        read = read_item
        files, labels, classes = from_torchvision(name, split, root, download)
    else:
        read = functools.partial(read_image, border=source.border)
        if download:
            root = fetch_archives(name, root)
        root = check_root(root, name)
        if name == "folder":
            read_folder = table_folder if has_table(root) else image_folder
            files, labels, classes = read_folder(split, root, split_seed)
        else:
            files, labels, classes = published(name, split, root)
            if whole and (problems := incomplete(name, split, files, labels)):
                raise UserError(f"{name} {problems[0]}; get it at {source.address}")
    canvas = canvas or round(size / source.crop_pct)
    side, crop_pct = (size, source.crop_pct) if central else (canvas, None)
    advice = "download it again, an incomplete published set gives meaningless numbers"
    images = ImageFiles(files, read, side, crop_pct, advice if source.address else "")
    if not isinstance(labels, dict):
        labels, classes = {"class": labels}, {"class": list(classes)}
    labels = {label: torch.as_tensor(y).long() for label, y in labels.items()}
    return ImageSet(images, torch.ones(len(images)), labels, classes)


def dataset_splits(name, root=None, split_seed=0):
    """The splits a data set has, in order; evaluations test on the last one."""
    if name != "folder":
        return tuple(split for split in DATASETS[name].splits if split != "pretrain")
    root = check_root(root)
    if has_table(root):
        found = {row["split"] for row in read_table(root, split_seed)[1].values()}
    else:
        found = split_folders(root) or ("train", "val")
    return tuple(split for split in SPLITS if split in {"train", *found})


def label_names(classes):
    """classes {label: class names} -> the labels with more than one class."""
    return [label for label, names in classes.items() if len(names) > 1]


def check_root(root, name="folder"):
    """The data set's folder as a Path; UserError when it does not exist."""
    source = DATASETS[name]
    if source.fetched and Path("downloads", source.fetched).is_dir():
        root = root or "downloads"
    if not root or not Path(root).is_dir():
        problem = f"--root={root}: no such folder; " if root else ""
        content = f"one sub-folder of images for each class, or a {TABLE}"
        if source.address:
            content = f"what {source.address} gives"
        raise UserError(f"{problem}--data={name} needs --root=DIR with {content}")
    return Path(root)


def forbid_inside(out, root):
    """UserError where folder `out` lies in a tree of classes and would become one of them."""
    folder, tree = Path(out).resolve(), Path(root).resolve()
    splits = {} if has_table(tree) else split_folders(tree)
    for top in splits.values() if len(splits) > 1 else [tree]:
        if folder.is_relative_to(top) and not is_hidden(*folder.relative_to(top).parts):
            raise UserError(f"--out={out} would be read as a class of {root}: choose one outside")


# ---------------------------------------------------------------- reading and decoding

logging.getLogger("PIL").setLevel(logging.CRITICAL)  # read_image says what is wrong
Image.MAX_IMAGE_PIXELS = None  # open_image has a limit that can be lifted
MEGAPIXELS = 64  # of an image; decoded, as RGBA and on white they take 1 GB

Image.init()
# no pixels of their own, or another program is started
NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
FORMATS = tuple(set(Image.OPEN) & set(Image.registered_extensions().values()) - NOT_IMAGES)
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
SUFFIXES |= {".mpo"}  # opened as JPEG
# what systems leave in folders, in lower case
SYSTEM_FILES = {"@eadir", "#recycle", "__macosx", "$recycle.bin", "system volume information"}
SYSTEM_FILES |= {"lost+found", "thumbs.db", "desktop.ini", "recycler", "network trash folder"}
SYSTEM_FILES |= {"temporary items", "#snapshot", "@recently-snapshot", "@tmp"}


def is_hidden(*names):
    return any(name.startswith(".") or name.lower() in SYSTEM_FILES for name in names)


def files_below(top, above=()):
    """Yield the files in a folder and below, sorted, no hidden ones; links are followed, no loops.

    above: the real paths of the folders that `top` is in."""
    above = *above, os.path.realpath(top)
    for path in sorted(top.iterdir()) if top.is_dir() else ():
        if is_hidden(path.name):
            continue
        if not path.is_dir():
            yield path
        elif os.path.realpath(path) not in above:
            yield from files_below(path, above)


def is_image(path):
    """Is this an image by its name? Also a broken link, which reading then names; no device."""
    return path.suffix.lower() in SUFFIXES and (path.is_file() or not path.exists())


def image_paths(top):
    """The image files in a folder and below, sorted."""
    return list_files(top)[0]


def list_files(top):
    """The files in a folder and below, sorted -> the images, all others."""
    images, others = [], []
    for path in files_below(top):
        kind = images if is_image(path) else others
        kind.append(path)
    return images, others


def sub_folders(top):
    return sorted(p.name for p in top.iterdir() if p.is_dir() and not is_hidden(p.name))


def class_folders(top):
    """The folders in which something is an image, or nothing is anything -> {name: folder}."""

    def is_class(path):
        found = map(is_image, files_below(path))
        first = next(found, None)
        return first is None or first or any(found)

    return {composed(name): top / name for name in sub_folders(top) if is_class(top / name)}


def composed(name):
    """A name in which é is one character: some systems make two of it."""
    return unicodedata.normalize("NFC", name)


def split_folders(root):
    """The folders of a root's splits -> {split: folder}; {} where its folders are classes.

    They are splits where one for training stands beside another and what else their names say, as
    seg in seg_train and seg_test, is the same; where all are named so and no more; and where one
    for training stands beside another, the names of all begin so and all hold folders."""
    names = sub_folders(root) if root.is_dir() else []
    named = defaultdict(list)  # {rest of the name: [(split, name), ...]}
    for name in names:
        split, rest = split_and_rest(name)
        if split:
            named[rest].append((split, name))
    sets = [pairs for pairs in named.values() if {"train"} < dict(pairs).keys()]
    if not sets and len(named[""]) == len(names):
        sets = [named[""]]
    if not sets and all(sub_folders(root / name) for name in names):
        leading = [(split_of(first_word(name)), name) for name in names]
        found = dict(leading).keys()
        if {"train"} < found and None not in found:
            sets = [leading]
    splits = {}
    for split, name in itertools.chain(*sets):
        if split in splits:
            both = f"{splits[split].name} and {name}"
            raise UserError(f"{root}: {both} are both for {split}: join them, or rename classes")
        splits[split] = root / name
    return splits


def first_word(name):
    """The first letters of a name in a row, in lower case: "train" of 1-Train_2023."""
    return re.match("[^a-z]*([a-z]*)", name.lower())[1]


def split_and_rest(name):
    """The split that a folder's name means, or None; its other words: "test", "seg" of segTest."""
    if split_of(name):
        return split_of(name), ""
    name = re.sub(r"(?i)(train|test)(?![a-z])", r" \1", name)  # of xtrain and xtest
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)
    for i, word in enumerate(words):
        if split_of(word):
            rest = " ".join(words[:i] + words[i + 1 :])
            return split_of(word), re.sub(r"^\d+ ?", "", rest)  # a number in front only sorts
    return None, name


def inner_folder(top, classes=(), flat=False):
    """Enter folders that stand alone, but for files that are no images, while they hold folders.

    One that holds images too is not entered, nor one of `classes`. flat: enter one that holds
    images alone if it has the name of the folder above, as in train/train."""
    while True:
        shown = (path for path in top.iterdir() if not is_hidden(path.name))
        inside = [*itertools.islice((p for p in shown if p.is_dir() or is_image(p)), 2)]
        if len(inside) != 1 or not inside[0].is_dir() or composed(inside[0].name) in classes:
            return top
        path = inside[0]
        has_images, has_folders = any(map(is_image, path.iterdir())), bool(sub_folders(path))
        if has_images == has_folders or (has_images and not (flat and path.name == top.name)):
            return top
        top = path


def image_folder(split, root, seed=0):
    """An ImageFolder tree -> paths, labels, class names.

    Either root/train and root/val, or one tree: a seeded hash of each path keeps 80% for train, and
    val and test are the same 20%."""
    splits = split_folders(root)
    for name in ("train", split):
        if splits and name not in splits:
            raise UserError(f"{root}: no folder {name}, beside {', '.join(splits)} it needs one")
    outer, flat = splits.get("train", root), bool(splits)
    train = inner_folder(outer, flat=flat)
    in_train = class_folders(train)
    top, here = train, in_train
    if splits and split != "train":
        outer = splits[split]
        top = inner_folder(outer, in_train, flat)
        here = class_folders(top)
    classes = sorted(in_train)  # a class has the same number in every split
    if new := sorted(here.keys() - in_train.keys()):
        raise UserError(f"{here[new[0]]}: a class that {train} does not have; add it there")
    if classes and not here:
        raise UserError(f"{top}: no sub-folders; it needs those of {train}, one for each class")
    check_further_splits(top, here, splits)
    if top.name != outer.name:
        warn_once(f"{outer}: its classes are the folders in {top}")
    if lost := len(classes) - len(here):
        warn_once(f"{top}, label class: {lost} of the {len(classes)} classes have no image")
    warn_odd_classes(f"{top}, label class", classes)
    images, others = list_files(outer)
    files, inner = defaultdict(list), defaultdict(set)  # of each class: images, sub-folders
    for path in images:
        name, *below = map(composed, path.relative_to(top).parts)
        name = name if below else "."
        files[name].append(path)
        inner[name].update(below[:-1][:1])
    flat = files.pop(".", []) if classes else []
    if len(flat) > max(1, sum(map(len, files.values())) // 100):
        problem = f"{len(flat)} images lie beside the folders {', '.join(list(here)[:5])}"
        raise UserError(f"{top}: {problem}: put them into a class, or move them or the folders")
    check_class_folders(top, here, files, inner)
    if strange := [path.name for path in files["."] if "\\" in path.name]:
        hint = "was the zip packed on Windows? `unzip` makes folders of these"
        warn_once(f"{top}: {len(strange)} names have backslashes, as {strange[0]}: {hint}")
    others += flat
    if splits and split == "train":
        for path in set(root.iterdir()) - set(splits.values()):
            if not is_hidden(path.name):
                others += files_below(path) if path.is_dir() else [path]
    warn_left_out(root, others)
    classes = classes or ["."]  # images without labels, enough to train on
    for name, place in (here or {".": top}).items():
        if not files[name]:
            raise UserError(f"{place}: no images; put some there (JPEG, PNG) or remove the folder")
    pairs = [(path, i) for i, name in enumerate(classes) for path in files.get(name, ())]
    if not splits:
        keys = [path.relative_to(train).as_posix() for path, _ in pairs]  # of any --root above
        sides = hashed_splits(keys, seed).values()
        warn_missing_classes(root, "class", sides, [i for _, i in pairs])
        side = "train" if split == "train" else "val"
        pairs = [pair for pair, its_side in zip(pairs, sides) if its_side == side]
    if not pairs:
        raise UserError(f"{root}: too few images to split into train and val")
    paths, labels = zip(*pairs)
    return paths, labels, classes


def check_further_splits(top, here, splits):
    """UserError where a folder of splits was taken for one of classes {name: folder}."""
    # Classes are built alike: a look into three will do.
    places = [place for place in (top, *list(here.values())[:3]) if place not in splits.values()]
    places = [*map(inner_folder, places)]
    further = [place for place in dict.fromkeys(places) if len(split_folders(place)) > 1]
    if len(further) > 1 and top not in further:
        both = " and ".join(str(place.relative_to(top)) for place in further[:2])
        advice = f"put the classes into the splits, as train/{further[0].relative_to(top).parts[0]}"
        raise UserError(f"{top}: {both} have splits of their own: {advice}, or write a {TABLE}")
    if further:
        raise UserError(f"the splits are in {further[0]}: --root={further[0]}")


MASK = r"[ _-](mask|seg|gt|label)\w*$"  # how the name of a mask ends


def check_class_folders(top, here, files, inner):
    """Warn of folders that are hardly classes; UserError for one that holds the others again.

    here {name: folder}, files {name: images in it and below}, inner {name: its sub-folders}."""
    again = {name: sorted(inner[name] & here.keys() - {name}) for name in here}
    holders = [name for name in here if again[name]]
    for name in holders if len(holders) < len(here) else ():
        problem = f"{here[name]} holds {', '.join(again[name][:3])} again, classes beside it"
        if split_of(name) or (len(holders) == 1 and len(again[name]) > 1):
            raise UserError(f"{problem}: move it elsewhere, or name the splits train and test")
        warn_once(problem, kind="again")
    for name in here:
        if split_of(first_word(name)) == "train" and (inner[name] or not split_of(name)):
            problem = f"{name} is read as one class, not as a split"
            warn_once(f"{top}: {problem}; name splits train and test, and move others elsewhere")
        if re.search("(?i)mask|segm|annot|label|truth|^gt$|depth", name):
            stems = {path.stem for other in files if other != name for path in files[other]}
            if stems.issuperset(path.stem for path in files[name]):
                warn_once(f"{top}: {name} is read as a class; if it holds masks, move it elsewhere")
    if here and all(inner[name] for name in here):
        places = [*map(inner_folder, here.values())]
        count = Counter(itertools.chain(*map(sub_folders, places)))
        shared = sorted(name for name, times in count.items() if times > 1 or len(here) == 1)
        if len(count) > 1 and 3 * len(shared) >= 2 * len(count):
            found = f"{', '.join(list(here)[:3])}, with the folders {', '.join(shared[:3])} in them"
            hint = f"if those are the classes, --root={places[0]} (join all that share them)"
            hint += ", or name splits train and test; move masks elsewhere"
            warn_once(f"{top}: read as classes: {found}; {hint}")
    every = [*itertools.chain(*files.values())]
    named = [path for path in every if re.search(MASK, path.stem)]
    stems = {path.with_suffix("") for path in every} if named else ()
    masks = [path for path in named if path.with_name(re.sub(MASK, "", path.stem)) in stems]
    if masks:
        count = f"{len(masks)} images are named as masks of others, the first is {masks[0]}"
        warn_once(f"{top}: {count}; move them elsewhere if they are")


# how programs write that a label is not known
NO_LABEL = {"nan", "na", "n/a", "#n/a", "<na>", "nat", "null", "none", "?", "-", "unlabeled"}


def warn_odd_classes(where, names):
    """Warn of classes that hardly differ, as Cat and cat or 1 and 1.0, and of one named NA."""
    alike = defaultdict(list)
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold()
        plain = "".join(c for c in plain if unicodedata.category(c) != "Cf").strip()  # not seen
        with contextlib.suppress(ValueError):
            plain = float(plain.replace("_", "x"))  # 1_1 is no number
        alike[plain].append(name)
        if name.lower() in NO_LABEL:
            hint = f"leave the cell of {TABLE} empty for none"
            warn_once(f"{where}: {name} is read as a class; {hint}")
    for some in alike.values():
        if len(some) > 1:
            warn_once(f"{where}: {' and '.join(map(ascii, some))} are different classes", where)


def warn_left_out(root, paths):
    """Warn of files below root that are not read: how many of each suffix, and the first."""
    paths = sorted({*paths} - {root / TABLE})
    if paths:
        counts = Counter(path.suffix.lower() or "without a suffix" for path in paths)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5))
        warn_once(f"{root}: left out: {len(paths)} files ({kinds}), the first is {paths[0]}")


def warn_missing_classes(root, label, splits, names):
    """Warn of classes without an image to train on, or to test on: split and class of each."""
    train = {name for split, name in zip(splits, names) if split == "train"}
    test = {name for split, name in zip(splits, names) if split != "train"}
    lost = [len(train | test) - len(side) for side in (train, test)]
    if any(lost) and train and test:
        kinds = zip(lost, ("training", "test"))
        counts = " and ".join(f"{n} have no {kind} image" for n, kind in kinds if n)
        warn_once(f"{root}, label {label}: of the {len(train | test)} classes {counts}")


def hashed_splits(keys, seed):
    """A fixed 80% of all keys for "train", the rest for "val" -> {key: split}.

    Of few keys the last one is for "val", where all would be for "train"."""
    places = {}
    for key in keys:
        name = f"{seed}/{key}".encode("utf-8", "surrogateescape")  # a file's name may be in Latin-1
        places[key] = int(hashlib.sha1(name).hexdigest()[:8], 16) / 2**32
    border = min(0.8, max(places.values())) if len(places) > 1 else 0.8
    return {key: "train" if place < border else "val" for key, place in places.items()}


TABLE = "labels.csv"  # at the top of a folder: a row for each image, a column for each label
# how people spell the splits, as in Training, valid, test_set or train2017
SPLITS = {
    "train": "train(ing|val)?",
    "val": "val(id(ate|ation)?)?|dev",
    "test": r"((public|private)[\W_]*)?test(ing)?|eval(uation)?|hold[\W_]?out",
}


def has_table(root):
    """Is there a labels.csv in the folder? UserError where it cannot be read."""
    path = root / TABLE
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path} is a broken link, or no file: replace it, or remove it")
    return path.is_file()


def split_of(word):
    """The split that the name of a folder, or a cell of labels.csv, means, or None."""
    more = r"[\W_]*(set|images|data|split)?[\W_]*((19|20)\d\d)?"
    for split, pattern in SPLITS.items():
        if re.fullmatch(f"({pattern}){more}", word.lower()):
            return split


def has_file_column(header, comma):
    """Has the first line of a table a column `file`, if `comma` stands between its cells?"""
    cells = next(csv.reader([header.strip()], delimiter=comma, skipinitialspace=True), [])
    return "file" in [cell.strip().lower() for cell in cells]


def table_rows(path):
    """Yield the line number and the cells of each row that is not blank."""
    line = 0
    csv.field_size_limit(2**31 - 1)
    try:
        text = path.read_text("utf-8-sig")
        first, _, rest = text.lstrip().partition("\n")
        comma = next((c for c in ",;\t|" if has_file_column(first, c)), ",")
        if excel := re.fullmatch("sep=(.)", first.rstrip("\r\n")):
            comma, text, line = excel[1], rest, 1
        reader = csv.reader(io.StringIO(text), delimiter=comma, skipinitialspace=True, strict=True)
        for cells in reader:
            cells = [composed(cell.strip()) for cell in cells]
            if any(cells):
                yield line + reader.line_num, cells
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {first_line(error)}; save it as CSV in UTF-8") from None
    except csv.Error as error:
        where = f"{path}, line {line + reader.line_num}"
        raise UserError(f"{where}: {error}; save it as CSV in UTF-8") from None


def read_table(root, seed=0):
    """labels.csv -> its columns, {file: {column: cell}} of all images, listed or not.

    A file is a path below root, or a name that only one of them has. "split" is the column's, else
    the folder's (train/, val/ or test/), else a hash of "group" or of the path; images not listed,
    or with an empty cell, have their folder's split, else train. "class" is the column's, else the
    folder's name."""
    rows = table_rows(root / TABLE)

    def refuse(line, problem):
        raise UserError(f"{root / TABLE}, line {line}: {problem}")

    line, columns = next(rows, (1, []))
    own = ("file", "split", "group", "class", "rotation", "image")
    columns = [name.lower() if name.lower() in own else name for name in columns]
    if "file" not in columns:
        names = ", ".join(columns) or "none"
        hint = "give the column of paths this name, and put commas between columns"
        refuse(line, f"expected a column file, found {names}; {hint}")
    for name in filter(None, columns):
        if columns.count(name) > 1:
            refuse(line, f"two columns are named {name}")
        if name in ("rotation", "image"):
            refuse(line, f"evaluations use the name {name} themselves: rename this column")
    paths, others = list_files(root)
    warn_left_out(root, others)
    table, lost = {path.relative_to(root).as_posix(): {} for path in paths}, []
    exact = {composed(file): file for file in table}
    short, by_name = short_names(exact), []
    for line, cells in rows:
        if len(cells) < len(columns) or any(cells[len(columns) :]):
            refuse(line, f"{len(cells)} cells, the header has {len(columns)}")
        row = dict(zip(columns, cells))
        if not row["file"]:
            refuse(line, "no file is named")
        file = Path(os.path.normpath(row["file"].replace("\\", "/"))).as_posix()
        found = exact.get(file) or exact.get(Path(os.path.relpath(file, root)).as_posix())
        if not found and len(short[file]) == 1:
            (found,) = short[file]
            by_name.append(f"{file} as {found}")
        file = found or file
        if table.get(file):
            refuse(line, f"{file} is listed twice")
        if word := row.pop("split", ""):
            row["split"] = split_of(word)
            if not row["split"]:
                refuse(line, f"split {word}: expected train, val or test")
        if row.get("group", "").lower() in NO_LABEL:
            row["group"] = ""
        if file in table:
            table[file] = row
        else:
            lost.append((line, file))
    if lost:
        line, file = lost[0]
        if alike := short[file]:
            example = min(alike)
            refuse(line, f"{file}: {len(alike)} images have this name; write a path, as {example}")
        missing = f"{len(lost)} files of this table are missing"
        expected = f"; expected paths in it, such as {next(iter(table))}" if table else ""
        refuse(line, f"{file}: no such image in {root}; {missing}{expected}")
    if unlisted := [file for file, row in table.items() if not row]:
        count = f"{len(unlisted)} of {len(table)} images are not listed"
        first = f"no label but their folder's, the first is {unlisted[0]}"
        warn_once(f"{root / TABLE}: {count}, {first}")
    if by_name:
        count = f"{len(by_name)} files are found by their names alone"
        warn_once(f"{root / TABLE}: {count}, the first is {by_name[0]}")
    base = inner_folder(root)
    tops = {top.name: split for split, top in split_folders(base).items()}
    for name in columns if not tops and "split" not in columns else ():
        meant = {split_of(row[name]) for row in table.values() if row.get(name)}
        if {"train"} < meant and None not in meant:
            refuse(1, f"column {name} names splits: call it split")
    below = {file: (root / file).relative_to(base).as_posix() for file in table}
    keys = [row.get("group") or below[file] for file, row in table.items() if row]
    hashed = hashed_splits(keys, seed)
    for file, row in table.items():
        folders, split = below[file].split("/")[:-1], "train"
        if tops:
            top, *folders = folders or [""]
            split = tops.get(top, "train")
        elif row and "split" not in columns:
            split = hashed[row.get("group") or below[file]]
        row.setdefault("split", split)
        row.setdefault("class", folders[0] if folders and "class" not in columns else "")
    return columns, table


def short_names(files):
    """{path: file} -> {name without folders or suffix: the files that have it}."""
    short = defaultdict(set)
    for path, file in files.items():
        name = path.rpartition("/")[2]
        for part in (name, os.path.splitext(name)[0], os.path.splitext(path)[0]):
            short[part].add(file)
    return short


def table_folder(split, root, seed=0):
    """Images with a labels.csv -> paths, {label: n class indices}, -1 where not labeled, and
    {label: class names}."""
    columns, table = read_table(root, seed)
    files = [file for file, row in table.items() if row["split"] == split]
    if not files:
        raise UserError(f"{root}: no images for {split}; name some in a column split of {TABLE}")
    splits = defaultdict(set)
    for row in table.values():
        splits[row.get("group")].add(row["split"])
    if torn := [group for group, where in splits.items() if group and len(where) > 1]:
        warn_once(f"{len(torn)} groups in {TABLE} are in several splits, the first is {torn[0]}")
    groups = {table[file].get("group") or file for file in files}
    if split != "train" and len(groups) < len(files):
        count = f"the {len(files)} images for {split} are of {len(groups)} groups"
        warn_once(f"{root}: {count}; intervals treat them as independent")
    labels, classes = {}, {}
    for label in dict.fromkeys(["class", *columns]):
        if label in ("", "file", "split", "group"):
            continue
        labeled = [row for row in table.values() if row.get(label)]
        names = sorted({row[label] for row in labeled})
        if len(names) > max(100, len(labeled) / 2):  # a number or a caption for each image
            values = f"{len(names)} different values for {len(labeled)} images"
            warn_once(f"{root / TABLE}: column {label} is no label and left out: {values}")
            labeled, names = [], []
        warn_odd_classes(f"{root / TABLE}, column {label}", names)
        classes[label] = names  # of all splits, so that a class has the same number in each
        number = {name: i for i, name in enumerate(names)}
        labels[label] = [number.get(table[file].get(label), -1) for file in files]
        where = [row["split"] for row in labeled]
        warn_missing_classes(root, label, where, [row[label] for row in labeled])
    return [root / file for file in files], labels, classes


def from_torchvision(name, split, root, download):
    """A data set of torchvision -> itself, labels, class names."""
    source, root = DATASETS[name], root or "downloads"
    kind = getattr(torchvision.datasets, source.torchvision)
    try:
        found = kind(root, download=download, **source.splits[split])
    except Exception as error:  # a broken file raises various kinds
        problem = f"not found, or not whole, under {root} ({first_line(error)})"
        raise UserError(f"--data={name}: {problem}: use --root=DIR or --download") from None
    labels = next(getattr(found, a) for a in ("targets", "labels", "_labels") if hasattr(found, a))
    return found, labels, found.classes


def read_item(dataset, i):
    return to_rgb(dataset[i][0])


# what a file that is no image begins with, and what to do
NO_IMAGE = {
    b"version https://git-lfs": "a pointer of Git LFS: `git lfs pull` gets the image",
    b"<": "a web page or a drawing: get the image itself",
    b"": "no image that Pillow can read; save it as JPEG or PNG",
}


def open_image(path):
    """A PIL image that is not decoded yet. ValueError where it is no file, or has too many pixels.

    A larger JPEG is decoded at a half, a quarter or an eighth of its size."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError("not a file")
    try:
        image = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        check_tiff(tiff_tags(path))
        with open(path, "rb") as file:
            start = file.read(99).lstrip()
        problem = next(says for head, says in NO_IMAGE.items() if start.startswith(head))
        raise ValueError(problem if start else "an empty file: get it again") from None
    most = loo.environ_count("LOOC_MEGAPIXELS", MEGAPIXELS)
    megapixels = math.ceil(image.width * image.height / 1e6)
    if megapixels > most:
        part = 2 ** math.ceil(math.log(megapixels / most, 4))
        if not image.draft(image.mode, (image.width // part or 1, image.height // part or 1)):
            hint = f"--megapixels={megapixels} reads it"
            raise ValueError(f"{megapixels} megapixels, more than {most}: {hint}")
    return image


def read_image(paths, i, border=0):
    """Image i as RGB without `border` pixels at each side; UserError names the file."""
    path = paths[i]
    try:
        with open_image(path) as image:
            check_tiff(getattr(image, "tag_v2", {}), len(image.getbands()))
            if getattr(image, "is_animated", False) and image.format != "MPO":
                warn_once(f"{path} has several pages or frames: the first is read", kind="pages")
            image = to_rgb(image)
            return ImageOps.crop(image, border) if border else image
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: {reason}") from None


def tiff_tags(path):
    """The tags of a TIFF file, also of one that Pillow cannot read; none of other files."""
    with open(path, "rb") as file, contextlib.suppress(SyntaxError, struct.error):
        header = file.read(8)
        header += file.read(8) if header[2:3] == b"+" else b""  # BigTIFF
        directory = tiff.ImageFileDirectory_v2(header)
        file.seek(directory.next)
        directory.load(file)
        return directory
    return {}


UNKNOWN_WHITE = "have no known white: save it with unsigned 8 or 16 bits"


def check_tiff(tags, bands=None):
    """ValueError for a TIFF file that Pillow does not read, or not as it is meant.

    bands: how many channels Pillow sees; it drops the others."""
    channels = tags.get(tiff.SAMPLESPERPIXEL, 1)
    if channels not in ((1, 3) if bands is None else range(bands + 1)):
        raise ValueError(f"{channels} channels, expected gray or RGB")
    of_color = tags.get(tiff.PHOTOMETRIC_INTERPRETATION) == 2
    if channels > 3 and of_color and tiff.EXTRASAMPLES not in tags:  # Pillow sees transparency
        hint = "save it as PNG if one is transparency"
        raise ValueError(f"{channels} channels, expected gray or RGB; {hint}")
    for number, kind in ((2, "signed"), (3, "floating point")):
        if number in tags.get(tiff.SAMPLEFORMAT, ()):
            raise ValueError(f"{kind} pixels {UNKNOWN_WHITE}")
    if tags.get(tiff.PLANAR_CONFIGURATION) == 2 and max(tags.get(tiff.BITSPERSAMPLE, (8,))) > 8:
        raise ValueError("16 bits a channel, one channel after the other: save them interleaved")


def to_rgb(image):
    """A PIL image of any mode -> RGB, with its EXIF orientation applied, transparency on white."""
    stored = str(getattr(image, "tile", "")[:1])
    deep = image.mode.startswith("I") or ";16" in stored  # more than 8 bits a channel
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floating point" if image.mode == "F" else "32-bit integer"
        raise ValueError(f"{kind} pixels {UNKNOWN_WHITE}")
    if image.format == "FITS" and image.mode != "L":  # Pillow leaves BZERO out
        raise ValueError(f"signed pixels {UNKNOWN_WHITE}")
    image.load()  # what fails after it is in the tags
    with contextlib.suppress(Exception):  # an orientation that cannot be read
        ImageOps.exif_transpose(image, in_place=True)
    # Pillow scales pixels of 2 and 4 bits to 8, but not the transparent value.
    for depth, step in (("L;2", 85), ("L;4", 17)):
        if depth in stored and "transparency" in image.info:
            image.info["transparency"] *= step
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):  # convert() would clip, not scale
        shades = [value // 256 for value in range(1 << 16)]
        # 0 is white, which Pillow inverts in 8 bits alone
        if getattr(image, "tag_v2", {}).get(tiff.PHOTOMETRIC_INTERPRETATION) == 0:
            shades.reverse()
        if image.info.pop("transparency", None) is not None:
            shades[clear] = 255
        image = image.convert("I").point(shades, "L")
    elif deep and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value // 256 for value in clear)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3] != (0, 0):  # as some TGA have it where it means nothing
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if deep:
        counts = image.convert("L").histogram()
        used = [i for i, count in enumerate(counts) if count * 1000 > image.width * image.height]
        if used[-1] - used[0] < 64:
            warn_once("16-bit images keep few of 256 gray levels: scale them to 0 to 65535")
    return image


class ImageFiles(Dataset):
    """Images by index -> (3 side side) uint8, aspect, what was wrong ("" if nothing).

    read(source, i) gives a PIL image; source: paths, or a torchvision data set. The whole image is
    squashed; with crop_pct, its central square of this share of the short side is taken instead.
    advice: what to do about an unreadable image, where every image must be readable."""

    def __init__(self, source, read, side, crop_pct=None, advice=""):
        self.source, self.read, self.side = source, read, side
        self.crop_pct, self.advice = crop_pct, advice

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        try:
            image = self.read(self.source, i)
        except Exception as error:  # Pillow alone has OSError, SyntaxError, struct.error, ...
            blank = torch.zeros(3, self.side, self.side, dtype=torch.uint8)
            return blank, 1.0, str(error) or type(error).__name__
        w, h = image.size
        size = [self.side, self.side]
        if not self.crop_pct:  # torch resizes photographs five times as fast as Pillow
            image = v2.resize(pil_to_tensor(image), size, v2.InterpolationMode.BICUBIC)
            return image, w / h, ""
        half = min(w, h) * self.crop_pct / 2
        box = (w / 2 - half, h / 2 - half, w / 2 + half, h / 2 + half)
        image = image.resize(size, Image.Resampling.BICUBIC, box, reducing_gap=3)
        return pil_to_tensor(image), 1.0, ""


def central_files(paths, size):
    """ImageFiles of your own images, as evaluations see them: the central crop of each."""
    return ImageFiles([*map(Path, paths)], read_image, size, DATASETS["folder"].crop_pct)


def central_crops(paths, size):
    """Image files, as `embed` sees them -> (n 3 size size) in [0, 1], for `encode`.

    UserError names a file that cannot be read."""
    loo.check_tuples(paths=paths)
    paths = list(paths)
    if not paths:
        raise UserError("paths is empty: expected the paths of images")
    images, _, errors = zip(*central_files(paths, size))
    if problem := next(filter(None, errors), None):
        raise UserError(problem)
    return torch.stack(images) / 255


# ---------------------------------------------------------------- batches, and a cache of them


def epoch_batches(n, batch, seed, epoch):
    """The epoch's order of n images -> (steps b) int64, the incomplete last batch dropped."""
    order = torch.randperm(n, generator=make_generator("order", seed, epoch))
    return order[: n - n % batch].view(-1, batch)


def decoding_workers(asked, batches, processes=1):
    """How many processes decode this many batches: as asked, else one for each core.

    processes: of torchrun that decode at the same time; those on this machine share its cores."""
    if asked is None:
        own = hasattr(os, "sched_getaffinity")  # SLURM, for one, gives a job some of the cores
        cores = len(os.sched_getaffinity(0)) if own else os.cpu_count() or 1
        sharing = min(processes, loo.environ_count("LOCAL_WORLD_SIZE", 1))
        asked = min(32, max(1, cores // sharing))
    return min(asked, batches)


def iter_batches(dataset, workers=None, batch=256, part=(0, 1), count=None, named=5):
    """The (first `count`) images in order, decoded ahead in `workers` processes (None: one for
    each core; up to 256 images are decoded in this one) and not kept.

    Yields rows (b,), images (b 3 h w) uint8, aspect (b,). part (i, of): every of-th batch from the
    i-th on. Unreadable images are left out with a warning that names the first `named` (None: all);
    UserError where the whole set is unreadable, or one of a published set."""
    files = dataset.images
    every = torch.arange(len(files))[:count]
    batches = every.split(batch)[part[0] :: part[1]]
    if torch.is_tensor(files):
        for rows in batches:
            yield rows, files[rows], dataset.aspect[rows]
        return
    failures, n_own = [], sum(map(len, batches))
    workers = decoding_workers(workers, len(batches), part[1]) if n_own > 256 else 0
    sampler = [rows.tolist() for rows in batches]
    loader = DataLoader(files, batch_sampler=sampler, num_workers=workers, collate_fn=collate)
    try:
        for rows, (images, aspect, errors) in zip(batches, loader):
            good = torch.tensor([not error for error in errors])
            failures += filter(None, errors)
            if failures and files.advice:
                raise UserError(f"{failures[0]}; {files.advice}")
            if good.any():
                aspect = torch.tensor(aspect, dtype=torch.float64)
                yield rows[good], torch.from_numpy(images)[good], aspect[good]
    except RuntimeError as error:  # a worker was killed
        hint = "free some memory, or take --workers=0 where the command has it"
        raise UserError(f"decoding stopped ({first_line(error)}): {hint}") from None
    if failures and len(failures) == len(every):
        raise UserError(f"none of the {len(every)} images can be read; the first: {failures[0]}")
    for error in failures[:named]:
        print(f"warning: unreadable: {error}", file=sys.stderr)
    if named and len(failures) > named:
        print(f"warning: {len(failures) - named} more images cannot be read", file=sys.stderr)


def collate(items):
    """A batch of ImageFiles. Tensors would need /dev/shm, of which Docker gives 64 MB."""
    images, aspect, errors = zip(*items)
    return torch.stack(images).numpy(), aspect, errors


IN_MEMORY = 4 << 30  # bytes of a set that stays in memory, unless processes share it


def decode_all(dataset, workers=None, cache=None, shared=False):
    """ImageSet of files -> ImageSet of a tensor, images (n 3 side side) uint8.

    cache: a folder. It keeps sets over 4 GiB, or all if `shared`, as memory maps for the next run
    and for other processes, until a file changes; what is written into such images stays there.
    UserError when more than 1% (and more than one) cannot be read."""
    if torch.is_tensor(dataset.images):
        return dataset
    n, side = len(dataset.images), dataset.images.side
    shape, mark = (n, 3, side, side), fingerprint(dataset)
    size = math.prod(shape)
    key = repr((mark, side, dataset.images.crop_pct)) + os.environ.get("LOOC_MEGAPIXELS", "")
    name = hashlib.sha1(key.encode()).hexdigest()[:16]
    path = Path(cache) / f"{name}.canvases" if cache else None
    if not cache or (size <= IN_MEMORY and not shared and not path.exists()):
        images = torch.empty(shape, dtype=torch.uint8)
        rows, aspect = decode_into(images, dataset, workers)
    else:
        index, mtimes = path.with_suffix(".pt"), file_stats(dataset, "st_mtime_ns")

        def write(file):
            allocate(file, size)
            decoded = decode_into(map_file(file.name, *shape), dataset, workers)
            write_tensors(index, (*decoded, mtimes))

        whole = False
        with contextlib.suppress(UserError, OSError):  # not there, or cut short: decoded again
            *_, cached_mtimes = read_tensors(index)
            whole = path.stat().st_size == size and torch.equal(cached_mtimes, mtimes)
        if not whole:
            print(f"decoding {n} images, once: {path}", file=sys.stderr, flush=True)
            with contextlib.suppress(OSError):  # not there, or on a read-only disk
                path.unlink()
            begun = time.perf_counter()
            write_atomic(path, write, size=size)
            rate = n / (time.perf_counter() - begun)
            print(f"decoded {rate:.0f} images/s", file=sys.stderr, flush=True)
        images, (rows, aspect, _) = map_file(path, *shape), read_tensors(index)
        if whole and len(rows) < n:
            warn_once(f"{n - len(rows)} of the {n} images could not be read when decoded")
    unreadable = tuple(sorted(set(range(n)) - set(rows.tolist())))
    labels = {name: y[rows] for name, y in dataset.labels.items()}
    held = {"root": [len(rows), mark]}
    return ImageSet(images[: len(rows)], aspect, labels, dataset.classes, unreadable, held=held)


def decode_cached(dataset, workers, cache, shared):
    """`decode_all`; where the cache cannot be written, a small set goes into memory."""
    try:
        return decode_all(dataset, workers, cache, shared)
    except WriteError as error:
        if len(dataset.images) * 3 * dataset.images.side**2 > IN_MEMORY:
            raise
        warn_once(f"{error}; decoding into memory")
        return decode_all(dataset, workers)


def decode_into(images, dataset, workers):
    """Fill images (n 3 side side) without gaps -> rows (m,) that could be read, aspect (m,)."""
    done, aspects, end = [], [], 0
    for rows, batch, aspect in iter_batches(dataset, workers, 64):
        images[end : end + len(rows)] = batch
        end += len(rows)
        done.append(rows)
        aspects.append(aspect)
    n, lost = len(images), len(images) - end
    if lost > max(1, n // 100):
        raise UserError(f"{lost} of {n} images cannot be read, more than 1%: repair or remove them")
    return torch.cat(done), torch.cat(aspects).float()


def allocate(file, size):
    """Reserve bytes for a map: a full disk is found now, not when a page is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)


def map_file(path, *shape, dtype=torch.uint8):
    """A file as a tensor, in memory that the system writes back where the disk can be written."""
    shared = os.access(path, os.W_OK)
    with open(path, "r+b" if shared else "rb") as file:
        # torch cannot read a name in Latin-1
        name = f"/dev/fd/{file.fileno()}" if os.name == "posix" else str(path)
        return torch.from_file(name, shared=shared, size=math.prod(shape), dtype=dtype).view(shape)


def fingerprint(dataset):
    """What images these are: a hash of the pixels, or of the files' names and sizes.

    Names are relative, so a copy of the folder elsewhere is the same set."""
    if torch.is_tensor(dataset.images):
        return hashlib.sha1(dataset.images.numpy()).hexdigest()
    source = dataset.images.source
    files = [line for line in repr(source).splitlines() if "Root location" not in line]
    if isinstance(source, (tuple, list)):  # else it is torchvision's
        top = os.path.commonpath([path.parent for path in source])
        names = [path.relative_to(top).as_posix() for path in source]
        files = list(zip(names, file_stats(dataset, "st_size").tolist()))
    return hashlib.sha1(repr(files).encode()).hexdigest()


def file_stats(dataset, name):
    """A number that the file system has of each file of a set, -1 where it is gone -> (n,) int64.

    Empty where a set has no files of its own."""
    source, numbers = getattr(dataset.images, "source", None), []
    for path in source if isinstance(source, (tuple, list)) else ():
        try:
            numbers.append(getattr(path.stat(), name))
        except OSError:
            numbers.append(-1)
    return torch.tensor(numbers, dtype=torch.int64)


def to_uint8(images):
    """[0, 1] -> uint8"""
    return (images.clamp(0, 1) * 255).round().byte()


# ---------------------------------------------------------------- factors: images drawn by code

# An object: up to four tapered strokes, each x0 y0 x1 y1 radius0 radius1, y up, mirrored at x = 0.
# So a flip never changes what an object is, and any rotation by a quarter turn does.
OBJECTS = """
arrow     0 -.85 0 .55 .12 .12,  0 .7 .55 .2 .15 .12
tee       0 -.8 0 .6 .15 .15,  0 .65 .7 .65 .17 .17
tree      0 -.85 0 -.3 .12 .12,  0 -.2 0 .85 .6 .03
lollipop  0 .4 0 .4 .45 .45,  0 -.9 0 .2 .09 .09
mushroom  0 .35 .45 .15 .4 .2,  0 -.75 0 .1 .2 .16
cup       0 -.6 .4 -.6 .2 .2,  .5 -.5 .6 .7 .17 .13
fork      0 -.9 0 0 .14 .14,  0 0 .5 .3 .14 .14,  .5 .3 .5 .8 .14 .1
anchor    0 -.6 0 .4 .12 .12,  0 -.7 .7 -.2 .16 .1,  0 .7 0 .7 .24 .24,  0 .3 .3 .3 .1 .1
heart     0 -.75 .32 .25 .08 .38
crown     0 -.55 .6 -.55 .2 .2,  0 -.4 0 .55 .2 .05,  .65 -.4 .75 .6 .17 .05
person    0 .65 0 .65 .26 .26,  0 .3 0 -.2 .2 .17,  .05 -.2 .3 -.85 .13 .13,  0 .3 .6 -.05 .1 .1
bell      0 .4 0 -.1 .3 .5,  0 -.45 .65 -.45 .12 .12,  0 -.75 0 -.75 .17 .17,  0 .8 0 .8 .1 .1
"""
OBJECTS = dict(line.split(maxsplit=1) for line in OBJECTS.strip().splitlines())
for _name, _line in OBJECTS.items():
    OBJECTS[_name] = [tuple(map(float, stroke.split())) for stroke in _line.split(",")]
TEXTURES = ("plain", "stripes", "checks", "dots")
HUES = 16  # neighboring bins are 0.0625 of the circle apart, less than color jitter's 0.1
FACTORS = {"train": 8192, "val": 2048, "test": 4096, "viewpoint": 4096}


def factors(split, size=32, count=None):
    """Images of one object each, drawn from known factors -> ImageSet of `count`, (n 3 size size).

    Labels: object (12), hue (16 bins), texture (4), species = object x hue (192). Nuisances:
    position, scale, tilt, light, background, noise. Each object has details of its own (bent
    strokes, four gray marks): an image differs from all others without its color. Light comes from
    above, so a rotation changes more than the outline. Splits are drawn independently; another
    `count` draws other images. "viewpoint" plays ObjectNet's part: more tilt (standard deviation 40
    degrees, not 11), colored backgrounds."""
    check_choice("split", split, FACTORS)
    n = FACTORS[split] if count is None else count
    g = make_generator("factors", split)
    rand = functools.partial(uniform, generator=g)

    def normal(*shape, std):
        return torch.randn(n, *shape, generator=g) * std

    def background(saturation):
        return torch.stack([rand(0, 1, n), rand(0, saturation, n), rand(0.25, 0.85, n)], -1)

    counts = len(OBJECTS), HUES, len(TEXTURES)
    obj, hue, fill = (torch.randint(k, (n,), generator=g) for k in counts)
    # repeating a stroke draws nothing new
    table = torch.tensor([(strokes * 4)[:4] for strokes in OBJECTS.values()])
    bend = torch.tensor([0.05, 0.1, 0.1, 0.1, 0.03, 0.03])
    strokes = table[obj] + normal(4, 6, std=1.0) * bend  # (n 4 6)
    strokes[..., 4:] *= rand(0.6, 1.5, n, 1, 1)  # all radii of an object thinner or thicker
    marks = [rand(-0.8, 0.8, n, 4, 2), rand(0.15, 0.3, n, 4, 1), rand(0, 1, n, 4, 1)]
    look = dict(
        strokes=strokes,
        marks=torch.cat(marks, -1),
        fill=fill,
        fill_angle=rand(0, math.tau, n),
        fill_period=rand(0.4, 0.9, n),
        fill_depth=rand(0.4, 0.9, n),
        fill_shift=rand(0, 1, n, 2),
        hue=(hue + rand(0.2, 0.8, n)) / HUES,
        saturation=rand(0.4, 1, n),
        value=rand(0.5, 1, n),
        center=normal(2, std=0.08),
        scale=rand(0.75, 1, n),
        tilt=normal(std=0.2),
        light=normal(std=0.3),
        relief=rand(0.8, 1.6, n),
        ground=background(0.1),
        horizon=normal(std=0.3),
        haze=rand(-0.02, 0.08, n),
    )
    if split == "viewpoint":
        look |= dict(tilt=normal(std=0.7), ground=background(0.3))
    noise, images = make_generator("noise", split, size), []
    for rows in torch.arange(n).split(256):
        images.append(render({name: value[rows] for name, value in look.items()}, size, noise))
    labels = dict(object=obj, hue=hue, texture=fill, species=obj * HUES + hue)
    classes = dict(
        object=list(OBJECTS),
        hue=[f"hue {i}" for i in range(HUES)],
        texture=list(TEXTURES),
        species=[f"{name} {i}" for name in OBJECTS for i in range(HUES)],
    )
    return ImageSet(torch.cat(images), torch.ones(n), labels, classes)


def render(look, size, noise):
    """One image for each row of `look`, a dict of (n ...) parameters -> (n 3 size size) uint8."""
    # (n ... 1 1): parameters broadcast over pixels
    p = {name: value[..., None, None] for name, value in look.items()}
    line = (torch.arange(size) + 0.5) * 2 / size - 1
    x, y = line[None, None, :], -line[None, :, None]  # y is up
    pixel = 2 / size / p["scale"]  # one pixel in the object's units: the width of an edge
    u, v = (x - p["center"][:, 0]) / p["scale"], (y - p["center"][:, 1]) / p["scale"]
    cos, sin = p["tilt"].cos(), p["tilt"].sin()
    u, v = cos * u + sin * v, cos * v - sin * u  # the object's own frame, (n h w)

    x0, y0, x1, y1, r0, r1 = p["strokes"].unbind(2)  # (n 4 1 1) each
    px, py, ax, ay = u.abs()[:, None] - x0, v[:, None] - y0, x1 - x0, y1 - y0
    t = ((px * ax + py * ay) / (ax * ax + ay * ay).clamp(min=1e-6)).clamp(0, 1)
    distance = torch.hypot(px - t * ax, py - t * ay) - torch.lerp(r0, r1, t)
    outside = distance.amin(1)  # distance to the outline, (n h w)
    inside = (0.5 - outside / pixel).clamp(0, 1)

    cos, sin = p["fill_angle"].cos(), p["fill_angle"].sin()
    f1 = (cos * u + sin * v) / p["fill_period"] + p["fill_shift"][:, 0]
    f2 = (cos * v - sin * u) / p["fill_period"] + p["fill_shift"][:, 1]
    w1, w2 = (f1 * math.tau).sin(), (f2 * math.tau).sin()
    stripes, checks, dots = 3 * w1, 5 * w1 * w2, 6 * (w1 * w2).abs() - 3
    fills = torch.stack([torch.zeros_like(w1), stripes.tanh(), checks.tanh(), dots.tanh()], 1)
    fill = fills[torch.arange(len(fills)), look["fill"]]

    mx, my, radius, gray = p["marks"].unbind(2)  # (n 4 1 1) each
    spots = torch.hypot(u[:, None] - mx, v[:, None] - my) - radius
    spots = (0.5 - spots / pixel[:, None]).clamp(0, 1)
    height = (-outside / 0.3).clamp(-0.1, 1)  # a rounded relief, lit from above
    dy, dx = torch.gradient(height, spacing=2 / size, dim=(1, 2))
    # The slope towards the light, in the object's own units; rows run down, so up is -dy.
    facing = -(dx * p["light"].sin() - dy * p["light"].cos()) * p["scale"] * 0.3
    body = hsv_to_rgb(p["hue"], p["saturation"], p["value"] * (1 + p["fill_depth"] * fill))
    for spot, shade in zip(spots.unbind(1), gray.unbind(1)):
        body = torch.lerp(body, shade[:, None], spot[:, None])
    body = body * (1 + p["relief"] * facing)[:, None]

    sky = ((y - p["horizon"]) * 8).sigmoid()  # above a faint horizon
    under = F.pad(outside, (0, 0, size // 16, 0), value=1e3)[:, :size]
    shadow = (0.5 - under / pixel / 3).clamp(0, 1) * 0.15
    ground = hsv_to_rgb(*p["ground"].unbind(1)) * (1 - shadow + p["haze"] * (sky - 0.5))[:, None]
    image = torch.lerp(ground, body, inside[:, None])
    image = image + 0.02 * torch.randn(image.shape, generator=noise)
    return (image * 255).round().clamp(0, 255).byte()


def hsv_to_rgb(hue, saturation, value):
    """(n h w) each, broadcast against one another -> rgb (n 3 h w)."""
    k = (torch.tensor([5.0, 3.0, 1.0])[:, None, None] + (hue * 6)[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


# ---------------------------------------------------------------- readers of published sets

# IN-100, the classes of CMC. A label is the place in this sorted list, so all derived sets agree.
IMAGENET100 = """
n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166
n01983481 n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622
n02091831 n02093428 n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047
n02113799 n02113978 n02114855 n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212
n02326432 n02396427 n02483362 n02488291 n02701002 n02788148 n02804414 n02859443 n02869837 n02877765
n02974003 n03017168 n03032252 n03062245 n03085013 n03259280 n03379051 n03424325 n03492542 n03494278
n03530642 n03584829 n03594734 n03637318 n03642806 n03764736 n03775546 n03777754 n03785016 n03787032
n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417 n04067472 n04099969 n04111531
n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653 n04485082 n04493381
n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406 n13040303
"""
IMAGENET100 = IMAGENET100.split()
# Folder and class of the 13 classes of ObjectNet that IN-100 has.
OBJECTNET13 = """
bench n03891251  bottle_cap n02877765  chair n04099969  helmet n03379051
iron_for_clothes n03584829  jeans n03594734  keyboard n03085013  lampshade n03637318
laptop_open n03642806  mixing_salad_bowl n03775546  safety_pin n04127249
vacuum_cleaner n04517823  wheel n02974003
"""
OBJECTNET13 = dict(zip(OBJECTNET13.split()[::2], OBJECTNET13.split()[1::2]))


def published(name, split, root):
    """A published set as downloaded -> paths, labels, class names; the paths need not exist."""
    address = DATASETS[name].address
    try:
        pairs, classes = READERS[name](split, root)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"its tables cannot be read as those of {name} ({first_line(error)})"
        raise UserError(f"{root}: {problem}; get them at {address}") from None
    if not pairs:
        raise UserError(f"{root}: no images of {name} here; get it at {address}")
    paths, labels = zip(*sorted(pairs, key=lambda pair: pair[0]))
    return paths, labels, classes


def first_existing(name, root, *places):
    """The first of root/place that exists, else UserError."""
    found = next((root / place for place in places if (root / place).exists()), None)
    if not found:
        expected = f"expected {' or '.join(places)} in it"
        raise UserError(f"{root}: {expected}, as {DATASETS[name].address} gives them")
    return found


def by_wnid(top):
    """top/WNID/* of the 100 classes -> (path, label) pairs."""
    return [(path, i) for i, wnid in enumerate(IMAGENET100) for path in image_paths(top / wnid)]


def imagenet100(split, root):
    """The 100 classes out of a tree of them or of all ImageNet, train/WNID/* and val/WNID/*.

    val may lie flat, as in its archive: then the devkit or Kaggle's table gives the classes."""
    tops = split, f"ILSVRC/Data/CLS-LOC/{split}", f"Data/CLS-LOC/{split}", f"ILSVRC2012_img_{split}"
    top = first_existing("imagenet100", root, *tops)
    if split == "train" or any((top / wnid).is_dir() for wnid in IMAGENET100):
        return by_wnid(top), IMAGENET100
    truth = "data/ILSVRC2012_validation_ground_truth.txt"
    tables = "LOC_val_solution.csv", f"ILSVRC2012_devkit_t12/{truth}", truth
    table = first_existing("imagenet100", root, *tables)
    text = table.read_text()
    if table.suffix == ".csv":  # image,WNID box ...
        wnids = dict(re.findall(r"^(\w+),(n\d+)", text, re.MULTILINE))
    else:  # a class number for each image
        synsets = read_mat(table.with_name("meta.mat"))["synsets"].ravel()
        named = {int(one["ILSVRC2012_ID"].item()): one["WNID"].item() for one in synsets}
        wnids = {f"ILSVRC2012_val_{i:08d}": named[int(c)] for i, c in enumerate(text.split(), 1)}
    label = {wnid: i for i, wnid in enumerate(IMAGENET100)}
    pairs = [(top / f"{stem}.JPEG", label[w]) for stem, w in wnids.items() if w in label]
    return pairs, IMAGENET100


def inat2019(split, root):
    """train2019.json and val2019.json, as COCO: images, species and annotations joined by id."""
    table = json.loads(first_existing("inat2019", root, f"{split}2019.json").read_text())
    species = sorted((c["id"], c["name"]) for c in table["categories"])
    label = {number: i for i, (number, _) in enumerate(species)}
    category = {a["image_id"]: a["category_id"] for a in table["annotations"]}
    pairs = [(root / one["file_name"], label[category[one["id"]]]) for one in table["images"]]
    return pairs, [name for _, name in species]


def cub200(split, root):
    """CUB-200-2011's tables, joined by image id; its classes count from 1."""
    top = first_existing("cub200", root, "images.txt", "CUB_200_2011/images.txt").parent

    def table(name):
        lines = first_existing("cub200", top, name).read_text().splitlines()
        return dict(line.split(maxsplit=1) for line in lines)

    train, species = table("train_test_split.txt"), table("image_class_labels.txt")
    files, wanted = table("images.txt"), "1" if split == "train" else "0"
    pairs = [(top / "images" / files[i], int(species[i]) - 1) for i in files if train[i] == wanted]
    classes = table("classes.txt")
    return pairs, [classes[i] for i in sorted(classes, key=int)]


def flowers102(split, root):
    """setid.mat numbers the images of a split, imagelabels.mat their classes, both from 1."""
    top = first_existing("flowers102", root, "setid.mat", "flowers-102/setid.mat").parent
    # since torchvision 0.22
    names = getattr(torchvision.datasets.Flowers102, "classes", range(1, 103))
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    ids = read_mat(top / "setid.mat")[key].ravel().astype(int)
    labels = read_mat(first_existing("flowers102", top, "imagelabels.mat"))["labels"].ravel()
    return [(top / f"jpg/image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in ids], names


def objectnet13(split, root):
    """The 13 folders of ObjectNet whose classes are in IN-100, with IN-100's labels."""
    places = "images/bench", "objectnet-1.0/images/bench", "bench"
    top = first_existing("objectnet13", root, *places).parent
    labels = {name: IMAGENET100.index(wnid) for name, wnid in OBJECTNET13.items()}
    pairs = [(path, i) for name, i in labels.items() for path in image_paths(top / name)]
    return pairs, IMAGENET100


def imagenetc100(split, root):
    """The 100 classes out of ImageNet-C; split names a corruption and its severity."""
    category = next(c for c, names in IMAGENETC.items() if split.split("/")[0] in names)
    # some archives have a folder for each category
    top = first_existing("imagenetc100", root, split, f"{category}/{split}")
    return by_wnid(top), IMAGENET100


PUBLISHED = (imagenet100, inat2019, cub200, flowers102, objectnet13, imagenetc100)
READERS = {reader.__name__: reader for reader in PUBLISHED}


def read_mat(path):
    """A MATLAB file -> {name: array}."""
    try:
        from scipy.io import loadmat

        return loadmat(str(path))
    except ImportError:
        raise UserError(f"{path}: a MATLAB file needs scipy: pip install scipy") from None
    except Exception as error:  # whatever a broken file raises
        raise UserError(f"{path}: no MATLAB file ({first_line(error)}); get it again") from None


def incomplete(name, split, paths, labels):
    """-> what is wrong with a split of a published set, in words; nothing where it is whole."""
    problems, n, found = [], len(paths), len(set(labels))
    classes, count = DATASETS[name].splits[split]
    if missing := [path for path in paths if not path.exists()]:
        problems.append(f"{len(missing)} of {n} images are missing, the first is {missing[0]}")
    if found != classes or n != (count or n):
        here = f"found {n} images of {found} classes under {paths[0].parent.parent}"
        problems.append(f"{here}, published are {count or 'images'} of {classes}")
    return [f"{split}: {problem}" for problem in problems]


def fetch_archives(name, root):
    """--download of a published set -> root. Only Flowers-102 asks for no conditions or form."""
    source, root = DATASETS[name], root or "downloads"
    if not source.fetched:
        raise UserError(f"--download cannot fetch {name}: leave it out, and give --root=DIR")
    try:
        with contextlib.suppress(ModuleNotFoundError):  # all is fetched when it looks for scipy
            torchvision.datasets.Flowers102(root, download=True)
    except (RuntimeError, OSError) as error:
        raise UserError(f"--download: {first_line(error)}; get it at {source.address}") from None
    return root


# ---------------------------------------------------------------- corruptions: the 15 of ImageNet-C

# Hendrycks and Dietterich, ICLR 2019, in batches, on any device. The constants are the published
# ones, for 224 x 224: for others, every length (radius, sigma, distance) is scaled by side / 224.
# Each image has its own draws, made on the CPU; they depend on the size of the batch. Unlike the
# published images ours are not saved as JPEG at quality 85, values are rounded and not cut to 8
# bits, and frost is drawn. Each function: images (b c h w) in [0, 1], h == w, a CPU generator, its
# constants -> (b c h w).
REFERENCE_SIZE = 224


def corrupt(images, name, severity, generator):
    """images (b 3 h h) float32 in [0, 1], severity 1 to 5 -> the same, in steps of 1 / 255.

    name: of CORRUPTIONS; lengths are scaled by h / 224; generator: on the CPU.
    ValueError for other images, another severity or name."""
    loo.check_shapes({"c": 3}, images=(images, "b c h h"))
    loo.check_images(images, (torch.float32,))
    if name not in CORRUPTIONS or severity not in range(1, 6):
        expected = f"expected 1 to 5, and one of {', '.join(CORRUPTIONS)}"
        raise ValueError(f"severity {severity} of corruption {name}: {expected}")
    function, constants = CORRUPTIONS[name]
    worse = function(images, generator, *constants[int(severity) - 1])
    return worse.clamp(0, 1).mul(255).round() / 255


def side_ratio(images):
    """How many pixels of these images one pixel of the constants is."""
    return images.shape[-1] / REFERENCE_SIZE


def gaussian_noise(images, generator, std):
    return images + std * torch.randn(images.shape, generator=generator).to(images)


def shot_noise(images, generator, photons):
    """Each value becomes a count of photons; a value of 1 gives `photons` on average."""
    return torch.poisson(images.cpu() * photons, generator).to(images) / photons


def impulse_noise(images, generator, share):
    """This share of all values becomes 0 or 1, half and half."""
    u = torch.rand(images.shape, generator=generator).to(images)
    return images.masked_fill(u < share / 2, 0).masked_fill(u >= 1 - share / 2, 1)


def bilinear_weights(points, reach):
    """points (... t) in pixels -> (... k t), so that a kernel of fractional size is smooth."""
    pixel = torch.arange(-reach, reach + 1, device=points.device)
    return (1 - (pixel[:, None] - points[..., None, :]).abs()).clamp(min=0)


def convolve(images, kernels, border):
    """images (b c h w), kernels (b k k) or (1 k k) -> (b c h w), by FFT: k is 81 for the
    longest motion at side 224."""
    k = kernels.shape[-1]
    padded = F.pad(images, (k // 2,) * 4, border)
    size = padded.shape[-2:]
    kernels = kernels / kernels.sum((1, 2), keepdim=True)
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernels, s=size)[:, None]
    # The first rows and columns mix opposite borders: an FFT wraps around.
    return torch.fft.irfft2(spectrum, s=size)[..., k - 1 :, k - 1 :]


def gaussian_filter(images, sigma, mirrored=True):
    """Gaussian blur as two matrix products; sigma may exceed the image.

    Beyond the border the image goes on mirrored, or by its last pixel."""
    n, reach = images.shape[-1], math.ceil(4 * sigma)
    pixel = torch.arange(n, device=images.device)
    at = torch.arange(-reach, n + reach, device=images.device)
    weight = torch.softmax(-(((at - pixel[:, None]) / sigma) ** 2) / 2, 1)
    folded = at.clamp(0, n - 1)
    if mirrored:  # again and again, where it takes more than once
        folded = torch.minimum(at % (2 * n), -(at + 1) % (2 * n))
    matrix = torch.zeros_like(weight[:, :n]).index_add_(1, folded, weight)
    return matrix @ images @ matrix.T


def defocus_blur(images, generator, radius):
    """The average over a disk with an antialiased edge.

    The published disk is blurred, by a sigma of 0.1 pixels at severity 1 and of 0.5 above."""
    radius = radius * side_ratio(images)
    points = (torch.linspace(-1, 1, 257, device=images.device)[:-1] + 1 / 256) * radius
    weights = bilinear_weights(points, math.ceil(radius))
    disk = (points[:, None] ** 2 + points**2 <= radius**2).float()
    return convolve(images, (weights @ disk @ weights.T)[None], "reflect")


def glass_blur(images, generator, sigma, distance, times):
    """Blur, then `times` from the last pixel to the first: take the color that a pixel at most
    `distance` away has by now; blur again.

    As published: that code means to swap the two colors, but numpy copies one of them.
    A distance with a fraction is rounded up for that share of the pixels."""
    b, c, h, w = images.shape
    whole, fraction = divmod(distance * side_ratio(images), 1)
    edge = whole + (fraction > 0)  # the width of a border that keeps its colors
    sigma = sigma * side_ratio(images)
    images = gaussian_filter(images, sigma, mirrored=False).flatten(2)
    own = torch.arange(h * w).view(h, w)
    y, x = own // w, own % w
    inside = (y > edge) & (y <= h - edge) & (x > edge) & (x <= w - edge)
    for _ in range(times):
        far = whole + (torch.rand(b, 2, h, w, generator=generator) < fraction)
        dy, dx = (uniform(-1, 1, b, 2, h, w, generator=generator) * far).floor().long().unbind(1)
        source = torch.where(inside, own + dy * w + dx, own).flatten(1).to(images.device)
        # A source that comes later in the image has been overwritten by then, and stands for its
        # own source. Doubling the jumps six times follows chains of up to 64.
        back = torch.maximum(source, own.flatten().to(source))
        for _ in range(6):
            back = back.gather(1, back)
        source = source.gather(1, back)
        images = images.gather(2, source[:, None].expand(b, c, h * w))
    return gaussian_filter(images.view(b, c, h, w), sigma, mirrored=False)


def blur_along(images, angle, radius, sigma, border="replicate"):
    """Blur along angle (b,) in degrees, by half a Gaussian cut at 2 radius.

    As in ImageMagick a pixel sees what lies in this direction, down for 90 degrees."""
    length, steps = 2 * radius * side_ratio(images), 2 * radius * math.ceil(side_ratio(images))
    far = -torch.linspace(0, 1, steps + 1, device=images.device)  # a kernel is mirrored
    weight = (-((far * 2 * radius / sigma) ** 2) / 2).exp()
    angle = angle.to(images).deg2rad()[:, None]
    rows = bilinear_weights(far * length * angle.sin(), math.ceil(length))
    columns = bilinear_weights(far * length * angle.cos(), math.ceil(length))
    return convolve(images, rows * weight @ columns.mT, border)


def motion_blur(images, generator, radius, sigma):
    angle = uniform(-45, 45, len(images), generator=generator)
    return blur_along(images, angle, radius, sigma)


def warp(images, theta, padding, shift=0):
    """images (b c h w) -> (b c h w): the pixel at p comes from theta @ (p, 1) + shift.

    p: x and y in [-1, 1]; theta (2 3) or (b 2 3); shift (b h w xy)."""
    theta = theta.expand(len(images), 2, 3).to(images)
    grid = F.affine_grid(theta, images.shape, align_corners=False) + shift
    return F.grid_sample(images, grid, padding_mode=padding, align_corners=False)


def zoom_blur(images, generator, step, count):
    """The average of the image and `count` zooms into its center: by 1, 1 + step, 1 + 2 step ..."""
    zooms = (warp(images, torch.eye(2, 3) / (1 + i * step), "border") for i in range(count))
    return sum(zooms, images) / (count + 1)


def snow(images, generator, mean, std, zoom, threshold, radius, sigma, keep):
    """Flakes are coarse noise above `threshold`, motion-blurred; the image is bleached."""
    b, cells = len(images), math.ceil(REFERENCE_SIZE / zoom)
    cells = torch.randn(b, 1, cells, cells, generator=generator).to(images) * std + mean
    flakes = F.interpolate(cells, (REFERENCE_SIZE,) * 2, mode="bilinear", align_corners=True)
    flakes = resize(F.threshold(flakes, threshold, 0).clamp(0, 1), images.shape[-1])
    angle = uniform(-135, -45, b, generator=generator)
    flakes = blur_along(flakes, angle, radius, sigma)
    bleached = torch.maximum(images, loo.grayscale(images) * 1.5 + 0.5)
    return keep * images + (1 - keep) * bleached + flakes + flakes.rot90(2, (2, 3))


def plasma(b, side, decay, generator):
    """Clouds by the diamond-square algorithm -> (b 1 side side).

    As published: a cut of 7/8 from a field that spans [0, 1]. Every pass doubles a periodic grid:
    first the centers of its cells, then those of their sides, become the mean of four neighbors
    plus noise, which is `decay` ** 2 smaller each time."""
    grid, noise = torch.zeros(b, 1, 1), 1.0
    full = 1 << (side * 8 // 7 - 1).bit_length()
    while grid.shape[-1] < full:
        shape, rand = grid.shape, functools.partial(uniform, -1, 1, generator=generator)
        below, right = grid.roll(-1, 1), grid.roll(-1, 2)
        center = (grid + below + right + below.roll(-1, 2)) / 4 + noise * rand(*shape)
        top = (grid + right + center + center.roll(1, 1)) / 4 + noise * rand(*shape)
        left = (grid + below + center + center.roll(1, 2)) / 4 + noise * rand(*shape)
        grid = torch.stack([grid, top, left, center])
        grid = rearrange(grid, "(y x) b h w -> b (h y) (w x)", y=2)
        noise /= decay**2
    low, high = grid.amin((1, 2), keepdim=True), grid.amax((1, 2), keepdim=True)
    return resize(((grid - low) / (high - low))[:, None, : full * 7 // 8, : full * 7 // 8], side)


def fog(images, generator, amount, decay):
    clouds = plasma(len(images), images.shape[-1], decay, generator).to(images)
    lightest = images.amax((1, 2, 3), keepdim=True)
    return (images + amount * clouds) * lightest / (lightest + amount)


def frost(images, generator, keep, amount):
    """Add ice: not the published photographs, but drawn blades of four angles over clouds."""
    b, side = len(images), images.shape[-1]
    size = 4 * b, 1, side, side
    dots = torch.rand(size, generator=generator)
    dots = dots * (torch.rand(size, generator=generator) < 0.006 / side_ratio(images) ** 2)
    angle = uniform(0, 360, 4 * b, generator=generator)
    blades = blur_along(dots.to(images), angle, 15, 10, "circular")
    blades = blur_along(blades, angle + 30, 6, 4, "circular")
    blades = rearrange(blades, "(b n) 1 h w -> b n h w", n=4).amax(1, keepdim=True)
    clouds = plasma(b, side, 1.5, generator).to(images)
    relief = F.instance_norm(blades) * 0.9 + F.instance_norm(clouds) * 0.45
    colors = torch.tensor([[0.34, 0.49, 0.55], [0.81, 0.82, 0.86]]).to(images)
    dark, light = colors[:, None, :, None, None]
    white = torch.rand(b, 1, 1, 1, generator=generator).to(images)
    ice = torch.lerp(dark, light, white) + (0.19 - 0.09 * white) * relief
    return keep * images + amount * ice


def brightness(images, generator, amount):
    """Add to HSV's value, which scales a color as a whole; black becomes gray."""
    value = images.amax(1, keepdim=True)
    lighter = (value + amount).clamp(max=1)
    return torch.where(value > 0, images * lighter / value, lighter)


def contrast(images, generator, factor):
    return torch.lerp(images.mean((2, 3), keepdim=True), images, factor)


def elastic_transform(images, generator, alpha, sigma, shift):
    """An affine map that moves three points by up to `shift`, then blurred noise of +-alpha.

    alpha scales with the area, as blurred noise goes down with sigma: displacements as lengths."""
    b, s = len(images), side_ratio(images)
    # Three corners of a square that reaches a third of the side from the center, each way.
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) * 2 / 3
    moved = corners + uniform(-shift, shift, b, 3, 2, generator=generator) * 2 / REFERENCE_SIZE
    theta = torch.linalg.solve(F.pad(moved, (0, 1), value=1), corners.expand(b, 3, 2)).mT
    noise = uniform(-1, 1, b, 2, *images.shape[2:], generator=generator).to(images)
    local = gaussian_filter(noise, sigma * s) * alpha * s * 2 / REFERENCE_SIZE
    local = rearrange(local, "b xy h w -> b h w xy")
    images = warp(images, theta, "reflection")
    return warp(images, torch.eye(2, 3), "reflection", local)


def pixelate(images, generator, share):
    """Keep `share` of the pixels each way: every block becomes its mean."""
    n = images.shape[-1]
    block = ((torch.arange(n, device=images.device) + 0.5) * int(n * share) / n).long()
    same = (block[:, None] == block).float()
    mean = same / same.sum(1)
    return mean @ images @ mean.T


def jpeg_compression(images, generator, quality):
    coded = []
    for image in to_uint8(images).cpu():
        file = io.BytesIO()
        to_pil_image(image).save(file, "JPEG", quality=quality)
        coded.append(pil_to_tensor(Image.open(file)))
    return torch.stack(coded).to(images) / 255


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
        [(488, 170.8, 24.4), (488, 19.52, 48.8)]
        + [(alpha, 2.44, 4.88) for alpha in (12.2, 17.08, 29.28)],
    ),
    "pixelate": (pixelate, [(0.6,), (0.5,), (0.4,), (0.3,), (0.25,)]),
    "jpeg_compression": (jpeg_compression, [(25,), (18,), (15,), (10,), (7,)]),
}


# ---------------------------------------------------------------- style transfer, group `texture`

STYLES = 56  # drawn by code
COPIES = 4  # of an image: of one copy alone, two views would often have the same texture


def fractal_noise(n, size, decay, generator):
    """Smooth noise of all scales -> (n size size), mean 0, deviation 1; more decay is softer."""
    out, k = 0, 4
    while k <= size:
        octave = torch.randn(n, 1, k, k, generator=generator) * k**-decay
        out = out + F.interpolate(octave, size=size, mode="bicubic", align_corners=False)[:, 0]
        k *= 2
    return (out - out.mean((1, 2), keepdim=True)) / out.std((1, 2), keepdim=True)


def zigzag(t):
    """t (...) -> (...): a triangle wave of period 1 in [-1, 1]."""
    return (t - t.floor() - 0.5).abs() * 4 - 1


def texture_relief(n, size, g):
    """Heights (n size size) of 14 patterns in turn, each with its own angle, scale and warp."""
    rand = functools.partial(uniform, generator=g)
    line = torch.linspace(-1, 1, size)
    x, y = torch.meshgrid(line, line, indexing="xy")
    angle, zoom, bent = (rand(*r, n, 1, 1) for r in ((0, math.tau), (2.5, 9), (0, 0.25)))
    soft, fine, *bend = (fractal_noise(n, size, decay, g) for decay in (1.5, 0.5, 1.2, 1.2))
    bend_x, bend_y = bend[0] * bent, bend[1] * bent
    u = (angle.cos() * x + angle.sin() * y + bend_x) * zoom
    v = (angle.cos() * y - angle.sin() * x + bend_y) * zoom
    wave_u, wave_v = (math.tau * u).sin(), (math.tau * v).sin()
    cell, brick = torch.hypot(u - u.round(), v - v.round()), u + 0.5 * (v.floor() % 2)
    joint = torch.minimum(0.5 - (brick - brick.round()).abs(), 0.5 - (v - v.floor() - 0.5).abs())
    points = torch.stack([x + bend_x / 2, y + bend_y / 2], -1).flatten(1, 2)
    distance = torch.cdist(points, rand(-1.2, 1.2, n, 36, 2))
    near, second = distance.topk(2, largest=False).values.view(n, size, size, 2).unbind(3)
    woven = (u.floor() + v.floor()) % 2 > 0
    patterns = dict(
        stripes=wave_u,
        checks=(4 * wave_u * wave_v).tanh(),
        dots=((0.3 - cell) * 12).tanh(),
        bricks=((joint - 0.07) * 30).tanh(),
        wood=(math.tau * torch.hypot(u, 0.35 * v)).sin(),
        marble=(3 * u + 2.5 * soft).sin(),
        clouds=soft,
        cells=near * 9 - 1.2,
        cracks=((second - near) * 14 - 0.6).tanh(),
        chevrons=zigzag(u + zigzag(v) * 0.35),
        weave=torch.where(woven, zigzag(u * 2), zigzag(v * 2)),
        lichen=(fine * 3 - 1.5).tanh(),
        scales=(cell * math.tau * 1.5).cos(),
        veins=(1 - soft.abs() * 3).clamp(-1, 1),
    )
    i = torch.arange(n)
    height = torch.stack(list(patterns.values()))[i % len(patterns), i]
    return (height + fine * rand(0.02, 0.35, n, 1, 1)).clamp(-1.5, 1.5)


def procedural_textures(n, size, seed=0):
    """Textures drawn by code, the styles where no folder is given -> (n 3 size size) in [0, 1]."""
    g = make_generator("materials", seed)
    height = texture_relief(n, size, g)
    rand = functools.partial(uniform, generator=g)
    hue, saturation, value = (rand(*r, n, 3) for r in ((0, 1), (0.1, 0.9), (0.1, 1)))
    color = hsv_to_rgb(*(x.T.reshape(3 * n, 1, 1) for x in (hue, saturation, value)))
    dark, middle, light = color.view(3, n, 3, 1, 1)
    t = height[:, None] / 1.5
    lower = torch.lerp(dark / 2, middle, (t + 1).clamp(max=1))
    upper = torch.lerp(middle, (light + 1) / 2, t.clamp(min=0))
    dy, dx = torch.gradient(height, dim=(1, 2))
    shading = (1 + (dx - dy) * rand(0, 0.8, n, 1, 1) * size / 64).clamp(0.4, 1.6)[:, None]
    return (torch.where(t < 0, lower, upper) * shading).clamp(0, 1)


def guided_filter(images, radius, eps=0.003, times=2):
    """Smooth texture away and keep edges: He et al.'s guided filter, by luminance; (b c h w)."""

    def box(x):
        padded = F.pad(x, (radius,) * 4, mode="reflect")
        return F.avg_pool2d(padded, 2 * radius + 1, stride=1)

    for _ in range(times):
        guide = rgb_to_grayscale(images)
        middle, mean = box(guide), box(images)
        variance = box(guide * guide) - middle * middle + eps
        slope = (box(guide * images) - middle * mean) / variance
        images = box(slope) * guide + box(mean - slope * middle)
    return images


def match_color(images, style):
    """Give images (b 3 h w) the mean and covariance of the colors of style (b 3 h w)."""

    def moments(x):
        pixels = x.flatten(2)
        mean = pixels.mean(2, keepdim=True)
        cov = (pixels - mean) @ (pixels - mean).mT / x[0, 0].numel()
        return mean, cov + 1e-4 * torch.eye(3, device=x.device)

    def power(matrix, p):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag_embed(values.clamp(min=1e-6) ** p) @ vectors.mT

    (mean, cov), (style_mean, style_cov) = moments(images), moments(style)
    transform = power(style_cov, 0.5) @ power(cov, -0.5)
    return (transform @ (images.flatten(2) - mean) + style_mean).view_as(images)


def random_features(images, filters=48):
    """Fixed random 5 x 5 filters at every scale (Ustyuzhaninov et al. 2017), half of them blind to
    the mean, then ReLU: (b 3 h w) -> maps [(b f h w), ...] fine to coarse, the content map's index.
    """
    bank = torch.randn(filters, 3, 5, 5, generator=make_generator("filters"))
    bank[::2] -= bank[::2].mean((1, 2, 3), keepdim=True)
    bank = (bank / bank.flatten(1).norm(dim=1)[:, None, None, None]).to(images)
    maps, content = [], 0
    while images.shape[-1] >= 8:
        content = len(maps) if images.shape[-1] >= 32 else content
        maps.append(F.relu(F.conv2d(F.pad(images - 0.5, (2,) * 4, mode="reflect"), bank)))
        images = F.avg_pool2d(images, 2)
    return maps, content


def vgg_features(net, images):
    """conv1_1, 2_1, 3_1, 4_1, 4_2 and 5_1 of torchvision's VGG-19 after ReLU (Gatys et al. 2016):
    (b 3 h w) -> maps [(b f h w), ...], content map's index (conv4_2; the style has it too)."""
    maps, x = [], loo.normalize(images)
    for i, layer in enumerate(net.features[:30]):
        x = layer(x)
        if i in (1, 6, 11, 20, 22, 29):
            maps.append(x)
    return maps, 4


def style_features(name, device):
    """auto, vgg19 or random -> function: images -> (maps, content), and its name."""
    if name == "random":
        return random_features, "random"
    try:
        net = torchvision.models.vgg19(weights="DEFAULT")
    except Exception as error:  # offline, or a file that was cut short
        if name == "auto":
            return random_features, "random"
        problem = f"the weights of VGG-19 cannot be had ({first_line(error)})"
        raise UserError(f"{problem}: --features=random needs none") from None
    return functools.partial(vgg_features, net.eval().requires_grad_(False).to(device)), "vgg19"


def gram(maps):
    """(b f h w) -> (b f f)"""
    maps = maps.float().flatten(2)
    return maps @ maps.mT / maps.shape[2]


def relative_error(x, goal):
    """Mean square of x - goal over that of goal, summed over the batch -> ()"""
    error, goal = (x.float() - goal).square(), goal.float().square()
    return (error.flatten(1).mean(1) / goal.flatten(1).mean(1)).sum()


@torch.enable_grad()
def style_transfer(
    images,
    styles,
    features=random_features,
    steps=10,
    content_weight=0.1,
    strength=0.7,
    keep_color=False,
):
    """Another texture, the same shape (Gatys et al. 2016): images, styles (b 3 s s) in [0, 1].

    Starts from the image's structure in the style's colors with the style's fine detail on it,
    where little is left to do, then follows the gradient of Gram matrices towards the style and of
    the content map towards that structure. keep_color: the style takes the image's colors instead.
    random_features need s of 8 or more.
    """
    loo.check_shapes({"c": 3}, images=(images, "b c s s"), styles=(styles, "b c s s"))
    loo.check_images(images, (torch.float32,))
    loo.check_images(styles, (torch.float32,), name="styles")
    size = images.shape[-1]
    with torch.no_grad():
        styles = match_color(styles, images).clamp(0, 1) if keep_color else styles
        smooth = match_color(guided_filter(images, max(1, size // 32)), styles)
        coarse = F.avg_pool2d(styles, max(1, size // 8))
        coarse = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)
        out = (smooth + strength * (styles - coarse)).clamp(0, 1)
        goals = [gram(m) for m in features(styles)[0]]
        maps, content_index = features(smooth.clamp(0, 1))
        structure, momentum = maps[content_index], torch.zeros_like(out)
    for i in range(steps):
        out.requires_grad_()
        with torch.autocast(out.device.type, torch.bfloat16, enabled=out.is_cuda):
            maps, _ = features(out)
        loss = sum(relative_error(gram(m), goal) for m, goal in zip(maps, goals))
        loss = loss + content_weight * relative_error(maps[content_index], structure)
        (gradient,) = torch.autograd.grad(loss, out)
        with torch.no_grad():  # steps of one length for each image, which falls from 0.01
            norm = gradient.square().mean((1, 2, 3), keepdim=True).sqrt() + 1e-12
            momentum = 0.8 * momentum + 0.2 * gradient / norm
            out = (out - 0.01 * (1 - i / steps) * momentum).clamp(0, 1)
    return out.detach()


def copy_paths(path, top, root, count):
    """The stylized copies of an image below `top`: the same path below `root`, numbered."""
    target = Path(root) / path.relative_to(top)  # a.png and a.jpg are two images
    return [target.with_name(f"{target.name}.{k}.jpg") for k in range(count)]


def with_textures(name, files, dataset, root, textures, cache, workers, device, split_seed):
    """The decoded `dataset` with its stylized copies, from the folder `textures`.

    files: the same set before decoding. Those of `factors` are made here and kept in `cache`."""
    if name == "factors":
        return dataset._replace(textures=factors_textures(dataset, cache, device))
    if DATASETS[name].torchvision:
        raise UserError(f"--data={name}: torchvision's sets have no stylized copies; use a folder")
    flags = [f"--data={name}", f"--root={root}", f"--split_seed={split_seed}"]
    flags += [f"--out={textures}"] if textures else []
    hint = f"`python data.py stylize {shlex.join(flags)}` writes it"
    if not textures:
        raise UserError(f"--groups=texture needs --textures=DIR; {hint}")
    side, top, unread = dataset.images.shape[-1], check_root(root, name), set(dataset.unreadable)
    paths = [path for i, path in enumerate(files.images.source) if i not in unread]
    count = 1
    while copy_paths(paths[0], top, textures, count + 1)[-1].exists():
        count += 1
    copies = [copy for path in paths for copy in copy_paths(path, top, textures, count)]
    if lost := [path for path in copies if not path.exists()]:
        raise UserError(f"{lost[0]}: no such file; {hint} (with --copies={count}, its --styles)")
    advice = "remove it: `python data.py stylize` writes it again"
    copies = ImageFiles(copies, read_image, side, advice=advice)
    copies = ImageSet(copies, torch.ones(len(copies)), {}, {})
    copies = decode_cached(copies, workers, cache, shared=dataset.images.is_shared())
    held = dataset.held | {"textures": copies.held["root"]}
    return dataset._replace(textures=copies.images.view(len(paths), -1, 3, side, side), held=held)


def factors_textures(dataset, cache, device):
    """Stylized copies (n copy 3 h w) uint8 of the images of `factors`, made once."""
    path = Path(cache) / f"factors-textures-{COPIES}-{fingerprint(dataset)[:16]}.pt"
    if path.exists():
        return read_tensors(path)
    n, side = len(dataset.images), dataset.images.shape[-1]
    print(f"making {COPIES} stylized copies of {n} images, once: {path}", flush=True)
    styles = F.interpolate(procedural_textures(STYLES, max(64, side)), size=side, mode="area")
    copies = torch.zeros(n, COPIES, 3, side, side, dtype=torch.uint8)
    for rows in torch.arange(n).split(64):
        first = int(rows[0])
        if first and first % 2048 == 0:
            print(f"{first} of {n}", flush=True)
        picks = torch.rand(len(rows), STYLES, generator=make_generator("style", first))
        images = dataset.images[rows].to(device) / 255
        for copy, pick in enumerate(picks.argsort(1)[:, :COPIES].unbind(1)):
            # the colors stay: hue is another group's
            changed = style_transfer(images, styles[pick].to(device), keep_color=True)
            copies[rows, copy] = to_uint8(changed).cpu()
    with optional_write(path):
        write_tensors(path, copies)
    return copies


# ---------------------------------------------------------------- commands


@typed
def stylize(
    data: str = "folder",
    root: str = None,
    styles: str = None,
    out: str = "stylised",
    *,
    copies: int = COPIES,
    size: int = 256,
    split: str = "train",
    features: str = "auto",
    steps: int = 10,
    strength: float = 0.7,
    batch: int = 32,
    device: str = "auto",
    seed: int = 0,
    split_seed: int = 0,
):
    """Write stylized copies of a set's images, a tree that mirrors it: texture gone, shape kept.

    For `python loo.py train --groups=texture --textures=OUT`. Continues where it stopped.

    Args:
        data: folder or imagenet100, cub200, inat2019, flowers102
        root: where the data is
        styles: a folder of images; without it, textures drawn by code
        out: folder to write to
        copies: of each image, every one in another style
        size: of a copy's shorter side, in pixels
        split: train, or val or test to look at
        features: vgg19 (torchvision's weights, downloaded once), random, or auto: vgg19 if possible
        steps: of the optimization
        strength: of the style's detail at the start
        batch: images at once
        device: auto, cpu or cuda
        seed: which style each image gets
        split_seed: of the folder's own split
    """
    check_choice("features", features, ("auto", "vgg19", "random"))
    if check_choice("data", data, DATASETS) == "factors" or DATASETS[data].torchvision:
        raise UserError(f"--data={data} is no tree of images (factors makes copies in training)")
    where = dict(root=root, size=size, canvas=size, split_seed=split_seed)
    files = open_dataset(data, split, **where).images
    top = check_root(root, data)
    if data == "folder":
        forbid_inside(out, top)
    device = resolve_device(device)
    style_of = style_reader(styles, size, seed)
    features, name = style_features(features, device)
    targets = [copy_paths(path, top, out, copies) for path in files.source]
    jobs = [(i, copy) for i, found in enumerate(targets) for copy in found if not copy.exists()]
    n, total = len(jobs), len(targets) * copies
    settings = dict(size=size, features=name, steps=steps, strength=strength, seed=seed)
    settings["styles"] = styles and Path(styles).name
    check_same_copies(Path(out) / ".stylize.json", settings, out)
    print(f"{total - n} of {total} copies are there", end="; ")
    print(f"styles from {styles or 'code'}, features {name}, {device}", flush=True)
    begun, shown = time.perf_counter(), 0
    files = ImageFiles([files.source[i] for i, _ in jobs], files.read, size)
    inputs = iter_batches(ImageSet(files, None, {}, {}), None, batch, named=None) if jobs else ()
    with ThreadPoolExecutor() as pool:
        for rows, images, aspects in inputs:
            paths = [jobs[row][1] for row in rows]
            style = torch.stack([*pool.map(style_of, [path.relative_to(out) for path in paths])])
            images, style = images.to(device) / 255, style.to(device)
            done = style_transfer(images, style, features, steps, strength=strength)
            list(pool.map(save_copy, paths, to_uint8(done).cpu(), aspects.tolist()))
            end = int(rows[-1]) + 1
            if end * 10 // n > shown or sys.stdout.isatty():
                shown = end * 10 // n
                rate = end / (time.perf_counter() - begun)
                left = (n - end) / rate / 60
                print(f"{end}/{n}  {rate:.1f} images/s  {left:.0f} minutes left", flush=True)
    flags = shlex.join(["--groups=color,rotation,texture", f"--textures={out}"])
    print(f"wrote {out}; train with {flags}")


def check_same_copies(path, settings, out):
    """UserError where copies of other settings, which the file `path` keeps, are in the folder."""
    then = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        then = dict(json.loads(path.read_text()))
    other = [f"--{k}={then[k]}" for k, v in settings.items() if then.get(k, v) != v]
    if other:
        raise UserError(f"{out} holds copies of {', '.join(other)}: name another --out")
    write_atomic(path, json.dumps(settings).encode())


def save_copy(path, image, aspect):
    """image (3 size size) uint8 -> a JPEG of its original aspect, `size` its shorter side."""
    size = image.shape[-1]
    longest = 65500  # of a JPEG
    sides = [min(longest, round(size * max(x, 1))) for x in (aspect, 1 / aspect)]
    image = to_pil_image(image).resize(sides, Image.Resampling.BICUBIC)
    write_atomic(path, functools.partial(image.save, format="JPEG", quality=95))


def style_reader(styles, size, seed):
    """A folder of styles, or None for textures drawn by code -> function: copy's path -> style."""
    choices = image_paths(Path(styles)) if styles else procedural_textures(STYLES, size, seed)
    if not len(choices):
        raise UserError(f"--styles={styles}: no images in this folder")

    def read(copy):
        g = make_generator("style", seed, str(copy))
        style = choices[int(torch.randint(1 << 30, (1,), generator=g)) % len(choices)]
        if not styles:
            return style
        try:
            image = ImageOps.fit(read_image([style], 0), (size, size), Image.Resampling.BICUBIC)
        except UserError as error:
            raise UserError(f"{error}; remove it from --styles and start again") from None
        return pil_to_tensor(image) / 255

    return read


@typed
def pack(
    data: str = "folder",
    root: str = None,
    out: str = "runs",
    size: int = 224,
    canvas: int = None,
    workers: int = None,
    download: bool = False,
    split_seed: int = 0,
):
    """Decode a training set once, for every later `python loo.py train --packed=OUT` on it.

    Training must use the same data, size and canvas.

    Args:
        data: folder, imagenet100 or another set of images
        root: where the data is
        out: folder to write to; runs, the default, is where training looks without --packed
        size: side of a view in pixels
        canvas: side of the stored images, by default as in training with the set's own recipe
        workers: processes that decode images, by default one for each core
        download: let torchvision fetch the data
        split_seed: of the folder's own split
    """
    if data == "factors":
        raise UserError("--data=factors is drawn by code: there is nothing to decode")
    if data == "folder":
        forbid_inside(out, check_root(root))
    canvas = canvas or loo.recipe_canvas(data, size)
    where = dict(root=root, size=size, canvas=canvas, split_seed=split_seed)
    files = open_dataset(data, "pretrain", download=download, **where)
    images = decode_all(files, workers, out, shared=True).images
    n, _, side, _ = images.shape
    gib = images.numel() / 2**30
    where |= dict(data=data, packed=out)
    flags = shlex.join(f"--{name}={value}" for name, value in where.items() if value)
    print(f"{n} images of {side} x {side} ({gib:.2f} GiB) in {out}; train with {flags}")


@typed
def check(data: str = "factors", root: str = None, sample: str = "64", download: bool = False):
    """Is a data set complete? Compares its counts with the published ones and opens a sample.

    Args:
        data: imagenet100, inat2019, cub200, flowers102, objectnet13, imagenetc100, folder or a
            torchvision set
        root: where it is
        sample: files of each split to open, or all; the unreadable ones are named
        download: let torchvision fetch the data
    """
    most = parse_flag("sample", int, sample, RANGES["sample"]) if sample != "all" else sys.maxsize
    problems, source = [], DATASETS[check_choice("data", data, DATASETS)]
    splits = dataset_splits(data, root)
    if source.address and not download:
        check_root(root, data)
    print("| split | classes | published | images | published | missing | opened |")
    print("|---" * 7 + "|")
    for split in splits:
        classes, count = source.splits[split] if source.address else (None, None)
        try:
            found = open_dataset(data, split, root=root, download=download, whole=False)
        except UserError as error:
            problems.append(str(error))
            print(f"| {split} | 0 | {classes or '-'} | 0 | {count or '-'} | all | - |")
            continue
        files, n = found.images, len(found.images)
        labels = found.labels[next(iter(label_names(found.classes) or found.labels))]
        seen = len(labels[labels >= 0].unique())
        missing = [path for path in files.source if not path.exists()] if source.address else []
        opened = range(0, 0 if torch.is_tensor(files) else n, max(1, n // most))
        errors = [error for i in opened if (error := files[i][2])]
        good = f"{len(opened) - len(errors)} of {len(opened)}"
        counts = f"{seen} | {classes or '-'} | {n - len(missing)} | {count or '-'}"
        print(f"| {split} | {counts} | {len(missing)} | {good} |", flush=True)
        if source.address:
            problems += incomplete(data, split, files.source, labels.tolist())
        for error in errors:
            print(f"warning: unreadable: {error}", file=sys.stderr)
        problems += errors
    if problems:
        others = f" (and {len(problems) - 1} more findings)" if problems[1:] else ""
        known = not source.address or source.address in problems[0]
        advice = "" if known else f"; get it at {source.address}"
        raise UserError(f"{data} is not whole: {problems[0]}{others}{advice}")
    print(f"{data} is whole" if source.address else f"{data}: all files opened are images")


def drawable(names, font):
    """Names as this font can draw them: letters that it does not have as Python escapes them."""
    box = bytes(font.getmask("\U0010fffd"))  # what it draws for a letter it does not have
    for letter in set("".join(names)):
        if not letter.isprintable() or bytes(font.getmask(letter)) == box:
            names = [name.replace(letter, ascii(letter)[1:-1]) for name in names]
    return names


def image_grid(images, row_names, column_names, path, zoom=1):
    """images (r k 3 h w) in [0, 1] -> a PNG with a name at each row and column."""
    rows, columns, _, h, w = images.shape
    images = to_uint8(images).cpu().repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
    width, height = w * zoom + 3, h * zoom + 3
    font = ImageFont.load_default(10)
    row_names, column_names = drawable(row_names, font), drawable(column_names, font)
    left, top = 12 + int(max(map(font.getlength, row_names))), 20
    canvas = Image.new("RGB", (left + columns * width, top + rows * height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = font
    for j, name in enumerate(column_names):
        pen.text((left + j * width, 4), name, fill="black")
    for i, name in enumerate(row_names):
        pen.text((4, top + i * height + h * zoom // 2 - 6), name, fill="black")
        for j in range(columns):
            canvas.paste(to_pil_image(images[i, j]), (left + j * width, top + i * height))
    write_atomic(Path(path), functools.partial(canvas.save, format="PNG"))


# Petroff's ten colors, which the color-blind tell apart (arXiv:2107.02270).
COLORS = ["#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70"]
COLORS += ["#717581", "#92dadd"]


def draw_curves(panels, path, x_name, columns=None):
    """panels {title: {curve: [(x, y), ...]}} -> a PNG of line plots with one legend.

    A curve looks the same in all panels; what is not finite is left out. By default the panels
    stand in one row. The drawing is halved at the end, to be smooth."""
    columns = columns or len(panels) or 1
    names = list(dict.fromkeys(itertools.chain(*panels.values())))
    styles = dict(zip(names, itertools.cycle(itertools.product((5, 2), COLORS))))
    font = ImageFont.load_default(24)
    legends = drawable(names, font)
    width, height = 840, 560
    legend = 120 + int(max(map(font.getlength, legends), default=0))
    rows = math.ceil(len(panels) / columns)
    size = columns * width + legend, max(rows * height, 60 + 40 * len(names))
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    pen.font = font
    for i, (title, curves) in enumerate(panels.items()):
        left, top = i % columns * width + 110, i // columns * height + 60
        pen.text((left, top - 15), f"{title}, by {x_name}", "black", anchor="ls")
        draw_panel(pen, (left, top, left + 700, top + 430), curves, styles)
    for i, (name, (thick, color)) in enumerate(zip(legends, styles.values())):
        x, y = columns * width + 10, 80 + 40 * i
        pen.line((x, y, x + 50, y), color, thick)
        pen.text((x + 65, y), name, "black", anchor="lm")
    write_atomic(Path(path), functools.partial(canvas.reduce(2).save, format="PNG"))


def draw_panel(pen, box, curves, styles):
    """Draw curves {name: [(x, y), ...]} in box (left, top, right, bottom), on a grid."""
    left, top, right, bottom = box

    def finite(points):
        return [point for point in points if all(map(math.isfinite, point))]

    points = finite(itertools.chain(*curves.values()))
    if not points:
        return
    (x_low, x_high, x_ticks), (y_low, y_high, y_ticks) = map(axis_range, zip(*points))

    def place(x, y):
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    for tick in x_ticks:
        x, _ = place(tick, y_low)
        pen.line((x, top, x, bottom), "#e4e4e4", 2)
        pen.text((x, bottom + 12), f"{tick:g}", "black", anchor="mt")
    for tick in y_ticks:
        _, y = place(x_low, tick)
        pen.line((left, y, right, y), "#e4e4e4", 2)
        pen.text((left - 12, y), f"{tick:g}", "black", anchor="rm")
    for name, curve in curves.items():
        thick, color = styles[name]
        places = [place(x, y) for x, y in finite(curve)]
        if places:
            pen.line(places, color, thick, joint="curve")
            x, y = places[-1]  # a single point has no line
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), color)


def axis_range(values):
    """The range of an axis, with room around the values -> low, high, a few round numbers."""
    low, high = min(values), max(values)
    room = (high - low) / 20 or abs(high) / 20 or 1
    low, high = low - room, high + room
    power = 10 ** math.floor(math.log10((high - low) / 6))
    step = next(power * k for k in (1, 2, 5, 10) if power * k * 6 >= high - low)
    return low, high, [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


@typed
def sheet(out: str = "docs/factors.png", size: int = 48):
    """A labeled sheet of `factors`: a row for each object, a column for each hue.

    Args:
        out: the image file to write
        size: of each image in it, in pixels
    """
    check_user_out(out)
    found = factors("train", size)
    species = found.labels["species"]
    first = [int((species == i).nonzero()[0]) for i in range(len(OBJECTS) * HUES)]
    images = found.images[first].unflatten(0, (len(OBJECTS), HUES)) / 255
    image_grid(images, found.classes["object"], found.classes["hue"], out)
    print(f"wrote {out}")


# ---------------------------------------------------------------- shared by the three scripts

EXPECTED = {int: "a whole number", float: "a number, such as 0.03", bool: "true or false"}
EXPECTED |= {str: "text or a path", tuple: "words with commas between"}
# The lowest and the highest value of numbers, and both in words: of a flag, else of its type. Some
# commands have their own.
COUNT = (1, 2**31 - 1, "1 or more, below 2**31")
POSITIVE = (math.nextafter(0.0, 1.0), sys.float_info.max, "more than 0, and finite")
RANGES = {
    int: (-(2**63), 2**64 - 1, "a number of 64 bits"),
    float: (-sys.float_info.max, sys.float_info.max, "a finite number"),
    **dict.fromkeys(("epochs", "batch", "queue", "dim", "splits", "save_every"), COUNT),
    **dict.fromkeys(("sample", "pictures", "queries", "neighbours"), COUNT),
    **dict.fromkeys(("hidden", "steps"), (0, 2**31 - 1, "0 or more, below 2**31")),
    **dict.fromkeys(("lr", "tau"), POSITIVE),
    **dict.fromkeys(("p", "gray", "area"), (0, 1, "0 to 1")),
    **dict.fromkeys(("size", "canvas"), (2, 2**14, "2 or more, at most 16384")),
    **dict.fromkeys(("copies", "seeds"), (1, 1000, "1 or more, at most 1000")),
    "weight_decay": (0, sys.float_info.max, "0 or more, and finite"),
    "momentum": (0, 1, "0 to 1; it is the key encoder's, not SGD's"),
    "workers": (0, 1000, "0 or more, at most 1000"),
    "trials": (2, 10_000, "2 or more, at most 10000"),
    "jobs": (1, 1, "1, commands run one after the other: leave the flag out"),
    "margin": (0, 100, "0 to 100"),
    "strength": (0, 10, "0 to 10"),
    "sheet size": (8, 1024, "8 or more, at most 1024"),
    "stylize size": (16, 2**14, "16 or more, at most 16384"),
    "bench steps": (2, 2**31 - 1, "2 or more, below 2**31"),
}


def suggest(word, words):
    known = {str(choice).lower(): choice for choice in words}
    close = difflib.get_close_matches(str(word).lower(), known, 1, 0.6)
    return f"did you mean {known[close[0]]}? " if close else ""


def check_choice(flag, word, words):
    """word if it is one of words, else UserError with the closest."""
    if word not in words:
        is_folder = flag == "data" and Path(str(word)).is_dir()
        hint = f"did you mean --data=folder --root={word}? " if is_folder else suggest(word, words)
        raise UserError(f"--{flag}={word}: {hint}expected one of {', '.join(words)}")
    return word


def parse_flag(flag, kind, value, limits):
    """A flag's value as its type, from the command line or from Python; UserError if it is none.

    limits: of a number, a row of RANGES. A name that begins with ~ is one in the home folder."""
    expected = EXPECTED[kind]
    # What Python has for a word of the shell: --shots=5, --device=cpu, --schedule=300,400.
    word = {str: torch.device, tuple: (numbers.Integral, Path)}.get(kind, ())
    if isinstance(value, word) and not isinstance(value, bool):
        value = str(value)
    elif kind is str and isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
        if kind is str:
            if text := os.path.expanduser(os.fspath(value)):
                return text
        elif kind is tuple and not isinstance(value, (set, frozenset)):  # a set has no order
            words = value.split(",") if isinstance(value, str) else map(str, value)
            return tuple(os.path.expanduser(word.strip()) for word in words if word.strip())
        elif kind is bool:
            words = {"true": True, "false": False, True: True, False: False}
            return words[value.lower() if isinstance(value, str) else value]
        elif not isinstance(value, bool):
            number = kind(value)
            if isinstance(value, str) or number == value:  # int of 0.5 is another number
                low, high, expected = limits
                if low <= number <= high:
                    return number
    raise UserError(f"--{flag}={value}: expected {expected}")


def parse_flags(function, flags):
    """Each of these flags of a command as its type; None, the default of some, stays."""
    parameters, values = inspect.signature(function).parameters, {}
    for name, value in flags.items():
        kind, default = parameters[name].annotation, parameters[name].default
        of_flag = RANGES.get(f"{function.__name__} {name}") or RANGES.get(name)
        if value is not None or default is not None:
            value = parse_flag(name, kind, value, of_flag or RANGES.get(kind))
        values[name] = value
    return values


def parse_words(function, words):
    """The words after a command -> {flag: text}.

    Words that stand without a flag are its first arguments. UserError for a word that is no flag
    of it and no value of one."""
    parameters = inspect.signature(function).parameters
    kinds = {name: p.annotation for name, p in parameters.items()} | {"megapixels": int}
    flags = [f"--{name}" for name in kinds]
    switches = [name for name, kind in kinds.items() if kind is bool]
    negated = {f"--no{name}": f"--{name}=false" for name in switches}
    words, given, unnamed = [negated.get(word, word) for word in words], {}, []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if "=" in word or word[:1] == "-" and word[1:2].isalpha():
                raise UserError(f"{word}: flags begin with two dashes, as in --{word.lstrip('-')}")
            unnamed.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in kinds:
            hint = suggest(f"--{name}", flags) or f"it has {', '.join(flags)}"
            raise UserError(f"--{name}: {function.__name__} has no such flag; {hint.strip()}")
        following = "--" if equals or not words else words[0]
        if name in switches and following.lower() not in ("true", "false"):
            value = value if equals else "true"
        elif not following.startswith("--"):
            value = words.pop(0)
            # A flag that takes many has all words up to the next one: the shell expands runs/*.
            while kinds[name] is tuple and words and words[0][:1] != "-":
                value += f",{words.pop(0)}"
        elif not equals:
            raise UserError(f"--{name}: expected a value, {EXPECTED[kinds[name]]}: --{name}=VALUE")
        given[name] = value
    free = [n for n, p in parameters.items() if p.kind != p.KEYWORD_ONLY and n not in given]
    if unnamed and free and kinds[free[0]] is tuple:
        unnamed = [",".join(unnamed)]
    if unnamed[len(free) :]:
        raise UserError(f"{unnamed[len(free)]}: one word too many; flags are --NAME=VALUE")
    return given | dict(zip(free, unnamed))


class Stream(io.FileIO):
    """Standard output that ends no command: nobody reads it any more, or its disk is full."""

    lost = ""  # why something could not be written, which is an error when the command is done

    def write(self, text):
        try:
            return super().write(text)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: of a terminal that was closed
                Stream.lost = error.strerror
            return len(text)


def outlive_readers(stream):
    """sys.stdout or sys.stderr, as a Stream where it is still the shell's."""
    if stream is None:  # closed by the shell
        return open(os.devnull, "w")
    if stream in (sys.__stdout__, sys.__stderr__):
        stream.flush()
        buffer = io.BufferedWriter(Stream(stream.fileno(), "w", closefd=False))
        stream = io.TextIOWrapper(buffer, stream.encoding, line_buffering=True)
    if hasattr(stream, "reconfigure"):  # not Jupyter's
        stream.reconfigure(errors="backslashreplace")  # a file's name may be in Latin-1
    return stream


def command_line(commands, argv=None):
    """Run commands[argv[0]], flags typed by its signature. UserError: one line and exit code 2."""
    rank = own_rank()
    sys.stdout, sys.stderr = outlive_readers(sys.stdout), outlive_readers(sys.stderr)
    in_main = threading.current_thread() is threading.main_thread()
    # So `finally` removes what is half written. Other ranks write nothing, and wait for rank 0.
    for number in signal.Signals if rank == "0" and in_main else ():
        if number.name in loo.STOPPING and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    argv = sys.argv[1:] if argv is None else argv
    argv = [word.rstrip("\r") for word in argv]  # of a script written on Windows
    if {"-h", "--help"} & {*argv} or "help" in argv[:2]:
        named = [word for word in argv if word in commands]
        text = io.StringIO()
        with contextlib.redirect_stderr(text), contextlib.suppress(SystemExit):
            fire.Fire(commands, [*named[:1], "--help"])
        # Without fire's own command, and the short names that our flags do not have.
        print(re.sub(r"INFO: .*\n+|-\w, (?=--)", "", text.getvalue()))
        raise SystemExit(0)
    try:
        word = argv[0] if argv else "nothing"
        if word not in commands:
            hint = f"{suggest(word, commands)}there are {', '.join(commands)}; --help says more"
            raise UserError(f"{word}: expected a command; {hint}")
        Stream.lost = ""
        loo.environ_count("LOOC_MEGAPIXELS", MEGAPIXELS)  # UserError if it is no count
        flags = parse_words(commands[word], argv[1:])
        if "megapixels" in flags:  # a flag of every command, see `open_image`
            megapixels = parse_flag("megapixels", int, flags.pop("megapixels"), COUNT)
            os.environ["LOOC_MEGAPIXELS"] = str(megapixels)  # which workers inherit
        typed(commands[word])(**flags)
        sys.stdout.flush()
        if Stream.lost:
            raise UserError(f"standard output: {Stream.lost}; what {word} printed is lost")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        message = str(error)
        if loo.lacks_memory(error):
            what = first_line(message.rpartition("DefaultCPUAllocator: ")[2] or error)
            hint = "lower --batch, --size, --queue, --dim or --hidden, whichever is large"
            message = f"not enough memory ({what}): {hint}"
        elif not isinstance(error, (UserError, OSError)):  # a full disk, a folder without access
            raise
        if rank != "0":  # torchrun ends the others when one ends: rank 0 says it, once
            time.sleep(5)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(getattr(error, "code", 2)) from None


def own_rank():
    """RANK as the launcher set it; "0" of a process that is alone, whatever RANK says."""
    environ = launcher_environ()
    is_alone = environ.get("WORLD_SIZE", "") in ("", "1")
    return "0" if is_alone else environ.get("RANK", "0")


def launcher_environ():
    """os.environ, with torchrun's variables added where `srun` started several processes."""
    env = os.environ
    # sbatch's script belongs to no step and salloc's shell to one beyond 2**31: they are one
    # process, whatever SLURM_NTASKS says.
    step, job = env.get("SLURM_STEP_ID", ""), env.get("SLURM_JOB_ID", "")
    without = 2**32 if job else 0
    step = int(step) if step.isdigit() else without
    size = env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))
    if "RANK" in env or "SLURM_PROCID" not in env or size == "1" or step >= 2**31:
        return env
    nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
    first = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]  # gpu03 of gpu[03-05,07],cpu1
    env.setdefault("MASTER_ADDR", "localhost" if first == nodes else first)
    port = 15000 + (int(job if job.isdigit() else 0) + 97 * step) % 15000
    env.setdefault("MASTER_PORT", str(port))
    env.setdefault("WORLD_SIZE", size)
    if torch.cuda.device_count() != 1:  # the only one that SLURM shows is this process's own
        env.setdefault("LOCAL_RANK", env.get("SLURM_LOCALID", "0"))
    env["RANK"] = env["SLURM_PROCID"]
    return env


def resolve_device(flag):
    """ "auto", "cpu", "cuda" or "cuda:1" -> the device's name; UserError where there is none."""
    kind, _, index = flag.partition(":")
    check_choice("device", kind, ("auto", "cpu", "cuda"))
    count, local = torch.cuda.device_count(), launcher_environ().get("LOCAL_RANK", "")
    shows = f"this machine shows {count} CUDA devices"
    if kind == "cuda" and (index or "0") not in map(str, range(count)):
        raise UserError(f"--device={flag}: {shows}; leave the flag out, or --device=cpu")
    if kind == "cpu" or not count:
        return "cpu"
    if local and not index and int(local) >= count:
        raise UserError(f"{shows}, none for its process {local}: start at most {count} on it")
    return f"cuda:{index or local}" if index or local else "cuda"


class WriteError(UserError):
    """A file that could not be written."""


WARNED = set()  # texts, or kinds of warnings, since the command began


def warn_once(text, kind=None):
    """Print a warning, once for each command; of a kind the first alone."""
    if (kind or text) not in WARNED and own_rank() == "0":
        print(f"warning: {text}", file=sys.stderr)
    WARNED.add(kind or text)


@contextlib.contextmanager
def optional_write(what):
    """Go on with a warning where `what`, only a convenience, cannot be written."""
    try:
        yield
    except (WriteError, OSError) as error:
        warn_once(f"{what} cannot be kept: {getattr(error, 'strerror', None) or error}")


def read_tensors(path, device="cpu"):
    """A file of torch.save; no code in it is run. UserError when it is incomplete."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        hint = "expected tensors alone, as torch.save(model.state_dict(), FILE) writes them"
        raise UserError(f"{path} is cut short, or not ours: {hint}") from None
    except Exception as error:  # torch raises various kinds
        raise UserError(f"{path} is cut short, or not ours ({first_line(error)})") from None


def write_tensors(path, content):
    write_atomic(path, functools.partial(torch.save, content))


def check_out(path, folder=False):
    """UserError unless there is, or can be, a file (or a folder) of this name."""
    real = Path(os.path.realpath(path))  # of a loop of links, one of them
    there = next(place for place in (real, *real.parents) if os.path.lexists(place))
    wanted = "folder" if folder or there != real else "file"
    is_wanted = there.is_dir if wanted == "folder" else there.is_file
    if not is_wanted():
        raise WriteError(f"{path} cannot be written: {there} is no {wanted}; name another")


# what no command but `train` and the evaluations of a run write, and what a person writes
RUN_FILES = {"backbone.pt", "heads.pt", "checkpoint.pt", "config.json", "log.jsonl"}
RUN_FILES |= {"results.jsonl", TABLE}


def check_user_out(path, suffixes=(".png",)):
    """`check_out`, and UserError where a run's file or a table would be replaced.

    suffixes: how the name must end, so that no other file is replaced; () for any name."""
    check_out(path)
    path = Path(path)
    if path.name in RUN_FILES and path.exists():
        raise UserError(f"{path} belongs to a run or a data set: name another file")
    folder = next(place for place in Path(os.path.realpath(path)).parents if place.is_dir())
    if not os.access(folder, os.W_OK):
        raise WriteError(f"{path} cannot be written: no permission to write in {folder}")
    if suffixes and path.suffix.lower() not in suffixes:
        raise UserError(f"--out={path}: expected a file that ends in {', '.join(suffixes)}")


def write_atomic(path, content, keep=None, size=None):
    """Write bytes, or what content(file) writes (of `size`, if known), completely or not at all.

    The file that was there is moved to `keep`. UserError if it fails: then that file stays.
    A link is written through."""
    check_out(path)
    path = path if keep else Path(os.path.realpath(path))
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
    size = size if callable(content) else len(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns the one into the other
        needs = f", which needs {size / 2**20:.1f} MB" if size else ""
        reason = getattr(error, "strerror", None) or f"is the disk full? ({first_line(error)})"
        raise WriteError(f"cannot write {path}{needs}: {reason}") from None
    finally:
        with contextlib.suppress(OSError):  # not there, or on a read-only disk
            part.unlink()


if __name__ == "__main__":
    command_line({"sheet": sheet, "check": check, "pack": pack, "stylize": stylize})
