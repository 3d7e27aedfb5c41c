"""Image data sets: those that fit in memory, and any of them as the engine reads it.

All are served as tensors in [-1, 1]. Pictures in folders, and CelebA, are the subject of
:mod:`gendiff_image.folders`; small sets are held in memory as bytes. Splits are a function of the
data alone. MNIST, Fashion-MNIST and CIFAR-10 keep their own. Digits hold out 360 of 1797 images,
stratified.
"""

from __future__ import annotations

import gzip
import math
import pickle
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file

from gendiff.data import content_of
from gendiff.errors import DataError
from gendiff.modality import DataReport
from gendiff.noise import derive_seed
from gendiff_image import folders
from gendiff_image.sets import Data, Pixels, Split, fit, to_unit

if TYPE_CHECKING:
    from gendiff_image.plugin import ImageConfig

_FILES_OF = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte.gz, …",
    "fashion_mnist": "FashionMNIST/raw/train-images-idx3-ubyte.gz, …",
    "cifar10": "cifar-10-batches-py/data_batch_1 … 5, test_batch and batches.meta",
    "celeba": "celeba/img_align_celeba/*.jpg and celeba/*.txt",
}


class Images(Dataset[tuple[Tensor, int | None]]):
    """A split as the engine reads it: ``images[index, seed]`` is (x (C, H, W), label or None)."""

    def __init__(self, split: Split, *, labelled: bool, flip: bool) -> None:
        self.split, self.flip = split, flip
        self.labels = split.labels if labelled else None

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int | None]:
        index, seed = key
        pixels = self.split.images[index]
        if self.flip and derive_seed("flip", seed, index) & 1:
            pixels = pixels[..., ::-1]
        x = torch.from_numpy(to_unit(pixels, self.split.peak))
        return x, None if self.labels is None else int(self.labels[index])


def prepare(config: ImageConfig) -> DataReport:
    """Loads and checks both splits.

    Raises:
        DataError: The data is missing, empty or damaged.
    """
    _load.cache_clear()  # what is on the disk now, not what was there at the last call
    data = _data(config)
    channels, height, width = data.train.images[0].shape
    facts = {
        "data": config.data,
        "channels": channels,
        "height": height,
        "width": width,
        "levels": data.levels,
        "classes": None if data.class_names is None else len(data.class_names),
        "class_names": data.class_names,
        "train": len(data.train.images),
        "test": len(data.test.images),
        "content": data.content,
    }
    kinds = f", {facts['classes']} classes" if data.class_names else ", no classes"
    summary = (
        f"{config.data}: {facts['train']} training and {facts['test']} held-out images, "
        f"{channels}x{height}x{width}{kinds}"
    )
    return DataReport(summary, facts, data.warnings)


def dataset(config: ImageConfig, facts: Mapping[str, Any], split: str) -> Images:
    """The split ``"train"`` or ``"test"``; only training images are ever mirrored."""
    data = reference(config, facts)
    labelled = config.class_conditional and data.class_names is not None
    part = {"train": data.train, "test": data.test}[split]
    return Images(part, labelled=labelled, flip=config.flip and split == "train")


def reference(config: ImageConfig, facts: Mapping[str, Any]) -> Data:
    """The data that ``facts`` describe.

    Raises:
        DataError: It has changed since.
    """
    data = _data(config)
    for name, part in (("train", data.train), ("test", data.test)):
        if len(part.images) != facts[name]:
            raise DataError(
                f"data: {facts[name]} {name} images when the run began, {len(part.images)} now "
                f"({config.path or config.data}). Restore the data, or start another run."
            )
    return data


def _data(config: ImageConfig) -> Data:
    size = (config.size, config.size) if isinstance(config.size, int) else config.size
    return _load(config.data, config.path, size, config.color, config.download, config.skip_bad)


@lru_cache(maxsize=2)
def _load(
    name: str,
    path: str | None,
    size: tuple[int, int] | None,
    color: str | None,
    download: bool,
    skip_bad: bool,
) -> Data:
    if name == "digits":
        return _digits(size, color)
    if path is None:
        what = _FILES_OF.get(name, "your pictures")
        raise DataError(f"image.path: not set. Give the folder that holds {what}.")
    root = Path(path).expanduser()
    if not root.is_dir() and not download:
        raise DataError(f"image.path: there is no folder {root}.")
    if name == "folder":
        return folders.decode(folders.folder(root), size, color, skip_bad)
    try:
        if name == "celeba":
            return folders.decode(folders.celeba(root, download), size, color, skip_bad)
        loader = _cifar10 if name == "cifar10" else _mnist
        return loader(name, root, download, size, color)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(
            f"data: {name} is not in {root} ({error}). It needs {_FILES_OF[name]}; "
            f"set image.path to the folder that holds them, or image.download=true."
        ) from error
    except Exception as error:  # torchvision and pickle raise anything on damaged files
        raise DataError(
            f"data: {name} in {root} cannot be read ({error or type(error).__name__}). "
            f"Remove the damaged files and fetch them again."
        ) from error


# --- sets that fit in memory -------------------------------------------------------------------


