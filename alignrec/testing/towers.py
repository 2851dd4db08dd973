"""Tiny random transformers models in folders, for tests of towers: a ViT, a ResNet and a BERT."""

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_vit(folder: Path, *, image_size: int = 16, patch_size: int = 4) -> Path:
    """Write a ViT of two layers; returns the folder."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=image_size,
        patch_size=patch_size,
    )
    return _save(ViTModel, config, folder)


def write_resnet(folder: Path) -> Path:
    """Write a ResNet that gives a grid of an eighth of the picture, its batch norms not trivial."""
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    return _save(ResNetModel, config, folder)


def write_bert(folder: Path, *, max_tokens: int = 128) -> Path:
    """Write a BERT of two layers that spells texts letter by letter, with its tokenizer."""
    from transformers import BertConfig, BertModel

    words = [*SPECIAL, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=max_tokens,
    )
    _save(BertModel, config, folder)
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _save(kind: Any, config: Any, folder: Path) -> Path:  # noqa: ANN401 - transformers has no types
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    model.save_pretrained(folder)
    return folder
