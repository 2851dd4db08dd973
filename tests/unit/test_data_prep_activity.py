"""How active users and how popular items are: what the report draws."""

import numpy as np
import pytest

from data_prep.interactions import _distribution


@pytest.mark.parametrize("largest", [1, 2, 3, 4, 1000])
def test_every_user_with_interactions_is_in_one_bin(largest: int) -> None:
    counts = np.random.default_rng(largest).integers(0, largest + 1, 500)
    counts[:2] = 0, largest
    found = _distribution(counts)
    for low, high, number in zip(
        found["edges"], [*found["edges"][1:], np.inf], found["counts"], strict=True
    ):
        assert number == sum(low <= count < high for count in counts)
    assert sum(found["counts"]) == (counts > 0).sum()
    assert found["counts"][-1] > 0
    assert found["quantiles"]["1.0"] == largest
