"""FLOPs are those that torch counts; what a device does not tell is left out."""

from typing import Any

import pytest
import torch
from torch import Size
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from alignrec import configuration
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.objective import MaskedBatch, MaskedModel, build_model
from alignrec.pretrain.usage import GIBIBYTE, FlopCounter, peak_flops, peak_memory_bytes, usage
from alignrec.testing.pretraining import TINY_ENCODER

VOCABULARY, LENGTH, SIDE, NUM_PATCHES = 60, 6, 16, 16


def make_model(**objective: Any) -> MaskedModel:
    section = {"encoder": TINY_ENCODER, "objective": objective}
    config = configuration.build(PretrainConfig, section, section="pretrain")
    return build_model(config.encoder.architecture(VOCABULARY), config.objective, seed=0)


def make_batch(*, pictures: list[bool], lengths: list[int]) -> MaskedBatch:
    """Items whose first token and first three patches, if there are any, are masked."""
    count = len(pictures)
    has_image = torch.tensor(pictures)
    tokens = torch.full((count, LENGTH), 7)
    padding = torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]
    masked_text = torch.zeros(count, LENGTH, dtype=torch.bool)
    masked_text[:, 0] = ~padding[:, 0]
    masked_patches = torch.zeros(count, NUM_PATCHES, dtype=torch.bool)
    masked_patches[:, :3] = has_image[:, None]
    images = torch.full((count, SIDE, SIDE, 3), 9, dtype=torch.uint8)
    item_index = torch.arange(count)
    masks = (masked_text, masked_patches)
    places = (mask.flatten().nonzero().squeeze(1) for mask in masks)
    return MaskedBatch(item_index, images, has_image, tokens, tokens, padding, *masks, *places)


def linear_flops(rows: Size, weight: Size, *_: Any, **__: Any) -> int:
    """Return what one product costs, from the shapes of its matrices."""
    return 2 * rows.numel() * weight[0]


@pytest.mark.parametrize("summary_weight", [0.0, 1.0])
@pytest.mark.parametrize("num_items", [1, 3])
def test_flops_are_those_that_torch_counts(summary_weight: float, num_items: int) -> None:
    model = make_model(summary_weight=summary_weight)
    batch = make_batch(pictures=[True] * num_items, lengths=[LENGTH] * num_items)
    counter = FlopCounter.of(model)
    assert counter is not None
    # the operator of alignrec.pretrain.linear, which torch's counter does not know
    known = {torch.ops.mkldnn._linear_pointwise: linear_flops}
    counting = FlopCounterMode(display=False, custom_mapping=known)
    with counting as counted, sdpa_kernel(SDPBackend.MATH):
        model(batch)
    assert counter.step(batch).item() == pytest.approx(3 * counted.get_total_flops(), rel=1e-6)


def test_what_is_not_there_costs_nothing() -> None:
    counter = FlopCounter.of(make_model(summary_weight=0.0))
    assert counter is not None
    one = counter.step(make_batch(pictures=[True], lengths=[4]))
    other = counter.step(make_batch(pictures=[False], lengths=[0]))
    both = counter.step(make_batch(pictures=[True, False], lengths=[4, 0]))
    assert both.item() == pytest.approx((one + other).item())
    assert other.item() == pytest.approx(3 * (counter.position + counter.pair))  # CLS alone


def test_known_gpus_have_a_peak_and_others_none() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", precision="bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", precision="bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", precision="fp32") == 19.5e12
    assert peak_flops("NVIDIA L40S", precision="bf16") == 362e12
    assert peak_flops("cpu", precision="fp32") is None


def test_a_share_of_the_peak_is_told_for_known_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"device": torch.device("cpu"), "precision": "bf16", "num_ranks": 2}
    assert set(usage(None, **cpu)) == {"peak_memory_gib"}
    assert set(usage(1e12, **cpu)) == {"peak_memory_gib", "model_tflops"}
    monkeypatch.setattr("alignrec.pretrain.usage.device_name", lambda _: "NVIDIA H100 80GB HBM3")
    told = usage(989e12, **cpu)
    assert told["mfu"] == pytest.approx(0.5)
    assert told["model_tflops"] == pytest.approx(989.0)


def test_peak_memory_rises_with_what_is_taken_and_stays() -> None:
    cpu = torch.device("cpu")
    slack = GIBIBYTE // 64  # the kernel counts pages a processor at a time
    taken = torch.ones(GIBIBYTE // 8)  # 512 MiB, written to
    after = peak_memory_bytes(cpu)
    assert after >= taken.nbytes - slack
    del taken
    assert peak_memory_bytes(cpu) >= after - slack
