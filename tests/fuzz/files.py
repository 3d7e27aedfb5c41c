"""Small data sets of each plugin, and what can be wrong with their files."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import soundfile
from PIL import Image

# --- made whole --------------------------------------------------------------------------------


def image(folder: Path) -> None:
    for kind in "cat", "dog":
        (folder / kind).mkdir(parents=True)
        for i in range(3):
            pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
            name = f"{i}.{('png', 'jpg', 'gif')[i]}"
            Image.fromarray(pixels).save(folder / kind / name)


def mnist(folder: Path) -> None:
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 6), ("t10k", 3)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8).tobytes()
        labels = bytes(i % 10 for i in range(count))
        for name, head, body in (
            ("images-idx3", struct.pack(">IIII", 2051, count, 28, 28), pixels),
            ("labels-idx1", struct.pack(">II", 2049, count), labels),
        ):
            (raw / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(head + body))


def cifar10(folder: Path) -> None:
    root = folder / "cifar-10-batches-py"
    root.mkdir(parents=True)
    pixels = np.zeros((2, 3072), np.uint8)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (root / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1]}))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))


MOL = """ethanol
  made     3D

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0
    1.5000    {y:.4f}    0.0000 C   0  0
    2.1000    1.3000    0.0000 O   0  0
  1  2  1  0
  2  3  1  0
M  END
> <mu>
{y}

