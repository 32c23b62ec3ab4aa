"""Every clever line's slow twin. `python -m pytest`"""

import colorsys
import itertools
import json
import math
import multiprocessing
import os
import random
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image

import data
import eval as judge
import loo
from loo import UserError, generator

torch.set_num_threads(1)  # the tensors are small: other threads would only wait for each other
ALL = ("color", "rotation")


def unit(*shape, seed=0):
    return F.normalize(
        torch.randn(*shape, dtype=torch.float64, generator=generator("test", seed)), dim=-1
    )


# ---------------------------------------------------------------- 1. one number, two ways


def naive_loss(q, k, queue, role, tau):
    """Section 3, word for word, with Python's floats."""
    losses = []
    for s in range(len(q)):
        total = 0.0
        for b in range(q.shape[1]):
            e = lambda key: math.exp(
                sum(x * y for x, y in zip(q[s, b].tolist(), key.tolist())) / tau
            )
            near = [(role[s][v], e(k[s, v, b])) for v in range(k.shape[1])]
            positive = sum(x for r, x in near if r == 1)
            total -= math.log(
                positive / (sum(x for r, x in near if r != 0) + sum(e(key) for key in queue[s]))
            )
        losses.append(float(total / q.shape[1]))
    return losses


@pytest.mark.parametrize("name", ["moco", "moco++", "looc", "looc++"])
def test_loss_is_the_papers_equation(name):
    method = loo.methods(ALL)[name]
    s, v = method.role.shape
    q, k, queue = unit(s, 4, 8), unit(s, v, 4, 8, seed=1), unit(s, 6, 8, seed=2)
    ours = loo.multi_space_loss(q, k, queue, method.role, 0.2)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(
        ours,
        torch.tensor(naive_loss(q, k, queue, method.role.tolist(), 0.2), dtype=torch.float64),
        rtol=1e-12,
        atol=1e-12,
    )


def test_one_space_is_mocos_cross_entropy():
    q, k, queue = unit(1, 5, 16), unit(1, 1, 5, 16, seed=1), unit(1, 32, 16, seed=2)
    logits = torch.cat([(q[0] * k[0, 0]).sum(1, keepdim=True), q[0] @ queue[0].T], 1) / 0.2
    ours = loo.multi_space_loss(q, k, queue, torch.ones(1, 1, dtype=torch.long), 0.2)
    torch.testing.assert_close(ours[0], F.cross_entropy(logits, torch.zeros(5, dtype=torch.long)))


def test_random_vectors_lose_the_log_of_their_number():
    """With tau 1 and 512 dimensions all similarities are about 0: log(1 + near negatives + queue)."""
    role = loo.methods(ALL)["looc"].role
    loss = loo.multi_space_loss(
        unit(3, 64, 512), unit(3, 3, 64, 512, seed=1), unit(3, 100, 512, seed=2), role, 1.0
    )
    torch.testing.assert_close(
        loss, torch.tensor([101.0, 103.0, 103.0]).double().log(), atol=0.01, rtol=0
    )


def test_loss_in_bfloat16_is_computed_in_float32():
    q, k, queue, role = (
        unit(1, 64, 32),
        unit(1, 1, 64, 32, seed=1),
        unit(1, 500, 32, seed=2),
        torch.ones(1, 1, dtype=torch.long),
    )
    with torch.autocast("cpu", torch.bfloat16):
        low = loo.multi_space_loss(q.bfloat16(), k.bfloat16(), queue.float(), role, 0.1)
    assert low.dtype == torch.float32
    exact = loo.multi_space_loss(q.bfloat16().double(), k.bfloat16().double(), queue, role, 0.1)
    torch.testing.assert_close(low.double(), exact, atol=1e-5, rtol=1e-5)


def test_role_by_image_masks_equal_draws():
    method = loo.methods(ALL)["looc"]
    draws = {
        "color": {"hue": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.1, 0.2], [0.5, 0.6]])},
        "rotation": {"turns": torch.tensor([[1, 0], [1, 2], [3, 0], [1, 0]])},
    }
    role = loo.drop_equal(method.role, draws, method)
    assert role[:, :, 0].tolist() == [[1, 0, 0], [-1, 1, -1], [0, -1, 1]]
    assert role[:, :, 1].tolist() == [[1, 0, 0], [-1, 1, -1], [-1, 0, 1]]
    q, k, queue = unit(3, 2, 8), unit(3, 3, 2, 8, seed=1), unit(3, 6, 8, seed=2)
    each = [
        naive_loss(q[:, b : b + 1], k[:, :, b : b + 1], queue, role[:, :, b].tolist(), 0.2)
        for b in range(2)
    ]
    torch.testing.assert_close(
        loo.multi_space_loss(q, k, queue, role, 0.2),
        torch.tensor(each, dtype=torch.float64).mean(0),
    )


def test_watch_counts_wins_and_mass():
    q = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    k = torch.tensor(
        [[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]]
    )  # the positive wins for image 0, a near negative for image 1
    seen = loo.contrast_metrics(q, k, torch.tensor([[[0.0, 1.0]]]), torch.tensor([[1, -1]]), 1.0)
    assert (
        seen["win_near"].tolist() == [0.5]
        and seen["win_far"].tolist() == [0.5]
        and seen["win"].tolist() == [0.5]
    )
    e = math.e
    torch.testing.assert_close(seen["mass_near"], torch.tensor([(1 / (e + 2) + e / (e + 2)) / 2]))


# ---------------------------------------------------------------- 2. sharing is exact


def test_methods_are_the_papers_tables():
    table = loo.methods(ALL, same=("rotation",))
    assert table["looc"].share.int().tolist() == [[0, 0], [1, 0], [0, 1]]
    assert table["looc"].role.tolist() == [[1, 0, 0], [-1, 1, -1], [-1, -1, 1]]
    assert table["moco"].share.int().tolist() == [[0, 0]] and table["moco"].role.tolist() == [[1]]
    assert table["moco_same"].share.int().tolist() == [[0, 1]] and table[
        "moco++"
    ].role.tolist() == [[1], [1], [1]]
    assert all((m.role == 1).sum(1).eq(1).all() for m in table.values())


def test_shared_draws_are_equal_and_the_others_are_not():
    method = loo.methods(ALL)["looc"]
    images = torch.rand(64, 3, 32, 32, generator=generator(0))
    _, _, draws = loo.augment_groups(images, ALL, method.share, generator(1))
    for g, name in enumerate(ALL):
        for parameter in draws[name].values():
            for v in range(3):
                assert torch.equal(parameter[1 + v], parameter[0]) == bool(method.share[v, g]), (
                    name,
                    v,
                )
    for name in ("crop", "flip", "blur"):
        assert all(
            not torch.equal(p[1 + v], p[0]) for p in draws[name].values() for v in range(3)
        ), name


def test_sharing_is_seen_in_pixels():
    """Without crop, flip and blur, the view that shares both groups is the query, and the one that shares one group differs by the other."""
    images = torch.rand(32, 3, 32, 32, generator=generator(0))
    share = torch.tensor([[True, True], [True, False], [False, True]])
    query, keys, draws = loo.augment_groups(images, ALL, share, generator(1), always=())
    assert (
        torch.equal(query, keys[0])
        and not torch.equal(query, keys[1])
        and not torch.equal(query, keys[2])
    )
    for i in range(32):  # undo the rotations: the view that shares color has the query's pixels
        back = lambda view, row: view[i].rot90(-int(draws["rotation"]["turns"][row, i]), (1, 2))
        torch.testing.assert_close(back(keys[1], 2), back(query, 0), atol=1e-5, rtol=0)


def test_draws_do_not_depend_on_how_a_batch_is_cut():
    method = loo.methods(ALL)["looc"]
    images, aspect = torch.rand(8, 3, 32, 32, generator=generator(0)), torch.linspace(0.5, 2, 8)
    whole = loo.augment_groups(images, ALL, method.share, generator(1), aspect=aspect)
    for first in (0, 4):
        rows = slice(first, first + 4)
        query, keys, _ = loo.augment_groups(
            images[rows], ALL, method.share, generator(1), aspect=aspect[rows], rows=(first, 8)
        )
        torch.testing.assert_close(query, whole[0][rows], atol=1e-6, rtol=0)
        torch.testing.assert_close(keys, whole[1][:, rows], atol=1e-6, rtol=0)


def test_views_are_counted_and_sized_whatever_is_drawn():
    images = torch.rand(2, 3, 24, 16, generator=generator(0))
    query, keys, draws = loo.augment_groups(
        images, (), torch.zeros(3, 0, dtype=torch.bool), generator(1), always=()
    )
    assert (
        torch.equal(query, images)
        and torch.equal(keys, images.expand(3, -1, -1, -1, -1))
        and not draws
    )
    query, keys, _ = loo.augment_groups(
        images, ("color",), torch.tensor([[True]]), generator(1), always=(), size=16
    )
    assert query.shape == (2, 3, 16, 16) and torch.equal(keys[0], query)
    with pytest.raises(ValueError, match="colour; there are texture, crop"):
        loo.augment_groups(images, ("colour",), torch.tensor([[True]]), generator(1))


def test_a_row_in_the_table_of_groups_gets_a_view_and_a_space(monkeypatch):
    def draw_invert(b, generator):
        return {"coin": torch.rand(b, generator=generator) < 0.5}

    def invert(images, draw):
        return torch.where(draw["coin"][:, None, None, None], 1 - images, images)

    monkeypatch.setitem(loo.GROUPS, "invert", (draw_invert, invert))
    method = loo.methods(("invert", "rotation"))["looc"]
    images = torch.rand(16, 3, 8, 8, generator=generator(0)) * 0.4
    query, keys, draws = loo.augment_groups(
        images, method.groups, method.share, generator(1), always=("crop",)
    )
    assert torch.equal(query.mean((1, 2, 3)) > 0.5, draws["invert"]["coin"][0])
    assert torch.equal(keys[1].mean((1, 2, 3)) > 0.5, draws["invert"]["coin"][0])
    assert method.spaces == ("all", "invert", "rotation")


# ---------------------------------------------------------------- 3. ops are torchvision's


def photos(n=8, side=40):
    """Smooth pictures, so that interpolation is tested where it matters, uint8-valued."""
    images = F.interpolate(
        torch.rand(n, 3, 7, 7, generator=generator("photos")),
        side,
        mode="bicubic",
        align_corners=False,
    ).clamp(0, 1)
    return (images * 255).round() / 255


def box_draw(boxes, side):
    """Integer boxes (top, left, height, width) -> the draw that gives them."""
    top, left, h, w = torch.tensor(boxes, dtype=torch.float64).T / side
    free = lambda at, extent: at / (1 - extent).clamp(min=1e-9)
    return {
        "area": (h * w)[:, None].float(),
        "ratio": (w / h)[:, None].float(),
        "place": torch.stack([free(top, h), free(left, w)], 1).float(),
    }


BOXES = [
    (0, 0, 40, 40),
    (3, 5, 20, 30),
    (10, 0, 30, 12),
    (0, 20, 9, 20),
    (25, 25, 15, 15),
    (1, 2, 38, 37),
    (5, 30, 35, 10),
    (17, 3, 21, 23),
]


@pytest.mark.parametrize("size", [32, 24, 64])
def test_crop_is_torchvisions_resized_crop(size):
    images = photos()
    ours = loo.resample(images, box_draw(BOXES, 40), size)
    theirs = torch.stack(
        [TF.resized_crop(x, *box, [size, size], antialias=True) for x, box in zip(images, BOXES)]
    )
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)


def test_crop_on_a_squashed_canvas_is_the_crop_of_the_picture():
    """A smooth 80x40 picture, squashed to 40x40: a square crop of the true picture comes out square, here against the true crop."""
    wide = F.interpolate(
        torch.rand(1, 3, 4, 8, generator=generator(3)),
        (40, 80),
        mode="bicubic",
        align_corners=False,
    ).clamp(0, 1)
    canvas = TF.resize(wide, [40, 40], antialias=True)
    draw = {
        "area": torch.tensor([[0.125]]),
        "ratio": torch.tensor([[1.0]]),
        "place": torch.tensor([[0.5, 0.25]]),
    }  # 20 x 20 at (10, 15)
    theirs = TF.resized_crop(wide, 10, 15, 20, 20, [32, 32], antialias=True)
    torch.testing.assert_close(
        loo.resample(canvas, draw, 32, torch.tensor([2.0])), theirs, atol=0.05, rtol=0
    )
    assert (
        loo.resample(canvas, draw, 32) - theirs
    ).abs().max() > 0.1  # without the aspect it is another crop


def test_flip_and_rotation_alone_are_exact():
    images, turns = photos(), torch.arange(8) % 4
    flip = torch.arange(8) < 4
    ours = loo.resample(images, {"flip": flip, "turns": turns})
    theirs = torch.stack(
        [(x.flip(2) if f else x).rot90(int(k), (1, 2)) for x, f, k in zip(images, flip, turns)]
    )
    assert torch.equal(ours, theirs)


def test_crop_flip_and_rotation_at_once():
    images, turns, flip = photos(), torch.arange(8) % 4, torch.arange(8) < 4
    ours = loo.resample(images, {**box_draw(BOXES, 40), "flip": flip, "turns": turns}, 32)
    one_by_one = loo.resample(
        loo.resample(images, box_draw(BOXES, 40), 32), {"flip": flip, "turns": turns}
    )
    torch.testing.assert_close(ours, one_by_one, atol=1e-4, rtol=0)


def test_crop_boxes_follow_random_resized_crop():
    """Same areas and shapes, in true pixels, as torchvision's get_params draws them."""
    torch.manual_seed(0)
    wide = torch.zeros(3, 300, 600)
    theirs = torch.tensor(
        [
            torchvision.transforms.RandomResizedCrop.get_params(wide, (0.2, 1.0), (3 / 4, 4 / 3))
            for _ in range(4000)
        ]
    ).double()
    draw = loo.sample_crop(4000, generator(0))
    top, left, h, w = (x.double() for x in loo.crop_box(draw, torch.full((4000,), 2.0)))
    assert (
        min(top.min(), left.min()) >= 0
        and (top + h).max() <= 1 + 1e-6
        and (left + w).max() <= 1 + 1e-6
    )
    ours = torch.stack([top * 300, left * 600, h * 300, w * 600], 1)
    assert (ours[:, 3] / ours[:, 2]).min() > 3 / 4 - 1e-3 and (
        ours[:, 3] / ours[:, 2]
    ).max() < 4 / 3 + 1e-3
    error = (theirs.var(0) / 4000 + ours.var(0) / 4000).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4 * error + 1).all()


def test_a_picture_too_long_for_any_box_gets_the_largest_in_the_middle():
    top, left, h, w = loo.crop_box(loo.sample_crop(64, generator(0)), torch.full((64,), 20.0))
    assert (
        torch.allclose(h, torch.ones(64))
        and torch.allclose(w * 20, torch.full((64,), 4 / 3))
        and torch.allclose(left + w / 2, torch.full((64,), 0.5))
    )


@pytest.mark.parametrize(
    "op, theirs",
    [
        (loo.adjust_brightness, TF.adjust_brightness),
        (loo.adjust_contrast, TF.adjust_contrast),
        (loo.adjust_saturation, TF.adjust_saturation),
        (loo.adjust_hue, TF.adjust_hue),
    ],
)
def test_color_ops_are_torchvisions(op, theirs):
    images = torch.cat([photos(6), torch.zeros(1, 3, 40, 40), torch.full((1, 3, 40, 40), 0.5)])
    factor = torch.linspace(-0.5, 0.5, 8) if op is loo.adjust_hue else torch.linspace(0.2, 1.8, 8)
    want = torch.stack([theirs(x, float(f)) for x, f in zip(images, factor)])
    assert (op(images, factor) - want).abs().max() < 1 / 255


