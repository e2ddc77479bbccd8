"""Pictures of predictions, written during validation and test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from PIL import Image
from torch import Tensor

from vision.data import box_of_mask, contact_sheet, draw_sample, overlay, palette
from vision.metrics import mask_iou

_TILE = 320  # longest side of a tile of a sheet, in pixels
_SURE = 0.3  # score of a detection that is drawn
_ERRORS = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)  # wrongly found, missed


class _SheetHook(Hook):
    """Draws what an evaluation gives, and writes one picture at its end."""

    priority = "LOW"

    def __init__(self, out_dir: str | None) -> None:
        self.out_dir = out_dir

    def before_val_epoch(self, runner: Any) -> None:
        """Begin a new sheet."""
        self._start()

    def before_test_epoch(self, runner: Any) -> None:
        """Begin a new sheet."""
        self._start()

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Look at a batch."""
        if is_main_process():
            self._draw(runner, runner.val_dataloader, data_batch, outputs)

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Look at a batch."""
        if is_main_process():
            self._draw(runner, runner.test_dataloader, data_batch, outputs)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Write the picture of a validation."""
        self._write(runner, "val")

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Write the picture of a test."""
        self._write(runner, "test")

    def _folder(self, runner: Any) -> Path:
        folder = Path(self.out_dir or runner.work_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _start(self) -> None:
        raise NotImplementedError

    def _draw(self, runner: Any, loader: Any, batch: Any, outputs: Sequence[Any]) -> None:
        raise NotImplementedError

    def _write(self, runner: Any, phase: str) -> None:
        raise NotImplementedError


@HOOKS.register_module()
class PredictionSheetHook(_SheetHook):
    """Write one PNG with images from all over an evaluation and what the model said of them.

    Classification: the image, predicted and true class. Segmentation: image, annotation and
    prediction side by side. Promptable: image, annotation, and the masks from each kind of prompt.
    Detection: what was annotated and what was found, side by side. Written as
    predictions_val.png or predictions_test.png.

    Args:
        images: how many images the sheet shows.
        out_dir: folder; default: the run's work dir.
        every_image: also write a picture of each image of the evaluation, by its number.
    """

    def __init__(
        self, images: int = 24, out_dir: str | None = None, every_image: bool = False
    ) -> None:
        super().__init__(out_dir)
        self.images = images
        self.every_image = every_image
        self._start()

    def _start(self) -> None:
        self._tiles: list[np.ndarray] = []
        self._captions: list[str] = []
        self._seen = 0

    def _draw(self, runner: Any, loader: Any, batch: Any, outputs: Sequence[Any]) -> None:
        meta = loader.dataset.metainfo
        images = batch["inputs"]
        if isinstance(images[0], list | tuple):
            images = images[0]  # test-time augmentation: the first view is the plain one
        for image, output in zip(images, outputs, strict=True):
            self._seen += 1
            # Evenly spread: the first images of a video are all alike.
            step = max(1, len(loader.dataset) // get_world_size() // self.images)
            full = len(self._tiles) >= self.images or (self._seen - 1) % step
            if full and not self.every_image:
                continue
            tile, caption = draw_prediction(image, output, meta)
            if self.every_image:
                Image.fromarray(tile).save(self._folder(runner) / f"{self._seen - 1:06d}.png")
            if not full:
                self._tiles.append(_small(tile))
                self._captions.append(caption)

    def _write(self, runner: Any, phase: str) -> None:
        if self._tiles:
            columns = 6 if self._tiles[0].shape[1] < 160 else 2
            sheet = contact_sheet(self._tiles, self._captions, columns=columns)
            sheet.save(self._folder(runner) / f"predictions_{phase}.png")


def draw_prediction(image: Tensor, output: Any, meta: dict[str, Any]) -> tuple[np.ndarray, str]:
    """One image with the prediction beside it or named below.

    Args:
        image: uint8 RGB (3, H, W), BGR for mmdet, as their preprocessors take it.
        output: a dict of `ImageClassifier` or `PromptableSegmentor`, mmseg's SegDataSample, or
            mmdet's DetDataSample.
        meta: the data set's metainfo, with classes and, for segmentation, palette.

    Returns:
        A picture, uint8 (h, w, 3), and its caption.
    """
    picture = np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0))
    if isinstance(output, dict) and "answers" in output:
        return _prompted(picture, output)
    if isinstance(output, dict):
        found = int(output["scores"].argmax())
        names = dict(enumerate(map(str, meta["classes"])))
        caption = names.get(found, f"class {found}")
        if found != output["label"]:
            caption += f" (is {names[output['label']]})"
        return _large(picture), caption
    if "pred_instances" in output:
        return _detected(picture, output, meta)
    colours = np.asarray(meta.get("palette") or palette(len(meta["classes"])), dtype=np.uint8)
    found_mask = output.pred_sem_seg.data[0].cpu().numpy()
    size = (found_mask.shape[1], found_mask.shape[0])
    picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))
    panels = [picture, overlay(picture, found_mask, colours, 0.7)]
    if "gt_sem_seg" in output:
        truth = output.gt_sem_seg.data.cpu().numpy().squeeze()
        panels.insert(1, overlay(picture, truth, colours, 0.7))
    name = Path(str(output.metainfo.get("img_path", ""))).name
    return np.concatenate(panels, axis=1), f"{name}: image, annotation, prediction"


def _detected(picture: np.ndarray, output: Any, meta: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Objects with their classes, those found with a score from 0.3 on; by mmdet's visualizer."""
    from mmdet.visualization import DetLocalVisualizer

    height, width = output.ori_shape[:2]  # what boxes and masks refer to
    picture = np.asarray(Image.fromarray(picture[..., ::-1]).resize((width, height)))
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dict(meta)
    visualizer.add_datasample("", picture, output.cpu(), pred_score_thr=_SURE)
    found = int((output.pred_instances.scores >= _SURE).sum())
    name = Path(str(output.metainfo.get("img_path", ""))).name
    return visualizer.get_image(), f"{name}: annotation, {found} found"


