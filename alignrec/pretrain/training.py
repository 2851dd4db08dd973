"""Stage 1: train the encoder by mask-then-predict (dataset -> encoder)."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64
from torch import Tensor

from alignrec import artifacts, checkpoint, configuration
from alignrec.distributed.host_memory import freed_memory_kept
from alignrec.distributed.peers import lost_peers_reported
from alignrec.distributed.process_group import (
    Rank,
    all_reduce_sum,
    barrier,
    process_group,
    rank_from_environment,
)
from alignrec.distributed.watchdog import Beat, Watchdog, unwatched
from alignrec.errors import StageFailure
from alignrec.pretrain.bridges import prepare_bridges, read_bridges
from alignrec.pretrain.compilation import compile_layers
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import (
    TrainingData,
    describe_batch,
    make_loader,
    open_training_data,
)
from alignrec.pretrain.encoder import (
    ARCHITECTURE,
    load_weights,
    read_architecture,
    save_encoder,
    write_architecture,
)
from alignrec.pretrain.engine import Engine, deepspeed_group
from alignrec.pretrain.held_out import judge, write_reconstructions
from alignrec.pretrain.initial import (
    INITIAL,
    TOKEN_EMBEDDINGS,
    has_initial,
    read_initial,
    write_initial,
)
from alignrec.pretrain.objective import (
    LOSSES,
    MaskedBatch,
    MaskedModel,
    build_model,
    loss_weights,
)
from alignrec.pretrain.schedule import learning_rate
from alignrec.pretrain.target_files import open_target, prepare_target
from alignrec.pretrain.tokenizer import TOKENIZER, Words, load_words, write_tokenizer
from alignrec.pretrain.usage import FlopCounter, usage
from alignrec.pretrain.verdict import verdict
from alignrec.pretrain.word_vectors import (
    VECTORS,
    counts_words,
    read_text_head,
    read_word_vectors,
    write_word_vectors,
)
from alignrec.stage import Context
from alignrec.telemetry import HISTORY, Telemetry

CHECKPOINTS = "checkpoints"
FIRST_START = "first_start.json"
_ITEMS_NAMED = 8


def run(config: PretrainConfig, context: Context) -> None:
    """Train on this rank; rank 0 writes the artifact."""
    rank = rank_from_environment()
    with Telemetry(context.log_dir, "pretrain", enabled=rank.is_first) as telemetry:
        with (
            process_group(timeout_seconds=config.timeout_seconds),
            deepspeed_group(),
            freed_memory_kept(),
            lost_peers_reported(rank, doing="pretraining"),
        ):
            config.split_batch(rank.world_size)  # a mistake here is told before anything is written
            draft = _open_draft(config, context, rank, telemetry)
            bounded = _within_first_start(config, draft.work)
            trainer, weights = _train(bounded, context, draft, rank, telemetry)
        if rank.is_first:  # the peers do not wait: checksums may take longer than the timeout
            _publish(trainer, weights, draft, context, config)


def _train(
    config: PretrainConfig,
    context: Context,
    draft: artifacts.Draft,
    rank: Rank,
    telemetry: Telemetry,
) -> tuple["Trainer", dict[str, Tensor]]:
    """Train and judge the model; returns the encoder's weights, on rank 0 alone."""
    words = load_words(draft.path / TOKENIZER, max_length=config.encoder.max_text_tokens)
    opened = open_training_data(context.inputs["dataset"], config, words, num_ranks=rank.world_size)
    with contextlib.closing(opened) as data:
        watchdog = Watchdog(
            rank, context.log_dir, seconds=config.watchdog_seconds, doing="pretraining"
        )
        trainer = Trainer(config, data, words, rank, telemetry, draft.path, beat=watchdog.beat)
        trainer.resume()
        with watchdog:
            trainer.train()
            return trainer, _finish(trainer, draft)


def _open_draft(
    config: PretrainConfig, context: Context, rank: Rank, telemetry: Telemetry
) -> artifacts.Draft:
    if rank.is_first:
        draft = artifacts.open_draft(context.output, fingerprint=context.fingerprint)
        _prepare(config, context.inputs["dataset"], draft, rank, telemetry)
    barrier(rank)
    return artifacts.Draft(artifacts.partial_path(context.output))


