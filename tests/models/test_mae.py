"""The masked autoencoder: kept patches alone, against a slow computation of what is documented."""

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import vision  # noqa: F401 -- registers the models
from vision.models.mae import (
    MaskedAutoencoder,
    masked_mse,
    mean_of_visible,
    normalize_patches,
    patchify,
    random_kept,
    unpatchify,
)

NANOS = ["vrwkv_nano_patch8_224", "vrwkv6_nano_patch8_224"]
HW = (4, 6)
SIZE = (32, 48)  # in pixels, patches of 8


def encoder(name: str = NANOS[0], **options: Any) -> nn.Module:
    """A nano of two blocks, its parameters far from their first values."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=SIZE, num_classes=0, depth=2, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double()


def images(batch: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def some_kept(count: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randperm(math.prod(HW), generator=generator)[:count] for _ in range(batch)]
    return torch.stack(rows).sort(1).values


def slow_norm(x: Tensor, norm: nn.Module | None) -> Tensor:
    if norm is None:
        return x
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def slow_shift(tokens: dict[int, Tensor], shift: str) -> dict[int, Tensor]:
    """The neighbour of every kept token: place on the grid -> (C,)."""
    moved = {}
    before = None
    for place, x in sorted(tokens.items()):
        nothing = torch.zeros_like(x)
        if shift == "single_shift":
            moved[place] = nothing if before is None else before
            before = x
            continue
        row, column = divmod(place, HW[1])
        parts = []
        sides = [(0, -1), (0, 1), (-1, 0), (1, 0)]
        for quarter, (down, right) in zip(range(4), sides, strict=True):
            r, c = row + down, column + right
            inside = 0 <= r < HW[0] and 0 <= c < HW[1]
            neighbour = tokens.get(r * HW[1] + c, nothing) if inside else nothing
            parts.append(neighbour.chunk(4)[quarter])
        moved[place] = torch.cat(parts)
    return moved


def slow_wkv(w: Tensor, u: Tensor, k: list[Tensor], v: list[Tensor]) -> list[Tensor]:
    """The paper's formula over the sequence of the kept tokens."""
    count = len(k)
    found = []
    for t in range(count):
        above, below = torch.zeros_like(w), torch.zeros_like(w)
        for i in range(count):
            power = u / count + k[t] if i == t else -(abs(t - i) - 1) * w / count + k[i]
            above, below = above + power.exp() * v[i], below + power.exp()
        found.append(above / below)
    return found