def _prompted(picture: np.ndarray, output: dict[str, Any]) -> tuple[np.ndarray, str]:
    """The objects as they are, and as they were found from each kind of prompt."""
    found = output["answers"].masks
    panels = [picture, *(_painted(picture, masks) for masks in (output["true"], *found.values()))]
    return np.concatenate(panels, axis=1), f"image, annotation, from {', '.join(found)}"


def _painted(picture: np.ndarray, masks: Tensor) -> np.ndarray:
    """Objects over a picture, bool (N, H, W), each in a colour of its own."""
    for mask, colour in zip(masks.numpy(), palette(len(masks) + 1)[1:], strict=True):
        picture = overlay(picture, mask.astype(np.uint8), np.stack([colour, colour]), 0.6, (0,))
    return picture


@HOOKS.register_module()
class WorstPromptsHook(_SheetHook):
    """Write one PNG with the objects whose masks from the tight box are worst.

    Side by side: the image with the box, the true mask, the mask found, and the errors: red where
    it is wrongly found, blue where it was missed. Below: IoU in percent, and the sample's name.
    Written as worst_val.png or worst_test.png; in several processes, of the first one's images.

    Args:
        objects: how many objects the sheet shows.
        out_dir: folder; default: the run's work dir.

    Raises:
        ValueError: fewer than one object.
    """

    def __init__(self, objects: int = 16, out_dir: str | None = None) -> None:
        super().__init__(out_dir)
        if objects < 1:
            raise ValueError(f"objects wants 1 or more, got {objects}")
        self.objects = objects
        self._start()

    def _start(self) -> None:
        self._worst: list[tuple[float, np.ndarray, str]] = []  # worst first
        self._seen = 0

    def _draw(self, runner: Any, loader: Any, batch: Any, outputs: Sequence[Any]) -> None:
        names = batch.get("name", [f"sample {self._seen + i}" for i in range(len(outputs))])
        self._seen += len(outputs)
        for image, name, output in zip(batch["inputs"], names, outputs, strict=True):
            found = output["answers"].masks.get("box")
            if found is None:
                raise ValueError("the worst boxes want a model with evaluation=dict(box=True, ...)")
            for i, iou in enumerate(mask_iou(found, output["true"]).tolist()):
                if len(self._worst) == self.objects and iou >= self._worst[-1][0]:
                    continue
                picture = np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0))
                tile = _small(_large(draw_errors(picture, found[i], output["true"][i])))
                caption = f"{100 * iou:.1f} {Path(name).name}, object {i}"
                self._worst.append((iou, tile, caption))
                self._worst.sort(key=lambda entry: entry[0])
                del self._worst[self.objects :]

    def _write(self, runner: Any, phase: str) -> None:
        if self._worst:
            _, tiles, captions = zip(*self._worst, strict=True)
            sheet = contact_sheet(tiles, captions, columns=2)
            sheet.save(self._folder(runner) / f"worst_{phase}.png")


