"""From a command line to a config: options reach their place, mistakes are named."""

import argparse
from pathlib import Path

import pytest
from mmengine.config import Config

from vision.mm.launch import (
    ConfigError,
    add_common_arguments,
    check_data,
    check_keys,
    load_config,
    merge_options,
)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    return parser.parse_args(words)


def config() -> Config:
    return Config(
        {
            "data_root": "data/x",
            "model": {"type": "M", "drop_path_rate": 0.1},
            "train_dataloader": {
                "batch_size": 4,
                "dataset": {"data_root": "data/x", "data_prefix": {"img_path": "img"}},
            },
            "val_dataloader": {
                "dataset": {"type": "Wrapper", "dataset": {"data_root": "data/x/val"}}
            },
            "hooks": [{"type": "A"}, {"type": "B"}],
        }
    )


def test_option_reaches_a_nested_key_and_a_list() -> None:
    cfg = config()
    merge_options(cfg, {"train_dataloader.batch_size": 8, "hooks.1.type": "C", "model.depth": 3})
    assert cfg.train_dataloader.batch_size == 8
    assert [h.type for h in cfg.hooks] == ["A", "C"]
    assert cfg.model.depth == 3


def test_data_root_is_replaced_wherever_it_was_expanded() -> None:
    cfg = config()
    merge_options(cfg, {"data_root": "/elsewhere"})
    assert cfg.train_dataloader.dataset.data_root == "/elsewhere"
    assert cfg.val_dataloader.dataset.dataset.data_root == "data/x/val"  # another value


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.drop_path_rat", "did you mean drop_path_rate"),
        ("modle.drop_path_rate", "did you mean model"),
        ("train_dataloder", "did you mean train_dataloader"),
        ("zzz.y", "there are data_root"),
        ("hooks.5.type", "no index of a list of 2"),
    ],
)
def test_misspelt_option_is_named(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merge_options(config(), {option: 1})


def test_misspelt_config_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"'train_dataloder' .* mean train_dataloader"):
        check_keys(Config({"train_dataloder": {}}))
    with pytest.raises(ConfigError, match="norm_decay_mul; there are"):
        check_keys(Config({"optim_wrapper": {"paramwise_cfg": {"norm_decay_mul": 0}}}))
    check_keys(Config({"my_crop": 3, "test_pipeline": [], "norm_cfg": {}}))


def test_missing_config_lists_close_ones(repo_root: Path, monkeypatch) -> None:
    monkeypatch.chdir(repo_root)
    with pytest.raises(FileNotFoundError, match=r"vrwkv-nano_1xb64-80e_digits-32\.py"):
        load_config(arguments("configs/vrwkv/vrwkv-nano_1xb64-80e_digit-32.py"))


def test_load_config_fills_the_work_dir(repo_root: Path) -> None:
    path = repo_root / "configs" / "vrwkv" / "vrwkv-nano_1xb64-80e_digits-32.py"
    cfg = load_config(arguments(str(path), "--cfg-options", "train_cfg.max_epochs=3"))
    assert cfg.train_cfg.max_epochs == 3
    assert Path(cfg.work_dir) == Path("work_dirs/vrwkv-nano_1xb64-80e_digits-32")
    assert cfg.launcher == "none"


def test_data_folders_are_looked_at_first(tmp_path: Path) -> None:
    cfg = config()
    cfg.train_dataloader.dataset.data_root = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no folder .*nowhere.*--cfg-options data_root="):
        check_data(cfg, "train")
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    (tmp_path / "img").mkdir()
    with pytest.raises(ConfigError, match=r"img is empty"):
        check_data(cfg, "train")
    (tmp_path / "img" / "a.jpg").touch()
    check_data(cfg, "train")
    cfg.val_dataloader.dataset.dataset.data_root = str(tmp_path / "val")
    with pytest.raises(ConfigError, match="val_dataloader: no folder"):
        check_data(cfg, "train", "val")
