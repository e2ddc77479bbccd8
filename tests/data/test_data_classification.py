"""Classification data sets of folders and tar files: counts, labels, and what is refused."""

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from vision.data import (
    ClassificationDataset,
    ImageReadError,
    LabelError,
    create_classification_dataset,
)

CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """root/{train,val}/{class2,class10}/i.png: grey value 20 i of class2, 20 i + 10 of class10."""
    root = tmp_path / "set"
    for split in ("train", "val"):
        for label, name in enumerate(("class2", "class10")):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                image = Image.new("RGB", (4, 5), (20 * i + 10 * label,) * 3)
                image.save(root / split / name / f"{i}.png")
    return root


def _tar(folder: Path, target: Path) -> Path:
    with tarfile.open(target, "w") as tar:
        for path in sorted(folder.rglob("*")):
            tar.add(path, path.relative_to(folder), recursive=False)
    return target


def test_folders(folders: Path) -> None:
    dataset = create_classification_dataset(folders, "train")
    assert dataset.classes == ("class2", "class10")  # natural order
    got = {(sample["label"], int(sample["image"][0, 0, 0])) for sample in dataset}
    assert got == {(label, 20 * i + 10 * label) for label in (0, 1) for i in range(3)}
    assert dataset[0]["image"].shape == (5, 4, 3)
    assert dataset[0]["image"].dtype == np.uint8
    assert isinstance(dataset[0]["label"], int)
    assert len(create_classification_dataset(folders, "validation")) == 6  # a synonym
    assert len(create_classification_dataset(folders / "val")) == 6
    with pytest.raises(IndexError):
        dataset[6]


def test_transform(folders: Path) -> None:
    dataset = create_classification_dataset(folders, "val", transform=lambda s: s["label"] + 100)
    assert list(dataset) == [100] * 3 + [101] * 3


def test_tar_is_the_folder(folders: Path, tmp_path: Path) -> None:
    path = _tar(folders / "train", tmp_path / "train.tar")
    packed, loose = (
        create_classification_dataset(path),
        create_classification_dataset(folders, "train"),
    )
    assert packed.classes == loose.classes
    assert len(packed) == len(loose) == 6
    for a, b in zip(packed, loose, strict=True):
        assert a["label"] == b["label"]
        assert np.array_equal(a["image"], b["image"])
    assert len(create_classification_dataset(tmp_path, "train")) == 6  # finds train.tar


def test_class_map(folders: Path, tmp_path: Path) -> None:
    dataset = create_classification_dataset(folders, "train", {"class10": 0, "class2": 1})
    assert dataset.classes == ("class10", "class2")
    assert {s["label"] for s in dataset if s["image"][0, 0, 0] in (0, 20, 40)} == {1}
    listed = tmp_path / "classes.txt"
    listed.write_text("class10\n")
    dataset = create_classification_dataset(folders, "train", listed)
    assert (len(dataset), dataset.classes) == (3, ("class10",))


