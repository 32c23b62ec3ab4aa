"""Every clever line beside its slow twin, in the order of the modules. `python -m pytest`"""

import colorsys
import contextlib
import csv
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import unittest.mock
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image, ImageColor, ImageFont
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import data
import eval
import loo
from loo import UserError, make_generator

# The tensors are small: other threads would only wait for each other.
torch.set_num_threads(1)

# ---------------------------------------------------------------- fixtures and helpers

GROUPS = ("color", "rotation")
IMAGENET_NORM = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TINY = "--queue=16 --hidden=16 --dim=8"
SMALL = "--batch=64 --queue=64 --hidden=32 --dim=16"
QUICK = "--size=16 --batch=8 --splits=2 --queue=8 --hidden=8 --dim=4"
CONFIG = dict(
    loo.RECIPES["factors"],
    **dict(method="looc", groups=GROUPS, same=(), always=("crop", "flip"), drop_equal=False),
    **dict(device="cpu", precision="float32", compile=False),
    **dict(seed=0, batch=16, splits=4, queue=32, hidden=32, dim=8),
)
GREEN, RED = (0, 200, 0), (200, 0, 0)
ONE_SPACE = torch.ones(1, 1, dtype=torch.long)  # MoCo's role
ENCODERS, POINTER = ("encoder_q", "encoder_k"), "queue_ptr"  # a checkpoint's names
TRAINED = ("moco", "looc", "looc++", "supervised")
# Small ones of some families.
FAMILIES = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_y_400mf"]
FAMILIES += ["efficientnet_b0", "densenet121", "swin_t", "vit_b_32"]
BOXES = [(0, 0, 40, 40), (3, 5, 20, 30), (10, 0, 30, 12), (0, 20, 9, 20)]
BOXES += [(25, 25, 15, 15), (1, 2, 38, 37), (5, 30, 35, 10), (17, 3, 21, 23)]
FLIP, TURNS = torch.arange(8) < 4, torch.arange(8) % 4
DISK_IS_FULL = unittest.mock.Mock(side_effect=OSError(28, "No space left on device"))
COMMANDS = {
    loo: "train show_methods bench",
    data: "stylize pack check sheet",
    eval: "linear rotation fewshot knn robust spaces retrieve embed table curves claims",
}


def run(module, line):
    """Run a command in this process, as the shell would in one of its own."""
    functions = [getattr(module, name) for name in COMMANDS[module].split()]
    commands = {f.__name__.removeprefix("show_"): f for f in functions}
    data.command_line(commands, shlex.split(line))


def refused(capsys, module, line, lines=1):
    """Run a command that must end with exit code 2 -> what it says, which is one line."""
    capsys.readouterr()
    raises(SystemExit, "^2$", run, module, line)
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == lines
    return err


def printed(capsys, module, line):
    """Run a command -> what it prints, .out and .err."""
    capsys.readouterr()
    run(module, line)
    return capsys.readouterr()


def raises(error, match, function, *args, **kwargs):
    """The call must raise this error, with a message that matches."""
    with pytest.raises(error, match=match):
        function(*args, **kwargs)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, and a factors data set that trains in seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "FACTORS", {"train": 256, "val": 1024, "test": 128, "viewpoint": 64})
    monkeypatch.setattr(data, "HUES", 4)
    return tmp_path


@pytest.fixture
def untrained(here):
    """runs/latest: a LooC encoder as it starts, with 64 images of factors to test on."""
    run_folder = here / "runs" / "latest"
    run_folder.parent.mkdir()
    loo.export(loo.init_state(CONFIG).encoder_q, run_folder)
    config = CONFIG | dict(data="factors", root=None, canvas=None, groups=list(GROUPS))
    (run_folder / "config.json").write_text(json.dumps(config))
    return here


@pytest.fixture
def shallow_vit(monkeypatch):
    """Vision transformers have one layer: the others only take time."""
    module = torchvision.models.vision_transformer
    real = module.VisionTransformer
    shallow = lambda num_layers, **kwargs: real(num_layers=1, **kwargs)  # noqa: E731
    monkeypatch.setattr(module, "VisionTransformer", shallow)


def results(here):
    return loo.read_jsonl(here / "runs" / "latest" / "results.jsonl")


def to_jsonl(lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def noise(*shape, seed=0):
    """Uniform in [0, 1]; one number is a count of small images."""
    shape = (*shape, 3, 32, 32) if len(shape) == 1 else shape
    return torch.rand(*shape, generator=make_generator(seed))


def unit(*shape, seed=0):
    """Random vectors of unit norm, in float64."""
    x = torch.randn(*shape, dtype=torch.float64, generator=make_generator("test", seed))
    return F.normalize(x, dim=-1)


def smooth(h, w, seed):
    """An image (1 3 h w) without hard edges, which every interpolation shows alike."""
    small = noise(1, 3, 6, 6, seed=seed)
    return F.interpolate(small, (h, w), mode="bicubic", align_corners=False).clamp(0, 1)


def scenery(b=2, side=64):
    """Images (b 3 side side) of coarse and fine noise in every channel, values as uint8's."""
    images = 0
    for k, n in enumerate((3, 8, 24, 64)):
        octave = noise(b, 3, n, n, seed=n)
        images = images + F.interpolate(octave, (side, side), mode="bicubic") / (k + 1)
    return (images / 2.1).clamp(0, 1).mul(255).round() / 255


def write_image(path, color=GREEN, border=None, side=12):
    """One color, with a border two pixels wide; PNG, whatever the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (side, side), border or color)
    image.paste(color, (2, 2, side - 2, side - 2))
    image.save(path, "PNG")


def photo_tree(root, classes=3, each=14):
    """Images of every size and of four modes, a folder for each class."""
    rng = random.Random(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(each):
            w, h = rng.randint(20, 80), rng.randint(20, 80)
            mode = rng.choice(["RGB", "L", "P", "CMYK"])
            image = Image.effect_noise((w, h), 20 + 60 * c).convert("RGB").convert(mode)
            image.save(root / f"class{c}" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
    return root


def stop_at(monkeypatch, *steps):
    """Training stops before each of these steps, once -> the steps that it has not come to."""
    train_step, left = loo.train_step, list(steps)

    def step_or_stop(state, *rest):
        if state.step in left:
            left.remove(state.step)
            raise RuntimeError("stopped here")
        return train_step(state, *rest)

    monkeypatch.setattr(loo, "train_step", step_or_stop)
    return left


def read_checkpoint(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def load_dataset(name, split, workers=None, cache=None, shared=False, **where):
    """A split as a tensor of images, decoded."""
    return data.decode_cached(data.open_dataset(name, split, **where), workers, cache, shared)


def read_image(path):
    return data.read_image([path], 0)


# ---------------------------------------------------------------- loo.py: methods, loss, step


def test_methods_are_the_papers_tables(capsys):
    table = loo.methods(GROUPS, same=("rotation",))
    assert table["looc"].share.int().tolist() == [[0, 0], [1, 0], [0, 1]]
    assert table["looc"].role.tolist() == [[1, 0, 0], [-1, 1, -1], [-1, -1, 1]]
    assert table["moco"].share.int().tolist() == [[0, 0]]
    assert table["moco"].role.tolist() == [[1]]
    assert table["moco_same"].share.int().tolist() == [[0, 1]]
    assert table["moco++"].role.tolist() == [[1], [1], [1]]
    assert all((method.role == 1).sum(1).eq(1).all() for method in table.values())
    row = "| looc | [[0, 0], [1, 0], [0, 1]] | [[1, 0, 0], [-1, 1, -1], [-1, -1, 1]] | mlp | v |"
    assert row in printed(capsys, loo, "methods").out


def naive_loss(q, k, queue, role, tau):
    """Section 3 of the paper word for word, with Python's floats -> (s,)."""
    losses = []
    for s in range(len(q)):
        total = 0.0
        for b in range(q.shape[1]):
            own = [math.exp(q[s, b].dot(key) / tau) for key in k[s, :, b]]
            queued = [math.exp(q[s, b].dot(key) / tau) for key in queue[s]]
            positive = sum(e for e, r in zip(own, role[s]) if r == 1)
            not_left_out = sum(e for e, r in zip(own, role[s]) if r != 0)
            total -= math.log(positive / (not_left_out + sum(queued)))
        losses.append(total / q.shape[1])
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("tau", [0.2, 1])
@pytest.mark.parametrize("name", ["moco", "moco++", "looc", "looc++"])
def test_loss_is_the_papers_equation(name, tau):
    role = loo.methods(GROUPS)[name].role
    s, v = role.shape
    q, k, queue = unit(s, 4, 8), unit(s, v, 4, 8, seed=1), unit(s, 6, 8, seed=2)
    ours = loo.multi_space_loss(q, k, queue, role, tau)
    assert ours.dtype == torch.float64
    assert_close(ours, naive_loss(q, k, queue, role.tolist(), tau), rtol=1e-12, atol=1e-12)


def test_no_gradient_reaches_the_keys():
    q, k = unit(1, 4, 8).requires_grad_(), unit(1, 1, 4, 8, seed=1).requires_grad_()
    loo.multi_space_loss(q, k, unit(1, 6, 8, seed=2), ONE_SPACE, 0.2).mean().backward()
    assert q.grad.any()
    assert k.grad is None


def test_loss_in_bfloat16_is_computed_in_float32():
    q, k, queue = unit(1, 64, 32), unit(1, 1, 64, 32, seed=1), unit(1, 500, 32, seed=2)
    q, k = q.bfloat16(), k.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = loo.multi_space_loss(q, k, queue.float(), ONE_SPACE, 0.1)
    exact = loo.multi_space_loss(q.double(), k.double(), queue, ONE_SPACE, 0.1)
    assert low.dtype == torch.float32
    assert_close(low.double(), exact, atol=1e-5, rtol=1e-5)


def test_role_by_image_masks_equal_params():
    method = loo.methods(GROUPS)["looc"]
    hue = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.1, 0.2], [0.5, 0.6]])
    turns = torch.tensor([[1, 0], [1, 2], [3, 0], [1, 0]])
    params = {"color": {"hue": hue}, "rotation": {"turns": turns}}
    role = loo.drop_equal(method.role, params, method.groups)
    assert role[:, :, 0].tolist() == [[1, 0, 0], [-1, 1, -1], [0, -1, 1]]
    assert role[:, :, 1].tolist() == [[1, 0, 0], [-1, 1, -1], [-1, 0, 1]]
    q, k, queue = unit(3, 2, 8), unit(3, 3, 2, 8, seed=1), unit(3, 6, 8, seed=2)
    alone = [(q[:, [b]], k[:, :, [b]], queue, role[:, :, b].tolist(), 0.2) for b in range(2)]
    want = torch.stack([naive_loss(*inputs) for inputs in alone]).mean(0)
    assert_close(loo.multi_space_loss(q, k, queue, role, 0.2), want)


def test_contrast_metrics_count_wins_and_mass():
    """The positive wins for image 0, a negative view of its own for image 1."""
    q = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    k = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]])
    queue, role = torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1, -1]])
    metrics = loo.contrast_metrics(q, k, queue, role, 1.0)
    assert [metrics[name].item() for name in ("win_near", "win_far", "win")] == [0.5] * 3
    mass = (1 / (math.e + 2) + math.e / (math.e + 2)) / 2
    assert_close(metrics["mass_near"], torch.tensor([mass]))


@pytest.mark.parametrize("b", [1, 3, 8, 11, 30])
def test_queue_keeps_the_last_keys_in_order_and_no_graph(b):
    queue, pointer, seen = torch.zeros(2, 8, 1), 0, []
    for step in range(6):
        keys = torch.arange(step * b, step * b + b).float().view(1, b, 1).expand(2, b, 1) + 1
        queue, pointer = loo.queue_update(queue, pointer, keys.requires_grad_())
        assert not queue.requires_grad
        seen = (seen + keys[0, :, 0].tolist())[-8:]
        oldest_first = queue.roll(-pointer, 1)[1, :, 0].tolist()
        assert oldest_first[-len(seen) :] == seen


def small_step(**changed):
    """-> the config, 16 images, the state before, and what train_step returns."""
    config = CONFIG | changed
    images = data.factors("val", 32, 16).images / 255
    state = loo.init_state(config)
    return config, images, state, loo.train_step(state, images, torch.ones(16), config)


@pytest.mark.parametrize("method", ["looc", "looc++", "moco", "moco++"])
def test_keys_get_no_gradient_and_fill_the_queue(method):
    _, _, before, (after, (loss, q, k, _, role)) = small_step(method=method)
    assert q.shape == (len(loss), 16, 8)
    assert k.shape == (len(loss), role.shape[1], 16, 8)
    assert not k.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in after.encoder_k.parameters())
    assert all(p.grad.abs().sum() > 0 for p in after.encoder_q.parameters())
    assert (after.queue_ptr, after.step) == (16, 1)
    for s in range(len(loss)):  # space s keeps its positive view's keys
        assert torch.equal(after.queue[s, :16], k[s, int((role[s] == 1).nonzero())])
        assert torch.equal(after.queue[s, 16:], before.queue[s, 16:])


@pytest.mark.parametrize("method, spaces", [("looc", 3), ("moco", 1), ("moco_same", 1)])
def test_drop_equal_is_an_option_of_every_method(method, spaces):
    assert len(small_step(method=method, drop_equal=True)[3][1][0]) == spaces


def test_ema_moves_the_key_encoder_a_little():
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    want = [0.9 * x + 0.1 * y for x, y in zip(a.parameters(), b.parameters())]
    loo.ema(a.requires_grad_(False), b, 0.9)
    assert_close(list(a.parameters()), want, check_stride=False)


def test_compiled_encoders_train_to_the_same_losses(monkeypatch):
    """By torch.compile without a C++ compiler, on a network of two layers."""
    nn, modes, compile_module = torch.nn, [], torch.nn.Module.compile
    called = set()

    def tiny(arch, stem, splits, size):
        layers = nn.Conv2d(3, 4, 3), loo.SplitBatchNorm2d(4, splits), nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 1))

    def backend(graph, inputs):
        called.update(node.target for node in graph.graph.nodes)

        def run(*inputs):
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            return graph.forward(*inputs)

        return run

    monkeypatch.setattr(loo, "backbone", tiny)
    monkeypatch.setattr(nn.Module, "compile", lambda x: compile_module(x, backend=backend))
    few = dict(method="moco", splits=2)
    _, (want, *_) = small_step(**few)[-1]
    _, (loss, *_) = small_step(compile=True, **few)[-1]
    assert modes == [(False, False), (False, True)]  # the keys in no_grad, the query
    assert torch.native_batch_norm not in called  # inductor cannot see what its out= changes
    assert_close(loss, want)


def test_shuffled_keys_come_back_in_order():
    """With a BatchNorm that does not mix images (eval mode), shuffling only changes rounding."""
    config, images, state, _ = small_step()
    key_encoder = state.encoder_k.eval()
    config, state = config | dict(momentum=1.0), state._replace(step=7)
    _, (_, _, k, _, _) = loo.train_step(state, images, torch.ones(16), config)
    share, views = loo.methods(GROUPS)["looc"].share, make_generator("views", 0, 7)
    options = dict(always=("crop", "flip"), size=32, sampling=config["sampling"])
    _, keys, _ = loo.augment_groups(images, GROUPS, share, views, **options)
    with torch.no_grad():
        want = torch.stack([loo.encode(key_encoder, view)[1] for view in keys], 1)
    assert_close(k, want, atol=1e-5, rtol=1e-4)


def test_augmentation_is_float32_whatever_the_network(monkeypatch):
    encode, seen = loo.encode, []
    monkeypatch.setattr(loo, "encode", lambda net, x: seen.append(x) or encode(net, x))
    for precision in ("float32", "bfloat16"):
        small_step(precision=precision, always=("crop", "flip", "blur"), size=64)
    assert len(seen) == 4  # keys and query, twice
    assert_close(seen[2:], seen[:2], rtol=0, atol=0)
    assert {x.dtype for x in seen} == {torch.float32}


# ---------------------------------------------------------------- loo.py: augment_groups, encoder


def test_shared_params_are_equal_and_the_others_are_not():
    share = loo.methods(GROUPS)["looc"].share
    _, _, params = loo.augment_groups(noise(64), GROUPS, share, make_generator(1))
    for name in (*GROUPS, "crop", "flip", "blur"):
        for v, parameter in itertools.product(range(3), params[name].values()):
            shared = name in GROUPS and bool(share[v, GROUPS.index(name)])
            assert torch.equal(parameter[1 + v], parameter[0]) == shared, (name, v)


def test_sharing_is_seen_in_pixels():
    """Without crop, flip and blur, the view that shares all is the query; the others differ."""
    share = torch.tensor([[True, True], [True, False], [False, True]])
    query, keys, params = loo.augment_groups(noise(32), GROUPS, share, make_generator(1), always=())
    assert torch.equal(query, keys[0])
    assert not torch.equal(query, keys[1])
    assert not torch.equal(query, keys[2])
    # With the rotations undone, the view that shares color has the query's pixels.
    turns = params["rotation"]["turns"]
    for i in range(32):
        back = query[i].rot90(-int(turns[0, i]), (1, 2))
        assert_close(keys[1, i].rot90(-int(turns[2, i]), (1, 2)), back, atol=1e-5, rtol=0)


def test_views_are_counted_and_sized_whatever_is_drawn():
    images, none = noise(2, 3, 24, 16), torch.zeros(3, 0, dtype=torch.bool)
    query, keys, params = loo.augment_groups(images, (), none, make_generator(1), always=())
    assert torch.equal(query, images)
    assert torch.equal(keys, images.expand(3, -1, -1, -1, -1))
    assert not params
    one, options = torch.tensor([[True]]), dict(always=(), size=16)
    query, keys, _ = loo.augment_groups(images, ("color",), one, make_generator(1), **options)
    assert query.shape == (2, 3, 16, 16)
    assert torch.equal(keys[0], query)


def test_images_outside_0_to_1_are_refused():
    encoder, inputs = loo.Encoder("small", hidden=8, dim=4), ((), [[]], make_generator(0))
    for wrong in ((noise(2) * 255).byte(), noise(2) * 255, noise(2).log(), noise(2) / 0):
        raises(ValueError, "give floats in", loo.augment_groups, wrong, *inputs)
        raises(ValueError, "give floats in", loo.encode, encoder, wrong)


def test_a_row_in_the_table_of_groups_gets_a_view_and_a_space(monkeypatch):
    def sample_invert(b, generator):
        return {"coin": torch.rand(b, generator=generator) < 0.5}

    def invert(images, params):
        return torch.where(params["coin"][:, None, None, None], 1 - images, images)

    monkeypatch.setitem(loo.GROUPS, "invert", (sample_invert, invert))
    method = loo.methods(("invert", "rotation"))["looc"]
    dark, inputs = noise(16, 3, 8, 8) * 0.4, (method.groups, method.share, make_generator(1))
    query, keys, params = loo.augment_groups(dark, *inputs, always=("crop",))
    assert torch.equal(query.mean((1, 2, 3)) > 0.5, params["invert"]["coin"][0])
    assert torch.equal(keys[1].mean((1, 2, 3)) > 0.5, params["invert"]["coin"][0])
    assert method.spaces == ("all", "invert", "rotation")


@pytest.mark.parametrize("grad", [True, False])
def test_split_batchnorm_is_batchnorm_of_each_part(grad):
    x = torch.randn(24, 5, 4, 4, generator=make_generator(0))
    x = x.to(memory_format=torch.channels_last)
    ours = loo.SplitBatchNorm2d(5, splits=3)
    parts = [torch.nn.BatchNorm2d(5) for _ in range(3)]
    with torch.set_grad_enabled(grad):
        out = ours(x)
    assert torch.equal(out, torch.cat([norm(part) for norm, part in zip(parts, x.chunk(3))]))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(ours.running_mean, torch.stack([norm.running_mean for norm in parts]).mean(0))
    assert_close(ours.running_var, torch.stack([norm.running_var for norm in parts]).mean(0))
    raises(ValueError, "does not divide", ours, x[:23])


