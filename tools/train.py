"""Train a model from a config file.

    python tools/train.py configs/vrwkv/vrwkv-nano_1xb64-20e_digits-32.py
    torchrun --nproc_per_node=8 tools/train.py CONFIG --launcher pytorch --amp

Leaves checkpoints, a log, curves.png and summary.json in the work dir. An interrupted run goes on
with `--resume`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

from mmengine.runner import Runner

import vision.mm  # noqa: F401 -- registers the zoo with mmengine
from vision.mm.launch import (
    add_common_arguments,
    check_data,
    errors_without_traceback,
    load_config,
)
from vision.mm.reading import read_run_checkpoint


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a path, from the newest whole one in the work dir",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (bf16 on a CPU)")
    parser.add_argument("--seed", type=int, help="seed of everything random")
    return parser.parse_args()


def main() -> None:
    """Build the runner and train."""
    args = parse_args()
    with errors_without_traceback():
        cfg = load_config(args)
        check_data(cfg, "train", "val")
        if args.resume not in (None, "auto"):
            read_run_checkpoint(args.resume, mmap=True)  # a look, before anything slow
    if args.seed is not None:
        cfg.randomness = {**cfg.get("randomness", {}), "seed": args.seed}
    if args.amp:
        cfg.optim_wrapper.type = "AutoAmpOptimWrapper"
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
    Runner.from_cfg(cfg).train()


if __name__ == "__main__":
    main()
