"""What RWKV-SAM costs: its encoder beside others, a further prompt, a whole grid of prompts.

    python benchmarks/sam.py                             # encoders at 1024 px, prompts, a grid
    python benchmarks/sam.py --tasks encoder --sizes 2048 --encoders rwkv transformer --once

Evaluation mode, random weights; on a CPU by the thread's own time at one thread. The encoders are
`rwkv_sam_small` with either kind of block and timm's encoder of Segment Anything. The plain decoder
is the published one: it projects the image's maps for every prompt.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also from a bare checkout

import timm
import torch

import vision  # noqa: F401 -- registers the models
from benchmarks.measure import (
    Call,
    Case,
    CudaTimer,
    HostTimer,
    Report,
    Row,
    environment,
    extra_bytes,
    keep_freed_memory,
    markdown_table,
    side_by_side,
    threads,
)
from vision.sam import RwkvSam, create_sam, list_sams
from vision.sam.automatic import AutomaticMaskGenerator

RESULTS = Path(__file__).resolve().parent / "results"
ENCODERS = {
    "rwkv": ("rwkv_sam_small", {}),
    "transformer": ("rwkv_sam_small", {"attn_type": "transformer"}),
    "samvit_base": ("samvit_base_patch16", {}),
}


def encoder(kind: str, size: int, device: torch.device) -> Call:
    """A forward pass of an encoder without classifier on one square image."""
    name, options = ENCODERS[kind]
    model = timm.create_model(name, num_classes=0, img_size=size, **options).eval().to(device)
    x = torch.randn(1, 3, size, size, device=device)
    return torch.inference_mode()(lambda: model.forward_features(x))


def prompts(kind: str, count: int, model: RwkvSam, device: torch.device) -> Call:
    """Decode one point each on an image that is encoded already."""
    side = model.image_size
    x = torch.rand(1, 3, side, side, device=device) * 255
    points = torch.rand(count, 1, 2, device=device) * side
    labels = torch.ones(count, 1, device=device)
    decoder = model.mask_decoder
    with torch.inference_mode():
        maps = model.encoder(model.preprocess(x))
        found = model.embed(model.preprocess(x), (side, side))
    place = model.prompt_encoder.position.grid((side // 16, side // 16))

    def plain() -> torch.Tensor:
        # The maps of every prompt, projected and mixed whole.
        sparse, dense = model.prompt_encoder((points, labels), None, None, (side, side))
        s4, s8 = (m.expand(count, -1, -1, -1) for m in maps[:2])
        share = decoder.high_res.image_share(s4.contiguous(), s8.contiguous())
        many = found.embedding.expand(count, -1, -1, -1)
        return decoder(many, place, sparse, dense, share, multimask_output=False)[0]

    def cached() -> torch.Tensor:
        return model.predict_masks(found, (points, labels), multimask_output=False)[0]

    return torch.inference_mode()({"plain": plain, "cached": cached}[kind])


def grid(side: int, model: RwkvSam, device: torch.device) -> Call:
    """All masks of one image of noise, from side x side prompts; every mask is kept."""
    generator = AutomaticMaskGenerator(
        model, points_per_side=side, pred_iou_thresh=0.0, stability_score_thresh=0.0,
        output_mode="coco_rle",
    )  # fmt: skip
    image = torch.randint(0, 256, (768, 1024, 3), dtype=torch.uint8).numpy()
    return lambda: generator.generate(image)


def once(cases: list[Case], device: torch.device) -> list[Row]:
    """Time and memory of a single call of each, for calls that take minutes."""
    rows = []
    for case in cases:
        call = case.make()
        clock = time.thread_time if device.type == "cpu" else time.perf_counter
        begin = clock()
        memory = extra_bytes(call, device)
        spent = {"median_ms": 1e3 * (clock() - begin), "samples": 1, "extra_bytes": memory}
        rows.append({**case.labels, **spent, "error": None})
    return rows


def table(rows: list[Row]) -> str:
    """The rows of one task, times over that of the first one."""
    first = next((row["median_ms"] for row in rows if row["error"] is None), None)
    lines = [
        [
            str(row["case"]),
            str(row["count"]),
            row["error"] or f"{row['median_ms']:.0f}",
            "" if row["error"] else f"{row['median_ms'] / first:.2f}",
            "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    return markdown_table([rows[0]["task"], "size or prompts", "ms", "ratio", "extra MiB"], lines)


def main() -> None:
    """Measure, write the rows, print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = ["encoder", "prompts", "grid"]
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1024])
    parser.add_argument(
        "--model",
        choices=list_sams(),
        default="rwkv_sam_small",
        help="of prompts and grids",
    )
    parser.add_argument("--sides", nargs="+", type=int, default=[8, 16, 32], help="of the grids")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each row")
    parser.add_argument("--once", action="store_true", help="one call a row, as the grids always")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    out = args.out or RESULTS / f"sam-{device.type}.json"
    timer = CudaTimer() if device.type == "cuda" else HostTimer("thread")
    report = Report(out, {**environment(device), "device": device.type})
    model = create_sam(args.model).to(device)

    def label(task: str, case: str, count: int) -> Row:
        return {"task": task, "case": case, "count": count}

    cases = {
        "encoder": [
            [
                Case(label("encoder", kind, size), lambda k=kind, s=size: encoder(k, s, device))
                for kind in args.encoders
            ]
            for size in args.sizes
        ],
        "prompts": [
            [
                Case(
                    label("prompts", kind, count),
                    lambda k=kind, n=count: prompts(k, n, model, device),
                )
                for kind in ("plain", "cached")
            ]
            for count in (1, 4)
        ],
        "grid": [
            [
                Case(label("grid", args.model, side**2), lambda s=side: grid(s, model, device))
                for side in args.sides
            ]
        ],
    }
    with threads(1):
        for task in args.tasks:
            for group in cases[task]:
                if args.once or task == "grid":
                    rows = once(group, device)
                else:
                    rows = side_by_side(group, timer, device, args.seconds)
                report.add(rows)
                print(table(rows), "\n", flush=True)
    print(f"wrote {out}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