def test_color_applies_four_ops_in_each_pictures_order():
    images, draw = photos(32), loo.sample_color(32, generator(5))
    assert 0 < (draw["order"][:, 0] < 0).sum() < 32
    want = images.clone()
    for i in range(32):
        for op in draw["order"][i].tolist():
            if op >= 0:
                name = loo.JITTER[op].__name__.removeprefix("adjust_")
                want[i] = getattr(TF, f"adjust_{name}")(want[i], float(draw[name][i]))
        if draw["gray"][i]:
            want[i] = TF.rgb_to_grayscale(want[i], 3)
    assert (loo.color(images, draw) - want).abs().max() < 1 / 255
    orders = loo.sample_color(20_000, generator(6))["order"]
    orders = orders[orders[:, 0] >= 0]
    assert len(orders) / 20_000 == pytest.approx(0.8, abs=0.02)
    assert torch.bincount((orders * torch.tensor([64, 16, 4, 1])).sum(1)).count_nonzero() == 24


def test_blur_is_torchvisions_gaussian():
    images = photos(8, 224)
    draw = {"blur": torch.arange(8) < 6, "sigma": torch.linspace(0.1, 2, 8)}
    want = torch.stack(
        [TF.gaussian_blur(x, 23, float(s)) if b else x for x, b, s in zip(images, *draw.values())]
    )
    torch.testing.assert_close(loo.blur(images, draw), want, atol=1e-4, rtol=0)


def test_blur_that_changes_nothing_is_left_out():
    images = torch.rand(4, 3, 32, 32, generator=generator(0))
    kernel = loo.gaussian_matrix(torch.full((4,), 2.0 * 32 / 224), 32)[:, None]
    assert (kernel @ images @ kernel.mT - images).abs().max() < 2 / 255 and torch.equal(
        loo.blur(images, {}), images
    )


# ---------------------------------------------------------------- 6. keys, queue, encoder


@pytest.mark.parametrize("b", [1, 3, 8, 11, 30])
def test_queue_keeps_the_last_keys_in_order(b):
    queue, pointer, seen = torch.zeros(2, 8, 1), 0, []
    for step in range(6):
        keys = torch.arange(step * b, step * b + b).float().view(1, b, 1).expand(2, b, 1) + 1
        queue, pointer = loo.queue_update(queue, pointer, keys)
        seen = (seen + keys[0, :, 0].tolist())[-8:]
        oldest_first = queue.roll(-pointer, 1)[1, :, 0].tolist()
        assert oldest_first[-len(seen) :] == seen


CONFIG = dict(
    loo.RECIPES["factors"],
    method="looc",
    groups=ALL,
    same=(),
    always=("crop", "flip"),
    seed=0,
    device="cpu",
    precision="float32",
    drop_equal=False,
    compile=False,
    batch=16,
    splits=4,
    queue=32,
    hidden=32,
    dim=8,
)


def small_step(**changed):
    config = {**CONFIG, **changed}
    images = data.factors("val", 32, 16).images / 255
    state = loo.init_state(config)
    return config, images, state, loo.train_step(state, images, torch.ones(16), config)


def test_a_start_leaves_no_trace_in_the_global_generator():
    before = torch.random.get_rng_state()
    loo.init_state(CONFIG)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_supervised_learns_a_label_that_tells_pictures_apart():
    found = data.ImageSet(None, None, {"class": torch.zeros(4)}, {"class": ["."]})
    with pytest.raises(UserError, match="name rotation in --groups"):
        loo.training_labels(found, dict(CONFIG, method="supervised", label=None, groups=["color"]))
    assert loo.training_labels(found, dict(CONFIG, method="supervised", label=None)) == (
        None,
        4,
        "rotation",
    )


def test_drop_equal_is_an_option_of_every_method():
    for method in ("looc", "moco", "moco_same"):
        assert len(small_step(method=method, drop_equal=True)[3][1][0]) == (
            3 if method == "looc" else 1
        )


@pytest.mark.parametrize("method", ["looc", "looc++", "moco", "moco++"])
def test_keys_get_no_gradient_and_fill_the_queue(method):
    config, images, before, (after, (loss, q, k, queue, role)) = small_step(method=method)
    assert q.shape == (len(loss), 16, 8) and k.shape == (len(loss), role.shape[1], 16, 8)
    assert (
        all(p.grad is None and not p.requires_grad for p in after.key.parameters())
        and not k.requires_grad
    )
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in after.query.parameters())
    assert after.pointer == 16 and after.step == 1
    for s in range(len(loss)):  # space s keeps its positive view's keys
        assert torch.equal(
            after.queue[s, :16], k[s, int((role[s] == 1).nonzero())]
        ) and torch.equal(after.queue[s, 16:], before.queue[s, 16:])


def test_ema_moves_the_key_encoder_a_little():
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    want = [0.9 * x + 0.1 * y for x, y in zip(a.parameters(), b.parameters())]
    loo.ema(a.requires_grad_(False), b, 0.9)
    assert all(torch.allclose(x, y) for x, y in zip(a.parameters(), want))


def test_shuffled_keys_come_back_in_order():
    """With a BatchNorm that does not mix images (eval mode), shuffling the keys changes nothing but rounding."""
    config, images, state, _ = small_step()
    method = loo.methods(ALL)["looc"]
    state.key.eval(), state.query.eval()
    _, k, _, _ = loo.contrastive(state.query, state.key, images, torch.ones(16), config, 7)
    views = loo.augment_groups(
        images, ALL, method.share, generator("views", 0, 7), always=config["always"], size=32
    )[1]
    with torch.no_grad():
        want = torch.stack([loo.encode(state.key, v)[1] for v in views], 1)
    torch.testing.assert_close(k, want, atol=1e-5, rtol=1e-4)


def test_split_batchnorm_is_batchnorm_of_each_part():
    x = torch.randn(24, 5, 4, 4, generator=generator(0))
    ours = loo.SplitBatchNorm2d(5, splits=3)
    parts = [torch.nn.BatchNorm2d(5) for _ in range(3)]
    torch.testing.assert_close(
        ours(x), torch.cat([bn(part) for bn, part in zip(parts, x.chunk(3))])
    )
    torch.testing.assert_close(
        ours.running_mean, torch.stack([bn.running_mean for bn in parts]).mean(0)
    )
    torch.testing.assert_close(
        ours.running_var, torch.stack([bn.running_var for bn in parts]).mean(0)
    )
    with pytest.raises(ValueError, match="does not divide"):
        ours(x[:23])


def test_key_statistics_are_per_view_and_split():
    """One pass over all key views equals a pass over each view with the recipe's splits."""
    torch.manual_seed(0)
    both, one = (loo.Encoder("small", spaces=2, hidden=16, dim=8, splits=s) for s in (8, 4))
    one.load_state_dict(both.state_dict())
    images = torch.rand(2, 16, 3, 32, 32)
    z = loo.encode(both, images.flatten(0, 1))[1]
    torch.testing.assert_close(
        z, torch.cat([loo.encode(one, view)[1] for view in images], 1), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("hidden", [16, 0])
@pytest.mark.parametrize("heads", ["mlp", "conv5"])
def test_vmapped_heads_are_each_spaces_own(heads, hidden):
    torch.manual_seed(0)
    encoder = loo.Encoder("small", spaces=3, heads=heads, hidden=hidden, dim=8).eval()
    images = torch.rand(4, 3, 32, 32)
    v, z = loo.encode(encoder, images)
    assert v.shape == (4, 384 if heads == "conv5" else 128)
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(3, 4))
    x = encoder.trunk(TF.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    for s in range(3):
        top = encoder.tops[s if heads == "conv5" else 0](x).mean((2, 3))
        h = (top @ encoder.w1[s].T + encoder.b1[s]).relu() if hidden else top
        torch.testing.assert_close(
            z[s], F.normalize(h @ encoder.w2[s].T + encoder.b2[s], dim=1), atol=1e-5, rtol=1e-4
        )
    assert not torch.equal(encoder.w2[0], encoder.w2[1])
    if heads == "conv5":
        assert not torch.equal(encoder.tops[0][0].conv1.weight, encoder.tops[1][0].conv1.weight)


def test_any_torchvision_resnet_gives_a_backbone_that_torchvision_loads(tmp_path):
    encoder = loo.Encoder("resnet18", spaces=2, heads="conv5", hidden=16, dim=8)
    loo.export(encoder, tmp_path)
    state = torch.load(tmp_path / "backbone.pt", weights_only=True)
    net = torchvision.models.resnet18()
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    net.fc, images = torch.nn.Identity(), torch.rand(2, 3, 64, 64)
    v, _ = loo.encode(encoder.eval(), images)
    theirs = net.eval()(TF.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(v[:, :512], theirs, atol=1e-5, rtol=1e-4)  # Z_0's


# ---------------------------------------------------------------- 4. world size changes nothing


def twenty_steps(rank, size, port, out):
    """Of each method in float64, and what is left of each; as process `rank` of `size`."""
    torch.set_num_threads(1)
    if size > 1:  # else as without torchrun
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port)
        )
    images = data.factors("val", 16, 48).images.double() / 255
    with loo.init_distributed("cpu"):
        for method, drop_equal in (
            ("moco", False),
            ("looc", False),
            ("looc++", True),
            ("supervised", False),
        ):
            config = dict(
                CONFIG, method=method, drop_equal=drop_equal, size=16, queue=24, precision="float64"
            )
            state, losses = loo.init_state(config, 3 if method == "supervised" else 0), []
            while state.step < 20:
                batch = (torch.arange(16) + 7 * state.step) % 48
                rows = batch[
                    loo.rank_slice(16)
                    if method == "supervised"
                    else loo.rank_rows(config, state.step)[0]
                ]
                some, aspect = images[rows], torch.linspace(0.7, 1.4, 48)[rows]
                if method == "supervised":
                    state, (loss,) = loo.supervised_step(state, some, aspect, rows % 3, config)
                else:
                    state, (loss, *_) = loo.train_step(state, some, aspect, config)
                losses += loo.all_reduce_mean([loss.clone()])
            loo.save_checkpoint(state._replace(total=torch.stack(losses)), config, out / method)
            if rank == 0:
                torch.save(
                    {k: p.grad for k, p in loo.unwrap_model(state.query).named_parameters()},
                    out / method / "gradients.pt",
                )