def _within_first_start(config: PretrainConfig, work: Path) -> PretrainConfig:
    """Return settings under which no micro batch is larger than when the run first started.

    So a run that goes on with fewer ranks needs no more memory for activations on each.
    """
    if config.micro_batch_size is not None:
        return config
    most = json.loads((work / FIRST_START).read_text(encoding="utf-8"))["micro_batch_size"]
    return dataclasses.replace(config, micro_batch_size=most)


def _prepare(
    config: PretrainConfig,
    dataset: Path,
    draft: artifacts.Draft,
    rank: Rank,
    telemetry: Telemetry,
) -> None:
    """Write what all ranks start from, unless a killed run has left it."""
    if not (draft.work / FIRST_START).exists():
        micro, _ = config.split_batch(rank.world_size)
        artifacts.write_json(draft.work / FIRST_START, {"micro_batch_size": micro})
    if not (draft.path / TOKENIZER).exists():
        written = draft.work / TOKENIZER
        write_tokenizer(dataset, config, written)
        written.replace(draft.path / TOKENIZER)
    words = load_words(draft.path / TOKENIZER, max_length=config.encoder.max_text_tokens)
    if not (draft.work / ARCHITECTURE).exists():
        # asked once: what a hub says may be another thing for the next rank or after a kill
        write_architecture(config.encoder.architecture(words.vocabulary_size), draft.work)
    architecture = read_architecture(draft.work)
    prepare_target(
        config,
        architecture,
        dataset=dataset,
        words=words,
        draft=draft,
        device=rank.device,
        telemetry=telemetry,
    )
    if has_initial(config):
        if not (draft.work / INITIAL).exists():
            target = open_target(config, architecture, draft.path, torch.device("cpu"))
            telemetry.say(write_initial(config, architecture, draft.work / INITIAL, picture=target))
        prepare_bridges(
            config,
            architecture,
            words,
            dataset,
            draft.work,
            device=rank.device,
            telemetry=telemetry,
        )
    if counts_words(config) and not (draft.work / VECTORS).exists():
        write_word_vectors(dataset, words, config, draft.work / VECTORS, width=architecture.width)