def test_key_statistics_are_per_view_and_split():
    """One pass over all key views equals a pass over each view with the recipe's splits."""
    torch.manual_seed(0)
    both, one = (loo.Encoder("small", spaces=2, hidden=16, dim=8, splits=s) for s in (8, 4))
    one.load_state_dict(both.state_dict())
    images = torch.rand(2, 16, 3, 32, 32)
    want = torch.cat([loo.encode(one, view)[1] for view in images], 1)
    assert_close(loo.encode(both, images.flatten(0, 1))[1], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hidden", [16, 0])
@pytest.mark.parametrize("heads", ["mlp", "conv5"])
def test_vmapped_heads_are_each_spaces_own(heads, hidden):
    torch.manual_seed(0)
    encoder = loo.Encoder("small", spaces=3, heads=heads, hidden=hidden, dim=8).eval()
    images = torch.rand(4, 3, 32, 32)
    v, z = loo.encode(encoder, images)
    assert v.shape == (4, 384 if heads == "conv5" else 128)
    assert torch.equal(loo.encode(encoder, images.double())[0], v)  # of another precision
    assert_close(z.norm(dim=-1), torch.ones(3, 4))
    x = encoder.trunk(TF.normalize(images, *IMAGENET_NORM))
    for s in range(3):
        h = encoder.tops[s if heads == "conv5" else 0](x).mean((2, 3))
        if hidden:
            h = (h @ encoder.w1[s].T + encoder.b1[s]).relu()
        want = F.normalize(h @ encoder.w2[s].T + encoder.b2[s], dim=1)
        assert_close(z[s], want, atol=1e-5, rtol=1e-4)
    assert not torch.equal(encoder.w2[0], encoder.w2[1])
    if heads == "conv5":
        assert not torch.equal(encoder.tops[0][0].conv1.weight, encoder.tops[1][0].conv1.weight)


# "looc++" has a last stage for each space.
@pytest.mark.parametrize("arch, method", [("resnet18", "looc++"), *((x, "looc") for x in FAMILIES)])
def test_any_torchvision_network_trains_and_comes_back(arch, method, tmp_path, shallow_vit):
    config = CONFIG | dict(arch=arch, method=method, groups=("color",), data="factors")
    config |= dict(batch=4, splits=1, queue=4, lr=1e-6)
    global_draws = torch.get_rng_state()
    state, (loss, *_) = loo.train_step(loo.init_state(config), noise(4), None, config)
    assert loss.isfinite().all()
    assert torch.equal(torch.get_rng_state(), global_draws)  # not for weights, and no dropout
    loo.export(state.encoder_q, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder, _ = loo.load_encoder(tmp_path)
    v, z = loo.encode(encoder, noise(4))
    want_v, want_z = loo.encode(state.encoder_q.eval(), noise(4))
    assert_close((v, z), (want_v, want_z))
    sized = {"image_size": 32} if "vit" in arch else {}
    net = torchvision.models.get_model(arch, **sized)
    backbone = torch.load(tmp_path / "backbone.pt", weights_only=True)
    missing, unexpected = net.load_state_dict(backbone, strict=False)
    assert {name.rpartition(".")[0] for name in missing} == {encoder.classifier}
    assert not unexpected
    net.set_submodule(encoder.classifier, torch.nn.Identity())
    theirs = net.eval()(TF.normalize(noise(4), *IMAGENET_NORM))
    assert_close(v[:, : theirs.shape[1]], theirs, atol=1e-4, rtol=1e-4)  # all, or Z_0's


def test_batchnorm_of_any_network_is_split_and_keeps_its_settings():
    def norms(net):
        return [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]

    ours = norms(loo.backbone("mobilenet_v3_small", splits=4))
    theirs = norms(torchvision.models.mobilenet_v3_small())
    assert [(m.eps, m.momentum) for m in ours] == [(m.eps, m.momentum) for m in theirs]
    assert {getattr(m, "splits", 1) for m in ours} == {4}


# ---------------------------------------------------------------- loo.py: augmentation operations


def box_params(boxes, side):
    """Integer boxes (top, left, height, width) -> the parameters that give them."""
    boxes = torch.tensor(boxes, dtype=torch.float64) / side
    corner, (h, w) = boxes[:, :2], boxes[:, 2:].T
    place = corner / (1 - boxes[:, 2:]).clamp(min=1e-9)
    params = dict(area=(h * w)[:, None], ratio=(w / h)[:, None], place=place)
    return {name: x.float() for name, x in params.items()}


@pytest.mark.parametrize("size", [32, 24, 64])
def test_crop_is_torchvisions_resized_crop(size):
    images, theirs = scenery(8, 40), []
    for image, box in zip(images, BOXES):
        theirs.append(TF.resized_crop(image, *box, [size, size], antialias=True))
    ours = loo.resample(images, box_params(BOXES, 40), size)
    assert_close(ours, torch.stack(theirs), atol=2e-4, rtol=0)


def test_crop_on_a_squashed_canvas_is_the_crop_of_the_image():
    """An 80x40 image squashed to 40x40: a square crop of the image itself comes out square."""
    wide = smooth(40, 80, seed=3)
    canvas, box = TF.resize(wide, [40, 40], antialias=True), (10, 15, 20, 20)
    params = dict(area=[[0.125]], ratio=[[1.0]], place=[[0.5, 0.25]])  # of that box
    params = {name: torch.tensor(x) for name, x in params.items()}
    theirs = TF.resized_crop(wide, *box, [32, 32], antialias=True)
    assert_close(loo.resample(canvas, params, 32, torch.tensor([2.0])), theirs, atol=0.05, rtol=0)
    without_aspect = loo.resample(canvas, params, 32)
    assert (without_aspect - theirs).abs().max() > 0.1


def test_flip_and_rotation_are_exact_alone_and_after_a_crop():
    images, rest, box = scenery(8, 40), {"flip": FLIP, "turns": TURNS}, box_params(BOXES, 40)
    for image, flip, turns, view in zip(images, FLIP, TURNS, loo.resample(images, rest)):
        assert torch.equal(view, (image.flip(2) if flip else image).rot90(int(turns), (1, 2)))
    one_by_one = loo.resample(loo.resample(images, box, 32), rest)
    assert_close(loo.resample(images, box | rest, 32), one_by_one, atol=1e-4, rtol=0)


def test_crop_boxes_follow_random_resized_crop():
    """The areas and shapes, in the image's pixels, are as torchvision's get_params draws them."""
    torch.manual_seed(0)
    n, wide = 4000, torch.zeros(3, 300, 600)
    get_params = torchvision.transforms.RandomResizedCrop.get_params
    theirs = [get_params(wide, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    theirs = torch.tensor(theirs).double()
    box = loo.crop_box(loo.sample_crop(n, make_generator(0)), torch.full((n,), 2.0))
    top, left, h, w = (x.double() for x in box)
    assert min(top.min(), left.min()) >= 0
    assert max((top + h).max(), (left + w).max()) <= 1 + 1e-6
    ratio = w * 600 / (h * 300)
    assert 3 / 4 - 1e-3 < ratio.min() < ratio.max() < 4 / 3 + 1e-3
    ours = torch.stack([top * 300, left * 600, h * 300, w * 600], 1)
    error = (theirs.var(0) / n + ours.var(0) / n).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error + 1).all()
    # An image too long for any box gets the largest in the middle.
    _, left, h, w = loo.crop_box(loo.sample_crop(64, make_generator(0)), torch.full((64,), 20.0))
    want = torch.tensor([1, 4 / 3, 0.5]).expand(64, 3)
    assert_close(torch.stack([h, w * 20, left + w / 2], 1), want)


@pytest.mark.parametrize("aspect", [1e3, 1e-3, 300, 64_000])
def test_views_of_a_line_of_pixels_are_pixels(aspect):
    params = loo.sample_crop(8, make_generator(0))
    views = loo.resample(scenery(8, 40), params, 16, torch.full((8,), float(aspect)))
    assert views.isfinite().all()
    assert scenery(8, 40).min() - 1e-5 <= views.min() <= views.max() <= scenery(8, 40).max() + 1e-5


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_color_ops_are_torchvisions(name):
    images = torch.cat([scenery(6, 40), torch.zeros(1, 3, 40, 40), torch.full((1, 3, 40, 40), 0.5)])
    factor = torch.linspace(*((-0.5, 0.5) if name == "hue" else (0.2, 1.8)), 8)
    ours, theirs = (getattr(module, f"adjust_{name}") for module in (loo, TF))
    want = torch.stack([theirs(image, float(f)) for image, f in zip(images, factor)])
    assert (ours(images, factor) - want).abs().max() < 1 / 255


def test_color_applies_four_ops_in_each_images_order():
    images, params = scenery(32, 40), loo.sample_color(32, make_generator(5))
    assert 0 < (params["order"][:, 0] < 0).sum() < 32
    want = images.clone()
    for i in range(32):
        for op in filter(lambda op: op >= 0, params["order"][i].tolist()):
            name = list(loo.JITTER)[op]
            want[i] = getattr(TF, f"adjust_{name}")(want[i], float(params[name][i]))
        if params["gray"][i]:
            want[i] = TF.rgb_to_grayscale(want[i], 3)
    assert (loo.color(images, params) - want).abs().max() < 1 / 255
    orders = loo.sample_color(20_000, make_generator(6))["order"]
    orders = orders[orders[:, 0] >= 0]
    assert len(orders) / 20_000 == pytest.approx(0.8, abs=0.02)
    assert len(orders.unique(dim=0)) == 24


def test_blur_is_torchvisions_gaussian_where_it_changes_anything():
    images, sigmas, blurred = scenery(8, 224), torch.linspace(0.1, 2, 8), torch.arange(8) < 6
    want = images.clone()
    for i in range(6):
        want[i] = TF.gaussian_blur(images[i], 23, float(sigmas[i]))
    assert_close(loo.blur(images, {"blur": blurred, "sigma": sigmas}), want, atol=1e-4, rtol=0)
    small = noise(4)
    kernel = loo.gaussian_matrix(torch.full((4,), 2.0 * 32 / 224), 32)[:, None]
    assert (kernel @ small @ kernel.mT - small).abs().max() < 2 / 255
    assert torch.equal(loo.blur(small, {}), small)


def test_texture_takes_the_drawn_copy():
    """Two views of four images, two copies each, which are told apart by their brightness."""
    images, at = torch.zeros(4, 3, 8, 8), torch.arange(4).repeat(2)
    copies = torch.arange(1.0, 9).view(4, 2, 1, 1, 1).expand(4, 2, 3, 8, 8) / 10
    params = {"copy": torch.tensor([0, 1, -1, 1, -1, 0, 1, -1])}
    views = loo.texture(images.repeat(2, 1, 1, 1), params, copies, at)
    assert_close(views[:, 0, 0, 0] * 10, torch.tensor([1.0, 4, 0, 8, 0, 3, 6, 0]))
    inputs = images, ("texture",), loo.methods(("texture",))["looc"].share, make_generator(0)
    query, keys, _ = loo.augment_groups(*inputs, always=(), textures=copies)
    assert torch.equal(query, keys[1])
    assert not torch.equal(query, keys[0])


@pytest.mark.parametrize("copies, equal", [(1, 0.5), (4, 0.3125)])
def test_more_copies_make_equal_textures_rarer_and_drop_equal_finds_them(copies, equal):
    n, method = 4000, loo.methods(("texture",))["looc"]
    textures = torch.arange(copies).view(1, copies, 1, 1, 1).expand(n, copies, 3, 1, 1) / 10 + 0.1
    inputs = torch.zeros(n, 3, 1, 1), method.groups, method.share, make_generator(0)
    query, keys, params = loo.augment_groups(*inputs, always=(), textures=textures)
    same = (query == keys[0]).all((1, 2, 3))
    assert abs(same.float().mean() - equal) < 0.03
    role = loo.drop_equal(method.role, params, method.groups)
    assert torch.equal(role[1, 0] == 0, same)


def test_probabilities_are_parameters_of_the_samplers():
    share, images = loo.methods(GROUPS)["looc"].share, noise(200)
    sampling = dict(rotation=dict(p=1), color=dict(p=0, gray=1), crop=dict(area=0.9))
    options = dict(always=("crop", "flip"), sampling=sampling | dict(flip=dict(p=0)))
    query, _, params = loo.augment_groups(images, GROUPS, share, make_generator(0), **options)
    assert (params["rotation"]["turns"] > 0).all()
    assert (params["color"]["order"] == -1).all()
    assert (query == query[:, :1]).all()
    assert not params["flip"]["flip"].any()
    assert params["crop"]["area"].min() >= 0.9
    config = CONFIG | dict(sampling=dict(rotation=dict(p=0)))
    _, _, params = loo.training_views(images, config, 0)
    assert (params["rotation"]["turns"] == 0).all()


def test_tables_may_be_lists_and_whole_numbers():
    """`share` as README prints it masks; by index it would choose other views."""
    share, role = [[0, 0], [1, 0], [0, 1]], [[1, 0, 0], [-1, 1, -1], [-1, -1, 1]]
    q, k, queue = unit(3, 4, 8), unit(3, 3, 4, 8, seed=1), unit(3, 5, 8, seed=2)
    method = loo.methods(GROUPS)["looc"]
    want = loo.augment_groups(noise(4), GROUPS, method.share, make_generator(1))[1]
    loss = loo.multi_space_loss(q, k, queue, method.role, 0.2)
    for change in (list, np.array, torch.tensor):
        got = loo.augment_groups(noise(4), GROUPS, change(share), make_generator(1))[1]
        assert torch.equal(got, want)
        assert torch.equal(loo.multi_space_loss(q, k, queue, change(role), 0.2), loss)
        keys = loo.positive_keys(k, change(role))
        assert torch.equal(keys, loo.positive_keys(k, method.role))


Q, K, QUEUE, ROLE = (2, 4, 8), (2, 2, 4, 8), (2, 5, 8), [[1, 0], [-1, 1]]
BAD_LOSS = [(dict(q=(4, 8)), r"q has the shape \(4, 8\), expected \(s b c\)")]
BAD_LOSS += [(dict(k=(3, 2, 4, 8)), r"k has .* expected \(s v b c\) with s=2")]
BAD_LOSS += [(dict(queue=(2, 5, 7)), "queue has .* c=8"), (dict(queue=(5, 8)), "queue")]
BAD_LOSS += [(dict(role=[[1, 0]]), "role has .* s=2"), (dict(role=[1, 0]), "role")]
BAD_LOSS += [(dict(role=[[1, 0], [-1, 0]]), "one positive"), (dict(tau=0), "tau is 0")]
BAD_LOSS += [(dict(role=[[1, 0], [1, 1]]), "one positive"), (dict(tau=math.nan), "tau is nan")]
BAD_LOSS += [(dict(role=[[1, 0.5], [-1, 1]]), "role holds something else than 1, 0 and -1")]
BAD_LOSS += [(dict(role=[[True, False], [False, True]]), "role holds something else")]
BAD_LOSS += [(dict(role=[[[1, 0, 1, 1], [0, 1, 0, 0]]] * 2), "for all images the same")]


@pytest.mark.parametrize("changed, says", BAD_LOSS)
def test_a_loss_of_shapes_or_a_role_that_cannot_be_is_refused(changed, says):
    given = dict(q=Q, k=K, queue=QUEUE, role=ROLE, tau=0.2) | changed
    for name in ("q", "k", "queue"):
        given[name] = torch.ones(given[name])
    raises(ValueError, says, loo.multi_space_loss, **given)


BAD_VIEWS = [(dict(images=(3, 32, 32)), r"expected \(b c h w\)"), (dict(groups=("color",)), "g=1")]
BAD_VIEWS += [(dict(images=(2, 1, 32, 32)), "c=3"), (dict(share=[0, 1]), r"expected \(v g\)")]
BAD_VIEWS += [(dict(groups=("color", "color")), "share"), (dict(aspect=torch.ones(3)), "aspect")]
BAD_VIEWS += [(dict(share=[[0, 2]]), "share holds"), (dict(share=[[0, math.nan]]), "share holds")]
BAD_VIEWS += [(dict(textures=torch.ones(2, 3, 32, 32)), "textures"), (dict(grad=True), "detach")]
BAD_VIEWS += [(dict(aspect=torch.tensor([1, number])), "aspect holds") for number in (0, math.nan)]
BAD_VIEWS += [(dict(sampling={"crop": {"area": 2}}), "crop area is 2, expected 0 to 1")]
BAD_VIEWS += [(dict(sampling={"rotaton": {"p": 1}}), "no such augmentation: rotaton")]
BAD_VIEWS += [(dict(size=size), "size is .*: expected the side") for size in (0, -3, (32, 32))]
BAD_VIEWS += [(dict(always="crop"), "always is 'crop': expected a tuple")]
WHITE = torch.full((2, 1, 3, 32, 32), 255.0)
TEXTURE = dict(groups=("texture",), share=[[0]], sampling={"texture": {"p": 1}})
BAD_VIEWS += [(TEXTURE | dict(textures=WHITE), "textures are between 255 and 255")]
BAD_VIEWS += [(TEXTURE | dict(textures=WHITE.byte()), "textures are torch.uint8")]
BAD_VIEWS += [(dict(groups=("colour",), share=[[1]]), "colour; there are texture, crop")]
BAD_VIEWS += [(dict(groups=("texture",), share=[[1]]), "textures")]


@pytest.mark.parametrize("changed, says", BAD_VIEWS)
def test_views_of_shapes_that_cannot_be_are_refused(changed, says):
    given = dict(images=(2, 3, 32, 32), groups=GROUPS, share=[[0, 0]], grad=False) | changed
    images = torch.zeros(given.pop("images"), requires_grad=given.pop("grad"))
    raises(ValueError, says, loo.augment_groups, images, generator=make_generator(1), **given)


BAD_GROUPS = [
    (lambda b, generator: torch.rand(b), lambda x, params: x, "must return {parameter"),
    (lambda b, generator: {"p": torch.rand(1)}, lambda x, params: x, "32 rows in each"),
    (lambda b, generator: {}, lambda x, params: None, "makes is a NoneType"),
    (lambda b, generator: {}, lambda x, params: x[1:], "makes has the shape"),
]


@pytest.mark.parametrize("sample, apply, says", BAD_GROUPS)
def test_augmentations_of_your_own_that_do_not_fit_are_named(sample, apply, says, monkeypatch):
    monkeypatch.setitem(loo.GROUPS, "own", (sample, apply))
    given = torch.rand(8, 3, 16, 16), ["own"], [[0], [0], [1]], make_generator(0)
    raises(ValueError, rf"GROUPS\['own'\].*{says}", loo.augment_groups, *given)


def test_neighbors_with_one_function_and_parameter_act_both(monkeypatch):
    def brighten(images, params):
        return images + params["amount"].to(images)[:, None, None, None]

    for name, amount in (("a", 0.25), ("b", 0.5)):
        sample = lambda b, generator, x=amount: {"amount": torch.full((b,), x)}  # noqa: E731
        monkeypatch.setitem(loo.GROUPS, name, (sample, brighten))
    given = torch.zeros(4, 3, 8, 8), iter(["a", "b"]), [[0, 0]], make_generator(0)
    query, keys, params = loo.augment_groups(*given, always=())
    assert list(params) == ["a", "b"]
    assert (torch.cat([query[None], keys]) == 0.75).all()


def test_a_seed_of_numpy_is_its_number():
    draws = [torch.rand(4, generator=make_generator("x", seed)) for seed in (3, np.int64(3))]
    assert torch.equal(*draws)


def test_no_augmentation_of_your_own_has_a_features_name(monkeypatch):
    monkeypatch.setitem(loo.GROUPS, "all", loo.GROUPS["flip"])
    raises(UserError, "--groups=all: features have this name", loo.default_config, groups=["all"])


def test_other_functions_by_hand_name_what_does_not_fit():
    encoder, images = loo.Encoder("small", spaces=1, hidden=8, dim=8), torch.ones(2, 3, 32, 32)
    says = r"images has .* expected \(b c h w\) with .*c=3"
    raises(ValueError, says, loo.encode, encoder, images[:, :1])
    raises(ValueError, "keys has", loo.queue_update, torch.zeros(QUEUE), 0, torch.zeros(2, 4, 7))
    raises(ValueError, "k has", loo.positive_keys, torch.zeros(Q), ROLE)
    raises(ValueError, "expected mlp or conv5", loo.Encoder, "small", heads="conv")
    raises(ValueError, "expected a ResNet", loo.Encoder, "mobilenet_v2", heads="conv5")
    for names in (["color"], [("color", "rotation"), "rotation"]):
        raises(ValueError, "expected a tuple, as .'color', 'rot", loo.methods, *names)
    raises(ValueError, "groups is {'color'}: expected a tuple", loo.methods, {"color"})
    state, config = loo.init_state(CONFIG | dict(batch=8)), CONFIG | dict(batch=8)
    says = "images has .* with .*b=8"
    raises(ValueError, says, loo.train_step, state, images, None, config)
    for other, says in (
        ("method", "'loc': expected one of moco"),
        ("precision", "loc: expected fl"),
    ):
        raises(ValueError, f"{other} is {says}", loo.init_state, CONFIG | {other: "loc"})
    shares = torch.rand(5, dtype=torch.float64)
    for wrong in (shares * 100, shares / 0):
        raises(ValueError, "shares from 0 to 1", eval.paired_ci95, shares, wrong)
    for momentum in (-0.1, 1.1, math.nan):
        raises(ValueError, "momentum is .*: expected 0 to 1", loo.ema, encoder, encoder, momentum)
    for path in ("x.png", Path("x.png")):
        raises(ValueError, "paths is .*x.png.*: expected a tuple", data.central_crops, path, 32)
    says = r"images is a ndarray: expected a tensor \(b c h w\)"
    raises(ValueError, says, loo.encode, encoder, images.numpy())
    raises(ValueError, "between -0.5 and 0.5", loo.encode, encoder, images.cumsum(0) - 1.5)
    raises(ValueError, "paths is empty", data.central_crops, iter(()), 32)
    raises(ValueError, "--split=trian: did you mean train", data.open_dataset, "factors", "trian")
    for wrong in (images[:, :1], images[..., :16]):  # gray, and not square
        inputs = wrong, "fog", 1, make_generator(0)
        raises(ValueError, "images has the shape", data.corrupt, *inputs)
    says = "expected 1 to 5, and one of gaussian_noise|give floats"
    for name, severity, scale in (("fog", 0, 1), ("fog", 6, 1), ("smog", 1, 1), ("fog", 1, 255)):
        raises(ValueError, says, data.corrupt, images * scale, name, severity, make_generator(0))


# ---------------------------------------------------------------- loo.py: as on a GPU, without one


class FakeCuda(TorchDispatchMode):
    """Tensors of device "cuda" are fake: shape, type and strides, no values; the CPU's are real.

    What would make the host wait raises: .item(), nonzero and masks on "cuda", mixed devices; once
    `may_wait` is False, also a copy between the two that blocks.
    """

    may_wait = True

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(op)
        if torch.is_inference_mode_enabled() and op.namespace == "aten":
            with self:  # composite operations come whole there
                if (out := op.decompose(*args, **kwargs)) is not NotImplemented:
                    return out
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if torch.is_tensor(x)]
        devices = {x.type for x in flat if isinstance(x, torch.device)}
        if "cuda" not in devices and not any(isinstance(x, FakeTensor) for x in flat):
            with unset_fake_temporarily():
                return op(*args, **kwargs)
        if name.startswith("aten._fused_sgd_"):  # has no version for shapes alone
            assert {x.device.type for x in tensors} == {"cuda"}
            return None
        first = tensors[0].device.type if tensors else ""
        if name.startswith("aten.index") and first == "cpu":  # FakeTensorMode lets it pass
            raise RuntimeError("indices should be on the CPU, as the indexed tensor is")
        across = name.startswith("aten._to_copy") and devices - {first}
        rows = [x for x in tensors[1:] if x.ndim and x.device.type == "cpu"]
        if across and not kwargs.get("non_blocking") or name.startswith("aten.index.") and rows:
            assert self.may_wait, f"{name} blocks"
        return op(*args, **kwargs)


def step_without_backward(optimizer, loss):
    assert loss.device.type == "cuda"
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.empty_like(p)
    optimizer.step()


@pytest.fixture
def fake_cuda(monkeypatch):
    # A real parameter cannot become a fake one, and its gradient's graph would look for a driver.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    monkeypatch.setattr(loo, "optimizer_step", step_without_backward)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), FakeCuda() as mode:
        yield mode


ON_GPU = [dict(method=name) for name in ("moco", "moco_same", "moco++", "supervised")]
ON_GPU += [dict(method="supervised", label="rotation"), dict(method="looc++", drop_equal=True)]
ON_GPU += [dict(method="looc", precision="float32", cache="host", splits=1)]


CAN_FAKE = torch.backends.cuda.is_built() and torch.__version__ >= "2.7"


@pytest.mark.skipif(not CAN_FAKE, reason="needs torch 2.7 or later, built with CUDA")
@pytest.mark.parametrize("changed", ON_GPU, ids=str)
def test_a_step_on_a_gpu_never_waits(changed, fake_cuda):
    config = CONFIG | dict(groups=(*GROUPS, "texture"), same=("rotation",), label=None, size=40)
    config |= dict(device="cuda:0", precision="bfloat16", cache="device", always=("crop", "blur"))
    config |= dict(batch=4, splits=2) | changed
    images, labels = (noise(8, 3, 48, 48) * 255).byte(), torch.arange(8) % 3
    copies = (noise(8, 2, 3, 48, 48) * 255).byte()
    dataset = data.ImageSet(images, torch.linspace(0.7, 1.4, 8), {}, {}, textures=copies)
    dataset, place = loo.place_dataset(dataset, config)
    assert place == config["cache"]
    state = loo.init_state(config, 4 if config["method"] == "supervised" else 0)
    fake_cuda.may_wait = False
    rows = next(loo.batch_rows(config, 8, 0, 1))
    rows, *inputs = loo.get_batch(dataset, config, rows)
    assert {x.device.type for x in inputs} == {"cuda"}
    images, aspect, textures = inputs
    if config["method"] == "supervised":
        y = None if config["label"] else loo.move_like(images, labels[rows])
        state, (loss,) = loo.supervised_step(state, images, aspect, y, config, textures)
        metrics = {}
    else:
        state, (loss, *compared) = loo.train_step(state, images, aspect, config, textures)
        metrics = loo.contrast_metrics(*compared, config["tau"])
    made = (loss, state.queue, state.total, *metrics.values())
    assert {x.device.type for x in made} == {"cuda"}
    assert loss.dtype == torch.float32


# ---------------------------------------------------------------- loo.py: configuration to bench

BAD_FLAGS = [("--epochz=3", "--epochs"), ("--lr=abc", "a number"), ("--epochs", "a whole number")]
BAD_FLAGS += [("--epochs=2.5", "a whole number"), ("--groups=colour", "color")]
BAD_FLAGS += [("--data=nope", "factors"), ("--data=folder --root=/missing", "/missing")]
BAD_FLAGS += [("--data=.", "did you mean --data=folder --root=.?")]
BAD_FLAGS += [("--root=.", "folder"), ("--method=loco", "looc"), ("--batch=101", "--splits=4")]
BAD_FLAGS += [("--schedule=cosinus", "cosine"), ("--groups=color,color", "twice")]
BAD_FLAGS += [("--fresh=maybe", "true or false"), ("epochs=3", "--epochs")]
BAD_FLAGS += [("--fresh=", "true or false")]  # of a variable that is not set
BAD_FLAGS += [("--canvas=64", "--size"), ("-epochs=3", "two dashes"), ("--momentum=9", "0 to 1")]
BAD_FLAGS += [("--method=looc --groups=", "at least one"), ("--packed=nope", "data.py pack")]
BAD_FLAGS += [("--device=gpu", "cuda"), ("--device=cuda:99", "CUDA devices"), ("--root", "path")]
BAD_FLAGS += [("--method=moco_same --groups=color", "--same=rotation"), ("--cache=disk", "device")]
BAD_FLAGS += [("--weight_decay=-1", "0 or more"), ("--textures=.", "--groups=color,texture")]
BAD_FLAGS += [("--batch=100000 --splits=1", "smaller"), ("--arch=squeezenet1_0", "resnet18")]
BAD_FLAGS += [("--arch=vgg11 --size=16", "--size=16"), ("--arch=vit_b_16 --size=40", "patch")]
BAD_FLAGS += [("--arch=swin_t --method=looc++", "ResNet"), ("--arch=swin_t --stem=cifar", "ResNet")]
BAD_FLAGS += [("--init=nope", "no such file"), ("--init=imagenet", "--arch=small")]
BAD_FLAGS += [("--lr=nan", "more than 0"), ("--tau=inf", "finite"), ("--weight_decay=inf", "0 or")]
BAD_FLAGS += [("--schedule=3,-5", "cosine"), ("--label=nope", "hue"), ("--lr -1", "more than 0")]
BAD_FLAGS += [(f"--{flag}={10**12}", "2**31") for flag in ("queue", "dim", "hidden", "epochs")]
BAD_FLAGS += [("--out --fresh", "--out: expected a value"), ("--out=", "expected text or a path")]
BAD_FLAGS += [("--label ''", "--label="), ("--groups", "words"), ("-5", "--method=-5")]
BAD_FLAGS += [(f"--seed={2**64}", "64 bits")]
BAD_FLAGS += [("--sampling=rotation.q=1", "rotation.p"), ("--sampling=blur.p=2", "0 to 1")]
BAD_FLAGS += [("--sampling=texture.p=1", "rotation.p"), ("--sampling=blur.p", "a number")]
BAD_FLAGS += [("moco color factors stray", "stray"), ("--nofresh=1", "no such flag")]


@pytest.mark.parametrize("flags, hint", BAD_FLAGS)
def test_bad_flags_are_one_clear_line_and_nothing_is_written(flags, hint, here, capsys):
    assert hint in refused(capsys, loo, f"train {flags}")
    assert not list(here.iterdir())


def test_a_home_folder_may_be_named_by_its_sign(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    config = loo.default_config(out="~/run", root="~/photos", data="folder")
    assert (config["out"], config["root"]) == (f"{here}/run", f"{here}/photos")
    assert data.parse_flags(eval.table, dict(runs="~/a*, b")) == {"runs": (f"{here}/a*", "b")}
    assert data.parse_flags(eval.fewshot, dict(shots=np.int64(5))) == {"shots": ("5",)}
    raises(
        UserError, "--groups=.*: expected words", data.parse_flags, loo.train, {"groups": {"color"}}
    )
    run(data, "sheet --out=~/new/sheet.png --size=8")
    assert (here / "new" / "sheet.png").exists()


def test_a_recipes_sampling_is_of_what_is_drawn():
    def sampling(**flags):
        return loo.default_config(**flags)["sampling"]

    recipe = loo.RECIPES["factors"]["sampling"]
    assert sampling() == recipe == dict(crop={"area": 0.4}, color={"gray": 0.1})
    assert sampling(sampling="crop.area=0.2") == recipe | dict(crop={"area": 0.2})
    assert recipe["crop"] == {"area": 0.4}
    assert sampling(groups="rotation", always="crop") == dict(crop={"area": 0.4})
    assert sampling(groups="rotation", always="flip") is None
    assert sampling(recipe="imagenet100") is None


def test_flags_from_python_are_those_of_the_command_line(here):
    given = dict(groups="color", lr=np.float32(1), epochs=np.int64(3), batch=64.0, fresh=False)
    given["sampling"] = "color.p=0.5,crop.area=1"
    config = loo.default_config(**given, out=Path("run"), drop_equal=np.True_)
    assert config["groups"] == ["color"]
    assert config["sampling"] == dict(color=dict(p=0.5, gray=0.1), crop=dict(area=1))
    assert [config[key] for key in ("lr", "epochs", "batch", "out")] == [1.0, 3, 64, "run"]
    assert json.loads(json.dumps(config)) == config
    config = loo.default_config(groups="color", schedule=[3, 5], device=torch.device("cpu"))
    assert (config["schedule"], config["device"]) == ("3,5", "cpu")
    wrong = [dict(epochs=2.5), dict(root=5), dict(groups=7), dict(out=True), dict(epochs=True)]
    wrong += [dict(seed=None), dict(data=None), dict(always=None)]  # None is no default of these
    for flags in wrong:
        raises(UserError, "expected", loo.default_config, **flags)


def test_supervised_learns_a_label_that_tells_images_apart():
    dataset = data.ImageSet(None, None, {"class": torch.zeros(4)}, {"class": ["."]})
    config = CONFIG | dict(method="supervised", label=None)
    assert loo.training_labels(dataset, config) == (None, 4, "rotation")
    with pytest.raises(UserError, match="name rotation in --groups"):
        loo.training_labels(dataset, config | dict(groups=["color"]))


def test_supervised_learns_from_the_images_that_have_the_label(here, capsys):
    lines = [f"x{i}.png,{i % 2 if i % 4 else ''},train" for i in range(32)]
    write_table(here / "photos", "file,odd,split", *lines, images=[f"x{i}" for i in range(32)])
    train = "train --data=folder --root=photos --epochs=2 --size=16 --splits=2 --out=run --method="
    # -1 is no class of cross-entropy.
    out = printed(capsys, loo, f"{train}supervised --label=odd --batch=8").out
    assert "24 training images" in out
    assert "6 steps of 8" in out
    err = refused(capsys, loo, f"{train}supervised --label=odd --batch=26 --fresh")
    assert "--batch=26 is more than the 24 training images that have a odd" in err
    swapped = [f"x{i}.png,{1 - i % 2 if i % 4 else ''},train" for i in range(32)]
    write_table(here / "photos", "file,odd,split", *swapped, images="")
    err = refused(capsys, loo, f"{train}supervised --label=odd --batch=8")
    assert "--label=odd with 24 images, by name, size or label other than the run's 24" in err
    out = printed(capsys, loo, f"{train}moco --batch=8 --fresh {TINY}").out
    assert "32 training images" in out


def test_a_recipes_steps_and_canvas_follow_the_epochs_and_the_size():
    flags = dict(data="folder", recipe="imagenet100", arch="small", size=112)
    config = loo.default_config(**flags)
    assert config["schedule"] == "300,400"
    assert loo.default_config(**flags, epochs=100)["schedule"] == "60,80"
    given = loo.default_config(**flags, epochs=100, schedule="50,300")
    assert given["schedule"] == "50,300"
    warnings = list(loo.odd_settings(given | dict(queue=8), 9000, torch.ones(1)))
    assert warnings == ["--schedule=50,300: 300 never come in --epochs=100"]
    assert config["canvas"] == 192  # 384 for 224
    assert loo.noise_dataset(config | dict(batch=2)).images.shape == (4, 3, 192, 192)
    assert loo.default_config(**flags, canvas=99)["canvas"] == 99
    assert loo.default_config(**flags | dict(data="cifar10"))["canvas"] is None  # no photographs
    assert loo.default_config(data="folder")["canvas"] is None


@pytest.mark.parametrize("flags", [dict(groups="blur"), dict(sampling="rotation.p=0")], ids=str)
def test_a_group_that_changes_no_view_is_named(flags):
    (warning,) = loo.odd_settings(loo.default_config(**flags), 9000, torch.ones(1))
    assert "changes no view, or few" in warning
    assert not list(loo.odd_settings(loo.default_config(), 9000, torch.ones(1)))


@pytest.mark.parametrize("seconds, left", [(65, "01:05"), (7265, "2:01:05"), (3 * 86400, "3 days")])
def test_the_time_left_may_be_days(seconds, left, capsys):
    record = dict(step=2, loss=[1, 1, 1], lr=0.1, images_per_s=9, seconds_left=seconds)
    loo.print_record(record, CONFIG, 4, True)
    assert f"images/s  {left}" in capsys.readouterr().out


@pytest.mark.parametrize("batch, queue", [(128, 128), (64, 128), (32, 250), (32, 16)])
def test_how_often_a_query_meets_a_key_of_its_own(batch, queue):
    """200 images, as train shuffles them; 128 of each, the defaults: two queries of three."""
    seen, met = [], []
    for epoch in range(60):
        for rows in data.epoch_batches(200, batch, 0, epoch).tolist():
            met += [row in seen[-queue:] for row in rows] if epoch > 3 else []
            seen += rows
    assert loo.own_key_share(200, batch, queue) == pytest.approx(np.mean(met), abs=0.02)
    warnings = list(loo.odd_settings(CONFIG | dict(batch=batch, queue=queue), 200, torch.ones(1)))
    assert len(warnings) == (queue > 16)


def test_learning_rate_falls_as_the_paper_says():
    config = dict(lr=0.03, schedule="300,400", epochs=500)
    rates = [loo.learning_rate(config, epoch) for epoch in (0, 299.9, 300, 400)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.0003])
    config["schedule"] = "cosine"
    rates = [loo.learning_rate(config, epoch) for epoch in (0, 250, 500)]
    assert rates == pytest.approx([0.03, 0.015, 0])


def test_prefetched_items_come_in_order():
    assert list(loo.prefetch(lambda i: i * i, range(5))) == [0, 1, 4, 9, 16]
    assert list(loo.prefetch(str, [])) == []


def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_last_good_step(here, capsys, monkeypatch):
    step = loo.train_step

    def poisoned(state, *rest):
        state, out = step(state, *rest)
        if state.step == 3:
            next(state.encoder_q.parameters()).data.fill_(math.nan)
        return state, out

    monkeypatch.setattr(loo, "train_step", poisoned)
    raises(SystemExit, "3", run, loo, f"train --epochs=1 --out=other --save_every=2 {SMALL}")
    assert "not finite at step 3" in capsys.readouterr().err
    saved = read_checkpoint(here / "other")
    assert saved["step"] == 2
    assert all(x.isfinite().all() for x in saved["encoder_q"].values())


def test_your_own_images_are_trained_on_and_judged(here, capsys):
    """Where some cannot be read, the others are the queries of retrieve."""
    root = photo_tree(here / "photos", each=40)
    (root / "class0" / "broken.png").write_bytes(b"\x89PNG broken")
    run(loo, f"train --data=folder --root={root} --epochs=1 --out=run --size=28 --batch=16 {TINY}")
    assert "broken.png" in printed(capsys, eval, "linear --json").err
    assert results(here)[0]["label"] == "class"
    paths = data.open_dataset("folder", "test", root=root).images.source
    readable = len(paths) // 2
    for path in paths[readable:]:
        path.write_bytes(b"broken")
    run(eval, f"retrieve --queries={len(paths)} --neighbours=2 --out=found.png")
    assert Path("found.png").exists()
    err = refused(capsys, eval, f"retrieve --neighbours={readable}", lines=2)
    assert f"there are {readable} test images that can be read" in err
    lost = len(paths) - readable
    assert f"{lost} of the {len(paths)} test images could not be read when" in err


def init_config(init, **changes):
    return loo.default_config(**dict(init=str(init), arch="resnet18", hidden=8, dim=4) | changes)


@pytest.mark.parametrize("prefix", ["", "state_dict.module.encoder_q.", "model."])
def test_start_weights_of_a_state_dict_whatever_it_is_nested_in(prefix, tmp_path):
    net = torchvision.models.resnet18()
    content = net.state_dict()
    if prefix:
        outer, _, inner = prefix.partition(".")
        content = {outer: {inner + name: x for name, x in content.items()}, "queue": torch.ones(2)}
    torch.save(content, tmp_path / "net.pt")
    config = init_config(tmp_path / "net.pt", method="looc++")
    state = loo.start_weights(config)
    missing, unexpected = loo.build_encoder(config).load_state_dict(state, strict=False)
    assert set(missing) == {"w1", "b1", "w2", "b2"}
    assert set(unexpected) == {"trunk.fc.weight", "trunk.fc.bias"}
    assert torch.equal(state["trunk.conv1.weight"], net.conv1.weight)
    for space in range(3):
        assert torch.equal(state[f"tops.{space}.1.conv2.weight"], net.layer4[1].conv2.weight)


def test_start_weights_of_two_networks_say_which_is_taken(tmp_path, capsys):
    content = torchvision.models.resnet18().state_dict()
    torch.save({"ema": content, "model": content}, tmp_path / "net.pt")
    loo.start_weights(init_config(tmp_path / "net.pt"))
    said = "--init holds several networks, ['ema.', 'model.']: 'ema.' is taken; to take another"
    assert said in capsys.readouterr().err


def test_start_weights_of_a_vision_transformer_at_another_size(tmp_path, shallow_vit):
    net = torchvision.models.get_model("vit_b_32", image_size=96)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    state = loo.start_weights(init_config(tmp_path / "net.pt", arch="vit_b_32", size=64))
    position = net.encoder.pos_embedding
    assert state["trunk.encoder.pos_embedding"].shape == (1, 5, 768)
    assert_close(state["trunk.encoder.pos_embedding"][:, :2], position[:, :2])  # class, corner


def test_start_weights_that_do_not_fit_or_cannot_be_had_are_named(tmp_path, monkeypatch):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "net.pt")
    config, deeper = (init_config(tmp_path / "net.pt", arch=f"resnet{n}") for n in (18, 34))
    names = r"80 weights do not fit: layer1.2.conv1.weight is \[64, 64, 3, 3\], expected none"
    raises(UserError, names, loo.start_weights, config)
    shapes = r"1 weights do not fit: conv1.weight is \[64, 3, 7, 7\], expected \[64, 3, 3, 3\]"
    raises(UserError, shapes, loo.start_weights, deeper | dict(stem="cifar"))
    weights = torchvision.models.resnet18().state_dict()
    like = dict(dtype=torch.float8_e4m3fn), dict(device="meta"), dict(dtype=torch.int8)
    for kind, says in zip(like, ("not finite", "a meta .*, expected plain floats", "torch.int8")):
        other = torch.full((64, 3, 7, 7), math.nan).to(**kind)
        torch.save(weights | {"conv1.weight": other}, tmp_path / "net.pt")
        raises(UserError, f"1 weights do not fit: conv1.weight .*{says}", loo.start_weights, config)
    torch.save([1], tmp_path / "net.pt")
    raises(UserError, "100 weights do not fit: conv1.weight is none", loo.start_weights, config)
    torch.save(torch.nn.Linear(1, 1), tmp_path / "net.pt")
    raises(UserError, "not ours: expected tensors alone", loo.start_weights, config)
    offline = unittest.mock.Mock(side_effect=urllib.error.URLError("no route"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    raises(UserError, "no route.*--init=FILE", loo.start_weights, init_config("imagenet"))
    # A download that was cut short.
    weights = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints" / weights).touch()
    raises(UserError, "--init=imagenet: .*name a file", loo.imagenet_weights, "resnet18")


def test_a_run_starts_from_another_and_goes_on_without_it(here, capsys):
    line = f"train --epochs=1 {SMALL}"
    run(loo, f"{line} --out=first")
    first = loo.load_encoder("first")[0].state_dict()
    of_checkpoint = init_config("first/checkpoint.pt", arch="small", hidden=32, dim=16)
    assert_close(loo.start_weights(of_checkpoint), dict(first), rtol=0, atol=0)
    err = refused(capsys, loo, f"{line} --out=second --init=first --stem=cifar")
    assert "the run has --stem=imagenet, not cifar" in err
    with unittest.mock.patch.object(loo, "train_loop", side_effect=RuntimeError("begun")) as loop:
        raises(RuntimeError, "begun", run, loo, f"{line} --out=second --init=first")
    for encoder in loop.call_args.args[0][:2]:  # of the query and of the keys
        assert_close(dict(encoder.state_dict()), dict(first), rtol=0, atol=0)
    out = printed(capsys, loo, f"{line} --out=second --init=first").out
    assert f"small (backbone and heads from {here / 'first'}) on views" in out
    out = printed(capsys, loo, f"{line} --out=third --init=first --dim=8").out
    assert "small (backbone from" in out
    assert "dim" in refused(capsys, loo, f"{line} --out=third --init=first")
    with unittest.mock.patch.object(data, "decode_cached", side_effect=AssertionError):
        assert "other settings: --init" in refused(capsys, loo, f"{line} --out=second")
    raises(UserError, "--fresh cannot move --out=. aside", loo.move_aside, Path("."))
    line = f"{line} --out=second --init=first"
    shutil.copytree("first", "copy", ignore=shutil.ignore_patterns("checkpoint*"))
    without = (
        "copy holds a trained run without its checkpoint.pt: it cannot go on; name another --out"
    )
    assert without in refused(capsys, loo, f"{line} --out=copy --seed=7")
    shutil.rmtree("first")
    assert "second is trained already" in printed(capsys, loo, line).out
    assert "no such file" in refused(capsys, loo, f"{line} --fresh")
    assert not Path("second.1").exists()


def test_your_own_images_ruined(here, capsys):
    for path in photo_tree(here / "photos").rglob("*.*"):
        path.write_bytes(b"broken")
    train = "train --data=folder --root=photos --batch=8 --splits=1"
    assert "none of" in refused(capsys, loo, train)
    assert not (here / "runs").exists()
    stylize = "stylize --root=photos --out=so --size=16 --features=random --copies=1 --steps=0"
    raises(SystemExit, "^2$", run, data, stylize)
    assert "can be read" in capsys.readouterr().err.splitlines()[-1]


def test_images_without_labels_have_what_needs_none(here, capsys):
    photo_tree(here / "photos", 1, 40)
    assert data.open_dataset("folder", "train", root="photos/class0").classes["class"] == ["."]
    line = f"train --data=folder --root=photos/class0 --batch=16 --out=plain --epochs=1 {TINY}"
    out = printed(capsys, loo, line).out
    assert ", no labels; small on views of 32 pixels" in out
    assert "next: python eval.py rotation" in out
    run(eval, "spaces --run=plain")
    run(eval, "retrieve --run=plain --neighbours=2 --turn")
    assert {line["label"] for line in loo.read_jsonl(Path("plain/results.jsonl"))} == {"rotation"}
    run(eval, "retrieve --run=plain --neighbours=2 --out=alone.png")
    assert Path("alone.png").exists()
    why = "photos/class0 has no label on images of both train and test: give each class"
    for task in ("linear", "knn", "fewshot", "robust"):
        assert why in refused(capsys, eval, f"{task} --run=plain")
    # A training image that is lost in between is noticed.
    path = data.open_dataset("folder", "train", root="photos/class0").images.source[3]
    path.write_bytes(bytes(path.stat().st_size))
    assert "other than the run's" in refused(capsys, loo, line, lines=2)
    (here / "plain" / "heads.pt").unlink()
    why = "plain has not finished training: give its command again"
    assert why in refused(capsys, eval, "rotation --run=plain")


def test_readmes_examples_run(here, monkeypatch):
    readme = (Path(loo.__file__).parent / "README.md").read_text()
    blocks = [text.split("```")[0] for text in readme.split("```python\n")[1:]]
    own = next(block for block in blocks if "loo.GROUPS[" in block)
    loop = next(block for block in blocks if "loo.multi_space_loss(" in block)
    monkeypatch.setattr(loo, "GROUPS", dict(loo.GROUPS))
    train, tiny = loo.train, dict(epochs=1, queue=16, hidden=16, dim=8)
    monkeypatch.setattr(loo, "train", functools.wraps(train)(functools.partial(train, **tiny)))
    exec(own, {"__name__": "__main__"})
    assert loo.load_encoder("runs/latest")[1]["groups"] == ["color", "invert"]
    write_image(here / "a.png")
    names = {"paths": ["a.png", "a.png"]}
    for part in next(block for block in blocks if "loo.load_encoder(" in block).split("\n\n")[:2]:
        exec(part, names)
    assert names["features"].shape == (2, 128)
    names = {"loader": [noise(8, seed=i) for i in range(2)]}
    exec(loop, names)
    assert names["pointer"] == 16
    assert torch.equal(names["queue"][0, 8:16], names["k"][0, 0])
    assert torch.equal(names["queue"][2, 8:16], names["k"][2, 2])


def same_run(a, b):
    """Checkpoints and logs are equal bit for bit, but for what was timed."""
    one, two = read_checkpoint(a), read_checkpoint(b)
    for part in (*ENCODERS, "queue", "total", POINTER, "step"):
        assert_close(one[part], two[part], rtol=0, atol=0)
    logs = [loo.read_jsonl(Path(out) / "log.jsonl") for out in (a, b)]
    for line, timed in itertools.product(itertools.chain(*logs), ("images_per_s", "seconds_left")):
        line.pop(timed, None)
    assert logs[0] == logs[1]


def test_a_run_goes_on_where_it_stopped(here, capsys, monkeypatch):
    """Ended anywhere and resumed equals uninterrupted, bit for bit; --fresh keeps the old run."""
    # 52 steps, two to a line of the log.
    monkeypatch.setattr(data, "FACTORS", {"train": 208, "val": 64, "test": 64})
    monkeypatch.setattr(loo, "LOG_LINES", 25)
    line = f"train --method=moco --epochs=2 --save_every=7 {QUICK}"
    run(loo, f"{line} --out=whole")
    stops = stop_at(monkeypatch, 17, 27, 28, 51)
    while stops:
        raises(RuntimeError, "stopped here", run, loo, f"{line} --out=parts")
    saved = read_checkpoint("parts") | {"version": 1}  # which had other names
    for old, new in loo.VERSION_1.items():
        saved[old] = saved.pop(new)
    torch.save(saved, "parts/checkpoint.pt")
    assert "resuming parts at step 49" in printed(capsys, loo, f"{line} --out=parts").out
    same_run("whole", "parts")
    run(loo, f"train --method=moco --epochs=1 --out=parts --fresh {QUICK}")
    assert (here / "parts.1" / "backbone.pt").exists()


def test_settings_of_a_notebook_change_no_number(here, monkeypatch):
    monkeypatch.setattr(data, "FACTORS", {"train": 64, "val": 32, "test": 32})

    def commands(out):
        run(loo, f"train --method=moco --epochs=1 --precision=float32 --out={out} {QUICK}")
        run(eval, f"rotation --run={out}")
        return [line["top1"] for line in loo.read_jsonl(Path(out) / "results.jsonl")]

    plain = commands("plain")
    before = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert commands("changed") == plain
        assert torch.get_default_dtype() == torch.float64  # as it was
        assert torch.get_float32_matmul_precision() == "medium"
        matmul = torch.backends.cuda.matmul
        if hasattr(matmul, "fp32_precision"):  # of torch 2.9 and later
            matmul.fp32_precision = "tf32"
            with loo.own_settings():
                assert matmul.fp32_precision == "ieee"
            assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_default_dtype(before[0])
        torch.set_float32_matmul_precision(before[1])
    same_run("plain", "changed")


class Bomb:
    def __reduce__(self):  # opens a file for writing when it is unpickled
        return open, ("bomb", "w")


RUINED = dict(other=lambda saved: {"version": 9}, bomb=lambda saved: Bomb())
RUINED |= dict(lacks=lambda saved: {k: x for k, x in saved.items() if k != "queue"})
RUINED |= dict(shape=lambda saved: saved | {"encoder_q": {}}, config=lambda x: x | {"config": None})


@pytest.mark.parametrize("ruin", ["cut", "both", *RUINED])
def test_a_ruined_checkpoint_gives_way_to_the_one_before(ruin, here, capsys):
    line, path = f"train --epochs=1 --out=run {SMALL}", here / "run" / "checkpoint.pt"
    run(loo, f"{line} --save_every=3")
    if ruin in RUINED:
        torch.save(RUINED[ruin](torch.load(path)), path)
    else:
        path.write_bytes(path.read_bytes()[:1000])
    if ruin == "both":
        path.with_name("checkpoint.old.pt").write_bytes(b"")
        assert "--fresh" in refused(capsys, loo, line, lines=3)  # and two warnings
        return
    out, err = printed(capsys, loo, line)
    assert "resuming run at step 3" in out
    assert re.search("warning: run/checkpoint.pt (is|holds)", err)
    assert not (here / "bomb").exists()


def test_curves_cover_the_whole_log_and_never_end_a_training(here, capsys, monkeypatch):
    draw = unittest.mock.Mock(wraps=data.draw_curves)
    draw.side_effect = [RuntimeError("no font")] * 2 + [unittest.mock.DEFAULT] * 9
    monkeypatch.setattr(data, "draw_curves", draw)
    stop_at(monkeypatch, 45)
    line = f"train --out=run --epochs=2 {QUICK} --save_every=2"
    raises(RuntimeError, "stopped here", run, loo, line)
    assert capsys.readouterr().err.count("warning: run/curves.png is not drawn: no font\n") == 2
    run(loo, line)
    drawn = [len(call.args[0]["loss"]["color"]) for call in draw.call_args_list]
    assert (drawn[:2], drawn[-1]) == ([20, 40], 64)
    assert Image.open("run/curves.png").width > 1200


def test_runs_latest_is_a_convenience(here, capsys, monkeypatch):
    (here / "runs" / "a").mkdir(parents=True)
    for out in ("runs/a", "runs/latest", "runs/latest/"):  # itself, as --out
        loo.link_latest(Path(out))
        assert os.readlink("runs/latest") == "a"
    assert loo.default_config(out="runs/latest")["out"] == "runs/a"
    for error in (PermissionError, OSError, NotImplementedError):
        monkeypatch.setattr(Path, "symlink_to", unittest.mock.Mock(side_effect=error("no links")))
        loo.link_latest(here / "b")
        assert capsys.readouterr().err.startswith("warning: no link runs/latest (no links): name")
    write_image(here / "cat" / "x.png")
    loo.link_latest(here / "b", here)  # the images are here: runs would be a class
    assert "would be read as a class" in capsys.readouterr().err
    assert sorted(os.listdir("runs")) == ["a", "latest"]


def test_one_process_needs_no_other_variable(monkeypatch):
    """Kubeflow and SageMaker set WORLD_SIZE=1 and no more."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    with loo.init_distributed("cpu"):
        assert not torch.distributed.is_initialized()
    for size, why in (("2", "RANK"), ("two", "WORLD_SIZE=two"), ("0", "WORLD_SIZE=0")):
        monkeypatch.setenv("WORLD_SIZE", size)
        raises(UserError, why, loo.init_distributed("cpu").__enter__)


# What SLURM sets, the CUDA devices that are seen; where the process is, and its device.
STEP = dict(SLURM_JOB_ID="15005", SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_NTASKS="4")
STEP |= dict(SLURM_STEP_ID="2", SLURM_STEP_NUM_TASKS="4", SLURM_STEP_NODELIST="gpu[03-05,7],a")
TASK = dict(SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_NTASKS="2")
LAUNCHED = {
    "two nodes": (STEP, 2, "3 4 gpu03 15199", "cuda:1"),
    "one node": (STEP | dict(SLURM_STEP_NODELIST="a"), 2, "3 4 localhost 15199", "cuda:1"),
    "a GPU for each task": (STEP, 1, "3 4 gpu03 15199", "cuda"),
    "no GPU": (STEP, 0, "3 4 gpu03 15199", "cpu"),
    "an address": (STEP | dict(MASTER_ADDR="b"), 2, "3 4 b 15199", "cuda:1"),
    "no more said": (TASK, 2, "1 2 localhost 15000", "cuda:1"),
    "torchrun": (STEP | dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"), 2, "0 2", "cuda:0"),
    "one task": (STEP | dict(SLURM_STEP_NUM_TASKS="1"), 2, "", "cuda"),
    "sbatch": (dict(SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_NTASKS="4"), 2, "", "cuda"),
    "salloc": (STEP | dict(SLURM_STEP_ID="4294967290"), 2, "", "cuda"),
    "flags of sbatch": (dict(SLURM_NTASKS="4"), 2, "", "cuda"),
    "no numbers": (TASK | dict(SLURM_JOB_ID="x", SLURM_STEP_ID="batch"), 2, "", "cuda"),
}


@pytest.mark.parametrize("case", LAUNCHED)
def test_srun_starts_processes_as_torchrun_does(case, monkeypatch):
    said, gpus, expected, device = LAUNCHED[case]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with unittest.mock.patch.dict(os.environ, said, clear=True):
        assert data.resolve_device("auto") == device
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        assert [os.environ[name] for name in names if name in os.environ] == expected.split()
        assert loo.asked_processes() == int(os.environ.get("WORLD_SIZE", 1))


def test_patience_is_a_variable(monkeypatch):
    meet = unittest.mock.Mock(side_effect=UserError("alone"))
    monkeypatch.setattr(loo, "meet_processes", meet)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for said, why in (("5", "alone"), ("5 s", "5 s: expected 1 or more; unset it for 60")):
        monkeypatch.setenv("LOOC_PATIENCE", said)
        raises(UserError, why, loo.init_distributed("cpu").__enter__)
    meet.assert_called_once_with(datetime.timedelta(seconds=5))


def test_a_second_trainer_is_refused_where_the_disk_has_locks(here, capsys, monkeypatch):
    line = f"train --epochs=1 --out=run {SMALL}"
    with loo.lock_folder(here / "run"):
        assert "another process is training in run" in refused(capsys, loo, line)
        assert "another process is training in run" in refused(capsys, eval, "knn --run=run")
    run(loo, line)
    error = OSError(38, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", unittest.mock.Mock(side_effect=error))
    with loo.lock_folder(here):
        assert "is not locked: Function not implemented" in capsys.readouterr().err


def test_a_line_of_a_log_that_lacks_something_is_left_out(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('[]\n{"step": 1}\n{"step": 2, "lr": 1}\n3\n')
    types = dict(step=int, lr=loo.NUMBER)
    assert loo.read_jsonl(tmp_path / "log.jsonl", types) == [dict(step=2, lr=1)]
    assert capsys.readouterr().err.count("is not whole and left out") == 3
    (tmp_path / "log.jsonl").write_text('{"a": null}\n{"a": [1, "x"]}\n{}\n{"a": [1.5]}\n')
    lines = loo.read_jsonl(tmp_path / "log.jsonl", dict(a=[loo.NUMBER]), ["a"])
    assert lines == [dict(a=None), {}, dict(a=[1.5])]


DAMAGES = dict(method="x", groups=None, data=0, seed="1", arch=[], size=None, dim="8")


@pytest.mark.parametrize("key", DAMAGES)
def test_a_damaged_config_is_one_clear_line(key, untrained, capsys):
    path = untrained / "runs" / "latest" / "config.json"
    config = json.loads(path.read_text())
    run(eval, "knn --label=hue")
    for damaged in (config | {key: DAMAGES[key]}, {k: v for k, v in config.items() if k != key}):
        path.write_text(json.dumps(damaged))
        assert "latest holds no run of ours" in refused(capsys, eval, "knn --label=hue")
        with contextlib.suppress(SystemExit):  # of a table without rows
            run(eval, "table --runs=runs/latest")
        assert "Traceback" not in capsys.readouterr().err


def test_files_of_two_runs_are_not_mixed(untrained, capsys):
    loo.export(loo.init_state(CONFIG | dict(seed=1)).encoder_q, untrained / "other")
    shutil.copy("other/backbone.pt", "runs/latest/backbone.pt")
    assert "backbone.pt and heads.pt are not of one run" in refused(capsys, eval, "knn")


def test_float32_is_not_tf32():
    with torch.backends.cudnn.flags():  # as they were, afterwards
        loo.tune_backends()
        assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_bench_times_a_real_step(here, capsys):
    run(loo, "bench --batch=16 --size=16 --steps=3 --groups=color,texture --json")
    line = json.loads(capsys.readouterr().out)
    assert line["groups"] == ["color", "texture"]
    assert line["images_per_s"] == pytest.approx(16e3 / line["step_ms"])
    assert line["step_ms"] > line["network_ms"] / 2
    assert 0 < line["peak"] < 1
    assert {"network_ms", "arch", "size", "batch", "device", "dtype", "group_ms"} <= set(line)


def test_bench_reads_a_file_anew():
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    read = loo.file_reader(images)
    for _ in range(2):
        assert torch.equal(read(), images)
        assert read().is_shared()


# ---------------------------------------------------------------- data.py: open, read, cache, draw


def test_folder_splits_by_path_and_skips_what_it_cannot_read(tmp_path, capsys):
    root = photo_tree(tmp_path / "photos")
    broken = root / "class1" / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0not a picture" * 9)
    (root / "class1" / "notes.txt").write_text("not a picture, and not named as one")
    where = dict(root=root, size=28)
    train, val = (load_dataset("folder", split, **where) for split in ("train", "val"))
    assert len(train.images) + len(val.images) == 42
    assert train.images.shape[1:] == (3, 32, 32)
    assert train.classes["class"] == ["class0", "class1", "class2"]
    assert capsys.readouterr().err.count("warning: unreadable") == 1
    before = data.image_folder("train", root)[0]
    broken.unlink()
    train, val = (data.image_folder(split, root)[0] for split in ("train", "val"))
    assert set(train) == set(before) - {broken}  # the others keep their split
    assert not set(train) & set(val)


def test_classes_without_images_in_a_split_are_counted(tmp_path, capsys):
    photo_tree(tmp_path / "tree", classes=30, each=1)
    lines = [f"{c}.png,{c},{'test' if c == 'b' else 'train'}" for c in "abc"]
    write_table(tmp_path / "table", "file,kind,split", *lines, images="abc")
    absent = []
    for split in ("train", "val"):
        classes = data.open_dataset("folder", split, root=tmp_path / "tree").labels["class"]
        absent.append(30 - len(classes.unique()))
    data.open_dataset("folder", "train", root=tmp_path / "table")
    of_tree, of_table = capsys.readouterr().err.splitlines()  # each once
    none, test = "have no training image", "have no test image"
    assert min(absent) > 0
    assert f"label class: of the 30 classes {absent[0]} {none} and {absent[1]} {test}" in of_tree
    assert f"label kind: of the 3 classes 1 {none} and 2 {test}" in of_table
    splits = folder_of(tmp_path / "splits", train__a=1, train__b=1, train__c=1, val__a=5, val__c=5)
    # A class has the same number in every split.
    assert opened(splits, "val")[1] == {"class": [0] * 5 + [2] * 5}
    assert "label class: 1 of the 3 classes have no image" in capsys.readouterr().err


def test_runs_of_one_split_seed_have_the_same_test_images(untrained):
    root, run_folder = photo_tree(untrained / "photos"), Path("runs/latest")
    assert loo.default_config()["split_seed"] == 0
    splits = [data.image_folder("val", Path("photos"), seed)[0] for seed in (0, 3)]
    assert splits[0] != splits[1]
    of_folder = CONFIG | dict(data="folder", root="photos", canvas=None)
    # A run of before has no split_seed: its split is by its seed.
    seeds = [(splits[0], dict(seed=seed, split_seed=0)) for seed in (1, 2)]
    for images, given in (*seeds, (splits[1], dict(seed=3))):
        (run_folder / "config.json").write_text(json.dumps(of_folder | given))
        assert eval.open_run(run_folder).split["test"].images.source == images
    config = loo.default_config(data="folder", root=str(root), seed=3, split_seed=3)
    saved = {key: value for key, value in config.items() if key != "split_seed"}
    loo.check_same_config(config, saved, run_folder)
    with pytest.raises(UserError, match="--split_seed=0 .the run has 3.;"):
        loo.check_same_config(config | dict(split_seed=0), saved, run_folder)
    factors = dict(data="factors", split_seed=0)  # which has no split of its own
    loo.check_same_config(config | factors, saved | dict(data="factors"), run_folder)


def folder_of(root, **counts):
    """Images in folders below root, x__y for x/y; the red of image i is 30 i."""
    for name, count in counts.items():
        for i in range(count):
            write_image(root / name.replace("__", "/") / f"{i}.png", (30 * i % 256, 0, 0))
    return root


LAYOUTS = [(dict(Training__x=2, Training__y=2, Testing__y=1), ("train", "test"), 2)]
LAYOUTS += [(dict(train__x=2, valid__x=1), ("train", "val"), 1)]
LAYOUTS += [(dict(TRAIN__x=2, dev__x=1, Test__x=1, more=1), ("train", "val", "test"), 1)]
LAYOUTS += [(dict(dev=9, ops=9), ("train", "val"), 2)]
LAYOUTS += [({"Train Set/x": 2, "test_images/x": 1}, ("train", "test"), 1)]
LAYOUTS += [(dict(train2017__x=2, eval__x=1), ("train", "test"), 1)]
LAYOUTS += [(dict(training=2, validation=1, evaluation=1), ("train", "val", "test"), 1)]
LAYOUTS += [(dict(PetImages__Cat=9, PetImages__Dog=9), ("train", "val"), 2)]
LAYOUTS += [(dict(train__images__a=2, train__images__b=2, val__images__a=1), ("train", "val"), 2)]
LAYOUTS += [(dict(train__a__s=2, train__b__s=2, val__a__s=1, val__a__t=1), ("train", "val"), 2)]
LAYOUTS += [({"train/caf\u00e9": 2, "val/cafe\u0301": 1}, ("train", "val"), 1)]
LAYOUTS += [({"cat": 9, "dog": 9, "#snapshot/x": 1, "more": 1}, ("train", "val"), 3)]
LAYOUTS += [(dict(bullet_train=9, eye_test=9), ("train", "val"), 2)]
LAYOUTS += [(dict(box_train__x=2, box_test__x=1, more=1), ("train", "test"), 1)]
LAYOUTS += [({"ISIC_Training_Input/x": 2, "ISIC_Test_Input/x": 1}, ("train", "test"), 1)]
LAYOUTS += [({"1-train/x": 2, "2-val/x": 1, "3-test/x": 1}, ("train", "val", "test"), 1)]
LAYOUTS += [({"train_256/x": 2, "test_256/x": 1}, ("train", "test"), 1)]
LAYOUTS += [(dict(trainval__x=2, test__x=1), ("train", "test"), 1)]
LAYOUTS += [(dict(Xtrain__x=2, Xtest__x=1), ("train", "test"), 1)]
LAYOUTS += [(dict(contest=9, latest=9, train=9), ("train", "val"), 3)]
LAYOUTS += [({"train-2023T1Z/train/x": 2, "test-2024T2Z/test/x": 1}, ("train", "test"), 1)]
LAYOUTS += [(dict(train_val__x=2, test__x=1), ("train", "test"), 1)]
LAYOUTS += [({"train": 9, "test strip": 9, "test tube": 9}, ("train", "val"), 3)]
LAYOUTS += [(dict(train__x=2, validate__x=1), ("train", "val"), 1)]
LAYOUTS += [(dict(a_train__a_train__x=2, a_test__a_test__x=1), ("train", "test"), 1)]
LAYOUTS += [(dict(train__train=2, test1__test1=1), ("train", "test"), 1)]
LAYOUTS += [(dict(train__x=2, holdout__x=1), ("train", "test"), 1)]
LAYOUTS += [({"x/x": 9, "x/x/y": 9}, ("train", "val"), 1)]


@pytest.mark.parametrize("counts, splits, classes", LAYOUTS, ids=str)
def test_folders_named_like_splits_are_splits_beside_others(counts, splits, classes, tmp_path):
    root = folder_of(tmp_path, **counts)
    assert data.dataset_splits("folder", root) == splits
    found = {split: opened(root, split) for split in splits}
    read = sum(len(files) for files, *_ in found.values())
    assert read == sum(counts.values()) - counts.get("more", 0)
    assert len(found["train"][2]["class"]) == classes


REFUSED = [(dict(train__x=1, val__x=1, valid__x=1), "val and valid are both for val")]
REFUSED += [(dict(val__x=1, test__x=1), "no folder train")]
REFUSED += [(dict(trainA=1, trainB=1, testA=1, testB=1), "testA and testB are both for test")]
REFUSED += [(dict(train_a__x=1, train_b__x=1, test__x=1), "train_a and train_b are both for")]
REFUSED += [(dict(a__train__x=1, a__val__x=1), "the splits are in .*: --root=.*/a$")]
REFUSED += [({"day/train": 1, "day/val": 1, "night/train": 1}, "--root=.*/day$")]
REFUSED += [(dict(a__train=1, a__val=1, b__train=1, b__val=1), "a and b have splits of")]
REFUSED += [(dict(a=9, b=9, flowers__a=9, flowers__b=9), "flowers holds a, b again")]
REFUSED += [(dict(a=9, b=9, val__a=3, test__a=3), "holds a again.* name the splits")]
REFUSED += [({".": 20, "thumbs": 3}, "20 images lie beside the folders thumbs")]
REFUSED += [(dict(a__b__train__x=1, a__b__val__x=1), "the splits are in .*: --root=.*/a/b$")]
REFUSED += [
    (
        dict(a__a__train=1, a__a__val=1, b__train=1, b__val=1),
        "a/a and b have splits of.* as train/a,",
    )
]
REFUSED += [
    (dict(a__train=1, a__val=1, a__a__train=1, a__a__val=1), "the splits are in .*: --root=.*/a$")
]
REFUSED += [(dict(train__x=1, val__val=1), "no sub-folders; it needs those of .*train")]
REFUSED += [(dict(train__x=1, val=1), "no sub-folders; it needs those of .*train")]
REFUSED += [(dict(train__x=1, val__y=1), "y: a class that .*train does not have")]


@pytest.mark.parametrize("counts, hint", REFUSED)
def test_folders_that_can_be_read_in_no_or_two_ways_are_refused(counts, hint, tmp_path):
    raises(UserError, hint, opened, folder_of(tmp_path, **counts), "val")


ODD_CLASSES = [(dict(images=9, masks=9), "masks is read as a class; if it holds masks")]
ODD_CLASSES += [(dict(JPEGImages=9, SegmentationClass=3), "SegmentationClass is read as a class")]
ODD_CLASSES += [(dict(images=9, labels=9), "labels is read as a class")]
ODD_CLASSES += [(dict(a=9, b__a=9), "b holds a again, classes beside it")]
ODD_CLASSES += [
    (dict(a__a=5, a__b=5, b__a=5, b__b=5), "a, b, with the folders a, b in them; .* name splits")
]
ODD_CLASSES += [(dict(cats__s0=9, cats__s1=9), "its classes are the folders in")]
ODD_CLASSES += [
    (dict(x__x__a=5, x__x__b=5, y__a=5, y__b=5), "x, y, with .* a, b in them; if .*/x/x ")
]
ODD_CLASSES += [
    ({"z1/d/a": 9, "z1/d/b": 9, "z2/d/a": 5, "z2/d/b": 5, "z2/d/c": 5}, "z1, z2, with .* a, b in")
]
ODD_CLASSES += [(dict(Cat=9, cat=9), "'Cat' and 'cat' are different classes")]
ODD_CLASSES += [(dict(train__a=9, train__b=9, docs=3), "train is read as one class, not as a")]
ODD_CLASSES += [(dict(train_val=9, test=9), "train_val is read as one class, not as a split")]
ODD_CLASSES += [(dict(NA=9, b=9), "NA is read as a class; leave the cell of")]


@pytest.mark.parametrize("counts, hint", ODD_CLASSES)
def test_folders_that_are_hardly_classes_are_named(counts, hint, tmp_path, capsys):
    opened(folder_of(tmp_path, **counts))
    assert re.search(hint, capsys.readouterr().err)


def test_names_of_a_windows_zip_are_named(tmp_path, capsys):
    for i in range(3):
        write_image(tmp_path / f"data\\cat\\{i}.png")
    opened(tmp_path)
    assert "3 names have backslashes, as data\\cat\\0.png" in capsys.readouterr().err


def test_a_split_of_its_own_is_the_same_from_a_folder_above(tmp_path):
    folder_of(tmp_path / "above", cats__a=9, cats__b=9)
    (tmp_path / "above" / "README.md").touch()
    ours, above = (data.image_folder("val", tmp_path / root)[0] for root in ("above/cats", "above"))
    assert ours == above


def test_a_folder_to_train_on_alone_is_checked_and_not_evaluated(untrained, capsys):
    photo_tree(untrained / "photos" / "train", 2, 15)
    write_image(untrained / "photos" / "more.heic.txt")
    for _ in range(2):  # from Python every call warns again
        data.check("folder", "photos")
        out, err = capsys.readouterr()
        assert "| train | 2 | - | 30 |" in out
        assert "left out: 1 files" in err
    err = refused(capsys, eval, "knn --data=folder --root=photos")
    assert "evaluations need val or test too" in err
    train = f"train moco color folder --root=photos --epochs=1 --batch=16 --out=alone {TINY}"
    assert "has no images for val or test" in printed(capsys, loo, train).err


def test_pages_beyond_the_first_are_named(tmp_path, capsys):
    pages = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    assert data.central_crops([tmp_path / "x.tif"], 8)[0].mean((1, 2)).tolist() == [1, 0, 0]
    assert "x.tif has several pages or frames" in capsys.readouterr().err


def test_folders_of_other_files_are_no_classes(tmp_path, capsys):
    folder_of(tmp_path, train__images=3, val__images=2)
    for split in ("train", "val"):
        (tmp_path / split / "labels").mkdir()
        (tmp_path / split / "labels" / "0.txt").touch()
    assert opened(tmp_path)[2] == {"class": ["images"]}
    assert len(opened(tmp_path, "val")[0]) == 2
    assert "left out: 1 files (1 .txt), the first is" in capsys.readouterr().err
    (tmp_path / "train" / "empty").mkdir()
    raises(UserError, "empty: no images; put some there", opened, tmp_path)


def test_only_files_are_images_and_links_are_followed(tmp_path, capsys):
    root = folder_of(tmp_path / "x", a=9, __MACOSX=1, a__album_jpg=1)
    folder_of(root / "a", **{"@eaDir": 2, ".hidden": 1})
    (root / "a" / "album_jpg").rename(root / "a" / "album.jpg")
    folder_of(tmp_path, other__deep=1)
    (root / "a" / "link").symlink_to(tmp_path / "other")
    (root / "a" / "loop").symlink_to(root)
    os.mkfifo(root / "a" / "fifo.jpg")
    write_image(root / "a" / "y.jfif")
    (root / "a" / "z.heic").write_bytes(b"")
    (root / "a" / "Thumbs.db").write_bytes(b"")
    files = opened(root)[0] + opened(root, "val")[0]
    seldom = {"a/album.jpg/0.png", "a/link/deep/0.png", "a/y.jfif"}
    assert set(files) == seldom | {f"a/{i}.png" for i in range(9)}
    assert len(files) == 12
    named = f"left out: 2 files (1 .jpg, 1 .heic), the first is {root / 'a' / 'fifo.jpg'}"
    assert capsys.readouterr().err.count(named) == 1


def test_every_suffix_that_pillow_reads_is_an_image():
    assert {".jpe", ".avif", ".jp2", ".tga", ".mpo", ".webp"} <= data.SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".wmf"} & data.SUFFIXES
    assert not set(data.FORMATS) & data.NOT_IMAGES


def write_table(root, *lines, images="abcd", encoding="utf-8"):
    """A folder of flat images and its labels.csv."""
    for color, name in enumerate(images):
        write_image(root / f"{name}.png", (color * 60, 0, 0))
    text = "\n".join(lines)
    (root / "labels.csv").write_text(text, encoding, errors="surrogateescape")
    return root


def opened(root, split="train", name="folder"):
    """-> the names of the files, {label: (n,) as a list}, classes."""
    found = data.open_dataset(name, split, root=root)
    files = [path.relative_to(root).as_posix() for path in found.images.source]
    return files, {label: y.tolist() for label, y in found.labels.items()}, found.classes


def test_a_table_gives_several_labels(tmp_path):
    rows = "a.png,Train,x,", "b.png,test,y,1", "c.png,,x,2"
    files, labels, classes = opened(write_table(tmp_path, "file,split,kind,tone", *rows))
    assert files == ["a.png", "c.png", "d.png"]  # d is not listed: it is for training
    assert labels["kind"] == [0, 0, -1]
    assert labels["tone"] == [-1, 1, -1]
    assert classes == {"class": [], "kind": ["x", "y"], "tone": ["1", "2"]}
    # A class has the same number in every split.
    assert opened(tmp_path, "test")[:2] == (["b.png"], {"class": [-1], "kind": [1], "tone": [0]})
    assert data.dataset_splits("folder", tmp_path) == ("train", "test")
    write_table(tmp_path, "file,split", "a.png,train", images="")
    assert data.dataset_splits("folder", tmp_path) == ("train",)


def test_columns_that_are_hardly_labels_are_named(tmp_path, capsys):
    kinds, sizes = ("True", "TRUE", "Unlabeled"), ("1", "1.0", "2")
    rows = [f"{i}.png,{i},{kinds[i % 3]},{sizes[i % 3]}" for i in range(101)]
    write_table(tmp_path, "file,id,kind,size", *rows, images=map(str, range(101)))
    assert data.label_names(opened(tmp_path)[2]) == ["kind", "size"]
    err = capsys.readouterr().err
    assert "column id is no label and left out: 101 different values" in err
    assert "column kind: Unlabeled is read as a class; leave the cell of" in err
    assert "column kind: 'TRUE' and 'True' are different classes" in err
    assert "column size: '1' and '1.0' are different classes" in err


@pytest.mark.parametrize("first", ["", "sep=SEPARATOR\r\n"])
@pytest.mark.parametrize("separator", ";\t,|")
def test_tables_of_spreadsheets_are_read(separator, first, tmp_path):
    lines = "file , kind,", "", ".\\a.png, x,", ",,", '"./b.png","y",,'
    text = first.replace("SEPARATOR", separator)
    text += "\r\n".join(lines).replace(",", separator)
    write_table(tmp_path, text, images="ab", encoding="utf-8-sig")
    columns, table = data.read_table(tmp_path)
    assert columns == ["file", "kind", ""]
    assert [table[file]["kind"] for file in ("a.png", "b.png")] == ["x", "y"]
    other = ";" if separator == "," else ","
    write_table(tmp_path, f'file{separator}"a{other} b{other}"', f"a.png{separator}x", images="")
    assert data.read_table(tmp_path)[0] == ["file", f"a{other} b{other}"]


def test_tables_know_files_by_any_path_and_accent_and_columns_in_capitals(tmp_path, capsys):
    folder = os.path.relpath(tmp_path)  # from where python runs
    rows = f"{tmp_path}/a.png,1,train", f"{folder}/b.png,2,PublicTest"
    write_table(tmp_path, "File,Kind,SPLIT", *rows, images="ab")
    assert data.read_table(tmp_path)[0] == ["file", "Kind", "split"]
    assert opened(tmp_path, "test")[:2] == (["b.png"], {"class": [-1], "Kind": [1]})
    tree = folder_of(tmp_path / "tree", x=2, y__z=1)
    write_table(tree, "file,kind", "z/0.png,0", "1,1", "q/../y/z/0,2", images="")
    raises(UserError, "line 2: z/0.png: no such image .* such as x/0.png", data.read_table, tree)
    write_table(tree, "file,kind", "0,1", images="")
    says = "line 2: 0: 2 images have this name; write a path, as x/0.png"
    raises(UserError, says, data.read_table, tree)
    write_table(tree, "file,kind", "1,1", "q/../y/z/0,2", images="")
    found = data.read_table(tree)[1]
    by_name = "2 files are found by their names alone, the first is 1 as x/1"
    assert by_name in capsys.readouterr().err
    assert [row.get("kind") for row in found.values()] == [None, "1", "2"]
    decomposed, composed = "cafe\u0301", "caf\u00e9"  # as macOS has it, and as others
    for name, listed in ((decomposed, composed), (composed, decomposed)):
        root = write_table(tmp_path / name, "file,kind", f"{listed}.png,x", images=[name])
        assert data.read_table(root)[1][f"{name}.png"]["kind"] == "x"


def test_a_table_that_cannot_be_read_is_not_overlooked(tmp_path):
    folder_of(tmp_path, a=9, b=9)
    (tmp_path / "labels.csv").symlink_to(tmp_path / "not fetched")
    raises(UserError, "labels.csv is a broken link", opened, tmp_path)


def test_images_named_as_masks_of_others_are_counted(tmp_path, capsys):
    for name in ("1.png", "1_mask.png", "2.png", "2_mask_1.png", "3 gt.png", "label.png"):
        write_image(tmp_path / "a" / name)
    opened(tmp_path)
    named = f"2 images are named as masks of others, the first is {tmp_path}/a/1_mask"
    assert named in capsys.readouterr().err


def test_few_groups_leave_one_to_test_on(tmp_path):
    for seed in range(20):
        for n in (2, 3, 5):
            assert set(data.hashed_splits(map(str, range(n)), seed).values()) == {"train", "val"}
    many = data.hashed_splits(map(str, range(10_000)), 0)
    assert 0.78 < sum(split == "train" for split in many.values()) / len(many) < 0.82


def test_training_says_what_evaluations_would_refuse(tmp_path):
    tree = folder_of(tmp_path / "tree", train__x=9, test=3)
    (said,) = loo.unfit_splits(dict(data="folder", root=tree, split_seed=0))
    assert "test: no sub-folders; it needs those of" in said
    rows = "a.png,train,x,1", "b.png,train,y,2", "c.png,test,x,"
    table = write_table(tmp_path / "table", "file,split,kind,tone", *rows, images="abc")
    (said,) = loo.unfit_splits(dict(data="folder", root=table, split_seed=0))
    assert said == "no test image has the label tone, which evaluations need"


@pytest.mark.parametrize("above", ["", "data/"])
def test_a_table_beside_class_folders_adds_labels(above, tmp_path):
    folder_of(tmp_path, **{f"{above}x0": 10, f"{above}x1": 10})
    listed = [f"{above}x{c}/{i}.png" for c, i in itertools.product(range(2), range(8))]
    rows = [f"{file},{int(Path(file).stem) % 2}" for file in listed]
    write_table(tmp_path, "file,odd", *rows, images="")
    files, labels, classes = opened(tmp_path)
    assert classes == {"class": ["x0", "x1"], "odd": ["0", "1"]}
    assert labels["class"] == [int(Path(file).parent.name[1]) for file in files]
    assert data.dataset_splits("folder", tmp_path) == ("train", "val")
    others = opened(tmp_path, "val")[0]
    assert len(set(files + others)) == len(files + others) == 20
    # The split of a listed image is what it was without a table.
    kept = {str(p.relative_to(tmp_path)) for p in data.image_folder("val", tmp_path)[0]}
    assert set(others) == kept & set(listed)


@pytest.mark.parametrize("above", ["", "images/"])
def test_a_table_beside_train_and_val_keeps_their_splits(above, tmp_path):
    x, y, val = (f"{above}{name}/0.png" for name in ("train/x", "train/y", "val/x"))
    for file in (x, y, val):
        write_image(tmp_path / file)
    write_table(tmp_path, "file,kind", f"{x},1", f"{val},2", images="")
    labels, classes = {"class": [0], "kind": [1]}, {"class": ["x", "y"], "kind": ["1", "2"]}
    assert opened(tmp_path, "val") == ([val], labels, classes)
    assert data.dataset_splits("folder", tmp_path) == ("train", "val")
    write_table(tmp_path, "file,split", f"{x},", f"{y},val", images="")
    assert opened(tmp_path, "val")[0] == [y, val]
    # All of it is read.
    raises(UserError, "choose one outside", data.forbid_inside, tmp_path / "runs", tmp_path)


def test_groups_stay_on_one_side(tmp_path, capsys):
    groups = {f"x{i}.png": f"g{i // 4}" for i in range(40)}
    lines = [f"{file},{group}" for file, group in groups.items()]
    write_table(tmp_path, "file,group", *lines, images=[file[:-4] for file in groups])
    sides = [{groups[file] for file in opened(tmp_path, split)[0]} for split in ("train", "val")]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert "group" not in opened(tmp_path)[2]
    err = capsys.readouterr().err
    assert re.search(r"\d+ images for val are of \d groups; intervals treat them", err)
    lines = ["file,split,group", "x0.png,train,g", "x1.png,test,g", "x2.png,train,h"]
    lines += ["x3.png,train,NA", "x4.png,test,NA"]  # of no group
    write_table(tmp_path, *lines, images="")
    opened(tmp_path), opened(tmp_path, "test")
    unlisted, torn = capsys.readouterr().err.splitlines()
    assert (
        "35 of 40 images are not listed, no label but their folder's, the first is x1" in unlisted
    )
    assert torn == "warning: 1 groups in labels.csv are in several splits, the first is g"


BAD_TABLES = [("name,kind", "line 1: expected a column file, found name, kind")]
BAD_TABLES += [("", "line 1: expected a column file, found none")]
BAD_TABLES += [("file,kind,kind", "line 1: two columns are named kind")]
BAD_TABLES += [("file,rotation", "line 1: evaluations use the name rotation")]
BAD_TABLES += [("file,kind\n\na.png,1,2", "line 3: 3 cells, the header has 2")]
BAD_TABLES += [("file,kind\na.png", "line 2: 1 cells, the header has 2")]
BAD_TABLES += [("file,kind\na.png,1\n./a.png,2", "line 3: a.png is listed twice")]
BAD_TABLES += [
    ("file,Usage\na.png,Training\nb.png,PublicTest", "Usage names splits: call it split")
]
BAD_TABLES += [("file,split\na.png,trian", "line 2: split trian: expected train")]
LOST = "line 3: x.png: no such image in .*; 2 files .* such as a.png"
BAD_TABLES += [("file\na.png\nx.png\nlabels.csv", LOST)]
BAD_TABLES += [("file,split\na.png,test\nb.png,test", "no images for train")]
BAD_TABLES += [("file,kind\na.png,caf\udce9", "UTF-8")]  # in Latin-1
BAD_TABLES += [('file,kind\na.png,"x\nb.png,"y', "expected after|unexpected end")]
BAD_TABLES += [('file\n"' + "x" * 200_000, "line 2: unexpected end of data; save it as CSV")]
BAD_TABLES += [("file,kind\n,x", "line 2: no file is named")]


@pytest.mark.parametrize("text, hint", BAD_TABLES, ids=[hint for _, hint in BAD_TABLES])
def test_bad_tables_are_named_by_line(text, hint, tmp_path):
    raises(UserError, hint, opened, write_table(tmp_path, *text.split("\n"), images="ab"))


def test_cifar10_in_its_published_layout(tmp_path, monkeypatch):
    root, pixels = tmp_path / "cifar-10-batches-py", torch.arange(30720) % 251
    pixels = pixels.view(10, 3, 32, 32).to(torch.uint8)
    root.mkdir()
    batch = {"data": pixels.flatten(1).numpy(), "labels": list(range(10))}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (root / name).write_bytes(pickle.dumps(batch))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    raises(UserError, "--download", load_dataset, "cifar10", "test", root=str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    test = load_dataset("cifar10", "test", root=str(tmp_path))
    assert torch.equal(test.images, pixels)
    assert test.labels["class"].tolist() == list(range(10))
    assert len(load_dataset("cifar10", "pretrain", root=str(tmp_path)).images) == 50


def test_fashion_mnist_in_its_published_layout(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = (torch.arange(10 * 784) % 251).byte().view(10, 1, 28, 28)
    for name in ("train", "t10k"):
        images = struct.pack(">4i", 2051, 10, 28, 28) + pixels.numpy().tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2i", 2049, 10) + bytes(range(10))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    test = load_dataset("fashion_mnist", "test", root=str(tmp_path), size=28)
    assert torch.equal(test.images, pixels.expand(-1, 3, -1, -1))
    assert test.classes["class"][9] == "Ankle boot"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1"])
def test_any_mode_becomes_rgb(mode, tmp_path):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("L", (20, 10), 200).convert(mode).save(path)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert abs(image.getpixel((3, 3))[0] - (255 if mode == "1" else 200)) <= 1


def test_images_of_12_bits_are_named(tmp_path, capsys):
    values, hot = np.arange(256).reshape(16, 16), np.zeros((64, 64))
    hot[0, 0] = 65535  # a pixel of a camera that is always white
    twelve = np.arange(4096).reshape(64, 64)
    cases = [(values << 8, "x.png", 0), (values << 4, "x.png", 1), (hot, "x.png", 1)]
    cases += [(32768 + values, "x.png", 1)]  # of a tomograph, whose values are signed
    for image, name, said in (*cases, (twelve, "x.jp2", 1)):
        data.WARNED.clear()
        Image.fromarray(image.astype(np.uint16)).save(tmp_path / name)
        read_image(tmp_path / name)
        assert capsys.readouterr().err.count("16-bit images keep few of 256 gray levels") == said


def test_a_transparent_value_of_two_bits_is_white(tmp_path):
    content = b"\x89PNG\r\n\x1a\n"
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0), b"tRNS": b"\0\1"}
    for name, chunk in (chunks | {b"IDAT": zlib.compress(b"\0\x1b"), b"IEND": b""}).items():
        check = zlib.crc32(name + chunk)
        content += struct.pack(">I", len(chunk)) + name + chunk + struct.pack(">I", check)
    (tmp_path / "x.png").write_bytes(content)
    image = read_image(tmp_path / "x.png")
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 255, 170, 255]


RAMP = np.arange(256).reshape(16, 16, 1)
RAMP_16 = Image.fromarray((RAMP[..., 0] << 8).astype(np.uint16))
WITHOUT_20 = np.where(RAMP == 20, 255, RAMP)
TURNED, TO_THE_RIGHT = Image.fromarray(RAMP[..., 0].astype(np.uint8)), Image.Exif()
TO_THE_RIGHT[0x0112] = 6  # is to be shown a quarter turn to the right
# A file, what is saved there and how, and the pixels that are read.
ODD_FILES = [("bad_exif.png", Image.new("RGB", (8, 8), GREEN), {"exif": b"garbage" * 9}, GREEN)]
ODD_FILES += [("white_zero.tif", Image.new("I;16", (8, 8), 200 << 8), {"tiffinfo": {262: 0}}, 55)]
ODD_FILES += [("turned.png", TURNED, {"exif": TO_THE_RIGHT}, np.rot90(RAMP, -1))]
ODD_FILES += [("alpha_0.tga", Image.new("RGBA", (8, 8), (*GREEN, 0)), {}, GREEN)]
ODD_FILES += [("20_is_transparent.png", RAMP_16, {"transparency": 20 << 8}, WITHOUT_20)]


@pytest.mark.parametrize("name, image, options, pixels", ODD_FILES)
def test_odd_files_are_read_as_they_are_meant(name, image, options, pixels, tmp_path):
    image.save(tmp_path / name, **options)
    assert (np.asarray(read_image(tmp_path / name)) == pixels).all()


def test_images_with_too_many_pixels_are_named_or_reduced(here, monkeypatch):
    monkeypatch.setenv("LOOC_MEGAPIXELS", "1")
    big = folder_of(here / "photos", train__a=9) / "train" / "a" / "big.png"
    Image.new("1", (1500, 1000)).save(big)
    raises(UserError, "big.png: 2 megapixels, more than 1: --megapixels=2 reads", read_image, big)
    Image.new("RGB", (1500, 1000)).save(here / "x.jpg")
    assert read_image(here / "x.jpg").size == (750, 500)
    dataset = data.open_dataset("folder", "train", root=here / "photos")
    assert len(data.decode_all(dataset, 0, here, shared=True).unreadable) == 1
    run(data, "check --data=folder --root=photos --megapixels 2")
    assert read_image(big).size == (1500, 1000)
    assert not len(data.decode_all(dataset, 0, here, shared=True).unreadable)
    monkeypatch.setenv("LOOC_MEGAPIXELS", "abc")
    raises(UserError, "LOOC_MEGAPIXELS=abc: expected 1 or more", data.central_crops, [big], 8)


def test_files_that_are_no_image_of_known_channels_are_refused_by_what_they_are(tmp_path):
    path = tmp_path / "x.tif"
    for mode, kind in (("F", "floating point"), ("I", "signed")):
        Image.new(mode, (8, 8)).save(path)
        raises(UserError, f"x.tif: {kind} .*8 or 16 bits", read_image, path)
    Image.new("I;16", (8, 8)).save(path, tiffinfo={339: 2})
    raises(UserError, "signed", read_image, path)
    Image.new("I;16", (8, 8)).save(path, tiffinfo={284: 2})
    raises(UserError, "one channel after the other", read_image, path)
    deep = {277: 3, 284: 2, 258: (16, 16, 16)}
    raises(ValueError, "one channel after the other", data.check_tiff, deep, 3)
    Image.new("RGB", (8, 8)).save(path)
    tag = struct.pack("<HHI", 277, 3, 1)  # samples per pixel
    head, tail = path.read_bytes().split(tag)
    for channels in (2, 5, 13):
        path.write_bytes(head + tag + struct.pack("<H", channels) + tail[2:])
        raises(UserError, f"x.tif: {channels} channels, expected gray or RGB", read_image, path)
    Image.new("RGBA", (8, 8)).save(path)
    transparency = struct.pack("<H", 338)  # the tag that says what the fourth channel is
    path.write_bytes(path.read_bytes().replace(transparency, struct.pack("<H", 65000)))
    raises(UserError, "x.tif: 4 channels, expected gray or RGB", read_image, path)
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    raises(UserError, "x.tif: no image that Pillow can read; save it as", read_image, path)
    texts = {
        "": "an empty file",
        "version https://git-lfs": "`git lfs pull`",
        "\n<html>": "a web page",
    }
    for text, says in texts.items():
        path.write_text(text)
        raises(UserError, f"x.tif: .*{says}", read_image, path)
    cards = dict(SIMPLE="T", BITPIX=16, NAXIS=2, NAXIS1=8, NAXIS2=8)
    header = "".join(f"{key:8}= {value:<70}" for key, value in cards.items()) + "END"
    header = header.ljust(2880)
    path.write_bytes(header.encode() + bytes(2880))  # FITS, which Pillow reads without its BZERO
    raises(UserError, "x.tif: signed pixels have no known white", read_image, path)
    path.unlink()
    os.mkfifo(path)  # which must not hang
    raises(UserError, "not a file", read_image, path)


def test_names_in_latin_1_and_broken_links_are_read_and_named(here, capsys):
    root, out = photo_tree(here / "caf\udce9", 2), "o\udce9"
    (root / "class0").rename(root / "class\udce9")
    (root / "class\udce9" / "no\udceb.png").symlink_to("nowhere")
    train = f"train --data=folder --root={root} --out={out} --cache=none --batch=8 --splits=1"
    said = printed(capsys, loo, f"{train} --epochs=1 {TINY}")
    assert r"o\udce9: backbone.pt" in said.out
    assert "% of the images are longer than 2:1" in said.err
    raises(SystemExit, "^2$", run, data, f"check --data=folder --root={root} --sample=all")
    assert re.findall("warning: unreadable: .*: No such file", capsys.readouterr().err)


@pytest.mark.parametrize("w, h", [(64, 64), (96, 64), (64, 128)])
def test_evaluations_see_the_central_crop(w, h, tmp_path):
    """Resize the short side to 32, cut out the middle 28: as everyone does."""
    image = TF.to_pil_image(smooth(h, w, seed=w)[0])
    image.save(tmp_path / "x.png")
    want = TF.center_crop(TF.resize(image, 32, TF.InterpolationMode.BICUBIC), 28)
    files = data.open_dataset("folder", "train", root=tmp_path, size=28, central=True).images
    crop, aspect, _ = files[0]
    assert (crop.shape, aspect) == ((3, 28, 28), 1)
    assert (crop - TF.pil_to_tensor(want).float()).abs().mean() < 1


@pytest.mark.parametrize("w, h", [(64, 40), (20, 31), (3, 200), (40, 40)])
def test_training_sees_the_whole_image_as_pillow_squashes_it(w, h, tmp_path):
    """torch resizes, since it is faster: the pixels are Pillow's but for rounding."""
    image = TF.to_pil_image(smooth(h, w, seed=w)[0])
    image.save(tmp_path / "x.png")
    files = data.open_dataset("folder", "train", root=tmp_path, size=32, canvas=40).images
    canvas, aspect, _ = files[0]
    want = TF.pil_to_tensor(image.resize((40, 40), Image.Resampling.BICUBIC))
    assert (canvas.dtype, aspect) == (torch.uint8, w / h)
    assert (canvas.int() - want.int()).abs().max() <= 5


def test_a_stream_leaves_out_what_cannot_be_read(tmp_path, capsys):
    folder = folder_of(tmp_path, train__a=7) / "train" / "a"
    for i in (1, 4):
        (folder / f"{i}.png").write_bytes(b"broken")
    dataset = data.open_dataset("folder", "train", root=tmp_path)
    rows, images, aspect = (torch.cat(x) for x in zip(*data.iter_batches(dataset, batch=3)))
    assert rows.tolist() == [0, 2, 3, 5, 6]
    assert len(aspect) == 5
    assert images[:, 0, 9, 9].tolist() == [0, 60, 90, 150, 180]
    assert not list(data.iter_batches(dataset, batch=1, part=(1, 7)))  # another process has more
    raises(UserError, "none of the 7 images can be read", eval.readable_rows, torch.zeros(7))
    raises(UserError, "2 of 7 images cannot be read", data.decode_all, dataset)  # and more than 1%
    (folder / "4.png").unlink()
    raises(UserError, "2 of 7 images cannot be read", data.decode_all, dataset, cache=tmp_path)
    write_image(folder / "4.png", (120, 0, 0))
    decoded = data.decode_all(data.open_dataset("folder", "train", root=tmp_path))
    assert len(decoded.unreadable) == 1
    assert decoded.images[:, 0, 9, 9].tolist() == [0, 60, 90, 120, 150, 180]
    for _ in range(2):
        capsys.readouterr()
        data.decode_cached(data.open_dataset("folder", "train", root=tmp_path), 0, tmp_path, True)
    assert "1 of the 7 images could not be read when decoded" in capsys.readouterr().err


def test_every_core_decodes_unless_processes_share_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert data.decoding_workers(None, 99) == 12  # rank 0 alone
    assert data.decoding_workers(None, 99, 8) == 3  # 8 on two machines
    assert data.decoding_workers(None, 2) == 2
    assert [data.decoding_workers(asked, 99) for asked in (0, 40)] == [0, 40]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "")
    assert data.decoding_workers(None, 3) >= 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    raises(UserError, "LOCAL_WORLD_SIZE=0: expected 1 or more", data.decoding_workers, None, 3)
    asked = []
    monkeypatch.setattr(data, "decoding_workers", lambda *given: asked.append(given) or 0)
    files = data.ImageFiles(range(600), lambda *_: Image.new("RGB", (1, 1)), 1)
    assert len(list(data.iter_batches(data.ImageSet(files, None, {}, {}), part=(1, 2)))) == 1
    list(data.iter_batches(data.ImageSet(files, None, {}, {}), batch=200, part=(0, 2)))
    assert asked == [(None, 2, 2)]


def test_decoded_images_are_kept_until_a_file_changes(tmp_path, capsys):
    """Also of a copy elsewhere or behind a link, whatever its times: the cache's map stays one."""

    def load(root, **options):
        return load_dataset("folder", "pretrain", root=tmp_path / root, **options)

    for c, i in itertools.product("ab", range(4)):
        write_image(tmp_path / "one" / c / f"{i}.bmp", (30 * i, 0, 0))
    (tmp_path / "one" / "labels.csv").write_text("file\n")  # all are for training
    cached = dict(cache=tmp_path / "cache", shared=True)
    plain, first = load("one"), load("one", **cached)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "link").symlink_to("one")
    with unittest.mock.patch.object(data, "decode_into", None):  # not again
        others = [plain, *(load(root, **cached) for root in ("one", "two", "link"))]
    for other in others:
        assert other.held == first.held
        assert torch.equal(first.images, other.images)
        assert torch.equal(first.aspect, other.aspect)
    changed = tmp_path / "two" / "b" / "3.bmp"
    write_image(changed, (120, 0, 0))  # of the same size
    os.utime(changed, (1, 1))
    assert (load("two", **cached).images != plain.images).any()
    assert len(list((tmp_path / "cache").glob("*.canvases"))) == 1
    changed.unlink()
    assert load("two", **cached).held != first.held
    (tmp_path / "file").touch()  # where no map can be written
    assert torch.equal(load("one", cache=tmp_path / "file", shared=True).images, plain.images)
    assert "; decoding into memory" in capsys.readouterr().err


def test_factors_are_drawn_again_alike_and_splits_are_disjoint():
    a, b = data.factors("val", 32, 64), data.factors("val", 32, 64)
    assert torch.equal(a.images, b.images)
    assert (a.images.dtype, a.images.shape) == (torch.uint8, (64, 3, 32, 32))
    assert not torch.equal(a.images, data.factors("test", 32, 64).images)
    assert torch.equal(a.labels["species"], a.labels["object"] * data.HUES + a.labels["hue"])
    assert all(len(a.classes[name]) > label.max() for name, label in a.labels.items())
    assert len(data.OBJECTS) >= 10
    assert 1 / data.HUES < 0.1  # closer than color jitter moves them


def test_viewpoint_is_tilted_and_on_colored_grounds():
    """Measured: the chroma of the corners, and how far images are from their mirror images."""
    assert data.dataset_splits("factors") == ("train", "val", "test")
    chroma, lopsided = [], []
    for split in ("test", "viewpoint"):
        images = data.factors(split, 32, 512).images.float() / 255
        chroma.append((images.amax(1) - images.amin(1))[:, :2, :2].mean())
        centered = images - images.mean((2, 3), keepdim=True)
        apart = (centered - centered.flip(3)).square().mean()
        lopsided.append(apart / images.var((2, 3)).mean())
    assert chroma[1] > 1.5 * chroma[0]
    assert lopsided[1] > 1.1 * lopsided[0]


def test_factors_objects_know_up_and_not_left():
    """Outlines, drawn plainly: a flip leaves each as it is, a quarter turn does not."""
    n = len(data.OBJECTS)
    zero = ["fill_angle", "fill_depth", "hue", "tilt", "light", "relief", "horizon", "haze"]
    look = dict.fromkeys(zero, torch.zeros(n))
    look |= dict.fromkeys(["fill_period", "saturation", "value"], torch.ones(n))
    look |= dict.fromkeys(["fill_shift", "center"], torch.zeros(n, 2))
    look |= dict(fill=torch.zeros(n, dtype=torch.long), scale=torch.full((n,), 0.9))
    look |= dict(marks=torch.zeros(n, 4, 4) - 9, ground=torch.zeros(n, 3))
    look["strokes"] = torch.tensor([(strokes * 4)[:4] for strokes in data.OBJECTS.values()])
    images = data.render(look, 64, make_generator(0)).float()[:, 0]
    moved = [images.flip(2), *(images.rot90(turns, (1, 2)) for turns in (1, 2, 3))]
    flipped, *turned = [(images - x).abs().mean((1, 2)) / images.mean((1, 2)) for x in moved]
    assert flipped.max() < 0.1
    assert torch.cat(turned).min() > 0.3


# ---------------------------------------------------------------- data.py: published data sets


def write_mat(path, content):
    """A MATLAB 5 file. The data sets that have them need scipy, which is no requirement."""
    savemat = pytest.importorskip("scipy.io").savemat
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, content, do_compression=True)