def spawn(function, size, *arguments):
    """function(rank, size, port, *arguments) in `size` processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(
        ["torch", "torchvision", "pytest", "einops", "fire"]
    )  # slow to import: once for all
    torch.multiprocessing.start_processes(
        function, (size, port, *arguments), size, start_method="forkserver"
    )


def test_world_size_changes_nothing(tmp_path):
    """Loss, gradients, weights, buffers, queue: N processes with a part of the batch each, against one with all of it."""
    for size in (1, 2, 4):
        spawn(twenty_steps, size, tmp_path / str(size))
        for method in ("moco", "looc", "looc++", "supervised"):
            one, many = (
                [
                    torch.load(tmp_path / world / method / name)
                    for name in ("checkpoint.pt", "gradients.pt")
                ]
                for world in ("1", str(size))
            )
            torch.testing.assert_close(many[1], one[1], rtol=1e-10, atol=1e-10)
            for part in ("query", "key", "classifier", "queue", "pointer", "step", "total"):
                torch.testing.assert_close(many[0][part], one[0][part], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(
                many[0]["optimizer"]["state"], one[0]["optimizer"]["state"], rtol=1e-10, atol=1e-10
            )


# ---------------------------------------------------------------- pictures


def test_factors_are_drawn_again_alike_and_splits_are_disjoint():
    a, b, other = (
        data.factors("val", 32, 64),
        data.factors("val", 32, 64),
        data.factors("test", 32, 64),
    )
    assert (
        torch.equal(a.images, b.images)
        and a.images.dtype == torch.uint8
        and a.images.shape == (64, 3, 32, 32)
    )
    assert not torch.equal(a.images, other.images)
    assert torch.equal(a.labels["species"], a.labels["object"] * data.HUES + a.labels["hue"])
    assert (
        len(data.OBJECTS) >= 10
        and 1 / data.HUES < 0.1
        and all(len(a.classes[k]) > v.max() for k, v in a.labels.items())
    )


def test_viewpoint_is_tilted_and_on_coloured_grounds():
    """By what can be measured: the chroma of the corners, and how far outlines are from mirror images of themselves."""
    assert data.dataset_splits("factors") == ("train", "val", "test")
    seen = {
        split: data.factors(split, 32, 512).images.float() / 255 for split in ("test", "viewpoint")
    }
    chroma = {k: (x.amax(1) - x.amin(1))[:, :2, :2].mean() for k, x in seen.items()}
    lopsided = {
        k: ((x - x.mean((2, 3), keepdim=True)) - (x - x.mean((2, 3), keepdim=True)).flip(3))
        .square()
        .mean()
        / x.var((2, 3)).mean()
        for k, x in seen.items()
    }
    assert (
        chroma["viewpoint"] > 1.5 * chroma["test"]
        and lopsided["viewpoint"] > 1.1 * lopsided["test"]
    )


def test_factors_objects_know_up_and_not_left():
    """Outlines, drawn plainly: a flip leaves each as it is, a quarter turn does not."""
    n = len(data.OBJECTS)
    one = lambda *values: (
        torch.tensor(values).expand(n, *([len(values)] if len(values) > 1 else [1])).squeeze(-1)
    )
    look = dict(
        strokes=torch.tensor([(s * 4)[:4] for s in data.OBJECTS.values()]),
        marks=torch.zeros(n, 4, 4) - 9,
        fill=torch.zeros(n, dtype=torch.long),
        fill_angle=one(0.0),
        fill_period=one(1.0),
        fill_depth=one(0.0),
        fill_shift=torch.zeros(n, 2),
        hue=one(0.0),
        saturation=one(1.0),
        value=one(1.0),
        centre=torch.zeros(n, 2),
        scale=one(0.9),
        tilt=one(0.0),
        light=one(0.0),
        relief=one(0.0),
        ground=torch.zeros(n, 3),
        horizon=one(0.0),
        haze=one(0.0),
    )
    images = data.render(look, 64, generator(0)).float()[:, 0] / 255
    difference = lambda x: (images - x).abs().mean((1, 2)) / images.mean((1, 2))
    assert difference(images.flip(2)).max() < 0.1
    assert all(difference(images.rot90(k, (1, 2))).min() > 0.3 for k in (1, 2, 3))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "LA", "I;16", "1"])
def test_any_mode_becomes_rgb(mode, tmp_path):
    picture = Image.new("L", (20, 10), 200)
    picture = (
        Image.new("I;16", (20, 10), 200 * 256)
        if mode == "I;16"
        else picture.convert("RGBA" if mode == "RGBA" else mode)
    )
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture.save(path)
    out = data.read_image([path], 0)
    assert (
        out.mode == "RGB"
        and out.size == (20, 10)
        and abs(out.getpixel((3, 3))[0] - (255 if mode == "1" else 200)) <= 1
    )


def test_exif_orientation_is_honoured(tmp_path):
    picture = Image.new("RGB", (40, 20), "black")
    picture.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter to the right when shown
    picture.save(tmp_path / "x.jpg", exif=exif)
    out = data.read_image([tmp_path / "x.jpg"], 0)
    assert (
        out.size == (20, 40) and out.getpixel((10, 5))[0] > 200 and out.getpixel((10, 35))[0] < 50
    )


def photo_tree(root, classes=3, each=14):
    rng = random.Random(0)
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(each):
            w, h, mode = (
                rng.randint(20, 80),
                rng.randint(20, 80),
                rng.choice(["RGB", "L", "P", "CMYK"]),
            )
            Image.effect_noise((w, h), 20 + 60 * c).convert("RGB").convert(mode).save(
                root / f"class{c}" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
            )
    return root


def test_folder_splits_by_path_and_skips_what_it_cannot_read(tmp_path, capsys):
    root = photo_tree(tmp_path / "photos")
    (root / "class1" / "broken.jpg").write_bytes((b"\xff\xd8\xff\xe0not a picture" * 9))
    (root / "class1" / "notes.txt").write_text("not a picture, and not named as one")
    train, val = (data.load_dataset("folder", s, root=root, size=28) for s in ("train", "val"))
    assert len(train.images) + len(val.images) == 42 and train.images.shape[1:] == (3, 32, 32)
    assert train.classes["class"] == ["class0", "class1", "class2"]
    assert capsys.readouterr().err.count("warning: unreadable") == 1
    again = data.load_dataset("folder", "train", root=root, size=28)
    assert torch.equal(again.images, train.images)
    names = lambda split: set(data.folder(split, root)[0])
    before = names("train")
    (root / "class1" / "broken.jpg").unlink()  # other files keep their side
    assert not names("train") & names("val") and names("train") == before - {
        root / "class1" / "broken.jpg"
    }


def test_folder_with_train_and_val(tmp_path):
    photo_tree(tmp_path / "train"), photo_tree(tmp_path / "val", each=5)
    assert data.dataset_splits("folder", tmp_path) == ("train", "val")
    val = data.load_dataset("folder", "val", root=tmp_path, size=28)
    assert len(val.images) == 15 and val.labels["class"].tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_pictures_that_lie_flat_beside_classes_are_named(tmp_path):
    photo_tree(tmp_path / "train")
    picture(tmp_path / "val" / "x.png")
    with pytest.raises(loo.UserError, match="no sub-folders; it needs those of .*train"):
        data.open_dataset("folder", "val", root=tmp_path)


def test_floating_point_pictures_are_refused_by_name(tmp_path):
    Image.new("F", (8, 8), 0.5).save(tmp_path / "x.tif")
    with pytest.raises(loo.UserError, match="x.tif: .*8 or 16 bits"):
        data.read_image([tmp_path / "x.tif"], 0)


def test_what_is_half_written_goes_when_it_is_stopped(here, monkeypatch):
    photo_tree(here / "photos")
    stop = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(data, "decode", stop)
    with pytest.raises(SystemExit, match="143"):
        run(data, "pack --root=photos --size=28")
    with pytest.raises(SystemExit, match="143"):
        data.write_atomic(here / "runs" / "x.pt", lambda file: (file.write(b"half"), stop()))
    assert not list((here / "runs").iterdir())


def test_what_is_written_is_not_read_as_a_class(here, capsys):
    photo_tree(here / "photos")
    for line in (
        "train --data=folder --root=photos --out=photos/runs --batch=8 --splits=1",
        "stylize --root=photos --out=photos/stylised",
        "pack --root=photos --out=photos/x",
    ):
        with pytest.raises(SystemExit, match="2"):
            run(loo if "train" in line else data, line)
        assert "would be read as a class" in capsys.readouterr().err
    data.forbid_inside("out", "photos/.runs", "photos")
    assert sorted(p.name for p in (here / "photos").iterdir()) == ["class0", "class1", "class2"]


def test_a_class_has_the_same_number_in_every_split(tmp_path):
    photo_tree(tmp_path / "train"), photo_tree(tmp_path / "val", each=5)
    (tmp_path / "val" / "class1").rename(tmp_path / "aside")
    assert (
        data.load_dataset("folder", "val", root=tmp_path, size=28).labels["class"].tolist()
        == [0] * 5 + [2] * 5
    )
    (tmp_path / "aside").rename(tmp_path / "val" / "other")
    with pytest.raises(loo.UserError, match="other"):
        data.load_dataset("folder", "val", root=tmp_path, size=28)


def test_pictures_without_classes_can_be_trained_on(tmp_path):
    photo_tree(tmp_path, classes=1)
    (tmp_path / "class0" / "._0.png").write_bytes(b"what macOS leaves beside a file")
    found = data.load_dataset("folder", "train", root=tmp_path / "class0", size=28)
    assert found.classes["class"] == ["."] and len(found.images) > 5


def test_cifar10_in_its_published_layout(tmp_path, monkeypatch):
    import pickle

    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    pixels = torch.randint(256, (10, 3072), dtype=torch.uint8, generator=generator(0))
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (root / name).write_bytes(pickle.dumps({"data": pixels.numpy(), "labels": list(range(10))}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    with pytest.raises(loo.UserError, match="--download"):
        data.load_dataset("cifar10", "test", root=str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    test = data.load_dataset("cifar10", "test", root=str(tmp_path))
    assert torch.equal(test.images, pixels.view(10, 3, 32, 32)) and test.labels[
        "class"
    ].tolist() == list(range(10))
    assert len(data.load_dataset("cifar10", "pretrain", root=str(tmp_path)).images) == 50


# ---------------------------------------------------------------- the paper's data sets, in the layouts they are published in

GREEN, RED = (0, 200, 0), (200, 0, 0)


def picture(path, color=GREEN, border=None, side=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (side, side), border or color)
    image.paste(color, (2, 2, side - 2, side - 2))
    image.save(path, "PNG")


def write_mat(path, content, compress=False):
    """A MATLAB 5 file as MATLAB writes it: numbers, text, struct arrays."""

    def element(kind, data):
        return (
            struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)
            if len(data) > 4
            else struct.pack("<HH4s", kind, len(data), data)
        )

    def matrix(name, value):
        kind = (
            2
            if isinstance(value, list) and value and isinstance(value[0], dict)
            else 4
            if isinstance(value, str)
            else 6
        )
        out = (
            element(6, struct.pack("<II", kind, 0))
            + element(5, struct.pack("<ii", 1, len(value)))
            + element(1, name.encode())
        )
        if kind == 2:
            out += element(5, struct.pack("<i", 16)) + element(
                1, b"".join(k.encode().ljust(16, b"\0") for k in value[0])
            )
            out += b"".join(matrix("", x) for one in value for x in one.values())
        else:
            out += (
                element(16, value.encode())
                if kind == 4
                else element(9, struct.pack(f"<{len(value)}d", *value))
            )
        return struct.pack("<II", 14, len(out)) + out

    parts = [matrix(k, v) for k, v in content.items()]
    parts = (
        [struct.pack("<II", 15, len(z := zlib.compress(p))) + z for p in parts]
        if compress
        else parts
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49) + b"".join(parts)
    )


@pytest.mark.parametrize("compress", [False, True])
def test_mat_files_are_read(compress, tmp_path):
    content = {
        "trnid": [3.0, 1.0, 2.0],
        "one": [7.0],
        "name": "pansy",
        "synsets": [{"ID": [5.0], "WNID": "n01"}, {"ID": [6.0], "WNID": "n02"}],
    }
    write_mat(tmp_path / "x.mat", content, compress)
    assert data.read_mat(tmp_path / "x.mat") == content
    (tmp_path / "x.mat").write_bytes((tmp_path / "x.mat").read_bytes()[:-20])
    with pytest.raises(loo.UserError, match="x.mat"):
        data.read_mat(tmp_path / "x.mat")


@pytest.fixture
def few(monkeypatch):
    """The published counts of trees small enough to write: 15 classes of ImageNet (13 of them in ObjectNet)."""
    wnids = sorted([*data.OBJECTNET13.values(), "n02869837", "n01749939"])
    counts = {
        "imagenet100": {"train": (15, 60), "val": (15, 15)},
        "inat2019": {"train": (3, 6), "val": (3, 3)},
        "cub200": {"train": (3, 6), "test": (3, 3)},
        "flowers102": {"train": (3, 3), "val": (3, 3), "test": (3, 6)},
        "objectnet13": {"test": (13, None)},
        "imagenetc100": {k: (15, 15) for k in data.PUBLISHED["imagenetc100"][0]},
    }
    monkeypatch.setattr(data, "IMAGENET100", wnids)
    monkeypatch.setattr(torchvision.datasets.Flowers102, "classes", ["rose", "daisy", "pansy"])
    for name, splits in counts.items():
        monkeypatch.setitem(data.PUBLISHED, name, (splits, data.PUBLISHED[name][1]))
    return wnids


def labelled(name, split, root):
    """-> {path below root: label}"""
    found = data.open_dataset(name, split, root=root)
    return {
        str(p.relative_to(root)): y
        for p, y in zip(found.images.source, found.labels["class"].tolist())
    }


def imagenet_tree(root, wnids, layout="folders"):
    order = [
        "n09999999",
        *random.Random(0).sample(wnids, len(wnids)),
    ]  # a class of the other 900, and a devkit's order
    for wnid in order:
        for i in range(4):
            picture(root / "train" / wnid / f"{wnid}_{i}.JPEG")
    for i, wnid in enumerate(order, 1):
        picture(
            root / "val" / (wnid if layout == "folders" else ".") / f"ILSVRC2012_val_{i:08d}.JPEG"
        )
    if layout == "devkit":
        kit = root / "ILSVRC2012_devkit_t12" / "data"
        write_mat(
            kit / "meta.mat",
            {
                "synsets": [
                    {"ILSVRC2012_ID": [float(900 - i)], "WNID": wnid}
                    for i, wnid in enumerate(order)
                ]
            },
            True,
        )
        (kit / "ILSVRC2012_validation_ground_truth.txt").write_text(
            "".join(f"{900 - i}\n" for i in range(len(order)))
        )
    if layout == "kaggle":
        (root / "ILSVRC/Data/CLS-LOC").mkdir(parents=True)
        (
            (root / "train").rename(root / "ILSVRC/Data/CLS-LOC/train"),
            (root / "val").rename(root / "ILSVRC/Data/CLS-LOC/val"),
        )
        rows = [
            f"ILSVRC2012_val_{i:08d},{wnid} 85 1 499 272 {wnid} 3 3 9 9 "
            for i, wnid in enumerate(order, 1)
        ]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    return order


@pytest.mark.parametrize("layout", ["folders", "devkit", "kaggle"])
def test_imagenet100_layouts(layout, few, tmp_path):
    order = imagenet_tree(tmp_path, few, layout)
    train, val = (
        labelled("imagenet100", "pretrain", tmp_path),
        labelled("imagenet100", "val", tmp_path),
    )
    assert len(train) == 60 and all(few[y] == path.split("/")[-2] for path, y in train.items())
    assert len(val) == 15 and all(few[y] == order[int(path[-13:-5]) - 1] for path, y in val.items())
    next(p for p in tmp_path.rglob(f"{few[3]}_*.JPEG")).unlink()
    with pytest.raises(loo.UserError, match="found 59 pictures of 15 classes"):
        data.open_dataset("imagenet100", "train", root=tmp_path)


def test_inat2019_joins_by_id(few, tmp_path):
    """Ids of pictures, annotations and species in three orders; folders are named misleadingly."""
    for split, each in (("train", 2), ("val", 1)):
        files = [
            (100 + i, f"train_val2019/Birds/{i % 3}/{split}{i}.jpg", (7, 3, 5)[i % 3])
            for i in range(3 * each)
        ]
        for _, file, _ in files:
            picture(tmp_path / file)
        (tmp_path / f"{split}2019.json").write_text(
            json.dumps(
                {
                    "images": [{"id": i, "file_name": file} for i, file, _ in files],
                    "categories": [{"id": c, "name": f"species {c}"} for c in (5, 3, 7)],
                    "annotations": [
                        {"id": n, "image_id": i, "category_id": c}
                        for n, (i, _, c) in enumerate(reversed(files))
                    ],
                }
            )
        )
    val = labelled("inat2019", "val", tmp_path)
    assert val == {
        "train_val2019/Birds/0/val0.jpg": 2,
        "train_val2019/Birds/1/val1.jpg": 0,
        "train_val2019/Birds/2/val2.jpg": 1,
    }
    assert data.open_dataset("inat2019", "train", root=tmp_path).classes["class"] == [
        "species 3",
        "species 5",
        "species 7",
    ]
    (tmp_path / "train_val2019/Birds/1/val1.jpg").unlink()
    with pytest.raises(loo.UserError, match="1 of 3 pictures are missing, the first is .*val1.jpg"):
        data.open_dataset("inat2019", "val", root=tmp_path)


def cub_tree(root, each=3):
    top, rows = (
        root / "CUB_200_2011",
        [(9 - i, i % 3 + 1, int(i < 3 * (each - 1))) for i in range(3 * each)],
    )  # id, class, train
    for i, c, _ in rows:
        picture(top / "images" / f"{c:03d}.Bird" / f"{i}.jpg", (60 * c, 10 * i, 0))
    write = lambda name, lines: (top / name).write_text(
        "".join(" ".join(map(str, line)) + "\n" for line in lines)
    )
    write("images.txt", [(i, f"{c:03d}.Bird/{i}.jpg") for i, c, _ in rows])
    write("image_class_labels.txt", [(i, c) for i, c, _ in sorted(rows)])
    write("train_test_split.txt", [(i, t) for i, _, t in rows[::2] + rows[1::2]])
    write("classes.txt", [(c, f"{c:03d}.Bird") for c in (2, 1, 3)])
    return root


def test_cub200_joins_by_id_and_counts_from_one(few, tmp_path):
    train, test = (labelled("cub200", s, cub_tree(tmp_path)) for s in ("train", "test"))
    assert len(train) == 6 and {p[-5:]: y for p, y in test.items()} == {
        "3.jpg": 0,
        "2.jpg": 1,
        "1.jpg": 2,
    }
    assert all(int(p.split("/")[-2][:3]) - 1 == y for p, y in (train | test).items())
    assert data.open_dataset("cub200", "test", root=tmp_path / "CUB_200_2011").classes["class"] == [
        "001.Bird",
        "002.Bird",
        "003.Bird",
    ]


def flowers_tree(root):
    for i in range(1, 13):
        picture(root / "flowers-102/jpg" / f"image_{i:05d}.jpg", (0, 20 * i, 0))
    write_mat(
        root / "flowers-102/setid.mat",
        {
            "trnid": [1.0, 5.0, 9.0],
            "valid": [2.0, 6.0, 10.0],
            "tstid": [12.0, 3.0, 4.0, 7.0, 8.0, 11.0],
        },
        True,
    )
    write_mat(
        root / "flowers-102/imagelabels.mat", {"labels": [1.0 + (i - 1) // 4 for i in range(1, 13)]}
    )
    return root


def test_flowers102_needs_no_scipy(few, tmp_path):
    root = flowers_tree(tmp_path)
    label = lambda split: {int(p[-9:-4]): y for p, y in labelled("flowers102", split, root).items()}
    assert (
        label("train") == {1: 0, 5: 1, 9: 2}
        and label("val") == {2: 0, 6: 1, 10: 2}
        and label("test") == {3: 0, 4: 0, 7: 1, 8: 1, 11: 2, 12: 2}
    )
    (root / "flowers-102/imagelabels.mat").unlink()
    with pytest.raises(loo.UserError, match="imagelabels.mat"):
        data.open_dataset("flowers102", "test", root=root)


def test_pictures_behind_a_link_are_the_same_pictures(few, tmp_path):
    """So what was decoded from one path is found from the other."""
    cub_tree(tmp_path / "there")
    (tmp_path / "link").symlink_to("there")
    one, same, other = (
        data.fingerprint(data.open_dataset("cub200", split, root=tmp_path / name))
        for split, name in (("train", "there"), ("train", "link"), ("test", "link"))
    )
    assert one == same != other


@pytest.mark.parametrize("above", ["images", "objectnet-1.0/images", "."])
def test_objectnet13_has_no_border_and_imagenets_labels(above, few, tmp_path):
    for name in [*data.OBJECTNET13, "banana"]:
        picture(tmp_path / above / name / f"{name}.png", border=RED)
    found = data.open_dataset("objectnet13", "test", root=tmp_path, size=12)
    images = data.decode_all(found).images
    assert len(images) == 13 and all(
        images[:, c].float().sub(x).abs().max() <= 1 for c, x in enumerate(GREEN)
    )
    assert {
        p.split("/")[-2]: few[y] for p, y in labelled("objectnet13", "test", tmp_path).items()
    } == data.OBJECTNET13


def corrupted_tree(root, wnids, category):
    for c, names in data.IMAGENETC.items():
        for name in names:
            for severity in range(1, 6):
                for i, wnid in enumerate(["n09999999", *wnids]):
                    picture(
                        root / (c if category else ".") / name / str(severity) / wnid / f"{i}.JPEG",
                        (40 * severity, 10 * i, 0),
                    )
    return root


@pytest.mark.parametrize("category", [True, False])
def test_imagenetc100_layouts(category, few, tmp_path):
    picture(tmp_path / ("weather" if category else ".") / "fog" / "3" / "n09999999" / "x.JPEG")
    for i, wnid in enumerate(few):
        picture(
            tmp_path / ("weather" if category else ".") / "fog" / "3" / wnid / "x.JPEG",
            (100, 10 * i, 0),
            side=24,
        )
    found = data.open_dataset("imagenetc100", "fog/3", root=tmp_path, size=24)
    assert torch.equal(
        data.decode_all(found).images[:, 1, 12, 12], found.labels["class"] * 10
    ) and found.labels["class"].tolist() == list(range(15))
    with pytest.raises(loo.UserError, match="fog/4"):
        data.open_dataset("imagenetc100", "fog/4", root=tmp_path)


def test_check_counts_and_names_what_is_missing(few, tmp_path, capsys):
    imagenet_tree(tmp_path, few)
    data.check("imagenet100", str(tmp_path))
    assert "| val | 15 | 15 | 15 | 15 | 0 | 15 of 15 |" in capsys.readouterr().out
    (tmp_path / "val" / few[2]).rename(tmp_path / "aside")
    (tmp_path / "train" / few[0] / f"{few[0]}_0.JPEG").write_bytes(b"half a pict")
    with pytest.raises(loo.UserError, match="_0.JPEG.*and 2 more findings.*image-net.org"):
        data.check("imagenet100", str(tmp_path))
    out = capsys.readouterr().out
    assert (
        "| val | 14 | 15 | 14 | 15 | 0 | 14 of 14 |" in out
        and "| train | 15 | 15 | 60 | 60 | 0 | 59 of 60 |" in out
    )


def test_imagenet100_is_the_papers_list():
    assert (
        len(set(data.IMAGENET100)) == 100
        and data.IMAGENET100 == sorted(data.IMAGENET100)
        and set(data.OBJECTNET13.values()) <= set(data.IMAGENET100)
    )
    assert sum(map(len, data.IMAGENETC.values())) == 15


def test_a_stream_leaves_out_what_cannot_be_read(tmp_path, capsys):
    for i in range(7):
        picture(tmp_path / "train" / "a" / f"{i}.png", (30 * i, 0, 0))
    for i in (1, 4):
        (tmp_path / "train" / "a" / f"{i}.png").write_bytes(b"broken")
    found = data.open_dataset("folder", "train", root=tmp_path)
    rows, images, aspect = (torch.cat(x) for x in zip(*data.iter_batches(found, batch=3)))
    assert (
        rows.tolist() == [0, 2, 3, 5, 6]
        and len(aspect) == 5
        and images[:, 0, 9, 9].tolist() == [0, 60, 90, 150, 180]
    )
    with pytest.raises(
        loo.UserError, match="2 of 7 pictures cannot be read"
    ):  # more than one, and more than 1%
        data.decode_all(found)
    picture(tmp_path / "train" / "a" / "4.png", (120, 0, 0))
    once = data.decode_all(data.open_dataset("folder", "train", root=tmp_path))
    assert len(once.missing) == 1 and once.images[:, 0, 9, 9].tolist() == [0, 60, 90, 120, 150, 180]


def test_decoded_pictures_are_kept_for_the_next_run(tmp_path, monkeypatch):
    paths = [tmp_path / "a" / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        picture(path, (30 * i, 0, 0))
    where = dict(root=tmp_path / "a", cache=tmp_path / "cache", shared=True)
    first, plain = (
        data.load_dataset("folder", "train", **where),
        data.load_dataset("folder", "train", root=tmp_path / "a"),
    )
    assert torch.equal(first.images, plain.images) and torch.equal(first.aspect, plain.aspect)
    monkeypatch.setattr(data, "decode", None)  # not again
    again = data.load_dataset("folder", "train", **where)
    assert torch.equal(first.images, again.images) and torch.equal(first.aspect, again.aspect)
    os.utime(paths[int(first.images[0, 0, 9, 9]) // 30], (1, 1))  # ... unless a file has changed
    with pytest.raises(TypeError):
        data.load_dataset("folder", "train", **where)


# ---------------------------------------------------------------- texture


def gram_distance(images, style):
    """By 64 random 7x7 filters at three scales that the optimisation never sees -> (b,)."""
    bank = torch.randn(64, 3, 7, 7, generator=generator("judge")) / 12
    apart = 0
    for _ in range(3):
        one, two = (
            data.gram(F.relu(F.conv2d(F.pad(x, (3,) * 4, mode="reflect"), bank)))
            for x in (images, style)
        )
        apart = apart + (one - two).square().sum((1, 2)).sqrt()
        images, style = F.avg_pool2d(images, 2), F.avg_pool2d(style, 2)
    return apart


def outline(images):
    """Sobel magnitude of luminance, blurred by side / 64 -> (b, pixels), mean 0, deviation 1."""
    side, sobel = images.shape[-1], torch.tensor([[1.0, 2, 1], [0, 0, 0], [-1, -2, -1]])
    edges = (
        F.conv2d(
            F.pad(TF.rgb_to_grayscale(images), (1,) * 4, mode="reflect"),
            torch.stack([sobel, sobel.T])[:, None],
        )
        .square()
        .sum(1, keepdim=True)
        .sqrt()
    )
    edges = TF.gaussian_blur(edges, 2 * math.ceil(3 * side / 64) + 1, side / 64).flatten(1)
    return (edges - edges.mean(1, keepdim=True)) / edges.std(1, keepdim=True)


def test_texture_goes_and_shape_stays():
    images, styles = data.factors("val", 64, 28).images / 255, data.procedural_textures(28, 64)
    done = data.style_transfer(images, styles)
    assert ((done >= 0) & (done <= 1)).all()
    assert (1 - gram_distance(done, styles) / gram_distance(images, styles)).median() > 0.8
    assert (outline(done) * outline(images)).mean(1).median() > 0.5
    kept = data.style_transfer(images, styles, keep_color=True)  # the picture's own colours
    colour = lambda x: (x - TF.rgb_to_grayscale(x)).mean((2, 3))
    assert (colour(kept) - colour(images)).abs().mean() < 0.3 * (
        colour(done) - colour(images)
    ).abs().mean()
    assert (outline(kept) * outline(images)).mean(1).median() < 0.95  # and still another texture


def test_optimisation_comes_closer_to_the_style():
    images, styles = data.factors("val", 32, 16).images / 255, data.procedural_textures(16, 32)
    near = [data.style_transfer(images, styles, steps=steps, content=0.0) for steps in (0, 10)]
    loss = lambda x: sum(
        (data.gram(a) - data.gram(b)).square().mean((1, 2))
        for a, b in zip(data.random_features(x)[0], data.random_features(styles)[0])
    )
    assert (loss(near[1]) < loss(near[0])).float().mean() > 0.9


def test_recolor_gives_the_moments():
    mix = lambda seed: torch.einsum(
        "kc,bchw->bkhw",
        torch.rand(3, 3, generator=generator("mix", seed)),
        torch.rand(3, 3, 16, 16, generator=generator(seed)),
    )
    x, style = mix(0), mix(1)
    done = data.match_color(x, style)
    torch.testing.assert_close(done.mean((2, 3)), style.mean((2, 3)), atol=1e-4, rtol=0)
    for a, b in zip(done, style):
        torch.testing.assert_close(a.flatten(1).cov(), b.flatten(1).cov(), atol=2e-3, rtol=0)


def test_vgg_features_are_the_published_layers():
    net = torchvision.models.vgg19(weights=None).eval().requires_grad_(False)
    maps, content = data.vgg_features(net, torch.rand(1, 3, 64, 64))
    assert (
        [m.shape[1] for m in maps] == [64, 128, 256, 512, 512, 512]
        and [m.shape[2] for m in maps] == [64, 32, 16, 8, 8, 4]
        and content == 4
    )
    assert all((m >= 0).all() for m in maps)  # after ReLU, and not overwritten by the next layer
    done = data.style_transfer(
        torch.rand(1, 3, 64, 64),
        data.procedural_textures(1, 64),
        lambda x: data.vgg_features(net, x),
        steps=1,
    )
    assert done.isfinite().all()


def test_texture_takes_the_drawn_copy():
    images, copies = (
        torch.zeros(4, 3, 8, 8),
        torch.arange(1.0, 9).view(4, 2, 1, 1, 1).expand(4, 2, 3, 8, 8) / 10,
    )
    draw = {
        "stylised": torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]).bool(),
        "copy": torch.tensor([0.0, 0.6, 0, 0.99, 0, 0.4, 0.5, 0]),
    }
    views = loo.texture(
        images.repeat(2, 1, 1, 1), draw, copies, torch.arange(4).repeat(2)
    )  # two views of four pictures
    torch.testing.assert_close(views[:, 0, 0, 0] * 10, torch.tensor([1.0, 4, 0, 8, 0, 3, 6, 0]))
    with pytest.raises(ValueError, match="textures"):
        loo.augment_groups(images, ("texture",), torch.zeros(1, 1, dtype=torch.bool), generator(0))
    share = loo.methods(("texture",))["looc"].share
    query, keys, _ = loo.augment_groups(
        images, ("texture",), share, generator(0), always=(), textures=copies
    )
    assert torch.equal(query, keys[1]) and not torch.equal(query, keys[0])


def test_pack_is_read_by_training_and_whole_or_not_at_all(here, capsys, monkeypatch):
    root = photo_tree(here / "photos", each=12)
    run(data, "pack --root=photos --size=28 --out=packed")  # by another name of the same folder
    monkeypatch.setattr(data, "decode", None)
    flags = f"train --data=folder --root={root} --size=28 --batch=16 {TINY}"
    for cache, place in (("auto", "on disk"), ("none", "on disk"), ("host", "in memory")):
        run(loo, f"{flags} --packed=packed --cache={cache} --out={cache}")
        assert place in capsys.readouterr().out
    same_run("auto", "host")
    monkeypatch.undo(), monkeypatch.chdir(here)
    next((here / "packed").glob("*.canvases")).unlink()  # to free the disk, say
    run(loo, f"{flags} --packed=packed --out=again")
    same_run("auto", "again")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(SystemExit):
        run(data, "pack --root=photos --size=28 --out=full")
    assert "No space left" in capsys.readouterr().err and not list((here / "full").iterdir())


def test_copies_belong_to_their_pictures(tmp_path):
    for i in range(8):
        picture(tmp_path / "photos" / "train" / "a" / f"{i}.png", (30 * i, 0, 0))
        for k in range(2):
            picture(
                tmp_path / "copies" / "train" / "a" / f"{i}.png.{k}.jpg", (30 * i + 7 * k, 0, 0)
            )
    (tmp_path / "photos" / "train" / "a" / "2.png").write_bytes(b"broken")
    files = data.open_dataset("folder", "train", root=tmp_path / "photos", size=12, canvas=12)
    copies = data.with_textures(
        "folder", files, data.decode_all(files), tmp_path / "photos", tmp_path / "copies", tmp_path
    ).textures[:, :, 0, 6, 6]
    assert copies.tolist() == [[30 * i, 30 * i + 7] for i in (0, 1, 3, 4, 5, 6, 7)]
    (tmp_path / "copies" / "train" / "a" / "3.png.1.jpg").write_bytes(b"broken")
    with pytest.raises(
        UserError, match="3.png.1.jpg: .*remove it: `python data.py stylize` writes it again"
    ):
        data.with_textures(
            "folder",
            files,
            data.decode_all(files),
            tmp_path / "photos",
            tmp_path / "copies",
            tmp_path,
        )


def test_stylize_goes_on_and_training_reads_it(here, capsys):
    root = photo_tree(here / "photos", each=12)
    run(
        data,
        f"stylize --root={root} --out=copies --size=32 --copies=2 --features=random --steps=1 --batch=3",
    )
    made = sorted((here / "copies").rglob("*.jpg"))
    texts = {p: p.read_bytes() for p in made}
    assert len(made) % 2 == 0 and all(
        (root / p.relative_to(here / "copies").parent).is_dir() for p in made
    )
    made[3].unlink()
    with pytest.raises(SystemExit):
        run(
            loo,
            f"train --data=folder --root={root} --groups=color,texture --textures=copies --out=run --size=28 --batch=16 {TINY}",
        )
    assert made[3].name in capsys.readouterr().err and not (here / "run").exists()
    run(
        data, f"stylize --root={root} --out=copies --size=32 --copies=2 --features=random --steps=1"
    )
    assert {p: p.read_bytes() for p in made} == texts  # the same style again, the others untouched
    run(
        loo,
        f"train --data=folder --root={root} --groups=color,texture --textures=copies --out=run --size=28 --batch=16 {TINY}",
    )
    assert "spaces all, color, texture" in capsys.readouterr().out


# ---------------------------------------------------------------- probes


def test_logistic_finds_the_minimum():
    """Two points, one dimension: the gradient of its own objective vanishes; l2 1 on +-1 gives w = sigmoid(-w), solved by hand."""
    x, y = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([1, 0])
    w, b = judge.logistic(x, y, 2, 1.0)
    assert w[1, 0] == pytest.approx(-w[0, 0].item(), abs=1e-6) and b.abs().max() < 1e-6
    slope = w[1, 0].item()  # d/dw of log(1 + exp(-2w)) + w^2: w = 1 / (1 + exp(2w))
    assert slope == pytest.approx(1 / (1 + math.exp(2 * slope)), abs=1e-5)


def test_linear_probe_of_separable_features():
    y = torch.arange(400) % 4
    x = F.one_hot(y, 4) * 2.0 + 0.1 * torch.randn(400, 4, generator=generator(0))
    assert judge.accuracy(F.linear(x, *judge.lbfgs_probe(x, y, 4, seed=0)), y) == 100


def test_pictures_are_held_out_with_all_their_turns(monkeypatch):
    x, y, seen = (
        torch.arange(50.0).repeat(4)[:, None],
        torch.arange(4).repeat_interleave(50),
        [],
    )  # a sample is its picture's number

    def logistic(x, y, k, *_):
        seen.append((x[:, 0].tolist(), y.tolist()))
        return torch.zeros(k, 1), torch.zeros(k)

    monkeypatch.setattr(judge, "logistic", logistic)
    judge.lbfgs_probe(x, y, 4, seed=0, turns=4)
    rest, labels = seen[0]
    assert len(set(zip(rest, labels))) == 160 and all(rest.count(picture) == 4 for picture in rest)
    assert len(seen[-1][0]) == 200


def test_few_shot_trials_do_not_touch_each_other():
    x, y = torch.randn(3, 20, 5, generator=generator(0)), torch.arange(20).expand(3, 20) % 4
    together = judge.fit_few_shot(x, y, 4, 50)
    for t in range(3):
        alone = judge.fit_few_shot(x[t : t + 1], y[t : t + 1], 4, 50)
        assert all(torch.allclose(a[t], b[0], atol=1e-5) for a, b in zip(together, alone))


def test_shots_are_drawn_per_class_and_trial():
    y = torch.arange(60) % 4
    rows = judge.sample_shots(y, 4, 5, 3, seed=0)
    assert rows.shape == (3, 20) and all(
        torch.bincount(y[r]).tolist() == [5] * 4 and len(set(r.tolist())) == 20 for r in rows
    )
    assert rows[0].tolist() != rows[1].tolist()
    with pytest.raises(loo.UserError, match="only 15"):
        judge.sample_shots(y, 4, 16, 1, seed=0)


def test_knn_is_a_naive_loop():
    x, test, y = (
        torch.randn(50, 6, generator=generator(0)),
        torch.randn(9, 6, generator=generator(1)),
        torch.arange(50) % 3,
    )
    ours = judge.knn_predict(x, y, 3, test, neighbours=7)
    for i in range(9):
        similar = sorted(
            ((F.cosine_similarity(test[i], x[j], dim=0).item(), y[j].item()) for j in range(50)),
            reverse=True,
        )[:7]
        want = [sum(math.exp((s - 1) / 0.07) for s, c in similar if c == k) for k in range(3)]
        assert ours[i].tolist() == pytest.approx(want, rel=1e-3)


def test_interval_is_students():
    assert judge.t_ci95([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-3)
    assert judge.t_ci95([5.0]) == math.inf
    for freedom, tail, t in (
        (4, 0.005, 4.604095),
        (4, 0.001, 7.173182),
        (2, 0.005, 9.924843),
        (1, 0.0005, 636.6192),
    ):  # from tables
        assert judge.t_quantile(freedom, tail) == pytest.approx(t, rel=1e-3)
    assert judge.t_ci95([1.0, 2.0, 3.0], of=5) == pytest.approx(9.924843 / math.sqrt(3), rel=1e-3)


def test_accuracy_counts_the_first_and_the_first_five():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9]])
    assert (
        judge.accuracy(logits, torch.tensor([0, 0])) == 50
        and judge.accuracy(logits, torch.tensor([4, 0]), 5) == 50
    )


def test_turned_features_are_those_of_turned_pictures():
    torch.manual_seed(0)
    encoder, found = loo.Encoder("small", spaces=2, hidden=16, dim=8), data.factors("val", 32, 5)
    v, z, rows = judge.features(encoder, found, (0, 1, 3), batch=2)
    assert v.shape == (15, 128) and z.shape == (2, 15, 8) and rows.tolist() == [0, 1, 2, 3, 4]
    for r, turn in enumerate((0, 1, 3)):
        want, want_z = loo.encode(encoder, found.images.rot90(turn, (2, 3)) / 255)
        torch.testing.assert_close(v[5 * r : 5 * r + 5], want.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(z[:, 5 * r : 5 * r + 5], want_z.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("w, h", [(64, 64), (96, 64), (64, 128)])
def test_evaluations_see_the_central_crop(w, h, tmp_path):
    """Resize the short side to 32, cut out the middle 28: as everyone does."""
    wide = TF.to_pil_image(
        F.interpolate(torch.rand(1, 3, 6, 6, generator=generator(w)), (h, w), mode="bicubic").clamp(
            0, 1
        )[0]
    )
    wide.save(tmp_path / "x.png"), wide.save(tmp_path / "y.png")
    want = TF.center_crop(TF.resize(wide, 32, TF.InterpolationMode.BICUBIC), 28)
    image, aspect, _ = data.open_dataset(
        "folder", "train", root=tmp_path, size=28, central=True
    ).images[0]
    assert (
        image.shape == (3, 28, 28)
        and aspect == 1
        and (image - TF.pil_to_tensor(want).float()).abs().mean() < 1
    )


# ---------------------------------------------------------------- corruptions

g = lambda seed=0: torch.Generator().manual_seed(seed)


def scenery(b=2, side=64):
    """Photo-like: coarse and fine noise in every channel, in steps of 1 / 255."""
    octaves = [
        F.interpolate(torch.rand(b, 3, n, n, generator=g(n)), (side, side), mode="bicubic")
        / (k + 1)
        for k, n in enumerate((3, 8, 24, 64))
    ]
    return (sum(octaves) / 2.1).clamp(0, 1).mul(255).round() / 255


def change(images, worse):
    return (worse - images).abs().mean().item()


@pytest.mark.parametrize("name", data.CORRUPTIONS)
@pytest.mark.parametrize("side", [32, 64])
def test_contract(name, side):
    images = scenery(3, side)
    kept = images.clone()
    for severity in range(1, 6):
        worse = data.corrupt(images, name, severity, g(1))
        assert (
            worse.shape == images.shape
            and worse.dtype == images.dtype
            and 0 <= worse.min()
            and worse.max() <= 1
        )
        torch.testing.assert_close(worse * 255, (worse * 255).round(), atol=1e-4, rtol=0)
        assert torch.equal(worse, data.corrupt(images, name, severity, g(1))) and torch.equal(
            images, kept
        )
        assert change(images, worse) > 0.002
    random = name not in (
        "defocus_blur",
        "zoom_blur",
        "brightness",
        "contrast",
        "pixelate",
        "jpeg_compression",
    )
    twins = data.corrupt(images[:1].expand(2, -1, -1, -1), name, 5, g(1))
    assert torch.equal(*twins) != random  # every picture has its own draw


# glass, snow, frost and elastic are left out: as published, some of their severities are no worse than the one before
@pytest.mark.parametrize(
    "name", sorted(set(data.CORRUPTIONS) - {"glass_blur", "snow", "frost", "elastic_transform"})
)
def test_severities_increase(name):
    images = scenery(16)
    found = [change(images, data.corrupt(images, name, severity, g(1))) for severity in range(1, 6)]
    assert all(a < b for a, b in zip(found, found[1:])), found


def test_noise_has_the_published_moments():
    gray = torch.full((4, 3, 128, 128), 0.5)
    noise = data.gaussian_noise(gray, g(), 0.08) - 0.5
    assert abs(noise.std() - 0.08) < 0.001 and abs(noise.mean()) < 0.001
    counts = data.shot_noise(gray, g(), 60) * 60  # Poisson: mean and variance are both 30
    assert abs(counts.mean() - 30) < 0.1 and abs(counts.var() - 30) < 0.5
    torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
    salt = data.impulse_noise(gray, g(), 0.27)
    assert (
        abs((salt == 0).float().mean() - 0.135) < 0.005
        and abs((salt == 1).float().mean() - 0.135) < 0.005
    )
    assert abs((salt == 0.5).float().mean() - 0.73) < 0.005
    assert ((salt != 0.5).sum(1) == 1).any()  # channels are hit one by one


def test_convolve_is_the_naive_loop():
    images, kernels = torch.rand(2, 3, 9, 9, generator=g()), torch.rand(2, 5, 5, generator=g(1))
    padded = F.pad(images, (2, 2, 2, 2), "reflect")
    naive = torch.zeros_like(images)
    for b in range(2):
        for y in range(9):
            for x in range(9):
                for i in range(5):
                    for j in range(5):  # a convolution: the kernel is turned
                        naive[b, :, y, x] += (
                            kernels[b, i, j] / kernels[b].sum() * padded[b, :, y + 4 - i, x + 4 - j]
                        )
    torch.testing.assert_close(data.convolve(images, kernels, "reflect"), naive, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side, radius", [(224, 6), (32, 3)])
def test_defocus_spreads_a_dot_over_a_disk(side, radius):
    dot = torch.zeros(1, 1, side, side)
    dot[..., side // 2, side // 2] = 1
    disk = data.defocus_blur(dot, g(), radius)[0, 0]
    away = torch.arange(side) - side // 2
    reach = radius * side / 224
    distance = torch.hypot(away[:, None].float(), away.float())
    assert abs(disk.sum() - 1) < 1e-4 and disk[distance > reach + math.sqrt(2)].abs().max() < 1e-6
    torch.testing.assert_close(disk, disk.T)
    if reach > 3:  # even in the middle: one over the area
        middle = disk[distance < reach - math.sqrt(2)]
        torch.testing.assert_close(
            middle, torch.full_like(middle, 1 / (math.pi * reach**2)), rtol=0.02, atol=0
        )
    else:  # half a pixel: still a blur, by bilinear weights
        assert 0.3 < disk.max() < 0.9


def test_hat_keeps_position_and_mass():
    points = torch.tensor([[-1.3, 0.0, 0.25, 2.0]])
    weights = data.bilinear_weights(points, 3)
    torch.testing.assert_close(weights.sum(-2), torch.ones(1, 4))
    torch.testing.assert_close((torch.arange(-3, 4.0)[:, None] * weights).sum(-2), points)


@pytest.mark.parametrize("sigma", [0.1, 1.3, 40.0])
def test_gaussian_is_the_naive_sum(sigma):
    n, reach = 12, math.ceil(4 * sigma)
    line = torch.rand(n, generator=g())
    mirror = lambda i: i % (2 * n) if i % (2 * n) < n else 2 * n - 1 - i % (2 * n)
    tap = lambda d: math.exp(-((d / sigma) ** 2) / 2)
    naive = [
        sum(tap(i - p) * line[mirror(i)].item() for i in range(-reach, n + reach))
        / sum(tap(i - p) for i in range(-reach, n + reach))
        for p in range(n)
    ]
    ours = data.gaussian_filter(line.expand(1, 1, n, n), sigma)[
        0, 0
    ]  # constant along the columns: rows alone are blurred
    torch.testing.assert_close(ours, torch.tensor(naive).expand(n, n), atol=1e-5, rtol=0)


def test_smear_goes_one_way_along_the_angle():
    dots = torch.zeros(2, 1, 224, 224)
    dots[..., 100, 100] = 1
    right, diagonal = data.motion_blur_kernel(dots, torch.tensor([0.0, 45.0]), 10, 8)[:, 0]
    torch.testing.assert_close(
        right[100, 101:121] / right[100, 100],
        (-((torch.arange(1, 21.0) / 8) ** 2) / 2).exp(),
        atol=1e-4,
        rtol=0,
    )
    assert right[100, :100].abs().max() < 1e-5 and right[101:].abs().max() < 1e-5
    assert (
        diagonal[104, 104] > 0.01
        and diagonal[104, 96].abs() < 1e-5
        and diagonal[100, 104].abs() < 1e-5
    )


@pytest.mark.parametrize("side, distance, far", [(224, 3, 3), (64, 4, 2)])
def test_glass_takes_colours_from_near(side, distance, far):
    """Every pixel carries its own place; a pass is also played with a plain loop over the same draws."""
    place = torch.arange(side * side).view(1, 1, side, side).float()
    moved = data.glass_blur(place, g(), 1e-3, distance, 1).round().long()[0, 0]
    whole, fraction = divmod(distance * side / 224, 1)
    edge, generator = math.ceil(distance * side / 224), g()
    reach = whole + (torch.rand(1, 2, side, side, generator=generator) < fraction)
    steps = (
        ((torch.rand(1, 2, side, side, generator=generator) * 2 - 1) * reach)
        .floor()
        .long()[0]
        .tolist()
    )
    naive = place[0, 0].long().tolist()
    for y in range(side - edge, edge, -1):
        for x in range(side - edge, edge, -1):
            naive[y][x] = naive[y + steps[0][y][x]][x + steps[1][y][x]]
    assert edge == far and moved.tolist() == naive
    assert 0.5 < (moved != place[0, 0].long()).float().mean() < 0.99


def test_zoom_keeps_the_middle_and_reads_inwards():
    ramp = torch.linspace(-1, 1, 65).expand(1, 1, 65, 65)
    zoomed = data.zoom_blur(ramp, g(), 0.1, 4)[0, 0, 32]
    factor = (1 + sum(1 / (1 + 0.1 * i) for i in range(4))) / 5
    torch.testing.assert_close(zoomed, ramp[0, 0, 32] * factor, atol=1e-5, rtol=0)


def test_plasma_is_smooth_and_full():
    for side in (32, 100, 224):
        clouds = data.plasma(3, side, 2, g())
        assert (
            clouds.shape == (3, 1, side, side)
            and 0 <= clouds.min()
            and clouds.max() <= 1
            and (clouds.amax((1, 2, 3)) > 0.5).all()
        )
        assert clouds.diff(dim=3).abs().mean() < 0.35 * 6 / side


def test_plasma_is_diamond_square():
    """Three passes by hand: the middles, then the sides, each the mean of four neighbours plus noise."""
    draws, u = g(), lambda n: torch.rand(1, n, n, generator=draws)[0] * 2 - 1
    field = torch.zeros(1, 1)
    for noise in (1.0, 1 / 9.0, 1 / 81.0):
        n = len(field)
        field, old = torch.zeros(2 * n, 2 * n), field
        field[::2, ::2] = old
        near = lambda y, x, steps: (
            sum(field[(y + dy) % (2 * n), (x + dx) % (2 * n)] for dy, dx in steps) / 4
        )
        for (oy, ox), steps in {
            (1, 1): [(-1, -1), (-1, 1), (1, -1), (1, 1)],
            (0, 1): (plus := [(-1, 0), (1, 0), (0, -1), (0, 1)]),
            (1, 0): plus,
        }.items():
            draw = u(n) * noise
            for y in range(n):
                for x in range(n):
                    field[2 * y + oy, 2 * x + ox] = near(2 * y + oy, 2 * x + ox, steps) + draw[y, x]
    field = (field - field.min()) / (field.max() - field.min())
    torch.testing.assert_close(data.plasma(1, 7, 3, g())[0, 0], field[:7, :7], atol=1e-5, rtol=0)


def test_fog_is_the_published_formula():
    images = scenery() * 0.8
    clouds, top = data.plasma(2, 64, 2, g()), images.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(
        data.fog(images, g(), 1.5, 2), (images + 1.5 * clouds) * top / (top + 1.5)
    )


def test_snow_and_frost_brighten_as_much_as_published():
    black = torch.zeros(64, 3, 64, 64)
    assert all(
        abs(data.corrupt(black, "frost", s, g()).mean() / amount - 0.63) < 0.06
        for s, amount in enumerate((0.4, 0.6, 0.7, 0.7, 0.75), 1)
    )
    worse = [
        data.snow(torch.zeros(12, 3, side, side), g(), 0.55, 0.3, 4, 0.9, 12, 8, 0.7)
        for side in (32, 224)
    ]
    small, large = (
        one.mean() - 0.3 * 0.5 for one in worse
    )  # the flakes' mean does not depend on the size
    assert (
        0.05 < small < 0.2
        and abs(small - large) < 0.01
        and all(torch.allclose(one, one.rot90(2, (2, 3)), atol=1e-6) for one in worse)
    )


def test_brightness_is_hsvs_value():
    images = torch.rand(1, 3, 8, 8, generator=g())
    images[0, :, 0, 0] = 0
    for pixel, ours in zip(
        images[0].flatten(1).T.tolist(), data.brightness(images, g(), 0.3)[0].flatten(1).T
    ):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        torch.testing.assert_close(
            ours, torch.tensor(colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1))), atol=1e-5, rtol=0
        )


def test_contrast_shrinks_towards_each_channels_mean():
    images = scenery()
    mean = images.mean((2, 3), keepdim=True)
    torch.testing.assert_close(data.contrast(images, g(), 0.2), (images - mean) * 0.2 + mean)


@pytest.mark.parametrize("side", [224, 112])
def test_elastic_moves_as_far_as_it_says(side):
    """A picture of coordinates says where each pixel came from, in pixels at 224."""
    b, rim = 4, side // 4
    at = (torch.arange(side) + 0.5) * 2 / side - 1
    place = torch.stack([at.expand(side, side), at[:, None].expand(side, side)])
    came = lambda *c: (
        (data.elastic_transform(place.expand(b, 2, side, side), g(), *c) - place)[
            :, :, rim:-rim, rim:-rim
        ]
        * 112
    )
    still = came(0.0, 2.44, 0.0)
    assert still.abs().max() < 0.01
    affine = came(0.0, 2.44, 4.88)  # in the middle of the points: no further than they move
    assert 1 < affine.abs().max() < 1.3 * 4.88
    assert affine.diff(n=2, dim=2).abs().max() < 0.01
    local = came(50.0, 5.0, 0.0)
    std = 50 / math.sqrt(3) / (2 * math.sqrt(math.pi) * 5)  # of uniform noise after the blur
    assert abs(local.std() / std - 1) < 0.15 and local.abs().max() < 6 * std


@pytest.mark.parametrize("share", [0.6, 0.5, 0.4, 0.3, 0.25])
@pytest.mark.parametrize("side", [224, 32])
def test_pixelate_is_pils_box_and_nearest(share, side):
    images = scenery(1, side)
    small = TF.to_pil_image(images[0]).resize((int(side * share),) * 2, Image.BOX)
    theirs = TF.pil_to_tensor(small.resize((side, side), Image.NEAREST))
    assert (
        data.pixelate(images, g(), share)[0] * 255 - theirs
    ).abs().max() < 1.01  # PIL rounds once a side


def test_jpeg_is_pils(tmp_path):
    images = scenery(2)
    TF.to_pil_image(images[1]).save(tmp_path / "x.jpg", quality=10)
    theirs = TF.pil_to_tensor(Image.open(tmp_path / "x.jpg"))
    assert (data.jpeg_compression(images, g(), 10)[1] * 255 - theirs).abs().float().mean() < 0.5


# ---------------------------------------------------------------- the commands


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own, and a factors set that trains in seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "FACTORS", {"train": 256, "val": 1024, "test": 128, "viewpoint": 64})
    monkeypatch.setattr(data, "HUES", 4)
    return tmp_path


def run(module, line):
    commands = {
        loo: {"train": loo.train, "methods": loo.show_methods, "bench": loo.bench},
        data: {"stylize": data.stylize, "pack": data.pack},
        judge: {
            t.__name__: t
            for t in (
                judge.linear,
                judge.rotation,
                judge.fewshot,
                judge.knn,
                judge.robust,
                judge.spaces,
                judge.retrieve,
                judge.table,
                judge.claims,
            )
        },
    }[module]
    data.command_line(commands, line.split())


TINY = "--epochs=1 --queue=16 --hidden=16 --dim=8"
SMALL = "--batch=64 --queue=64 --hidden=32 --dim=16"


@pytest.mark.parametrize(
    "line, right",
    [
        ("train --epochz=3", "--epochs"),
        ("train --lr=abc", "a number"),
        ("train --epochs=2.5", "a whole number"),
        ("train --epochs", "a whole number"),
        ("train --groups=colour", "color"),
        ("train --data=nope", "factors"),
        ("train --data=folder --root=/missing", "/missing"),
        ("train --root=.", "folder"),
        ("train --method=loco", "looc"),
        ("train --batch=100", "--splits=8"),
        ("train --lr=-1", "more than 0"),
        ("train --arch=resnet19", "resnet18"),
        ("train --schedule=cosinus", "cosine"),
        ("train --groups=color,color", "twice"),
        ("trian", "train"),
        ("train --fresh=maybe", "true or false"),
        ("train epochs=3", "--epochs"),
        ("train --canvas=64", "--size"),
        ("train -epochs=3", "two dashes"),
        ("train --epochs=3 lr=2", "two dashes"),
        ("train --method=looc --groups=", "at least one"),
        ("train --momentum=9", "0 to 1"),
        ("train --device=gpu", "cuda"),
        ("train --device=cuda:99", "CUDA devices"),
        ("train --method=moco_same --groups=color", "--same=rotation"),
        ("train --weight_decay=-1", "0 or more"),
        ("train --textures=.", "--groups=color,texture"),
        ("train --cache=disk", "device"),
        ("train --packed=nope", "data.py pack"),
        ("train --method=supervised --label=hues", "hue"),
        ("train --batch=100000 --splits=1", "smaller"),
    ],
)
def test_bad_flags_are_one_clear_line_and_nothing_is_written(line, right, here, capsys):
    with pytest.raises(SystemExit) as stop:
        run(loo, line)
    err = capsys.readouterr().err.strip()
    assert (
        stop.value.code == 2
        and right in err
        and len(err.splitlines()) == 1
        and "Traceback" not in err
    )
    assert not list(here.iterdir())


def test_types_come_from_the_signature(here):
    got = []

    def command(out: str = "x", groups: tuple = (), lr: float = 1.0, fresh: bool = False):
        got.append((out, groups, lr, fresh))

    data.command_line({"go": command}, ["go", "--out=1e3", "--groups=color", "--lr=3", "--fresh"])
    data.command_line({"go": command}, ["go", "--out", "runs/lr=3"])
    assert got == [("1e3", ("color",), 3.0, True), ("runs/lr=3", (), 1.0, False)]
    data.command_line({"go": command}, ["go", "--out", "lr=.1", "--fresh"])
    assert got[2] == ("lr=.1", (), 1.0, True)


@pytest.mark.parametrize("method", ["looc", "looc++", "moco_same", "supervised"])
def test_train_then_judge(method, here, capsys):
    run(loo, f"train --method={method} --epochs=2 --out=run {SMALL}")
    assert {p.name for p in (here / "run").iterdir()} - {"checkpoint.old.pt"} == {
        "config.json",
        "log.jsonl",
        "views.png",
        "checkpoint.pt",
        "backbone.pt",
        "heads.pt",
    }
    log = [json.loads(line) for line in (here / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 9)) and len(log[0]["loss"]) == (
        3 if "looc" in method else 1
    )
    assert (here / "runs" / "latest").resolve() == here / "run"
    capsys.readouterr()
    run(judge, "linear --label=object,hue --json")
    run(judge, "fewshot --run=run --label=hue --trials=3 --json")
    run(judge, "rotation --json")
    if method == "looc++":
        run(judge, "knn --label=object --feature=color --json")
    out = capsys.readouterr().out
    assert out == (here / "run" / "results.jsonl").read_text()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(x["task"], x["label"], x["shots"]) for x in lines[:5]] == [
        ("linear", "object", None),
        ("linear", "hue", None),
        ("fewshot", "hue", 5),
        ("fewshot", "hue", 10),
        ("rotation", "rotation", None),
    ]
    assert all(
        0 <= x["top1"] <= 100 and x["method"] == method and x["groups"] == ["color", "rotation"]
        for x in lines
    )
    run(judge, "table --runs=run")
    assert method in capsys.readouterr().out


def same_run(a, b):
    """Checkpoints and logs, bit for bit, but for what was timed."""
    a, b = Path(a), Path(b)
    one, two = (torch.load(r / "checkpoint.pt", weights_only=True) for r in (a, b))
    for part in ("query", "key"):
        assert all(torch.equal(x, two[part][k]) for k, x in one[part].items())
    assert (
        torch.equal(one["queue"], two["queue"])
        and torch.equal(one["total"], two["total"])
        and one["pointer"] == two["pointer"]
        and one["step"] == two["step"]
    )
    untimed = lambda r: [
        {k: v for k, v in line.items() if k not in ("images_per_s", "seconds_left")}
        for line in loo.read_jsonl(r / "log.jsonl")
    ]
    assert untimed(a) == untimed(b)


QUICK = "--size=16 --batch=8 --splits=2 --queue=8 --hidden=8 --dim=4"


def test_a_run_goes_on_where_it_stopped(here, capsys, monkeypatch):
    """Ended anywhere and resumed equals uninterrupted, bit for bit; other settings are refused, --fresh keeps the old run."""
    monkeypatch.setattr(
        data, "FACTORS", {"train": 840, "val": 64, "test": 64}
    )  # 420 steps, two to a line of the log
    line, step = f"train --method=moco --epochs=4 --save_every=7 {QUICK}", loo.train_step
    run(loo, f"{line} --out=whole")
    for at in (17, 106, 107, 419):

        def step_or_stop(state, *rest):
            if state.step == at:
                raise RuntimeError("stopped here")
            return step(state, *rest)

        monkeypatch.setattr(loo, "train_step", step_or_stop)
        with pytest.raises(RuntimeError, match="stopped here"):
            run(loo, f"{line} --out=parts")
    monkeypatch.setattr(loo, "train_step", step)
    capsys.readouterr()
    run(loo, f"{line} --out=parts")
    assert "resuming parts at step 413" in capsys.readouterr().out
    same_run("whole", "parts")
    with pytest.raises(SystemExit):
        run(loo, f"{line} --out=parts --tau=.3")
    assert "--tau=0.3" in capsys.readouterr().err
    run(loo, f"train --method=moco --epochs=1 --out=parts --fresh {QUICK}")
    assert (here / "parts.1" / "backbone.pt").exists()


def program(line, pictures=400, ranks=None):
    """The training as a process of its own, or as `ranks` of them under torchrun, on few pictures."""
    Path("program.py").write_text(
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's & ignores it
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import data, loo; data.FACTORS['train'] = {pictures}; "
        f"data.command_line({{'train': loo.train}})"
    )
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks
        else []
    )
    return subprocess.Popen(
        [sys.executable, *launch, "program.py", *line.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_killed_at_any_moment_and_resumed_is_uninterrupted(here):
    """kill -9 at random moments, while checkpoints are written too: one a step."""
    line = f"train --epochs=3 --save_every=1 {QUICK}"
    assert program(f"{line} --out=whole").wait(60) == 0
    chance, kills = random.Random(0), 0
    while True:
        process = program(f"{line} --out=parts")
        while process.poll() is None and not (here / "parts" / "checkpoint.pt").exists():
            time.sleep(0.01)
        try:
            process.wait(chance.uniform(0, 1.5) + (2 if kills else 0) if kills < 2 else 60)
            break
        except subprocess.TimeoutExpired:
            process.kill(), process.wait()
            kills += 1
    assert process.returncode == 0 and kills
    same_run("whole", "parts")


def test_two_processes_then_one_then_two_is_one(here):
    """Killed on two ranks, ended by a signal on one, finished on two, in float64: as if one process had never stopped."""
    line = f"train --epochs=2 --save_every=5 --precision=float64 {QUICK}"
    whole = program(f"{line} --out=whole")
    process, begun = program(f"{line} --out=parts", ranks=2), time.time()
    while not (here / "parts" / "checkpoint.pt").exists():
        assert time.time() < begun + 60
        time.sleep(0.01)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[1]), signal.SIGKILL)
    begun, said = time.time(), process.communicate(timeout=60)[0]
    assert process.returncode and "on 2 processes" in said and time.time() < begun + 60
    process = program(f"{line} --out=parts")
    while "resuming parts at step" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    process = program(f"{line} --out=parts", ranks=2)
    assert (
        "resuming parts at step" in process.communicate(timeout=90)[0]
        and process.returncode == whole.wait(60) == 0
    )
    one, many = (
        torch.load(here / out / "checkpoint.pt", weights_only=True) for out in ("whole", "parts")
    )
    assert one["step"] == many["step"] == 100 and one["pointer"] == many["pointer"]
    for part in ("query", "key", "queue"):
        torch.testing.assert_close(many[part], one[part], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_a_last_checkpoint(number, here):
    process = program(f"train --epochs=500 --out=run {QUICK}")
    while "step" not in process.stdout.readline() or not (here / "run" / "log.jsonl").exists():
        pass
    time.sleep(0.3)
    process.send_signal(number)
    *_, said, resume_with = process.communicate(timeout=60)[0].splitlines()
    saved = torch.load(here / "run" / "checkpoint.pt", weights_only=True)
    assert (
        process.returncode == 128 + number
        and number.name in said
        and f"step {saved['step']}," in said
    )
    assert resume_with.startswith("resume with: python") and "--epochs=500 --out=run" in resume_with


def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_last_good_step(here, capsys, monkeypatch):
    run(loo, f"train --epochs=1 --out=run --save_every=2 {SMALL}")
    step = loo.train_step

    def poisoned(state, *rest):
        state, out = step(state, *rest)
        if state.step == 3:
            next(state.query.parameters()).data.fill_(math.nan)
        return state, out

    monkeypatch.setattr(loo, "train_step", poisoned)
    with pytest.raises(SystemExit) as stop:
        run(loo, f"train --epochs=1 --out=other --save_every=2 {SMALL}")
    assert stop.value.code == 3 and "not finite at step 3" in capsys.readouterr().err
    saved = torch.load(here / "other" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2 and all(x.isfinite().all() for x in saved["query"].values())


class Bomb:
    def __reduce__(self):
        return open, ("bomb", "w")


@pytest.mark.parametrize("ruin", ["cut", "bomb", "other", "both"])
def test_a_ruined_checkpoint_gives_way_to_the_one_before(ruin, here, capsys):
    run(loo, f"train --epochs=1 --out=run --save_every=3 {SMALL}")
    path = here / "run" / "checkpoint.pt"
    if ruin in ("cut", "both"):
        path.write_bytes(path.read_bytes()[:1000])
    else:
        torch.save({"version": 9} if ruin == "other" else Bomb(), path)
    if ruin == "both":
        path.with_name("checkpoint.old.pt").write_bytes(b"")
        with pytest.raises(SystemExit):
            run(loo, f"train --epochs=1 --out=run {SMALL}")
        assert "--fresh" in capsys.readouterr().err
    else:
        run(loo, f"train --epochs=1 --out=run {SMALL}")
        out = capsys.readouterr()
        assert (
            "resuming run at step 3" in out.out
            and "warning: run/checkpoint.pt is" in out.err
            and not (here / "bomb").exists()
        )


def test_a_second_trainer_is_refused(here, capsys):
    with loo.lock_folder(here / "run"), pytest.raises(SystemExit) as stop:
        run(loo, f"train --epochs=1 --out=run {SMALL}")
    assert stop.value.code == 2 and "another process is training in run" in capsys.readouterr().err
    run(loo, f"train --epochs=1 --out=run {SMALL}")


def test_a_full_disk_leaves_what_was_there(here, monkeypatch):
    data.write_atomic(here / "x.pt", b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(loo.UserError, match="x.pt, which needs 3.0 MB: No space left"):
        data.write_atomic(here / "x.pt", bytes(3 << 20), keep=here / "y.pt")
    assert [p.name for p in here.iterdir()] == ["x.pt"] and (here / "x.pt").read_bytes() == b"old"


def test_augmentation_is_float32_whatever_the_network(monkeypatch):
    seen = []
    monkeypatch.setattr(
        loo,
        "encode",
        lambda encoder, images: seen.append(images) or (None, torch.zeros(3, len(images), 8)),
    )
    for precision in ("float32", "bfloat16"):
        config = {**CONFIG, "precision": precision, "always": ("crop", "flip", "blur"), "size": 64}
        state = loo.init_state(CONFIG)
        loo.contrastive(
            state.query,
            state.key,
            data.factors("val", 64, 16).images / 255,
            torch.ones(16),
            config,
            0,
        )
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(seen[:2], seen[2:]))


def noise_pictures(n):
    return data.ImageSet(
        torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator(0)),
        torch.ones(n),
        {},
        {},
    )


def features_of_rank(rank, size, port, run, out):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    with loo.init_distributed("cpu"):
        torch.save(
            judge.features(loo.load_encoder(run)[0], noise_pictures(300), batch=64),
            out / f"{rank}.pt",
        )


def test_ranks_share_the_extraction(untrained, tmp_path):
    run = (untrained / "runs" / "latest").resolve()
    alone = judge.features(loo.load_encoder(run)[0], noise_pictures(300), batch=64)
    spawn(features_of_rank, 2, run, tmp_path)
    for rank in range(2):
        for one, shared in zip(alone, torch.load(tmp_path / f"{rank}.pt")):
            torch.testing.assert_close(one, shared)


def test_features_leave_out_what_cannot_be_read(untrained, tmp_path):
    for i in range(6):
        picture(
            tmp_path / "pictures" / "train" / "a" / f"{i}.png", (40 * i, 200 - 30 * i, 0), side=40
        )
    whole = data.open_dataset("folder", "train", root=tmp_path / "pictures", size=32, central=True)
    encoder, _ = loo.load_encoder(untrained / "runs" / "latest")
    v, z, rows = judge.features(encoder, whole, turns=(0, 1))
    (tmp_path / "pictures" / "train" / "a" / "2.png").write_bytes(b"broken")
    w, y, left = judge.features(encoder, whole, turns=(0, 1))
    assert rows.tolist() == list(range(6)) and left.tolist() == [0, 1, 3, 4, 5]
    keep = torch.tensor([0, 1, 3, 4, 5, 6, 7, 9, 10, 11])  # both turns
    torch.testing.assert_close(w, v[keep]), torch.testing.assert_close(y, z[:, keep])


def test_shares_of_a_stream_are_all_of_it(tmp_path):
    found = data.factors("val", 8, 20)
    parts = [rows for i in range(3) for rows, *_ in data.iter_batches(found, batch=4, part=(i, 3))]
    assert (
        sorted(torch.cat(parts).tolist()) == list(range(20)) and [len(p) for p in parts] == [4] * 5
    )


def test_your_own_pictures(here, capsys):
    root = photo_tree(here / "photos", each=40)
    (root / "class0" / "broken.png").write_bytes(b"\x89PNG broken")
    run(
        loo,
        f"train --data=folder --root={root} --epochs=1 --out=run --size=28 --batch=16 --queue=16 --hidden=16 --dim=8",
    )
    run(judge, "linear --json")
    assert "broken.png" in capsys.readouterr().err
    assert json.loads((here / "run" / "results.jsonl").read_text())["label"] == "class"


@pytest.mark.parametrize("ruin, right", [("empty", "class9"), ("broken", "none of")])
def test_your_own_pictures_ruined(ruin, right, here, capsys):
    root = photo_tree(here / "photos", each=5)
    if ruin == "empty":
        (root / "class9").mkdir()
    else:
        for path in root.rglob("*.*"):
            path.write_bytes(b"broken")
    with pytest.raises(SystemExit) as stop:
        run(loo, f"train --data=folder --root={root} --batch=8 --splits=1")
    err = capsys.readouterr().err.splitlines()
    assert (
        stop.value.code == 2 and len(err) == 1 and right in err[0] and not (here / "runs").exists()
    )


def test_papers_protocol(here, capsys):
    run(loo, f"train --epochs=1 --out=run {SMALL}")
    run(judge, "rotation --protocol=paper --epochs=1 --json")
    run(judge, "linear --label=hue --protocol=paper --epochs=2 --json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"] == "paper"


def test_linear_heads_train_and_have_no_hidden_layer(here, capsys):
    run(loo, f"train --epochs=1 --out=run {SMALL} --hidden=0")
    run(judge, "spaces --label=hue --json")
    with pytest.raises(SystemExit) as stop:
        run(judge, "spaces --layer=hidden")
    assert stop.value.code == 2 and "linear" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, right",
    [
        ("linear --run=nope", "nope"),
        ("linear --label=hues", "hue"),
        ("linear --feature=colour", "color"),
        ("linear --shots=5", "--shots"),
        ("linear --protocol=papers", "paper"),
        ("linear --epochs=3", "--protocol=paper"),
        ("fewshot --shots=five", "numbers"),
        ("fewshot --shots=1,5000", "--shots=5000"),
        ("retrieve --neighbours=5000", "128"),
        ("fewshot --shots=", "numbers"),
        ("retrieve --out=.", "folder"),
        ("robust --corrupted=.", "--source=generated"),
        ("linear --workers=-1", "0 or more"),
        ("linear --data=cub200", "vision.caltech.edu"),
        ("linear --data=objectnet13 --root=.", "robust"),
        ("spaces --layer=middle", "hidden"),
    ],
)
def test_bad_evaluations_are_one_clear_line(line, right, untrained, capsys):
    with pytest.raises(SystemExit) as stop:
        run(judge, line)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and right in err and len(err.splitlines()) == 1 and not out


@pytest.fixture
def untrained(here):
    """runs/latest: a LooC encoder as it starts, 64 pictures of factors to test on."""
    (here / "runs").mkdir()
    config = {**CONFIG, "data": "factors", "root": None, "canvas": None, "groups": list(ALL)}
    loo.export(loo.init_state(config).query, here / "runs" / "latest")
    (here / "runs" / "latest" / "config.json").write_text(json.dumps(config))
    return here


def results(here):
    return loo.read_jsonl(here / "runs" / "latest" / "results.jsonl")


def test_every_task_runs_on_imagenet100(untrained, few, capsys):
    imagenet_tree(untrained / "in", few), corrupted_tree(untrained / "c", few, True)
    for name in data.OBJECTNET13:
        picture(untrained / "on" / "images" / name / "1.png", border=RED)
    for line in (
        "linear",
        "rotation",
        "knn --neighbours=3",
        "robust --corrupted=c --objectnet=on",
        "spaces --layer=output",
        "retrieve --queries=2",
    ):
        run(judge, f"{line} --data=imagenet100 --root=in --json")
    found = results(untrained)
    assert {x["n_train"] for x in found if x["task"] == "linear"} == {60} and {
        x["n_test"] for x in found if x["task"] == "rotation"
    } == {60}
    robust = {x["on"]: x for x in found if x["task"] == "robust"}
    assert (
        set(robust) == {"clean", "objectnet13", "objectnet13, of its 13", *judge.SUMMARIES}
        and len(robust) == 28
    )
    assert (
        robust["objectnet13"]["n_test"] == 13
        and robust["objectnet13"]["top1"] <= robust["objectnet13, of its 13"]["top1"]
    )
    assert robust["fog"]["n_test"] == 15 and robust["fog"]["protocol"] == "folder"
    run(judge, "table --paper")
    table = capsys.readouterr().out
    assert "| MoCo + rotation | 43.3 | - | 79.4 | - |" in table and table.count("Table") == 5


def test_papers_transfer_tasks_run(untrained, few, capsys):
    """Two shots of Flowers' classes are there only in train and val together. Without --root it is where --download leaves it."""
    flowers_tree(untrained / "downloads"), cub_tree(untrained)
    run(judge, "fewshot --data=flowers102 --shots=2 --trials=2 --json")
    run(judge, "linear --data=cub200 --root=. --json")
    few_shot, linear = results(untrained)
    assert (few_shot["n_train"], few_shot["n_test"], few_shot["shots"]) == (6, 6, 2) and (
        linear["n_train"],
        linear["n_test"],
    ) == (6, 3)


