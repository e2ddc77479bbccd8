"""Print parameters and multiply-adds of models.

    python tools/get_flops.py vrwkv_tiny_patch16_224 vit_tiny_patch16_224 --shape 512
    python tools/get_flops.py configs/vrwkv/CONFIG.py --shape 512 1024

A name is a timm model, a path a config file (the whole model, head and all, is counted).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

from torch import nn

from vision.models.complexity import count_complexity
from vision.models.factory import make_model


def build(name: str, shape: tuple[int, int] | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """Make the model and say which input it is counted for."""
    if name.endswith(".py"):
        from mmengine.config import Config
        from mmengine.registry import MODELS, init_default_scope

        import vision.mm  # noqa: F401 -- registers the zoo with mmengine
        from vision.mm.compat import cpu_safe_config

        cfg = Config.fromfile(name)
        cpu_safe_config(cfg)
        init_default_scope(cfg.get("default_scope", "mmengine"))
        return MODELS.build(cfg.model), (3, *(shape or (224, 224)))
    model = make_model(name)
    default = model.pretrained_cfg["input_size"]
    if shape and hasattr(model, "set_input_size") and shape != default[1:]:
        model.set_input_size(img_size=shape)
    return model, (default[0], *(shape or default[1:]))


def main() -> None:
    """Count and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="timm model names or config files")
    parser.add_argument("--shape", type=int, nargs="+", help="height and width, or one for both")
    args = parser.parse_args()
    if args.shape and len(args.shape) > 2:
        parser.error(f"--shape takes one or two numbers, got {len(args.shape)}")
    shape = (args.shape[0], args.shape[-1]) if args.shape else None
    print(f"{'model':44} {'input':>14} {'params':>13} {'GMACs':>9} {'matmul':>9} {'wkv':>7} norm")
    for name in args.models:
        try:
            model, size = build(name, shape)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f"error: {error}")
        found = count_complexity(model, size)
        print(
            f"{Path(name).stem:44} {'x'.join(map(str, size)):>14} {found.params:13,}"
            f" {found.macs / 1e9:9.3f} {found.matmul / 1e9:9.3f} {found.operator / 1e9:7.3f}"
            f" {found.norm / 1e9:.3f}"
        )


if __name__ == "__main__":
    main()