def test_mat_files_without_scipy_are_refused_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    raises(UserError, "x.mat: .* pip install scipy", data.read_mat, tmp_path / "x.mat")


@pytest.fixture
def few(monkeypatch):
    """Published counts that are small enough to write: 15 classes, of them 13 in ObjectNet."""
    wnids = sorted([*data.OBJECTNET13.values(), "n02869837", "n01749939"])
    counts = dict(inat2019={"train": (3, 6), "val": (3, 3)}, objectnet13={"test": (13, None)})
    counts["imagenet100"] = {"train": (15, 60), "val": (15, 15)}
    counts["imagenetc100"] = dict.fromkeys(data.DATASETS["imagenetc100"].splits, (15, 15))
    counts["cub200"] = {"train": (3, 6), "test": (3, 3)}
    counts["flowers102"] = {"train": (3, 3), "val": (3, 3), "test": (3, 6)}
    monkeypatch.setattr(data, "IMAGENET100", wnids)
    flowers = torchvision.datasets.Flowers102
    # Before torchvision 0.22 it has none.
    monkeypatch.setattr(flowers, "classes", ["rose", "daisy", "pansy"], raising=False)
    for name, splits in counts.items():
        monkeypatch.setitem(data.DATASETS, name, data.DATASETS[name]._replace(splits=splits))
    return wnids