def test_published_corruptions_bring_their_own_labels(untrained):
    """Their order is not that of the clean pictures, where those lie flat."""
    b = judge.open_run()
    found = data.ImageSet(
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
        torch.ones(2),
        {"class": torch.tensor([7, 3])},
        {},
    )
    ((cell, rows, crops, labels),) = judge.corrupted_pictures(b, [found])
    assert (cell, rows.tolist(), labels["class"].tolist()) == (
        0,
        [0, 1],
        [7, 3],
    ) and crops.shape == (2, 3, 32, 32)


def test_a_published_set_with_a_broken_picture_is_no_set(few, tmp_path):
    cub_tree(tmp_path)
    next((tmp_path / "CUB_200_2011/images").rglob("3.jpg")).write_bytes(b"broken")
    with pytest.raises(loo.UserError, match="3.jpg.*download it again"):
        data.decode_all(data.open_dataset("cub200", "test", root=tmp_path))
    (tmp_path / "CUB_200_2011/image_class_labels.txt").write_text("1 1")
    with pytest.raises(loo.UserError, match="tables cannot be read as those of cub200"):
        data.open_dataset("cub200", "test", root=tmp_path)


def test_among_leaves_the_other_classes_out():
    logits = torch.tensor([[1.0, 9.0, 3.0, 2.0], [5.0, 0.0, 1.0, 2.0]])
    assert judge.restrict_classes(logits, torch.tensor([2, 3])).argmax(1).tolist() == [2, 3]


