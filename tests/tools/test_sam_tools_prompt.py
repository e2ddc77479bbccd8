"""tools/predict_prompt.py: masks and overlays of one image for points and boxes."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision.sam.model import create_sam
from vision.sam.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a picture of 90 x 60 pixels and the weights of a model."""
    folder = tmp_path_factory.mktemp("prompt")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    torch.manual_seed(0)
    torch.save(create_sam("rwkv_sam_nano").state_dict(), folder / "weights.pth")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the tool's main as a command line would; files go to tmp_path / "out"."""
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/predict_prompt.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*args: str, image: str = "photo.png", weights: str = "weights.pth") -> int:
        start = ["predict_prompt", "rwkv_sam_nano", str(made / weights), str(made / image)]
        monkeypatch.setattr(sys, "argv", [*start, "--out", str(tmp_path / "out"), *args])
        return tool.main()

    return call


def _mask(path: Path) -> np.ndarray:
    pixels = np.array(Image.open(path))
    assert set(np.unique(pixels)) <= {0, 255}
    return pixels == 255


def test_point(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["tools/predict_prompt.py", "rwkv_sam_nano", made / "weights.pth", made / "photo.png"]
    done = subprocess.run(
        [sys.executable, *map(str, command), "--point", "20,30", "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    predictor = Predictor(create_sam("rwkv_sam_nano", made / "weights.pth"))
    predictor.set_image(made / "photo.png")
    masks, iou, _ = predictor.predict([[20, 30]], [1])
    best = masks[iou.argmax()]
    np.testing.assert_array_equal(_mask(out / "photo_mask.png"), best)
    assert f"photo_mask.png: predicted IoU {iou.max():.3f}, {best.mean():.1%}" in done.stdout
    assert "photo_overlay.png" in done.stdout
    assert sorted(file.name for file in out.iterdir()) == ["photo_mask.png", "photo_overlay.png"]
    picture = np.array(Image.open(made / "photo.png"))
    drawn = np.array(Image.open(out / "photo_overlay.png"))
    assert drawn.shape == picture.shape
    assert drawn[30, 20].tolist() == [0, 255, 0]  # the point
    away = np.hypot(*np.ogrid[-30:30, -20:70]) > 4  # of the point
    assert (drawn == picture).all(axis=2)[away & ~best].all()
    assert not (drawn == picture).all(axis=2)[away & best].all()


def test_all_candidates_of_points_and_a_box(made: Path, tmp_path: Path, run: Run) -> None:
    run("--point", "20,30", "--point", "70,50,0", "--box", "10,5,80,55", "--candidates")
    predictor = Predictor(create_sam("rwkv_sam_nano", made / "weights.pth"))
    predictor.set_image(made / "photo.png")
    masks, iou, _ = predictor.predict([[20, 30], [70, 50]], [1, 0], [10, 5, 80, 55])
    for k, mask in enumerate(masks, start=1):
        np.testing.assert_array_equal(_mask(tmp_path / f"out/photo_candidate{k}.png"), mask)
    np.testing.assert_array_equal(_mask(tmp_path / "out/photo_mask.png"), masks[iou.argmax()])
    drawn = np.array(Image.open(tmp_path / "out/photo_overlay.png"))
    assert drawn[50, 70].tolist() == [255, 0, 0]
    assert drawn[5, 40].tolist() == [255, 255, 0]


def test_several_boxes(made: Path, tmp_path: Path, run: Run) -> None:
    run("--box", "10,5,80,55", "--box", "0,0,30,20")
    predictor = Predictor(create_sam("rwkv_sam_nano", made / "weights.pth"))
    predictor.set_image(made / "photo.png")
    boxes = [[10, 5, 80, 55], [0, 0, 30, 20]]
    masks = predictor.predict(box=boxes, multimask_output=False)[0]
    for i in range(2):
        np.testing.assert_array_equal(_mask(tmp_path / f"out/photo_{i + 1}_mask.png"), masks[i, 0])


def test_existing_files_are_kept(tmp_path: Path, run: Run) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/photo_mask.png").write_text("mine")
    with pytest.raises(SystemExit, match=r"photo_mask\.png exists; --overwrite"):
        run("--point", "20,30")
    assert (tmp_path / "out/photo_mask.png").read_text() == "mine"
    assert not (tmp_path / "out/photo_overlay.png").exists()
    assert run("--point", "20,30", "--overwrite") == 0
    assert _mask(tmp_path / "out/photo_mask.png").shape == (60, 90)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "wanted a prompt"),
        (["--point", "20,300"], "20,300 lies outside of the image of 90 x 60"),
        (["--box", "1,2,91,9"], "91,9 lies outside"),
        (["--point", "nan,3"], "lies outside"),
        (["--point", "20,30,7"], "1 for foreground"),
        (["--box", "30,2,3,9"], "x0 <= x1"),
        (["--box", "1,2,3,4", "--box", "1,2,3,4", "--point", "1,2"], "take no --point"),
    ],
)
def test_wrong_prompts(tmp_path: Path, run: Run, args: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=said) as caught:
        run(*args)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [["--point", "20"], ["--point", "a,b"], ["--box", "1,2,3"]])
def test_prompts_that_are_no_numbers(
    run: Run, args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*args)
    assert f"argument {args[0]}: invalid" in capsys.readouterr().err


def test_missing_files(run: Run) -> None:
    with pytest.raises(SystemExit, match=r"none\.png"):
        run("--point", "20,30", image="none.png")
    with pytest.raises(SystemExit, match=r"none\.pth does not exist"):
        run("--point", "20,30", weights="none.pth")
