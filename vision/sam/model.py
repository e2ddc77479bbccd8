"""RWKV-SAM: promptable segmentation with a hybrid RWKV encoder (arXiv:2406.19369)."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vision.files import write_whole
from vision.models.checkpoint import CheckpointError, listing, read_checkpoint, write_weights
from vision.models.feature_maps import feature_maps

from .mask_decoder import MaskDecoder
from .neck import Neck
from .prompt_encoder import PromptEncoder

STRIDE = 16  # of the image embedding; masks come at a quarter of it


@dataclass(frozen=True)
class ImageEmbedding:
    """What is kept of images of one size: enough for any number of prompts.

    Attributes:
        embedding: (B, dim, h, w), stride 16.
        share: the images' part of the mask decoder's mix, (B, dim/4, 4h, 4w); None if the decoder
            has no high-resolution branch.
        input_size: height and width in pixels of the encoded images, before padding.
    """

    embedding: Tensor
    share: Tensor | None
    input_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.embedding)

    def __getitem__(self, index: int) -> "ImageEmbedding":
        """One image of the batch, as a batch of one."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"no image {index} in an embedding of {len(self)}")
        one = slice(index, index + 1 or None)
        share = None if self.share is None else self.share[one]
        return ImageEmbedding(self.embedding[one], share, self.input_size)

    def repeat(self, counts: Sequence[int]) -> "ImageEmbedding":
        """Each image as often as `counts` says, (B,), side by side: one for each of its prompts."""
        times = torch.tensor(counts, device=self.embedding.device)
        share = None if self.share is None else self.share.repeat_interleave(times, 0)
        return ImageEmbedding(self.embedding.repeat_interleave(times, 0), share, self.input_size)

    def to(self, *args: Any, **kwargs: Any) -> "ImageEmbedding":
        """Move or cast the tensors, as `Tensor.to` does."""
        share = None if self.share is None else self.share.to(*args, **kwargs)
        return ImageEmbedding(self.embedding.to(*args, **kwargs), share, self.input_size)

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, to be saved; see `from_state_dict`."""
        state = {"embedding": self.embedding, "input_size": torch.tensor(self.input_size)}
        return state if self.share is None else {**state, "share": self.share}

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> "ImageEmbedding":
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: other keys or shapes.
        """
        wanted = {"embedding", "input_size"}
        if set(state) - {"share"} != wanted or state["input_size"].numel() != 2:
            raise CheckpointError(
                "wanted an image embedding with embedding, input_size and, of a decoder with a "
                f"high-resolution branch, share; got {listing(sorted(state)) or 'nothing'}"
            )
        height, width = (int(side) for side in state["input_size"].flatten())
        return ImageEmbedding(state["embedding"], state.get("share"), (height, width))


