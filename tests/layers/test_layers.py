"""Token shift, mixes, initial values, position embedding and the block."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vision.layers import (
    CHANNEL_MIXERS,
    MIXERS,
    SHIFTS,
    Attention,
    Block,
    ChannelMix,
    GeGLU,
    MBConv,
    MBConvBlock,
    ShiftMix,
    build_channel_mixer,
    build_mixer,
    q_shift,
    resample_pos_embed,
    single_shift,
)
from vision.layers.activation import gelu
from vision.layers.conv import map_to_tokens, tokens_to_map
from vision.layers.init import SPATIAL_INIT, channel_init, spatial_init


def q_shift_by_definition(x: Tensor, hw: tuple[int, int], pixels: int, gamma: float) -> Tensor:
    """Token by token: quarter 0 from the left, 1 right, 2 above, 3 below, the rest stays."""
    (h, w), c = hw, x.shape[2]
    out = torch.zeros_like(x)
    moves = [(0, -pixels), (0, pixels), (-pixels, 0), (pixels, 0)]
    for row in range(h):
        for col in range(w):
            for j, (down, right) in enumerate(moves):
                first, last = int(c * gamma * j), int(c * gamma * (j + 1))
                if 0 <= row + down < h and 0 <= col + right < w:
                    source = (row + down) * w + col + right
                    out[:, row * w + col, first:last] = x[:, source, first:last]
            out[:, row * w + col, int(c * gamma * 4) :] = x[:, row * w + col, int(c * gamma * 4) :]
    return out


@given(
    h=st.integers(1, 5),
    w=st.integers(1, 5),
    c=st.integers(1, 13),
    pixels=st.integers(1, 6),
    gamma=st.sampled_from([0.25, 0.125, 0.2]),
)
def test_q_shift_is_its_definition(h: int, w: int, c: int, pixels: int, gamma: float) -> None:
    x = torch.arange(2.0 * h * w * c).view(2, h * w, c) + 1
    assert torch.equal(
        q_shift(x, (h, w), pixels, gamma), q_shift_by_definition(x, (h, w), pixels, gamma)
    )


def test_q_shift_names_a_wrong_grid() -> None:
    with pytest.raises(ValueError, match="6 tokens for a grid of 2 x 2"):
        q_shift(torch.zeros(1, 6, 4), (2, 2))


def test_single_shift_gives_the_token_before() -> None:
    x = torch.arange(1.0, 6).view(1, 5, 1)
    assert single_shift(x, 2).flatten().tolist() == [0, 0, 1, 2, 3]
    assert single_shift(x, 9).flatten().tolist() == [0] * 5


def test_shift_mix_interpolates() -> None:
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    proportion = {"k": torch.rand(8), "r": torch.rand(8)}
    mixed = ShiftMix(proportion).double()(x, (2, 3))
    shifted = q_shift(x, (2, 3))
    for got, mu in zip(mixed, proportion.values(), strict=True):
        torch.testing.assert_close(got, x * mu + shifted * (1 - mu))


def test_shift_of_zero_pixels_has_no_parameters() -> None:
    x = torch.randn(1, 4, 8)
    mix = ShiftMix({"k": torch.rand(8), "r": torch.rand(8)}, shift_pixels=0)
    assert not list(mix.parameters())
    assert all(torch.equal(part, x) for part in mix(x, (2, 2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": "z_shift"}, "there are q_shift, single_shift"),
        ({"shift_pixels": -1}, "0 \\(off\\) or more, got -1"),
        ({"channel_gamma": 0.3}, "at most 1/4, got 0.3"),
    ],
)
def test_shift_mix_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiftMix({"k": torch.rand(8)}, **options)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_fancy_values_are_the_published_ones(layer: int) -> None:
    dim, depth = 10, 4
    got = spatial_init("fancy", dim, layer, depth)
    up, down = layer / (depth - 1), 1 - layer / depth
    for c in range(dim):
        want = {
            "decay": -5 + 8 * (c / (dim - 1)) ** (0.7 + 1.3 * up),
            "bonus": math.log(0.3) + 0.5 * ((c + 1) % 3 - 1),
            "k": (c / dim) ** down,
            "v": (c / dim) ** down + 0.3 * up,
            "r": (c / dim) ** (0.5 * down),
        }
        for name, value in want.items():
            assert float(got[name][c]) == pytest.approx(value, abs=1e-6), (name, c)
    mixes = channel_init("fancy", dim, layer, depth)
    torch.testing.assert_close(mixes["k"], got["k"])
    torch.testing.assert_close(mixes["r"], got["k"])


def test_other_modes_are_constant() -> None:
    for mode, wkv, mix in (("local", 1.0, 1.0), ("global", 0.0, 0.5)):
        got = spatial_init(mode, 6, 1, 3)
        assert {float(x) for x in (*got["decay"], *got["bonus"])} == {wkv}
        assert {float(x) for name in "kvr" for x in got[name]} == {mix}


@pytest.mark.parametrize("mode", SPATIAL_INIT)
def test_one_layer_and_one_channel_are_finite(mode: str) -> None:
    assert all(value.isfinite().all() for value in spatial_init(mode, 1, 0, 1).values())


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="there are fancy, local, global"):
        spatial_init("plain", 4, 0, 1)
    with pytest.raises(ValueError, match="there are bi_wkv, wkv6_bi, attention"):
        build_mixer("average", 4, 0, 1)
    with pytest.raises(ValueError, match="there are channel_mix, head_channel_mix, geglu"):
        build_channel_mixer("mlp", 4, 0, 1)


def test_position_embedding_keeps_its_own_grid() -> None:
    pos = torch.randn(1, 12, 5)
    assert resample_pos_embed(pos, (3, 4), (3, 4)) is pos
    constant = resample_pos_embed(torch.ones(1, 12, 5), (3, 4), (7, 2))
    torch.testing.assert_close(constant, torch.ones(1, 14, 5))
    # float64 is computed in float64, bfloat16 in float32 and rounded once.
    wide = resample_pos_embed(pos.double(), (3, 4), (5, 5))
    narrow = resample_pos_embed(pos.bfloat16(), (3, 4), (5, 5))
    assert (wide.dtype, narrow.dtype) == (torch.float64, torch.bfloat16)
    exact = resample_pos_embed(pos.bfloat16().double(), (3, 4), (5, 5))
    torch.testing.assert_close(narrow, exact.bfloat16())


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("key_norm", [False, True])
def test_block_options_reach_both_branches(shift: str, post_norm: bool, key_norm: bool) -> None:
    block = Block(
        8, 1, 3, mlp_ratio=2.5, post_norm=post_norm, init_values=0.5, shift=shift,
        key_norm=key_norm, init_mode="global", channel_gamma=0.125, shift_pixels=2,
    )  # fmt: skip
    for part in (block.mixer, block.channel_mix):
        assert part.shift_mix.shift == shift
        assert part.shift_mix.shift_pixels == 2
        assert part.shift_mix.channel_gamma == 0.125
        assert isinstance(part.norm, torch.nn.LayerNorm) == key_norm
    assert block.channel_mix.key.out_features == 20
    x = torch.randn(2, 12, 8, requires_grad=True)
    y = block(x, (3, 4))
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_post_norm_is_the_norm_of_the_branch() -> None:
    block = Block(8, 0, 1, post_norm=True).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    y = x + block.norm1(block.mixer(x, (2, 2)))
    want = y + block.norm2(block.channel_mix(y, (2, 2)))
    torch.testing.assert_close(block(x, (2, 2)), want)


def test_drop_path_drops_whole_branches() -> None:
    torch.manual_seed(0)
    block = Block(8, 0, 1, drop_path=0.999).train()
    x = torch.randn(4, 4, 8)
    torch.testing.assert_close(block(x, (2, 2)), x)
    assert not torch.equal(block.eval()(x, (2, 2)), x)


def test_channel_mix_by_its_formula() -> None:
    mix = ChannelMix(6, 1, 2, mlp_ratio=2).double()
    x = torch.randn(2, 6, 6, dtype=torch.float64)
    shifted = q_shift(x, (2, 3))
    xk = x * mix.shift_mix.k + shifted * (1 - mix.shift_mix.k)
    xr = x * mix.shift_mix.r + shifted * (1 - mix.shift_mix.r)
    hidden = torch.clamp(xk @ mix.key.weight.T, min=0) ** 2
    want = 1 / (1 + torch.exp(-(xr @ mix.receptance.weight.T))) * (hidden @ mix.value.weight.T)
    torch.testing.assert_close(mix(x, (2, 3)), want)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("channel_mixer", CHANNEL_MIXERS)
def test_block_of_any_two_mixers(mixer: str, channel_mixer: str) -> None:
    # Whole heads of all of them: 6 of attention, of 64 channels of VRWKV6.
    block = Block(192, 1, 3, mixer=mixer, channel_mixer=channel_mixer, norm_eps=1e-3)
    assert type(block.mixer) is MIXERS[mixer]
    assert type(block.channel_mix) is CHANNEL_MIXERS[channel_mixer]
    assert block.norm1.eps == block.norm2.eps == 1e-3
    x = torch.randn(2, 6, 192, requires_grad=True)
    block(x, (2, 3)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


def test_options_go_to_the_mixer_alone_or_to_both() -> None:
    options = {"mixer": "attention", "mixer_options": {"num_heads": 3}, "channel_mixer": "geglu"}
    block = Block(12, 0, 1, mlp_ratio=1.5, **options)
    assert block.mixer.num_heads == 3
    assert block.channel_mix.gate.out_features == 18
    with pytest.raises(TypeError, match="init_mode"):
        Block(12, 0, 1, init_mode="local", **options)
    with pytest.raises(TypeError, match="num_heads"):
        Block(12, 0, 1, mixer_options={"num_heads": 3})


def test_attention_by_its_formula() -> None:
    attention = Attention(6, 0, 1, num_heads=2).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = (attention.qkv(x).chunk(3, dim=2)[i].view(2, 5, 2, 3) for i in range(3))
    score = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(3)
    want = torch.einsum("bhts,bshc->bthc", score.softmax(-1), v).reshape(2, 5, 6)
    torch.testing.assert_close(attention(x, (1, 5)), attention.proj(want))
    with pytest.raises(ValueError, match="7 channels for num_heads=2"):
        Attention(7, 0, 1, num_heads=2)


def test_geglu_by_its_formula() -> None:
    mix = GeGLU(6, 0, 1, mlp_ratio=2).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    a = mix.gate(x)
    want = mix.output(a * 0.5 * (1 + torch.erf(a / math.sqrt(2))) * mix.value(x))
    torch.testing.assert_close(mix(x, (2, 2)), want)


def test_gelu_spares_memory_only_where_no_gradient_is_wanted() -> None:
    x = torch.randn(8)
    want = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    kept = x.clone()
    torch.testing.assert_close(gelu(kept), want)
    assert torch.equal(kept, x)
    with torch.no_grad():
        torch.testing.assert_close(gelu(kept), want)
    torch.testing.assert_close(kept, want)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("out", [8, 12])
def test_mbconv_keeps_what_its_branch_does_not_change(stride: int, out: int) -> None:
    conv = MBConv(8, out, stride=stride, ratio=2.2)
    assert conv.expand.out_channels == {8: 16, 12: 24}[out]  # multiples of 8
    torch.nn.init.zeros_(conv.project.weight)
    torch.nn.init.zeros_(conv.project.bias)
    x = torch.randn(2, 8, 5, 7)
    y = conv(x)
    assert y.shape == (2, out, -(-5 // stride), -(-7 // stride))
    if out == 8:
        # The mean of the 3 x 3 pixels around, of those inside the map; at a corner there are 4.
        corner = x[..., :2, :2].mean((2, 3)) if stride == 2 else x[..., 0, 0]
        torch.testing.assert_close(y[..., 0, 0], corner)
    with pytest.raises(ValueError, match="stride of 1 or 2, got 3"):
        MBConv(8, 8, stride=3)


def test_convolution_of_tokens_is_that_of_their_map() -> None:
    block = MBConvBlock(8, mlp_ratio=2)
    x = torch.randn(2, 15, 8)
    maps = tokens_to_map(x, (3, 5))
    assert torch.equal(maps[:, :, 1, 2], x[:, 7])
    assert maps.data_ptr() == map_to_tokens(maps).data_ptr() == x.data_ptr()
    assert map_to_tokens(maps).is_contiguous()
    torch.testing.assert_close(block(x, (3, 5)), map_to_tokens(block.conv(maps.contiguous())))
