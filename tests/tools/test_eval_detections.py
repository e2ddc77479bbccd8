"""tools/eval_detections.py: masks from a detector's boxes, and their AP."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vision.data.rle import decode_rle, encode_masks
from vision.metrics.coco_ap import mask_ap
from vision.sam.model import create_sam
from vision.sam.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., None]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Folder with weights, two images with three objects, and boxes of them from a detector."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    images, annotations, boxes = [], [], []
    for number, (height, width) in enumerate(((40, 60), (50, 30)), start=7):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        for k in range(number - 6):
            mask = torch.zeros(1, height, width, dtype=torch.bool)
            mask[:, 5 + 9 * k : 20 + 9 * k, 4:24] = True
            box = [4, 5 + 9 * k, 20, 15]
            one = {"image_id": number, "category_id": 3 + k, "bbox": box}
            rle = encode_masks(mask)[0]
            extra = {"id": len(annotations) + 1, "area": 300, "iscrowd": 0, "segmentation": rle}
            annotations.append({**one, **extra})
            boxes.append({**one, "score": 0.5 + 0.1 * k})
    boxes.insert(1, {**boxes[0], "bbox": [2.5, 1.0, 30.25, 20.0], "score": 0.2})
    categories = [{"id": 3, "name": "a"}, {"id": 4, "name": "b"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    torch.manual_seed(0)
    torch.save(create_sam("rwkv_sam_nano").state_dict(), tmp_path / "weights.pth")
    return tmp_path


@pytest.fixture
def run(made: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the tool's main as a command line would; masks go to made / "out" / "masks.json"."""
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/eval_detections.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(*args: str) -> None:
        files = ("weights.pth", "coco.json", "images", "boxes.json")
        start = ["eval_detections", "rwkv_sam_nano", *(str(made / name) for name in files)]
        monkeypatch.setattr(sys, "argv", [*start, "--out", str(made / "out/masks.json"), *args])
        tool.main()

    return call


def _changed(made: Path, **values: Any) -> None:
    boxes = json.loads((made / "boxes.json").read_text())
    boxes[1] |= values
    (made / "boxes.json").write_text(json.dumps(boxes))


def test_as_a_program(made: Path) -> None:
    files = [made / name for name in ("weights.pth", "coco.json", "images", "boxes.json")]
    command = ["tools/eval_detections.py", "rwkv_sam_nano", *files, "--out", made / "masks.json"]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 masks in 2 images" in done.stdout
    assert "4/4" in done.stderr  # the bar
    coco, masks = (json.loads((made / f).read_text()) for f in ("coco.json", "masks.json"))
    for name, ratio in (("masks", None), ("boundary", 0.02)):
        assert f"{name}: AP {mask_ap(coco, masks, ratio)['AP']:.2f}, AP50" in done.stdout


def test_masks_are_the_predictors_with_the_detectors_scores(made: Path, run: Run) -> None:
    run("--boxes-at-once", "2")
    boxes, masks = (json.loads((made / f).read_text()) for f in ("boxes.json", "out/masks.json"))
    assert len(masks) == len(boxes) == 4
    predictor = Predictor(create_sam("rwkv_sam_nano", made / "weights.pth"))
    for box, mask in zip(boxes, masks, strict=True):
        assert set(mask) == {"image_id", "category_id", "score", "segmentation"}
        assert all(mask[key] == box[key] for key in ("image_id", "category_id", "score"))
        predictor.set_image(made / "images" / f"{box['image_id']}.png")
        x, y, width, height = box["bbox"]
        found, _, _ = predictor.predict(box=[x, y, x + width, y + height], multimask_output=False)
        assert np.array_equal(decode_rle(mask["segmentation"]), found[0])


def test_true_masks_get_full_marks(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(self: Predictor, box: np.ndarray, multimask_output: bool) -> tuple[np.ndarray, ...]:
        masks = np.zeros((len(box), 1, *self.original_size), bool)
        for mask, (x0, y0, x1, y1) in zip(masks, box.astype(int), strict=True):
            mask[0, y0:y1, x0:x1] = True
        return masks, None, None

    monkeypatch.setattr(Predictor, "predict", fill)
    run("--max-dets", "300")
    said = capsys.readouterr().out
    assert "masks: AP 100.00" in said
    assert "boundary: AP 100.00" in said


def test_no_detection_is_no_error(made: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "boxes.json").write_text("[]")
    run()
    assert json.loads((made / "out/masks.json").read_text()) == []
    assert "masks: AP 0.00" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"image_id": 99}, "image_id that the annotations lack: 99"),
        ({"category_id": 99}, "category_id that the annotations lack: 99"),
        ({"bbox": [1, 2, -3, 4]}, r"wanted a bbox x, y, width, height, got \[1, 2, -3, 4\]"),
        ({"bbox": [1, 2, 3]}, "of detection 1"),
    ],
)
def test_wrong_detections(made: Path, run: Run, values: dict[str, Any], said: str) -> None:
    _changed(made, **values)
    with pytest.raises(SystemExit, match=f"error: .*boxes.json.*{said}"):
        run()
    assert not (made / "out").exists()


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("boxes.json", "wanted a COCO results file, got .*boxes.json"),
        ("coco.json", "wanted a COCO annotation file, got .*coco.json"),
        ("images/8.png", "1 of 2 images are not there: .*8.png"),
        ("weights.pth", "weights.pth does not exist"),
    ],
)
def test_missing_files(made: Path, run: Run, gone: str, said: str) -> None:
    (made / gone).unlink()
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        run()
    assert not (made / "out").exists()


def test_wrong_arguments(run: Run) -> None:
    with pytest.raises(SystemExit, match="want 1 or more"):
        run("--max-dets", "0")


def test_goes_on_where_it_stopped(
    made: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stop in the second image loses that image only, and the end is the same."""
    run()
    wanted = (made / "out/masks.json").read_bytes()
    (made / "out/masks.json").unlink()
    seen: list[str] = []
    real = Predictor.set_image

    def stop_at(last: int) -> None:
        def set_image(self: Predictor, image: Path) -> None:
            seen.append(Path(image).name)
            if len(seen) == last:
                raise KeyboardInterrupt
            real(self, image)

        monkeypatch.setattr(Predictor, "set_image", set_image)

    stop_at(2)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert os.listdir(made / "out") == ["masks.json.part"]
    stop_at(0)
    run()
    assert seen == ["7.png", "8.png", "8.png"]
    assert (made / "out/masks.json").read_bytes() == wanted
    assert os.listdir(made / "out") == ["masks.json"]
    stop_at(len(seen) + 1)
    with pytest.raises(KeyboardInterrupt):
        run()
    _changed(made, score=0.9)
    with pytest.raises(SystemExit, match="remove it to start anew"):
        run()