def label_of_path(name, split, root):
    """-> {path below root: label}"""
    files, labels, _ = opened(root, split, name)
    return dict(zip(files, labels["class"]))


def imagenet_tree(root, wnids, layout="folders"):
    """-> the class of each image of val. One of the other 900 is there too; a devkit's order."""
    order = ["n09999999", *random.Random(0).sample(wnids, len(wnids))]
    names = [f"ILSVRC2012_val_{i:08d}" for i in range(1, len(order) + 1)]
    for wnid, name in zip(order, names):
        for i in range(4):
            write_image(root / "train" / wnid / f"{wnid}_{i}.JPEG")
        write_image(root / "val" / (wnid if layout == "folders" else ".") / f"{name}.JPEG")
    if layout == "devkit":
        kit, ids = root / "ILSVRC2012_devkit_t12" / "data", range(899, 899 - len(order), -1)
        synsets = np.array([*zip(ids, order)], [("ILSVRC2012_ID", "f8"), ("WNID", "O")])
        write_mat(kit / "meta.mat", {"synsets": synsets})
        (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, ids)))
    if layout == "kaggle":
        (root / "ILSVRC/Data/CLS-LOC").mkdir(parents=True)
        for split in ("train", "val"):
            (root / split).rename(root / "ILSVRC/Data/CLS-LOC" / split)
        rows = [f"{n},{wnid} 85 1 499 272 {wnid} 3 3 9 9 " for n, wnid in zip(names, order)]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    return order


