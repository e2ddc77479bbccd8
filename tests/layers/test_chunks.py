"""Token mixers and channel mixers in parts: the same result, smaller tensors, whole graphs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from vision.layers import chunks
from vision.layers.channel_mix import build_channel_mixer
from vision.layers.mixers import build_mixer
from vision.layers.patch_embed import PaddedPatchEmbed

HW = (5, 7)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a part hold 4 KiB; return that."""
    monkeypatch.setitem(chunks.CHUNK_BYTES, "cpu", 4096)
    return 4096


def make(kind: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A mixer with random weights and tokens for it."""
    torch.manual_seed(0)
    build = build_mixer if kind == "bi_wkv" else build_channel_mixer
    mixer = build(kind, 64, 1, 3, **({} if kind == "geglu" else {"key_norm": True})).to(dtype)
    for p in mixer.parameters():
        nn.init.normal_(p, std=0.2)
    return mixer, torch.randn(2, HW[0] * HW[1], 64, dtype=dtype)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 2000))
def test_parts_make_the_whole(batch: int, tokens: int, channels: int, most: int) -> None:
    x = torch.randn(batch, tokens, channels, dtype=torch.float64)
    y = torch.randn(batch, tokens, 2 * channels, dtype=torch.float64)[..., ::2]  # not contiguous
    seen = []

    def function(parts: list[Tensor]) -> Tensor:
        seen.append(parts[0].shape[:-1].numel())
        return torch.cat([parts.pop() * 2, parts.pop()], -1)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(chunks.CHUNK_BYTES, "cpu", most)
        found = chunks.by_chunks(function, 5, [x, y])
    assert torch.equal(found, torch.cat([y * 2, x], -1))
    assert sum(seen) == batch * tokens
    assert len(seen) == 1 or (max(seen) - 1) * 5 * 8 < most


@pytest.mark.parametrize("kind", ["channel_mix", "head_channel_mix", "geglu", "bi_wkv"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_mixers_in_parts(small_chunks: int, kind: str, dtype: torch.dtype, error: float) -> None:
    mixer, x = make(kind, dtype)
    widest = []
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out: widest.append(out.nbytes))
    want = mixer(x, HW).detach()  # gradients may be asked for: whole
    whole = max(widest)
    with torch.no_grad():
        widest.clear()
        found = mixer(x, HW)
    assert_close(found, want, rtol=0, atol=error * want.abs().max().item())
    assert max(widest) <= (whole if kind == "bi_wkv" else small_chunks) < 2 * whole


@pytest.mark.parametrize("kind", ["channel_mix", "geglu"])
def test_graphs_hold_no_parts(small_chunks: int, kind: str) -> None:
    mixer, x = make(kind, torch.float32)
    with torch.no_grad():
        graph = torch.export.export(mixer.eval(), (x, HW)).graph
        products = [n for n in graph.nodes if "linear" in str(n.target)]
        assert len(products) == 3
        assert chunks.chunk_count(x, 256) > 1
    assert chunks.chunk_count(x, 256) == 1


def test_an_image_is_copied_only_for_padding() -> None:
    embed = PaddedPatchEmbed(img_size=16, patch_size=8, embed_dim=4)
    seen = []
    embed.proj.register_forward_pre_hook(lambda m, args: seen.append(args[0].data_ptr()))
    x = torch.randn(2, 3, 16, 24)
    y = embed(x)
    assert seen == [x.data_ptr()]
    assert y.shape == (2, 6, 4)
    # Cut pixels of a last patch that are zero come back as padding.
    x[:, :, 11:] = 0
    x[:, :, :, 21:] = 0
    assert torch.equal(embed(x[:, :, :11, :21]), embed(x))
