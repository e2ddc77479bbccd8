"""Evaluate a trained model.

python tools/test.py CONFIG CHECKPOINT [--out results.json] [--show-dir pictures] [--tta]

--tile 1024 --overlap 256 segments large images in tiles that overlap.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.mm.inference import load_strict
from vision.mm.launch import (
    add_common_arguments,
    check_data,
    errors_without_traceback,
    load_config,
)
from vision.mm.reading import read_run_checkpoint
from vision.mm.tiling import add_tile_arguments, tiles_of, use_tiles


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument("checkpoint", help="checkpoint of tools/train.py")
    parser.add_argument("--out", type=Path, help="write the metrics to this JSON file")
    parser.add_argument("--show-dir", type=Path, help="write prediction pictures to this folder")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    add_tile_arguments(parser)
    args = parser.parse_args()
    args.tiles = tiles_of(parser, args)
    if args.tiles is not None and args.tta:
        parser.error("--tta averages logits, which --tile does not keep; use one of the two")
    return args


def use_tta(cfg: Config) -> None:
    """Put the config's test-time augmentation in place of the plain test."""
    if "tta_model" not in cfg:
        raise SystemExit("error: --tta needs a tta_model in the config; see configs/_base_/models")
    cfg.model = {**cfg.tta_model, "module": cfg.model}
    if "tta_pipeline" in cfg:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


def main() -> None:
    """Build the runner and test."""
    args = parse_args()
    with errors_without_traceback():
        cfg = load_config(args)
        check_data(cfg, "test")
        read_run_checkpoint(args.checkpoint, mmap=True)  # a look, before anything slow
        if args.tiles is not None:
            use_tiles(cfg.model, *args.tiles)
    if args.tta:
        use_tta(cfg)
    if args.show_dir:
        hook = {"type": "PredictionSheetHook", "out_dir": str(args.show_dir), "every_image": True}
        others = [h for h in cfg.get("custom_hooks", []) if h["type"] != "PredictionSheetHook"]
        cfg.custom_hooks = [*others, hook]
    runner = Runner.from_cfg(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    with errors_without_traceback():
        # Not by cfg.load_from, which passes over keys that do not fit.
        load_strict(model.module if args.tta else model, args.checkpoint)
    metrics = runner.test()
    if args.out and is_main_process():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(metrics, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main()
