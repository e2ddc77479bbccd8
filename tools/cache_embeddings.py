"""Compute a teacher's embeddings of a folder of images once, for the distillation of a student.

    python tools/cache_embeddings.py samvit_huge_patch16 data/sa1b/train \
        --weights sam_vit_h_4b8939.pth --out-dir data/sa1b_embeddings/train

The size is told before anything starts. Embeddings are float16, in shards, see
`vision.sam.embedding_cache`. Run it again to go on after a stop: whole shards are kept, damaged
ones are written again. An image that cannot be read is reported at the end and left out; the rest
is done, and the exit status is 1.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import torch
from tqdm import tqdm

from vision.data import ImageReadError, list_images, read_image
from vision.models.checkpoint import CheckpointError
from vision.sam.embedding_cache import CacheError, CacheWriter, cache_bytes
from vision.sam.teachers import Teacher, create_teacher, pad_to_square


def main() -> int:
    """Compute all embeddings; the exit status is 1 if an image could not be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="samvit_huge_patch16, or another model of timm")
    parser.add_argument("input", type=Path, help="folder of images")
    parser.add_argument("--out-dir", type=Path, required=True)
    parser.add_argument("--image-size", type=int, default=1024, help="longest side in pixels")
    parser.add_argument("--weights", type=Path, help="weights file; default: random weights")
    parser.add_argument("--level", type=int, help="feature map; default: neck, or stride 16")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--shard-size", type=int, default=64, help="images a file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        names = [path.relative_to(args.input).as_posix() for path in list_images(args.input)]
        teacher = create_teacher(
            args.teacher, args.image_size, args.weights, level=args.level, seed=args.seed
        ).to(args.device)
        writer = CacheWriter(
            args.out_dir, teacher.identity, teacher.shape, names, args.shard_size, compared
        )
        failed = still_unreadable(writer, args.input)
        total = cache_bytes(len(names), teacher.shape)
        print(
            f"{len(names)} embeddings {teacher.shape}, float16: {gigabytes(total)}; to write: "
            f"{gigabytes(writer.bytes_left)}; free: {gigabytes(writer.check_space())}"
        )
        for damage in writer.damaged:
            print(f"written again: {damage}", file=sys.stderr)
        failed += write_shards(writer, teacher, args.input)
    except (CacheError, CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(names) - len(failed)} of {len(names)} images done, see {args.out_dir}")
    for message in failed:
        print(f"failed: {message}", file=sys.stderr)
    return 1 if failed else 0


def gigabytes(count: int) -> str:
    """So many bytes, in units of 10^9."""
    return f"{count / 1e9:,.3f} GB"


def compared(shards: Iterable[int]) -> Iterable[int]:
    """Show how far the comparison of checksums is."""
    return tqdm(shards, unit="shard", desc="comparing checksums")


def still_unreadable(writer: CacheWriter, root: Path) -> list[str]:
    """Look again at the images that were left out; shards whose images are whole now come anew."""
    failed = []
    for shard, names in writer.left_out.items():
        errors = []
        for name in names:
            try:
                read_image(root / name)
            except ImageReadError as error:
                errors.append(f"{name}: {error}")
        if len(errors) < len(names):
            writer.forget(shard)
        else:
            failed += errors
    return failed


def write_shards(writer: CacheWriter, teacher: Teacher, root: Path) -> list[str]:
    """Write what is missing; returns what could not be read."""
    device = next(teacher.parameters()).device
    todo = writer.todo
    count = len(writer.index["images"])
    done = count - sum(len(writer.images_of(shard)) for shard in todo)
    failed = []
    with tqdm(unit="image", initial=done, total=count) as bar:
        for shard in todo:
            embeddings: list[torch.Tensor | None] = []
            sizes: list[tuple[int, int] | None] = []
            for name in writer.images_of(shard):
                try:
                    image = read_image(root / name)
                except ImageReadError as error:
                    failed.append(f"{name}: {error}")
                    embeddings.append(None)
                    sizes.append(None)
                else:
                    x, size = pad_to_square(image, teacher.identity["image_size"])
                    batch = x[None].to(device), torch.tensor([size], device=device)
                    embeddings.append(teacher(*batch)[0].cpu())
                    sizes.append(size)
                bar.update()
            writer.write(shard, embeddings, sizes)
    return failed


if __name__ == "__main__":
    sys.exit(main())
