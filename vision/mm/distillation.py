"""Distillation in mmengine: an image encoder learns a teacher's embeddings (arXiv:2406.19369)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor, nn
from torch.utils.data import Dataset

from vision.data import list_images, read_image
from vision.models.factory import check_model_name
from vision.models.feature_maps import feature_maps
from vision.sam import create_sam
from vision.sam.embedding_cache import CacheError, EmbeddingCache
from vision.sam.model import STRIDE
from vision.sam.teachers import (
    Teacher,
    create_teacher,
    normalize_padded,
    pad_to_square,
    unpadded_cells,
)


class _Projection(nn.Module):
    """A neck of one map, whose channels it mixes to `dim`."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.proj(maps[0])


@MODELS.register_module()
class EmbeddingDistiller(BaseModel):
    """A student's encoder and neck, trained to give a teacher's image embeddings.

    Its checkpoints have `encoder.*` and `neck.*`, for `vision.sam.checkpoint.load_weights` with
    `parts=("encoder", "neck")`; the teacher is not in them.

    Args:
        student: {"sam": one of `vision.sam.list_sams()`, and what differs from it for
            `create_sam`}; or {"encoder": a timm model with a map of stride 16, "dim": channels of
            the embedding, and arguments for it}, which gets a 1x1 projection as its neck.
        teacher: keywords of `vision.sam.teachers.create_teacher`; None if the data set has cached
            embeddings.
        padding: compare the padded part, too, as the published mean does.
        standardize: folder of a cache of the teacher, whose mean and deviation of each channel the
            embeddings are standardised by; None compares them as they are.
        round_teacher: round the teacher's embeddings to float16, as a cache does.
        levels: pairs (map of the student's encoder, level of the teacher) that are compared, too,
            after a 1x1 projection of the student's; only with a teacher.
        level_weight: of each such pair's loss.

    Raises:
        ValueError: student and teacher that do not fit each other, or levels without a teacher.
        CacheError: statistics of another teacher.
    """

    def __init__(
        self,
        student: dict[str, Any],
        teacher: dict[str, Any] | None = None,
        padding: bool = False,
        standardize: str | None = None,
        round_teacher: bool = True,
        levels: Sequence[tuple[int, int]] = (),
        level_weight: float = 1.0,
    ) -> None:
        super().__init__(data_preprocessor=BaseDataPreprocessor())
        if ("sam" in student) == ("encoder" in student):
            raise ValueError(f"student wants either 'sam' or 'encoder', got {sorted(student)}")
        self._build_student(**student)
        self.padding = padding
        self.round_teacher = round_teacher
        self.levels = [tuple(pair) for pair in levels]
        self.level_weight = level_weight
        if self.levels and teacher is None:
            raise ValueError("levels want a teacher: a cache has only the embeddings")
        # In a tuple: its weights belong neither to the optimizer nor into the checkpoints.
        self._teacher: tuple[Teacher, ...] = ()
        self.level_projs = nn.ModuleList()
        if teacher is not None:
            wanted = [level for _, level in self.levels]
            self._teacher = (create_teacher(**teacher, levels=wanted),)
            self._project_levels()
        self._read_statistics(standardize)

    def _build_student(
        self, sam: str | None = None, encoder: str | None = None, **options: Any
    ) -> None:
        self.encoder: Any
        self.neck: nn.Module
        if sam is not None:
            model = create_sam(sam, **options).train()
            assert model.neck is not None  # only build_sam_compatible does without
            self.encoder, self.neck = model.encoder, model.neck
            self.embedding_index = model.embedding_index
            self.mean, self.std = model.pixel_mean, model.pixel_std
            return
        assert encoder is not None  # was looked at above
        check_model_name(encoder)
        dim = options.pop("dim", 256)
        self.encoder = timm.create_model(encoder, features_only=True, **options)
        strides = self.encoder.feature_info.reduction()
        if STRIDE not in strides:
            raise ValueError(f"{encoder} has maps of strides {strides}, wanted one of {STRIDE}")
        place = len(strides) - 1 - strides[::-1].index(STRIDE)
        self.neck = _Projection(self.encoder.feature_info.channels()[place], dim)
        self.embedding_index = (place,)
        stats = timm.get_pretrained_cfg(encoder)
        self.mean, self.std = (tuple(255 * v for v in s) for s in (stats.mean, stats.std))

    def _project_levels(self) -> None:
        """Compare the strides of each pair, and make the projections."""
        (teacher,) = self._teacher
        info = self.encoder.feature_info
        channels, strides = info.channels(), info.reduction()
        for (own, level), wanted, stride in zip(
            self.levels, teacher.channels[1:], teacher.strides[1:], strict=True
        ):
            if not 0 <= own < len(strides) or strides[own] != stride:
                raise ValueError(
                    f"levels pairs {own} of the student, whose maps have the strides {strides}, "
                    f"with {level} of the teacher, of stride {stride}; pair maps of one stride"
                )
            self.level_projs.append(nn.Conv2d(channels[own], wanted, 1))

    def _read_statistics(self, folder: str | None) -> None:
        mean, std = torch.zeros(1), torch.ones(1)
        if folder is not None:
            cache = EmbeddingCache(folder)
            if self._teacher and self._teacher[0].identity != cache.teacher:
                raise CacheError(
                    f"standardize names {folder}, of the teacher {cache.teacher}, but the teacher "
                    f"is {self._teacher[0].identity}"
                )
            mean, std = cache.statistics()
        self.register_buffer("target_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("target_std", std.view(-1, 1, 1), persistent=False)

    def forward(
        self,
        inputs: Tensor,
        sizes: Tensor,
        embedding: Tensor | None = None,
        mode: str = "tensor",
        **meta: Any,
    ) -> Any:
        """Run the student, and the teacher if there is one.

        Args:
            inputs: RGB, 0 .. 255, padded squares (B, 3, S, S).
            sizes: height and width in pixels before padding, (B, 2).
            embedding: cached ones of the teacher, (B, D, h, w).
            mode: "loss" for losses by name; "predict" for one dict per image with "embedding" and
                "target" (D, h, w), and "cells", bool (h, w), those that are compared; "tensor" for
                embeddings (B, D, h, w).
            **meta: what else the data set put into the sample; not used.

        Raises:
            ValueError: not exactly one of teacher and cached embeddings, another shape than the
                teacher's, or an unknown mode.
        """
        images = normalize_padded(inputs, sizes, self.mean, self.std)
        maps = feature_maps(self.encoder, images)
        y = self.neck([maps[i] for i in self.embedding_index])
        if mode == "tensor":
            return y
        if mode not in ("loss", "predict"):
            raise ValueError(f"no mode {mode!r}; there are 'loss', 'predict' and 'tensor'")
        targets = self._targets(inputs, sizes, embedding)
        if y.shape != targets[0].shape:
            raise ValueError(
                f"the student gives embeddings {tuple(y.shape[1:])}, the teacher "
                f"{tuple(targets[0].shape[1:])}; set dim of the student to its channels, and take "
                "one image_size for both"
            )
        # The levels' maps lie behind the embedding.
        found = [y, *(p(maps[i]) for p, (i, _) in zip(self.level_projs, self.levels, strict=True))]
        cells = [self._cells(sizes, inputs.shape[-1], x.shape[-1]) for x in found]
        if mode == "predict":
            rows = zip(y.float(), targets[0], cells[0], strict=True)
            return [{"embedding": a, "target": b, "cells": c} for a, b, c in rows]
        losses = [
            (x.float() - target).square().mean(1)[where].mean()
            for x, target, where in zip(found, targets, cells, strict=True)
        ]
        named = {f"loss_level{i}": self.level_weight * x for i, x in enumerate(losses[1:])}
        return {"loss_embedding": losses[0], **named}

    def _cells(self, sizes: Tensor, image_size: int, grid: int) -> Tensor:
        cells = unpadded_cells(sizes, image_size, grid)
        return torch.ones_like(cells) if self.padding else cells

    def _targets(self, inputs: Tensor, sizes: Tensor, embedding: Tensor | None) -> list[Tensor]:
        """The teacher's embeddings, standardised, and its levels; float32."""
        if (embedding is None) != bool(self._teacher):
            raise ValueError(
                "wanted either a teacher or cached embeddings, got "
                + ("both: leave one out" if self._teacher else "neither: set teacher or cache")
            )
        levels: list[Tensor] = []
        if embedding is None:
            embedding, *levels = self._teacher[0].to(inputs.device).maps(inputs, sizes)
            if self.round_teacher:
                embedding = embedding.half()
        if len(self.target_mean) not in (1, embedding.shape[1]):
            raise ValueError(
                f"standardize has statistics of {len(self.target_mean)} channels, the teacher "
                f"{embedding.shape[1]} channels"
            )
        return [(embedding.float() - self.target_mean) / self.target_std, *levels]


@DATASETS.register_module()
class ImagesForDistillation(Dataset):
    """Images of a folder and its subfolders, resized and padded, for `EmbeddingDistiller`.

    Args:
        data_root: folder of the data set.
        data_prefix: {"img_path": folder of the images in it}.
        image_size: side of the padded square in pixels.
        cache: folder of cached embeddings of these images; None if the model has a teacher. Images
            that the cache left out are left out.
        cached_by: what the cache's teacher must be, such as {"name": "samvit_huge_patch16"}.
        flip: probability of a horizontal flip; 0 with a cache, which has no flipped images.
        test_mode: no flip.

    Raises:
        ValueError: flips with a cache, or a folder without images.
        CacheError: a cache of another image size or teacher.
    """

    metainfo: dict[str, Any] = {}

    def __init__(
        self,
        data_root: str,
        data_prefix: dict[str, str],
        image_size: int = 1024,
        cache: str | None = None,
        cached_by: dict[str, Any] | None = None,
        flip: float = 0.0,
        test_mode: bool = False,
    ) -> None:
        if cache is not None and flip:
            raise ValueError("a cache has no embeddings of flipped images; flip wants 0 with it")
        self.root = Path(data_root) / data_prefix.get("img_path", "")
        self.image_size = image_size
        self.flip = 0.0 if test_mode else flip
        self.cache = None if cache is None else EmbeddingCache(cache)
        if self.cache is None:
            self.names = [p.relative_to(self.root).as_posix() for p in list_images(self.root)]
            return
        self.names = self.cache.names
        wanted = {"image_size": image_size, **(cached_by or {})}
        found = {key: self.cache.teacher.get(key) for key in wanted}
        if found != wanted:
            raise CacheError(f"wanted embeddings of a teacher with {wanted}; {cache} has {found}")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One image: "inputs" uint8 (3, S, S), "sizes" (2,), and a cached "embedding" (D, h, w).

        Raises:
            ImageReadError: a file that cannot be read.
            CacheError: the image is not the one that was encoded.
        """
        path = self.root / self.names[index]
        image = read_image(path)
        if self.flip and torch.rand(()) < self.flip:
            image = np.ascontiguousarray(image[:, ::-1])
        inputs, size = pad_to_square(image, self.image_size)
        sample: dict[str, Any] = {"inputs": inputs, "sizes": torch.tensor(size)}
        if self.cache is None:
            return sample
        if size != self.cache.sizes[index]:
            raise CacheError(
                f"{path} has {size[0]} x {size[1]} pixels after resizing, and had "
                f"{self.cache.sizes[index]} when {self.cache.folder} was written; write it anew"
            )
        return {**sample, "embedding": self.cache[index]}


@METRICS.register_module()
class EmbeddingError(BaseMetric):
    """How near a student's embeddings come to the teacher's, over the cells that are compared.

    Returns of `evaluate`: {"mse": mean squared error, "explained": percent of the variance of the
    teacher's channels over cells and images that the student explains}.

    Args:
        collect_device: "cpu" or "gpu", where results of several processes are gathered.
        prefix: put before the metric's names.
    """

    default_prefix = "distill"

    def __init__(self, collect_device: str = "cpu", prefix: str | None = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep four sums an image."""
        for sample in data_samples:
            y, target = (
                sample[key][:, sample["cells"]].double() for key in ("embedding", "target")
            )
            sums = ((y - target).square().sum(), target.sum(1), target.square().sum())
            self.results.append((target.shape[1], *(x.cpu().numpy() for x in sums)))

    def compute_metrics(self, results: list[tuple[Any, ...]]) -> dict[str, float]:
        """Over all images."""
        count, error, total, squares = (sum(column) for column in zip(*results, strict=True))
        variance = squares - (total**2).sum() / count
        return {
            "mse": float(error / (count * len(total))),
            "explained": 100 * float(1 - error / variance),
        }
