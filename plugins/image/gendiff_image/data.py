"""Image data sets: found, checked and decoded once, then served as tensors in [-1, 1].

Small sets are held in memory as bytes. Pictures in folders (and CelebA) are decoded once, all of
them, which finds every damaged file before training starts; the decoded bytes are kept in the
cache folder (``$GENDIFF_CACHE``, else ``$XDG_CACHE_HOME/gendiff``, else ``~/.cache/gendiff``) and
mapped from there. A set that would take more than 4 GiB is decoded anew at each use. So pictures
in folders may be more than memory holds.

Splits are a function of the data alone. MNIST, Fashion-MNIST, CIFAR-10 and CelebA keep their own
(CelebA's validation part is not used). Digits hold out 360 of 1797 images, stratified. A folder
may have ``train`` and ``test`` sub-folders; otherwise a file is held out when the hash of its name
is in the lowest tenth of all hashes, so that adding files moves hardly any other file across.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import pickle
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, MNIST, CelebA, FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.transforms.v2 import functional as tvf

from gendiff.data import content_of
from gendiff.errors import DataError
from gendiff.modality import DataReport
from gendiff.noise import derive_seed
from gendiff.preparing import Mapped, Rows, Told, spread, written
from gendiff.runs import cache_folder

if TYPE_CHECKING:
    from gendiff_image.plugin import ImageConfig

Pixels = NDArray[np.uint8]

_PACK_BYTES = 4 << 30  # decoded sets up to this size are kept in the cache folder
_MOST_PIXELS = 178_956_970  # of a picture, as Pillow's own limit
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # at half of that
_PIECE = 64  # pictures that a process decodes at a time
_FEW_BYTES = 16 << 20  # of files that are decoded here, as a process takes seconds to start
_FORMAT = 3  # of the files in the cache folder
_FILES_OF = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte.gz, …",
    "fashion_mnist": "FashionMNIST/raw/train-images-idx3-ubyte.gz, …",
    "cifar10": "cifar-10-batches-py/data_batch_1 … 5, test_batch and batches.meta",
    "celeba": "celeba/img_align_celeba/*.jpg and celeba/*.txt",
}


class Source(Protocol):
    """Images by number, uint8 (C, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pixels: ...


@dataclass(frozen=True)
class Split:
    """One split: images, their classes (N,) if they have any, and the value that means white."""

    images: Source
    labels: NDArray[np.int64] | None
    peak: int = 255

    def tensor(self, limit: int) -> tuple[Tensor, Tensor | None]:
        """Up to ``limit`` images, evenly spread over the split: x (n, C, H, W), labels (n,)."""
        count = min(limit, len(self.images))
        chosen = np.arange(count) * len(self.images) // count
        with ThreadPoolExecutor(_threads()) as pool:
            x = np.stack(list(pool.map(self.images.__getitem__, chosen.tolist())))
        labels = None if self.labels is None else torch.from_numpy(self.labels[chosen])
        return torch.from_numpy(to_unit(x, self.peak)), labels


@dataclass(frozen=True)
class Data:
    """A data set: both splits and what is known about them; ``content`` names what was read."""

    train: Split
    test: Split
    class_names: list[str] | None
    content: str
    levels: int = 256
    warnings: tuple[str, ...] = ()


def to_unit(pixels: Pixels, peak: int) -> NDArray[np.float32]:
    """0 … ``peak`` to [-1, 1], float32, any shape."""
    return np.multiply(pixels, np.float32(2 / peak), dtype=np.float32, order="C") - np.float32(1)


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
        return _decode(_folder(root), size, color, skip_bad)
    try:
        if name == "celeba":
            return _decode(_celeba(root, download), size, color, skip_bad)
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
    images, labels = _fit(images, size, color), bunch.target.astype(np.int64)
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
    return Split(_fit(np.ascontiguousarray(images), size, color), known)


def _fit(images: Pixels, size: tuple[int, int] | None, color: str | None) -> Pixels:
    """Converts the colour of images (N, C, H, W), resizes the shorter side, crops the centre."""
    x = torch.from_numpy(images)
    if color == "rgb" and x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    elif color == "grey" and x.shape[1] == 3:
        x = tvf.rgb_to_grayscale(x)
    if size is not None and tuple(x.shape[2:]) != size:
        scale = max(size[0] / x.shape[2], size[1] / x.shape[3])
        near = [max(s, round(n * scale)) for s, n in zip(size, x.shape[2:], strict=True)]
        chunks = [tvf.resize(part, near, antialias=True) for part in x.split(4096)]
        x = torch.cat([tvf.center_crop(part, list(size)) for part in chunks])
    return np.ascontiguousarray(x.numpy())


# --- files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listing:
    """Files below a root, the split of each (True: held out), its class, the classes' names."""

    root: Path
    names: list[str]
    held_out: list[bool]
    labels: list[int] | None
    class_names: list[str] | None
    warnings: tuple[str, ...] = ()


def _folder(root: Path) -> _Listing:
    """Class folders or pictures side by side, divided into ``train`` and ``test`` or not.

    ``val`` stands in for a missing ``test``. A ``train`` beside neither is a class like others.
    """
    below = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    held = next((name for name in ("test", "val") if {"train", name} <= below), None)
    split = held is not None or below == {"train"}
    parts = (["train"] if split else [""]) + ([held] if held else [])
    found = [_pictures(root, part) for part in parts]
    names = [name for kept, _, _ in found for name in kept]
    for part, (kept, _, _) in zip(parts, found, strict=True):
        least = 1 if held else 2  # one of them is held out
        if len(kept) < least:
            raise DataError(
                f"data: {root / part} holds {len(kept)} pictures; {least} are the least. "
                f"Known endings: {' '.join(IMG_EXTENSIONS)}."
            )
    classes = found[0][1]
    if any(other != classes for _, other, _ in found):
        raise DataError(f"data: {root}/train and {root}/{held} have different class folders.")
    held_out = _hashed_split(names)
    if held:
        held_out = [i >= len(found[0][0]) for i in range(len(names))]
    labels = None
    if classes:
        numbers = {name: i for i, name in enumerate(classes)}
        labels = [numbers[name.split("/")[int(split)]] for name in names]  # train/cat/1.png
    lonely = sum(stray for _, _, stray in found)
    warnings = (f"{root}: {lonely} pictures beside the class folders are not used",)
    return _Listing(root, names, held_out, labels, classes or None, warnings if lonely else ())


def _pictures(root: Path, part: str) -> tuple[list[str], list[str], int]:
    """Names relative to ``root`` below one folder, its classes, and how many have none."""
    names: list[str] = []
    for folder, subfolders, files in os.walk(root / part, followlinks=True):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else below + "/"
        names += [prefix + f for f in sorted(files) if f.lower().endswith(IMG_EXTENSIONS)]
    start = len(part) + 1 if part else 0
    classes = sorted({n[start:].split("/")[0] for n in names if "/" in n[start:]})
    kept = [n for n in names if "/" in n[start:]] if classes else names
    return kept, classes, len(names) - len(kept)


def _hashed_split(names: Sequence[str]) -> list[bool]:
    """True for names whose hash is below a tenth of the range; at least one of each kind."""
    hashes = [hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names]
    tenth = (2**64 // 10).to_bytes(8, "big")
    lowest, highest = min(hashes), max(hashes)
    return [h == lowest or (h < tenth and h != highest) for h in hashes]


class _AnyCelebA(CelebA):  # type: ignore[misc]
    """torchvision's reader without its checksums: every picture is decoded here anyway."""

    file_list: ClassVar[Any] = [(key, None, name) for key, _, name in CelebA.file_list]


def _celeba(root: Path, download: bool) -> _Listing:
    if download:
        CelebA(str(root), download=True)
    folder = root / CelebA.base_folder
    missing = [
        name
        for _, _, name in CelebA.file_list
        if not name.endswith(".zip") and not (folder / name).is_file()
    ]
    if missing or not (folder / "img_align_celeba").is_dir():
        raise FileNotFoundError(f"no {folder / (missing or ['img_align_celeba'])[0]}")
    train, test = (list(_AnyCelebA(str(root), s).filename) for s in ("train", "test"))
    if not train or not test:
        raise DataError(f"data: {folder}/list_eval_partition.txt leaves a split empty.")
    held_out = [False] * len(train) + [True] * len(test)
    return _Listing(folder / "img_align_celeba", train + test, held_out, None, None)


def open_picture(path: Path, color: str | None, size: tuple[int, int] | None) -> Pixels:
    """Decodes a picture to (C, H, W): upright, 8 bits, in the colour and size asked for."""
    if path.exists() and not path.is_file():
        raise ValueError("not a file")  # a pipe would be waited for
    with Image.open(path) as opened:
        opened.load()
        image: Image.Image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("32-bit pixels")
    elif image.mode == "1":
        image = image.convert("L")
    transparent = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if transparent else "RGB")
    if color is not None and transparent:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if color is not None:
        image = image.convert("L" if color == "grey" else "RGB")
    array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    if size is not None:
        scale = max(size[0] / array.shape[1], size[1] / array.shape[2])
        if array.shape[1] * array.shape[2] * scale**2 > _MOST_PIXELS:
            raise ValueError(
                f"{array.shape[1]}x{array.shape[2]}, too narrow to be cropped to "
                f"{size[0]}x{size[1]}"
            )
    fitted: Pixels = _fit(np.array(array)[None], size, None)[0]
    return fitted


@dataclass(frozen=True)
class _Files:
    """Pictures decoded at each use."""

    root: Path
    names: list[str]
    color: str | None
    size: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pixels:
        return open_picture(self.root / self.names[index], self.color, self.size)


@dataclass(frozen=True)
class _Packed:
    """Rows of a file of decoded pictures."""

    pixels: Mapped
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pixels:
        return np.asarray(self.pixels[self.rows[index]])


def _decode(
    listing: _Listing, size: tuple[int, int] | None, color: str | None, skip_bad: bool
) -> Data:
    """Checks that every picture of a listing decodes to one shape, and packs them if they fit.

    What was found is cached under a hash of the names, sizes and times of the files, so that
    an unchanged folder is decoded once.
    """
    cache = cache_folder() / "image" / _fingerprint(listing, size, color)
    if not (cache / "index.json").exists():
        _scan(listing, size, color, cache)
    index = json.loads((cache / "index.json").read_text())
    bad: dict[str, str] = index["bad"]
    warnings = listing.warnings
    if bad:
        name, reason = next(iter(bad.items()))
        text = (
            f"{len(bad)} of {len(listing.names)} images cannot be decoded "
            f"(first: {listing.root / name}: {reason})"
        )
        if not skip_bad:
            them = "it" if len(bad) == 1 else "them"
            raise DataError(f"data: {text}. Remove {them} or set image.skip_bad=true.")
        warnings += tuple(f"left out: {listing.root / name}: {why}" for name, why in bad.items())

    good = np.array([i for i, name in enumerate(listing.names) if name not in bad])
    held_out = np.array(listing.held_out)[good]
    parts = []
    for rows in (np.flatnonzero(~held_out), np.flatnonzero(held_out)):
        if len(rows) == 0:
            raise DataError(f"data: no picture of a split of {listing.root} can be decoded.")
        packed = cache / "pixels.npy"
        images: Source
        if packed.exists():
            images = _Packed(Mapped(packed), rows)
        else:
            names = [listing.names[i] for i in good[rows]]
            images = _Files(listing.root, names, color, size)
        labels = None if listing.labels is None else np.array(listing.labels)[good[rows]]
        parts.append(Split(images, labels))
    return Data(parts[0], parts[1], listing.class_names, index["content"], warnings=warnings)


def _scan(listing: _Listing, size: tuple[int, int] | None, color: str | None, cache: Path) -> None:
    """Decodes every file; writes ``index.json`` and, if small enough, ``pixels.npy``."""
    bad: dict[str, str] = {}
    shapes: Counter[tuple[int, ...]] = Counter()
    example: dict[tuple[int, ...], str] = {}
    packed: Rows | None = None
    contents: list[str] = []  # of each file
    with written(cache) as new, ExitStack() as open_files:
        for i, found in enumerate(_decoded(listing, size, color)):
            name = listing.names[i]
            contents.append(f"{name} {listing.held_out[i]} {found.content}")
            if found.shape is None:
                bad[name] = found.wrong
                continue
            shapes[found.shape] += 1
            example.setdefault(found.shape, name)
            if found.pixels is not None and len(shapes) == 1:
                if packed is None:
                    packed = Rows(new / "pixels.npy", np.uint8, found.shape)
                    open_files.enter_context(packed)
                packed.append(found.pixels)
        if len(shapes) > 1:
            _refuse_shapes(listing.root, shapes, example)
        about = {"bad": bad, "content": content_of(contents)}
        (new / "index.json").write_text(json.dumps(about))


@dataclass(frozen=True)
class _Decoded:
    """A picture of a listing.

    Args:
        content: What the file holds, by a name.
        wrong: Why it cannot be decoded, else "".
        shape: Of the picture; None if it cannot be decoded.
        pixels: They, if they are to be packed.
    """

    content: str
    wrong: str = ""
    shape: tuple[int, ...] | None = None
    pixels: Pixels | None = None


def _decoded(
    listing: _Listing, size: tuple[int, int] | None, color: str | None
) -> Iterator[_Decoded]:
    """The pictures in their order, decoded in worker processes where they are worth it."""
    names = listing.names
    # Packed, a piece is a 256th of them or less, so at most 16 MiB.
    piece = min(_PIECE, max(1, len(names) // 256))
    pieces = [names[i : i + piece] for i in range(0, len(names), piece)]
    few = len(pieces) if _fewer(listing, _FEW_BYTES) else 0
    work = partial(_decoded_piece, listing.root, size, color, _PACK_BYTES // len(names))
    told, done = Told(), 0
    for found in spread(work, pieces, few):
        yield from found
        done += len(found)
        told("pictures", done, len(names))


def _fewer(listing: _Listing, size: int) -> bool:
    """Whether a listing's files have no more than ``size`` bytes together."""
    for name in listing.names:
        with suppress(OSError):
            size -= (listing.root / name).stat().st_size
        if size < 0:
            return False
    return True


def _decoded_piece(
    root: Path,
    size: tuple[int, int] | None,
    color: str | None,
    largest: int,
    names: Sequence[str],
) -> list[_Decoded]:
    """Pictures of these names; without the pixels of one that has more than ``largest``."""
    found = []
    for name in names:
        content, wrong = content_of([root / name]), ""
        try:
            pixels = open_picture(root / name, color, size)
        except UnidentifiedImageError:
            wrong = "not a picture"
        except FileNotFoundError:
            wrong = "no such file"
        except MemoryError:  # no fault of the picture's
            raise
        except Exception as error:  # decoders raise nearly anything on damaged files
            wrong = "truncated" if "truncated" in str(error) else str(error) or repr(error)
        if wrong:
            found.append(_Decoded(content, wrong))
        else:
            kept = pixels if pixels.nbytes <= largest else None
            found.append(_Decoded(content, "", pixels.shape, kept))
    return found


def _refuse_shapes(
    root: Path, shapes: Counter[tuple[int, ...]], example: Mapping[tuple[int, ...], str]
) -> None:
    """Says which setting makes all pictures alike."""
    (first, _), (other, _) = shapes.most_common(2)
    keys = [
        key
        for key, differs in (
            ("image.color=rgb", len({s[0] for s in shapes}) > 1),
            ("image.size=64, for example", len({s[1:] for s in shapes}) > 1),
        )
        if differs
    ]
    shown = [f"{example[s]} is {'x'.join(map(str, s))}" for s in (first, other)]
    raise DataError(
        f"data: the pictures in {root} have {len(shapes)} different shapes "
        f"({shown[0]}, {shown[1]}). Set {' and '.join(keys)}."
    )


def _fingerprint(listing: _Listing, size: tuple[int, int] | None, color: str | None) -> str:
    digest = hashlib.blake2b(digest_size=12)
    digest.update(json.dumps([_FORMAT, str(listing.root.resolve()), size, color]).encode())
    for name in listing.names:
        try:
            stat = (listing.root / name).stat()
            facts = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
        except OSError:
            facts = f"{name}\0missing\n"
        digest.update(os.fsencode(facts))
    return digest.hexdigest()


def _threads() -> int:
    return min(16, os.cpu_count() or 1)