$$$$
"""


def molecule(folder: Path) -> None:
    folder.mkdir(parents=True)
    texts = [MOL.format(y=0.1 * i) for i in range(4)]
    (folder / "a.sdf").write_text("".join(texts).replace("ethanol", "one"))
    (folder / "b.xyz").write_text("3\nmu=1.5\nC 0 0 0\nC 1.5 0 0\nN 2.1 1.2 0\n" * 2)
    (folder / "c.smi").write_text("CCO a\nCCN b\nC=O\n")
    numbers, positions = np.array([6, 8, 6, 7], np.uint8), np.eye(4, 3, dtype=np.float32) * 1.3
    np.savez(folder / "d.npz", numbers=numbers, positions=positions, offsets=np.array([0, 2, 4]))


def _wave(seconds: float, rate: int, hertz: float) -> Any:
    time = np.arange(int(seconds * rate)) / rate
    return 0.3 * np.sin(2 * np.pi * hertz * time)


def speech(folder: Path) -> None:
    for who in "ann", "bob":
        (folder / who).mkdir(parents=True)
        for i in range(2):
            soundfile.write(folder / who / f"{i}.wav", _wave(0.4, 22050, 200 + 50 * i), 22050)
    soundfile.write(folder / "ann" / "2.flac", _wave(0.4, 22050, 300), 22050)


def vocoder(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i in range(3):
        soundfile.write(folder / f"{i}.wav", _wave(0.5, 22050, 200 + 50 * i), 22050)
    np.save(folder / "mel.npy", np.zeros((80, 32), np.float32))


MAKERS: dict[str, Callable[[Path], None]] = {
    "image": image, "molecule": molecule, "speech": speech, "vocoder": vocoder,
}  # fmt: skip


# --- damaged -----------------------------------------------------------------------------------


def _some(folder: Path, dice: random.Random) -> Path:
    return dice.choice(sorted(p for p in folder.rglob("*") if p.is_file()))


def _spoil(folder: Path, dice: random.Random) -> None:
    """One file of a folder damaged, replaced by something else, or strangely named."""
    path = _some(folder, dice)
    match dice.randrange(14):
        case 0:
            path.write_bytes(b"")
        case 1:
            path.unlink()
            path.mkdir()
        case 2:
            path.unlink()
            path.symlink_to(dice.choice(("/dev/zero", "/dev/null", path.name, "/nowhere", "..")))
        case 3:
            path.unlink()
            os.mkfifo(path)
        case 4:
            path.write_bytes(dice.randbytes(dice.randrange(2000)))
        case 5:
            odd = dice.choice(("a\nb", "\udcff\udcfe", "a" * 240, " ", "-n", "\x1b[31m", "'"))
            path.rename(path.with_name(odd + path.suffix))
        case 6:
            path.chmod(0)
        case 7:
            other = _some(folder, dice)
            path.write_bytes(other.read_bytes())
        case _:
            path.write_bytes(hostile.damaged(path.read_bytes(), dice))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, bits: int, colour: int, body: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _absurd_picture(path: Path, dice: random.Random) -> None:
    match dice.randrange(5):
        case 0:
            width, height = dice.choice(
                ((2**31 - 1, 2**31 - 1), (0, 0), (2**31 - 1, 1), (65535, 65535))
            )
            path.write_bytes(_png(width, height, 8, 2, zlib.compress(bytes(100))))
        case 1:
            size = dice.choice(((1, 100_000), (100_000, 1)))
            Image.new("L", size).save(path, "png")
        case 2:  # a bomb
            side = dice.choice((6000, 12_000, 20_000))
            row = bytes(1 + side // 8)
            packed = zlib.compressobj(9)
            body = b"".join(packed.compress(row) for _ in range(side)) + packed.flush()
            path.write_bytes(_png(side, side, 1, 0, body))
        case 3:
            kinds = ("1", "P", "I;16", "I", "F", "LA", "RGBA", "CMYK", "YCbCr")
            Image.new(dice.choice(kinds), (8, 8)).save(path, "tiff")
        case _:
            header = dice.choice((b"P6 999999999 999999999 255\n", b"P5 -1 8 255\n", b"BM" + b"\xff" * 60,
                                  b"GIF89a" + b"\xff" * 20, b"RIFF\xff\xff\xff\xffWEBPVP8 "))  # fmt: skip
            path.write_bytes(header + bytes(50))


def damaged_image(dice: random.Random, folder: Path, whole: Path) -> list[str]:
    kind = dice.choice(("folder", "folder", "mnist", "cifar10"))
    if kind == "folder":
        shutil.copytree(whole, folder)
        _absurd_picture(_some(folder, dice), dice) if dice.random() < 0.35 else _spoil(
            folder, dice
        )
    elif kind == "mnist":
        mnist(folder)
        if dice.random() < 0.6:
            path = _some(folder, dice)
            body = hostile.damaged(gzip.decompress(path.read_bytes()), dice)
            match dice.randrange(5):
                case 0:
                    body = struct.pack(">IIII", 2051, 2**31 - 1, 2**31 - 1, 2**31 - 1) + body[16:]
                case 1:
                    body += bytes(100 << 20)
            path.write_bytes(gzip.compress(body, 1))
        else:
            _spoil(folder, dice)
    else:
        cifar10(folder)
        if dice.random() < 0.3:
            import surfaces

            held = {"data": surfaces.Payload(), "labels": [0]}
            _some(folder, dice).write_bytes(pickle.dumps(held))
        else:
            _spoil(folder, dice)
    size = dice.choice((["image.size=8"], ["image.size=32"], []))
    more = [
        k
        for k in ("image.skip_bad=true", "image.color=rgb", "image.flip=true")
        if dice.random() < 0.4
    ]
    return [f"image.data={kind}", *size, *more]


SMILES = (
    "C" * 5000, "C" * 200_000, "(" * 5000, "C1" * 100, "[Xx]", "C(" * 3000 + "C" + ")" * 3000, "[2000C]",
    "[C+999999999999]", "C%99999", "[*]", "." * 1000, "C.C.C", "[H][H]", "[Og]", "c1ccccc", "\0", "²", "[Fe]",
    "C1CC1" * 40, "F[P](F)(F)(F)(F)F", "[" * 10_000, "C" * 40, "C#C#C", "c1cc2cc1CC2",
)  # fmt: skip


def damaged_molecule(dice: random.Random, folder: Path, whole: Path) -> list[str]:
    shutil.copytree(whole, folder)
    keep = _some(folder, dice)
    if dice.random() < 0.7:  # one kind alone goes deeper
        for path in folder.iterdir():
            if path != keep:
                path.unlink()
    settings = [k for k in ("molecule.skip_bad=true", "molecule.hydrogens=explicit",
                            "molecule.task=conformer", "molecule.max_atoms=1000000",
                            "molecule.network=egnn") if dice.random() < 0.3]  # fmt: skip
    text = keep.read_text() if keep.suffix != ".npz" else ""
    match dice.randrange(7):
        case 0:
            keep = folder / "x.smi"
            keep.write_text("\n".join(dice.choices(SMILES, k=dice.randrange(1, 4))))
        case 1:
            counts = dice.choice(
                ("999999", "-1  2", " 0  0", "  3999", "xxxyyy", "\u00b2\u00b2  2")
            )
            keep = folder / "a.sdf"
            keep.write_text(MOL.format(y=0).replace("  3  2", counts, 1) * 2)
        case 2:
            count = dice.choice(("9" * 5000, "999999999999", "²", "٣", "0", "-3", "1000000"))
            keep = folder / "b.xyz"
            keep.write_text(
                f"{count}\n\n" + dice.choice(("C 0 0 0\n", "C nan 0 0\n" * 3, "² 1 2 3\n"))
            )
        case 3:
            _npz(folder / "d.npz", dice)
        case 4 if text:
            keep.write_bytes(hostile.damaged_text(text, dice))
        case 5 if text:
            body = gzip.compress(hostile.damaged_text(text, dice))
            keep.with_name(keep.name + ".gz").write_bytes(hostile.damaged(body, dice))
        case _:
            _spoil(folder, dice)
    return settings


def _npz(path: Path, dice: random.Random) -> None:
    """Arrays that do not fit, or whose header tells of more than there is."""
    arrays: dict[str, Any] = {
        "numbers": np.array([6, 8, 6, 7]), "positions": np.eye(4, 3), "offsets": np.array([0, 2, 4]),
    }  # fmt: skip
    name = dice.choice((*arrays, "smiles", "split", "bonds", "bond_offsets", "target.mu", "targets",
                        "target_rows", "homo_lumo_gap"))  # fmt: skip
    arrays[name] = dice.choice((
        np.array([]), np.array(3), np.array(["a", "b"]), np.full(4, np.nan), np.zeros((2, 2, 2)),
        np.array([0, 2**40, 4]), np.array([None, {}], object), np.zeros(0, "M8[s]"), np.zeros(2, "V8"),
        np.array([1j, 2]), np.array([-1, 300, 6, 7]), np.array([0, 1, 4]), np.full((4, 3), 1e30),
    ))  # fmt: skip
    np.savez(path, **arrays)
    if dice.random() < 0.3:
        head = "{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 3), }"
        raw = b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head.encode()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{dice.choice(('numbers', 'positions', 'offsets'))}.npy", raw)


def _wav(dice: random.Random) -> bytes:
    """A header with absurd fields, or samples that are no sound."""
    rate = dice.choice((0, 1, 7, 22049, 22050, 44099, 192_001, 1_999_999_973, 2**32 - 1))
    channels, bits = dice.choice((0, 1, 1, 2, 255, 65535)), dice.choice((0, 8, 16, 24, 32, 64, 33))
    kind = dice.choice((1, 1, 3, 0, 0x11, 0xFFFE, 85))
    body = dice.choice((b"", b"\0", bytes(4000), np.full(4000, np.nan, np.float32).tobytes(),
                        np.full(4000, np.inf, np.float32).tobytes(), dice.randbytes(16000),
                        np.full(4000, 3e38, np.float32).tobytes()))  # fmt: skip
    told = dice.choice((len(body), len(body), 0, 2**32 - 1, 2**31))
    block = dice.choice((channels * bits // 8 % 65536, 0, 65535))
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * 2 % 2**32, block, bits)
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", told) + body
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def _sound_zip(folder: Path, dice: random.Random) -> None:
    """A zip with climbing or absolute names, a bomb, links, or damage."""
    sound = next(iter(sorted(folder.rglob("*.wav")))).read_bytes()
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"{i}_ann_{i + 4}.wav", sound)
        name = dice.choice(
            ("../../PWNED.wav", "/PWNED.wav", "a\0b.wav", "x/../../PWNED.wav", "x.wav", "x/")
        )
        body = dice.choice(
            (sound, b"", bytes(300 << 20) if dice.random() < 0.2 else b"x", _wav(dice))
        )
        archive.writestr(name, body)
    packed = made.getvalue()
    if dice.random() < 0.5:
        packed = hostile.damaged(packed, dice)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.unlink()
    (folder / "sounds.zip").write_bytes(packed)


def damaged_speech(dice: random.Random, folder: Path, whole: Path) -> list[str]:
    shutil.copytree(whole, folder)
    match dice.randrange(6):
        case 0 | 1:
            _some(folder, dice).with_suffix(".wav").write_bytes(_wav(dice))
        case 2:
            _sound_zip(folder, dice)
            return ["speech.data=fsdd"]
        case 3:
            return ["speech.data=ljspeech", *_table(folder, dice)]
        case 4:
            return [f"speech.data={dice.choice(('vctk', 'libritts', 'speechcommands', 'fsdd'))}"]
        case _:
            _spoil(folder, dice)
    return []


def _table(folder: Path, dice: random.Random) -> list[str]:
    """LJSpeech's layout with a damaged table; its sounds in a zip sometimes."""
    for i, path in enumerate(sorted(folder.rglob("*.wav"))):
        path.rename(folder / f"T{i}.wav")
    text = "".join(f"T{i}|a b\n" for i in range(4))
    if dice.random() < 0.3:
        _sound_zip(folder, dice)
    else:
        text += dice.choice(
            ("T3|" + "a" * 100_000, "../../x|a", "|", "\0|\0", "T1|" * 50, "T9|\ud800é")
        )
    (folder / "metadata.csv").write_bytes(hostile.damaged_text(text, dice))
    return [f"speech.tokens={dice.choice(('auto', 'characters'))}"]


def damaged_vocoder(dice: random.Random, folder: Path, whole: Path) -> list[str]:
    shutil.copytree(whole, folder)
    settings = []
    if dice.random() < 0.2:
        settings = [
            f"vocoder.held_out='{dice.choice(('(', '(a+)+$', '*', '0', '.', '(?P<x', '[0'))}'"
        ]
    match dice.randrange(4):
        case 0 | 1:
            (folder / f"{dice.randrange(4)}.wav").write_bytes(_wav(dice))
        case 2:
            _sound_zip(folder, dice)
        case _:
            _spoil(folder, dice)
    return settings


DAMAGERS: dict[str, Callable[[random.Random, Path, Path], list[str]]] = {
    "image": damaged_image, "molecule": damaged_molecule, "speech": damaged_speech,
    "vocoder": damaged_vocoder,
}  # fmt: skip
