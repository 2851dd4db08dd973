"""Samples travel and are remembered as rows of fixed length."""

import pytest
import torch

from alignrec.graph.neighborhoods import Samples, pack, unpack


@pytest.mark.parametrize("lengths", [[], [0], [3, 3], [0, 3, 1, 0, 2]])
def test_unpacking_undoes_packing(lengths: list[int]) -> None:
    total = sum(lengths)
    source = torch.arange(total, dtype=torch.int32) + 2**31 - 1 - total
    samples = Samples(torch.tensor(lengths, dtype=torch.int64), source, torch.rand(total) - 0.5)
    rows = pack(samples, 3)
    assert rows.shape == (len(lengths), 7)
    found = unpack(rows, 3)
    assert torch.equal(found.lengths, samples.lengths)
    assert torch.equal(found.source, samples.source)
    assert torch.equal(found.weight, samples.weight)