def test_robust_summarises_by_severity_and_category(untrained, capsys):
    run(judge, "robust --label=object --pictures=100 --json")
    found = {x["on"]: x for x in results(untrained)}
    assert (
        found["fog"]["n_test"] == 100
        and found["clean"]["n_test"] == 128
        and found["new viewpoint"]["n_test"] == 64
    )
    mean = lambda names: sum(found[n]["top1"] for n in names) / len(names)
    for category, names in data.IMAGENETC.items():
        assert found[category]["top1"] == pytest.approx(mean(names))
    assert found["all corruptions"]["top1"] == pytest.approx(mean(sum(data.IMAGENETC.values(), ())))
    cells = {
        name: [cell for cell, inside in zip(judge.CELLS, chosen) if inside]
        for name, chosen in judge.SUMMARIES.items()
    }
    assert cells["noise, severity 3+"] == [
        (name, s) for name in ("gaussian_noise", "shot_noise", "impulse_noise") for s in (3, 4, 5)
    ]
    assert (
        cells["fog"] == [("fog", s) for s in range(1, 6)]
        and cells["all corruptions"] == judge.CELLS
        and len(judge.CELLS) == 75
    )
    with pytest.raises(SystemExit):
        run(judge, "robust --source=folder")
    assert "--source=generated" in capsys.readouterr().err