class Trainer:
    """The training loop of one rank with its place in the run.

    It beats after each part that does not wait for the peers, as often on every rank: who hangs in
    one has fewer beats than who waits in the next collective.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: TrainingData,
        words: Words,
        rank: Rank,
        telemetry: Telemetry,
        folder: Path,
        *,
        beat: Beat = unwatched,
    ) -> None:
        self.config = config
        self.data = data
        self.words = words
        self.rank = rank
        self.telemetry = telemetry
        self.folder = folder
        self.beat = beat
        self.checkpoints = folder / artifacts.WORK / CHECKPOINTS
        self.step = 0
        self.num_steps = config.epochs * data.plan.steps_per_epoch
        if config.max_steps is not None:
            self.num_steps = min(self.num_steps, config.max_steps)
        self.samples_per_second: float | None = None  # known when this process has trained
        self.engine: Engine
        self.flops: FlopCounter | None

    def resume(self) -> None:
        """Build the model and go on from the newest checkpoint, if there is one."""
        config = self.config
        found = checkpoint.latest(self.checkpoints, rank=self.rank)
        # a checkpoint has no frozen weights: they are still what they were at first
        state = self._first_state() if not found or config.encoder.frozen else {}
        state |= _load_state(found) if found else {}
        # a checkpoint may have embeddings for more tokens than its tokenizer has
        rows = len(state.get(TOKEN_EMBEDDINGS, range(self.words.vocabulary_size)))
        settled = read_architecture(self.checkpoints.parent)
        architecture = dataclasses.replace(settled, vocabulary_size=rows)
        target = open_target(config, architecture, self.folder, self.rank.device)
        model = build_model(architecture, config.objective, seed=config.seed, target=target)
        weights = {n: t for n, t in state.items() if "/" not in n}
        if found:
            load_weights(model, weights)
        else:
            model.load_state_dict(weights, strict=False)
        if found:
            self.step = found.step
        self.telemetry.rewind(self.step)
        self._describe(model, resumed=found is not None)
        model.encoder.encoder.recompute = config.activation_checkpointing
        if fault := compile_layers(model, config):
            self.telemetry.say(fault)
        self.flops = FlopCounter.of(model)
        self.engine = Engine(model, config, self.rank, beat=self.beat)
        if found:
            self.engine.load_state(state, self.step)

    def _first_state(self) -> dict[str, Tensor]:
        """Return the parameters that a new run does not draw at random."""
        work, config = self.checkpoints.parent, self.config
        counted = read_text_head(work / VECTORS) if counts_words(config) else {}
        if has_initial(config):
            return counted | read_initial(work / INITIAL) | read_bridges(work)
        if counted:
            counted[TOKEN_EMBEDDINGS] = read_word_vectors(work / VECTORS)
        return counted

    def train(self) -> None:
        """Do the steps that are left."""
        if self.step >= self.num_steps:
            return
        plan, config = self.data.plan, self.config
        loader = make_loader(self.data, config, device=self.rank.device)
        planned = self.data.rank_batches(self.step, self.num_steps, self.rank.index)
        with (
            contextlib.closing(loader.batches(planned)) as stream,
            self.telemetry.progress(
                self._items_before(self.num_steps), "samples", done=self._items_before(self.step)
            ) as progress,
        ):
            start, waited = time.monotonic(), loader.wait_seconds
            num_items = num_flops = 0.0
            while self.step < self.num_steps:
                batches = [next(stream) for _ in range(plan.accumulation)]
                self.beat()
                values = self.one_step(batches)
                step_items = values.pop("num_items")
                num_items += step_items
                num_flops += values.pop("num_flops", 0.0)
                progress.update(round(step_items), note=f"loss {values['loss']:.3f}")
                if self.step % config.log_steps == 0 or self.step == self.num_steps:
                    took = time.monotonic() - start
                    values["samples_per_second"] = num_items / took
                    share = (loader.wait_seconds - waited) / took
                    values["data_wait_share"] = self._largest(share)
                    values |= self.usage(num_flops / took)
                    self.telemetry.log(values, step=self.step)
                    start, waited = time.monotonic(), loader.wait_seconds
                    num_items = num_flops = 0.0
                if self.step % config.checkpoint_steps == 0 or self.step == self.num_steps:
                    self.save()
            self.samples_per_second = progress.rate

    def _items_before(self, step: int) -> int:
        """Return how many items the steps before this one read; the last of an epoch is short."""
        plan = self.data.plan
        epochs, steps = divmod(step, plan.steps_per_epoch)
        return epochs * len(plan.rows) + steps * plan.global_batch_size

    def _largest(self, value: float) -> float:
        """Return the largest of the ranks' values: the slowest rank is what all wait for."""
        values = torch.tensor(value, dtype=torch.float64, device=self.rank.device)
        if self.rank.world_size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return float(values)

    def save(self) -> None:
        """Write a checkpoint that any number of ranks and any ZeRO stage can go on from."""
        own = {}
        for number, (name, tensor) in enumerate(self.engine.state()):
            if number % self.rank.world_size == self.rank.index:
                own[name] = tensor.float().cpu()
            self.beat()
        self._refuse_spoilt(own)
        checkpoint.save(
            self.checkpoints,
            self.step,
            tensors=own,
            state={},
            rank=self.rank,
            keep=self.config.keep_checkpoints,
            beat=self.beat,
        )

    def _refuse_spoilt(self, own: dict[str, Tensor]) -> None:
        """End the run on every rank when some rank's tensors are not finite."""
        spoilt = sum(not tensor.isfinite().all() for tensor in own.values())
        self.beat()
        count = torch.tensor([spoilt], dtype=torch.float64, device=self.rank.device)
        if num_spoilt := int(all_reduce_sum(count, self.rank)):
            self._stop(
                f"{num_spoilt} tensors of weights and moments are not finite after step {self.step}"
            )

    def one_step(self, batches: list[MaskedBatch]) -> dict[str, float]:
        """Move the parameters once by the gradient of the loss over the global batch.

        Returns:
            Means over the batch of all ranks, and as sums ``num_items`` and, where they are
            counted, ``num_flops``.
        """
        counts = torch.stack([batch.counts() for batch in batches]).sum(dim=0)
        counts = all_reduce_sum(counts.to(self.rank.device), self.rank).clamp(min=1.0)
        scale = counts.reciprocal().float()
        shares = loss_weights(self.config.objective).to(self.rank.device) * scale
        rate = learning_rate(self.config, step=self.step, num_steps=self.num_steps)
        sums = []
        for batch in batches:
            sums.append(self._micro_step(batch.to(self.rank.device), shares))
            self.engine.step(rate)
        self.beat()
        total = all_reduce_sum(torch.stack(sums).sum(dim=0), self.rank)
        # the host waits for the device here and, but for DeepSpeed and the model, nowhere else
        told = torch.cat([total, counts, self.engine.gradient_norm[None]]).tolist()
        losses, (words, codes, items, flops) = told[:4], told[4:8]
        counted, norm = told[8:12], told[12]
        self.step += 1
        self.engine.average(self.step)
        if not math.isfinite(sum(losses)):
            self._stop(
                f"the loss is not a number at step {self.step} (among item_index "
                f"{self._named(batches, sums)})"
            )
        if not math.isfinite(norm):
            self._stop(f"the gradient is not finite at step {self.step}")
        means = [loss / count for loss, count in zip(losses, counted, strict=True)]
        weights = loss_weights(self.config.objective).tolist()
        is_pixels = self.config.objective.targets == "pixels"
        return {
            "loss": sum(m * w for m, w in zip(means, weights, strict=True)),
            **{f"loss/{name}": mean for name, mean in zip(LOSSES, means, strict=True)},
            "text_accuracy": words / counted[0],
            **({} if is_pixels else {"image_accuracy": codes / counted[1]}),
            "gradient_norm": norm,
            "learning_rate": rate,
            "epoch": self.step / self.data.plan.steps_per_epoch,
            "num_items": items,
            **({"num_flops": flops} if self.flops else {}),
        }

    def _micro_step(self, batch: MaskedBatch, shares: Float[Tensor, "4"]) -> Float64[Tensor, "8"]:
        """Add the gradient of a micro batch; its predictions are let go before the next one.

        Args:
            batch: on the device.
            shares: of each of ``LOSSES`` in the loss, for one of what it is a sum over.

        Returns:
            The sums of ``LOSSES``, right tokens, right codes, items, FLOPs.
        """
        losses, predictions = self.engine.forward(batch)
        self.engine.backward((losses * shares).sum())
        hits = (predictions.logits.argmax(dim=1) == batch.words).sum()
        right = self.engine.model.target.hits(predictions.patches, predictions.patch_goals)
        num_codes = torch.zeros_like(hits) if right is None else right.sum()
        num_items = (batch.item_index >= 0).sum()
        num_flops = self.flops.step(batch) if self.flops else torch.zeros_like(hits)
        return torch.stack([*losses.detach().double(), hits, num_codes, num_items, num_flops])

    def usage(self, flops_per_second: float) -> dict[str, float]:
        """Return what this rank has of its device; see ``usage.usage``."""
        return usage(
            flops_per_second if self.flops else None,
            device=self.rank.device,
            precision=self.config.precision,
            num_ranks=self.rank.world_size,
        )

    def _named(self, batches: list[MaskedBatch], sums: list[Tensor]) -> str:
        """Return items of the first micro batch of each rank whose loss is not a number."""
        own = torch.full((_ITEMS_NAMED,), -1, dtype=torch.int64, device=self.rank.device)
        bad = (b for b, s in zip(batches, sums, strict=True) if not s.isfinite().all())
        if (batch := next(bad, None)) is not None:
            first = batch.item_index[:_ITEMS_NAMED]
            own[: len(first)] = first.to(own)
        lists = [own.clone() for _ in range(self.rank.world_size)]
        if self.rank.world_size > 1:
            dist.all_gather(lists, own)
        items = sorted({int(i) for part in lists for i in part.tolist() if i >= 0})
        return ", ".join(map(str, items))

    def _stop(self, fault: str) -> NoReturn:
        raise StageFailure(
            f"{fault}, so training cannot go on. Lower pretrain.learning_rate or "
            f"pretrain.max_gradient_norm; with changed settings training starts afresh."
        )

    def _describe(self, model: MaskedModel, *, resumed: bool) -> None:
        config, plan = self.config, self.data.plan
        count = sum(p.numel() for p in model.encoder.parameters())
        frozen = sum(tensor.numel() for tensor in model.encoder.frozen_state().values())
        beside = f" and {frozen / 1e6:.2f} M frozen" if frozen else ""
        self.telemetry.say(
            f"{count / 1e6:.2f} M parameters{beside}, {len(plan.rows):,} items "
            f"({len(self.data.split.held_out):,} held out), {self.num_steps:,} steps of "
            f"{describe_batch(plan)}, ZeRO-{config.zero_stage}, {config.precision}"
            + (f"; resumed after step {self.step}" if resumed else "")
        )


