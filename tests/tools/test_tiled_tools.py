"""tools/predict.py and tools/test.py in tiles, with a model of random weights."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from vision.mm import tiling
from vision.mm.compat import cpu_safe_config

SCENES = "configs/vrwkv/vrwkv-nano_segformer_1xb8-16e_digit-scenes-128.py"
DIGITS = "configs/vrwkv/vrwkv-nano_1xb64-80e_digits-32.py"


def tool(repo_root: Path, name: str) -> ModuleType:
    """tools/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", repo_root / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the config SCENES."""
    cfg = Config.fromfile(repo_root / SCENES)
    cpu_safe_config(cfg)
    init_default_scope("mmseg")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, path)
    return path


@pytest.fixture
def tiles_seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """Sizes of the tiles that the model gets."""
    seen = set()
    logits = tiling.TiledEncoderDecoder._logits
    monkeypatch.setattr(
        tiling.TiledEncoderDecoder,
        "_logits",
        lambda self, tile: seen.add(tuple(tile.shape[-2:])) or logits(self, tile),
    )
    return seen


def test_predict_in_tiles(
    repo_root: Path,
    checkpoint: Path,
    tiles_seen: set[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    predict = tool(repo_root, "predict")

    def run(config: str, *more: str) -> int:
        where = [str(tmp_path / "a.png"), "--out-dir", str(tmp_path / "out")]
        monkeypatch.setattr(
            sys, "argv", ["predict", str(repo_root / config), str(checkpoint), *where, *more]
        )
        return predict.main()

    pixels = np.random.default_rng(0).integers(0, 255, (70, 131, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert run(SCENES, "--tile", "64", "--overlap", "20", "--device", "cpu") == 0
    assert tiles_seen == {(64, 64)}
    assert Image.open(tmp_path / "out" / "a_mask.png").size == (131, 70)
    for config, more, words in (
        (SCENES, ["--tile", "16"], "at least 32 px, got 16"),
        (SCENES, ["--tile", "64", "--overlap", "64"], "overlap by 0 to 63 px, got 64"),
        (SCENES, ["--overlap", "64"], "give their side with --tile"),
        (DIGITS, ["--tile", "64"], "tiles are for a segmentor"),
    ):
        with pytest.raises(SystemExit) as end:
            run(config, *more)
        assert words in str(end.value) + capsys.readouterr().err


def test_test_in_tiles(
    repo_root: Path,
    checkpoint: Path,
    tiles_seen: set[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    evaluate = tool(repo_root, "test")

    def run(*more: str) -> None:
        out = ["--work-dir", str(tmp_path), "--out", str(tmp_path / "found.json")]
        options = ["--cfg-options", "test_dataloader.dataset.length=2"]
        monkeypatch.setattr(
            sys, "argv", ["test", str(repo_root / SCENES), str(checkpoint), *out, *options, *more]
        )
        evaluate.main()

    run("--tile", "96")
    assert tiles_seen == {(96, 96)}
    assert 0 <= json.loads((tmp_path / "found.json").read_text())["seg/mIoU"] <= 100
    for more, words in (
        (["--tile", "96", "--overlap", "96"], "overlap by 0 to 95 px, got 96"),
        (["--tile", "96", "--tta"], "use one of the two"),
        (["--overlap", "9"], "give their side with --tile"),
    ):
        with pytest.raises(SystemExit) as end:
            run(*more)
        assert words in str(end.value) + capsys.readouterr().err