@pytest.mark.parametrize(
    ("class_map", "error", "message"),
    [
        ({"class2": 0, "class10": 2}, LabelError, "wants labels 0..1 .*got 2"),
        ({"class2": 0, "class3": 1}, ValueError, "got none of class3"),
        ({"dog": 0}, ValueError, "images of the classes dog, found none"),
        ({}, ValueError, "at least one class"),
        ("nowhere.txt", ValueError, r"existing \.txt file"),
    ],
)
def test_wrong_class_map(
    folders: Path, class_map: dict[str, int] | str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        create_classification_dataset(folders, "train", class_map)


def test_number_of_classes(folders: Path) -> None:
    assert len(create_classification_dataset(folders, "train", num_classes=2).classes) == 2
    with pytest.raises(ValueError, match=r"wanted 10 classes, got 2 .*class2, class10"):
        create_classification_dataset(folders, "train", num_classes=10)
    with pytest.raises(LabelError, match=r"labels 0..1 .*got 7"):
        create_classification_dataset(folders, "train", {"class2": 0, "class10": 7}, num_classes=2)


def test_label_outside_of_the_classes() -> None:
    def load(index: int) -> tuple[np.ndarray, int]:
        return np.zeros((2, 2, 3), np.uint8), index

    with pytest.raises(LabelError, match=r"set: wanted labels 0..1 .*got 2"):
        ClassificationDataset(load, np.arange(3), 3, ("a", "b"), "set")
    dataset = ClassificationDataset(load, None, 3, ("a", "b"), "set")
    assert dataset[1]["label"] == 1
    with pytest.raises(LabelError, match="got 2"):
        dataset[2]


def _no_root(root: Path) -> Path:
    return root / "gone"


def _empty(root: Path) -> Path:
    (root / "empty").mkdir()
    return root / "empty"


def _empty_classes(root: Path) -> Path:
    (root / "none" / "cat").mkdir(parents=True)
    return root / "none"


def _one_empty_class(root: Path) -> Path:
    (root / "train" / "cat").mkdir()
    return root / "train"


def _flat(root: Path) -> Path:
    return root / "train" / "class2"


def _stray(root: Path) -> Path:
    Image.new("RGB", (2, 2)).save(root / "train" / "stray.png")
    return root / "train"


def _text_file(root: Path) -> Path:
    (root / "list.csv").write_text("a,b\n")
    return root / "list.csv"


def _fake_tar(root: Path) -> Path:
    (root / "fake.tar").write_text("not a tar file " * 100)
    return root / "fake.tar"


def _tar_of_text(root: Path) -> Path:
    folder = root / "text"
    folder.mkdir()
    (folder / "readme.txt").write_text("hello")
    return _tar(folder, root / "text.tar")


def _empty_tar(root: Path) -> Path:
    (root / "empty.tar").touch()
    return root / "empty.tar"


def _cut_tar(root: Path) -> Path:
    path = _tar(root / "train", root / "cut.tar")
    path.write_bytes(path.read_bytes()[:1800])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_root, "got nothing at .*gone"),
        (_empty, "found neither folders nor tar files"),
        (_empty_classes, "images in class folders, found none"),
        (_one_empty_class, "found none in cat"),
        (_flat, "found neither folders nor tar files"),
        (_stray, "such as stray.png"),
        (_text_file, "wanted a folder or a .tar file, got the file .*list.csv"),
        (_fake_tar, "wanted an uncompressed tar file"),
        (_tar_of_text, "found none"),
        (_cut_tar, "wanted a whole tar file"),
        (_empty_tar, "wanted an uncompressed tar file"),
        (lambda root: root, "holds the splits train, val; name one"),
    ],
)
def test_wrong_root(folders: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_classification_dataset(make(folders))


@pytest.mark.parametrize("blocks", [3, 5, 6, 9, 12])
def test_tar_cut_between_members(folders: Path, tmp_path: Path, blocks: int) -> None:
    """Python's tarfile would end there without a word, one class short."""
    path = _tar(folders / "train", tmp_path / "t.tar")
    path.write_bytes(path.read_bytes()[: 512 * blocks])
    with pytest.raises(ValueError, match=r"wanted (a whole|an uncompressed) tar file"):
        create_classification_dataset(path)


def test_wrong_split(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no split 'trian' in .*; found train, val"):
        create_classification_dataset(folders, "trian")
    with pytest.raises(ValueError, match=r"no split 'val' in .*; found class10, class2"):
        create_classification_dataset(folders / "train", "val")
    path = _tar(folders / "train", tmp_path / "train.tar")
    with pytest.raises(ValueError, match="a file is one split, got split='train'"):
        create_classification_dataset(path, "train")


@pytest.mark.parametrize("packed", [False, True])
def test_corrupt_image_is_named_not_skipped(folders: Path, tmp_path: Path, packed: bool) -> None:
    (folders / "train" / "class10" / "1.png").write_bytes(b"no image")
    root = _tar(folders / "train", tmp_path / "t.tar") if packed else folders / "train"
    dataset = create_classification_dataset(root)
    readable = 0
    for i in range(6):
        if i == 4:
            with pytest.raises(ImageReadError, match=r"t(\.tar|rain)/class10/1\.png"):
                dataset[i]
        else:
            readable += dataset[i]["image"].shape == (5, 4, 3)
    assert readable == 5


def test_image_deleted_after_the_listing(folders: Path) -> None:
    dataset = create_classification_dataset(folders, "train")
    (folders / "train" / "class10" / "0.png").unlink()
    with pytest.raises(ImageReadError, match=r"class10/0\.png.*No such file"):
        dataset[3]


def _values(batch: list[dict]) -> list[tuple[int, int]]:
    return [(int(s["image"][0, 0, 0]), s["label"]) for s in batch]


def test_tar_in_workers(folders: Path, tmp_path: Path) -> None:
    """A tar file opened before the fork must not share its position among the workers."""
    dataset = create_classification_dataset(_tar(folders / "train", tmp_path / "t.tar"))
    want = _values([dataset[i] for i in range(6)])  # opens the file here
    loader = DataLoader(dataset, 1, num_workers=2, collate_fn=_values)
    assert [v for _ in range(5) for batch in loader for v in batch] == want * 5
    twin = pickle.loads(pickle.dumps(dataset))  # as for workers that are spawned
    assert _values([twin[i] for i in range(6)]) == want


def test_torchvision(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'torch/cifar10' in .*download=True"):
        create_classification_dataset(tmp_path, "train", name="torch/cifar10")
    with pytest.raises(ValueError, match="no split 'trian'"):
        create_classification_dataset(tmp_path, "trian", name="torch/cifar10")
    with pytest.raises(ValueError, match="got 'tfds/mnist'"):
        create_classification_dataset(tmp_path, "train", name="tfds/mnist")
    with pytest.raises(ValueError, match="torchvision data set 'torch/cifar11'"):
        create_classification_dataset(tmp_path, "train", name="torch/cifar11")


def test_torchvision_folder(folders: Path) -> None:
    dataset = create_classification_dataset(folders, "train", name="torch/image_folder")
    assert dataset.classes == ("class10", "class2")
    assert len(dataset) == 6
    assert dataset[0]["image"].shape == (5, 4, 3)


def test_cifar10_folder(shared: Path) -> None:
    root = shared / "data" / "cifar10_small"
    for split, count in (("train", 500), ("val", 100)):
        dataset = create_classification_dataset(root, split, num_classes=10)
        assert dataset.classes == CIFAR10
        assert len(dataset) == 10 * count
        picked = [dataset[i * count] for i in range(10)]
        assert [sample["label"] for sample in picked] == list(range(10))
        assert picked[0]["image"].shape == (32, 32, 3)


def test_cifar10_tar(shared: Path) -> None:
    root = shared / "data" / "cifar10_jpeg"
    dataset = create_classification_dataset(root / "test.tar", num_classes=10)
    assert dataset.classes == CIFAR10
    assert len(dataset) == 9000
    assert [dataset[i * 900]["label"] for i in range(10)] == list(range(10))
    # The folder's val images are the first hundred of each class of the tar file.
    small = create_classification_dataset(shared / "data" / "cifar10_small", "val")
    for label in (0, 4, 9):
        assert np.array_equal(dataset[label * 900]["image"], small[label * 100]["image"])
    assert len(create_classification_dataset(root, "train")) == 30000
