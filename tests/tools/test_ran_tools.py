"""The label-noise grid and the mask pictures, run as a user runs them."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/ran/label_noise/ran-nano-noise30_1xb64-20e_cifar10-32.py"


def tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"tools/{name}.py", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """Work dir of a grid of one model at two levels, and the arguments that made it."""
    root = tmp_path_factory.mktemp("grid")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(10):
            folder = root / "data" / split / f"class{label}"
            folder.mkdir(parents=True)
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / "a.png")
    args = [
        CONFIG, "--levels", 0, 0.5, "--work-dir", root / "work", "--cfg-options",
        f"data_root={root / 'data'}", "train_cfg.max_epochs=1", "train_cfg.val_interval=1",
        "train_dataloader.batch_size=5", "val_dataloader.batch_size=5",
        "model.m=[1,0,0]", "model.units_after=[0,0,0]",
    ]  # fmt: skip
    done = tool("label_noise", *args)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| ran-nano |" in done.stdout
    return root, args


def test_grid_leaves_table_plot_and_rows(grid: tuple[Path, list[object]]) -> None:
    work = grid[0] / "work"
    rows = json.loads((work / "results.json").read_text())
    assert [(r["model"], r["level"], r["seed"]) for r in rows] == [
        ("ran-nano", 0.0, 0),
        ("ran-nano", 0.5, 0),
    ]
    for row in rows:
        assert 0 <= row["error"] <= 100
        summary = work / "ran-nano" / f"level{row['level']:g}-seed0" / "summary.json"
        last = json.loads(summary.read_text())["last"]["accuracy/top1"]
        assert row["error"] == pytest.approx(100 - last)
    table = (work / "table.md").read_text()
    assert table.splitlines()[0] == "| model | 0 % | 50 % |"
    assert f"{rows[1]['error']:.2f}" in table
    assert np.asarray(Image.open(work / "errors.png").convert("RGB")).std() > 5
    config = next((work / "ran-nano" / "level0.5-seed0").glob("*.py")).read_text()
    assert "level=0.5" in config


def test_finished_runs_are_not_repeated(grid: tuple[Path, list[object]]) -> None:
    summaries = sorted((grid[0] / "work").rglob("summary.json"))
    before = [p.stat().st_mtime_ns for p in summaries]
    done = tool("label_noise", *grid[1])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training" not in done.stdout
    assert [p.stat().st_mtime_ns for p in summaries] == before


def test_two_configs_of_one_model_are_refused() -> None:
    done = tool("label_noise", CONFIG, CONFIG)
    assert done.returncode == 2
    assert "one config for each model" in done.stderr


def test_masks_are_drawn(grid: tuple[Path, list[object]], tmp_path: Path) -> None:
    folder = grid[0] / "work" / "ran-nano" / "level0.5-seed0"
    config, checkpoint = next(folder.glob("*.py")), folder / "epoch_1.pth"
    images = grid[0] / "data" / "val" / "class3"
    done = tool(
        "visualize_attention", config, checkpoint, images, "--out-dir", tmp_path,
        "--channels", 0, 7, "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    sheet = np.asarray(Image.open(tmp_path / "a_attention.png").convert("RGB"))
    # a row for the input and one for the module; before, mean, two channels, after
    assert sheet.shape[0] > 2 * 160
    assert sheet.shape[1] > 5 * 160
    assert sheet[:160, :160].std() > 5
    rows = sheet[160 + 30 : 160 + 30 + 100]
    assert all(rows[:, 5 + i * 162 : 150 + i * 162].std() > 5 for i in range(5))


def test_wrong_channels_and_models_are_named() -> None:
    spec = importlib.util.spec_from_file_location("drawing", ROOT / "tools/visualize_attention.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    x, picture = torch.randn(1, 3, 32, 32), np.zeros((32, 32, 3), np.uint8)
    network = timm.create_model("ran_nano").eval()
    assert drawing.find_network(torch.nn.Sequential(network)) is network
    with pytest.raises(ValueError, match=r"stages\.0\.1 has channels 0\.\.15, not \[99\]"):
        drawing.draw(network, x, picture, [3, 99], 1)
    plain = timm.create_model("ran_nano", mask="none").eval()
    with pytest.raises(ValueError, match="no masks to draw"):
        drawing.draw(plain, x, picture, [], 1)
    with pytest.raises(ValueError, match="no Residual Attention Network"):
        drawing.find_network(torch.nn.Identity())