def _digits(size: tuple[int, int] | None, color: str | None) -> Data:
    """scikit-learn's 1797 8x8 digits with 17 grey levels; 360 held out by a fixed seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]  # (1797, 1, 8, 8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=360, random_state=0, stratify=bunch.target
    )
    peak = 16
    if size not in (None, (8, 8)):  # interpolate between more than 17 levels
        images, peak = (images * 15.9375).round().astype(np.uint8), 255
    images, labels = fit(images, size, color), bunch.target.astype(np.int64)
    parts = [Split(images[ids], labels[ids], peak) for ids in (np.sort(train), np.sort(test))]
    names = [str(i) for i in range(10)]
    return Data(parts[0], parts[1], names, content_of(["digits"]), levels=peak + 1)


def _mnist(
    name: str, root: Path, download: bool, size: tuple[int, int] | None, color: str | None
) -> Data:
    """MNIST or Fashion-MNIST; reads the .gz files too, so that the folder may be read-only."""
    kind = MNIST if name == "mnist" else FashionMNIST
    if download:
        kind(str(root), download=True)
    raw = root / kind.__name__ / "raw"
    parts, read = [], []
    for prefix in ("train", "t10k"):
        images = _unpacked(raw / f"{prefix}-images-idx3-ubyte", read_image_file).numpy()
        labels = _unpacked(raw / f"{prefix}-labels-idx1-ubyte", read_label_file).numpy()
        parts.append(_checked_split(images[:, None], labels, len(kind.classes), size, color))
        read += [images.tobytes(), labels.tobytes()]
    names = [c.split(" - ")[0] for c in kind.classes]  # MNIST's are "7 - seven"
    return Data(parts[0], parts[1], names, content_of(read))


def _unpacked(file: Path, read: Callable[[str], Tensor]) -> Tensor:
    """Reads an idx file, or its .gz through a temporary copy."""
    if file.is_file():  # neither a folder nor a pipe, which would be waited for
        return read(str(file))
    packed = file.with_name(file.name + ".gz")
    if not packed.is_file():
        raise FileNotFoundError(f"no {file.name}[.gz] in {file.parent}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        with gzip.open(packed) as source, copy.open("wb") as target:
            head = source.read(16)
            sizes = [int.from_bytes(head[i : i + 4], "big") for i in range(4, 16, 4)]
            told = 16 + (math.prod(sizes) if head[3:4] == b"\3" else sizes[0])
            target.write(head)
            while part := source.read(1 << 20):  # no more than the header tells of
                if target.tell() + len(part) > told:
                    raise DataError(f"data: {packed} holds more than its header tells of.")
                target.write(part)
        return read(str(copy))


class _AnyCIFAR10(CIFAR10):  # type: ignore[misc]
    """torchvision's reader without its checksums; :func:`_check_pickles` stands in for them."""

    train_list: ClassVar[Any] = [[name, None] for name, _ in CIFAR10.train_list]
    test_list: ClassVar[Any] = [[name, None] for name, _ in CIFAR10.test_list]
    meta: ClassVar[Any] = {**CIFAR10.meta, "md5": None}


def _cifar10(
    name: str, root: Path, download: bool, size: tuple[int, int] | None, color: str | None
) -> Data:
    """CIFAR-10, or any data in its format.

    torchvision accepts the published files only, by checksum. Here other files in the same format
    are welcome, with a warning, once they are known to hold arrays and nothing that runs.
    """
    if download:
        CIFAR10(str(root), download=True)
    folder = root / CIFAR10.base_folder
    needed = [n for n, _ in [*CIFAR10.train_list, *CIFAR10.test_list]] + [CIFAR10.meta["filename"]]
    for file in needed:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"no {folder / file}")
    warnings: tuple[str, ...] = ()
    try:
        sets = [CIFAR10(str(root), train) for train in (True, False)]
    except RuntimeError:  # a checksum differs
        _check_pickles([folder / file for file in needed])
        sets = [_AnyCIFAR10(str(root), train) for train in (True, False)]
        warnings = (f"{folder}: not the published CIFAR-10 files, but in their format",)
    classes = list(sets[0].classes)
    parts = [
        _checked_split(s.data.transpose(0, 3, 1, 2), s.targets, len(classes), size, color)
        for s in sets
    ]
    content = content_of(folder / file for file in needed)
    return Data(parts[0], parts[1], classes, content, warnings=warnings)


class _ArraysOnly(pickle.Unpickler):
    """Refuses a pickle that needs more than numpy arrays and plain values."""

    allowed: ClassVar[set[str]] = {
        "_reconstruct",
        "ndarray",
        "dtype",
        "scalar",
        "encode",
        "_frombuffer",
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self.allowed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to run {module}.{name}")


def _check_pickles(files: Iterable[Path]) -> None:
    for file in files:
        with file.open("rb") as stream:
            try:
                _ArraysOnly(stream, encoding="latin1").load()
            except Exception as error:  # anything may come out of a damaged pickle
                raise DataError(f"data: {file} is damaged or unsafe: {error}.") from error


def _checked_split(
    images: Pixels,
    labels: Sequence[int] | NDArray[np.int64],
    classes: int,
    size: tuple[int, int] | None,
    color: str | None,
) -> Split:
    known = np.asarray(labels, dtype=np.int64)
    if len(images) == 0 or len(images) != len(known):
        raise DataError(f"data: {len(images)} images with {len(known)} labels.")
    if known.min() < 0 or known.max() >= classes:
        raise DataError(f"data: labels {known.min()} to {known.max()} for {classes} classes.")
    return Split(fit(np.ascontiguousarray(images), size, color), known)