@pytest.mark.parametrize("layout", ["folders", "devkit", "kaggle"])
def test_imagenet100_layouts(layout, few, tmp_path):
    order = imagenet_tree(tmp_path, few, layout)
    train = label_of_path("imagenet100", "pretrain", tmp_path)
    assert len(train) == 60
    assert all(few[label] == path.split("/")[-2] for path, label in train.items())
    val = label_of_path("imagenet100", "val", tmp_path)
    assert len(val) == 15
    assert all(few[label] == order[int(path[-13:-5]) - 1] for path, label in val.items())
    next(tmp_path.rglob(f"{few[3]}_*.JPEG")).unlink()
    raises(UserError, "found 59 images of 15 classes", opened, tmp_path, "train", "imagenet100")


def test_imagenet100_is_the_papers_list():
    assert len(set(data.IMAGENET100)) == 100
    assert sorted(data.IMAGENET100) == data.IMAGENET100
    assert set(data.OBJECTNET13.values()) <= set(data.IMAGENET100)
    assert sum(map(len, data.IMAGENETC.values())) == 15


def test_inat2019_joins_by_id(few, tmp_path):
    """Ids of images, annotations and species in three orders; folders are named misleadingly."""
    categories = [{"id": c, "name": f"species {c}"} for c in (5, 3, 7)]
    for split, count in (("train", 6), ("val", 3)):
        content = dict(images=[], annotations=[], categories=categories)
        for i in range(count):
            name, label = f"train_val2019/Birds/{i % 3}/{split}{i}.jpg", (7, 3, 5)[i % 3]
            write_image(tmp_path / name)
            content["images"].append({"id": 100 + i, "file_name": name})
            row = {"id": 90 - i, "image_id": 100 + i, "category_id": label}
            content["annotations"].insert(0, row)
        (tmp_path / f"{split}2019.json").write_text(json.dumps(content))
    val = {f"train_val2019/Birds/{i}/val{i}.jpg": y for i, y in enumerate((2, 0, 1))}
    assert label_of_path("inat2019", "val", tmp_path) == val
    train = data.open_dataset("inat2019", "train", root=tmp_path)
    assert train.classes["class"] == ["species 3", "species 5", "species 7"]
    (tmp_path / "train_val2019/Birds/1/val1.jpg").unlink()
    with pytest.raises(UserError, match="1 of 3 images are missing, the first is .*val1.jpg"):
        data.open_dataset("inat2019", "val", root=tmp_path)


def cub_tree(root):
    """Nine images of three classes, of them six to train on; ids fall from 9 to 1."""
    top, rows = root / "CUB_200_2011", [(9 - i, i % 3 + 1, int(i < 6)) for i in range(9)]
    for i, c, _ in rows:
        write_image(top / "images" / f"{c:03d}.Bird" / f"{i}.jpg", (60 * c, 10 * i, 0))
    tables = {
        "images": [(i, f"{c:03d}.Bird/{i}.jpg") for i, c, _ in rows],
        "image_class_labels": [(i, c) for i, c, _ in sorted(rows)],
        "train_test_split": [(i, train) for i, _, train in rows[::2] + rows[1::2]],
        "classes": [(c, f"{c:03d}.Bird") for c in (2, 1, 3)],
    }
    for name, lines in tables.items():
        (top / f"{name}.txt").write_text("".join(f"{a} {b}\n" for a, b in lines))
    return root


def test_cub200_joins_by_id_and_counts_from_one(few, tmp_path):
    top = cub_tree(tmp_path) / "CUB_200_2011"
    train, test = (label_of_path("cub200", split, tmp_path) for split in ("train", "test"))
    assert len(train) == 6
    assert {path[-5:]: y for path, y in test.items()} == {"3.jpg": 0, "2.jpg": 1, "1.jpg": 2}
    assert all(int(path.split("/")[-2][:3]) - 1 == y for path, y in (train | test).items())
    dataset = data.open_dataset("cub200", "test", root=top)
    assert dataset.classes["class"] == ["001.Bird", "002.Bird", "003.Bird"]
    # With a broken image, or broken tables, it is no set.
    next((top / "images").rglob("3.jpg")).write_bytes(b"broken")
    raises(UserError, "3.jpg.*download it again", data.decode_all, dataset)
    (top / "image_class_labels.txt").write_text("1 1")
    says = "tables cannot be read as those of cub200"
    raises(UserError, says, opened, tmp_path, "test", "cub200")


