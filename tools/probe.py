"""Judge a backbone's features without training it: k nearest neighbours, or a linear classifier.

    python tools/probe.py knn vrwkv_nano_patch8_224 data/cifar10_small --checkpoint epoch_30.pth \
        --model-args embed_dim=96 depth=6 img_size=32 patch_size=4 --out knn.json
    python tools/probe.py linear resnet10t data/cifar10_small --input-size 32

Any model of timm will do: its features are those before the classifier. Images lie in class
folders or tar files (see vision.data.create_classification_dataset). The linear classifier is a
logistic regression on standardised features, whose penalty a tenth of the training images chooses.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import vision  # noqa: F401 -- registers the models
from vision.arguments import key_value
from vision.data import (
    ClassificationDataset,
    ClassificationTransform,
    create_classification_dataset,
)
from vision.files import write_whole
from vision.metrics.probe import LinearProbe, accuracy, check_features, choose_penalty, knn_scores
from vision.models.checkpoint import CheckpointError
from vision.models.factory import make_model

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["knn", "linear"])
    parser.add_argument("model", help="timm model name")
    parser.add_argument("data", help="folder of the splits")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="val")
    parser.add_argument("--checkpoint", help='weights file, or "published"; default: random')
    parser.add_argument("--model-args", nargs="+", type=key_value, default=[], metavar="KEY=VALUE")
    parser.add_argument("--input-size", type=int, help="side in pixels; default: the model's")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--k", type=int, default=20, help="neighbours")
    parser.add_argument("--temperature", type=float, default=0.07, help="0: equal votes")
    parser.add_argument("--penalties", type=float, nargs="+", default=PENALTIES, help="to try")
    parser.add_argument("--seed", type=int, default=0, help="of random weights, and of the tenth")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file")
    return parser.parse_args()


def build(args: argparse.Namespace) -> nn.Module:
    """Make the model without its classifier.

    Raises:
        ValueError: no such model, or arguments or weights that do not fit it.
        CheckpointError: weights of the zoo's that do not fit it.
        FileNotFoundError: no such file.
    """
    weights: dict[str, Any] = {"pretrained": args.checkpoint is not None}
    if args.checkpoint not in (None, "published"):
        weights["pretrained_cfg_overlay"] = {"file": args.checkpoint}
    torch.manual_seed(args.seed)
    options = {**weights, **dict(args.model_args), "num_classes": 0}
    return make_model(args.model, **options).to(args.device).eval()


def open_split(args: argparse.Namespace, split: str, cfg: dict[str, Any]) -> ClassificationDataset:
    """Open a split; its images are resized, cut at the centre and normalised for the model."""
    names = ("mean", "std", "interpolation", "crop_pct")
    size = args.input_size or dict(args.model_args).get("img_size") or cfg["input_size"][1:]
    transform = ClassificationTransform(False, size, **{name: cfg[name] for name in names})
    return create_classification_dataset(args.data, split, transform=transform)


@torch.no_grad()
def extract(model: nn.Module, dataset: Any, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Features (N, C), float32, and labels (N,), kept on the CPU.

    Raises:
        ValueError: a model that does not take the images.
        ImageReadError: a file that cannot be read.
    """
    loader = DataLoader(dataset, args.batch_size, num_workers=args.workers)
    features, labels = [], []
    for batch in tqdm(loader, unit="batch", desc=dataset.source):
        images = batch["image"].to(args.device)
        try:
            features.append(model(images).float().cpu())
        except (AssertionError, RuntimeError) as error:  # what timm's models raise
            raise ValueError(
                f"{args.model} does not take images {tuple(images.shape)}: {error}; try "
                "--input-size, or --model-args img_size=..."
            ) from error
        labels.append(batch["label"])
    return torch.cat(features), torch.cat(labels)


def probe(
    args: argparse.Namespace, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Probe features and labels of two splits; returns top-1 and top-5, and what they depend on."""
    if args.mode == "knn":
        votes = knn_scores(*train, test[0], args.k, args.temperature or None)
        options: dict[str, Any] = {"k": args.k, "temperature": args.temperature}
        return {**options, **accuracy(votes, test[1], (1, 5))}
    check_features("test", *test)
    penalty, held_out = choose_penalty(*train, args.penalties, args.seed)
    scores = LinearProbe(penalty).fit(*train).scores(test[0])
    return {"penalty": penalty, "held_out_top1": held_out, **accuracy(scores, test[1], (1, 5))}


def main() -> None:
    """Extract both splits, probe, print and write."""
    args = parse_args()
    start = time.perf_counter()
    try:
        model = build(args)
        splits = (args.train_split, args.test_split)
        train, test = (open_split(args, split, model.pretrained_cfg) for split in splits)
        if train.classes != test.classes:
            raise ValueError(
                f"{train.source} and {test.source} have other classes: "
                f"{', '.join(train.classes[:10])} and {', '.join(test.classes[:10])}"
            )
        # Before the features are made, which is slow.
        if args.mode == "knn" and not 1 <= args.k <= len(train):
            raise ValueError(f"--k wants 1 .. {len(train)} (the training images), got {args.k}")
        if min(args.temperature, *args.penalties) < 0:
            raise ValueError("--temperature and --penalties want 0 or more")
        features = [extract(model, one, args) for one in (train, test)]
        found = probe(args, *features)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        # A data loader's worker puts its traceback into the message.
        sys.exit(f"error: {str(error).rpartition('ImageReadError: ')[2]}")
    names = ("mode", "model", "checkpoint", "data", "seed")
    result = {
        **{name: getattr(args, name) for name in names},
        "model_args": dict(args.model_args),
        "images": {"train": len(train), "test": len(test)},
        "classes": len(train.classes),
        "channels": features[0][0].shape[1],
        **found,
        "seconds": round(time.perf_counter() - start, 1),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        write_whole(args.out, text + "\n")


if __name__ == "__main__":
    main()
