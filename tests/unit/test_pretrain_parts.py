"""Encoder, masks, tokenizer, schedule and settings of the pretrainer."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from alignrec import configuration
from alignrec.data.loader import NO_ITEM, ItemBatch
from alignrec.errors import UserError
from alignrec.pretrain import STAGE
from alignrec.pretrain.config import PretrainConfig, TokenizerConfig
from alignrec.pretrain.data import Split, describe_batch, equal_shares, make_plan
from alignrec.pretrain.deepspeed_config import deepspeed_settings
from alignrec.pretrain.encoder import (
    Encoder,
    load_encoder,
    patchify,
    pool,
    save_encoder,
    unpatchify,
)
from alignrec.pretrain.masking import draw_masks, mask_blocks, replace_words
from alignrec.pretrain.objective import MaskedBatch, build_model
from alignrec.pretrain.schedule import learning_rate
from alignrec.pretrain.tokenizer import load_words, train, write_tokenizer
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER, TINY_MASKS

TINY = {"encoder": TINY_ENCODER}
NOTHING = {"patch_ratio": 0, "paired_text_ratio": 0, "alone_text_ratio": 0, "summary_weight": 0}


def make_config(**section: object) -> PretrainConfig:
    return configuration.build(PretrainConfig, {**TINY, **section}, section="pretrain")


def make_batch(*, num_items: int = 3, length: int = 9, seed: int = 0) -> ItemBatch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 50, size=(num_items, length))
    tokens[:, 0], tokens[:, -1] = 0, 2
    return ItemBatch(
        item_index=np.arange(10, 10 + num_items),
        images=rng.integers(0, 256, size=(num_items, 16, 16, 3), dtype=np.uint8),
        has_image=np.ones(num_items, dtype=bool),
        tokens=tokens,
        text_padding=np.zeros(tokens.shape, dtype=bool),
    )


def make_encoder() -> Encoder:
    config = make_config()
    return build_model(config.encoder.architecture(50), config.objective, seed=0).encoder.eval()


def encode(encoder: Encoder, batch: ItemBatch) -> torch.Tensor:
    with torch.no_grad():
        streams = encoder(
            torch.from_numpy(batch.images),
            torch.from_numpy(batch.has_image),
            torch.from_numpy(batch.tokens),
            torch.from_numpy(batch.text_padding),
        )
    return streams.vision[:, 0]


def test_base_has_the_parameter_counts_of_beit3() -> None:
    section = {"encoder": {"size": "base", "image_size": 224}}
    config = configuration.build(PretrainConfig, section, section="pretrain")
    with torch.device("meta"):
        encoder = Encoder(config.encoder.architecture(64_010))
        mlm_head = torch.nn.Linear(768, 64_010)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(220.99, abs=0.005)
    assert sum(p.numel() for p in mlm_head.parameters()) / 1e6 == pytest.approx(49.22, abs=0.005)


def test_parameter_names_are_those_of_torchscale() -> None:
    names = set(make_encoder().state_dict())
    layer = "encoder.layers.0"
    assert {
        "text_embed.weight",
        "vision_embed.cls_token",
        "vision_embed.mask_token",
        "vision_embed.proj.weight",
        "encoder.embed_positions.A.weight",
        "encoder.embed_positions.B.weight",
        f"{layer}.self_attn.q_proj.A.weight",
        f"{layer}.self_attn.out_proj.B.bias",
        f"{layer}.self_attn.inner_attn_ln.A.weight",
        f"{layer}.self_attn_layer_norm.B.weight",
        f"{layer}.ffn.A.fc1.weight",
        f"{layer}.ffn.B.ffn_layernorm.weight",
        f"{layer}.final_layer_norm.A.weight",
        "encoder.layer_norm.B.weight",
    } <= names


def test_what_is_absent_or_padded_cannot_be_seen() -> None:
    encoder, batch = make_encoder(), make_batch()
    batch.has_image[0] = False
    batch.text_padding[1, 5:] = True
    before = encode(encoder, batch)
    batch.images[0] = 255 - batch.images[0]
    batch.tokens[1, 5:] = 7
    assert torch.equal(encode(encoder, batch), before)
    batch.images[2] = 255 - batch.images[2]
    assert not torch.equal(encode(encoder, batch)[2], before[2])


def test_an_item_with_neither_picture_nor_text_is_finite() -> None:
    encoder, batch = make_encoder(), make_batch()
    batch.has_image[0] = False
    batch.text_padding[0] = True
    assert torch.isfinite(encode(encoder, batch)).all()


def test_text_reaches_cls_and_padding_to_a_longer_batch_changes_nothing() -> None:
    encoder, batch = make_encoder(), make_batch()
    first = encode(encoder, batch)
    wider = ItemBatch(
        batch.item_index,
        batch.images,
        batch.has_image,
        np.pad(batch.tokens, ((0, 0), (0, 4)), constant_values=1),
        np.pad(batch.text_padding, ((0, 0), (0, 4)), constant_values=True),
    )
    torch.testing.assert_close(encode(encoder, wider), first, rtol=0, atol=1e-6)
    batch.tokens[0, 3] = 49
    assert (encode(encoder, batch)[0] - first[0]).abs().max() > 1e-4


def test_patches_and_back_is_the_picture() -> None:
    images = torch.randint(0, 256, (2, 12, 12, 3), dtype=torch.uint8)
    patches = patchify(images, 4)
    assert patches.shape == (2, 9, 48)
    assert torch.equal(unpatchify(patches, 4), images)


def test_patch_projection_is_the_strided_convolution() -> None:
    encoder = make_encoder()
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    proj = encoder.vision_embed.proj
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = torch.nn.functional.conv2d(pixels, proj.weight, proj.bias, stride=4)
    torch.testing.assert_close(
        proj(patchify(images, 4)), expected.flatten(2).transpose(1, 2), rtol=0, atol=1e-5
    )


def test_pooling_shapes_and_absent_halves() -> None:
    encoder, batch = make_encoder(), make_batch()
    has_image = torch.tensor([True, False, True])
    padding = torch.from_numpy(batch.text_padding)
    padding[2] = True
    with torch.no_grad():
        streams = encoder(
            torch.from_numpy(batch.images), has_image, torch.from_numpy(batch.tokens), padding
        )
    assert pool(streams, has_image, padding, pooling="cls").shape == (3, 16)
    mean = pool(streams, has_image, padding, pooling="mean")
    assert mean.shape == (3, 32)
    assert (mean[1, :16] == 0).all()
    assert (mean[2, 16:] == 0).all()
    assert (mean[0] != 0).any()
    cls_state = pool(streams, has_image, padding, pooling="cls")
    both = torch.cat([mean, cls_state], dim=1)
    assert torch.equal(pool(streams, has_image, padding, pooling="all"), both)


def test_saved_encoders_come_back_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    encoder = make_encoder()
    save_encoder(encoder.architecture, tmp_path, dict(encoder.state_dict()))
    loaded = load_encoder(tmp_path)
    assert loaded.architecture == encoder.architecture
    assert torch.equal(encode(loaded, make_batch()), encode(encoder, make_batch()))
    cut = (tmp_path / "encoder.safetensors").read_bytes()[:-10]
    mapping = (tmp_path / "encoder.json").read_text().replace('"width": 16', '"width": 32')
    (tmp_path / "encoder.json").write_text(mapping)
    with pytest.raises(UserError, match="does not hold the weights"):
        load_encoder(tmp_path)
    (tmp_path / "encoder.safetensors").write_bytes(cut)
    with pytest.raises(UserError, match="does not hold the weights"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(("side", "count"), [(4, 6), (8, 26), (14, 78), (3, 0), (3, 9)])
def test_masked_patches_are_exact_in_number_and_mostly_in_blocks(side: int, count: int) -> None:
    neighbours = 0
    for seed in range(30):
        masked = mask_blocks(side, count, np.random.default_rng(seed))
        assert masked.sum() == count
        neighbours += (masked[:, 1:] & masked[:, :-1]).sum()
    if side >= 8:
        by_chance = 30 * side * (side - 1) * (count / side**2) ** 2
        assert neighbours > 1.5 * by_chance


def test_masks_depend_on_epoch_and_item_alone() -> None:
    batch = make_batch(num_items=4)
    alone = ItemBatch(*(getattr(batch, name)[2:3] for name in ITEM_FIELDS))
    among, single = draw_masks(batch, TINY_MASKS, epoch=3), draw_masks(alone, TINY_MASKS, epoch=3)
    assert np.array_equal(among.patches[2], single.patches[0])
    assert np.array_equal(among.tokens[2], single.tokens[0])
    later = draw_masks(batch, TINY_MASKS, epoch=4)
    assert not np.array_equal(among.patches, later.patches)


ITEM_FIELDS = ("item_index", "images", "has_image", "tokens", "text_padding")


def test_shares_of_masked_tokens_and_no_mask_where_nothing_is() -> None:
    batch = make_batch(num_items=3, length=22)
    batch.has_image[1] = False
    batch.item_index[2] = NO_ITEM
    masks = draw_masks(batch, TINY_MASKS, epoch=0)
    assert masks.text.sum(axis=1).tolist() == [10, 3, 0]  # half, 15 % rounded up, padding
    assert masks.patches.sum(axis=1).tolist() == [6, 0, 0]
    assert not masks.text[:, [0, -1]].any()  # the ends of a text are never masked
    assert np.array_equal(masks.tokens[~masks.text], batch.tokens[~masks.text])


def test_masked_tokens_become_mask_random_or_stay() -> None:
    tokens = np.full(20_000, 30)
    shown = replace_words(tokens, TINY_MASKS, np.random.default_rng(0))
    assert (shown == TINY_MASKS.mask_id).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown == 30).mean() == pytest.approx(0.1, abs=0.01)
    assert shown.min() > max(TINY_MASKS.special_ids)


def test_two_halves_of_a_batch_add_up_to_the_whole() -> None:
    config = make_config()
    model = build_model(config.encoder.architecture(50), config.objective, seed=0)
    items = make_batch(num_items=4)
    whole = MaskedBatch.of(items, draw_masks(items, TINY_MASKS, epoch=0))
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        share = ItemBatch(*(getattr(items, name)[part] for name in ITEM_FIELDS))
        parts.append(MaskedBatch.of(share, draw_masks(share, TINY_MASKS, epoch=0)))
    assert torch.equal(sum(p.counts() for p in parts), whole.counts())
    total = sum(model(part)[0] for part in parts)
    torch.testing.assert_close(total, model(whole)[0], rtol=1e-5, atol=1e-5)


def test_without_summary_weight_the_objective_is_beit3s() -> None:
    config = make_config(objective={"summary_weight": 0})
    model = build_model(config.encoder.architecture(50), config.objective, seed=0)
    items = make_batch()
    losses, _ = model(MaskedBatch.of(items, draw_masks(items, TINY_MASKS, epoch=0)))
    assert losses[:2].min() > 0
    assert losses[2:].tolist() == [0, 0]


def test_tokenizer_is_a_function_of_the_text_and_encodes_anything(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "d", num_items=40)
    for name in ("a.json", "b.json"):
        write_tokenizer(
            folder, PretrainConfig(tokenizer=TokenizerConfig(vocabulary_size=320)), tmp_path / name
        )
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    words = load_words(tmp_path / "a.json", max_length=12)
    ids = words("Ein 猫 🎬 ﬁlm\x00 " + "garden " * 50)
    assert len(ids) == 12
    assert (ids[0], ids[-1]) == (words.start_id, words.end_id)
    assert words.text(words("garden seed")) == "garden seed"
    assert not set(ids[1:-1]) & set(words.special_ids)


def test_a_tokenizer_without_mask_is_refused(tmp_path: Path) -> None:
    tokenizer = train(iter(["a b c"]), 300)
    content = tokenizer.to_str().replace("<mask>", "<other>")
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"has no token <mask> or \[MASK\]"):
        load_words(tmp_path / "t.json", max_length=12)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken.json is no tokenizer.json"):
        load_words(tmp_path / "broken.json", max_length=12)


def test_special_tokens_may_lie_anywhere_and_are_never_masked(tmp_path: Path) -> None:
    save_words(tmp_path / "t.json", ["[PAD]", "seed", "[CLS]", "[MASK]", "garden", "[SEP]"])
    words = load_words(tmp_path / "t.json", max_length=12)
    assert words.special_ids == (0, 2, 5)
    settings = dataclasses.replace(
        TINY_MASKS, mask_id=words.mask_id, special_ids=words.special_ids, vocabulary_size=6
    )
    rng = np.random.default_rng(0)
    assert set(replace_words(np.full(500, 1), settings, rng)) == {1, 3, 4}
    batch = make_batch(num_items=2)
    batch.tokens[:] = [2, 1, 4, 1, 4, 1, 4, 1, 5]
    for epoch in range(5):
        masks = draw_masks(batch, settings, epoch=epoch)
        assert masks.text.sum() == 8
        assert not masks.text[:, [0, -1]].any()


def test_a_vocabulary_ends_after_its_largest_id(tmp_path: Path) -> None:
    save_words(tmp_path / "t.json", ["<s>", "<pad>", "</s>", "<unk>", "seed"], mask=9)
    words = load_words(tmp_path / "t.json", max_length=12)
    assert words.vocabulary_size == 10
    assert words.special_ids == (0, 1, 2)


def save_words(path: Path, words: list[str], **more: int) -> None:
    ids = {word: number for number, word in enumerate(words)}
    ids |= {f"<{name}>": number for name, number in more.items()}
    Tokenizer(models.WordLevel(ids, unk_token="seed")).save(str(path))


def test_another_content_of_a_given_tokenizer_makes_the_encoder_stale(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", num_items=4)
    config = make_config(tokenizer={"path": str(tmp_path / "t.json")})
    marks = set()
    for word in ("seed", "garden", "seed"):
        save_words(tmp_path / "t.json", ["<s>", "<pad>", "</s>", "<mask>", word])
        marks.add(STAGE.fingerprint(config, {"dataset": dataset}))
    assert len(marks) == 2


def test_a_given_tokenizer_has_its_own_size() -> None:
    with pytest.raises(UserError, match=r"vocabulary_size=500 has no effect on t.json"):
        make_config(tokenizer={"path": "t.json", "vocabulary_size": 500})


def test_rate_rises_then_falls_to_its_floor() -> None:
    config = make_config(learning_rate=1.0, warmup_fraction=0.1, final_rate_fraction=0.1)
    rates = [learning_rate(config, step=step, num_steps=100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_deepspeed_settings_multiply_up() -> None:
    config = make_config(global_batch_size=48, micro_batch_size=8, zero_stage=1)
    settings = deepspeed_settings(config, num_ranks=2)
    assert settings["train_batch_size"] == 48
    assert settings["train_micro_batch_size_per_gpu"] == 8
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["zero_optimization"]["stage"] == 1
    assert "auto" not in str(settings)
    assert deepspeed_settings(config, num_ranks=5)["train_batch_size"] == 50  # 5 x 2 x 5
    with pytest.raises(UserError, match="zero_stage=0"):
        deepspeed_settings(make_config(precision="bf16", zero_stage=0), num_ranks=1)


@pytest.mark.parametrize("size", [1, 7, 48, 64])
@pytest.mark.parametrize("most", [None, 1, 3, 7])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_any_number_of_ranks_reads_the_same_global_batches(
    size: int, most: int | None, num_ranks: int
) -> None:
    config = make_config(global_batch_size=size, micro_batch_size=most)
    if size < max(most or 1, num_ranks):
        with pytest.raises(UserError, match=rf"global_batch_size={size} is less than "):
            config.split_batch(num_ranks)
        return
    split = Split(np.arange(2 * size + size // 2), np.arange(0), np.arange(0))
    plan = make_plan(split, config, num_ranks=num_ranks)
    assert plan.micro_batch_size <= (most or size)
    for step in range(plan.steps_per_epoch):
        shares = [plan.micro_batches(step, rank) for rank in range(num_ranks)]
        assert {len(share) for share in shares} == {plan.accumulation}
        rows = [m.rows for micro in zip(*shares, strict=True) for m in micro]
        assert np.array_equal(np.concatenate(rows), plan.global_batch(step).rows)
        assert max(map(len, rows)) <= plan.micro_batch_size
    fits = plan.micro_batch_size * plan.accumulation * num_ranks == size
    assert (" in at most " in describe_batch(plan)) == (not fits)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"encoder": {"image_size": 16, "patch_size": 16}}, r"patch_ratio=0.4 of the 1 patches"),
        ({"objective": NOTHING}, r"the loss would be 0"),
        ({"objective": {**NOTHING, "patch_ratio": 0.4, "image_weight": 0}}, r"the loss would be 0"),
    ],
)
def test_objectives_that_predict_nothing_are_refused(
    section: dict[str, dict[str, float]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_config(**section)


def test_objectives_that_predict_one_thing_are_taken() -> None:
    for kept in ({"summary_weight": 1}, {"alone_text_ratio": 0.15}, {"patch_ratio": 0.4}):
        make_config(objective={**NOTHING, **kept})
    single = {"image_size": 16, "patch_size": 16}
    make_config(encoder=single, objective={"patch_ratio": 0})


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"image_size=16 is no multiple of patch_size=5"):
        make_config(encoder={"image_size": 16, "patch_size": 5}).encoder.architecture(50)
    with pytest.raises(UserError, match=r"width=16 cannot be split over num_heads=3"):
        make_config(encoder={"width": 16, "num_heads": 3}).encoder.architecture(50)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 16, 17])
def test_shares_are_equally_many_and_complete(num_rows: int) -> None:
    shares = [
        list(equal_shares(np.arange(num_rows), batch_size=4, rank=rank, num_ranks=3))
        for rank in range(3)
    ]
    assert len({len(share) for share in shares}) == 1
    rows = sorted(int(row) for share in shares for batch in share for row in batch.rows)
    assert rows == list(range(num_rows))
