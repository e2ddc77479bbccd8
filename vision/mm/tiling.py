"""A segmentor that predicts large images tile by tile, in memory that does not grow with them."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.models.segmentors import EncoderDecoder
from mmseg.structures import SegDataSample
from torch import Tensor

from vision.data.tiles import blend_tiles, check_tiles

from .launch import ConfigError

# Smallest side that a pyramid with a stride of 32 px can be built on.
SMALLEST_TILE = 32


def add_tile_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --tile and --overlap."""
    parser.add_argument("--tile", type=int, metavar="PX", help="segment in tiles of this side")
    parser.add_argument(
        "--overlap", type=int, metavar="PX", help="of tiles, at least (default: a quarter)"
    )


def tiles_of(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> tuple[int, int | None] | None:
    """Return side and overlap that `add_tile_arguments` asked for, None without tiles.

    Ends the program with a message where there is an overlap of no tiles.
    """
    if args.tile is not None:
        return args.tile, args.overlap
    if args.overlap is not None:
        parser.error("--overlap is of tiles; give their side with --tile")
    return None


def use_tiles(model: Any, tile: int, overlap: int | None = None) -> None:
    """Change the config of a segmentor so that it predicts tile by tile.

    Args:
        model: config of an mmseg `EncoderDecoder`.
        tile: side of a tile, pixels of the image that the model gets.
        overlap: pixels that neighbours share at least; None for a quarter of the tile.

    Raises:
        ConfigError: another model, or no such tiles.
    """
    if model.get("type") not in ("EncoderDecoder", "TiledEncoderDecoder"):
        raise ConfigError(f"tiles are for a segmentor, an EncoderDecoder, got {model.get('type')}")
    overlap = tile // 4 if overlap is None else overlap
    try:
        check_tiles(tile, overlap, SMALLEST_TILE)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    model["type"] = "TiledEncoderDecoder"
    model["test_cfg"] = {"mode": "tiled", "tile": tile, "overlap": overlap}


@MODELS.register_module()
class TiledEncoderDecoder(EncoderDecoder):
    """mmseg's `EncoderDecoder` with one more mode of prediction, "tiled".

    `test_cfg=dict(mode="tiled", tile=1024, overlap=256)`: tiles of 1024 px that share at least
    256, their logits blended with weights that fall off towards a tile's border. Images are
    normalised tile by tile, and labels are taken band by band, so that no more of an image is in
    memory than its pixels and labels. Where the pipeline resized an image, its logits are resized
    back, and held whole. Samples have no logits, which TTA would need.

    Args:
        *args: as for `EncoderDecoder`.
        **kwargs: likewise.

    Raises:
        ValueError: no such tiles.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tiles: tuple[int, int] | None = None
        if self.test_cfg.get("mode") == "tiled":
            self.tiles = self.test_cfg["tile"], self.test_cfg["overlap"]
            check_tiles(*self.tiles, SMALLEST_TILE)

    def val_step(self, data: Any) -> list[SegDataSample]:
        """Predict a batch as the data loader gives it."""
        return self.test_step(data)

    def test_step(self, data: Any) -> list[SegDataSample]:
        """Predict a batch as the data loader gives it."""
        if self.tiles is None:
            return super().test_step(data)
        pairs = zip(data["inputs"], data["data_samples"], strict=True)
        return [self._predict_one(*pair) for pair in pairs]

    def _predict_one(self, image: Tensor, sample: SegDataSample) -> SegDataSample:
        assert self.tiles is not None
        hw = image.shape[-2], image.shape[-1]
        bands = blend_tiles(
            lambda top, bottom, left, right: self._logits(image[:, top:bottom, left:right]),
            hw,
            *self.tiles,
        )
        if tuple(sample.ori_shape[:2]) != hw or sample.metainfo.get("flip"):
            whole = torch.cat([band.clone() for band in bands], 1)
            self.postprocess_result(whole[None], [sample])
            del sample.seg_logits
            return sample
        labels = [self._labels(band).cpu() for band in bands]
        sample.set_data({"pred_sem_seg": PixelData(data=torch.cat(labels)[None])})
        return sample

    def _logits(self, tile: Tensor) -> Tensor:
        """Logits (classes, h, w) of a tile (channels, h, w) as the pipeline gives it."""
        height, width = tile.shape[-2:]
        data = {"inputs": [tile], "data_samples": [SegDataSample()]}
        x = self.data_preprocessor(data, False)["inputs"]  # padded at the bottom and the right
        side = tuple(x.shape[-2:])
        meta: Mapping[str, Any] = dict.fromkeys(("ori_shape", "img_shape", "pad_shape"), side)
        return self.encode_decode(x, [meta])[0, :, :height, :width]

    def _labels(self, logits: Tensor) -> Tensor:
        """Labels (rows, W) of logits (classes, rows, W), as `postprocess_result` takes them."""
        if len(logits) > 1:
            return logits.argmax(0)
        return (logits[0].sigmoid() > self.decode_head.threshold).to(logits)