def test_claims_name_rows_and_columns_that_there_are():
    for (_, _, rows), (columns, claims) in zip(judge.TABLES, judge.CLAIMS, strict=True):
        assert set(columns) <= set(judge.ON_FACTORS)
        for row, sign, others, some in sum(claims.values(), []):
            assert (
                {row, *others.split(" & ")} <= set(rows)
                and set(some.split(" & ")) <= set(columns)
                and sign in (">", ">=")
            )


def test_claims_train_each_row_once_and_go_on(tmp_path):
    run = tmp_path / "moco-color-2"
    mine = lambda flags={}: next(
        chain
        for chain in judge.missing_commands(tmp_path, (1, 2), flags)
        if f"--run={run}" in str(chain)
    )
    assert len(judge.missing_commands(tmp_path, (1, 2), {})) == 2 * len(
        {(m, g) for _, _, rows in judge.TABLES for m, g, *_ in rows.values()}
    )
    train, *tasks = mine({"epochs": 3})
    assert train == [
        "loo.py",
        "train",
        "--method=moco",
        "--groups=color",
        "--seed=2",
        f"--out={run}",
        "--epochs=3",
    ]
    assert [
        "eval.py",
        "robust",
        f"--run={run}",
        "--seed=2",
        "--label=object",
        "--pictures=1024",
    ] in tasks
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps(loo.default_config(method="moco", groups=("color",), seed=2, out=str(run)))
    )
    (run / "heads.pt").touch()
    assert mine() == tasks
    line = dict(
        run=run.name,
        task="rotation",
        data="factors",
        label="rotation",
        on=None,
        shots=None,
        method="moco",
        groups=["color"],
        feature="v",
        protocol="fast",
        seed=0,
        top1=50.0,
    )
    (run / "results.jsonl").write_text(json.dumps(line))
    assert mine() == [task for task in tasks if task[1] != "rotation"]
    (run / "results.jsonl").write_text(json.dumps(line | dict(protocol="paper")))
    assert mine() == tasks
    (run / "results.jsonl").write_text(
        json.dumps(line | dict(task="robust", label="object", on="clean", protocol="generated"))
    )  # stopped in the middle of robust
    assert mine() == tasks
    with pytest.raises(UserError, match="--epochs=3 .the run has 18."):
        mine({"epochs": 3})


