import numpy as np
import pytest
from sklearn.datasets import load_digits

from epsd.datasets import DATASETS
from epsd.datasets.digits import Digits
from epsd.files.layouts import Source
from epsd.registry import ParamsError, choose


def images(source: Source) -> np.ndarray:
    found = source.splits["train"].images
    assert isinstance(found, np.ndarray)
    return found


def test_the_digits_are_scikit_learns() -> None:
    source, bunch = Digits()(), load_digits()
    assert images(source).shape == (1797, 1, 8, 8)
    assert images(source).dtype == np.uint8
    assert np.abs(images(source)[:, 0] / 255 * 16 - bunch.images).max() < 0.05
    assert images(source).max() == 255
    assert source.splits["train"].labels.tolist() == bunch.target.tolist()
    assert source.class_names == list("0123456789")


def test_a_size_scales_them() -> None:
    nearest = images(Digits(size=16, resampling="nearest")())
    assert np.array_equal(nearest[:, :, ::2, ::2], images(Digits()()))
    assert images(Digits(size=12)()).shape == (1797, 1, 12, 12)


@pytest.mark.parametrize("size", [3, 65, "8", 8.5])
def test_sizes_out_of_range_are_refused(size: object) -> None:
    with pytest.raises(ParamsError, match=r"dataset.size"):
        choose(DATASETS, {"name": "digits", "size": size}, "dataset")
