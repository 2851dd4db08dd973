"""Options around the training step: groups and rates, recomputed layers, compilation, DeepSpeed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from alignrec import configuration
from alignrec.errors import UserError
from alignrec.pretrain.compilation import compile_layers
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.deepspeed_config import deepspeed_settings
from alignrec.pretrain.encoder import Encoder
from alignrec.pretrain.objective import MaskedModel, build_model
from alignrec.pretrain.optimizer import depth_of, parameter_groups
from alignrec.testing.pretraining import TINY_ENCODER

TINY = {"encoder": TINY_ENCODER}


def make_config(**section: object) -> PretrainConfig:
    return configuration.build(PretrainConfig, {**TINY, **section}, section="pretrain")


def make_model() -> MaskedModel:
    config = make_config()
    return build_model(config.encoder.architecture(50), config.objective, seed=0)


def encode(encoder: Encoder, *, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 50, (3, length), generator=generator)
    padding = torch.zeros(3, length, dtype=torch.bool)
    padding[1, 5:] = True
    streams = encoder(images, torch.tensor([True, False, True]), tokens, padding)
    return torch.cat(streams, dim=1)


def named_groups(model: MaskedModel, **settings: Any) -> dict[str, dict[str, Any]]:
    """Return name of each parameter -> its group; every parameter is in exactly one."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in parameter_groups(model, 0.1, **settings):
        assert group["params"]
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = group
    assert found.keys() == set(names.values())
    return found


def test_without_layer_decay_there_are_matrices_and_vectors() -> None:
    model = make_model()
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [group["rate_share"] for group in groups] == [1.0, 1.0]
    order = [id(p) for p in model.parameters() if max(p.shape) != p.numel()]
    assert [id(p) for p in groups[0]["params"]] == order
    found = named_groups(model)
    assert found["mlm_head.weight"]["weight_decay"] == 0.1
    assert found["encoder.vision_embed.cls_token"]["weight_decay"] == 0.0
    assert found["encoder.encoder.layers.0.ffn.A.ffn_layernorm.weight"]["weight_decay"] == 0.0


def test_rates_fall_by_the_factor_from_layer_to_layer() -> None:
    found = named_groups(make_model(), layer_decay=0.5)
    shares = {
        "mlm_head.weight": 1.0,
        "summary.positions.weight": 1.0,
        "encoder.encoder.layer_norm.A.weight": 1.0,
        "encoder.encoder.layers.1.self_attn.q_proj.A.weight": 0.5,
        "encoder.encoder.layers.1.final_layer_norm.B.bias": 0.5,
        "encoder.encoder.layers.0.ffn.B.fc1.weight": 0.25,
        "encoder.text_embed.weight": 0.125,
        "encoder.encoder.embed_positions.A.weight": 0.125,
        "encoder.vision_embed.mask_token": 0.125,
    }
    assert {name: found[name]["rate_share"] for name in shares} == shares
    for name, group in found.items():
        is_vector = name.endswith(("bias", "_token")) or "norm" in name or "_ln." in name
        assert (group["weight_decay"] == 0.0) == is_vector, name


def test_depth_counts_from_the_input() -> None:
    assert depth_of("encoder.text_embed.weight") == 0
    assert depth_of("encoder.encoder.layers.11.ffn.A.fc1.bias") == 12
    assert depth_of("encoder.encoder.layer_norm.A.bias") is None
    assert depth_of("mim_head.bias") is None
    for name in ("vision_bridge.proj.weight", "text_bridge.norm.bias", "cls_token", "mask_token"):
        assert depth_of(f"encoder.{name}") == 0  # what the fusion's first layer reads


def test_recomputed_layers_give_equal_gradients() -> None:
    plain = make_model().encoder
    recomputed = copy.deepcopy(plain)
    recomputed.encoder.recompute = True
    calls = []
    layer = recomputed.encoder.layers[0]
    layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    outputs = [encode(encoder) for encoder in (plain, recomputed)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert len(calls) == 2  # forward, and again in the backward pass
    expected = dict(plain.named_parameters())
    for name, parameter in recomputed.named_parameters():
        if name != "vision_embed.mask_token":  # nothing is masked here
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, expected[name].grad), name
    with torch.no_grad():
        encode(recomputed)
    assert len(calls) == 3  # nothing to recompute without a backward pass


def test_compilation_that_cannot_work_is_told_and_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_model()
    before = encode(model.encoder)
    assert compile_layers(model, make_config()) is None
    told = compile_layers(model, make_config(compile=True, zero_stage=3))
    assert told is not None
    assert "under ZeRO-3" in told

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nlong list")

    monkeypatch.setattr(torch, "compile", broken)
    told = compile_layers(model, make_config(compile=True))
    assert told == ("not compiled: RuntimeError: InvalidCxxCompiler: No working C++ compiler found")
    assert torch.equal(encode(model.encoder), before)


def test_what_is_offloaded_is_what_the_stage_takes_apart() -> None:
    def zero(**changes: Any) -> dict[str, Any]:
        settings = deepspeed_settings(make_config(**changes), num_ranks=1)
        result: dict[str, Any] = settings["zero_optimization"]
        return result

    assert not [key for key in zero(zero_stage=2) if key.startswith("offload")]
    assert zero(zero_stage=2, offload="optimizer")["offload_optimizer"] == {"device": "cpu"}
    both = zero(zero_stage=3, offload="parameters")
    assert both["offload_optimizer"] == both["offload_param"] == {"device": "cpu"}
    for stage, offload in ((0, "optimizer"), (2, "parameters")):
        with pytest.raises(UserError, match=rf"offload={offload} has no effect under .*={stage}"):
            zero(zero_stage=stage, offload=offload)
