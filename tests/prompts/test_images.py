"""The order of images: prompt after prompt, each with its copies."""

import numpy as np
import pytest
import torch

from vqdm.prompts import ImageList


def test_images_lie_prompt_after_prompt_with_their_copies_inside():
    images = ImageList(["a", "b", "c"], copies=2)
    expected = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0), ("c", 1)]
    assert list(images) == expected and len(images) == 6
    assert [images[row] for row in range(6)] == expected and images[-1] == ("c", 1)
    assert [images.place(row) for row in (0, 3, 4)] == [(0, 0), (1, 1), (2, 0)]
    with pytest.raises(IndexError):
        images[6]
    assert list(ImageList("ab")) == [("a", 0), ("b", 0)]


@pytest.mark.parametrize("array", [np.arange, torch.arange])
def test_values_of_images_by_prompt(array):
    images = ImageList(range(3), copies=4)
    values = images.by_prompt(array(12))
    assert all(int(values[images.place(row)]) == row for row in range(12))
    assert tuple(images.by_prompt(array(24).reshape(12, 2)).shape) == (3, 4, 2)
