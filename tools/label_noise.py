"""Train networks at several levels of label noise; make a table and a plot of the errors.

    python tools/label_noise.py configs/ran/label_noise/ran-nano-noise30_1xb64-20e_cifar10-32.py \
        configs/ran/label_noise/resnet-nano-noise30_1xb64-20e_cifar10-32.py \
        --levels 0.1 0.3 0.5 0.7 --seeds 0 1 2 --cfg-options data_root=/path/to/cifar10_small

Every run is one of tools/train.py in a folder of its own. Runs that are finished are not repeated
and interrupted ones go on, so the same command continues a grid. Leaves results.json, table.md and
errors.png in the work dir: the error on the clean test labels at the end of training, mean and
standard deviation over the seeds.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def run_name(config: Path) -> str:
    """What a config is called in the table: its name up to the level of the noise."""
    return config.stem.partition("-noise")[0]


def train(config: Path, level: float, seed: int, folder: Path, options: list[str]) -> Any:
    """Train unless it is done; return the row of the results."""
    summary = folder / "summary.json"
    if not (summary.is_file() and json.loads(summary.read_text())["finished"]):
        dataset = "train_dataloader.dataset"
        noise = [f"{dataset}.level={level}", f"{dataset}.seed={seed}"]
        command = [sys.executable, ROOT / "tools" / "train.py", config, "--work-dir", folder]
        command += ["--seed", seed, "--resume", "--cfg-options", *options, *noise]
        print(f"training {folder}", flush=True)
        done = subprocess.run(list(map(str, command)), check=False)
        if done.returncode:
            raise SystemExit(f"error: {folder} ended with status {done.returncode}")
    found = json.loads(summary.read_text())
    return {
        "model": run_name(config),
        "level": level,
        "seed": seed,
        "error": 100 - found["last"]["accuracy/top1"],
        "epochs": found["epochs"],
        "iterations": found["iterations"],
        "parameters": found["parameters"],
        "wall_time_s": found["wall_time_s"],
    }


def collect(rows: list[dict[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """Errors by model and level."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        found.setdefault(row["model"], {}).setdefault(row["level"], []).append(row["error"])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Errors in % as a Markdown table, a row for each model."""
    levels = sorted({row["level"] for row in rows})
    lines = ["| model | " + " | ".join(f"{100 * level:g} %" for level in levels) + " |"]
    lines.append("|---" * (len(levels) + 1) + "|")
    for model, by_level in collect(rows).items():
        cells = []
        for level in levels:
            errors = by_level.get(level, [])
            spread = f" ± {stdev(errors):.2f}" if len(errors) > 1 else ""
            cells.append(f"{mean(errors):.2f}{spread}" if errors else "-")
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Errors over the level of the noise, a line for each model, a point for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for model, by_level in collect(rows).items():
        levels = sorted(by_level)
        (line,) = axes.plot([100 * x for x in levels], [mean(by_level[x]) for x in levels])
        line.set_label(model)
        points = [(100 * x, error) for x in levels for error in by_level[x]]
        axes.plot(*zip(*points, strict=True), "o", color=line.get_color(), markersize=3)
    axes.set(xlabel="wrong training labels, %", ylabel="error on clean test labels, %")
    axes.legend()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", type=Path, help="configs with NoisyLabels")
    parser.add_argument("--levels", nargs="+", type=float, default=[0.1, 0.3, 0.5, 0.7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/label_noise"))
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    names = [run_name(config) for config in args.configs]
    if len(set(names)) < len(names):
        parser.error(f"wanted one config for each model, got {', '.join(names)}; see --levels")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for level in args.levels:
            for config, name in zip(args.configs, names, strict=True):
                folder = args.work_dir / name / f"level{level:g}-seed{seed}"
                rows.append(train(config, level, seed, folder, args.cfg_options))
                text = json.dumps(rows, indent=2) + "\n"
                (args.work_dir / "results.json").write_text(text)
    (args.work_dir / "table.md").write_text(table(rows))
    plot(rows, args.work_dir / "errors.png")
    print(table(rows), end="")


if __name__ == "__main__":
    main()
