"""Frozen teachers whose image embeddings a student learns, and the frame that both see.

The frame is Segment Anything's (arXiv:2304.02643): the longest side resized to `image_size`, then
padded at the bottom and right to a square. Pixels are normalised first, so that padding is zero.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

import vision.models  # noqa: F401 -- its models can teach, too
from vision.models.checkpoint import check_fit, listing, read_checkpoint, unwrap_state_dict
from vision.models.factory import check_model_name
from vision.models.feature_maps import feature_maps

from .model import STRIDE
from .transforms import resize_longest_side

RESIZE = "longest side, Pillow bilinear, padded with the mean at the bottom and right"


def pad_to_square(image: np.ndarray, image_size: int) -> tuple[Tensor, tuple[int, int]]:
    """Bring an image into the frame.

    Args:
        image: uint8 RGB (H, W, 3).
        image_size: side of the square in pixels.

    Returns:
        uint8 (3, image_size, image_size), zero where it is padded; height and width before padding.
    """
    x = torch.from_numpy(resize_longest_side(image, image_size)).permute(2, 0, 1)
    height, width = x.shape[1:]
    return F.pad(x, (0, image_size - width, 0, image_size - height)), (height, width)


def _inside(sizes: Tensor, side: int) -> Tensor:
    """Which cells (B, side, side) lie in the first rows and columns that `sizes` (B, 2) counts."""
    place = torch.arange(side, device=sizes.device)
    rows, columns = (place < sizes[:, axis, None] for axis in (0, 1))
    return rows[:, :, None] & columns[:, None, :]


def normalize_padded(
    x: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Normalise images of the frame; their padding becomes zero.

    Args:
        x: RGB, 0 .. 255, (B, 3, S, S).
        sizes: height and width in pixels before padding, (B, 2).
        mean: of the channels, in 0 .. 255.
        std: as `mean`.

    Returns:
        float32 (B, 3, S, S).

    Raises:
        ValueError: images that are no squares, or sizes that do not lie in them.
    """
    if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] != x.shape[3]:
        raise ValueError(f"wanted padded squares (B, 3, S, S), got {tuple(x.shape)}")
    if tuple(sizes.shape) != (len(x), 2) or sizes.min() < 1 or sizes.max() > x.shape[2]:
        raise ValueError(
            f"wanted a height and a width in 1 .. {x.shape[2]} of each of {len(x)} images, got "
            f"{sizes.tolist()}"
        )
    x = x.float()
    offset, scale = (x.new_tensor(v).view(3, 1, 1) for v in (mean, std))
    return ((x - offset) / scale).masked_fill(~_inside(sizes, x.shape[2])[:, None], 0)


