"""Pixels and codes as what masked patches are predicted as: the same laws for every target."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from alignrec import configuration
from alignrec.data.loader import NO_ITEM, ItemBatch
from alignrec.errors import UserError
from alignrec.pretrain import STAGE, planning
from alignrec.pretrain.codebook import Codebook, learn_codebook
from alignrec.pretrain.config import ObjectiveConfig, PretrainConfig
from alignrec.pretrain.encoder import cut_patches, patchify
from alignrec.pretrain.masking import draw_masks
from alignrec.pretrain.objective import MaskedBatch, MaskedModel, build_model
from alignrec.pretrain.targets import (
    CodebookTarget,
    PictureTarget,
    PixelTarget,
    VqkdTarget,
    pixel_target,
)
from alignrec.pretrain.verdict import verdict
from alignrec.pretrain.vqkd import VqkdTokenizer
from alignrec.telemetry import Telemetry
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER, TINY_MASKS

CONFIG: PretrainConfig = configuration.build(
    PretrainConfig, {"encoder": TINY_ENCODER}, section="pretrain"
)
ARCHITECTURE = CONFIG.encoder.architecture(50)
TARGETS = ("pixels", "normalised", "codebook", "vqkd")
CODES = ("codebook", "vqkd")


def draw_pictures(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, size=(count, 16, 16, 3), dtype=np.uint8)


def make_codebook() -> Codebook:
    patches = cut_patches(torch.from_numpy(draw_pictures(60, seed=5)), 4).flatten(0, 1).numpy()
    quiet = Telemetry(Path("unused"), "pretrain", enabled=False)
    return learn_codebook(
        patches, num_codes=12, seed=0, device=torch.device("cpu"), telemetry=quiet
    )


def make_tokenizer() -> VqkdTokenizer:
    torch.manual_seed(3)
    tokenizer = VqkdTokenizer(
        num_layers=1,
        width=64,
        hidden=96,
        patch_size=4,
        patches_per_side=4,
        num_codes=20,
        code_dim=4,
    )
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    return tokenizer.eval()


def make_target(name: str) -> PictureTarget:
    if name == "codebook":
        return CodebookTarget(make_codebook(), 4)
    if name == "vqkd":
        return VqkdTarget(make_tokenizer())
    return pixel_target(ARCHITECTURE, normalise=name == "normalised")


def make_model(name: str) -> MaskedModel:
    return build_model(ARCHITECTURE, ObjectiveConfig(), seed=0, target=make_target(name))


def make_items() -> ItemBatch:
    """A pair, a picture alone, a text alone, neither, a padding row, and a pair."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 50, size=(6, 9))
    tokens[:, 0], tokens[:, -1] = 0, 2
    text_padding = np.zeros(tokens.shape, dtype=bool)
    text_padding[[1, 3, 4]] = True
    return ItemBatch(
        item_index=np.array([10, 11, 12, 13, NO_ITEM, 15]),
        images=draw_pictures(6, seed=1),
        has_image=np.array([True, True, False, False, False, True]),
        tokens=tokens,
        text_padding=text_padding,
    )


def mask(items: ItemBatch) -> MaskedBatch:
    return MaskedBatch.of(items, draw_masks(items, TINY_MASKS, epoch=0))


def rows(items: ItemBatch, part: slice) -> ItemBatch:
    names = ("item_index", "images", "has_image", "tokens", "text_padding")
    return ItemBatch(*(getattr(items, name)[part] for name in names))


