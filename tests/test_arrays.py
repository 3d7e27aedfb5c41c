"""What a modality of plain arrays need not write: batches, files, pictures, classes, a network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gendiff
from gendiff import arrays
from gendiff.errors import ConfigError, DataError, PluginError
from gendiff.modality import Request
from gendiff.spaces import Batch, Cond, Dense, Masked, Ragged


def test_items_are_stacked_with_their_conditions() -> None:
    plain = arrays.stack([np.ones((2, 3)), torch.zeros(2, 3)])
    assert plain.x.dtype == torch.float32
    assert plain.space == Dense((2, 2, 3))
    assert plain.cond is None
    told = arrays.stack([(torch.ones(4), {"label": 2, "size": 0.5})] * 3)
    assert told.cond is not None
    assert told.cond["label"].tolist() == [2, 2, 2]
    assert told.cond["size"].tolist() == [0.5, 0.5, 0.5]
    with pytest.raises(PluginError, match=r"shapes \(2,\) and \(3,\).*collate\(\)"):
        arrays.stack([torch.zeros(2), torch.zeros(3)])


def test_files_hold_samples_without_padding(tmp_path: Path) -> None:
    x, masked = torch.arange(24.0), Masked(torch.tensor([4, 2]), 3, 4)
    for name, batch, shapes in (
        ("dense", Batch(x.reshape(2, 3, 4), Dense((2, 3, 4))), [(3, 4), (3, 4)]),
        ("masked", Batch(x.reshape(2, 3, 4), masked), [(3, 4), (3, 2)]),
        ("ragged", Batch(x.reshape(8, 3), Ragged(torch.tensor([7, 1]), 3)), [(7, 3), (1, 3)]),
    ):
        (tmp_path / name).mkdir()
        paths = arrays.write(batch, tmp_path / name, [5, 17])
        assert [path.name for path in paths] == ["00005.npy", "00017.npy"]
        assert [np.load(path).shape for path in paths] == shapes


def test_a_file_is_the_start_of_others(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 4)
    (path,) = arrays.write(Batch(x, Dense((1, 3, 4))), tmp_path, [0])
    space = Dense((5, 3, 4))
    given = arrays.read(path, None, space, None)
    assert torch.equal(given.batch.x, x.expand(5, 3, 4))
    assert given.mask is None
    kept = arrays.read(path, ":2,1:-1", space, None).mask
    assert kept is not None
    assert kept.shape == (5, 3, 4)
    assert kept[4].tolist() == [[False, True, True, False]] * 2 + [[False] * 4]
    for keep, said in (
        ("1,2", "no part"),
        (":,:,0:1", "no part"),
        ("-:", "no part"),
        (f"{'9' * 5000}:", "no part"),
        (":", "all"),
        ("3:", "none"),
    ):
        with pytest.raises(ConfigError, match=said):
            arrays.read(path, keep, space, None)
    with pytest.raises(DataError, match=r"has shape \(3, 4\), the model \(4, 4\)"):
        arrays.read(path, None, Dense((5, 4, 4)), None)
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "complex.npy", np.zeros(4, complex))
    for name in ("text.npy", "complex.npy", "absent.npy"):
        with pytest.raises(DataError, match=f"{name} cannot be read as an array"):
            arrays.read(tmp_path / name, None, space, None)
    with pytest.raises(ConfigError, match="differ in size"):
        arrays.read(path, None, Masked(torch.tensor([4]), 3, 4), None)


def test_a_picture_has_a_square_for_each_number(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    batch = Batch(torch.tensor([[-2.0, 0.0, 2.0], [1.0, 0.0, 0.0]]), Dense((2, 3)))
    with image.open(arrays.picture(batch, tmp_path / "a.png")) as picture:
        assert picture.size == (3 * arrays.PIXELS, 2 * arrays.PIXELS)
        grey = np.asarray(picture)[:: arrays.PIXELS, :: arrays.PIXELS].tolist()
    assert grey == [[0, 127, 255], [191, 127, 127]]


def test_classes_are_those_asked_for_or_all_in_turn() -> None:
    def told(**values: object) -> dict[str, list[int]]:
        cond = Request([0, 1, 2, 3, 6], 0, values).classes(label=3, size=2)
        return {name: value.tolist() for name, value in cond.values.items()}

    assert told() == {"label": [0, 1, 2, 0, 0], "size": [0, 0, 0, 1, 0]}
    assert told(label=2) == {"label": [2] * 5, "size": [0, 1, 0, 1, 0]}
    assert told(label=[2, 0], size=1)["label"] == [2, 0, 2, 0, 2]
    for wrong, said in (
        ({"label": 3}, "label=3 is no class. Give 0 to 2"),
        ({"label": -1}, "label=-1 is no class"),
        ({"label": True}, "label=True is no class"),
        ({"label": "red"}, "label=red is no class"),
        ({"label": []}, "label=None is no class"),
        ({"lable": 1}, "unknown condition 'lable'. Did you mean 'label'?"),
    ):
        with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
            told(**wrong)


def test_the_network_is_told_its_classes_unless_they_are_hidden() -> None:
    torch.manual_seed(0)
    network = gendiff.MLP((3, 4), {"label": 3})
    x, noise, space = torch.randn(2, 3, 4), torch.zeros(2), Dense((2, 3, 4))
    first, second = (Cond({"label": torch.tensor([k, k])}) for k in (0, 1))
    out = network(x, noise, first, space)
    assert out.shape == x.shape
    assert not torch.allclose(out, network(x, noise, second, space))
    hidden = [c.drop(torch.tensor([True, True])) for c in (first, second)]
    assert torch.equal(*(network(x, noise, c, space) for c in hidden))
    assert not torch.allclose(out, network(x, noise + 1, first, space))
