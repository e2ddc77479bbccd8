"""Classification data sets of folders, tar files and torchvision, found by timm's readers."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vision.data.image_io import ImageReadError, LabelError, decode_image

# Names that mean the same split, as in timm.
_SYNONYMS = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
    ("test",),
)
_SPLIT_NAMES = tuple(name for names in _SYNONYMS for name in names)


class ClassificationDataset(Dataset):
    """Images with a class each; made by `create_classification_dataset`.

    A sample is a dict with "image", uint8 RGB (H, W, 3), and "label", int.

    Args:
        load: gives image and label of a sample by its index.
        labels: of all samples, integers (N,), or None when they are not known without reading.
        length: number of samples.
        classes: name of each class, by label.
        source: what error messages call the data set.
        transform: applied to each sample; its result is returned.

    Raises:
        LabelError: a label is outside of the classes.
    """

    def __init__(
        self,
        load: Callable[[int], tuple[np.ndarray, int]],
        labels: np.ndarray | None,
        length: int,
        classes: tuple[str, ...],
        source: str,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.classes, self.source, self.transform = classes, source, transform
        self._load, self._length = load, length
        if labels is not None:
            for label in np.unique(labels):
                self._check(int(label))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if not -self._length <= index < self._length:
            raise IndexError(f"sample {index} of {self._length} in {self.source}")
        image, label = self._load(index % self._length)
        self._check(label)
        sample = {"image": image, "label": label}
        return sample if self.transform is None else self.transform(sample)

    def _check(self, label: int) -> None:
        if not 0 <= label < len(self.classes):
            raise LabelError(
                f"{self.source}: wanted labels 0..{len(self.classes) - 1} ({len(self.classes)} "
                f"classes), got {label}; correct the class map or the number of classes"
            )


class _ReaderImages:
    """Image and label by index from a timm reader; top-level, so that workers can pickle it."""

    def __init__(self, reader: Any, source: str) -> None:
        self.reader, self.source = reader, source

    def __call__(self, index: int) -> tuple[np.ndarray, int]:
        # Not through timm's ImageDataset: it replaces an unreadable image by the next one.
        name = os.path.join(self.source, self.reader.filename(index))
        try:
            file, label = self.reader[index]
        except OSError as error:
            raise ImageReadError(
                f"{name}: wanted an image file, cannot open it ({error.strerror}); it was there "
                "when the data set was opened"
            ) from error
        with file:
            return decode_image(file, name), int(label)


class _TorchvisionImages:
    """Image and label by index from a torchvision data set of PIL images."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, index: int) -> tuple[np.ndarray, int]:
        image, label = self.dataset[index]
        return np.array(image.convert("RGB")), int(label)


def create_classification_dataset(
    root: str | os.PathLike[str],
    split: str | None = None,
    class_map: Mapping[str, int] | str | os.PathLike[str] | None = None,
    name: str = "",
    num_classes: int | None = None,
    transform: Callable[[dict[str, Any]], Any] | None = None,
    download: bool = False,
) -> ClassificationDataset:
    """Open a classification data set through timm.

    - Folders: `root/SPLIT/CLASS/*.jpg`, or `root/CLASS/*.jpg` with `split=None`; ImageNet as
      published for timm (`train/n01440764/...`) is one.
    - Tar files: `root` is `SPLIT.tar` with members `CLASS/*.jpg` and `split=None`, or `root` is a
      folder that holds SPLIT.tar. Read in place, in any number of workers.
    - torchvision: `name` "torch/cifar10", "torch/cifar100", "torch/mnist", ...

    Classes are sorted by name in natural order ("class2" before "class10") unless `class_map` says
    otherwise. An unreadable image raises when it is asked for; none is skipped.

    Args:
        root: folder or tar file.
        split: "train", "val", "test" or one of their synonyms ("validation", ...), or the name of
            a subfolder; None reads `root` itself.
        class_map: label by class folder, or a text file with one class folder a line. Images of
            other folders are left out. For folders and tar files only.
        name: timm's data set name; empty for folders and tar files.
        num_classes: how many classes are wanted; None: as many as there are.
        transform: applied to each sample, a dict with "image" and "label".
        download: let torchvision fetch what is missing.

    Returns:
        A map-style data set with `classes`, the names by label.

    Raises:
        ValueError: no such root or split, no images, images without a class folder, class folders
            without images, or another number of classes than wanted.
        LabelError: labels of `class_map` leave a gap, or are outside of `num_classes`.
    """
    place = Path(root)
    if name:
        dataset = _open_torchvision(name, place, split, class_map, transform, download)
    else:
        if download:
            raise ValueError("download is for torchvision data sets (name='torch/...'); leave it")
        dataset = _open_files(_find_split(place, split), class_map, num_classes, transform)
    if num_classes is not None and len(dataset.classes) != num_classes:
        shown = ", ".join(dataset.classes[:10]) + (", ..." if len(dataset.classes) > 10 else "")
        raise ValueError(
            f"wanted {num_classes} classes, got {len(dataset.classes)} in {dataset.source} "
            f"({shown}); correct num_classes or the class folders"
        )
    return dataset


