"""tools/probe.py, run as a user runs it."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vision  # noqa: F401 -- registers the models

ROOT = Path(__file__).resolve().parents[2]
MODEL = "vrwkv_nano_patch8_224"
COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
Run = Any  # a callable with the tool as its attribute


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three colours, in class folders, and weights."""
    root = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 100, (24, 24, 3))
                pixels = np.clip(np.array(colour) * 0.6 + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    torch.manual_seed(1)
    model = timm.create_model(MODEL, depth=1, img_size=24, num_classes=0)
    torch.save(model.state_dict(), root / "weights.pth")
    return root


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the tool's main as a command line would; returns what it wrote."""
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/probe.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(mode: str, *args: object, model: str = MODEL, root: Path = data) -> dict[str, Any]:
        out = tmp_path / "out" / "result.json"
        nano = ["--model-args", "depth=1", "img_size=24"] if model == MODEL else []
        command = ["probe", mode, model, root, *nano, "--workers", 0, "--out", out, *args]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        tool.main()
        return json.loads(out.read_text())

    call.tool = tool
    return call


@pytest.mark.parametrize("mode", ["knn", "linear"])
def test_colours_are_told_apart(run: Run, data: Path, mode: str) -> None:
    found = run(mode, "--checkpoint", data / "weights.pth", "--k", 5)
    assert found["top1"] == 100
    assert "top5" not in found, "there are three classes"
    assert found["images"] == {"train": 36, "test": 12}
    assert (found["classes"], found["channels"]) == (3, 64)
    assert found["checkpoint"] == str(data / "weights.pth")
    assert found["model_args"] == {"depth": 1, "img_size": 24}
    wanted = {"knn": {"k", "temperature"}, "linear": {"penalty", "held_out_top1"}}
    assert wanted[mode] <= set(found)


def test_any_model_of_timm(run: Run) -> None:
    found = run("knn", "--k", 5, "--input-size", 32, "--temperature", 0, model="resnet10t")
    assert found["channels"] == 512
    assert found["top1"] > 90


def test_features_are_those_of_the_weights(run: Run, data: Path) -> None:
    """With the file's weights the seed does not matter; among random ones it does."""
    options = ["--penalties", 1e-4, 1e1, "--checkpoint", data / "weights.pth"]
    one, two = (run("linear", *options, "--seed", 3) for _ in range(2))
    assert {**one, "seconds": 0} == {**two, "seconds": 0}
    tool, wanted = run.tool, timm.create_model(MODEL, depth=1, img_size=24, num_classes=0)
    wanted.load_state_dict(torch.load(data / "weights.pth", weights_only=True))
    args = argparse.Namespace(
        model=MODEL, model_args=[("depth", 1), ("img_size", 24)], device="cpu", seed=3,
        data=str(data), checkpoint=str(data / "weights.pth"), input_size=None, batch_size=5,
        workers=0,
    )  # fmt: skip
    model = tool.build(args)
    samples = tool.open_split(args, "val", model.pretrained_cfg)
    features, labels = tool.extract(model, samples, args)
    images = torch.stack([samples[i]["image"] for i in range(len(samples))])
    torch.testing.assert_close(features, wanted.eval()(images), rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--k", 37], r"--k wants 1 \.\. 36 .* got 37"),
        (["--checkpoint", "nowhere.pth"], r"checkpoint nowhere\.pth does not exist"),
        (["--model-args", "depht=1"], "depht"),
        (["--test-split", "test"], "no split 'test'"),
        (["--temperature", -1], "want 0 or more"),
    ],
)
def test_bad_arguments(run: Run, args: list[Any], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        run("knn", *args)


def test_models_that_do_not_fit(run: Run, data: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: timm has no model 'resnet10'"):
        run("knn", model="resnet10")
    with pytest.raises(SystemExit, match="does not fit this model"):
        run("knn", "--checkpoint", data / "weights.pth", "--model-args", "depth=2", "img_size=24")
    with pytest.raises(SystemExit, match=r"does not take images \(36, 3, 20, 20\).*--input-size"):
        run("knn", "--input-size", 20, model="vit_tiny_patch16_224")


def test_data_that_do_not_fit(run: Run, tmp_path: Path) -> None:
    for split in ("one", "two"):
        for name in ("blue", "green" if split == "one" else "red"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (24, 24)).save(folder / "a.png")
    splits = ["--train-split", "one", "--test-split", "two"]
    with pytest.raises(SystemExit, match="have other classes: blue, green and blue, red"):
        run("knn", *splits, root=tmp_path)
    (tmp_path / "one" / "green" / "a.png").write_bytes(b"no image")
    same = ["--train-split", "one", "--test-split", "one", "--k", 1]
    for workers in (0, 1):
        with pytest.raises(SystemExit, match=r"^error: .*a\.png: wanted an image"):
            run("knn", *same, "--workers", workers, root=tmp_path)


def test_as_a_program(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "tools/probe.py", "knn", MODEL, data, "--k", "3", "--out"]
    command += [tmp_path / "knn.json", "--model-args", "depth=1", "img_size=24"]
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == json.loads((tmp_path / "knn.json").read_text())
    assert "batch" in done.stderr, "progress is shown"