def test_a_claim_is_decided_by_paired_intervals():
    seeds = lambda *values: dict(enumerate(values))
    cells = {
        ("a", "x"): seeds(60.0, 70, 80),
        ("b", "x"): seeds(58.0, 68.5, 77.5),
        ("c", "x"): seeds(60.5, 70.4, 80.6),
        ("d", "x"): seeds(50.0, 70, 90),
        ("e", "x"): seeds(61.5, 71.5, 81.6),
        ("f", "x"): {},
        ("g", "x"): seeds(66.5, 76.5, 86.7),
    }
    of = lambda row, sign, others: judge.judge_claim(cells, [(row, sign, others, "x")])
    mean, half = (
        2.0,
        4.302653 * 0.5 / math.sqrt(3),
    )  # differences 2, 1.5, 2.5; Student's t of two degrees of freedom
    assert (
        of("a", ">", "b") == ("holds", f"x {mean:+.1f} +- {half:.1f} (3 of 3 seeds), a over b")
        and of("b", ">", "a")[0] == "does not hold"
    )
    assert (
        of("a", ">", "d")[0] == "cannot tell"
        and of("a", ">=", "c")[0] == "holds"
        and of("a", ">", "c")[0] == "does not hold"
    )
    assert of("a", ">=", "e") == (
        "does not hold",
        "x -1.5 +- 0.1 (0 of 3 seeds above -1), a over e",
    )
    assert (
        of("a", ">", "b & d")[0] == "cannot tell"
        and of("a", ">", "b & c & d")[0] == "does not hold"
        and of("a", ">", "f")[0] == "cannot tell"
    )
    assert of("b", ">=", "a & e & g")[1].startswith("x -8.6 +- 1.5") and of("b", ">=", "e & g")[
        1
    ].endswith("x -3.5 +- 1.4 (0 of 3 seeds above -1), b over e")
    assert (
        of("a", ">", "c & b & b & b & b")[0] == "cannot tell"
    )  # one of five may be below by chance
    weakest = of("a", ">", "b & f & d")[1]
    assert weakest.index("over f") < weakest.index("over d")  # nothing known at all comes first
    cells["a", "x"].pop(0), cells["b", "x"].pop(1)  # only one seed is left that both have
    assert of("a", ">", "b") == ("cannot tell", "x +2.5 (1 of 1 seeds), a over b")


