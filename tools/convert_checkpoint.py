"""Convert a published or trained checkpoint to plain weights under the zoo's names.

    python tools/convert_checkpoint.py vrwkv_t_in1k_224.pth vrwkv_tiny_patch16_224 tiny.safetensors
    python tools/convert_checkpoint.py mae.pth vrwkv_base_patch16_224 base.pth \
        --model-args key_norm=True shift=single_shift num_classes=0
    python tools/convert_checkpoint.py weights.caffemodel ran56 ran56.safetensors

Every key must find its place and every parameter its value, or nothing is written. The result is
loaded by `timm.create_model(NAME, checkpoint_path=FILE)`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import vision  # noqa: F401 -- registers the models
from vision.arguments import key_value
from vision.models.checkpoint import (
    CheckpointError,
    check_fit,
    read_checkpoint,
    write_weights,
)
from vision.models.factory import make_model


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="file to convert")
    parser.add_argument("model", help="timm name of the model that will load it")
    parser.add_argument("output", type=Path, help="new file, .safetensors or .pth")
    parser.add_argument("--model-args", nargs="+", type=key_value, default=[], metavar="KEY=VALUE")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    args = parser.parse_args()
    if args.output.exists() and not args.force:
        parser.error(f"{args.output} exists; name another file or pass --force")
    try:
        model = make_model(args.model, **dict(args.model_args))
        family = sys.modules[type(model).__module__]
        checkpoint = getattr(family, "read_weights", read_checkpoint)(args.checkpoint)
        weights = family.checkpoint_filter_fn(checkpoint, model)
        check_fit(weights, model.state_dict(), str(args.checkpoint))
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    write_weights(weights, args.output)
    print(f"wrote {len(weights)} tensors to {args.output}")


if __name__ == "__main__":
    main()