def _load_state(found: checkpoint.Checkpoint) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for index in range(found.world_size):
        tensors, _ = found.load(index)
        state |= tensors
    return state


def _finish(trainer: Trainer, draft: artifacts.Draft) -> dict[str, Tensor]:
    """Judge the trained model and return the encoder's weights; every rank takes part."""
    rank, data = trainer.rank, trainer.data
    trainer.engine.use_average()
    judged = judge(
        trainer.engine,
        data,
        rank,
        batch_size=data.plan.micro_batch_size,
        telemetry=trainer.telemetry,
        beat=trainer.beat,
    )
    for line in verdict(judged):
        trainer.telemetry.say(line)
    draft.facts |= _facts(trainer, judged)
    write_reconstructions(trainer.engine, data, trainer.words, rank, draft.path)
    trainer.beat()
    trained = {name: tensor.cpu() for name, tensor in _kept(trainer.engine, rank)}
    frozen = trainer.engine.model.encoder.frozen_state() if rank.is_first else {}
    # as they were given: the model's own are rounded under bf16
    given = read_initial(draft.work / INITIAL) if frozen else {}
    return trained | {name: given[f"encoder.{name}"] for name in frozen}


def _publish(
    trainer: Trainer,
    weights: dict[str, Tensor],
    draft: artifacts.Draft,
    context: Context,
    config: PretrainConfig,
) -> None:
    """Write the artifact (rank 0 calls it)."""
    save_encoder(trainer.engine.model.encoder.architecture, draft.path, weights)
    shutil.copyfile(trainer.telemetry.path, draft.path / HISTORY)
    draft.counts |= {
        "num_parameters": sum(tensor.numel() for tensor in weights.values()),
        "num_steps": trainer.num_steps,
        "num_samples": len(trainer.data.plan.rows),
    }
    artifacts.publish(
        draft,
        context.output,
        kind="encoder",
        fingerprint=context.fingerprint,
        config=configuration.to_mapping(config),
        inputs=context.inputs,
    )


def _kept(engine: Engine, rank: Rank) -> Iterator[tuple[str, Tensor]]:
    """Yield the encoder's parameters on rank 0; the other ranks only take part."""
    for name, tensor in engine.parameters():
        if rank.is_first and name.startswith("encoder."):
            yield name.removeprefix("encoder."), tensor


def _facts(trainer: Trainer, judged: dict[str, float]) -> dict[str, Any]:
    facts = {
        "held_out": judged,
        "num_held_out": len(trainer.data.split.held_out),
        "num_ranks": trainer.rank.world_size,
        "zero_stage": trainer.config.zero_stage,
    }
    if quality := trainer.engine.model.target.facts:
        facts["targets"] = quality
    if trainer.samples_per_second is not None:
        facts["samples_per_second"] = round(trainer.samples_per_second, 2)
    return facts