def _open_files(
    place: Path,
    class_map: Mapping[str, int] | str | os.PathLike[str] | None,
    num_classes: int | None,
    transform: Callable[[dict[str, Any]], Any] | None,
) -> ClassificationDataset:
    import tarfile

    from timm.data.readers import create_reader

    options: dict[str, Any] = {}
    if place.is_file():
        # Open tar files would share their position among forked workers.
        options["cache_tarfiles"] = False
        _check_tar(place)
    wanted = _load_class_map(class_map)
    if wanted is not None:
        options["class_map"] = wanted
    try:
        reader = create_reader("", root=str(place), **options)
    except tarfile.TarError as error:
        raise ValueError(f"{place}: wanted a whole tar file, got {error}; copy it again") from error
    except (RuntimeError, ValueError) as error:  # timm found no image
        which = "in class folders" if wanted is None else f"of the classes {', '.join(wanted)}"
        raise ValueError(f"{place}: wanted images {which}, found none; check root") from error
    found: dict[str, int] = getattr(reader, "class_to_idx", None) or reader.class_name_to_idx
    labels = np.array([label for _, label in reader.samples] if place.is_dir() else reader.targets)
    if wanted is None:
        if "" in found:
            raise ValueError(
                f"{place}: wanted images in class folders, got images without one, such as "
                f"{reader.filename(int(np.argmax(labels == found[''])))}; make a folder a class"
            )
        classes = tuple(sorted(found, key=lambda k: found[k]))
        if place.is_dir():
            _check_class_folders(place, reader)
    else:
        classes = _classes_of_map(wanted, num_classes, str(place))
        present = set(labels.tolist())
        missing = [name for name, label in wanted.items() if label not in present]
        if missing:
            raise ValueError(
                f"{place}: wanted images of every class in class_map, got none of "
                f"{', '.join(missing[:10])}; correct the names or the folder"
            )
    images = _ReaderImages(reader, str(place))
    return ClassificationDataset(images, labels, len(reader), classes, str(place), transform)


def _open_torchvision(
    name: str,
    place: Path,
    split: str | None,
    class_map: object,
    transform: Callable[[dict[str, Any]], Any] | None,
    download: bool,
) -> ClassificationDataset:
    if not name.startswith("torch/"):
        raise ValueError(
            f"name wants '' (folders, tar files) or 'torch/...' (torchvision), got {name!r}"
        )
    if split not in _SPLIT_NAMES:
        raise ValueError(f"{name}: no split {split!r}; there are {', '.join(_SPLIT_NAMES)}")
    if class_map is not None:
        raise ValueError(f"{name}: class_map is for folders and tar files; leave it out")
    from timm.data import create_dataset

    try:
        dataset = create_dataset(name, root=str(place), split=split, download=download)
    except (RuntimeError, OSError, AssertionError) as error:
        raise ValueError(
            f"wanted the torchvision data set {name!r} in {place}, got: {error}; check name and "
            "root, or fetch the data with download=True"
        ) from error
    classes = tuple(str(c) for c in dataset.classes)
    images = _TorchvisionImages(dataset)
    return ClassificationDataset(images, None, len(dataset), classes, f"{name} {place}", transform)