@HOOKS.register_module()
class ReconstructionSheetHook(_SheetHook):
    """Write one PNG with images, what a masked autoencoder saw of them, and what it made of that.

    Below: its mean squared error, and that of the mean of the visible patches. Written as
    reconstructions_val.png or reconstructions_test.png, anew by every evaluation.

    Args:
        images: how many images the sheet shows, from all over the evaluation.
        out_dir: folder; default: the run's work dir.

    Raises:
        ValueError: fewer than one image.
    """

    def __init__(self, images: int = 16, out_dir: str | None = None) -> None:
        super().__init__(out_dir)
        if images < 1:
            raise ValueError(f"images wants 1 or more, got {images}")
        self.images = images
        self._start()

    def _start(self) -> None:
        self._tiles: list[np.ndarray] = []
        self._captions: list[str] = []
        self._seen = 0

    def _draw(self, runner: Any, loader: Any, batch: Any, outputs: Sequence[Any]) -> None:
        step = max(1, len(loader.dataset) // get_world_size() // self.images)
        for image, output in zip(batch["inputs"], outputs, strict=True):
            wanted = self._seen % step == 0 and len(self._tiles) < self.images
            self._seen += 1
            if wanted:
                panels = torch.cat([image.cpu(), output["masked"], output["painted"]], 2)
                self._tiles.append(_small(_large(panels.numpy().transpose(1, 2, 0))))
                errors = (output["mse"], output["mean_of_visible"])
                self._captions.append("error {:.3f}, mean of visible {:.3f}".format(*errors))

    def _write(self, runner: Any, phase: str) -> None:
        if self._tiles:
            sheet = contact_sheet(self._tiles, self._captions, columns=2)
            sheet.save(self._folder(runner) / f"reconstructions_{phase}.png")


def draw_errors(picture: np.ndarray, found: Tensor, true: Tensor) -> np.ndarray:
    """Image with the tight box, true mask, mask found, and errors side by side.

    Args:
        picture: uint8 RGB (H, W, 3).
        found: bool (H, W).
        true: bool (H, W), not empty.

    Returns:
        uint8 (H, 4 * W, 3).
    """
    boxed = draw_sample({"image": picture, "boxes": [box_of_mask(true.numpy())]})
    errors = (found & ~true).to(torch.uint8) + 2 * (true & ~found).to(torch.uint8)
    masks = (_painted(picture, mask[None]) for mask in (true, found))
    wrong = overlay(picture, errors.numpy(), _ERRORS, 0.8, skip=(0,))
    return np.concatenate([boxed, *masks, wrong], axis=1)


def _small(tile: np.ndarray) -> np.ndarray:
    """Shrink a tile of several panels to a sheet's size."""
    height, width = tile.shape[:2]
    scale = min(1.0, _TILE / height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BILINEAR))


def _large(tile: np.ndarray) -> np.ndarray:
    """Enlarge a tiny image, so that its caption fits below."""
    factor = max(1, 96 // tile.shape[1])
    return np.asarray(
        torch.from_numpy(tile).repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    )