def flowers_tree(root):
    folder = root / "flowers-102"
    for i in range(1, 13):
        write_image(folder / "jpg" / f"image_{i:05d}.jpg", (0, 20 * i, 0))
    splits = dict(trnid=[1.0, 5.0, 9.0], valid=[2.0, 6.0, 10.0])
    splits["tstid"] = [12.0, 3.0, 4.0, 7.0, 8.0, 11.0]
    write_mat(folder / "setid.mat", splits)
    write_mat(folder / "imagelabels.mat", {"labels": [1.0 + i // 4 for i in range(12)]})
    return root


def test_flowers102_follows_setid(few, tmp_path):
    flowers_tree(tmp_path)
    want = {"train": {1: 0, 5: 1, 9: 2}, "val": {2: 0, 6: 1, 10: 2}}
    want["test"] = {3: 0, 4: 0, 7: 1, 8: 1, 11: 2, 12: 2}
    for split, labels in want.items():
        by_path = label_of_path("flowers102", split, tmp_path)
        assert {int(path[-9:-4]): label for path, label in by_path.items()} == labels
    table = tmp_path / "flowers-102" / "imagelabels.mat"
    table.write_bytes(table.read_bytes()[:-20])
    says = "imagelabels.mat: no MATLAB file"
    raises(UserError, says, opened, tmp_path, "test", "flowers102")
    table.unlink()
    raises(UserError, "imagelabels.mat", opened, tmp_path, "test", "flowers102")


def test_workers_need_no_shared_memory(tmp_path, monkeypatch):
    """Docker gives 64 MB of it. A worker that is killed is named in a line."""
    no_space = "unable to write to file </torch_1_2_3>: No space left on device (28)"
    full = unittest.mock.Mock(side_effect=RuntimeError(no_space))
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    write_image(tmp_path / "x.png")

    def decode(read):
        files = data.ImageFiles([tmp_path / "x.png"] * 257, read, 8)
        return data.decode_all(data.ImageSet(files, torch.ones(257), {}, {}), 1).images

    assert len(decode(data.read_image)) == 257
    killed = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    raises(UserError, "decoding stopped .*--workers=0", decode, killed)


@pytest.mark.parametrize("above", ["images", "objectnet-1.0/images", "."])
def test_objectnet13_has_no_border_and_imagenets_labels(above, few, tmp_path):
    for name in (*data.OBJECTNET13, "banana"):
        write_image(tmp_path / above / name / f"{name}.png", border=RED)
    dataset = data.open_dataset("objectnet13", "test", root=tmp_path, size=12)
    images = data.decode_all(dataset).images
    assert len(images) == 13
    assert (images - torch.tensor(GREEN)[:, None, None]).abs().max() <= 1
    by_path = label_of_path("objectnet13", "test", tmp_path)
    assert {path.split("/")[-2]: few[y] for path, y in by_path.items()} == data.OBJECTNET13


@pytest.mark.parametrize("category", ["weather", "."])
def test_imagenetc100_layouts(category, few, tmp_path):
    folder = tmp_path / category / "fog" / "3"
    write_image(folder / "n09999999" / "x.JPEG")
    for i, wnid in enumerate(few):
        write_image(folder / wnid / "x.JPEG", (100, 10 * i, 0), side=24)
    dataset = data.open_dataset("imagenetc100", "fog/3", root=tmp_path, size=24)
    assert dataset.labels["class"].tolist() == list(range(15))
    greens = data.decode_all(dataset).images[:, 1, 12, 12]
    assert torch.equal(greens, dataset.labels["class"] * 10)
    raises(UserError, "fog/4", opened, tmp_path, "fog/4", "imagenetc100")


def test_check_counts_and_names_what_is_missing(few, tmp_path, capsys):
    imagenet_tree(tmp_path, few)
    data.check("imagenet100", str(tmp_path))
    assert "| val | 15 | 15 | 15 | 15 | 0 | 15 of 15 |" in capsys.readouterr().out
    (tmp_path / "val" / few[2]).rename(tmp_path / "aside")
    (tmp_path / "train" / few[0] / f"{few[0]}_0.JPEG").write_bytes(b"half a pict")
    with pytest.raises(UserError, match="_0.JPEG.*and 1 more finding.*image-net.org"):
        data.check("imagenet100", str(tmp_path))
    out = capsys.readouterr().out
    assert "| val | 14 | 15 | 14 | 15 | 0 | 14 of 14 |" in out
    assert "| train | 15 | 15 | 60 | 60 | 0 | 59 of 60 |" in out


# ---------------------------------------------------------------- data.py: corruptions

ALIKE = ["defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"]
# As published, some of their severities are no worse than the one before.
NOT_MONOTONE = {"glass_blur", "snow", "frost", "elastic_transform"}


@pytest.mark.parametrize("name", data.CORRUPTIONS)
@pytest.mark.parametrize("side", [32, 64])
def test_a_corruption_keeps_the_contract(name, side):
    images, changes = scenery(side // 4, side), []
    kept = images.clone()
    for severity in range(1, 6):
        worse = data.corrupt(images, name, severity, make_generator(1))
        assert (worse.shape, worse.dtype) == (images.shape, images.dtype)
        assert 0 <= worse.min() <= worse.max() <= 1
        assert_close(worse * 255, (worse * 255).round(), atol=1e-4, rtol=0)
        assert torch.equal(worse, data.corrupt(images, name, severity, make_generator(1)))
        assert torch.equal(images, kept)
        changes.append((worse - images).abs().mean().item())
    assert min(changes) > 0.002
    if side == 64 and name not in NOT_MONOTONE:
        assert changes == sorted(set(changes))
    # Every image has random numbers of its own, where there are any.
    one, other = data.corrupt(images[:1].expand(2, -1, -1, -1), name, 5, make_generator(1))
    assert torch.equal(one, other) == (name in ALIKE)


def test_noise_has_the_published_moments():
    gray = torch.full((4, 3, 128, 128), 0.5)
    added = data.gaussian_noise(gray, make_generator(), 0.08) - 0.5
    assert abs(added.std() - 0.08) < 0.001
    assert abs(added.mean()) < 0.001
    counts = data.shot_noise(gray, make_generator(), 60) * 60  # Poisson: mean and variance are 30
    assert abs(counts.mean() - 30) < 0.1
    assert abs(counts.var() - 30) < 0.5
    assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    salt = data.impulse_noise(gray, make_generator(), 0.27)
    for value, share in ((0, 0.135), (1, 0.135), (0.5, 0.73)):
        assert abs((salt == value).float().mean() - share) < 0.005
    assert ((salt != 0.5).sum(1) == 1).any()  # channels are hit one by one


def test_convolve_is_the_naive_loop():
    images, kernels = noise(2, 3, 9, 9), noise(2, 5, 5, seed=1)
    padded = F.pad(images, (2, 2, 2, 2), "reflect")
    naive = torch.zeros_like(images)
    for b, y, x, i, j in itertools.product(range(2), range(9), range(9), range(5), range(5)):
        # A convolution: the kernel is turned.
        weight = kernels[b, i, j] / kernels[b].sum()
        naive[b, :, y, x] += weight * padded[b, :, y + 4 - i, x + 4 - j]
    assert_close(data.convolve(images, kernels, "reflect"), naive, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side, radius", [(224, 6), (32, 3)])
def test_defocus_spreads_a_dot_over_a_disk(side, radius):
    dot = torch.zeros(1, 1, side, side)
    dot[..., side // 2, side // 2] = 1
    disk = data.defocus_blur(dot, make_generator(), radius)[0, 0]
    away = torch.arange(side) - side // 2
    distance, reach = torch.hypot(away[:, None].float(), away.float()), radius * side / 224
    assert abs(disk.sum() - 1) < 1e-4
    assert disk[distance > reach + math.sqrt(2)].abs().max() < 1e-6
    assert_close(disk, disk.T)
    if reach > 3:  # even in the middle: one over the area
        middle = disk[distance < reach - math.sqrt(2)] * math.pi * reach**2
        assert_close(middle, torch.ones_like(middle), rtol=0.02, atol=0)
    else:  # half a pixel: still a blur, by bilinear weights
        assert 0.3 < disk.max() < 0.9


def test_bilinear_weights_keep_position_and_mass():
    points = torch.tensor([[-1.3, 0.0, 0.25, 2.0]])
    weights = data.bilinear_weights(points, 3)
    assert_close(weights.sum(-2), torch.ones(1, 4))
    assert_close((torch.arange(-3, 4.0)[:, None] * weights).sum(-2), points)


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("sigma", [0.1, 1.3, 40.0])
def test_gaussian_filter_is_the_naive_sum(sigma, mirrored):
    n, reach = 12, math.ceil(4 * sigma)
    line, naive = noise(1, n)[0], []
    for p in range(n):
        total = weights = 0
        for i in range(-reach, n + reach):
            weight = math.exp(-(((i - p) / sigma) ** 2) / 2)
            place = min(i % (2 * n), 2 * n - 1 - i % (2 * n)) if mirrored else min(max(i, 0), n - 1)
            total, weights = total + weight * line[place].item(), weights + weight
        naive.append(total / weights)
    # Constant along the columns: rows alone are blurred.
    ours = data.gaussian_filter(line.expand(1, 1, n, n), sigma, mirrored)[0, 0]
    assert_close(ours, torch.tensor(naive).expand(n, n), atol=1e-5, rtol=0)


def test_motion_blur_goes_one_way_along_the_angle():
    """A pixel at an angle of 0 sees what is right of it, so a dot leaves its trail on the left."""
    dots = torch.zeros(2, 1, 224, 224)
    dots[..., 100, 100] = 1
    left, diagonal = data.blur_along(dots, torch.tensor([0.0, 45.0]), 10, 8)[:, 0]
    fall = (-((torch.arange(1, 21.0) / 8) ** 2) / 2).exp()
    assert_close(left[100, 80:100].flip(0) / left[100, 100], fall, atol=1e-4, rtol=0)
    assert left[100, 101:].abs().max() < 1e-5
    assert left[101:].abs().max() < 1e-5
    assert diagonal[96, 96] > 0.01
    assert diagonal[104, 96].abs() < 1e-5
    assert diagonal[104, 104].abs() < 1e-5


@pytest.mark.parametrize("side, distance, far", [(224, 3, 3), (64, 4, 2)])
def test_glass_takes_colors_from_near(side, distance, far):
    """Every pixel carries its own place; beside it a plain loop over the same random numbers."""
    place = torch.arange(side * side).view(1, 1, side, side).float()
    moved = data.glass_blur(place, make_generator(), 1e-3, distance, 1).round().long()[0, 0]
    whole, fraction = divmod(distance * side / 224, 1)
    edge, rng, shape = math.ceil(distance * side / 224), make_generator(), (1, 2, side, side)
    assert edge == far
    reach = whole + (torch.rand(shape, generator=rng) < fraction)
    steps = ((torch.rand(shape, generator=rng) * 2 - 1) * reach).floor().long()[0].tolist()
    naive = place[0, 0].long().tolist()
    for y in range(side - edge, edge, -1):
        for x in range(side - edge, edge, -1):
            naive[y][x] = naive[y + steps[0][y][x]][x + steps[1][y][x]]
    assert moved.tolist() == naive
    assert 0.5 < (moved != place[0, 0].long()).float().mean() < 0.99


def test_zoom_keeps_the_middle_and_reads_inwards():
    ramp = torch.linspace(-1, 1, 65).expand(1, 1, 65, 65)
    zoomed = data.zoom_blur(ramp, make_generator(), 0.1, 4)[0, 0, 32]
    factor = (1 + sum(1 / (1 + 0.1 * i) for i in range(4))) / 5
    assert_close(zoomed, ramp[0, 0, 32] * factor, atol=1e-5, rtol=0)


def test_plasma_is_diamond_square():
    """Three passes by hand: the middles, then the sides, each four neighbors' mean plus noise."""
    rng, field = make_generator(), torch.zeros(2, 1, 1)
    plus, cross = [(-1, 0), (1, 0), (0, -1), (0, 1)], [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    for amount in (1.0, 1 / 9.0, 1 / 81.0):
        n = field.shape[1]
        field, old = torch.zeros(2, 2 * n, 2 * n), field
        field[:, ::2, ::2] = old
        for top, left, steps in ((1, 1, cross), (0, 1, plus), (1, 0, plus)):
            near = sum(field.roll((-dy, -dx), (1, 2)) for dy, dx in steps) / 4
            extra = (torch.rand(2, n, n, generator=rng) * 2 - 1) * amount
            field[:, top::2, left::2] = near[:, top::2, left::2] + extra
    for cloud, its_field in zip(data.plasma(2, 7, 3, make_generator())[:, 0], field):
        low, high = its_field.min(), its_field.max()
        assert_close(cloud, (its_field[:7, :7] - low) / (high - low), atol=1e-5, rtol=0)


def test_a_corruption_of_light_is_its_published_formula():
    images = scenery() * 0.8
    clouds, top = data.plasma(2, 64, 2, make_generator()), images.amax((1, 2, 3), keepdim=True)
    foggy = (images + 1.5 * clouds) * top / (top + 1.5)
    assert_close(data.fog(images, make_generator(), 1.5, 2), foggy)
    mean = images.mean((2, 3), keepdim=True)
    assert_close(data.contrast(images, make_generator(), 0.2), (images - mean) * 0.2 + mean)
    colors = noise(1, 3, 8, 8)
    colors[0, :, 0, 0] = 0
    brighter = data.brightness(colors, make_generator(), 0.3)[0].flatten(1).T
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in colors[0].flatten(1).T.tolist()]
    want = [colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1)) for h, s, v in hsv]
    assert_close(brighter, torch.tensor(want), atol=1e-5, rtol=0)


def test_snow_and_frost_brighten_as_much_as_published():
    for severity, amount in enumerate((0.4, 0.6, 0.7, 0.7, 0.75), 1):
        frosted = data.corrupt(torch.zeros(64, 3, 64, 64), "frost", severity, make_generator())
        assert abs(frosted.mean() / amount - 0.63) < 0.06
    flakes = []
    for side in (32, 224):
        black = torch.zeros(12, 3, side, side)
        snowed = data.snow(black, make_generator(), 0.55, 0.3, 4, 0.9, 12, 8, 0.7)
        assert_close(snowed, snowed.rot90(2, (2, 3)), atol=1e-6, rtol=0)
        flakes.append(snowed.mean() - 0.3 * 0.5)
    assert 0.05 < flakes[0] < 0.2
    assert abs(flakes[0] - flakes[1]) < 0.01  # the mean does not depend on the size


@pytest.mark.parametrize("side", [224, 112])
def test_elastic_moves_as_far_as_it_says(side):
    """An image of coordinates says where each pixel came from, in pixels at 224."""
    rim, at = side // 4, (torch.arange(side) + 0.5) * 2 / side - 1
    place = torch.stack([at.expand(side, side), at[:, None].expand(side, side)])

    def moved(*constants):
        images = place.expand(4, 2, side, side)
        shift = (data.elastic_transform(images, make_generator(), *constants) - place) * 112
        return shift[:, :, rim:-rim, rim:-rim]

    assert moved(0.0, 2.44, 0.0).abs().max() < 0.01
    affine = moved(0.0, 2.44, 4.88)  # in the middle of the points: no further than they move
    assert 1 < affine.abs().max() < 1.3 * 4.88
    assert affine.diff(n=2, dim=2).abs().max() < 0.01
    local = moved(50.0, 5.0, 0.0)
    std = 50 / math.sqrt(3) / (2 * math.sqrt(math.pi) * 5)  # of uniform noise after the blur
    assert abs(local.std() / std - 1) < 0.15
    assert local.abs().max() < 6 * std


@pytest.mark.parametrize("share", [0.6, 0.5, 0.4, 0.3, 0.25])
@pytest.mark.parametrize("side", [224, 32])
def test_pixelate_is_pils_box_and_nearest(share, side):
    images = scenery(1, side)
    small = TF.to_pil_image(images[0]).resize((int(side * share),) * 2, Image.BOX)
    theirs = TF.pil_to_tensor(small.resize((side, side), Image.NEAREST))
    ours = data.pixelate(images, make_generator(), share)[0] * 255
    assert (ours - theirs).abs().max() < 1.01  # PIL rounds once a side


def test_jpeg_is_pils(tmp_path):
    images = scenery(2)
    TF.to_pil_image(images[1]).save(tmp_path / "x.jpg", quality=10)
    theirs = TF.pil_to_tensor(Image.open(tmp_path / "x.jpg"))
    ours = data.jpeg_compression(images, make_generator(), 10)[1] * 255
    assert (ours - theirs).abs().float().mean() < 0.5


# ---------------------------------------------------------------- data.py: style, commands


def gram_distance(images, style):
    """By 64 random 7x7 filters at three scales, which the transfer never sees -> (b,)."""
    bank = torch.randn(64, 3, 7, 7, generator=make_generator("judge")) / 12
    apart, pair = 0, (images, style)
    for _ in range(3):
        padded = [F.pad(x, (3, 3, 3, 3), mode="reflect") for x in pair]
        one, two = (data.gram(F.relu(F.conv2d(x, bank))) for x in padded)
        apart = apart + (one - two).square().sum((1, 2)).sqrt()
        pair = [F.avg_pool2d(x, 2) for x in pair]
    return apart


def outline(images):
    """Sobel magnitude of luminance, blurred by side / 64 -> (b, pixels), mean 0, deviation 1."""
    side, sobel = images.shape[-1], torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]])
    gray = F.pad(TF.rgb_to_grayscale(images), (1, 1, 1, 1), mode="reflect")
    edges = F.conv2d(gray, torch.stack([sobel, sobel.T])[:, None]).norm(dim=1, keepdim=True)
    edges = TF.gaussian_blur(edges, 2 * math.ceil(3 * side / 64) + 1, side / 64).flatten(1)
    return (edges - edges.mean(1, keepdim=True)) / edges.std(1, keepdim=True)


def test_texture_goes_and_shape_stays():
    images, styles = data.factors("val", 64, 28).images / 255, data.procedural_textures(28, 64)
    done = data.style_transfer(images, styles)
    assert 0 <= done.min() <= done.max() <= 1
    assert (1 - gram_distance(done, styles) / gram_distance(images, styles)).median() > 0.8
    assert (outline(done) * outline(images)).mean(1).median() > 0.5
    # The image's own colors, and still another texture.
    kept = data.style_transfer(images, styles, keep_color=True)
    chroma = [(x - TF.rgb_to_grayscale(x)).mean((2, 3)) for x in (images, done, kept)]
    assert (chroma[2] - chroma[0]).abs().mean() < 0.3 * (chroma[1] - chroma[0]).abs().mean()
    assert (outline(kept) * outline(images)).mean(1).median() < 0.95


def test_optimization_comes_closer_to_the_style():
    images, styles = data.factors("val", 32, 16).images / 255, data.procedural_textures(16, 32)
    losses = []
    for steps in (0, 10):
        done = data.style_transfer(images, styles, steps=steps, content_weight=0.0)
        pairs = zip(data.random_features(done)[0], data.random_features(styles)[0])
        losses.append(sum((data.gram(a) - data.gram(b)).square().mean((1, 2)) for a, b in pairs))
    assert (losses[1] < losses[0]).float().mean() > 0.9


def test_match_color_gives_the_moments():
    mixed = []
    for seed in (0, 1):
        mix = torch.rand(3, 3, generator=make_generator("mix", seed))
        mixed.append(torch.einsum("kc,bchw->bkhw", mix, noise(3, 3, 16, 16, seed=seed)))
    done, style = data.match_color(*mixed), mixed[1]
    assert_close(done.mean((2, 3)), style.mean((2, 3)), atol=1e-4, rtol=0)
    for a, b in zip(done, style):
        assert_close(a.flatten(1).cov(), b.flatten(1).cov(), atol=2e-3, rtol=0)


def test_vgg_features_are_the_published_layers():
    net = torchvision.models.vgg19(weights=None).eval().requires_grad_(False)
    maps, content = data.vgg_features(net, torch.rand(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [64, 128, 256, 512, 512, 512]
    assert [m.shape[2] for m in maps] == [64, 32, 16, 8, 8, 4]
    assert content == 4
    assert all((m >= 0).all() for m in maps)  # after ReLU, and not overwritten by the next layer
    image, style = torch.rand(1, 3, 64, 64), data.procedural_textures(1, 64)
    done = data.style_transfer(image, style, lambda x: data.vgg_features(net, x), steps=1)
    assert done.isfinite().all()


def test_copies_belong_to_their_images(tmp_path):
    photos, copies = tmp_path / "photos", tmp_path / "copies"
    folder_of(photos, train__a=8)
    for i, k in itertools.product(range(8), range(2)):
        write_image(copies / "train" / "a" / f"{i}.png.{k}.jpg", (30 * i + 7 * k, 0, 0))
    (photos / "train" / "a" / "2.png").write_bytes(b"broken")
    files = data.open_dataset("folder", "train", root=photos, size=12, canvas=12)
    inputs = "folder", files, data.decode_all(files), photos, copies, tmp_path, None, "cpu", 0
    reds = data.with_textures(*inputs).textures[:, :, 0, 6, 6]
    assert reds.tolist() == [[30 * i, 30 * i + 7] for i in (0, 1, 3, 4, 5, 6, 7)]
    (copies / "train" / "a" / "3.png.1.jpg").write_bytes(b"broken")
    again = "3.png.1.jpg: .*remove it: `python data.py stylize` writes it again"
    raises(UserError, again, data.with_textures, *inputs)


def test_factors_has_four_copies_of_other_textures(tmp_path, capsys):
    dataset = data.factors("val", 32, 3)
    made = data.factors_textures(dataset, tmp_path, "cpu")
    assert made.shape == (3, 4, 3, 32, 32)
    for one, other in itertools.combinations([*made.unbind(1), dataset.images], 2):
        assert ((one.float() - other.float()).abs().mean((1, 2, 3)) > 2).all()
        assert ((one.float() - other.float()).mean((2, 3)).abs() < 40).all()  # of one color
    capsys.readouterr()
    assert torch.equal(data.factors_textures(dataset, tmp_path, "cpu"), made)
    assert not capsys.readouterr().out


def test_stylize_goes_on_and_training_reads_it(here, capsys):
    root, copies = photo_tree(here / "photos", each=12), here / "copies"
    stylize = "stylize --root=photos --out=copies --size=32 --copies=2 --features=random --steps=1"
    train = "train --data=folder --root=photos --groups=color,texture --textures=copies --out=run"
    train += f" --size=28 --epochs=1 --batch=16 {TINY}"
    real, threads = data.save_copy, set()
    spy = lambda *job: (threads.add(threading.current_thread()), real(*job))  # noqa: E731
    with unittest.mock.patch.object(data, "save_copy", spy):
        run(data, f"{stylize} --batch=3")
    assert threads and threading.main_thread() not in threads
    made = {path: path.read_bytes() for path in sorted(copies.rglob("*.jpg"))}
    assert len(made) % 2 == 0
    assert all((root / path.relative_to(copies).parent).is_dir() for path in made)
    lost = list(made)[3]
    lost.unlink()
    assert lost.name in refused(capsys, loo, train)
    assert not (here / "run").exists()
    run(data, stylize)  # the same style again, the others untouched
    assert {path: path.read_bytes() for path in made} == made
    err = refused(capsys, data, f"{stylize} --strength=0.5")
    assert "copies holds copies of --strength=0.7: name another --out" in err
    out = printed(capsys, loo, train).out
    assert "spaces all, color, texture" in out
    assert "every view draws texture, crop, flip, color, no blur (no effect below 34" in out
    assert "1 steps are few to learn from scratch: --epochs=1000 makes 1000" in out
    # The same images elsewhere are the same run, other images are not.
    train = train.replace("photos", "moved").replace("=copies", "=other")
    shutil.move("photos", "moved")
    shutil.move("copies", "other")
    assert "run is trained already" in printed(capsys, loo, train).out
    assert json.loads(Path("run/config.json").read_text())["root"] == str(here / "moved")
    file, n = lost.relative_to(copies), len(made)
    write_image(here / "moved" / file.with_name(file.name.removesuffix(file.name[-6:])))
    (here / "other" / file).write_bytes(made[lost] + b"more")
    err, why = refused(capsys, loo, train), "by name, size or label other than the run's"
    assert f"moved with {n // 2} images, {why} {n // 2}" in err
    assert f"other with {n} images, {why} {n}" in err
    assert "moved holds other training images than" in printed(capsys, eval, "knn --run=run").err


def test_pack_is_read_by_training_and_whole_or_not_at_all(here, capsys, monkeypatch):
    root = photo_tree(here / "photos", each=12)
    run(data, "pack --root=photos --size=28 --out=packed")  # by another name of the same folder
    train = f"train --data=folder --root={root} --size=28 --epochs=1 --batch=16 {TINY}"
    with unittest.mock.patch.object(data, "decode_into", None):
        for cache, place in (("auto", "on disk"), ("none", "on disk"), ("host", "in memory")):
            line = f"{train} --packed=packed --cache={cache} --out={cache}"
            assert place in printed(capsys, loo, line).out
    same_run("auto", "host")
    next((here / "packed").glob("*.canvases")).unlink()  # to free the disk, say
    run(loo, f"{train} --packed=packed --out=again")
    same_run("auto", "again")
    os.truncate(next((here / "packed").glob("*.pt")), 99)  # a disk that was full, say
    assert "decoding" in printed(capsys, data, "pack --root=photos --size=28 --out=packed").err
    monkeypatch.setattr("os.posix_fallocate", DISK_IS_FULL)
    pack = "pack --root=photos --size=28 --out=full"
    assert "No space left" in refused(capsys, data, pack, lines=2)  # and what it decodes
    assert not list((here / "full").iterdir())


def test_pack_and_train_have_one_canvas_and_an_old_run_keeps_its_own(here, few, capsys):
    imagenet_tree(here / "in", few)
    train = "train moco color --data=imagenet100 --root=in --arch=small --size=28 --batch=32"
    train += f" --epochs=1 --schedule=cosine --splits=2 {TINY}"
    old = f"{train} --out=old"
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(loo.RECIPES["imagenet100"], "canvas")  # as it was before
        run(loo, old)
    pack = "pack --data=imagenet100 --root=in --size=28 --out=packed"
    out, err = printed(capsys, data, pack)
    assert "60 images of 48 x 48" in out
    assert re.search(r"decoded \d+ images/s", err)
    with unittest.mock.patch.object(data, "decode_into", None):  # not again
        run(loo, f"{train} --out=new --packed=packed")
    assert "old is trained already" in printed(capsys, loo, old).out
    canvases = [json.loads(Path(x, "config.json").read_text())["canvas"] for x in ("old", "new")]
    assert canvases == [None, 48]
    assert "--canvas=48 (the run has None)" in refused(capsys, loo, f"{old} --canvas=48")


def test_what_is_written_is_not_read_as_a_class(here, capsys):
    photo_tree(here / "photos")
    train = "train --data=folder --root=photos --out=photos/runs --batch=8 --splits=1"
    stylize, pack = "stylize --root=photos --out=photos/s", "pack --root=photos --out=photos/x"
    for module, line in ((loo, train), (data, stylize), (data, pack)):
        assert "would be read as a class" in refused(capsys, module, line)
    data.forbid_inside("photos/.runs", "photos")
    assert sorted(p.name for p in (here / "photos").iterdir()) == ["class0", "class1", "class2"]


@pytest.mark.parametrize("aspect", [2000, 1 / 2000])
def test_the_copy_of_a_line_of_pixels_is_the_longest_jpeg(aspect, tmp_path):
    data.save_copy(tmp_path / "x.jpg", torch.zeros(3, 64, 64, dtype=torch.uint8), aspect)
    assert sorted(Image.open(tmp_path / "x.jpg").size) == [64, 65500]


def pixels_of(path, color):
    """Where an image has nearly this color -> (n 2), x and y."""
    image = np.asarray(Image.open(path)).astype(int)
    near = abs(image - ImageColor.getrgb(color)).max(2) < 24
    return np.argwhere(near)[:, ::-1]


def test_curves_are_where_their_points_are(tmp_path):
    """A flat line, a step and what is not finite, in panels whose box is known."""
    path, (first, second, *_) = tmp_path / "x.png", data.COLORS
    flat = [(x, 1) for x in range(11)] + [(99, math.nan), (99, math.inf)]
    step = [(0, 0), (5, 0), (5, 2), (10, 2)]
    data.draw_curves({"a": {"flat": flat, "step": step}, "b": {"step": step[:1]}}, path, "step")
    size = Image.open(path).size
    left, right, top, bottom = 55, 405, 30, 245  # of the panel, in the final pixels
    x, y = pixels_of(path, first).T
    x, y = x[x < right + 20], y[x < right + 20]  # not the legend's
    inside = (right - left) / 22  # a twentieth of the range is room, on both sides
    assert x.min() == pytest.approx(left + inside, abs=2)
    assert x.max() == pytest.approx(right - inside, abs=4)  # with its last dot
    assert abs(y - (top + bottom) / 2).max() < 4
    x, y = pixels_of(path, second).T
    middle = abs(x - (left + right) / 2) < 2
    inside = (bottom - top) / 22
    assert y[middle].min() == pytest.approx(top + inside, abs=2)
    assert y[middle].max() == pytest.approx(bottom - inside, abs=2)
    single = (x > 420) & (x < 840)  # a dot in the middle of the other panel
    assert x[single].mean() == pytest.approx(420 + (left + right) / 2, abs=1)
    assert y[single].mean() == pytest.approx((top + bottom) / 2, abs=1)
    assert (x[~single & (x > right)] > 840).all()  # the legend has room of its own
    assert size[0] > 840 + 60
    lost = [(1, math.nan), (math.inf, 1)]
    for panels in ({}, {"loss": {"all": lost}}, {"loss": {"a": step, "b": lost, "c": []}}):
        data.draw_curves(panels, path, "step")
    assert Image.open(path).size > (420, 280)


def test_axis_has_a_few_round_numbers_within():
    for values in ([0, 1], [3], [0], [-2e-9, 5e-9], [1e9, 1e9 + 7], [0.02, 0.03, 5]):
        low, high, ticks = data.axis_range(values)
        assert low < min(values) <= max(values) < high
        assert low <= ticks[0] <= ticks[-1] <= high
        assert 2 <= len(ticks) <= 7
    assert data.axis_range([0, 100])[2] == [0, 20, 40, 60, 80, 100]


def test_names_are_drawn_or_escaped():
    names, font = ["it's", "two\nlines", "caf\udce9", "\u732b"], ImageFont.load_default(10)
    assert data.drawable(names, font) == ["it's", "two\\nlines", "caf\\udce9", "\\u732b"]


def test_flags_are_typed_by_the_signature_and_commands_guessed(capsys):
    got = []

    def command(out: str = "x", groups: tuple = (), lr: float = 1.0, fresh: bool = False):
        got.append((out, groups, lr, fresh))

    lines = ["--out=1e3 --groups=color --lr=3 --fresh", "--out runs/lr=3", "--out lr=.1 --fresh"]
    lines += ["color --fresh false --out=x", "--fresh x color --lr 2 --nofresh"]
    lines += ["--groups a b --fresh", "a b --out x"]
    for line in lines:
        data.command_line({"go": command}, ["go", *line.split()])
    assert got[0] == ("1e3", ("color",), 3.0, True)
    assert got[1:3] == [("runs/lr=3", (), 1.0, False), ("lr=.1", (), 1.0, True)]
    assert got[3:5] == [("x", ("color",), 1.0, False), ("x", ("color",), 2.0, False)]
    assert got[5:] == [("x", ("a", "b"), 1.0, True), ("x", ("a", "b"), 1.0, False)]
    assert "did you mean looc" in refused(capsys, loo, "train --method=LooC")
    assert "did you mean train" in refused(capsys, loo, "trian")


@pytest.mark.parametrize("line", ["train --epochs=5 --help", "--lr=x train -h", "help train"])
def test_help_explains_the_command(line, capsys):
    raises(SystemExit, "^0$", run, loo, line)
    text = capsys.readouterr().out
    assert "--weight_decay=" in text
    assert "-m, --method" not in text


def test_without_a_command_all_are_named(capsys):
    for module in (loo, data, eval):
        assert list(COMMANDS[module].split())[-1] in refused(capsys, module, "")
    assert "expected a command" in refused(capsys, loo, "--epochs=5 train")


BAD_NUMBERS = [(data, "sheet --size=7"), (data, "sheet --size=1000000"), (data, "check --sample=0")]
BAD_NUMBERS += [(data, f"stylize --{flag}") for flag in ("copies=0", "size=8", "strength=nan")]
BAD_NUMBERS += [(data, f"stylize --{flag}") for flag in ("steps=-1", "batch=0", "split=nope")]
BAD_NUMBERS += [(data, f"pack --{flag}") for flag in ("size=0", "canvas=-3", "workers=-1")]
BAD_NUMBERS += [(loo, "bench --steps=1"), (loo, "bench --batch=0"), (eval, "knn --neighbours=0")]
BAD_NUMBERS += [(eval, f"spaces --margin={x}") for x in ("nan", "inf", -1, "x")]
BAD_NUMBERS += [(eval, f"claims --{flag}") for flag in ("jobs=2", "seeds=0", "seeds=1000000000")]
BAD_NUMBERS += [(eval, "fewshot --trials=1"), (eval, "retrieve --queries=0")]
BAD_NUMBERS += [(eval, "robust --pictures=0"), (eval, "linear --protocol=paper --lr=inf")]
BAD_NUMBERS += [(data, "check --megapixels=0")]
BAD_NUMBERS += [(eval, "embed --workers=-1"), (eval, f"linear --seed={-(10**20)}")]


@pytest.mark.parametrize("module, line", BAD_NUMBERS)
def test_a_number_out_of_its_range_is_one_clear_line(module, line, here, capsys):
    flag = line.split()[-1]
    assert refused(capsys, module, line).startswith(f"error: {flag}: expected")
    assert not list(here.iterdir())


def test_a_command_goes_on_when_nobody_reads(monkeypatch):
    """As after `| head`, or when the disk of its output is full, which it says at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = data.Stream(writer, "w")
    assert stream.write(b"text") == 4
    code = "import data; data.command_line(dict(go=lambda: print('a\\n' * 9999)), ['go'])"
    script = [sys.executable, "-c", code]
    with open("/dev/full", "wb", buffering=0) as full:
        done = subprocess.run(script, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    lost = "error: standard output: No space left on device; what go printed is lost\n"
    assert done.stderr == lost
    monkeypatch.setattr(sys, "stdout", None)  # as after >&-
    data.command_line(dict(go=lambda: print("nobody reads it")), ["go"])


def test_control_c_is_no_traceback():
    # The signal itself may be ignored, as in a job in the background.
    go = unittest.mock.create_autospec(lambda: None, side_effect=KeyboardInterrupt)
    raises(SystemExit, "130", data.command_line, dict(go=go), ["go"])


def test_a_rank_without_a_number_of_processes_is_alone(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    data.warn_once("this is said")
    assert "this is said" in capsys.readouterr().err


def test_files_of_a_run_and_tables_are_not_replaced(untrained, capsys, monkeypatch):
    photo_tree(untrained / "more", 2, 15)
    backbone = Path("runs/latest/backbone.pt").read_bytes()
    line = "linear --data=folder --root=more --save=runs/latest/backbone.pt"
    assert "belongs to a run" in refused(capsys, eval, line)
    Path("more/labels.csv").write_text("file\n")
    assert "name another" in refused(capsys, eval, "embed --root=more --out=more/labels.csv")
    notes = Path("notes.txt")
    notes.write_text("mine")
    assert "ends in .png" in refused(capsys, data, "sheet --size=8 --out=notes.txt")
    assert "not ours" in refused(capsys, eval, "linear --label=object --save=notes.txt")
    assert notes.read_text() == "mine"
    assert Path("runs/latest/backbone.pt").read_bytes() == backbone
    monkeypatch.setattr(os, "access", lambda *_: False)  # a disk that cannot be written
    assert "no permission to write in /" in refused(capsys, eval, "retrieve --out=found/all.png")


def test_what_is_no_file_is_not_written_over(here, capsys):
    """And a link is written through."""
    os.mkfifo("pipe")
    for link, to in (("x.png", "far/x.png"), ("loop", "loop"), ("device", "/dev/null")):
        (here / link).symlink_to(to)
    write_image(here / "folder" / "x.png")
    (here / "file").write_text("kept")
    for out in ("pipe", "loop", "device", "folder", "file/x", "/dev/full", "loop/x"):
        assert "is no f" in refused(capsys, data, f"sheet --out={out}")
    for out in ("loop", "pipe", "file", "file/x", "/dev/null"):
        assert "is no folder" in refused(capsys, loo, f"train --out={out}")
    why = "--out=folder is not empty and holds no run"
    assert why in refused(capsys, loo, "train --out=folder --fresh")
    assert (here / "folder" / "x.png").exists()
    data.write_atomic(here / "x.png", b"new")
    assert (here / "x.png").is_symlink()
    assert (here / "far" / "x.png").read_bytes() == b"new"
    assert (here / "file").read_text() == "kept"


@pytest.mark.parametrize("flag", ["queue", "dim", "hidden"])
def test_memory_that_cannot_be_had_is_a_line(flag, here, capsys):
    err = refused(capsys, loo, f"train --{flag}=2147483647")
    assert "error: not enough memory (can't allocate memory: you tried to allocate" in err
    assert loo.lacks_memory(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert not loo.lacks_memory(RuntimeError("stopped here"))


def test_a_full_disk_leaves_what_was_there(here, monkeypatch):
    data.write_atomic(here / "x.pt", b"old")
    monkeypatch.setattr("os.fsync", DISK_IS_FULL)
    with pytest.raises(UserError, match="x.pt, which needs 3.0 MB: No space left"):
        data.write_atomic(here / "x.pt", bytes(3 << 20), keep=here / "y.pt")
    assert [p.name for p in here.iterdir()] == ["x.pt"]
    assert (here / "x.pt").read_bytes() == b"old"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_is_half_written_goes_when_it_is_stopped(number, here, monkeypatch):
    def stop(*_):
        os.kill(os.getpid(), number)

    photo_tree(here / "photos")
    monkeypatch.setattr(data, "decode_into", stop)
    raises(SystemExit, str(128 + number), run, data, "pack --root=photos --size=28")
    raises(SystemExit, str(128 + number), data.write_atomic, here / "runs" / "x.pt", stop)
    assert not list((here / "runs").iterdir())


# ---------------------------------------------------------------- eval.py: features, probes, tasks


def test_rotated_features_are_those_of_rotated_images():
    torch.manual_seed(0)
    encoder = loo.Encoder("small", spaces=2, hidden=16, dim=8)
    dataset = data.factors("val", 32, 5)
    v, z, rows = eval.features(encoder, dataset, (0, 1, 3), batch=2)
    assert (v.shape, z.shape) == ((15, 128), (2, 15, 8))
    assert rows.tolist() == [0, 1, 2, 3, 4]
    for turns, at in ((0, slice(5)), (1, slice(5, 10)), (3, slice(10, 15))):
        want_v, want_z = loo.encode(encoder, dataset.images.rot90(turns, (2, 3)) / 255)
        assert_close(v[at], want_v.detach(), atol=1e-5, rtol=1e-4)
        assert_close(z[:, at], want_z.detach(), atol=1e-5, rtol=1e-4)


def test_features_leave_out_what_cannot_be_read(tmp_path):
    folder_of(tmp_path, train__a=6)
    dataset = data.open_dataset("folder", "train", root=tmp_path, size=32, central=True)
    encoder = loo.Encoder("small", spaces=2, hidden=16, dim=8).eval()
    v, z, rows = eval.features(encoder, dataset, turns=(0, 1))
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"broken")
    v_left, z_left, rows_left = eval.features(encoder, dataset, turns=(0, 1))
    assert rows.tolist() == list(range(6))
    assert rows_left.tolist() == [0, 1, 3, 4, 5]
    keep = torch.tensor([0, 1, 3, 4, 5, 6, 7, 9, 10, 11])  # in both orientations
    assert_close(v_left, v[keep])
    assert_close(z_left, z[:, keep])


def test_collapsed_features_are_named_and_infinite_ones_refused(capsys):
    x = torch.randn(50, 8, generator=make_generator(0))
    eval.check_features("test", x)
    eval.check_features("test", 1 + x / 100)
    assert not capsys.readouterr().err
    eval.check_features("test", 1 + x[:, :1] * 1e-5)
    assert "(norm 1.0e+00, deviation 9.8e-06)" in capsys.readouterr().err
    eval.check_features("test", 0 * x)
    assert "(norm 0.0e+00, deviation 0.0e+00)" in capsys.readouterr().err
    raises(UserError, "of the train images are not finite", eval.check_features, "train", x / 0)


def test_logistic_finds_the_minimum():
    """Two points, one dimension: the slope w of log(1 + exp(-2w)) + w^2 is solved by hand."""
    w, b = eval.logistic(torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([1, 0]), 2, 1.0)
    slope = w[1, 0].item()
    assert slope == pytest.approx(-w[0, 0].item(), abs=1e-6)
    assert b.abs().max() < 1e-6
    assert slope == pytest.approx(1 / (1 + math.exp(2 * slope)), abs=1e-5)


def test_images_are_held_out_in_all_their_orientations(monkeypatch):
    """A sample is its image's number."""
    x, y = torch.arange(50.0).repeat(4)[:, None], torch.arange(4).repeat_interleave(50)
    logistic = unittest.mock.Mock(return_value=(torch.zeros(4, 1), torch.zeros(4)))
    monkeypatch.setattr(eval, "logistic", logistic)
    eval.lbfgs_probe(x, y, 4, seed=0, turns=4)
    images, labels, *_ = logistic.call_args_list[0].args
    assert len(torch.cat([images, labels[:, None]], 1).unique(dim=0)) == 160
    assert (images.unique(return_counts=True)[1] == 4).all()
    assert len(logistic.call_args.args[0]) == 200


def test_few_shot_trials_do_not_touch_each_other():
    x, y = torch.randn(3, 20, 5, generator=make_generator(0)), torch.arange(20).expand(3, 20) % 4
    w, b = eval.fit_few_shot(x, y, 4, 50)
    for trial in ([0], [1], [2]):
        alone = eval.fit_few_shot(x[trial], y[trial], 4, 50)
        assert_close((w[trial], b[trial]), alone, atol=1e-5, rtol=1e-5)


def test_few_shot_of_the_paper_starts_anywhere_and_draws_batches():
    y = torch.arange(60).expand(2, 60) % 3
    x = F.one_hot(y, 3) * 2.0
    start, _ = eval.fit_few_shot(x, y, 3, 0, generator=make_generator("few"))
    assert 0.4 < start.abs().max() <= 3**-0.5
    first, _ = eval.fit_few_shot(x, y, 3, 1, generator=make_generator("few"), batch=1)
    assert ((first != start).sum(1) == 1).all()  # one sample has one input that is not 0
    w, b = eval.fit_few_shot(x, y, 3, generator=make_generator("few"), batch=8)
    assert torch.equal((x @ w + b).argmax(2), y)


def test_shots_are_drawn_per_class_and_trial():
    y = torch.arange(60) % 4
    trials = eval.sample_shots(y, 4, 5, 3, seed=0)
    assert trials.shape == (3, 20)
    assert all(torch.bincount(y[rows]).tolist() == [5] * 4 for rows in trials)
    assert all(len(rows.unique()) == 20 for rows in trials)
    assert trials[0].tolist() != trials[1].tolist()
    with pytest.raises(UserError, match="hue blue has only 14"):
        eval.sample_shots(y[:59], 4, 16, 1, 0, "hue", ("red", "tan", "gray", "blue"))
    gaps = torch.arange(40) % 4 - 1  # of four classes, the last has no image
    trials = eval.sample_shots(gaps, 4, 5, 2, seed=0)
    assert [torch.bincount(gaps[rows]).tolist() for rows in trials] == [[5, 5, 5]] * 2


def test_knn_is_a_naive_loop():
    x, test = (torch.randn(n, 6, generator=make_generator(seed)) for seed, n in enumerate((50, 9)))
    y = torch.arange(50) % 3
    votes = eval.knn_predict(x, y, 3, test, neighbours=7)
    for i in range(9):
        similarity = [F.cosine_similarity(test[i], x[j], dim=0).item() for j in range(50)]
        want = [0.0, 0.0, 0.0]
        for s, label in sorted(zip(similarity, y.tolist()), reverse=True)[:7]:
            want[label] += math.exp((s - max(similarity)) / 0.07)
        assert votes[i].tolist() == pytest.approx(want, rel=1e-3)


def test_accuracy_counts_the_first_and_the_first_five_and_of_some_classes():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9]])
    assert eval.accuracy(logits, torch.tensor([0, 0])) == 50
    assert eval.accuracy(logits, torch.tensor([4, 0]), 5) == 50
    logits = torch.tensor([[1.0, 9.0, 3.0, 2.0], [5.0, 0.0, 1.0, 2.0]])
    assert eval.restrict_classes(logits, torch.tensor([2, 3])).argmax(1).tolist() == [2, 3]
    y = torch.tensor([0, 0, 0, 1])
    right, constant = (F.one_hot(x, 3).float() for x in (y, torch.zeros_like(y)))
    found = eval.result(constant, y, "kind")
    assert (found["top1"], found["largest"], found["balanced"]) == (75, 75, 50)
    found = eval.result(right, y, "kind")
    assert (found["top1"], found["largest"], found["balanced"]) == (100, 75, 100)