def _find_split(place: Path, split: str | None) -> Path:
    """Return the folder or tar file of a split; timm would fall back to `place` silently."""
    if place.is_file():
        if split is not None:
            raise ValueError(
                f"{place}: a file is one split, got split={split!r} too; pass split=None"
            )
        if place.suffix.lower() != ".tar":
            raise ValueError(f"wanted a folder or a .tar file, got the file {place}")
        return place
    if not place.is_dir():
        raise ValueError(
            f"wanted a folder or a .tar file, got nothing at {place}; check root, seen from "
            f"{Path.cwd()}"
        )
    entries = sorted(e.name for e in place.iterdir() if e.is_dir() or e.suffix.lower() == ".tar")
    if not entries:
        raise ValueError(
            f"wanted class folders or splits in {place}, found neither folders nor tar files"
        )
    splits = [e for e in entries if e.removesuffix(".tar") in _SPLIT_NAMES]
    if split is None:
        if splits:
            raise ValueError(
                f"{place} holds the splits {', '.join(splits)}; name one of them with split="
            )
        return place
    same = next((names for names in _SYNONYMS if split in names), ())
    for candidate in (split, *same):
        for found in (place / candidate, place / f"{candidate}.tar"):
            if found.name in entries:
                return found
    shown = ", ".join(entries[:10]) + (", ..." if len(entries) > 10 else "")
    raise ValueError(
        f"no split {split!r} in {place}; found {shown}; split=None reads the folder itself"
    )


def _check_tar(place: Path) -> None:
    """Check that a tar file is whole and holds images.

    The tarfile module takes a file that was cut off for a shorter one, and timm fails on one
    without images without saying why.
    """
    import tarfile

    from timm.data.readers.img_extensions import get_img_extensions

    suffixes = get_img_extensions(as_set=True) | {".tar"}
    try:
        with tarfile.open(place, "r:") as tar:
            found = any(Path(m.name).suffix.lower() in suffixes for m in tar if m.isfile())
    except tarfile.TarError as error:
        raise ValueError(
            f"{place}: wanted an uncompressed tar file, got none ({error}); pack it with tar -cf"
        ) from error
    with place.open("rb") as file:
        file.seek(-1024, os.SEEK_END)
        if any(file.read()):
            raise ValueError(
                f"{place}: wanted a whole tar file, got one without its end mark (two blocks of "
                f"zeros) after {place.stat().st_size} bytes; copy it again"
            )
    if not found:
        raise ValueError(f"{place}: wanted images CLASS/NAME.jpg in the tar file, found none")


def _check_class_folders(place: Path, reader: Any) -> None:
    """Refuse class folders without images: the labels of the later classes would shift."""
    filled = {Path(path).relative_to(place).parts[0] for path, _ in reader.samples}
    empty = sorted(
        e.name for e in place.iterdir() if e.is_dir() and e.name[0] != "." and e.name not in filled
    )
    if empty:
        raise ValueError(
            f"{place}: wanted images in every class folder, found none in {', '.join(empty[:10])}; "
            "labels of the other classes would shift: fill or remove them, or pass class_map"
        )


def _load_class_map(
    class_map: Mapping[str, int] | str | os.PathLike[str] | None,
) -> dict[str, int] | None:
    if class_map is None:
        return None
    if isinstance(class_map, Mapping):
        wanted = dict(class_map)
    else:
        place = Path(class_map)
        if place.suffix != ".txt" or not place.is_file():
            raise ValueError(
                f"class_map wants a dict or an existing .txt file with a class a line, got {place}"
            )
        lines = [line.strip() for line in place.read_text(encoding="utf-8").splitlines()]
        wanted = {line: label for label, line in enumerate(line for line in lines if line)}
    if not wanted:
        raise ValueError("class_map wants at least one class, got none")
    return wanted


def _classes_of_map(
    wanted: dict[str, int], num_classes: int | None, source: str
) -> tuple[str, ...]:
    labels = set(wanted.values())
    count = len(labels) if num_classes is None else num_classes
    wrong = sorted(label for label in labels if not 0 <= label < count)
    if wrong:
        raise LabelError(
            f"{source}: class_map wants labels 0..{count - 1} ({count} classes), got "
            f"{', '.join(map(str, wrong[:10]))}; number the classes without a gap"
        )
    names: list[list[str]] = [[] for _ in range(count)]
    for folder, label in wanted.items():
        names[label].append(folder)
    return tuple("/".join(folders) for folders in names)
