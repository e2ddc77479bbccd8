"""benchmarks/resolution_accuracy.py: what it counts, and a run to its end."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCENES = "configs/vrwkv/vrwkv-nano_segformer_1xb8-16e_digit-scenes-128.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(
        "resolution_accuracy", ROOT / "benchmarks/resolution_accuracy.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_by_hand(tool: ModuleType) -> None:
    """Two images, three classes, one of them background, a strip that is not judged."""
    judge = tool.Judge(3, background=0)
    true = torch.zeros(100, 100, dtype=torch.int64)
    true[10:20, 10:20] = 1  # an object of 10 x 10
    true[40:80, 40:80] = 1  # and one of 40 x 40
    true[:, 90:] = 255
    pred = true.clone()
    pred[true == 255] = 2  # costs nothing
    pred[10:20, 10:15] = 0  # half of the small one is missed
    judge.add(pred, true)
    true, pred = torch.full((100, 100), 2), torch.full((100, 100), 2)
    pred[:20] = 1
    judge.add(pred, true)
    row = judge.row()
    background = (9000 - 1700) / (9000 - 1700 + 50)
    one = (1700 - 50) / (1700 + 2000)
    two = 8000 / 10000
    assert row["mIoU"] == pytest.approx(100 * np.mean([background, one, two]))
    assert row["objects"] == {
        "below 16 px": {"found": pytest.approx(50), "objects": 1},
        "32 to 96 px": {"found": pytest.approx(100), "objects": 1},
        "above 96 px": {"found": pytest.approx(80), "objects": 1},
    }
    assert row["mBIoU"] < row["mIoU"]


def test_boundaries_are_judged_where_the_truth_is_known(tool: ModuleType) -> None:
    judge = tool.Judge(2)
    true = torch.zeros(100, 100, dtype=torch.int64)
    true[30:60, 30:60] = 1
    judge.add(true, true)
    assert judge.row()["mBIoU"] == pytest.approx(100)
    moved = true.roll(3, 0)  # by the width of the boundary, 2 % of the diagonal
    judge = tool.Judge(2)
    judge.add(moved, true)
    assert judge.row()["mBIoU"] < 75
    judge = tool.Judge(2)
    judge.add(moved, torch.where((true == moved), true, 255))
    assert judge.row()["mBIoU"] > 75


def test_scenes_grow_around_digits_of_the_same_size(tool: ModuleType) -> None:
    for side in (128, 512, 4096):
        cfg = tool.test_config(ROOT / SCENES, {}, side, 2)
        dataset = cfg.test_dataloader.dataset
        heights = [share * side for share in dataset.scale]
        assert heights == pytest.approx([20, 64])
        assert dataset.num_digits[1] == min(255, 8 * (side // 128) ** 2)
        assert (dataset.size, dataset.length) == (side, 2)


def test_files_are_resized_before_anything_else(tool: ModuleType) -> None:
    cfg = tool.test_config(
        ROOT / "configs/vrwkv/vrwkv-nano_fcn_1xb2-44e_camvid-180x240.py", {}, 360, 5
    )
    kinds = [step["type"] for step in cfg.test_dataloader.dataset.pipeline]
    assert kinds[:2] == ["LoadImage", "Resize"]
    assert kinds.count("Resize") == 1
    assert cfg.test_dataloader.dataset.pipeline[1]["scale"][1] == 360
    assert cfg.test_dataloader.dataset.indices == 5
    with pytest.raises(tool.ConfigError, match="segmentor"):
        tool.test_config(ROOT / "configs/vrwkv/vrwkv-nano_1xb64-80e_digits-32.py", {}, 64, None)


def test_rows_table_picture_and_a_second_run(tmp_path: Path) -> None:
    """A model of random weights, whole and in tiles; a row that failed is taken again."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    import vision.mm  # noqa: F401 -- registers the models

    cfg = Config.fromfile(ROOT / SCENES)
    init_default_scope("mmseg")
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, tmp_path / "w.pth")
    out = tmp_path / "rows.json"
    command = [
        sys.executable, "benchmarks/resolution_accuracy.py", "--sides", "64", "96", "--tile", "64",
        "--images", "2", "--model", "nano", SCENES, str(tmp_path / "w.pth"), "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(out.read_text())
    assert [(row["side"], row["tile"]) for row in rows] == [(64, None), (96, None), (96, 64)]
    assert all(row["error"] is None and row["images"] == 2 for row in rows)
    assert all(0 <= row["mBIoU"] <= row["mIoU"] + 50 for row in rows)
    assert done.stdout.count("| nano  |") == 3
    assert out.with_suffix(".png").stat().st_size > 10_000
    rows[1] |= {"error": "killed", "mIoU": None}
    rows[2]["seconds"] = -1.0
    out.write_text(json.dumps(rows))
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    again = {(row["side"], row["tile"]): row for row in json.loads(out.read_text())}
    assert len(again) == 3
    assert again[96, None]["error"] is None
    assert again[96, 64]["seconds"] == -1.0  # not measured again
    done = subprocess.run([*command, "--sides", "0"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "1 or more" in done.stderr
