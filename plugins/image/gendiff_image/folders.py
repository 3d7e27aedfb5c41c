"""Pictures in files: found, decoded once, and mapped from the cache.

All are decoded, in worker processes, which finds every damaged file before training starts; the
decoded bytes are kept in the cache folder (``$GENDIFF_CACHE``, else ``$XDG_CACHE_HOME/gendiff``,
else ``~/.cache/gendiff``) and mapped from there. A set that would take more than 4 GiB is decoded
anew at each use. So pictures in folders may be more than memory holds.

CelebA keeps its own split (its validation part is not used). A folder may have ``train`` and
``test`` sub-folders; otherwise a file is held out when the hash of its name is in the lowest tenth
of all hashes, so that adding files moves hardly any other file across.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets import CelebA
from torchvision.datasets.folder import IMG_EXTENSIONS

from gendiff.data import content_of
from gendiff.errors import DataError
from gendiff.preparing import Mapped, Rows, Told, spread, written
from gendiff.runs import cache_folder
from gendiff_image.sets import Data, Pixels, Source, Split, fit

_PACK_BYTES = 4 << 30  # decoded sets up to this size are kept in the cache folder
_MOST_PIXELS = 178_956_970  # of a picture, as Pillow's own limit
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # at half of that
_PIECE = 64  # pictures that a process decodes at a time
_FEW_BYTES = 16 << 20  # of files that are decoded here, as a process takes seconds to start
_FORMAT = 3  # of the files in the cache folder


@dataclass(frozen=True)
class Listing:
    """Files below a root, the split of each (True: held out), its class, the classes' names."""

    root: Path
    names: list[str]
    held_out: list[bool]
    labels: list[int] | None
    class_names: list[str] | None
    warnings: tuple[str, ...] = ()


def folder(root: Path) -> Listing:
    """Class folders or pictures side by side, divided into ``train`` and ``test`` or not.

    ``val`` stands in for a missing ``test``. A ``train`` beside neither is a class like others.

    Raises:
        DataError: There are too few, or the splits have different classes.
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
    return Listing(root, names, held_out, labels, classes or None, warnings if lonely else ())


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


def celeba(root: Path, download: bool) -> Listing:
    """CelebA's pictures in torchvision's layout.

    Raises:
        FileNotFoundError: Some of it is not there.
        DataError: A split is empty.
    """
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
    return Listing(folder / "img_align_celeba", train + test, held_out, None, None)


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
    fitted: Pixels = fit(np.array(array)[None], size, None)[0]
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


def decode(
    listing: Listing, size: tuple[int, int] | None, color: str | None, skip_bad: bool
) -> Data:
    """Checks that every picture of a listing decodes to one shape, and packs them if they fit.

    What was found is cached under a hash of the names, sizes and times of the files, so that
    an unchanged folder is decoded once.

    Args:
        listing: The files.
        size: Height and width to which all are brought; None to leave them.
        color: ``grey``, ``rgb``, or None to leave them.
        skip_bad: Leave out what cannot be decoded, with a warning.

    Raises:
        DataError: Some cannot be decoded, their shapes differ, or the cache cannot be written.
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


def _scan(listing: Listing, size: tuple[int, int] | None, color: str | None, cache: Path) -> None:
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
    listing: Listing, size: tuple[int, int] | None, color: str | None
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


def _fewer(listing: Listing, size: int) -> bool:
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


def _fingerprint(listing: Listing, size: tuple[int, int] | None, color: str | None) -> str:
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