def test_images_without_the_label_do_not_count():
    logits, y = torch.randn(60, 7, generator=make_generator(0)), torch.arange(60) % 8 - 1
    known = y >= 0
    assert eval.result(logits, y, "kind") == eval.result(logits[known], y[known], "kind")
    near = torch.randint(60, (60, 4), generator=make_generator(1))
    want = []
    for i in range(60):
        neighbors = [int(y[j]) for j in near[i] if y[j] >= 0]
        if y[i] >= 0 and neighbors:
            want.append(100 * neighbors.count(int(y[i])) / len(neighbors))
    assert eval.label_share(y, near).tolist() == pytest.approx(want)


def test_interval_is_students():
    for comparisons, t in ((1, 4.302653), (5, 9.924843)):
        half = pytest.approx(t / math.sqrt(3), rel=1e-3)
        assert eval.t_ci95([1.0, 2.0, 3.0], comparisons) == half
    assert eval.t_ci95([5.0]) == math.inf
    assert eval.t_ci95([93.1] * 3) == math.inf  # they do not say how far others are apart
    assert eval.compare([5.0, 5.0], 0, 1)[::2] == ("cannot tell", "+5.0 (2 of 2 seeds)")
    for df, tail, t in ((4, 0.005, 4.604095), (4, 0.001, 7.173182), (1, 0.0005, 636.6192)):
        assert eval.t_quantile(df, tail) == pytest.approx(t, rel=1e-3)


RIGHT = [(6, 6), (1, 1), (0, 9), (19, 20), (200, 200), (95, 100), (60, 100), (991, 1000)]


@pytest.mark.parametrize("right, n", RIGHT)
def test_an_interval_at_the_ends_reaches_as_far_as_wilsons(right, n):
    share, z = right / n, 1.96
    root = z * math.sqrt(share * (1 - share) / n + (z / n / 2) ** 2)
    ends = [(share + z**2 / n / 2 + sign * root) / (1 + z**2 / n) for sign in (-1, 1)]
    wilson = 100 * max(abs(end - share) for end in ends)
    assert wilson - 0.1 < eval.ci95((torch.arange(n) < right) * 100.0) < 1.3 * wilson


def test_more_errors_make_no_interval_narrower():
    halves = [eval.ci95((torch.arange(1000) >= wrong) * 100.0) for wrong in range(50)]
    assert halves == sorted(halves)


FEW = [(6, 0, "cannot tell"), (100, 0, "cannot tell"), (400, 0, "does not care")]
FEW += [(3, 3, "cannot tell"), (8, 8, "wants"), (40, 5, "cannot tell"), (40, 9, "wants")]


@pytest.mark.parametrize("n, better, says", FEW)
def test_few_images_that_differ_do_not_decide(n, better, says):
    gain, half = eval.paired_ci95((torch.arange(n) < better).double(), torch.zeros(n))
    assert gain == pytest.approx(100 * better / n)
    assert says in eval.verdict("color", gain, half, 1.0)


def test_paired_interval_covers_the_truth():
    """Of 1,000 test sets of 400 images, 95% of the intervals hold 70% - (55% + 45% / 9)."""
    u = torch.rand(1000, 400, 2, generator=make_generator(0)).double()
    a, b = (u[..., 0] < 0.7).double(), ((u[..., 0] < 0.55) | (u[..., 1] < 1 / 9)).double()
    intervals = [eval.paired_ci95(x, y) for x, y in zip(a, b)]
    inside = sum(abs(gain - 10) <= half for gain, half in intervals)
    assert 0.93 < inside / 1000 < 0.97


def test_fewshot_interval_covers_the_truth():
    """Of 100 experiments of 10 trials, 95% of the intervals hold what 1,000 trials give."""
    y = torch.arange(900) % 3
    x = F.one_hot(y, 3) * 1.5 + torch.randn(900, 3, generator=make_generator(1))  # classes overlap
    rows = eval.sample_shots(y[:600], 3, 5, 1000, seed=0)
    w, b = eval.fit_few_shot(x[rows], y[rows], 3, 100)
    top1 = torch.tensor([eval.accuracy(logits, y[600:]) for logits in x[600:] @ w + b])
    errors = (top1.view(100, 10).mean(1) - top1.mean()).abs().tolist()
    halves = [eval.t_ci95(trials.tolist()) for trials in top1.view(100, 10)]
    assert 0.88 < sum(error <= half for error, half in zip(errors, halves)) / 100 < 0.99


def test_verdicts():
    assert "wants" in eval.verdict("color", 0.5, 0.3, 1.0)
    assert "better without" in eval.verdict("color", -0.5, 0.3, 1.0)
    assert "does not care" in eval.verdict("color", -0.2, 0.5, 1.0)
    assert "cannot tell" in eval.verdict("color", 0.6, 0.7, 1.0)


BAD_EVALUATIONS = [("linear --run=nope", "nope"), ("linear --label=hues", "hue")]
BAD_EVALUATIONS += [("linear --feature=colour", "color"), ("linear --shots=5", "--shots")]
BAD_EVALUATIONS += [("linear --protocol=papers", "paper"), ("fewshot --shots=five", "numbers")]
BAD_EVALUATIONS += [("linear --epochs=3", "--protocol=paper"), ("fewshot --shots=", "numbers")]
BAD_EVALUATIONS += [("fewshot --shots=1,5000", "--shots=5000"), ("retrieve --out=.", "is no file")]
BAD_EVALUATIONS += [("retrieve --neighbours=5000", "128"), ("linear --workers=-1", "0 or more")]
BAD_EVALUATIONS += [("robust --corrupted=.", "--source=generated")]
BAD_EVALUATIONS += [("robust --source=folder", "--source=generated")]
BAD_EVALUATIONS += [("retrieve --classes=xylophone", "--classes=xylophone: 0 test images")]
BAD_EVALUATIONS += [("linear --data=cub200", "vision.caltech.edu")]
BAD_EVALUATIONS += [("linear --data=objectnet13 --root=.", "robust")]
BAD_EVALUATIONS += [("retrieve --out=x.jpg", "ends in .png"), ("claims --budget=tiny", "small")]
BAD_EVALUATIONS += [("claims --results=none.jsonl", "none.jsonl")]
BAD_EVALUATIONS += [("spaces --layer=middle", "hidden"), ("linear --save=x.pt", "--label=object")]
BAD_EVALUATIONS += [("embed", "--root=DIR"), ("embed --root=nope", "no such folder")]
BAD_EVALUATIONS += [("embed --root=. --out=x.xls", ".csv"), ("embed --root=runs", "no images")]
BAD_EVALUATIONS += [("embed --root=. --classify=nope.pt", "nope.pt")]
BAD_EVALUATIONS += [("retrieve --against=runs/nope", "runs/nope: no such run")]


@pytest.mark.parametrize("line, hint", BAD_EVALUATIONS)
def test_bad_evaluations_are_one_clear_line(line, hint, untrained, capsys):
    assert hint in refused(capsys, eval, line)


@pytest.mark.parametrize("method", ["looc", "looc++", "moco_same", "supervised"])
def test_train_then_evaluate(method, here, capsys):
    run(loo, f"train --method={method} --epochs=2 --out=run {SMALL}")
    files = "config.json log.jsonl views.png curves.png checkpoint.pt backbone.pt heads.pt"
    assert {*os.listdir("run")} - {"checkpoint.old.pt"} == {*files.split()}
    log = loo.read_jsonl(here / "run" / "log.jsonl")
    assert [line["step"] for line in log] == list(range(1, 9))
    assert len(log[0]["loss"]) == (3 if "looc" in method else 1)
    assert (here / "runs" / "latest").resolve() == here / "run"
    assert data.ImageSet._field_defaults["held"] == {}  # of every set of images to come
    capsys.readouterr()
    run(eval, "linear --label=object,hue --json")
    run(eval, "fewshot --run=run --label=hue --trials=3 --json")
    run(eval, "rotation --json")
    if method == "looc++":
        run(eval, "knn --label=object --feature=color --json")
    assert capsys.readouterr().out == (here / "run" / "results.jsonl").read_text()
    found = results(here)
    first = [("linear", "object", None), ("linear", "hue", None), ("fewshot", "hue", 5)]
    first += [("fewshot", "hue", 10), ("rotation", "rotation", None)]
    assert [(line["task"], line["label"], line["shots"]) for line in found[:5]] == first
    assert all(0 <= line["top1"] <= 100 for line in found)
    assert {(line["method"], *line["groups"]) for line in found} == {(method, *GROUPS)}
    assert method in printed(capsys, eval, "table --runs=run").out


def test_papers_protocol(untrained, capsys, monkeypatch):
    areas, augmented = [], eval.augmented_batch
    monkeypatch.setattr(eval, "augmented_batch", lambda *a: areas.append(a[5]) or augmented(*a))
    run(eval, "rotation --protocol=paper --epochs=1 --json")
    run(eval, "linear --label=hue --protocol=paper --epochs=2 --area=0.5 --json")
    run(eval, "fewshot --label=hue --protocol=paper --trials=2 --shots=20 --json")
    said = [line["protocol"] for line in results(untrained)]
    assert said == ["paper, epochs 1", "paper, epochs 2, area 0.5", "paper, trials 2"]
    assert areas == [0.08, 0.5, 0.5]  # one step an epoch


def test_papers_protocol_flips_before_it_turns(untrained, monkeypatch):
    """Turned back by its label, each image is itself or its mirror image."""
    seen, ctx, images = [], eval.open_run(), noise(64)
    monkeypatch.setattr(loo, "encode", lambda _, x: (seen.append(x) or x.flatten(1), x))
    inputs = ctx, ctx.config, images, torch.ones(64), None, 1.0, make_generator("probe")
    every = torch.arange(64)
    _, turns = eval.augmented_batch(*inputs, loo.Rows(64, every, every, every))
    back = torch.stack([x.rot90(-int(turn), (1, 2)) for x, turn in zip(seen[0], turns)])
    same, mirrored = ((back - x).abs().amax((1, 2, 3)) < 1e-4 for x in (images, images.flip(3)))
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_a_probe_that_is_not_finite_ends_and_keeps_nothing(untrained, capsys, monkeypatch):
    batch = torch.full((256, 128), math.nan), torch.zeros(256, dtype=torch.long)
    monkeypatch.setattr(eval, "augmented_batch", lambda *_: batch)
    line = "linear --protocol=paper --label=hue --epochs=1"
    assert "weights of the probe are not finite" in refused(capsys, eval, line)
    for fit in (eval.lbfgs_probe, lambda x, y, k, _: eval.fit_few_shot(x[None], y[None], k)):
        raises(UserError, "of the probe are not finite", fit, *batch, 2, 0)
    assert not results(untrained)


def test_one_image_gives_no_nan(untrained, capsys, monkeypatch):
    monkeypatch.setattr(data, "FACTORS", data.FACTORS | {"test": 1})
    for line in ("linear", "fewshot --shots=1 --trials=2", "spaces", "robust --pictures=1"):
        run(eval, f"{line} --label=object")
    nothing = [dict(label="hue", top1=math.nan, ci95=eval.ci95(torch.zeros(0)))]
    eval.report(eval.open_run(), "linear", nothing, (), False, 0.0)
    said = capsys.readouterr().out + (untrained / "runs/latest/results.jsonl").read_text()
    assert not {"nan", "inf"} & set(said.lower().replace("(", " ").split())
    *found, last = results(untrained)
    assert all(line["ci95"] > 40 for line in found if line["n_test"] == 1)
    assert (last["top1"], last["ci95"]) == (None, None)
    # Nor does one training image.
    mean, deviation = eval.standardize(torch.ones(1, 4), torch.zeros(2, 4))
    assert mean.tolist() == [1] * 4
    assert deviation.isfinite().all()


def test_what_cannot_be_kept_does_not_end_an_evaluation(untrained, capsys, monkeypatch):
    """A file stands where the cache would go, and a folder where the results would."""
    latest = untrained / "runs" / "latest"
    (latest / "features").write_text("")
    (latest / "results.jsonl").mkdir()
    monkeypatch.setattr(eval, "save_neighbors", DISK_IS_FULL)
    out, err = printed(capsys, eval, "retrieve --label=object,hue --queries=2")
    assert "| object |" in out and "| hue |" in out
    features, lines, image = err.splitlines()
    assert f"warning: the features in {latest}/features cannot be kept: " in features
    assert f"warning: {latest}/retrieve.png cannot be kept: " in image
    assert f"warning: the results in {latest} cannot be kept: Is a directory" in lines


def test_linear_heads_train_and_have_no_hidden_layer(here, capsys):
    run(loo, f"train --epochs=1 --out=run {SMALL} --hidden=0")
    run(eval, "spaces --label=hue --json")
    assert "linear" in refused(capsys, eval, "spaces --layer=hidden")


def read_embedded(path):
    """What `embed` wrote -> files, features (n d), the other columns."""
    if path.endswith(".csv"):
        head, *rows = csv.reader(Path(path).read_text().splitlines())
        first = head.index("f0")
        columns = dict(zip(head[1:first], list(zip(*rows))[1:first]))
        numbers = [list(map(float, row[first:])) for row in rows]
        return [row[0] for row in rows], torch.tensor(numbers), columns
    found = torch.load(path) if path.endswith(".pt") else dict(np.load(path))
    return list(found.pop("files")), torch.as_tensor(found.pop("features")), found


@pytest.mark.parametrize("kind", ["csv", "npz", "pt"])
def test_embed_gives_what_the_encoder_gives(kind, untrained, capsys):
    write_image(photo_tree(untrained / "photos", 2, 3) / "flat.png")
    Path("photos/broken.jpg").write_bytes(b"broken")
    Path("photos/notes.txt").touch()
    warnings = printed(capsys, eval, f"embed --root=photos --out=x.{kind}").err
    assert "unreadable: photos/broken.jpg" in warnings
    assert "left out: 1 files (1 .txt), the first is photos/notes.txt" in warnings
    files, features, _ = read_embedded(f"x.{kind}")
    stems = [file.partition(".")[0] for file in files]
    assert stems == [*(f"class{c}/{i}" for c in range(2) for i in range(3)), "flat"]
    encoder, config = loo.load_encoder("runs/latest")
    paths = [Path("photos") / file for file in files]
    for image, feature in zip(data.central_crops(paths, config["size"]), features):
        v, _ = loo.encode(encoder, image[None])
        assert_close(feature[None], v, atol=1e-5, rtol=0)
    assert not list(Path().glob("*.part"))


def test_features_that_are_not_finite_are_not_written(untrained, capsys):
    photo_tree(untrained / "photos", 2, 3)
    backbone = torch.load("runs/latest/backbone.pt")
    torch.save(backbone | {"bn1.running_var": backbone["bn1.running_var"] - 2}, "x.pt")
    os.replace("x.pt", "runs/latest/backbone.pt")
    line = "embed --root=photos --out=x.csv"
    assert "features of photos/class0/0.jpg, or of the next" in refused(capsys, eval, line)
    assert not list(Path().glob("x.csv*"))


def test_intervals_take_any_numbers():
    values = [0, 100, 100, 100]
    expected = eval.ci95(torch.tensor(values).double())
    for same in (values, np.array(values), torch.tensor(values)):
        assert eval.ci95(same) == expected
    right = torch.arange(40) % 2 > 0
    assert eval.paired_ci95(right, ~right) == eval.paired_ci95(right.double(), (~right).double())
    raises(ValueError, "other has the shape", eval.paired_ci95, right, right[:, None])


def test_a_kept_classifier_classifies_new_images(untrained, capsys):
    photo_tree(untrained / "more", 2, 15)
    run(eval, "linear --data=folder --root=more --save=head.pt --per_class --json")
    line = results(Path())[0]
    assert sum(row["n_test"] for row in line["per_class"]) == line["n_test"]
    run(eval, "embed --root=more --classify=head.pt --out=x.csv")
    files, _, columns = read_embedded("x.csv")
    chosen = dict(zip(files, columns["class"]))
    right = [chosen[file] == file.split("/")[0] for file in opened(Path("more"), "val")[0]]
    assert np.mean(right) * 100 == pytest.approx(line["top1"])
    assert all(0.5 <= float(p) <= 1 for p in columns["probability"])
    head = torch.load("head.pt")
    wrong = [{key: x for key, x in head.items() if key != "weights"}, head | dict(classes=["x"])]
    wrong += [head | dict(w=head["w"] / 0), head | dict(b=None), head | dict(w=head["w"][0])]
    uses = "embed --root=more --classify", "linear --data=folder --root=more --save"
    for content, use in itertools.product(wrong, uses):
        torch.save(content, "wrong.pt")
        err = refused(capsys, eval, f"{use}=wrong.pt")
        assert "expected a file that `linear --save` wrote" in err
    backbone = torch.load("runs/latest/backbone.pt")
    torch.save(backbone | {"conv1.weight": backbone["conv1.weight"] + 1}, "runs/latest/backbone.pt")
    embed = "embed --root=more --classify=head.pt"
    assert "was trained on --run=" in refused(capsys, eval, embed)
    assert "nope: no such run" in refused(capsys, eval, f"{embed} --run=nope")


def test_papers_transfer_tasks_run(untrained, few):
    """Two shots of Flowers' classes are there only in train and val together."""
    flowers_tree(untrained / "downloads")  # where --download leaves it: no --root
    cub_tree(untrained)
    run(eval, "fewshot --data=flowers102 --shots=2 --trials=2 --json")
    run(eval, "linear --data=cub200 --root=. --json")
    few_shot, linear = results(untrained)
    assert (few_shot["n_train"], few_shot["n_test"], few_shot["shots"]) == (6, 6, 2)
    assert (linear["n_train"], linear["n_test"]) == (6, 3)


def test_every_task_runs_on_imagenet100(untrained, few, capsys):
    imagenet_tree(untrained / "in", few)
    for cell, (i, wnid) in itertools.product(data.CORRUPTED, enumerate(["n09999999", *few])):
        write_image(untrained / "c" / cell / wnid / f"{i}.JPEG", (40 * int(cell[-1]), 10 * i, 0))
    for name in data.OBJECTNET13:
        write_image(untrained / "on" / "images" / name / "1.png", border=RED)
    tasks = ["linear", "rotation", "knn --neighbours=3", "spaces --layer=output"]
    tasks += ["robust --corrupted=c --objectnet=on", "retrieve --queries=2"]
    for line in tasks:
        run(eval, f"{line} --data=imagenet100 --root=in --json")
    found = results(untrained)
    assert {line["n_train"] for line in found if line["task"] == "linear"} == {60}
    assert {line["n_test"] for line in found if line["task"] == "rotation"} == {60}
    on = {line["on"]: line for line in found if line["task"] == "robust"}
    assert set(on) == {"clean", "objectnet13", "objectnet13, of its 13", *eval.SUMMARIES}
    assert len(on) == 28
    assert on["objectnet13"]["n_test"] == 13
    assert on["objectnet13"]["top1"] <= on["objectnet13, of its 13"]["top1"]
    assert (on["fog"]["n_test"], on["fog"]["protocol"]) == (15, "folder")
    table = printed(capsys, eval, "table --paper").out
    assert "| MoCo + rotation | 43.3 | - | 79.4 | - |" in table
    assert "| LooC + rotation | 65.2* | - | 80.2* | - |" in table
    assert table.count("Table") == 5


def test_published_corruptions_bring_their_own_labels(untrained):
    """Their order is not that of the clean images, where those lie flat."""
    images, labels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.tensor([7, 3])
    dataset = data.ImageSet(images, torch.ones(2), {"class": labels}, {})
    ((cell, rows, crops, labels),) = eval.corrupted_images(eval.open_run(), [dataset])
    assert (cell, rows.tolist(), labels["class"].tolist()) == (0, [0, 1], [7, 3])
    assert crops.shape == (2, 3, 32, 32)


def test_robust_summarizes_by_severity_and_category(untrained):
    run(eval, "robust --label=object --pictures=100 --json")
    found = {line["on"]: line for line in results(untrained)}
    assert [found[on]["n_test"] for on in ("fog", "clean", "new viewpoint")] == [100, 128, 64]
    every = sum(data.IMAGENETC.values(), ())
    for summary, names in {**data.IMAGENETC, "all corruptions": every}.items():
        mean = sum(found[name]["top1"] for name in names) / len(names)
        assert found[summary]["top1"] == pytest.approx(mean)
    severe = itertools.product(("gaussian_noise", "shot_noise", "impulse_noise"), (3, 4, 5))
    assert len(eval.CELLS) == 75
    for name, cells in (("noise, severity 3+", severe), ("all corruptions", eval.CELLS)):
        assert list(itertools.compress(eval.CELLS, eval.SUMMARIES[name])) == list(cells)
    fog = [("fog", severity) for severity in range(1, 6)]
    assert list(itertools.compress(eval.CELLS, eval.SUMMARIES["fog"])) == fog


def test_spaces_give_a_verdict(untrained, capsys, monkeypatch):
    """Color's space holds the hue, the others nothing."""
    y, blind = torch.arange(400) % 4, torch.randn(400, 4, generator=make_generator(0)) * 0.01
    v = F.one_hot(y, 4).float()
    known_spaces = {"all": blind, "color": v, "rotation": blind.roll(1, 0)}
    monkeypatch.setattr(eval, "space_features", lambda *_: (known_spaces, {"hue": y}))
    out = printed(capsys, eval, "spaces --label=hue").out
    rows = {line["feature"]: line for line in results(untrained)}
    gain = rows["all+color+rotation"]["top1"] - rows["all+rotation"]["top1"]
    assert f"hue wants color ({gain:+.1f}" in out
    assert "does not care about rotation" in out
    pairs = {"all+color", "all+rotation", "all+color+rotation"}
    assert set(rows) == {"all", "color", "rotation"} | pairs
    assert rows["all"]["gain"] == 0
    assert rows["color"]["top1"] == 100
    assert rows["color"]["gain"] == pytest.approx(100 - rows["all"]["top1"])


def test_retrieve_counts_neighbors_and_draws_them(untrained, capsys):
    run(eval, "retrieve --against=runs/latest --queries=3 --neighbours=4 --turn --out=x.png --json")
    out, err = capsys.readouterr()
    assert "wrote x.png" in err
    drawn = TF.pil_to_tensor(Image.open(untrained / "x.png"))
    found = [json.loads(line) for line in out.splitlines()]
    assert [x["label"] for x in found] == ["object", "hue", "texture", "species", "rotation"] * 2
    assert results(untrained) == found[:5]  # the other run's are printed, not kept
    assert found[0]["top1"] == found[5]["top1"]
    # The slow twin.
    test = data.factors("test")
    turns = torch.randint(4, (128,), generator=make_generator("turns", 0))
    images = torch.stack([x.rot90(int(k), (1, 2)) for x, k in zip(test.images, turns)]) / 255
    with torch.no_grad():
        x = F.normalize(loo.encode(loo.load_encoder("runs/latest")[0], images)[0], dim=1)
    neighbors = (x @ x.T).fill_diagonal_(-2).topk(4).indices
    order = torch.randperm(128, generator=make_generator("queries", 0))
    for place, i in enumerate((order[0], *neighbors[order[0]])):  # the first row
        shown = data.to_uint8(images[i]).repeat_interleave(2, 1).repeat_interleave(2, 2)
        left = drawn.shape[2] - (9 - place) * 67
        assert torch.equal(drawn[:, 20:84, left : left + 64], shown)
    for line, label in ((found[0], test.labels["object"]), (found[4], turns)):
        same = (label[neighbors] == label[:, None]).float().mean().item()
        assert line["top1"] == pytest.approx(same * 100, abs=0.5)


def test_retrieve_shows_the_classes_that_are_named(untrained, monkeypatch):
    save = unittest.mock.Mock()
    monkeypatch.setattr(eval, "save_neighbors", save)
    run(eval, "retrieve --classes=tree,cu,tree")
    first, second, third = save.call_args.args[4]
    test = data.factors("test")
    names = [test.classes["object"][int(test.labels["object"][i])] for i in (first, second, third)]
    assert names == ["tree", "cup", "tree"]
    assert first != third


def test_labels_of_images_that_cannot_be_read_are_refused(untrained, capsys):
    """The label's name has a comma, as a list of labels has."""
    lines = [f"{name}.png,{name if name in 'ab' else ''},train" for name in "abcd"]
    lines += ["e.png,a,test", "f.png,b,test", "g.png,,test"]
    root = write_table(untrained / "photos", 'file,"x,y",split', *lines, images="abcdefg")
    for name in "ab":
        (root / f"{name}.png").write_bytes(b"broken")
    for task in ("linear", "knn", "fewshot --shots=1"):
        raises(SystemExit, "2", run, eval, f"{task} --data=folder --root=photos --label=x,y")
    err = capsys.readouterr().err
    assert err.count("no image that can be read has the label") == 2
    assert "--shots=1: x,y a has only 0 to train on" in err


def test_fewshot_leaves_out_a_label_with_too_few_images(untrained, capsys):
    rows = "a.png,x,1,train", "b.png,x,1,train", "c.png,y,1,train", "d.png,y,2,train"
    rows += "e.png,x,1,test", "f.png,y,2,test"
    write_table(untrained / "photos", "file,kind,rare,split", *rows, images="abcdef")
    err = printed(capsys, eval, "fewshot --shots=2 --trials=2 --data=folder --root=photos").err
    assert "left out: --shots=2: rare 2 has only 1 to train on" in err
    assert [line["label"] for line in results(untrained)] == ["kind"]
    named = "fewshot --shots=2 --data=folder --root=photos --label=kind,rare"
    assert "--shots=2: rare 2 has only 1" in refused(capsys, eval, named)


def gaps(factors, keep, split, *rest):
    """factors with some images without a hue, kept or left out, and none of test with a texture."""
    found = factors(split, *rest)
    hue = found.labels["hue"].clone()
    hue[::3] = -1
    if split == "train":
        hue[hue == 3] = -1  # the last, which is never trained on
    texture = torch.full_like(hue, -1) if split == "test" else found.labels["texture"]
    rows = (hue >= 0) | keep
    labels = found.labels | dict(hue=hue, texture=texture)
    labels = {name: y[rows] for name, y in labels.items()}
    return found._replace(images=found.images[rows], labels=labels)


def test_every_task_takes_the_images_that_have_the_label(untrained, capsys, monkeypatch):
    monkeypatch.setattr(data, "FACTORS", data.FACTORS | {"train": 540, "val": 32})
    factors, titles = data.factors, []
    monkeypatch.setattr(data, "factors", functools.partial(gaps, factors, True))
    monkeypatch.setattr(eval, "image_grid", lambda _, names, *rest, **zoom: titles.extend(names))
    tasks = ["knn", "linear --label=hue", "spaces --label=hue", "robust --label=hue --pictures=5"]
    tasks += ["linear --label=hue --protocol=paper --epochs=1"]
    for line in (*tasks, "fewshot --label=hue --shots=2 --trials=2"):
        run(eval, line)
    err = refused(capsys, eval, "robust --label=hue --pictures=1")
    assert "these test images have no hue" in err
    run(eval, "retrieve --label=hue --queries=32")
    known = [data.factors(split).labels["hue"] >= 0 for split in ("train", "test")]
    n_train, n_test = (int(labeled.sum()) for labeled in known)
    found = results(untrained)
    hue = [line for line in found if line["label"] == "hue"]
    trained = [line for line in hue if line["task"] in ("linear", "knn", "spaces", "robust")]
    assert {line["n_train"] for line in trained} == {n_train}
    assert {line["protocol"] for line in trained} >= {"fast", "paper, epochs 1"}
    assert n_train < 400
    corrupted = [line for line in hue if line["task"] == "robust" and line["on"] in eval.SUMMARIES]
    assert {line["n_test"] for line in corrupted} == {3}
    others = [line for line in hue if line["task"] in ("linear", "knn", "fewshot", "spaces")]
    assert {line["n_test"] for line in others} == {n_test}
    assert "" in titles and set(titles) - {""}
    titles.clear()
    run(eval, "retrieve --label=object,hue --queries=32")
    assert any(", " in title for title in titles)
    assert any(", " not in title for title in titles)  # the object alone where no hue is known
    assert [x["label"] for x in found if x["task"] == "knn"] == ["object", "hue", "species"]
    assert "none of test has it" in refused(capsys, eval, "knn --label=texture")
    # As if the others were not there.
    monkeypatch.setattr(data, "factors", functools.partial(gaps, factors, False))
    run(eval, "knn --label=hue")
    again = results(untrained)[-1]
    first = next(line for line in hue if line["task"] == "knn")
    assert first["top1"] == pytest.approx(again["top1"])


