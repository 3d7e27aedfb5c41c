"""The data sets, on generated files in each format."""

from __future__ import annotations

import gzip
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gendiff.errors import ConfigError, DataError
from gendiff.modality import Request
from gendiff_image import ImageConfig, ImageModality

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"  # beside the checkout
image = ImageModality()


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "cache"))


def items(config: ImageConfig, split: str, seed: int = 0) -> list[tuple[torch.Tensor, Any]]:
    data = image.dataset(config, image.prepare(config).facts, split)
    return [data[i, seed] for i in range(len(data))]


def picture(path: Path, value: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    """A noisy picture whose top left quarter is of one value."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(value).integers(0, 256, (size[1], size[0], channels))
    array[: size[1] // 2, : size[0] // 2] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8).squeeze(), mode=None).save(path)


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 30) -> Path:
    for number, name in enumerate(classes):
        for i in range(each):
            picture(root / name / f"{i}.png", number * each + i)
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def write_mnist(root: Path, counts: tuple[int, int] = (40, 20), *, packed: bool = True) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, head, body in (
            ("images-idx3", struct.pack(">4i", 2051, count, 28, 28), pixels.tobytes()),
            ("labels-idx1", struct.pack(">2i", 2049, count), bytes(i % 10 for i in range(count))),
        ):
            file = raw / f"{prefix}-{kind}-ubyte"
            if packed:
                file.with_name(file.name + ".gz").write_bytes(gzip.compress(head + body))
            else:
                file.write_bytes(head + body)


def write_cifar10(root: Path, each: int = 20) -> Path:
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        entry = {
            "data": rng.integers(0, 256, (each, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(each)],
        }
        (base / name).write_bytes(pickle.dumps(entry))
    names = [f"kind{i}" for i in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return base


def write_celeba(root: Path, count: int = 24) -> Path:
    base = root / "celeba"
    names = [f"{i:06d}.jpg" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        picture(base / "img_align_celeba" / name, i, (178, 218))
    rows = {
        "list_eval_partition.txt": [f"{n} {i % 3}" for i, n in enumerate(names)],
        "identity_CelebA.txt": [f"{n} 1" for n in names],
        "list_bbox_celeba.txt": [str(count), "image_id x y w h", *(f"{n} 1 2 3 4" for n in names)],
        "list_landmarks_align_celeba.txt": [str(count), "a b", *(f"{n} 1 2" for n in names)],
        "list_attr_celeba.txt": [str(count), "Smiling Young", *(f"{n}  1 -1" for n in names)],
    }
    for file, lines in rows.items():
        (base / file).write_text("\n".join(lines) + "\n")
    return base


def test_digits() -> None:
    config = ImageConfig()
    report = image.prepare(config)
    assert (report.facts["train"], report.facts["test"], report.facts["levels"]) == (1437, 360, 17)
    train, test = items(config, "train"), items(config, "test")
    x = torch.stack([x for x, _ in train + test])
    assert x.dtype == torch.float32
    assert torch.equal(x.unique(), torch.arange(17) / 8 - 1)
    assert image.bin_width(config, report.facts) == 1 / 8
    counts = torch.bincount(torch.tensor([label for _, label in test]))
    assert counts.min() >= 34
    assert counts.max() <= 37
    from sklearn.datasets import load_digits

    everything = torch.from_numpy(load_digits().images).flatten(1) / 8 - 1
    assert torch.equal(x.flatten(1).sort(0).values, everything.float().sort(0).values)


def test_batches_and_templates() -> None:
    config = ImageConfig()
    facts = image.prepare(config).facts
    batch = image.collate(config, {}, items(config, "test")[:5])
    assert batch.space.shape == (5, 1, 8, 8)
    assert batch.cond is not None
    assert batch.cond["label"].dtype == torch.int64

    def labels(ids: list[int], **values: Any) -> list[int]:
        space, cond = image.templates(config, facts, Request(ids, 0, values))
        assert space.shape == (len(ids), 1, 8, 8)
        assert cond is not None
        return cond["label"].tolist()

    assert labels([8, 9, 10, 25]) == [8, 9, 0, 5]
    assert labels([8, 9], label="3") == labels([8, 9], label=3) == [3, 3]
    assert labels([1, 2, 3], label=[4, "5"]) == [5, 4, 5]
    for wrong in (10, -1, "x", True, 1.5):
        with pytest.raises(ConfigError, match=r"is not a class\. Give 0 to 9"):
            labels([0], label=wrong)
    with pytest.raises(ConfigError, match=r"unknown condition 'labl'\. Known: label"):
        labels([0], labl=1)
    free = ImageConfig(class_conditional=False)
    assert image.templates(free, facts, Request([0]))[1] is None
    assert image.collate(free, {}, items(free, "test")[:5]).cond is None
    with pytest.raises(ConfigError, match="unconditional"):
        image.templates(free, facts, Request([0], 0, {"label": 1}))


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_format(tmp_path: Path, packed: bool) -> None:
    write_mnist(tmp_path, packed=packed)
    raw = tmp_path / "MNIST" / "raw"
    before = sorted(p.name for p in raw.iterdir())
    config = ImageConfig(data="mnist", path=str(tmp_path), size=16, color="rgb")
    report = image.prepare(config)
    assert (report.facts["train"], report.facts["test"]) == (40, 20)
    x, label = items(config, "test")[3]
    assert x.shape == (3, 16, 16)
    assert torch.equal(x[0], x[2])
    assert label == 3
    assert sorted(p.name for p in raw.iterdir()) == before  # the folder may be read-only


def test_mnist_damaged(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"mnist in .* cannot be read"):
        image.prepare(ImageConfig(data="mnist", path=str(tmp_path)))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "celeba"])
def test_missing_files_are_named(tmp_path: Path, name: Any) -> None:
    with pytest.raises(DataError, match=r"is not in .* It needs .*; set image.path"):
        image.prepare(ImageConfig(data=name, path=str(tmp_path)))
    with pytest.raises(DataError, match=r"image\.path: not set"):
        image.prepare(ImageConfig(data=name))
    with pytest.raises(DataError, match="there is no folder"):
        image.prepare(ImageConfig(data=name, path=str(tmp_path / "no")))


def test_cifar10_format(tmp_path: Path) -> None:
    base = write_cifar10(tmp_path)
    config = ImageConfig(data="cifar10", path=str(tmp_path))
    report = image.prepare(config)
    assert (report.facts["train"], report.facts["test"]) == (100, 20)
    assert report.facts["class_names"][3] == "kind3"
    assert "not the published" in report.warnings[0]
    x, label = items(config, "train")[25]
    entry = pickle.loads((base / "data_batch_2").read_bytes())
    wanted = torch.from_numpy(entry["data"][5].reshape(3, 32, 32)) / 127.5 - 1
    torch.testing.assert_close(x, wanted)
    assert label == 5
    grey = items(ImageConfig(data="cifar10", path=str(tmp_path), color="grey"), "test")
    assert grey[0][0].shape == (1, 32, 32)


def test_cifar10_pickles_do_not_run(tmp_path: Path) -> None:
    base = write_cifar10(tmp_path)

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    (base / "data_batch_3").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="data_batch_3 is damaged or unsafe"):
        image.prepare(ImageConfig(data="cifar10", path=str(tmp_path)))
    assert not (tmp_path / "sprung").exists()


def test_celeba_format(tmp_path: Path) -> None:
    base = write_celeba(tmp_path)
    config = ImageConfig(data="celeba", path=str(tmp_path), size=32)
    report = image.prepare(config)
    assert (report.facts["train"], report.facts["test"], report.facts["classes"]) == (8, 8, None)
    x, label = items(config, "test")[0]
    assert x.shape == (3, 32, 32)
    assert label is None
    (base / "img_align_celeba" / "000001.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 16 images .*000001.jpg: no such file"):
        image.prepare(config)


def test_class_folders(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    config = ImageConfig(data="folder", path=str(root))
    facts = image.prepare(config).facts
    assert facts["class_names"] == ["cat", "dog"]
    assert facts["train"] + facts["test"] == 60
    assert 1 <= facts["test"] <= 15
    train, test = items(config, "train"), items(config, "test")
    # every picture's corner tells which it is: the splits are disjoint and complete
    values = [round(float((x[0, 0, 0] + 1) * 127.5)) for x, _ in train + test]
    assert sorted(values) == list(range(60))
    assert [label for _, label in train + test] == [value // 30 for value in values]
    again = [round(float((x[0, 0, 0] + 1) * 127.5)) for x, _ in items(config, "test")]
    assert again == values[len(train) :]
    picture(root / "dog" / "new.png", 100)
    later = {round(float((x[0, 0, 0] + 1) * 127.5)) for x, _ in items(config, "test")}
    assert later - {100} == set(again)
    with pytest.raises(DataError, match="when the run began"):
        image.dataset(config, facts, "train")


def test_the_content_is_that_of_the_files(tmp_path: Path) -> None:
    def content(root: Path) -> Any:
        return image.prepare(ImageConfig(data="folder", path=str(root))).facts["content"]

    root = folder(tmp_path / "data", each=4)
    first = content(root)
    copy = shutil.copytree(root, tmp_path / "copy")
    for path in copy.rglob("*.png"):
        os.utime(path, (1, 1))
    assert content(copy) == first
    picture(copy / "dog" / "3.png", 200)
    changed = content(copy)
    assert changed != first
    (root / "dog" / "3.png").rename(root / "cat" / "4.png")  # another class
    assert content(root) not in (first, changed)


def test_train_and_test_folders(tmp_path: Path) -> None:
    folder(tmp_path / "train", each=4)
    folder(tmp_path / "val", each=2)
    config = ImageConfig(data="folder", path=str(tmp_path))
    facts = image.prepare(config).facts
    assert (facts["train"], facts["test"], facts["class_names"]) == (8, 4, ["cat", "dog"])
    assert [label for _, label in items(config, "test")] == [0, 0, 1, 1]
    folder(tmp_path / "train", ("emu",), each=1)
    with pytest.raises(DataError, match="different class folders"):
        image.prepare(config)


def test_train_may_be_a_class(tmp_path: Path) -> None:
    folder(tmp_path, ("car", "train"), each=5)
    facts = image.prepare(ImageConfig(data="folder", path=str(tmp_path))).facts
    assert facts["class_names"] == ["car", "train"]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / "in" / f"{i}.png", i)
    config = ImageConfig(data="folder", path=str(tmp_path / "in"))
    facts = image.prepare(config).facts
    assert (facts["classes"], facts["train"] + facts["test"]) == (None, 5)
    assert image.collate(config, {}, items(config, "train")).cond is None
    assert image.templates(config, facts, Request([0, 1]))[1] is None


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="in holds 0 pictures"):
        image.prepare(ImageConfig(data="folder", path=str(tmp_path / "in")))


def test_truncated_picture_is_named(tmp_path: Path) -> None:
    root = folder(tmp_path / "data")
    truncate(root / "cat" / "17.png")
    config = ImageConfig(data="folder", path=str(root))
    message = rf"^data: 1 of 60 images cannot be decoded \(first: {root}/cat/17.png: truncated\)"
    for _ in range(2):  # found anew, then from the cache
        with pytest.raises(DataError, match=message + r"\. Remove it or set image.skip_bad=true"):
            image.prepare(config)
    skipping = config.model_copy(update={"skip_bad": True})
    report = image.prepare(skipping)
    assert report.facts["train"] + report.facts["test"] == 59
    assert report.warnings == (f"left out: {root}/cat/17.png: truncated",)
    pixels = [x[0, 0, 0] for split in ("train", "test") for x, _ in items(skipping, split)]
    values = {round(float((value + 1) * 127.5)) for value in pixels}
    assert values == set(range(60)) - {17}
    picture(root / "cat" / "17.png", 17)  # mended
    assert image.prepare(config).warnings == ()


def test_not_pictures(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", each=5)
    (root / "cat" / "0.png").write_bytes(b"")
    (root / "dog" / "1.png").write_text("hello")
    with pytest.raises(DataError, match=r"2 of 10 .*cat/0.png: not a picture\). Remove them"):
        image.prepare(ImageConfig(data="folder", path=str(root)))


def test_shapes_that_differ(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 0)
    picture(tmp_path / "b.png", 1, (12, 9))
    picture(tmp_path / "c.png", 2, (8, 8), "L")
    with pytest.raises(DataError, match=r"3 different shapes .*image.color=rgb and image.size=64"):
        image.prepare(ImageConfig(data="folder", path=str(tmp_path)))
    config = ImageConfig(data="folder", path=str(tmp_path), size=8, color="rgb")
    assert all(x.shape == (3, 8, 8) for x, _ in items(config, "train"))


@pytest.mark.parametrize("size", [16, (8, 20), (40, 30)])
def test_resize_keeps_proportions(tmp_path: Path, size: Any) -> None:
    """A white disc in the middle stays round and in the middle."""
    y, x = np.mgrid[:24, :36]
    disc = ((y - 11.5) ** 2 + (x - 17.5) ** 2 <= 36).astype(np.uint8) * 255
    for i in range(2):
        Image.fromarray(disc).save(tmp_path / f"{i}.png")
    config = ImageConfig(data="folder", path=str(tmp_path), size=size)
    found = items(config, "train")[0][0][0]
    height, width = (size, size) if isinstance(size, int) else size
    assert found.shape == (height, width)
    mass = (found + 1) / 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centre = [(mass * axis).sum() / mass.sum() for axis in (rows, columns)]
    assert centre[0] == pytest.approx((height - 1) / 2, abs=0.5)
    assert centre[1] == pytest.approx((width - 1) / 2, abs=0.5)
    spread = [(mass * (rows - centre[0]) ** 2).sum(), (mass * (columns - centre[1]) ** 2).sum()]
    if height >= 16:  # not cropped into the disc
        assert spread[0] == pytest.approx(float(spread[1]), rel=0.05)


@pytest.mark.parametrize(
    ("mode", "color", "channels"),
    [
        ("L", None, 1),
        ("L", "rgb", 3),
        ("RGB", "grey", 1),
        ("RGBA", None, 4),
        ("RGBA", "rgb", 3),
        ("RGBA", "grey", 1),
        ("LA", None, 2),
        ("LA", "rgb", 3),
    ],
)
def test_colors(tmp_path: Path, mode: str, color: Any, channels: int) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", 10 * i, mode=mode)
    config = ImageConfig(data="folder", path=str(tmp_path), color=color)
    assert image.prepare(config).facts["channels"] == channels
    assert items(config, "train")[0][0].shape == (channels, 8, 8)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for i in range(2):
        clear.save(tmp_path / f"{i}.png")
    config = ImageConfig(data="folder", path=str(tmp_path), color="rgb")
    assert items(config, "train")[0][0].min() == 1


def test_palette_and_16_bits(tmp_path: Path) -> None:
    color = Image.new("RGB", (8, 8), (255, 0, 0)).quantize(4)
    for i in range(2):
        color.save(tmp_path / f"{i}.png")
    x = items(ImageConfig(data="folder", path=str(tmp_path)), "train")[0][0]
    assert x[:, 0, 0].tolist() == [1, -1, -1]
    deep = Image.fromarray(np.full((8, 8), 65535, dtype=np.uint16))
    for i in range(2):
        deep.save(tmp_path / f"{i}.png")
    x = items(ImageConfig(data="folder", path=str(tmp_path)), "train")[0][0]
    assert x.shape == (1, 8, 8)
    assert x.min() == 1


def test_flips_depend_on_the_seed_alone() -> None:
    config = ImageConfig(flip=True)
    facts = image.prepare(config).facts
    data = image.dataset(config, facts, "train")
    plain = image.dataset(ImageConfig(), facts, "train")
    flipped = []
    for i in range(200):
        x, again, original = data[i, 7 + i][0], data[i, 7 + i][0], plain[i, 0][0]
        assert torch.equal(x, again)
        assert torch.equal(x, original) or torch.equal(x, original.flip(-1))
        flipped.append(not torch.equal(x, original))
    assert 70 < sum(flipped) < 130  # 100 expected, standard deviation 7
    test = image.dataset(config, facts, "test")
    assert all(torch.equal(test[i, 0][0], test[i, i][0]) for i in range(50))


def test_size_must_suit_the_network() -> None:
    config = ImageConfig(size=18, channel_multipliers=(1, 2, 2))
    with pytest.raises(ConfigError, match=r"image.size: 18x18 is not divisible by 4.*=16 "):
        image.prepare(config)
    with pytest.raises(ConfigError, match="attention_levels: 5 is not a level"):
        image.prepare(ImageConfig(attention_levels=(5,)))


def test_large_sets_are_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "in", each=4)
    config = ImageConfig(data="folder", path=str(tmp_path / "in"))
    packed = [x for x, _ in items(config, "train")]
    assert list((tmp_path / "cache").rglob("pixels.npy"))
    monkeypatch.setattr("gendiff_image.folders._PACK_BYTES", 0)
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "other"))
    lazy = [x for x, _ in items(config, "train")]
    assert not list((tmp_path / "other").rglob("pixels.npy"))
    assert all(torch.equal(a, b) for a, b in zip(packed, lazy, strict=True))


def test_worker_processes_decode_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "in", each=6)
    (root / "cat" / "bad.png").write_bytes(b"no picture")
    config = ImageConfig(data="folder", path=str(root), size=12, skip_bad=True)
    here, facts = items(config, "train"), image.prepare(config)
    monkeypatch.setattr("gendiff_image.folders._FEW_BYTES", 0)
    monkeypatch.setattr("gendiff.preparing.cores", lambda: 2)
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "other"))
    there = items(config, "train")
    assert image.prepare(config) == facts
    assert facts.warnings[0].endswith("bad.png: not a picture")
    for (x, label), (again, same) in zip(here, there, strict=True):
        assert torch.equal(x, again)
        assert label == same


def test_packed_data_travel_to_workers_as_a_path(tmp_path: Path) -> None:
    folder(tmp_path / "in", each=40)
    config = ImageConfig(data="folder", path=str(tmp_path / "in"), size=64)
    data = image.dataset(config, image.prepare(config).facts, "train")
    text = pickle.dumps(data)
    assert len(text) < 20_000
    assert torch.equal(pickle.loads(text)[3, 0][0], data[3, 0][0])


def test_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "file"))
    root = folder(tmp_path / "in", each=2)
    with pytest.raises(DataError, match="GENDIFF_CACHE"):
        image.prepare(ImageConfig(data="folder", path=str(root)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_written_files_and_grid(tmp_path: Path, channels: int) -> None:
    from gendiff.spaces import Batch, Cond, Dense

    config = ImageConfig()
    x = torch.linspace(-1.1, 1.1, 20 * channels * 64).reshape(20, channels, 8, 8)
    batch = Batch(x, Dense(tuple(x.shape)), Cond({"label": torch.arange(20) % 10}))
    paths = image.write(config, {}, batch, tmp_path / "out", range(7, 27))
    assert [p.name for p in paths[:2]] == ["00007.png", "00008.png"]
    back = np.asarray(Image.open(paths[10])).reshape(8, 8, channels).transpose(2, 0, 1)
    assert np.array_equal(back, ((x[10] + 1) * 127.5).round().clamp(0, 255).numpy())
    grid = Image.open(image.preview(config, {}, batch, tmp_path / "grid.png"))
    assert grid.size == (10 * 66 - 2, 2 * 66 - 2)  # a column per class, 8 pixels drawn as 64
    plain = Batch(x[:9], Dense((9, *x.shape[1:])))
    assert Image.open(image.preview(config, {}, plain, tmp_path / "g.png")).size == (196, 196)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_published_files(name: Any) -> None:
    if not (REAL / "MNIST").exists():
        pytest.skip("needs ../shared/data/MNIST beside the checkout")
    report = image.prepare(ImageConfig(data=name, path=str(REAL)))
    assert (report.facts["train"], report.facts["test"]) == (60000, 10000)
    assert report.warnings == ()


def test_a_pipe_and_a_thread_of_a_picture(tmp_path: Path) -> None:
    """The one would be waited for, the other become gigabytes when it is resized."""
    root = folder(tmp_path / "data")
    os.mkfifo(root / "cat" / "pipe.png")
    Image.new("L", (100_000, 1)).save(root / "dog" / "thread.png")
    config = ImageConfig(data="folder", path=str(root), size=512, color="grey", skip_bad=True)
    warnings = image.prepare(config).warnings
    assert [w.rpartition(": ")[2] for w in warnings] == [
        "not a file", "1x100000, too narrow to be cropped to 512x512",
    ]  # fmt: skip


def test_a_gz_that_holds_more_than_it_tells(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    packed = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    packed.write_bytes(gzip.compress(gzip.decompress(packed.read_bytes()) + bytes(1)))
    with pytest.raises(DataError, match="holds more than its header tells of"):
        image.prepare(ImageConfig(data="mnist", path=str(tmp_path)))


def test_pipes_in_place_of_files_are_not_waited_for(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    packed = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    packed.unlink()
    os.mkfifo(packed)
    (tmp_path / "cifar-10-batches-py").mkdir()
    os.mkfifo(tmp_path / "cifar-10-batches-py" / "data_batch_1")
    for name, file in (("mnist", "train-images"), ("cifar10", "data_batch_1")):
        with pytest.raises(DataError, match=f"no .*{file}"):
            image.prepare(ImageConfig(data=name, path=str(tmp_path)))