@pytest.mark.parametrize("name", TARGETS)
def test_one_batch_may_hold_pairs_pictures_texts_and_nothing(name: str) -> None:
    model, items = make_model(name), make_items()
    batch = mask(items)
    losses, predictions = model(batch)
    assert predictions.patches.shape == (3 * 6, model.target.head_size)
    assert len(predictions.patch_goals) == 18
    assert torch.isfinite(losses).all()
    assert (losses > 0).all()
    parts = [model(mask(rows(items, slice(i, i + 1)))) for i in range(6)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), losses, rtol=1e-5, atol=1e-4)
    assert torch.equal(torch.cat([p.patch_goals for _, p in parts]), predictions.patch_goals)
    losses[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.mim_head.weight.grad is not None
    items.images[2:5] = 255 - items.images[2:5]  # pictures that are not there
    assert torch.equal(model(mask(items))[0], losses)


@pytest.mark.parametrize("name", TARGETS)
def test_a_batch_without_pictures_has_no_picture_loss(name: str) -> None:
    model = make_model(name)
    losses, predictions = model(mask(rows(make_items(), slice(2, 5))))
    assert losses[[1, 3]].tolist() == [0, 0]
    assert len(predictions.patches) == len(predictions.patch_goals) == 0
    losses.sum().backward()
    tally = model.target.tally(predictions.patches, predictions.patch_goals)
    assert (tally == 0).all()


@pytest.mark.parametrize("name", CODES)
def test_the_loss_of_codes_is_cross_entropy_also_for_the_summary(name: str) -> None:
    model, batch = make_model(name), mask(make_items())
    losses, predictions = model(batch)
    shares = predictions.patches.softmax(dim=1)
    told = shares[torch.arange(18), predictions.patch_goals]
    torch.testing.assert_close(losses[1], -told.log().sum(), rtol=1e-5, atol=1e-5)
    assert losses[3].item() == pytest.approx(18 * math.log(model.target.head_size), rel=0.2)


@pytest.mark.parametrize("name", CODES)
def test_what_goals_come_from_is_neither_trained_nor_saved(name: str) -> None:
    model = make_model(name)
    names = {n.split(".")[0] for n in model.state_dict()}
    assert names == {"encoder", "mlm_head", "mim_head", "summary"}
    assert {p.dtype for p in model.bfloat16().parameters()} == {torch.bfloat16}
    if isinstance(model.target, VqkdTarget):
        assert {p.dtype for p in model.target.tokenizer.parameters()} == {torch.float32}
    assert model.target.frozen_bytes > 0


def test_goals_are_the_codes_of_the_masked_patches_alone() -> None:
    batch = mask(make_items())
    codebook, tokenizer = make_codebook(), make_tokenizer()
    patches = cut_patches(batch.images, 4)
    expected = codebook.codes(patches.flatten(0, 1)).view(6, 16)[batch.masked_patches]
    goals = CodebookTarget(codebook, 4).goals(batch.images, batch.patch_places)
    assert torch.equal(goals, expected)
    expected = tokenizer.codes(batch.images)[batch.masked_patches]
    goals = VqkdTarget(tokenizer).goals(batch.images, batch.patch_places)
    assert torch.equal(goals, expected)


def test_cut_patches_are_the_pixels_of_the_encoders_patches() -> None:
    images = torch.from_numpy(draw_pictures(2, seed=3))
    assert torch.equal(cut_patches(images, 4).float() / 127.5 - 1, patchify(images, 4))


def judge_codes(target: PictureTarget, *, goals: list[int], said: list[int]) -> dict[str, float]:
    """Judge predictions in two batches, with a loss of 1.5 each."""
    predicted = torch.nn.functional.one_hot(torch.tensor(said), target.head_size).float()
    truth, parts = torch.tensor(goals), (slice(1), slice(1, len(said)))
    tally = sum(target.tally(predicted[part], truth[part]) for part in parts)
    assert isinstance(tally, torch.Tensor)
    return target.summary(tally, loss=1.5 * len(said), num_patches=len(said))


def test_codes_of_a_tokenizer_are_judged_beside_their_own_shares() -> None:
    found = judge_codes(make_target("vqkd"), goals=[0, 0, 0, 1], said=[0, 1, 0, 1])
    assert found == {
        "image_loss": 1.5,
        "image_loss_entropy": pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
        "image_accuracy": 0.75,
        "image_accuracy_most_frequent": 0.75,
    }
    (line,) = verdict(found)
    assert "75.0% of the codes right (most frequent of these codes: 75.0%)" in line


def test_codes_of_a_codebook_are_judged_beside_the_shares_of_training() -> None:
    counts = torch.tensor([1, 5, 0, 90])
    codebook = dataclasses.replace(make_codebook(), counts=counts, centers=torch.zeros(4, 9))
    found = judge_codes(CodebookTarget(codebook, 4), goals=[0, 0, 2, 3], said=[0, 1, 2, 1])
    assert found == {
        "image_loss": 1.5,
        "image_loss_unigram": pytest.approx(math.log(100) - math.log(2 * 2 * 1 * 91) / 4),
        "image_accuracy": 0.5,
        "image_accuracy_unigram": 0.25,  # code 3 of training, though 0 is held out more often
    }
    (line,) = verdict(found)
    assert "50.0% of the codes right (most frequent code of training: 25.0%)" in line


def test_no_shares_of_training_do_better_than_the_entropy_and_the_right_ones_as_well() -> None:
    generator = torch.Generator().manual_seed(0)
    entropies = CodebookTarget(make_codebook(), 4), make_target("vqkd")
    codes = entropies[0].head_size
    for _ in range(20):
        goals = torch.randint(codes, (30,), generator=generator).tolist()
        found, bound = (judge_codes(target, goals=goals, said=goals) for target in entropies)
        assert found["image_loss_unigram"] >= bound["image_loss_entropy"]
        assert found["image_accuracy_unigram"] <= bound["image_accuracy_most_frequent"]
    shares = (make_codebook().counts + 1).double()
    shares /= shares.sum()
    entropy = float(-(shares * shares.log()).sum())
    assert entropies[0].constant(shares)["image_loss_unigram"] == pytest.approx(entropy)


def test_pixels_are_judged_beside_the_mean_patch() -> None:
    target = PixelTarget(patch_size=2, head_size=12, normalise=False)
    goals = torch.randn(9, 12)
    found = target.summary(target.tally(goals * 0, goals), loss=3.0, num_patches=9)
    best = (goals - goals.mean(dim=0)).square().mean().item()
    assert found == {
        "image_loss": pytest.approx(1 / 3),
        "image_loss_mean_patch": pytest.approx(best, rel=1e-5),
    }
    assert "squared error 0.3333" in next(iter(verdict(found)))


def test_predictions_are_shown_as_pixels_where_there_are_any() -> None:
    true = torch.rand(5, 48) * 2 - 1
    assert torch.equal(make_target("pixels").pixels(true, true), true)
    normalised = make_target("normalised")
    goals = (true - true.mean(dim=1, keepdim=True)) / true.std(dim=1, keepdim=True)
    torch.testing.assert_close(normalised.pixels(goals, true), true, rtol=0, atol=1e-4)
    target = CodebookTarget(make_codebook(), 4)
    codes = torch.tensor([3, 0])
    shown = target.pixels(torch.eye(target.head_size)[codes], true[:2])
    means = target.codebook.mean_patches[codes].float() / 127.5 - 1
    assert torch.equal(shown, means)
    assert torch.equal(target.best_pixels(codes), means)
    assert make_target("vqkd").pixels(torch.zeros(2, 20), true[:2]) is None


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (
            {"targets": "codebook", "normalise_patches": True},
            "normalise_patches=True has no effect",
        ),
        ({"num_codes": 100}, "num_codes=100 has no effect"),
        ({"codebook_pictures": 100}, "codebook_pictures=100 has no effect"),
        ({"vqkd": "vqkd.pth"}, "vqkd=vqkd.pth has no effect"),
        ({"targets": "vqkd"}, "needs BEiT v2's tokenizer"),
        ({"targets": "vqkd", "vqkd": "v.pth", "num_codes": 9}, "num_codes=9 has no effect"),
        ({"targets": "pixel"}, "pixels"),
    ],
)
def test_settings_of_another_target_are_refused(objective: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration.build(ObjectiveConfig, objective, section="pretrain.objective")


def test_another_content_of_the_tokenizer_makes_the_encoder_stale(tmp_path: Path) -> None:
    dataset, path = write_dataset(tmp_path / "dataset", num_items=4), tmp_path / "vqkd.pth"
    section = {"objective": {"targets": "vqkd", "vqkd": str(path)}}
    config = configuration.build(PretrainConfig, section, section="pretrain")
    marks = []
    for content in (b"a", b"b"):
        path.write_bytes(content)
        marks.append(STAGE.fingerprint(config, {"dataset": dataset}))
    assert marks[0] != marks[1]


def test_the_plan_counts_the_head_of_codes_and_the_codebook(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=40, image_size=16)
    section = {
        "encoder": TINY_ENCODER,
        "tokenizer": {"vocabulary_size": 300},
        "valid_fraction": 0.0,
        "global_batch_size": 4,
    }
    plans = {}
    for targets in ("pixels", "codebook"):
        changed = section | {"objective": {"targets": targets}}
        config = configuration.build(PretrainConfig, changed, section="pretrain")
        plans[targets] = planning.plan(config, dataset)
    codes = 40 * 16 // 32
    fewer = plans["pixels"].num_parameters - plans["codebook"].num_parameters
    assert fewer == (48 - codes) * (16 + 1)
    assert plans["pixels"].memory[2].targets == 0
    assert plans["codebook"].memory[2].targets > codes * 48
    assert plans["codebook"].memory[2].peak > plans["codebook"].memory[2].targets


class _Waits(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: numbers read, and sizes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        indices = args[1] if function is torch.ops.aten.index.Tensor else []
        by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
        names = ("_local_scalar_dense", "nonzero", "masked_select")
        if by_mask or function.overloadpacket.__name__ in names:
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["pixels", "normalised", "codebook"])
def test_heads_targets_and_losses_do_not_wait_for_the_device(name: str) -> None:
    model, batch = make_model(name), mask(make_items())
    states = model.encoder(batch.images, batch.has_image, batch.tokens, batch.text_padding)
    model.encoder.forward = lambda *_: states
    with _Waits() as waits:
        losses, _ = model(batch)
        losses.sum().backward()
    assert waits.found == []
    with _Waits() as waits:
        batch.targets[batch.masked_text].sum().item()
    assert len(waits.found) == 2
