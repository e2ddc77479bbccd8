"""Layers of the adapter: deformable attention's first values, batch norm over processes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from vision.layers import batch_norm
from vision.layers.batch_norm import BatchNorm2d, spans_processes
from vision.layers.deform_attn import DeformableAttention, pixel_centres


def test_heads_look_in_directions_of_their_own() -> None:
    layer = DeformableAttention(8, num_heads=4, levels=2, points=3)
    offsets = layer.offsets.bias.view(4, 2, 3, 2)
    ways = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    for point in range(3):
        for level in range(2):
            torch.testing.assert_close(
                offsets[:, level, point], (point + 1) * ways, atol=1e-6, rtol=0
            )


def test_attention_by_hand() -> None:
    """Equal weights and no offsets: the mean over levels of the values at the query's place."""
    layer = DeformableAttention(4, num_heads=2, levels=2, points=3)
    nn.init.zeros_(layer.offsets.bias)
    shapes = [(2, 2), (2, 2)]
    feat, query = torch.randn(1, 8, 4), torch.randn(1, 4, 4)
    places = pixel_centres(shapes[:1], query)
    value = layer.value(feat)
    want = layer.output((value[:, :4] + value[:, 4:]) / 2)
    torch.testing.assert_close(layer(query, places, feat, shapes), want)


def test_centres_are_x_and_y() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    want = [[1 / 6, 0.25], [0.5, 0.25], [5 / 6, 0.25], [1 / 6, 0.75], [0.5, 0.75], [5 / 6, 0.75]]
    got = pixel_centres([(2, 3), (1, 1)], like)
    torch.testing.assert_close(got, torch.tensor([*want, [0.5, 0.5]]))


@pytest.mark.parametrize(("heads", "ratio"), [(3, 1.0), (4, 0.3), (1, 0.01)])
def test_heads_must_divide_the_values(heads: int, ratio: float) -> None:
    with pytest.raises(ValueError, match=f"{heads} heads for int"):
        DeformableAttention(8, heads, 1, ratio=ratio)


def test_batch_norm_spans_gpus_of_several_processes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not spans_processes(cuda)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert not spans_processes(cuda)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert spans_processes(cuda)
    assert not spans_processes(cpu)
    layer, x = BatchNorm2d(3), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))  # SyncBatchNorm raises here
    assert math.isclose(
        layer.running_mean.sum().item(), 0.1 * x.mean((0, 2, 3)).sum().item(), abs_tol=1e-6
    )
    assert not isinstance(layer, nn.SyncBatchNorm)  # which DDP refuses on a CPU


def test_batch_norm_has_what_the_synchronised_one_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sync = nn.SyncBatchNorm.forward
    monkeypatch.setattr(batch_norm, "spans_processes", lambda device: True)
    monkeypatch.setattr(
        nn.SyncBatchNorm, "forward", lambda self, x: calls.append(self) or sync(self, x)
    )
    layer, x = BatchNorm2d(3), torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(layer(x), nn.BatchNorm2d(3)(x))
    assert calls == [layer]
    layer.eval()(x)
    assert calls == [layer]
