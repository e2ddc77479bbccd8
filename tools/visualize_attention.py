"""Draw the soft masks of a trained Residual Attention Network, a picture for each image.

    python tools/visualize_attention.py CONFIG CHECKPOINT photo.jpg folder/ --out-dir masks

The first tile is the input as the network sees it. Then comes a row for every attention module: its
trunk features before the mask (mean over channels), the mask (mean, and the channels asked for or
those that vary most over the image), and the features after the mask. Each tile goes from its least
value (dark) to its largest (bright), which stand below it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.data import ImageReadError, contact_sheet, list_images, read_image
from vision.mm.inference import Predictor
from vision.models import ResidualAttentionNet
from vision.models.checkpoint import CheckpointError

TILE = 160  # height of a tile in pixels


def find_network(model: nn.Module) -> ResidualAttentionNet:
    """The part of a classifier or segmentor that has masks."""
    for module in model.modules():
        if isinstance(module, ResidualAttentionNet):
            return module
    raise ValueError("the config's model holds no Residual Attention Network")


def network_input(predictor: Predictor, network: ResidualAttentionNet, image: np.ndarray) -> Tensor:
    """What the predictor gives to the network for an image, (1, 3, H, W)."""
    seen: list[Tensor] = []
    hook = network.stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    predictor(image)
    hook.remove()
    return seen[0]


def enlarge(pixels: np.ndarray) -> np.ndarray:
    """RGB uint8 (h, w, 3) to the height of a tile."""
    height, width = pixels.shape[:2]
    size = (max(1, round(width * TILE / height)), TILE)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def heat(values: Tensor, name: str) -> tuple[np.ndarray, str]:
    """Tile and caption of a map (h, w)."""
    values = values.float().cpu()
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / max(high - low, 1e-12)
    colours = colormaps["viridis"](scaled.numpy())[..., :3]
    return enlarge((255 * colours).round().astype(np.uint8)), f"{name} {low:.2g}..{high:.2g}"


def draw(
    network: ResidualAttentionNet, x: Tensor, picture: np.ndarray, channels: list[int], top: int
) -> Image.Image:
    """The sheet of one image.

    Raises:
        ValueError: a channel that a mask does not have, or a network without masks.
    """
    with torch.inference_mode():
        maps = network.attention_maps(x)
    if not maps:
        raise ValueError("the network has no attention modules, so there are no masks to draw")
    columns = 3 + (len(channels) or top)
    blank = np.full((TILE, 1, 3), 255, np.uint8)
    tiles = [(enlarge(picture), "input")] + [(blank, "")] * (columns - 1)
    for name, found in maps.items():
        mask = found.mask[0]
        wrong = [c for c in channels if not 0 <= c < len(mask)]
        if wrong:
            raise ValueError(f"{name} has channels 0..{len(mask) - 1}, not {wrong}")
        varied = mask.var((1, 2), correction=0).topk(min(top, len(mask))).indices.tolist()
        shown = channels or varied
        tiles.append(heat(found.trunk[0].mean(0), f"{name} before"))
        tiles.append(heat(mask.mean(0), "mask mean"))
        tiles += [heat(mask[c], f"mask {c}") for c in shown]
        tiles += [(blank, "")] * (columns - 3 - len(shown))
        tiles.append(heat(found.attended[0].mean(0), "after"))
    return contact_sheet([t for t, _ in tiles], [c for _, c in tiles], columns)


def denormalise(x: Tensor, preprocessor: Any) -> np.ndarray:
    """Network input (1, 3, H, W) to RGB uint8 (H, W, 3)."""
    pixels = (x[0] * preprocessor.std + preprocessor.mean).clamp(0, 255)
    return pixels.byte().permute(1, 2, 0).cpu().numpy()


def main() -> int:
    """Draw all images; the exit status is 1 if one could not be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file that the model was trained with")
    parser.add_argument("checkpoint", help="checkpoint of tools/train.py")
    parser.add_argument("inputs", nargs="+", type=Path, help="images or folders")
    parser.add_argument("--out-dir", type=Path, default=Path("attention"))
    parser.add_argument("--channels", type=int, nargs="+", default=[], help="mask channels to draw")
    parser.add_argument("--top", type=int, default=3, help="else this many, the most varied ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    failed = 0
    try:
        predictor = Predictor(args.config, args.checkpoint, args.device)
        network = find_network(predictor.model)
        files = [(p, f) for p in args.inputs for f in (list_images(p) if p.is_dir() else [p])]
        for root, path in files:
            try:
                image = read_image(path)
            except ImageReadError as error:
                print(f"not read: {error}", file=sys.stderr)
                failed += 1
                continue
            x = network_input(predictor, network, image)
            picture = denormalise(x, predictor.model.data_preprocessor)
            sheet = draw(network, x, picture, args.channels, args.top)
            # Names keep their folder, so that two images of one name do not meet.
            place = args.out_dir / (path.parent.relative_to(root) if root.is_dir() else "")
            place.mkdir(parents=True, exist_ok=True)
            sheet.save(place / f"{path.stem}_attention.png")
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(files) - failed} of {len(files)} images drawn, see {args.out_dir}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