class RwkvSam(nn.Module):
    """Image encoder, neck, prompt encoder and mask decoder.

    Args:
        encoder: normalised images (B, 3, H, W) to a list of maps (B, C, h, w), or to one map of
            stride 16.
        prompt_encoder: prompts to tokens.
        mask_decoder: embedding and tokens to masks.
        neck: maps to the image embedding; None takes the map of stride 16 as it is.
        embedding_index: which of the encoder's maps go to the neck.
        high_res_index: which of them have the strides 4 and 8; None without that branch.
        image_size: longest side in pixels to which a predictor resizes.
        pad_to_square: pad to image_size x image_size, as Segment Anything, instead of to the next
            multiple of 16.
        pixel_mean: of the channels R, G, B, in 0 .. 255.
        pixel_std: as `pixel_mean`.
    """

    mask_threshold = 0.0
    # Without gradients prompts are decoded in groups of so many: the maps of stride 4 of all of
    # them at once would be most of the memory.
    prompts_at_once = 16

    def __init__(
        self,
        encoder: nn.Module,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        neck: Neck | None = None,
        *,
        embedding_index: Sequence[int] = (-1,),
        high_res_index: tuple[int, int] | None = None,
        image_size: int = 1024,
        pad_to_square: bool = False,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
    ) -> None:
        super().__init__()
        if image_size < 1 or image_size % STRIDE:
            raise ValueError(f"image_size wants a multiple of {STRIDE}, got {image_size}")
        if (high_res_index is None) != (mask_decoder.high_res is None):
            raise ValueError("high_res_index and the decoder's high-resolution branch go together")
        self.encoder = encoder
        self.neck = neck
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        self.embedding_index = tuple(embedding_index)
        self.high_res_index = high_res_index
        self.image_size = image_size
        self.pad_to_square = pad_to_square
        self.config: dict[str, Any] = {}  # of `build_sam`, for `save_pretrained`
        # No buffers: these stay float32 in a model of 16 bits.
        self.pixel_mean = tuple(pixel_mean)
        self.pixel_std = tuple(pixel_std)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.prompt_encoder.no_mask_embed.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.prompt_encoder.no_mask_embed.dtype

    def padded_size(self, input_size: Sequence[int]) -> tuple[int, int]:
        """Height and width in pixels to which an image of `input_size` is padded.

        Raises:
            ValueError: a model that pads to squares gets an image larger than its square.
        """
        if self.pad_to_square:
            if max(input_size) > self.image_size:
                raise ValueError(
                    f"this model pads to {self.image_size} x {self.image_size} pixels, got an "
                    f"image of {input_size[0]} x {input_size[1]}; resize it first"
                )
            return self.image_size, self.image_size
        # Not -(-side // STRIDE): ONNX divides towards zero.
        height, width = ((side + STRIDE - 1) // STRIDE * STRIDE for side in input_size)
        return height, width

    def preprocess(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB, 0 .. 255, to normalised ones, padded at the bottom and right.

        Raises:
            ValueError: another shape.
        """
        if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape:
            raise ValueError(f"wanted RGB images (B, 3, H, W), 0 to 255, got {tuple(x.shape)}")
        height, width = self.padded_size(x.shape[-2:])
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, std = (x.new_tensor(v).view(3, 1, 1) for v in (self.pixel_mean, self.pixel_std))
        x = (x - mean) / std
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])).to(self.dtype)

    def encode_image(self, x: Tensor) -> ImageEmbedding:
        """Encode images of one size; do it once, then ask with as many prompts as you like.

        Args:
            x: RGB, 0 .. 255, float or uint8, (B, 3, H, W) of any size; see `preprocess`.
        """
        return self.embed(self.preprocess(x), (x.shape[-2], x.shape[-1]))

    def embed(self, x: Tensor, input_size: tuple[int, int]) -> ImageEmbedding:
        """Encode images that are normalised and padded already (B, 3, H, W)."""
        maps = feature_maps(self.encoder, x)
        deepest = [maps[i] for i in self.embedding_index]
        embedding = deepest[0] if self.neck is None else self.neck(deepest)
        share = None
        if self.high_res_index is not None and self.mask_decoder.high_res is not None:
            s4, s8 = (maps[i] for i in self.high_res_index)
            share = self.mask_decoder.high_res.image_share(s4, s8)
        return ImageEmbedding(embedding, share, input_size)

    def predict_masks(
        self,
        image: ImageEmbedding,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        multimask_output: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Predict the masks of N prompts of one image.

        Args:
            image: embedding of one image.
            points: x, y in pixels of the encoded image, (N, P, 2), and labels (N, P): 1
                foreground, 0 background, -1 padding.
            boxes: x0, y0, x1, y1 in pixels of the encoded image, (N, 4).
            masks: logits (N, 1, 4h, 4w), such as an earlier call gave.
            multimask_output: three masks for an ambiguous prompt instead of one.

        Returns:
            Logits (N, M, 4h, 4w) and predicted IoU (N, M).

        Raises:
            ValueError: several images, no prompt, or shapes that do not fit.
        """
        if len(image) != 1:
            raise ValueError(f"wanted the embedding of one image, got {len(image)}; index it")
        h, w = image.embedding.shape[-2:]
        if masks is not None and masks.shape[-2:] != (4 * h, 4 * w):
            raise ValueError(
                f"mask prompts of this image want {4 * h} x {4 * w} logits (the low-resolution "
                f"masks of an earlier call), got {tuple(masks.shape[-2:])}"
            )
        sparse, dense = self.prompt_encoder(points, boxes, masks, (STRIDE * h, STRIDE * w))
        if 0 in (len(sparse), len(dense)):
            raise ValueError("wanted at least one prompt, got none")
        count = max(len(sparse), len(dense))
        sparse = sparse.expand(count, -1, -1)
        image_pe = self.prompt_encoder.position.grid((h, w))
        step = count if torch.is_grad_enabled() else self.prompts_at_once
        answers = [
            self.mask_decoder(
                image.embedding,
                image_pe,
                sparse[i : i + step],
                dense if len(dense) == 1 else dense[i : i + step],
                image.share,
                multimask_output,
            )
            for i in range(0, count, step)
        ]
        logits, iou = zip(*answers, strict=True)
        return torch.cat(logits), torch.cat(iou)

    def upscale_masks(
        self, logits: Tensor, input_size: Sequence[int], original_size: Sequence[int]
    ) -> Tensor:
        """Enlarge low-resolution logits to the size of the original image, padding cut off.

        Args:
            logits: (N, M, 4h, 4w).
            input_size: height and width of the encoded image in pixels, before padding.
            original_size: height and width of the original image in pixels.

        Returns:
            Logits (N, M, *original_size), float32 at least.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        padded = (4 * logits.shape[-2], 4 * logits.shape[-1])
        x = F.interpolate(logits, padded, mode="bilinear", align_corners=False)
        x = x[..., : input_size[0], : input_size[1]]
        return F.interpolate(x, tuple(original_size), mode="bilinear", align_corners=False)

    def forward(
        self,
        x: Tensor,
        points: tuple[Tensor, Tensor] | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        multimask_output: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Encode one image (1, 3, H, W) and predict; see `encode_image` and `predict_masks`."""
        return self.predict_masks(self.encode_image(x), points, boxes, masks, multimask_output)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, each whole or not at all.

        Raises:
            ValueError: the model was not made by `create_sam`, so that its making is not known.
        """
        if not self.config:
            raise ValueError("only a model made by create_sam or from_pretrained can be saved so")
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        write_weights(self.state_dict(), root / "model.safetensors")
        write_whole(root / "config.json", json.dumps(self.config, indent=2) + "\n")

    @staticmethod
    def from_pretrained(source: str | os.PathLike[str]) -> "RwkvSam":
        """Read a folder of `save_pretrained`, or such a repository of the Hugging Face hub.

        Args:
            source: path of a folder, or "owner/name".

        Raises:
            FileNotFoundError: neither a folder with both files nor the name of a repository.
            CheckpointError: a config that cannot be read, or weights that do not fit it.
        """
        config_file, weights = _pretrained_files(source)
        try:
            model = build_sam(**json.loads(config_file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:  # cut off, keys that build_sam has not
            raise CheckpointError(
                f"{config_file} is no config that save_pretrained wrote: {error}"
            ) from error
        from .checkpoint import load_weights

        load_weights(model, read_checkpoint(weights))
        return model.eval()


def _pretrained_files(source: str | os.PathLike[str]) -> tuple[Path, Path]:
    names = ("config.json", "model.safetensors")
    root = Path(source)
    if root.is_dir():
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{root} lacks {' and '.join(missing)}; save_pretrained writes both"
            )
        return root / names[0], root / names[1]
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or str(source).startswith((".", "~")):
        raise FileNotFoundError(
            f"no folder {source}; wanted one that save_pretrained wrote, or owner/name on the hub"
        )
    from huggingface_hub import hf_hub_download

    config, weights = (Path(hf_hub_download(str(source), name)) for name in names)
    return config, weights


def build_sam(
    encoder: str,
    *,
    encoder_kwargs: Mapping[str, Any] | None = None,
    dim: int = 256,
    mlp_dim: int = 2048,
    high_res: bool = True,
    single_mask: bool = False,
    score_masks: bool = False,
    dense_boxes: bool = False,
    image_size: int = 1024,
    pad_to_square: bool = False,
) -> RwkvSam:
    """Make a promptable model around any backbone that timm can make.

    Args:
        encoder: name for `timm.create_model`, with a map of stride 16.
        encoder_kwargs: further arguments for it.
        dim: channels of the image embedding.
        mlp_dim: hidden width of the decoder's feed-forward.
        high_res: sharpen masks with the encoder's maps of strides 4 and 8.
        single_mask: only the token of the single mask, as the published model.
        score_masks: the expected IoU takes the logits into account, see `MaskDecoder`.
        dense_boxes: boxes are mask prompts as well, see `PromptEncoder`.
        image_size: longest side in pixels to which a predictor resizes.
        pad_to_square: pad to squares, as Segment Anything.

    Raises:
        ValueError: the backbone lacks a map that is needed.
    """
    config = {k: v for k, v in locals().items() if k != "encoder_kwargs"}
    config["encoder_kwargs"] = dict(encoder_kwargs or {})
    options = {**config["encoder_kwargs"], "features_only": True}
    with torch.device("meta"):
        strides = [
            info["reduction"] for info in timm.create_model(encoder, **options).feature_info.info
        ]
    wanted = ([4, 8] if high_res else []) + [STRIDE]
    missing = [s for s in wanted if s not in strides]
    if missing:
        raise ValueError(
            f"{encoder} has maps of strides {strides}, wanted {missing} too; "
            + ("high_res=False does without 4 and 8" if STRIDE in strides else "take another one")
        )
    wanted += [2 * STRIDE] if 2 * STRIDE in strides else []
    last = {stride: index for index, stride in enumerate(strides)}
    backbone = timm.create_model(encoder, out_indices=[last[s] for s in wanted], **options)
    channels = backbone.feature_info.channels()
    skip = 2 if high_res else 0
    stats = backbone.pretrained_cfg
    model = RwkvSam(
        backbone,
        PromptEncoder(dim, dense_boxes=dense_boxes),
        MaskDecoder(
            dim,
            high_res_channels=(channels[0], channels[1]) if high_res else None,
            single_mask=single_mask,
            mlp_dim=mlp_dim,
            score_masks=score_masks,
        ),
        Neck(channels[skip:], dim),
        embedding_index=range(skip, len(wanted)),
        high_res_index=(0, 1) if high_res else None,
        image_size=image_size,
        pad_to_square=pad_to_square,
        pixel_mean=[255 * m for m in stats.get("mean", IMAGENET_DEFAULT_MEAN)],
        pixel_std=[255 * s for s in stats.get("std", IMAGENET_DEFAULT_STD)],
    )
    model.config = config
    return model


# Name -> arguments of `build_sam`.
SAM_MODELS: dict[str, dict[str, Any]] = {
    "rwkv_sam_nano": {
        "encoder": "rwkv_sam_nano",
        "dim": 64,
        "mlp_dim": 256,
        "score_masks": True,
        "dense_boxes": True,
        "image_size": 256,
    },
    "rwkv_sam_tiny": {"encoder": "rwkv_sam_tiny"},
    "rwkv_sam_small": {"encoder": "rwkv_sam_small"},
    "rwkv_sam_base": {"encoder": "rwkv_sam_base"},
    "rwkv_sam_large": {"encoder": "rwkv_sam_large"},
}


def list_sams() -> list[str]:
    """Names that `create_sam` knows."""
    return list(SAM_MODELS)


def create_sam(
    name: str,
    checkpoint: str | os.PathLike[str] | None = None,
    parts: Sequence[str] | None = None,
    **overrides: Any,
) -> RwkvSam:
    """Make a promptable segmentation model by name, in eval mode.

    Args:
        name: one of `list_sams()`.
        checkpoint: file with its weights, ours or ovsam's; None starts it at random.
        parts: which of encoder, neck, prompt_encoder and mask_decoder to take from that file, such
            as the first two of a distilled student; None for all.
        **overrides: arguments of `build_sam` that differ from the name's.

    Raises:
        ValueError: no model of that name.
        CheckpointError: weights that do not fit the model.
    """
    if name not in SAM_MODELS:
        raise ValueError(f"no promptable model {name!r}; there are {', '.join(SAM_MODELS)}")
    model = build_sam(**{**SAM_MODELS[name], **overrides}).eval()
    if checkpoint is not None:
        from .checkpoint import load_weights

        load_weights(model, read_checkpoint(Path(checkpoint)), parts)
    return model


def build_sam_compatible(encoder: nn.Module, image_size: int = 1024) -> RwkvSam:
    """Segment Anything's own prompt encoder and mask decoder behind any encoder.

    Args:
        encoder: normalised square images (B, 3, S, S) to embeddings (B, 256, S/16, S/16).
        image_size: side S in pixels.
    """
    model = RwkvSam(
        encoder, PromptEncoder(), MaskDecoder(), image_size=image_size, pad_to_square=True
    )
    return model.eval()
