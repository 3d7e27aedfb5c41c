"""The modality keeps its contract with the engine."""

from gendiff.testing import check_modality


def test_the_contract() -> None:
    assert list(check_modality("points", ["train.batch_size=16"]))
