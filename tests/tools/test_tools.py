"""The command line programs, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vision.models.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DIGITS = "configs/vrwkv/vrwkv-nano_1xb64-80e_digits-32.py"
SCENES = "configs/vrwkv/vrwkv-nano_segformer_1xb8-16e_digit-scenes-128.py"
# A run of seconds: few samples, a short schedule.
SHORT = [
    "train_dataloader.dataset.length=128",
    "val_dataloader.dataset.length=30",
    "test_dataloader.dataset.length=30",
    "val_dataloader.batch_size=8",
    "test_dataloader.batch_size=8",
    "train_cfg.val_interval=1",
    "default_hooks.checkpoint.max_keep_ckpts=9",
]
SHORT_SCENES = [
    "train_dataloader.dataset.length=8",
    "val_dataloader.dataset.length=4",
    "test_dataloader.dataset.length=4",
    "train_cfg.max_epochs=1",
    "train_cfg.val_interval=1",
]


def tool(name: str, *args: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run tools/NAME.py from the repository's root; `ranks` > 1 starts that many processes."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        args = (*args, "--launcher", "pytorch")
    return subprocess.run(
        [*start, f"tools/{name}.py", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(name: str, *args: object, ranks: int = 1) -> str:
    done = tool(name, *args, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def train(work_dir: Path, epochs: int, *args: object, ranks: int = 1) -> Path:
    succeed(
        "train", DIGITS, "--work-dir", work_dir, *args, "--cfg-options",
        f"train_cfg.max_epochs={epochs}", *SHORT, ranks=ranks,
    )  # fmt: skip
    return work_dir / f"epoch_{epochs}.pth"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of a run of four epochs."""
    work_dir = tmp_path_factory.mktemp("four")
    train(work_dir, 4)
    return work_dir


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of a segmentation run of one epoch, in bfloat16."""
    work_dir = tmp_path_factory.mktemp("scenes")
    succeed(
        "train", SCENES, "--work-dir", work_dir, "--amp", "--seed", 3, "--cfg-options",
        *SHORT_SCENES,
    )  # fmt: skip
    return work_dir


def test_training_leaves_what_people_look_for(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert {"epoch_4.pth", "last_checkpoint", "curves.png", "summary.json"} <= names
    assert "predictions_val.png" in names
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["finished"]
    assert summary["epochs"] == 4
    assert 0 <= summary["best"]["accuracy/top1"]["value"] <= 100
    for picture in ("curves.png", "predictions_val.png"):
        image = np.asarray(Image.open(trained / picture).convert("RGB"))
        assert image.std() > 5, f"{picture} is blank"
    checkpoint = trained / "epoch_4.pth"
    assert torch.serialization.get_unsafe_globals_in_checkpoint(checkpoint) == []


def test_two_and_two_epochs_are_four(trained: Path, tmp_path: Path) -> None:
    """The schedule spans 80 epochs in both runs, so the halves are parts of the whole."""
    train(tmp_path, 2)
    resumed = train(tmp_path, 4, "--resume")
    whole = read_checkpoint(trained / "epoch_4.pth")["state_dict"]
    parts = read_checkpoint(resumed)["state_dict"]
    assert set(whole) == set(parts)
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_two_processes_test_as_one(trained: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        succeed(
            "test", DIGITS, trained / "epoch_4.pth", "--out", out, "--work-dir", tmp_path,
            "--cfg-options", *SHORT, ranks=ranks,
        )  # fmt: skip
        found.append(json.loads(out.read_text()))
    assert found[0]["accuracy/top1"] == found[1]["accuracy/top1"]
    assert found[0]["accuracy/top5"] == found[1]["accuracy/top5"]


def test_two_processes_train(tmp_path: Path) -> None:
    checkpoint = train(tmp_path, 1, ranks=2)
    weights = read_checkpoint(checkpoint)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())
    assert not any(key.startswith("module.") for key in weights)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["processes"] == 2


def test_test_shows_and_augments(scenes: Path, tmp_path: Path) -> None:
    out, shown = tmp_path / "m.json", tmp_path / "shown"
    succeed(
        "test", SCENES, scenes / "epoch_1.pth", "--out", out, "--show-dir", shown,
        "--work-dir", tmp_path, "--cfg-options", *SHORT_SCENES,
    )  # fmt: skip
    assert "seg/mIoU" in json.loads(out.read_text())
    assert sorted(p.name for p in shown.glob("0*.png")) == [f"{i:06d}.png" for i in range(4)]
    assert (shown / "predictions_test.png").is_file()


def test_augmented_test(trained: Path, scenes: Path, tmp_path: Path) -> None:
    flips = "[dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]"
    for base, checkpoint, added, options, metric in (
        (
            DIGITS,
            trained / "epoch_4.pth",
            "tta_model = dict(type='FlipTTA')",
            SHORT,
            "accuracy/top1",
        ),
        (
            SCENES,
            scenes / "epoch_1.pth",
            "tta_pipeline = [dict(type='TestTimeAug', transforms="
            f"[{flips}, [dict(type='PackSegInputs')]])]",
            SHORT_SCENES,
            "seg/mIoU",
        ),
    ):
        config, out = tmp_path / "with_tta.py", tmp_path / "m.json"
        config.write_text(f"_base_ = {str(ROOT / base)!r}\n{added}\n")
        succeed(
            "test", config, checkpoint, "--tta", "--out", out, "--work-dir", tmp_path,
            "--cfg-options", *options,
        )  # fmt: skip
        assert 0 <= json.loads(out.read_text())[metric] <= 100
    done = tool("test", DIGITS, trained / "epoch_4.pth", "--tta", "--work-dir", tmp_path)
    assert done.returncode != 0
    assert "--tta needs a tta_model" in done.stderr


def test_predict_segments_a_folder(scenes: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (70, 50, 3), np.uint8)).save(images / "a.png")
    Image.fromarray(rng.integers(0, 255, (9, 130), np.uint8)).save(images / "sub" / "a.jpg")
    (images / "broken.png").write_bytes(b"\x89PNG no more")
    done = tool("predict", SCENES, scenes / "epoch_1.pth", images, "--out-dir", tmp_path / "out")
    assert done.returncode == 1
    assert "2 of 3 images done" in done.stdout
    assert "broken.png" in done.stderr
    for name, size in (("a", (50, 70)), ("sub/a", (130, 9))):
        mask = Image.open(tmp_path / "out" / f"{name}_mask.png")
        assert mask.size == size
        assert np.asarray(mask).max() <= 10
        assert Image.open(tmp_path / "out" / f"{name}_overlay.png").size == size


def test_predict_names_classes(trained: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "white").save(tmp_path / "x.png")
    out = succeed(
        "predict", DIGITS, trained / "epoch_4.pth", tmp_path / "x.png", "--out-dir", tmp_path
    )
    best = json.loads((tmp_path / "predictions.json").read_text())[str(tmp_path / "x.png")]
    assert len(best) == 5
    assert best[0]["class"] in "0123456789"
    assert best == sorted(best, key=lambda b: -b["score"])
    assert f"{best[0]['class']} (" in out


def test_predict_says_what_is_wrong(trained: Path, scenes: Path, tmp_path: Path) -> None:
    checkpoint = trained / "epoch_4.pth"
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for arguments, message in (
        ((DIGITS, checkpoint, tmp_path / "no.png"), "no image or folder"),
        ((DIGITS, checkpoint, tmp_path / "empty"), "empty"),
        ((DIGITS, cut, tmp_path / "x.png"), "truncated"),
        ((DIGITS, scenes / "epoch_1.pth", tmp_path / "x.png"), "does not fit"),
    ):
        done = tool("predict", *arguments, "--out-dir", tmp_path / "o")
        assert done.returncode != 0
        assert message in done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr


def test_train_says_what_is_wrong(tmp_path: Path) -> None:
    cifar = "configs/vrwkv/vrwkv-nano_1xb64-20e_cifar10-32.py"
    for arguments, message in (
        (("configs/vrwkv/vrwkv-nano.py",), "close ones:"),
        ((cifar, "--cfg-options", f"data_root={tmp_path}/no"), "no folder"),
        ((DIGITS, "--cfg-options", "model.drop_path_rat=0.1"), "drop_path_rat"),
        ((DIGITS, "--cfg-options", "train_dataloder.batch_size=1"), "train_dataloader"),
        ((DIGITS, "--cfg-options", "model.model_name=vrwkv_nano"), "vrwkv_nano_patch8_224"),
        ((DIGITS, "--resume", str(tmp_path / "gone.pth")), "gone.pth"),
    ):
        done = tool("train", *arguments, "--work-dir", tmp_path / "w")
        assert done.returncode != 0
        assert message in done.stderr, done.stderr[-2000:]


def test_a_checkpoint_of_another_model_is_not_used(
    trained: Path, scenes: Path, tmp_path: Path
) -> None:
    for name, arguments in (
        ("test", [SCENES, trained / "epoch_4.pth"]),
        ("train", [SCENES, "--resume", trained / "epoch_4.pth"]),
    ):
        done = tool(name, *arguments, "--work-dir", tmp_path, "--cfg-options", *SHORT_SCENES)
        assert done.returncode != 0
        assert "does not fit the model" in done.stderr, done.stderr[-2000:]


def test_flops_agree_with_upstream() -> None:
    out = succeed("get_flops", "vrwkv_tiny_patch16_224", "vrwkv_small_patch16_224")
    rows = {line.split()[0]: line.split() for line in out.splitlines()[1:]}
    assert rows["vrwkv_tiny_patch16_224"][2:4] == ["6,155,176", "1.171"]
    assert rows["vrwkv_small_patch16_224"][2:4] == ["23,820,136", "4.597"]
    whole = succeed("get_flops", SCENES, "--shape", 64, 96)
    assert "3x64x96" in whole


def test_convert_writes_weights_that_timm_loads(trained: Path, tmp_path: Path) -> None:
    import timm

    out = tmp_path / "w.safetensors"
    arguments = (
        "convert_checkpoint", trained / "epoch_4.pth", "vrwkv_nano_patch8_224", out,
        "--model-args", "num_classes=10", "img_size=32",
    )  # fmt: skip
    assert "wrote" in succeed(*arguments)
    model = timm.create_model(
        "vrwkv_nano_patch8_224", num_classes=10, img_size=32, checkpoint_path=str(out)
    )
    source = read_checkpoint(trained / "epoch_4.pth")["state_dict"]
    assert torch.equal(model.head.weight, source["backbone.head.weight"])
    again = tool(*arguments)
    assert again.returncode != 0
    assert "exists" in again.stderr
    wrong = tool(*arguments[:3], tmp_path / "w2.pth")
    assert wrong.returncode != 0
    assert "does not fit" in wrong.stderr
    assert not (tmp_path / "w2.pth").exists()
    for unknown in (
        tool(*arguments[:2], "vrwkv_nany", tmp_path / "w3.pth"),
        tool("get_flops", "vrwkv_nany"),
    ):
        assert unknown.returncode != 0
        assert "error: timm has no model 'vrwkv_nany'; close names: " in unknown.stderr
        assert "Traceback" not in unknown.stderr