def slow_encoder(model: Any, image: Tensor, kept: Tensor, shift: str) -> Tensor:
    """One image (3, H, W) through the blocks of `model` on some patches, one number at a time."""
    places = kept.tolist()
    tokens = {}
    for place in places:
        y, x = 8 * (place // HW[1]), 8 * (place % HW[1])
        patch = image[:, y : y + 8, x : x + 8]
        conv = model.patch_embed.proj
        token = (conv.weight * patch).sum((1, 2, 3)) + conv.bias + model.pos_embed[0, place]
        tokens[place] = slow_norm(token, model.norm_pre)

    def mixed(mix: nn.Module, x: dict[int, Tensor], name: str) -> list[Tensor]:
        mu, moved = getattr(mix, name), slow_shift(x, shift)
        return [x[p] * mu + moved[p] * (1 - mu) for p in places]

    def spatial(mixer: Any, x: dict[int, Tensor]) -> list[Tensor]:
        k, v, r = (
            [getattr(mixer, layer).weight @ y for y in mixed(mixer.shift_mix, x, name)]
            for name, layer in (("k", "key"), ("v", "value"), ("r", "receptance"))
        )
        y = slow_wkv(mixer.decay, mixer.bonus, k, v)
        gated = [a.sigmoid() * slow_norm(b, mixer.norm) for a, b in zip(r, y, strict=True)]
        return [mixer.output.weight @ one for one in gated]

    def channel(mixer: Any, x: dict[int, Tensor]) -> list[Tensor]:
        found = []
        xk, xr = (mixed(mixer.shift_mix, x, name) for name in "kr")
        for a, b in zip(xk, xr, strict=True):
            hidden = slow_norm((mixer.key.weight @ a).clamp(min=0) ** 2, mixer.norm)
            gate = (mixer.receptance.weight @ b).sigmoid()
            found.append(gate * (mixer.value.weight @ hidden))
        return found

    for block in model.blocks:
        for branch, mixer, norm, scale in (
            (spatial, block.mixer, block.norm1, block.ls1),
            (channel, block.channel_mix, block.norm2, block.ls2),
        ):
            gamma = getattr(scale, "gamma", 1.0)
            if block.post_norm:
                y = [slow_norm(one, norm) for one in branch(mixer, tokens)]
            else:
                y = branch(mixer, {p: slow_norm(x, norm) for p, x in tokens.items()})
            tokens = {p: tokens[p] + gamma * one for p, one in zip(places, y, strict=True)}
    return torch.stack([slow_norm(tokens[p], model.norm) for p in places])


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize("shift", ["q_shift", "single_shift"])
@pytest.mark.parametrize("size", [SIZE, (48, 40)])
def test_nothing_masked_is_the_ordinary_model(name: str, shift: str, size: tuple[int, int]) -> None:
    model = encoder(name, shift=shift)
    count = size[0] * size[1] // 64
    kept = torch.arange(count).expand(2, -1)
    x = images(size=size)
    found, grid = model.forward_kept(x, kept)
    assert tuple(grid) == (size[0] // 8, size[1] // 8)
    assert not grid.masked().any()
    wanted = model.forward_features(x)
    assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (found, wanted)
    )
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shift", ["q_shift", "single_shift"])
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize(
    "options",
    [{}, {"post_norm": True, "key_norm": True, "init_values": 0.5}],
    ids=["pre_norm", "post_norm"],
)
def test_kept_patches_against_the_definition(
    shift: str, count: int, options: dict[str, Any]
) -> None:
    model = encoder(embed_dim=8, shift=shift, **options)
    x, kept = images(), some_kept(count)
    found, _ = model.forward_kept(x, kept)
    wanted = torch.stack([slow_encoder(model, x[i], kept[i], shift) for i in range(2)])
    assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    names, parameters = zip(*model.named_parameters(), strict=True)
    weights = torch.sin(torch.arange(wanted.numel(), dtype=torch.float64)).view_as(wanted)
    ours, theirs = (
        torch.autograd.grad(
            (y * weights).sum(), parameters, allow_unused=True, materialize_grads=True
        )
        for y in (found, wanted)
    )
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", NANOS)
def test_masked_pixels_are_not_seen(name: str) -> None:
    model, kept = encoder(name), some_kept(7)
    found, grid = model.forward_kept(images(), kept)
    masked = grid.masked().view(2, 1, *HW).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other, _ = model.forward_kept(images().masked_fill(masked, 9.0), kept)
    assert torch.equal(found, other)
    assert not torch.equal(found, model.forward_kept(images() + 1, kept)[0])


@pytest.mark.parametrize("name", NANOS)
def test_recomputed_blocks_give_the_same(name: str) -> None:
    model, kept = encoder(name), some_kept(7)
    parameters = list(model.parameters())
    before = torch.autograd.grad(model.forward_kept(images(), kept)[0].sum(), parameters)
    model.set_grad_checkpointing()
    after = torch.autograd.grad(model.forward_kept(images(), kept)[0].sum(), parameters)
    assert_close(after, before, rtol=1e-9, atol=1e-9)


def autoencoder(name: str = NANOS[0], **options: Any) -> MaskedAutoencoder:
    return MaskedAutoencoder(encoder(name), {"dim": 16, "depth": 2}, **options).double()


@pytest.mark.parametrize("name", NANOS)
@pytest.mark.parametrize("norm_pix", [False, True])
def test_every_parameter_learns(name: str, norm_pix: bool) -> None:
    model = autoencoder(name, norm_pix=norm_pix)
    masked_mse(*model(images())).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("norm_pix", [False, True])
def test_target_and_loss(norm_pix: bool) -> None:
    """The target is the image's own patches, and the loss that of the masked ones alone."""
    model = autoencoder(norm_pix=norm_pix)
    x = images()
    found = model(x)
    assert found.masked.sum(1).tolist() == [18, 18]  # 75 % of 24
    total = 0.0
    for place in range(24):
        row, column = 8 * (place // 6), 8 * (place % 6)
        patch = x[0, :, row : row + 8, column : column + 8]
        if norm_pix:
            patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
        patch = patch.permute(1, 2, 0).flatten()
        assert_close(found.target[0, place], patch)
        if found.masked[0, place]:
            total = total + (found.prediction[0, place] - patch).square().mean()
    assert_close(masked_mse(*found)[0], total / 18)
    found.prediction.retain_grad()
    masked_mse(*found).sum().backward()
    assert torch.equal(found.prediction.grad.any(-1), found.masked)


def test_masks_are_random_and_follow_the_noise() -> None:
    model = autoencoder()
    torch.manual_seed(0)
    assert not torch.equal(model(images()).masked, model(images()).masked)
    noise = torch.rand(2, 24)
    masked = model(images(), noise).masked
    assert torch.equal(masked, model(images(), noise).masked)
    for row, numbers in zip(masked, noise, strict=True):
        assert numbers[row].min() > numbers[~row].max()
    kept = torch.cat([random_kept(torch.rand(100, 24), 0.75) for _ in range(20)])
    share = kept.flatten().bincount(minlength=24) / len(kept)
    assert ((share > 0.2) & (share < 0.3)).all()


def test_visible_patches_stay_and_normalised_ones_come_back() -> None:
    x = images()
    for norm_pix in (False, True):
        model = autoencoder(norm_pix=norm_pix)
        found = model(x)
        exact = found._replace(prediction=found.target)
        assert_close(model.paint(x, exact), x)
        painted = patchify(model.paint(x, found), (8, 8))
        same = (painted == patchify(x, (8, 8))).all(-1)
        assert torch.equal(same, ~found.masked)


def test_the_mean_of_visible_patches() -> None:
    target = images(2, (6, 8)).flatten(2)  # (2, 3, 48): three patches
    masked = torch.tensor([[True, False, False], [False, True, True]])
    found = mean_of_visible(target, masked)
    assert_close(found[:, 0], torch.stack([(target[0, 1] + target[0, 2]) / 2, target[1, 0]]))
    error = masked_mse(found, target, masked)
    wanted = [
        (target[0, 0] - found[0, 0]).square().mean(),
        (target[1, 1:] - found[1]).square().mean(),
    ]
    assert_close(error, torch.stack(wanted))


def test_patches_are_cut_in_order_and_put_back() -> None:
    x = images(2, (16, 12))
    patches = patchify(x, (8, 4))
    assert patches.shape == (2, 6, 96)
    assert_close(patches[1, 4].view(8, 4, 3), x[1, :, 8:, 4:8].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, (8, 4), (16, 12)), x)
    flat, mean, deviation = normalize_patches(torch.full((1, 1, 5), 3.0))
    assert (flat == 0).all()
    assert mean == 3
    assert_close(deviation, torch.full((1, 1, 1), 1e-3))


def test_other_sizes_than_the_native_one() -> None:
    model = autoencoder()
    found = model(images(1, (64, 40)))
    assert found.prediction.shape == (1, 40, 192)
    assert F.mse_loss(found.prediction, found.target).isfinite()


def test_published_size() -> None:
    """Upstream's VRWKV-B with its decoder: 121,216,512 parameters."""
    options = {"key_norm": True, "shift": "single_shift"}
    block = {**options, "post_norm": True, "init_values": 1e-5}
    with torch.device("meta"):
        model = timm.create_model("vrwkv_base_patch16_224", num_classes=10, **options)
        model = MaskedAutoencoder(model, {"dim": 512, "depth": 8, **block})
    assert sum(p.numel() for p in model.parameters()) == 121_216_512


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mask_ratio": 0.0}, "mask_ratio wants a share"),
        ({"mask_ratio": 1.0}, "mask_ratio wants a share"),
        ({"decoder": {"depth": 0}}, "one block or more"),
        ({"decoder": {"dim": 18}}, "channels in fours"),
    ],
)
def test_impossible_settings(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MaskedAutoencoder(encoder(), **options)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="wants a Vision-RWKV"):
        MaskedAutoencoder(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="without a class token"):
        MaskedAutoencoder(encoder(NANOS[1], class_token=True))
    with pytest.raises(ValueError, match="without a class token"):
        encoder(NANOS[1], class_token=True).forward_kept(images(), some_kept(3))
    with pytest.raises(ValueError, match=r"whole patches of 8 x 8 px, got 32 x 44"):
        autoencoder()(images(2, (32, 44)))
    with pytest.raises(ValueError, match="masks none"):
        autoencoder(mask_ratio=0.01)(images())
    for kept in (torch.tensor([[0, 24]] * 2), torch.tensor([[-1, 3]] * 2)):
        with pytest.raises(ValueError, match=r"rising places 0\.\.23 .* not all inside"):
            encoder().forward_kept(images(), kept)
    with pytest.raises(ValueError, match=r"rising places"):
        encoder().forward_kept(images(), torch.tensor([[3, 3]] * 2))
    _, grid = encoder().forward_kept(images(1), torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match=r"got tokens \(2, 24, 64\) for kept places \(1, 2\)"):
        grid.spread(torch.zeros(2, 24, 64))
    with pytest.raises(ValueError, match="int64 places"):
        encoder().forward_kept(images(), torch.tensor([[0.0, 3.0]] * 2))