# ---------------------------------------------------------------- eval.py: table and claims

RESULT = dict(task="linear", data="factors", label="hue", on=None, shots=None, method="looc")
RESULT |= dict(groups=["color"], feature="v", protocol="fast", seed=0, top1=50.0)


def write_run(folder, config, *lines):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "results.jsonl").write_text(to_jsonl(RESULT | line for line in lines))


PROTOCOLS = [("fewshot", "adam", "v", "50.0 (fast)"), ("fewshot", "paper", "v", "50.0")]
PROTOCOLS += [("robust", "folder", "v", "50.0 (fast)"), ("linear", "fast", "v", "50.0 (fast)")]
PROTOCOLS += [("robust", "generated", "v", "50.0 (generated)")]
PROTOCOLS += [("linear", "paper, epochs 2", "v", "50.0 (paper, epochs 2)")]
PROTOCOLS += [("spaces", "fast", "all+color", "50.0 (fast)")]


@pytest.mark.parametrize("task, protocol, feature, cell", PROTOCOLS)
def test_what_is_not_the_papers_protocol_is_marked(task, protocol, feature, cell, monkeypatch):
    line = RESULT | dict(task=task, protocol=protocol, feature=feature)
    monkeypatch.setitem(eval.COLUMNS, "hue", (task, "factors", "hue", None, None, "top1"))
    assert eval.papers_cell([line], ("looc", ("color",), feature), "hue") == cell


def test_table_keeps_folders_apart(here, capsys):
    """Runs on different folders, and one run judged on two, each in a cell of their own."""
    x, y = (dict(data="folder", label="class", root=root) for root in ("x", "y"))
    write_run(here / "a", x, x | dict(top1=11.0))
    write_run(here / "b", y, y | dict(top1=22.0), x | dict(top1=33.0))
    out = printed(capsys, eval, "table --runs=a,b").out
    assert "| looc | color | v | root x | 1 | 11.0 | - |" in out
    assert "| looc | color | v | root y | 1 | 22.0 | 33.0 |" in out
    assert "linear class on folder x" in out


def test_table_keeps_settings_apart_and_leaves_out_broken_runs(untrained, capsys):
    run(eval, "knn --label=hue")
    run(eval, "knn --label=hue --neighbours=1")
    out, err = printed(capsys, eval, "table --runs=runs/latest,rum")
    assert "| knn hue | knn hue (knn, neighbours 1) |" in out
    assert err == "warning: --runs=rum: no results.jsonl there\n"
    for config in ("", "[]", "{}"):
        write_run(Path("runs/other"), {})
        Path("runs/other/config.json").write_text(config)
        Path("runs/other/results.jsonl").write_bytes(to_jsonl([RESULT, None]).encode() + b"\xff\n")
        out, err = printed(capsys, eval, "table")
        assert "runs/other: its config.json is no run's" in err
        assert "hue" in out


def test_table_takes_lines_that_lack_what_may_be_absent(here, capsys):
    write_run(here / "runs" / "a", dict(data="factors", root=None))
    line = {k: RESULT[k] for k in (*eval.TYPES, "top1")}
    Path("runs/a/results.jsonl").write_text(to_jsonl([line]))
    assert f"| 1 | {RESULT['top1']:.1f} |" in printed(capsys, eval, "table").out


def test_table_names_a_run_that_another_hides(here, capsys):
    """Also where names of folders hold what patterns are made of."""
    for name, top1 in (("a,b", 11.0), ("c[1]", 22.0), ("d", 33.0)):
        write_run(here / name, dict(data="factors", root=None), dict(top1=top1))
        os.utime(here / name / "results.jsonl", (top1, top1))
    out, err = printed(capsys, eval, "table --runs=a,b,c[1]")
    assert "| 1 | 22.0 |" in out
    why = "have the same settings and seed: the table shows the second"
    assert err == f"warning: {here}/a,b and {here}/c[1] {why}\n"
    assert "| 1 | 33.0 |" in printed(capsys, eval, "table --runs=[d]").out


def test_table_knows_a_folder_by_its_images(here, capsys):
    """Two seeds, each from a copy of its own, share a row; images added make another."""
    for seed, (root, mark) in enumerate([("x", "one"), ("y", "one"), ("y", "more")]):
        images = dict(data="folder", root=root, held={"root": [9, mark]}, seed=seed)
        line = dict(data="folder", label="class", root=root, images=mark, top1=seed + 1.0)
        write_run(here / f"run{seed}", images, line)
    head, _, row = printed(capsys, eval, "table --runs=run0,run1").out.splitlines()
    assert head.count("linear") == 1
    assert row.startswith("| looc | color | v |  | 2 | 1.5 +- ")
    _, _, one, more = printed(capsys, eval, "table --runs=run1,run2").out.splitlines()
    assert one == "| looc | color | v | root y | 1 | 2.0 |"
    assert more == "| looc | color | v | root y (more) | 1 | 3.0 |"
    line |= dict(images="one", tested="two")
    images |= dict(held={"root": [9, "one"]})
    write_run(here / "run2", images, line | dict(tested="2"), line)
    out = printed(capsys, eval, "table --runs=run2").out
    assert "linear class on folder y (test images two)" in out
    line |= dict(tested=None)
    write_run(here / "run2", images, line, line | dict(labeled="3"), line | dict(labeled="4"))
    assert "linear class on folder y (labels 4)" in printed(capsys, eval, "table --runs=run2").out
    one = data.ImageSet(None, None, {"x": torch.tensor([0, 1])}, {"x": ["a", "b"]})
    other = one._replace(labels={"x": torch.tensor([1, 1])})
    assert eval.label_mark(one, "x") != eval.label_mark(other, "x")


def test_claims_are_judged_on_the_images_of_the_training(tmp_path):
    write_run(tmp_path, dict(data="folder", root="x"), dict(root="x", top1=1.0), dict(root="y"))
    assert [line["top1"] for line in eval.own_results(tmp_path)] == [1.0]


def test_table_names_what_was_trained_unlike(here, capsys):
    """A supervised run is named by its label, and `always` where it is not the default."""
    same = dict(method="supervised", groups=["color"], data="factors", root=None)
    for name, label, count in (("a", "hue", 3), ("b", "object", 3), ("c", "object", 2)):
        always = ["crop", "flip", "blur"][:count]
        write_run(here / name, dict(same, label=label, always=always), same)
    out = printed(capsys, eval, "table --runs=a,b,c").out
    assert "| supervised (hue) | color | v | always default | 1 |" in out
    assert "| supervised (object) | color | v | always default | 1 |" in out
    assert "| supervised (object) | color | v | always default -blur | 1 |" in out


def test_curves_lay_runs_side_by_side(here, capsys, monkeypatch):
    records = [dict(step=step, loss=[3.0, 2.0, 1.0], win=[0.5] * 3, lr=0.1) for step in (5, 10)]
    log, cut = to_jsonl(records), to_jsonl([dict(step=1, loss=[1.0], lr=0.1)]) + '{"step": 2, "lo'
    runs = {"a": (dict(batch=8), log), "b": (dict(batch=16), log), "empty": ({}, "")}
    runs |= {"c": (dict(method="supervised", label="hue"), cut), "broken": ({}, "{}")}
    for name, (config, text) in runs.items():
        write_run(here / "runs" / name, config)
        (here / "runs" / name / "log.jsonl").write_text(text)
    Path("runs/broken/config.json").write_text("{}")
    Path("runs/latest").symlink_to("b")
    draw = unittest.mock.Mock(wraps=data.draw_curves)
    monkeypatch.setattr(eval, "draw_curves", draw)
    out, err = printed(capsys, eval, "curves --out=x.png")
    assert out == "wrote x.png\n"
    assert "line 2 is not whole" in err
    assert "runs/broken: its config.json is no run's (it lacks method, groups, batch)" in err
    panels, *_, columns = draw.call_args.args
    of_spaces = [f"loss of {space}" for space in ("all", "color", "rotation", "hue")]
    assert list(panels)[:columns] == of_spaces
    assert panels["loss of color"] == {"a": [(40, 2.0), (80, 2.0)], "b": [(80, 2.0), (160, 2.0)]}
    assert panels["loss of hue"] == {"c": [(16, 1.0)]}
    assert not panels["top-1 of hue"]
    assert list(panels["learning rate of all spaces"]) == ["a", "b", "c"]
    for color in data.COLORS[:3]:
        assert len(pixels_of("x.png", color))
    assert "is no file" in refused(capsys, eval, "curves --out=runs")
    for missing in ("nope", "runs/empty"):
        assert "python loo.py train" in refused(capsys, eval, f"curves --runs={missing}")


def test_claims_name_rows_and_columns_that_there_are():
    assert len(eval.TABLES) == len(eval.CLAIMS)
    for (_, _, rows), (columns, claims) in zip(eval.TABLES, eval.CLAIMS):
        assert set(columns) <= set(eval.ON_FACTORS)
        for row, sign, others, some in sum(claims.values(), []):
            assert {row, *others} <= set(rows)
            assert set(some) <= set(columns)
            assert sign in (">", ">=")


def test_claims_on_other_images_keep_what_can_be_said_there(tmp_path):
    labels = eval.parse_labels("folder", ["hue=tone", "object=kind"])
    tables = eval.claimed_tables("folder", labels)
    columns = [" ".join(columns) for _, _, columns, _ in tables]
    assert columns == ["rotation kind", "tone rotation kind", "kind tone rotation"]
    assert tables[1][2]["tone"] == ("linear", "folder", "tone", None, None, "top1")
    said = {claim: comparisons for *_, claims in tables for claim, comparisons in claims.items()}
    looc, moco = "LooC (color, rotation)", ["MoCo (color, rotation)"]
    wanted = [(looc, ">", moco, ["tone", "rotation"]), (looc, ">=", moco, ["kind"])]
    assert said["LooC beats MoCo with the same groups, without losing kind"] == wanted
    assert not any("texture" in str(rows) or "MoCo (all)" in rows for _, rows, *_ in tables)
    assert len(said) == 8
    everything = eval.wanted_cells(tables)
    assert {task for cells in everything.values() for task in cells} == {"rotation", "linear"}
    chains = eval.missing_commands(tmp_path, (1,), {"data": "folder"}, tables)
    assert all("--data=folder" in train for train, *_ in chains)
    assert "None" not in str(chains)


def test_claims_on_other_images_name_their_labels(here, capsys):
    there = "claims --data=folder --root=emoji"
    assert "--labels names the labels of folder" in refused(capsys, eval, there)
    assert "--labels names" in refused(capsys, eval, f"{there} --labels=hue=tone")
    assert "--labels names" in refused(capsys, eval, f"{there} --labels=object=kind,hue")
    assert "--labels=color" in refused(capsys, eval, f"{there} --labels=color=tone,object=kind")
    assert "another data set" in refused(capsys, eval, "claims --labels=object=kind")
    assert "reads no folder" in refused(capsys, eval, "claims --root=.")
    assert "needs --root" in refused(capsys, eval, "claims --data=folder --labels=object=kind")
    folder_of(here / "emoji", a=9, b=9)
    assert "--labels=kind" in refused(capsys, eval, f"{there} --labels=object=kind")
    assert not Path("runs").exists()


def test_claims_train_each_row_once_and_go_on(tmp_path):
    folder, trained = tmp_path / "moco-color-2", set()
    for _, _, rows in eval.TABLES:
        trained |= {(method, groups) for method, groups, *_ in rows.values()}
    tables = eval.claimed_tables("factors", eval.parse_labels("factors", None))
    assert len(eval.missing_commands(tmp_path, (1, 2), {}, tables)) == 2 * len(trained)

    def mine(**flags):
        chains = eval.missing_commands(tmp_path, (1, 2), flags, tables)
        return next(chain for chain in chains if f"--run={folder}" in str(chain))

    def mine_with(**line):
        line = dict(RESULT, run=folder.name, method="moco") | line
        (folder / "results.jsonl").write_text(json.dumps(line))
        return mine()

    train, *tasks = mine(epochs=3)
    flags = f"--method=moco --groups=color --seed=2 --out={folder} --epochs=3"
    assert train == ["loo.py", "train", *flags.split()]
    flags = f"--run={folder} --seed=2 --label=object --pictures=1024"
    assert ["eval.py", "robust", *flags.split()] in tasks
    folder.mkdir()
    config = loo.default_config(method="moco", groups=("color",), seed=2, out=str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "heads.pt").touch()
    assert mine() == tasks
    rotation = dict(task="rotation", label="rotation")
    assert mine_with(**rotation) == [task for task in tasks if task[1] != "rotation"]
    assert mine_with(**rotation, protocol="paper") == tasks
    # Stopped in the middle of robust.
    assert mine_with(task="robust", label="object", on="clean", protocol=ROBUST) == tasks
    raises(UserError, "--epochs=3 .the run has 18.", mine, epochs=3)


def claim(text, without=()):
    """The verdict and why, from the top-1 of three seeds a row, without the cells (row, seed)."""
    rows = dict(a=(60.0, 70, 80), b=(58.0, 68.5, 77.5), c=(60.5, 70.4, 80.6), d=(50.0, 70, 90))
    rows |= dict(e=(61.5, 71.5, 81.6), f=(), g=(66.5, 76.5, 86.7))
    cells = {(name, "x"): dict(enumerate(values)) for name, values in rows.items()}
    for name, seed in without:
        cells[name, "x"].pop(seed)
    row, sign, others = text.split(" ", 2)
    return eval.judge_claim(cells, [(row, sign, others.split(" & "), ["x"])])


CLAIMED = [("a > b", "holds"), ("b > a", "does not hold"), ("a > d", "cannot tell")]
CLAIMED += [("a >= c", "holds"), ("a > c", "does not hold"), ("a >= e", "does not hold")]
CLAIMED += [("a > b & d", "cannot tell"), ("a > b & c & d", "does not hold")]
CLAIMED += [("a > f", "cannot tell")]  # of which nothing is known
CLAIMED += [("a > c & b & b & b & b", "cannot tell")]  # one of five may be below by chance


@pytest.mark.parametrize("text, verdict", CLAIMED)
def test_a_claim_is_decided_by_paired_intervals_and_the_weakest_row(text, verdict):
    assert claim(text)[0] == verdict


def test_a_verdict_says_why():
    half = 4.302653 * 0.5 / math.sqrt(3)  # differences 2, 1.5, 2.5; two degrees of freedom
    assert claim("a > b")[1] == f"x +2.0 +- {half:.1f} (3 of 3 seeds), a over b"
    assert claim("a >= e")[1] == "x -1.5 +- 0.1 (0 of 3 seeds above -1), a over e"
    assert claim("b >= a & e & g")[1].startswith("x -8.6 +- 1.5")
    assert claim("b >= e & g")[1].endswith("x -3.5 +- 1.4 (0 of 3 seeds above -1), b over e")
    # Only one seed is left that both have.
    alone = claim("a > b", without=[("a", 0), ("b", 1)])
    assert alone == ("cannot tell", "x +2.5 (1 of 1 seeds), a over b")
    # Nothing known at all comes first.
    why = claim("a > b & f & d")[1]
    assert why.index("over f") < why.index("over d")


ROBUST = "generated, pictures 1024"


def known_results():
    """Lines for every cell of every table, but of the first row; their values are known."""
    lines = []
    for (_, _, rows), (columns, _) in zip(eval.TABLES, eval.CLAIMS):
        numbered = list(enumerate(rows.values()))[1:]
        for (i, row), column in itertools.product(numbered, columns):
            method, groups, feature, *_ = row
            task, where, label, shots, on, _ = eval.ON_FACTORS[column]
            line = dict(data=where, label=label, shots=shots, on=on, method=method, groups=groups)
            line |= dict(task=task if feature == "v" else "spaces", feature=feature)
            line["protocol"] = {"fewshot": "adam", "robust": ROBUST}.get(task, "fast")
            value = 10 + 7 * len(column) % 13 + 30 * (method == "looc")
            for seed in range(4):
                # No two rows differ by the same in every seed, which would say nothing.
                top1 = value + seed * (1 + i / 1000)
                lines.append(line | dict(seed=seed, budget="small", top1=top1))
                lines.append(line | dict(seed=seed, budget="large", top1=0.0))
    return lines + [line | dict(protocol="paper", top1=99.0) for line in lines]


def test_claims_print_what_the_results_hold(here, capsys):
    lines = known_results()
    Path("all.jsonl").write_text(to_jsonl(lines))
    command = "claims --results=all.jsonl --first=1 --seeds=2"
    out = printed(capsys, eval, command).out
    half = 12.7062 * math.sqrt(0.5) / math.sqrt(2)
    assert f"| LooC (color) | 2 | {41.5 + 7 * len('hue') % 13:.1f} +- {half:.1f} |" in out
    assert "| MoCo (color) | 2 |" in out
    assert "| supervised | 0 | - | - |" in out  # of which there is no run
    verdicts = [line.split("**")[1] for line in out.splitlines() if line.startswith("- ")]
    assert verdicts == ["cannot tell"] * 5 + ["does not hold"] + ["holds"] * 5 + ["cannot tell"] * 5
    assert out.splitlines()[-1] == "16 claims: holds 5, does not hold 1, cannot tell 10"
    assert not Path("runs").exists()
    held = "factors large 0, factors large 1, factors large 2, factors large 3, factors small 0"
    nothing = f"nothing of --data=factors --budget=small and seeds 7 to 11; it holds {held}"
    assert nothing in refused(capsys, eval, "claims --results=all.jsonl --first=7")
    # A cell may be missing.
    some = (line for line in lines if (line["seed"], line["label"]) != (2, "hue"))
    Path("all.jsonl").write_text(to_jsonl(some))
    assert "| LooC (color) | 1 to 2 |" in printed(capsys, eval, command).out


def test_claims_from_training_to_tables(here, monkeypatch, capsys):
    """The commands that it plans fill every cell of two rows, and are not planned again."""
    moco = {"MoCo": ("moco", ("color",), "v")}
    pair = {some: ("looc++", ("color",), some) for some in ("all", "all+color")}
    tables = [(title, c, pair if "all" in rows else moco) for title, c, rows in eval.TABLES]
    monkeypatch.setattr(eval, "TABLES", tuple(tables))
    claims = []
    for (columns, _), (_, _, rows) in zip(eval.CLAIMS, tables):
        row = next(iter(rows))
        claims.append((columns, {"it is itself": [(row, ">=", [row], ["object"])]}))
    monkeypatch.setattr(eval, "CLAIMS", tuple(claims))
    tiny = dict(epochs=1, size=16, queue=16, hidden=16, dim=8)
    monkeypatch.setitem(eval.BUDGETS, "small", tiny)
    done, kept = [], Path("claims/small.jsonl")

    def run_here(chains):
        for script, *words in itertools.chain(*chains):
            done.append(words[0])
            run({"loo.py": loo, "eval.py": eval}[script], shlex.join(words))

    monkeypatch.setattr(eval, "run_all", run_here)
    out = printed(capsys, eval, "claims --seeds=1 --out=claims").out.split("Table 1", 1)[1]
    assert sorted(done) == ["fewshot", "linear", "robust", "rotation", "spaces", "train", "train"]
    assert " - |" not in out
    assert out.count("| 1 |") == 6
    run(eval, "claims --seeds=1 --out=claims")
    assert len(done) == 7
    assert {line["budget"] for line in loo.read_jsonl(kept)} == {"small"}
    aside = loo.move_aside(Path("claims/small/moco-color-31"))  # as --fresh does
    assert aside.name == "moco-color-31.1"
    fail = unittest.mock.Mock(side_effect=UserError("one failed"))
    monkeypatch.setattr(eval, "run_all", fail)
    raises(UserError, "one failed", eval.claims, seeds=1, first=41, out="claims")
    assert {line["method"] for line in loo.read_jsonl(kept)} == {"looc++"}


# ---------------------------------------------------------------- processes


def test_loo_alone_runs_beside_a_foreign_package_called_data(tmp_path):
    shutil.copy(loo.__file__, tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").touch()
    script = """if True:
        import torch, loo
        role = loo.methods(("color", "rotation"))["looc"].role
        q, k, queue = torch.eye(4).expand(3, 4, 4), torch.ones(3, 3, 4, 4) / 2, torch.zeros(3, 5, 4)
        print(loo.__file__, loo.multi_space_loss(q, k, queue, role, 0.2).isfinite().tolist())
        try:
            loo.train()
        except loo.UserError as error:
            print(error)
    """
    options = dict(cwd=tmp_path, capture_output=True, text=True)
    done = subprocess.run([sys.executable, "-c", script], **options)
    assert done.stderr == ""
    computed, refusal = done.stdout.splitlines()
    assert computed == f"{tmp_path / 'loo.py'} [True, True, True]"
    assert refusal.startswith(f"`import data` finds {tmp_path / 'data' / '__init__.py'}, not")


def spawn(function, size, *arguments):
    """function(rank, size, port, *arguments) in `size` processes."""
    # They are slow to import: once for all.
    multiprocessing.set_forkserver_preload(["torch", "torchvision", "pytest", "einops", "fire"])
    start = torch.multiprocessing.start_processes
    start(function, (size, get_free_port(), *arguments), size, start_method="forkserver")


def some_steps(rank, size, port, out):
    """Of each method in float64, and what is left of each; then features of some images."""
    torch.set_num_threads(1)
    if size > 1:  # what torchrun sets
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    images = data.factors("val", 16, 48).images.double() / 255
    aspect = torch.linspace(0.7, 1.4, 48)
    stop = contextlib.suppress(SystemExit)
    with stop, loo.init_distributed("cpu") as leader_first:
        for method in TRAINED:
            supervised, losses = method == "supervised", []
            config = CONFIG | dict(method=method, drop_equal=method == "looc++")
            config |= dict(size=16, queue=24, precision="float64")
            state = loo.init_state(config, 3 if supervised else 0)
            while state.step < 4:
                rows = (torch.arange(16) + 7 * state.step) % 48
                if supervised:
                    rows = rows[loo.rank_slice(16)]
                    batch = images[rows], aspect[rows], rows % 3
                    state, (loss, *_) = loo.supervised_step(state, *batch, config)
                else:
                    rows = rows[loo.rank_rows(config, state.step).images]
                    state, (loss, *_) = loo.train_step(state, images[rows], aspect[rows], config)
                losses += loo.all_reduce_mean([loss.clone()])
            loo.save_checkpoint(state._replace(total=torch.stack(losses)), config, out / method)
            if rank == 0:
                encoder = loo.unwrap_model(state.encoder_q)
                gradients = {name: p.grad for name, p in encoder.named_parameters()}
                torch.save(gradients, out / method / "gradients.pt")
        torch.manual_seed(0)
        encoder = loo.Encoder("small", spaces=3, hidden=16, dim=8)
        features = eval.features(encoder, data.factors("val", 32, 300), batch=64)
        torch.save(features, out / f"features-{rank}.pt")
        config |= dict(hidden=16, dim=8, method="looc")
        run = dict.fromkeys(eval.EvalContext._fields) | dict(encoder=encoder, config=config)
        ctx = eval.EvalContext(**run | dict(feature="v", seed=0, data="factors"))
        for task, y in (("turned", None), ("labels", torch.arange(48) % 3)):
            dataset = data.ImageSet((images * 255).byte(), aspect, {}, {})
            head = eval.sgd_probe(ctx, dataset, y, 4, 128, epochs=2, batch=16)
            torch.save(head, out / f"{task}-{rank}.pt")
        paths = data.image_paths(out.parent / "photos")
        where = paths, out / "embedded", 0, leader_first
        eval.embed_files(encoder.eval(), dict(size=32), "v", *where)
        raise SystemExit(128 + signal.SIGTERM)  # as after a signal
    assert not torch.distributed.is_initialized()


def test_world_size_changes_nothing(tmp_path):
    """N processes with a part of each batch, and of the images to extract, against one with all."""
    photo_tree(tmp_path / "photos", 3, 50)
    for size in (1, 2, 4):
        spawn(some_steps, size, tmp_path / str(size))
        embedded = (tmp_path / str(size) / "embedded").read_bytes()
        assert embedded == (tmp_path / "1" / "embedded").read_bytes()
    for method, size in itertools.product(TRAINED, (2, 4)):
        folders = tmp_path / "1" / method, tmp_path / str(size) / method
        one, many = map(read_checkpoint, folders)
        for part in (*ENCODERS, "classifier", "queue", POINTER, "step", "total"):
            assert_close(many[part], one[part], rtol=1e-10, atol=1e-10)
        momenta = (saved["optimizer"]["state"] for saved in (many, one))
        gradients = (torch.load(folder / "gradients.pt") for folder in folders)
        assert_close(*momenta, rtol=1e-10, atol=1e-10)
        assert_close(*gradients, rtol=1e-10, atol=1e-10)
    for task, size in itertools.product(("turned", "labels"), (2, 4)):
        one, many = (torch.load(tmp_path / x) for x in (f"1/{task}-0.pt", f"{size}/{task}-1.pt"))
        assert_close(many, one, rtol=1e-3, atol=1e-3)
    alone = torch.load(tmp_path / "1" / "features-0.pt")
    for rank in ("2/features-0.pt", "2/features-1.pt", "4/features-3.pt"):
        assert_close(torch.load(tmp_path / rank), alone)


# A shell's & makes a program ignore SIGINT.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {folder!r})
import data, loo
data.FACTORS["train"] = 400
data.command_line({{"train": loo.train}})
"""


def program(line, ranks=None, **variables):
    """The training on 400 images as a process of its own, or as `ranks` of them under torchrun."""
    Path("program.py").write_text(PROGRAM.format(folder=str(Path(__file__).parent)))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *(launch if ranks else []), "program.py", *line.split()]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    environ = dict(os.environ, OMP_NUM_THREADS="1", **variables)
    return subprocess.Popen(command, env=environ, **streams)


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_killed_at_any_moment_and_resumed_is_uninterrupted(here):
    """kill -9 at random moments, while checkpoints are written too: one a step."""
    line = f"train --epochs=1 --save_every=1 {QUICK}"
    assert program(f"{line} --out=whole").wait(60) == 0
    chance, kills = random.Random(0), 0
    while True:
        process = program(f"{line} --out=parts")
        wait_for(here / "parts" / "checkpoint.pt", process)
        patience = chance.uniform(0, 1.5) + (2 if kills else 0)
        try:
            process.wait(patience if kills < 2 else 60)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert process.returncode == 0
    assert kills
    same_run("whole", "parts")


def test_two_processes_then_one_then_two_is_one(here):
    """Killed on two ranks, ended by a signal on one, finished on two of srun; in float64."""
    line = f"train --epochs=1 --save_every=5 --precision=float64 {QUICK}"
    whole, process = program(f"{line} --out=whole"), program(f"{line} --out=parts", ranks=2)
    wait_for(here / "parts" / "checkpoint.pt", process)
    pgrep = ["pgrep", "-P", str(process.pid)]
    workers = subprocess.run(pgrep, capture_output=True, text=True).stdout.split()
    os.kill(int(workers[1]), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode
    assert "on 2 processes" in said
    process = program(f"{line} --out=parts")
    while "resuming parts at step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    step = dict(SLURM_JOB_ID=str(os.getpid()), SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2")
    tasks = [program(f"{line} --out=parts", SLURM_PROCID=str(i), **step) for i in range(2)]
    first, second = (process.communicate(timeout=90)[0] for process in tasks)
    assert "resuming parts at step" in first
    assert "on 2 processes" in first
    assert second == ""
    assert [process.wait(60) for process in (whole, *tasks)] == [0, 0, 0]
    one, many = (read_checkpoint(here / out) for out in ("whole", "parts"))
    assert one["step"] == many["step"] == 50
    for part in (*ENCODERS, "queue", POINTER):
        assert_close(many[part], one[part], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_a_last_checkpoint(number, here):
    process = program(f"train --epochs=500 --fresh true --out=run {QUICK}")
    while "step" not in process.stdout.readline() or not (here / "run" / "log.jsonl").exists():
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(number)
    *_, said, resume_with = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 128 + number
    assert number.name in said
    assert f"step {read_checkpoint(here / 'run')['step']}," in said
    assert resume_with.startswith("resume with: python")
    assert "--epochs=500 --out=run" in resume_with
    assert "true" not in resume_with  # of --fresh


def test_claims_run_one_command_after_the_other_and_stop_with_it(here):
    wrong, right = ["loo.py", "methods", "--groups=colour"], ["loo.py", "methods"]
    message = "1 of 2 commands failed.*--groups=colour ended with 2: error: .*did you mean color"
    raises(UserError, message, eval.run_all, [[wrong, right], [right]])
    out = here / "run"

    def stop():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not loo.read_jsonl(out / "log.jsonl"):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    train = f"loo.py train --epochs=30 --size=8 {TINY} --out={out}"
    raises(SystemExit, "143", eval.run_all, [[train.split(), ["loo.py", "nothing"]]])
    assert (out / "checkpoint.pt").exists()
    assert not (out / "heads.pt").exists()
