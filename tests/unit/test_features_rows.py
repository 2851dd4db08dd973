import numpy as np
import pytest

from alignrec import configuration
from alignrec.errors import UserError
from alignrec.features import rows
from alignrec.features.config import FeaturesConfig


@pytest.fixture
def matrix() -> rows.Matrix:
    """Correlated columns of very unequal variance and a mean, with an absent row."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(9000, 6)) * [30, 10, 3, 1, 0.3, 0.0] @ rng.normal(size=(6, 6))
    result: rows.Matrix = (mixed + 5.0).astype(np.float32)
    result[7] = 0.0
    return result


def test_full_whitening_leaves_unit_covariance(matrix: rows.Matrix) -> None:
    present = np.arange(len(matrix)) != 7
    means = rows.column_means(matrix, present)
    assert np.allclose(means, matrix[present].astype(np.float64).mean(axis=0))
    turn = rows.whitening(matrix, present, means, strength=1.0)
    covariance = np.cov((matrix[present] - means) @ turn, rowvar=False)
    spectrum = np.linalg.eigvalsh(covariance)
    assert spectrum[0] == pytest.approx(0.0, abs=1e-6)  # the direction without variance is gone
    assert np.allclose(spectrum[1:], 1.0, atol=1e-2)


def test_half_whitening_takes_the_root_of_the_deviations(matrix: rows.Matrix) -> None:
    present = np.arange(len(matrix)) != 7
    means = rows.column_means(matrix, present)
    centred = matrix[present] - means
    before = np.linalg.eigvalsh(np.cov(centred, rowvar=False))[1:]
    turn = rows.whitening(matrix, present, means, strength=0.5)
    after = np.linalg.eigvalsh(np.cov(centred @ turn, rowvar=False))[1:]
    assert np.allclose(after, np.sqrt(before), rtol=1e-2)


def test_whitening_needs_centring() -> None:
    section = {"extraction": {"whiten": 0.5, "center": False}}
    with pytest.raises(UserError, match=r"whiten=0\.5 needs centred rows"):
        configuration.build(FeaturesConfig, section, section="features")


def test_unit_rows_keep_zero_rows() -> None:
    result = rows.unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32))
    assert np.allclose(result, [[0.6, 0.8], [0.0, 0.0]])