def unpadded_cells(sizes: Tensor, image_size: int, grid: int) -> Tensor:
    """Which cells of a square grid see a pixel of the image, and not padding alone.

    Args:
        sizes: height and width in pixels before padding, (B, 2).
        image_size: side of the padded square in pixels.
        grid: cells a side.

    Returns:
        bool (B, grid, grid).
    """
    return _inside((sizes * grid + image_size - 1) // image_size, grid)


class Teacher(nn.Module):
    """A frozen image encoder; make it by `create_teacher`.

    Args:
        body: normalised squares (B, 3, S, S) to the embedding and the maps of `levels`, a list.
        channels: of the embedding and of the maps.
        strides: as `channels`.
        mean: of the channels R, G, B, in 0 .. 255.
        std: as `mean`.
        identity: what decides about the embeddings, for JSON, with "image_size" in pixels.
    """

    def __init__(
        self,
        body: nn.Module,
        channels: Sequence[int],
        strides: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        identity: dict[str, Any],
    ) -> None:
        super().__init__()
        self.body = body
        self.channels = tuple(channels)
        self.strides = tuple(strides)
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # tuples become lists
        self.eval().requires_grad_(False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one embedding, (D, h, w)."""
        grid = self.identity["image_size"] // self.strides[0]
        return self.channels[0], grid, grid

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def maps(self, x: Tensor, sizes: Tensor) -> list[Tensor]:
        """Run the encoder, in float32 and one image after the other.

        So an image's embedding does not depend on the rest of the batch, and one that was cached
        is the one that is computed now.

        Args:
            x: RGB, 0 .. 255, padded, (B, 3, image_size, image_size).
            sizes: height and width in pixels before padding, (B, 2).

        Returns:
            The embedding (B, D, h, w), then the map of each level.

        Raises:
            ValueError: images of another size.
        """
        side = self.identity["image_size"]
        if tuple(x.shape[-2:]) != (side, side):
            raise ValueError(f"this teacher wants {side} x {side} pixels, got {tuple(x.shape)}")
        x = normalize_padded(x, sizes, self.mean, self.std)
        with torch.autocast(x.device.type, enabled=False):
            found = [self.body(one) for one in x.split(1)]
        return [torch.cat(maps) for maps in zip(*found, strict=True)]

    def forward(self, x: Tensor, sizes: Tensor) -> Tensor:
        """Embeddings (B, D, h, w); see `maps`."""
        return self.maps(x, sizes)[0]


class _SamMaps(nn.Module):
    """What comes out of the neck of Segment Anything's encoder, then the outputs of blocks."""

    def __init__(self, model: VisionTransformerSAM, levels: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.levels = tuple(levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        order = sorted(set(self.levels))
        if not order:
            return [self.model.forward_features(x)]
        embedding, found = self.model.forward_intermediates(x, order)
        maps = dict(zip(order, found, strict=True))
        return [embedding, *(maps[level] for level in self.levels)]


class _FeatureMaps(nn.Module):
    """Maps of a timm feature extractor, in the order of `levels`."""

    def __init__(self, model: nn.Module, order: Sequence[int], levels: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.places = tuple(order.index(level) for level in levels)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = feature_maps(self.model, x)
        return [maps[place] for place in self.places]


def create_teacher(
    name: str,
    image_size: int = 1024,
    weights: str | os.PathLike[str] | None = None,
    *,
    level: int | None = None,
    levels: Sequence[int] = (),
    seed: int = 0,
    **model_args: Any,
) -> Teacher:
    """Make a teacher of any timm model.

    Args:
        name: as in `timm.list_models()`; "samvit_huge_patch16" is Segment Anything's ViT-H.
        image_size: side of the padded images in pixels.
        weights: file of timm's or, for samvit_*, of Segment Anything's (sam_vit_h_4b8939.pth);
            None for random ones.
        level: which feature map is the embedding; None takes the neck's output of samvit_*, of
            others the last map of stride 16.
        levels: further feature maps, for a loss between levels.
        seed: of random weights.
        **model_args: passed to `timm.create_model`.

    Raises:
        ValueError: no such model or level, or an image size that is no multiple of the stride.
        FileNotFoundError: no such weights file.
        CheckpointError: a file that cannot be read, or weights that do not fit.
    """
    check_model_name(name)
    stats = timm.get_pretrained_cfg(name)
    options = {"img_size": image_size, **model_args} if stats.fixed_input_size else model_args
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is None:
            state = _random_weights(name, options)
        else:
            state = _read_weights(name, weights, options)
        if level is None and name.startswith("samvit"):
            body, channels, strides = _sam_maps(name, state, levels, options)
        else:
            body, channels, strides = _feature_maps(name, state, level, levels, options)
    if image_size < 1 or image_size % strides[0]:
        raise ValueError(f"image_size wants a multiple of {strides[0]}, got {image_size}")
    identity = {
        "name": name,
        "weights": _digest(state),
        "image_size": image_size,
        "resize": RESIZE,
        "level": level,
        "model_args": model_args,
    }
    mean, std = ([255 * value for value in values] for values in (stats.mean, stats.std))
    return Teacher(body, channels, strides, mean, std, identity)


def _sam_maps(
    name: str,
    state: dict[str, Tensor],
    levels: Sequence[int],
    options: dict[str, Any],
) -> tuple[nn.Module, list[int], list[int]]:
    """Segment Anything's encoder with its neck."""
    model = timm.create_model(name, num_classes=0, **options)
    model.load_state_dict(state)
    _check_levels(name, levels, len(model.feature_info))
    blocks = [model.feature_info[level] for level in levels]
    channels = [model.num_features, *(block["num_chs"] for block in blocks)]
    return _SamMaps(model, levels), channels, [STRIDE, *(block["reduction"] for block in blocks)]


def _feature_maps(
    name: str,
    state: dict[str, Tensor],
    level: int | None,
    levels: Sequence[int],
    options: dict[str, Any],
) -> tuple[nn.Module, list[int], list[int]]:
    """Chosen maps of a model that timm makes a feature extractor of."""
    with torch.device("meta"):
        every = timm.create_model(name, features_only=True, **options).feature_info
    count = len(every.info)
    if level is None:
        strides = [info["reduction"] for info in every.info]
        if STRIDE not in strides:
            raise ValueError(f"{name} has maps of strides {strides}, none of {STRIDE}; give level")
        level = count - 1 - strides[::-1].index(STRIDE)
    wanted = [level, *levels]
    _check_levels(name, wanted, count)
    order = sorted(set(wanted))
    model = timm.create_model(
        name,
        features_only=True,
        out_indices=order,
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": dict(state)},  # a copy: timm removes entries
        **options,
    )
    places = [order.index(place) for place in wanted]
    channels, strides = model.feature_info.channels(), model.feature_info.reduction()
    body = _FeatureMaps(model, order, wanted)
    return body, [channels[i] for i in places], [strides[i] for i in places]


def _check_levels(name: str, levels: Sequence[int], count: int) -> None:
    wrong = [level for level in levels if not 0 <= level < count]
    if wrong:
        raise ValueError(f"{name} has the levels 0 .. {count - 1}, got {listing(map(str, wrong))}")


def _without_head(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights but for those of the model's classifier."""
    parts = model.pretrained_cfg.get("classifier") or ()
    parts = (parts,) if isinstance(parts, str) else parts
    head = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    return {key: value for key, value in state.items() if key not in head}


def _random_weights(name: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of the whole model but for its classifier: the same, whichever levels are used."""
    model = timm.create_model(name, **options)
    return _without_head(model.state_dict(), model)


def _read_weights(
    name: str,
    path: str | os.PathLike[str],
    options: dict[str, Any],
) -> dict[str, Tensor]:
    """Read a weights file and compare it with the whole model, strictly but for a classifier."""
    state = unwrap_state_dict(read_checkpoint(Path(path)))
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    # timm's models keep their map of foreign names under this name, in the module of the class.
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rename is not None:
        state = rename(state, model)
    state = _without_head(state, model)
    check_fit(state, _without_head(model.state_dict(), model), f"the weights file {path}")
    return state


def _digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
