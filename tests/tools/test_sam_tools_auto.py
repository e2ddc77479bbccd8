"""tools/auto_mask.py: COCO files and pictures of all masks, going on after a stop, bad images."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from vision.sam.automatic import AutomaticMaskGenerator
from vision.sam.model import create_sam

ROOT = Path(__file__).resolve().parents[2]
# All masks of four points, so that random weights give several, which lie over each other.
ALL = {
    "points_per_side": 2,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
}
KEEP = [word for name, value in ALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
Run = Callable[..., int]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Folder with weights and, in "images", a.png, sub/a.png of another size, and a broken file."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name, size in (("a.png", (40, 60)), ("sub/a.png", (30, 20))):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    torch.manual_seed(0)
    torch.save(create_sam("rwkv_sam_nano").state_dict(), tmp_path / "weights.pth")
    return tmp_path


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/auto_mask.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(made: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the tool's main as a command line would; results go to made / "out"."""

    def call(*args: str, image: str = "images") -> int:
        start = ["auto_mask", "rwkv_sam_nano", str(made / "weights.pth"), str(made / image)]
        monkeypatch.setattr(sys, "argv", [*start, "--out-dir", str(made / "out"), *KEEP, *args])
        return tool.main()

    return call


def _times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_folder_to_coco(made: Path) -> None:
    command = ["tools/auto_mask.py", "rwkv_sam_nano", made / "weights.pth", made / "images"]
    done = subprocess.run(
        [sys.executable, *map(str, command), "--out-dir", str(made / "out"), *KEEP],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert "2 of 3 images done" in done.stdout
    assert "broken.jpg" in done.stderr
    assert "image/s" in done.stderr or "s/image" in done.stderr  # the bar with the time to go
    coco = COCO(made / "out" / "masks.json")
    names = {image["id"]: image["file_name"] for image in coco.imgs.values()}
    assert names == {1: "a.png", 2: "sub/a.png"}
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    for number, name in names.items():
        _check_annotations(made, coco, number, name)


def _check_annotations(made: Path, coco: COCO, number: int, name: str) -> None:
    """The annotations of an image are the generator's masks of it."""
    model = create_sam("rwkv_sam_nano", made / "weights.pth")
    generator = AutomaticMaskGenerator(model, **ALL)
    records = generator.generate(made / "images" / name)
    annotations = coco.imgToAnns[number]
    assert len(annotations) == len(records) == 12
    for annotation, record in zip(annotations, records, strict=True):
        mask = coco.annToMask(annotation).astype(bool)
        np.testing.assert_array_equal(mask, record["segmentation"])
        y, x = np.nonzero(mask)
        assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        assert annotation["area"] == mask.sum()
        assert annotation["score"] == pytest.approx(record["predicted_iou"])
        assert annotation["category_id"] in coco.cats
        assert annotation["iscrowd"] == 0


def test_second_run_does_only_what_is_left(
    made: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 1
    before = _times(made / "out" / "parts")
    assert len(before) == 2
    Image.new("RGB", (25, 35), "red").save(made / "images" / "broken.jpg")
    capsys.readouterr()
    assert run() == 0
    said = capsys.readouterr()
    assert "3 of 3 images done" in said.out
    assert "3/3" in said.err  # the bar counts what was done before
    after = _times(made / "out" / "parts")
    assert len(after) == 3
    assert {path: after[path] for path in before} == before
    images = json.loads((made / "out" / "masks.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.png", "broken.jpg", "sub/a.png"]
    assert [image["height"] for image in images] == [40, 35, 30]


def test_a_run_that_was_killed_while_writing_goes_on(
    made: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        replace = os.replace
        # The settings and the first image are written; the second is not there under its name.
        calls = [replace, replace, killed]
        patch.setattr(os, "replace", lambda *a: calls.pop(0)(*a))
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (made / "out" / "masks.json").exists()
    kept = _times(made / "out" / "parts")
    assert made / "out" / "parts" / "sub" / "a.png.json" not in kept
    assert run() == 1
    images = json.loads((made / "out" / "masks.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["a.png", "sub/a.png"]
    done = made / "out" / "parts" / "a.png.json"
    assert _times(made / "out" / "parts")[done] == kept[done]


def test_other_settings_want_another_folder(made: Path, run: Run) -> None:
    run()
    with pytest.raises(SystemExit, match=r"results with points_per_batch=64; use these"):
        run("--points-per-batch", "3")


def test_out_of_memory_on_one_image_is_reported(
    made: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate = AutomaticMaskGenerator.generate

    def scarce(self: AutomaticMaskGenerator, image: np.ndarray) -> list[object]:
        if len(image) == 40:
            raise torch.OutOfMemoryError("no memory left")
        return generate(self, image)

    monkeypatch.setattr(AutomaticMaskGenerator, "generate", scarce)
    (made / "images" / "broken.jpg").unlink()
    assert run() == 1
    said = capsys.readouterr()
    assert "a.png: no memory left" in said.err
    assert "1 of 2 images done" in said.out
    images = json.loads((made / "out" / "masks.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["sub/a.png"]


def test_png(made: Path, run: Run) -> None:
    assert run("--format", "png") == 1
    out = made / "out"
    names = {str(path.relative_to(out)) for path in out.rglob("*.png")}
    pictures = ("masks.png", "overlay.png")
    assert names == {f"{name}.{p}" for name in ("a.png", "sub/a.png") for p in pictures}
    assert not (out / "masks.json").exists()
    file = Image.open(out / "a.png.masks.png")
    assert file.mode == "I;16"
    model = create_sam("rwkv_sam_nano", made / "weights.pth")
    records = AutomaticMaskGenerator(model, **ALL).generate(made / "images" / "a.png")
    wanted = np.zeros((40, 60), int)
    for index, record in enumerate(sorted(records, key=lambda r: -r["area"]), start=1):
        wanted[record["segmentation"]] = index
    np.testing.assert_array_equal(np.array(file), wanted)
    image = np.array(Image.open(made / "images" / "a.png"))
    overlay = np.array(Image.open(out / "a.png.overlay.png"))
    assert ((overlay != image).any(axis=2) <= (wanted > 0)).all()
    assert (overlay != image).any()
    before = _times(out)
    assert run("--format", "png") == 1
    assert _times(out) == before


def test_results_within_the_folder_of_images_are_no_images(made: Path, run: Run) -> None:
    inside = ["--out-dir", str(made / "images" / "out"), "--format", "png"]
    assert run(*inside) == 1
    before = _times(made / "images")
    assert run(*inside) == 1
    assert _times(made / "images") == before


def test_one_image_alone(made: Path, run: Run) -> None:
    assert run(image="images/sub/a.png") == 0
    images = json.loads((made / "out" / "masks.json").read_text())["images"]
    assert images == [{"id": 1, "file_name": "a.png", "height": 30, "width": 20}]


@pytest.mark.parametrize(
    ("args", "image", "said"),
    [
        ((), "nowhere", "nowhere"),
        (("--points-per-side", "0"), "images", "1 or more points a side"),
    ],
)
def test_wrong_arguments(
    made: Path, run: Run, args: tuple[str, ...], image: str, said: str
) -> None:
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        run(*args, image=image)
    assert not (made / "out").exists()