def test_claims_print_what_the_results_hold(here, capsys):
    """Every cell of every table, from lines whose values are known; a row that is not there is a dash."""
    lines, value = (
        [],
        lambda row, column, seed: 10 + seed + 7 * len(column) % 13 + 30 * (row[0] == "looc"),
    )
    for (_, _, rows), (columns, _) in zip(judge.TABLES, judge.CLAIMS):
        for row, column in itertools.product(list(rows.values())[1:], columns):
            task, where, label, shots, on, _ = judge.ON_FACTORS[column]
            protocol = {"fewshot": "adam", "robust": "generated"}.get(task, "fast")
            lines += [
                dict(
                    task=task if row[2] == "v" else "spaces",
                    data=where,
                    label=label,
                    shots=shots,
                    on=on,
                    method=row[0],
                    groups=row[1],
                    feature=row[2],
                    protocol=protocol,
                    seed=seed,
                    budget=budget,
                    top1=value(row, column, seed) if budget == "small" else 0.0,
                )
                for seed in (0, 1, 2, 3)
                for budget in ("small", "large")
            ]
    lines += [line | dict(protocol="paper", top1=99.0) for line in lines]
    Path("all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(judge, "claims --results=all.jsonl --first=1 --seeds=2")
    said = capsys.readouterr().out
    half = 12.7062 * math.sqrt(0.5) / math.sqrt(2)
    assert f"| LooC (color) | 2 | {41.5 + 7 * len('hue') % 13:.1f} +- {half:.1f} |" in said
    assert "| MoCo (color) | 2 |" in said and "| supervised | 0 | - | - |" in said
    assert [line.split("**")[1] for line in said.splitlines() if line.startswith("- ")] == [
        *["cannot tell"] * 5,
        "does not hold",
        *["holds"] * 5,
        *["cannot tell"] * 5,
    ]
    assert said.splitlines()[-1] == "16 claims: holds 5, does not hold 1, cannot tell 10"
    assert not Path("runs").exists()
    with pytest.raises(SystemExit, match="2"):
        run(judge, "claims --results=all.jsonl --first=7")
    assert (
        "nothing of --budget=small and seeds 7 to 11; it holds large 0, large 1, large 2, large 3, small 0"
        in capsys.readouterr().err
    )
    Path("all.jsonl").write_text(
        "".join(
            json.dumps(line) + "\n" for line in lines if (line["seed"], line["label"]) != (2, "hue")
        )
    )
    run(judge, "claims --results=all.jsonl --first=1 --seeds=2")
    assert "| LooC (color) | 1 to 2 |" in capsys.readouterr().out  # a cell may be missing
    for flags in ("--results=none.jsonl", "--budget=tiny", "--seeds=0"):
        with pytest.raises(SystemExit, match="2"):
            run(judge, f"claims {flags}")


def test_claims_from_training_to_tables(here, monkeypatch, capsys):
    """Two rows: the commands that it plans fill every cell that the tables have of them, and are not planned again."""
    moco, pair = (
        {"MoCo": ("moco", ("color",), "v")},
        {some: ("looc++", ("color",), some) for some in ("all", "all+color")},
    )
    monkeypatch.setattr(
        judge,
        "TABLES",
        tuple(
            (title, columns, pair if "all" in rows else moco)
            for title, columns, rows in judge.TABLES
        ),
    )
    monkeypatch.setattr(judge, "CLAIMS", tuple((columns, {}) for columns, _ in judge.CLAIMS))
    monkeypatch.setitem(judge.BUDGETS, "small", dict(epochs=1, size=16, queue=16, hidden=16, dim=8))
    done = []

    def run_all(chains, jobs, threads):
        for script, *words in itertools.chain(*chains):
            done.append(words[0])
            run({"loo.py": loo, "eval.py": judge}[script], shlex.join(words))

    monkeypatch.setattr(judge, "run_all", run_all)
    run(judge, "claims --seeds=1 --out=claims")
    assert sorted(done) == ["fewshot", "linear", "robust", "rotation", "spaces", "train", "train"]
    said = capsys.readouterr().out.split("Table 1", 1)[1]
    assert " - |" not in said and said.count("| 1 |") == 6
    run(judge, "claims --seeds=1 --out=claims")
    assert len(done) == 7 and {
        line["budget"] for line in loo.read_jsonl(Path("claims/small.jsonl"))
    } == {"small"}
    aside = loo.move_aside(Path("claims/small/moco-color-21"))  # as --fresh does
    assert [
        *map(len, judge.missing_commands(Path("claims/small"), (21,), judge.BUDGETS["small"]))
    ] == [
        0,
        5,
    ]  # LooC++ is the longest, and comes first

    def fail(chains, jobs, threads):
        raise UserError("one failed")

    monkeypatch.setattr(judge, "run_all", fail)
    with pytest.raises(UserError, match="one failed"):  # not "no results of these seeds"
        judge.claims(seeds=1, first=31, out="claims")
    assert aside.name == "moco-color-21.1" and {
        line["method"] for line in loo.read_jsonl(Path("claims/small.jsonl"))
    } == {"looc++"}


def test_claims_run_commands_side_by_side_and_stop_together(here):
    with pytest.raises(
        UserError,
        match="1 of 2 commands failed.*--groups=colour ended with 2: error: .*did you mean color",
    ):
        judge.run_all(
            [
                [["loo.py", "methods", "--groups=colour"], ["loo.py", "methods"]],
                [["loo.py", "methods"]],
            ],
            2,
            1,
        )
    out = here / "run"

    def stop():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not loo.read_jsonl(out / "log.jsonl"):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit, match="143"):
        judge.run_all(
            [
                [
                    [
                        "loo.py",
                        "train",
                        "--epochs=30",
                        "--size=8",
                        *TINY.split()[1:],
                        f"--out={out}",
                    ],
                    ["loo.py", "nothing"],
                ]
            ],
            1,
            1,
        )
    assert (out / "checkpoint.pt").exists() and not (out / "heads.pt").exists()


def test_spaces_give_a_verdict(untrained, capsys, monkeypatch):
    """Spaces whose contents are known: color's holds the hue, rotation's the turn, Z_0 neither; all hold the object."""

    def known_spaces(encoder, v, z, config, layer):
        hue, noise = v[:, :4], torch.randn(len(v), 4, generator=generator(0)) * 0.01
        return {"all": noise, "color": hue, "rotation": noise.roll(1, 0)}

    monkeypatch.setattr(
        judge,
        "frozen",
        lambda b, split, turns: (lambda y: (F.one_hot(y, 4).float(), None, {"hue": y}))(
            torch.arange(400) % 4
        ),
    )
    monkeypatch.setattr(judge, "space_features", known_spaces)
    run(judge, "spaces --label=hue")
    out = capsys.readouterr().out
    assert "hue wants color (+7" in out and "about rotation" in out and "wants rotation" not in out
    rows = {x["feature"]: x for x in results(untrained)}
    assert (
        set(rows) == {"all", "all+color", "all+rotation", "all+color+rotation", "color", "rotation"}
        and rows["all"]["gain"] == 0
    )
    assert rows["color"]["top1"] == 100 and rows["color"]["gain"] == pytest.approx(
        100 - rows["all"]["top1"]
    )


@pytest.mark.parametrize(
    "gain, half, says",
    [
        (5.0, 2.0, "wants"),
        (0.4, 2.0, "cannot tell"),
        (-0.2, 0.5, "does not care"),
        (-4.0, 1.0, "better without"),
        (0.5, 0.3, "wants"),
    ],
)
def test_verdicts(gain, half, says):
    assert says in judge.verdict("color", gain, half, 1.0)


def test_paired_interval_covers_the_truth():
    """1,000 simulated test sets of 400 pictures, one classifier right on 70%, the other on 60%: 95% of the intervals hold 10 points."""
    u = torch.rand(1000, 400, 2, generator=generator(0)).double()
    a, b = (
        (u[..., 0] < 0.7).double(),
        ((u[..., 0] < 0.55) | (u[..., 1] < 1 / 9)).double(),
    )  # .55 + .45 / 9 = .6, and correlated
    inside = sum(
        abs(gain - 10) <= half for gain, half in (judge.paired_ci95(x, y) for x, y in zip(a, b))
    )
    assert 0.93 < inside / 1000 < 0.97


def test_fewshot_interval_covers_the_truth():
    """100 experiments of 10 trials on 3 classes that overlap: 95% of the intervals hold what 1,000 trials give."""
    y = torch.arange(900) % 3
    x = F.one_hot(y, 3) * 1.5 + torch.randn(900, 3, generator=generator(1))
    rows = judge.sample_shots(y[:600], 3, 5, 1000, seed=0)
    w, b = judge.fit_few_shot(x[rows], y[rows], 3, 100)
    right = torch.tensor([judge.accuracy(logits, y[600:]) for logits in x[600:] @ w + b]).view(
        100, 10
    )
    assert (
        0.88
        < sum(abs(t.mean() - right.mean()).item() <= judge.t_ci95(t.tolist()) for t in right) / 100
        < 0.99
    )


def test_retrieve_counts_neighbours_and_draws_them(untrained, capsys):
    run(
        judge,
        "retrieve --against=runs/latest --queries=3 --neighbours=4 --turn --out=near.png --json",
    )
    out, err = capsys.readouterr()
    assert "wrote near.png" in err and Image.open(untrained / "near.png").size[0] > 9 * 64
    found = [json.loads(line) for line in out.splitlines()]
    assert (
        len(found) == 10 and results(untrained) == found[:5]
    )  # the other run's are printed, not kept
    assert [x["label"] for x in found[:5]] == [
        "object",
        "hue",
        "texture",
        "species",
        "rotation",
    ] and found[0]["top1"] == found[5]["top1"]
    turns = torch.randint(4, (128,), generator=generator("turns", 0))  # a slow twin
    test = data.factors("test")
    encoder, _ = loo.load_encoder("runs/latest")
    with torch.no_grad():
        x = F.normalize(
            loo.encode(
                encoder,
                torch.stack([p.rot90(int(k), (1, 2)) for p, k in zip(test.images, turns)]) / 255,
            )[0],
            dim=1,
        )
    similar = (x @ x.T).fill_diagonal_(-2)
    same = (
        test.labels["object"][similar.topk(4).indices] == test.labels["object"][:, None]
    ).float().mean().item() * 100
    assert found[0]["top1"] == pytest.approx(same, abs=0.5)
    assert found[4]["top1"] == pytest.approx(
        (turns[similar.topk(4).indices] == turns[:, None]).float().mean().item() * 100, abs=0.5
    )


def test_pictures_without_labels_have_what_needs_none(here, capsys):
    photo_tree(here / "photos", 1, 40)
    run(
        loo,
        f"train --data=folder --root=photos/class0 --batch=16 --out=plain --epochs=1 {TINY.split(maxsplit=1)[1]}",
    )
    said = capsys.readouterr().out
    assert (
        ", no labels; small on views of 32 pixels" in said
        and "next: python eval.py rotation" in said
    )
    run(
        loo,
        f"train --data=folder --root=photos/class0 --batch=16 --out=plain --epochs=1 {TINY.split(maxsplit=1)[1]}",
    )
    assert "plain is trained already" in capsys.readouterr().out
    run(judge, "spaces --run=plain")
    run(judge, "retrieve --run=plain --neighbours=2 --turn")
    assert {line["label"] for line in loo.read_jsonl(Path("plain/results.jsonl"))} == {"rotation"}
    run(judge, "retrieve --run=plain --neighbours=2 --out=alone.png")
    assert Path("alone.png").exists()
    capsys.readouterr()
    for task in ("linear", "knn", "fewshot", "robust"):
        with pytest.raises(SystemExit, match="2"):
            run(judge, f"{task} --run=plain")
        assert (
            "photos/class0 have no labels, which a sub-folder for each class would give them"
            in capsys.readouterr().err
        )
    (here / "plain" / "heads.pt").unlink()
    with pytest.raises(SystemExit, match="2"):
        run(judge, "rotation --run=plain")
    assert "plain has not finished training: give its command again" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(loo, "train --data=photos")
    assert "did you mean --data=folder --root=photos?" in capsys.readouterr().err


def test_table_keeps_folders_apart(here, capsys):
    """Runs on different folders, and one run judged on two, each in a cell of their own."""
    for name, root, line_root, top1 in (
        ("a", "x", "x", 11.0),
        ("b", "y", "y", 22.0),
        ("b", "y", "x", 33.0),
    ):
        (here / name).mkdir(exist_ok=True)
        (here / name / "config.json").write_text(
            json.dumps(CONFIG | dict(data="folder", root=root, seed=0))
        )
        with open(here / name / "results.jsonl", "a") as file:
            file.write(
                json.dumps(
                    dict(
                        task="linear",
                        data="folder",
                        root=line_root,
                        label="class",
                        on=None,
                        shots=None,
                        method="looc",
                        groups=["color"],
                        feature="v",
                        protocol="fast",
                        top1=top1,
                    )
                )
                + "\n"
            )
    run(judge, "table --runs=a,b")
    said = capsys.readouterr().out
    assert (
        "| looc | color | v | root x | 1 | 11.0 | - |" in said
        and "| looc | color | v | root y | 1 | 22.0 | 33.0 |" in said
        and "linear class on folder x" in said
    )


def test_table_names_what_was_trained_unlike(here, capsys):
    """A supervised run is named by what it learned, and `always` where it is not the default with the groups' own names left out."""
    for name, label, always in (
        ("a", "hue", ["crop", "flip", "blur"]),
        ("b", "object", ["crop", "flip", "blur"]),
        ("c", "object", ["crop", "flip"]),
    ):
        (here / name).mkdir()
        (here / name / "config.json").write_text(
            json.dumps(
                CONFIG
                | dict(
                    method="supervised",
                    label=label,
                    groups=["color"],
                    always=always,
                    data="factors",
                    root=None,
                )
            )
        )
        (here / name / "results.jsonl").write_text(
            json.dumps(
                dict(
                    task="linear",
                    data="factors",
                    label="hue",
                    shots=None,
                    method="supervised",
                    groups=["color"],
                    feature="v",
                    protocol="fast",
                    top1=50.0,
                )
            )
        )
    run(judge, "table --runs=a,b,c")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("| supervised (hue)", "always default", "1"),
        ("| supervised (object)", "always default", "1"),
        ("| supervised (object)", "always default -blur", "1"),
    ]


def test_readmes_examples_run(here, monkeypatch):
    blocks = [
        text.split("```")[0]
        for text in (Path(loo.__file__).parent / "README.md").read_text().split("```python\n")[1:]
    ]
    own, loop = (
        next(text for text in blocks if "loo.GROUPS[" in text),
        next(text for text in blocks if "loo.multi_space_loss(" in text),
    )
    monkeypatch.setattr(loo, "GROUPS", dict(loo.GROUPS))
    train = loo.train
    monkeypatch.setattr(
        loo, "train", lambda **flags: train(epochs=1, queue=16, hidden=16, dim=8, **flags)
    )
    exec(own, {})
    assert loo.load_encoder("runs/latest")[1]["groups"] == ["color", "invert"]
    names = {"loader": [torch.rand(8, 3, 32, 32, generator=generator(i)) for i in range(2)]}
    exec(loop, names)
    assert (
        names["pointer"] == 16
        and torch.equal(names["queue"][0, 8:16], names["k"][0, 0])
        and torch.equal(names["queue"][2, 8:16], names["k"][2, 2])
    )


def test_bench_times_a_real_step(here, capsys):
    run(loo, "bench --batch=16 --size=16 --steps=3 --groups=color,texture --json")
    line = json.loads(capsys.readouterr().out)
    assert line["groups"] == ["color", "texture"] and line["images_per_s"] == pytest.approx(
        16e3 / line["step_ms"]
    )
    assert line["step_ms"] > line["network_ms"] / 2 and 0 < line["peak"] < 1
    for name in ("step_ms", "network_ms", "arch", "size", "batch", "device", "dtype", "group_ms"):
        assert name in line


def test_items_ahead_come_in_order():
    assert (
        list(loo.prefetch(lambda i: i * i, range(5))) == [0, 1, 4, 9, 16]
        and list(loo.prefetch(str, [])) == []
    )


def test_methods_prints_the_table(here, capsys):
    run(loo, "methods")
    assert (
        "| looc | [[0, 0], [1, 0], [0, 1]] | [[1, 0, 0], [-1, 1, -1], [-1, -1, 1]] | mlp | v |"
        in capsys.readouterr().out
    )


def test_learning_rate_falls_as_the_paper_says():
    config = dict(lr=0.03, schedule="300,400", epochs=500)
    assert [loo.learning_rate(config, e) for e in (0, 299.9, 300, 400)] == pytest.approx(
        [0.03, 0.03, 0.003, 0.0003]
    )
    assert [
        loo.learning_rate({**config, "schedule": "cosine"}, e) for e in (0, 250, 500)
    ] == pytest.approx([0.03, 0.015, 0])
