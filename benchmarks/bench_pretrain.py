"""Speed of a pretraining step: against torchscale in a plain loop, of several ranks, by ZeRO stage.

    python benchmarks/bench_pretrain.py reference            # our step against the reference's
    python benchmarks/bench_pretrain.py reference --compile  # ours compiled; or --precision bf16
    python benchmarks/bench_pretrain.py ranks --ranks 2      # one core a rank, against one rank
    python benchmarks/bench_pretrain.py zero --device cuda --size base --precision bf16 --batch 64

The catalogue is synthetic: pictures of ``--image-size``, texts of made-up words whose lengths
spread as those of film plots do. Batches are what the loader makes of it: padded to the batch's
longest text. ``reference`` is torchscale's BEiT-3 with the same heads, at masked positions alone,
and the same weights in the loop that everybody writes (zero_grad, forward, backward, clip, AdamW),
in fp32 (``--autocast-reference``: under torch.autocast to bf16) and not compiled. Its texts are
padded like ours, to the longest of the batch, or with ``--full-length-reference`` to
``--max-text-tokens``, as BEiT-3's own data sets pad them.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import os
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import RESULTS, write_result
from torch import Tensor, nn

from alignrec import artifacts, configuration
from alignrec.distributed.host_memory import freed_memory_kept
from alignrec.distributed.process_group import Rank, barrier, process_group
from alignrec.pretrain.architecture import Architecture
from alignrec.pretrain.config import SIZES, PretrainConfig
from alignrec.pretrain.data import make_loader, open_training_data
from alignrec.pretrain.encoder import patchify, write_architecture
from alignrec.pretrain.engine import deepspeed_group
from alignrec.pretrain.multiway import true_places
from alignrec.pretrain.objective import MaskedBatch, MaskedModel, build_model, loss_weights
from alignrec.pretrain.optimizer import parameter_groups
from alignrec.pretrain.schedule import learning_rate
from alignrec.pretrain.tokenizer import TOKENIZER, load_words, train
from alignrec.pretrain.training import Trainer
from alignrec.telemetry import Telemetry
from alignrec.testing.datasets import write_dataset
from alignrec.testing.processes import run_ranks

WARM_UP = 4  # steps before the clock runs: each batch once, for what is compiled by its shape
_MANY_STEPS = 10**6  # for the schedule of the learning rate


@dataclasses.dataclass(frozen=True)
class Speed:
    """What some steps of one rank took.

    Attributes:
        samples: items in them, of all ranks.
        seconds: wall clock.
        cpu_seconds: of this rank's process.
        loss: of the last step.
    """

    samples: int
    seconds: float
    cpu_seconds: float
    loss: float


def make_config(options: argparse.Namespace, *, num_ranks: int, zero_stage: int) -> PretrainConfig:
    """Return BEiT-3's objective and shapes, so that both sides compute the same."""
    section = {
        "encoder": {
            "size": options.size,
            "num_layers": options.layers,
            "image_size": options.image_size,
            "max_text_tokens": options.max_text_tokens,
        },
        "objective": {"summary_weight": 0.0},
        "tokenizer": {"initial_vectors": "random", "vocabulary_size": options.vocabulary},
        "global_batch_size": options.batch * num_ranks * options.accumulation,
        "micro_batch_size": options.batch,
        "zero_stage": zero_stage,
        "precision": options.precision,
        "compile": options.compile,
        "learning_rate": 1e-4,
        "epochs": _MANY_STEPS,
        "valid_fraction": 0.0,
    }
    return configuration.build(PretrainConfig, section, section="pretrain")


def write_catalogue(folder: Path, options: argparse.Namespace) -> None:
    """Write a dataset and a tokenizer; a text has about ``options.text_words`` words."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(20_000)]
    often = 1.0 / np.arange(1, len(words) + 1)
    ends = np.cumsum(often / often.sum())

    def text() -> str:
        length = round(float(rng.lognormal(np.log(options.text_words), options.text_spread)))
        return " ".join(words[i] for i in np.searchsorted(ends, rng.random(max(length, 1))))

    texts = [text() for _ in range(options.items)]
    write_dataset(
        folder / "dataset", num_items=options.items, image_size=options.image_size, texts=texts
    )
    often_used = itertools.chain(texts, (" ".join(words[:10_000]) for _ in range(2)))
    train(iter(often_used), options.vocabulary).save(str(folder / TOKENIZER))


@contextlib.contextmanager
def open_trainer(
    folder: Path, options: argparse.Namespace, rank: Rank, *, zero_stage: int
) -> Iterator[Trainer]:
    """Yield the stage's trainer, ready for its first step."""
    config = make_config(options, num_ranks=rank.world_size, zero_stage=zero_stage)
    words = load_words(folder / TOKENIZER, max_length=options.max_text_tokens)
    opened = open_training_data(folder / "dataset", config, words, num_ranks=rank.world_size)
    telemetry = Telemetry(folder, "pretrain", enabled=False)
    with tempfile.TemporaryDirectory() as work, contextlib.closing(opened) as data:
        folder = Path(work) / artifacts.WORK
        folder.mkdir()
        write_architecture(config.encoder.architecture(words.vocabulary_size), folder)
        trainer = Trainer(config, data, words, rank, telemetry, Path(work))
        trainer.resume()
        yield trainer


def ready_batches(trainer: Trainer) -> list[list[MaskedBatch]]:
    """Return the micro batches of the catalogue's first steps: loading is not measured here."""
    plan, rank = trainer.data.plan, trainer.rank
    loader = make_loader(trainer.data, trainer.config, device=rank.device)
    steps = [plan.micro_batches(step, rank.index) for step in range(min(4, plan.steps_per_epoch))]
    return [list(loader.batches(parts)) for parts in steps]


def timed(step: Callable[[int], float], numbers: range, *, samples: int, device: str) -> Speed:
    """Return what the steps of these numbers take."""
    started, used = time.monotonic(), time.process_time()
    for number in numbers:
        loss = step(number)
    if device == "cuda":
        torch.cuda.synchronize()
    return Speed(
        samples * len(numbers), time.monotonic() - started, time.process_time() - used, float(loss)
    )


# --- against the reference ------------------------------------------------------------------


def reference_module(architecture: Architecture) -> nn.Module:
    """Return torchscale's BEiT-3; what it imports of timm and fairscale is not used."""
    unused = {
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": None, "wrap": None},
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {"drop_path": None},
    }
    for name, content in unused.items():
        sys.modules.setdefault(name, types.ModuleType(name)).__dict__.update(content)
    settings = importlib.import_module("torchscale.architecture.config").EncoderConfig(
        img_size=architecture.image_size,
        patch_size=architecture.patch_size,
        vocab_size=architecture.vocabulary_size,
        multiway=True,
        layernorm_embedding=False,
        normalize_output=True,
        no_output_layer=True,
        drop_path_rate=0,
        encoder_embed_dim=architecture.width,
        encoder_attention_heads=architecture.num_heads,
        encoder_ffn_embed_dim=architecture.hidden,
        encoder_layers=architecture.num_layers,
    )
    module: nn.Module = importlib.import_module("torchscale.model.BEiT3").BEiT3(settings)
    return module


class PlainLoop:
    """Torchscale's module, two heads and torch's AdamW, as in a script of a page."""

    def __init__(
        self, model: MaskedModel, config: PretrainConfig, *, fused: bool, autocast: bool
    ) -> None:
        architecture = model.encoder.architecture
        self.config, self.patch_size = config, architecture.patch_size
        self.encoder = reference_module(architecture)
        self.encoder.load_state_dict(model.encoder.state_dict())
        self.mlm_head, self.mim_head = (
            nn.Linear(head.in_features, head.out_features)
            for head in (model.mlm_head, model.mim_head)
        )
        self.mlm_head.load_state_dict(model.mlm_head.state_dict())
        self.mim_head.load_state_dict(model.mim_head.state_dict())
        self.model = nn.ModuleDict(
            {"encoder": self.encoder, "mlm_head": self.mlm_head, "mim_head": self.mim_head}
        )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=fused or None,
        )
        self.weights = loss_weights(config.objective)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        self.number = 0

    def step(self, batch: MaskedBatch, pixels: Tensor, goals: Tensor) -> float:
        """Do one step; pixels are float already, as a data set's transform leaves them."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step=self.number, num_steps=_MANY_STEPS)
        with self.autocast:
            loss = self.loss(batch, pixels, goals)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_gradient_norm)
        self.optimizer.step()
        self.number += 1
        return loss.item()

    def loss(self, batch: MaskedBatch, pixels: Tensor, goals: Tensor) -> Tensor:
        """Return the loss of a batch."""
        states = self.encoder(
            textual_tokens=batch.tokens,
            visual_tokens=pixels,
            text_padding_position=batch.text_padding,
            vision_masked_position=batch.masked_patches,
        )["encoder_out"]
        num_vision = 1 + batch.masked_patches.shape[1]
        text, vision = states[:, num_vision:], states[:, 1:num_vision]
        logits = self.mlm_head(text[batch.masked_text])
        text_loss = nn.functional.cross_entropy(logits, batch.targets[batch.masked_text])
        patches = self.mim_head(vision[batch.masked_patches])
        image_loss = nn.functional.mse_loss(patches, goals)
        return self.weights[0] * text_loss + self.weights[1] * image_loss


def full_length(batch: MaskedBatch, length: int) -> MaskedBatch:
    """Return a batch whose texts are padded to a length."""
    missing = (0, length - batch.tokens.shape[1])
    fill = {"targets": 0, "tokens": 0, "text_padding": True, "masked_text": False}
    pad = nn.functional.pad
    padded = {name: pad(getattr(batch, name), missing, value=v) for name, v in fill.items()}
    return dataclasses.replace(batch, **padded, text_places=true_places(padded["masked_text"]))


def measure_ours(folder: Path, options: argparse.Namespace) -> list[Speed]:
    """Measure the stage's step, a round whenever it is this side's turn."""
    torch.set_num_threads(options.threads)
    with process_group() as rank, deepspeed_group(), freed_memory_kept():
        zero_stage = options.stages[0]
        with open_trainer(folder, options, rank, zero_stage=zero_stage) as trainer:
            batches = ready_batches(trainer)

            def step(number: int) -> float:
                return trainer.one_step(batches[number % len(batches)])["loss"]

            return alternate(step, folder, options, side=0)


def measure_reference(folder: Path, options: argparse.Namespace) -> list[Speed]:
    """Measure the plain loop on the same batches from the same weights."""
    torch.set_num_threads(options.threads)
    config = make_config(options, num_ranks=1, zero_stage=0)
    words = load_words(folder / TOKENIZER, max_length=options.max_text_tokens)
    model = build_model(
        config.encoder.architecture(words.vocabulary_size), config.objective, seed=config.seed
    )
    loop = PlainLoop(
        model, config, fused=options.fused_reference, autocast=options.autocast_reference
    )
    opened = open_training_data(folder / "dataset", config, words, num_ranks=1)
    with contextlib.closing(opened) as data:
        count = min(4, data.plan.steps_per_epoch)
        batches = [data.training_batch(data.plan.global_batch(step)) for step in range(count)]
    if options.full_length_reference:
        batches = [full_length(batch, options.max_text_tokens) for batch in batches]
    pixels = [
        b.images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous() for b in batches
    ]
    goals = [patchify(b.images, loop.patch_size)[b.masked_patches] for b in batches]

    def step(number: int) -> float:
        i = number % count
        return loop.step(batches[i], pixels[i], goals[i])

    return alternate(step, folder, options, side=1)


def alternate(
    step: Callable[[int], float], folder: Path, options: argparse.Namespace, *, side: int
) -> list[Speed]:
    """Take turns with the other side: files say whose turn it is, so nobody burns the core."""
    for number in range(WARM_UP):
        step(number)
    speeds = []
    for turn in range(options.rounds):
        (folder / f"ready_{turn}_{side}").touch()
        # first both are ready; then side 0 goes first in even rounds, side 1 in odd ones
        _wait(folder / f"ready_{turn}_{1 - side}")
        if side != turn % 2:
            _wait(folder / f"done_{turn}_{1 - side}")
        steps = range(turn * options.steps, (turn + 1) * options.steps)
        speeds.append(timed(step, steps, samples=options.batch, device="cpu"))
        (folder / f"done_{turn}_{side}").touch()
        _wait(folder / f"done_{turn}_{1 - side}")
    return speeds


def _wait(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def compare(side: int, folder: Path, options: argparse.Namespace) -> list[Speed]:
    """Run one side (a process each, so that their memory and libraries do not meet)."""
    return (measure_ours, measure_reference)[side](folder, options)


def reference(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return samples a second of both sides, by rounds, and their ratio."""
    ours, theirs = run_sides(folder, options)
    ratios = [_per_second(a) / _per_second(b) for a, b in zip(ours, theirs, strict=True)]
    cpu_ratios = [b.cpu_seconds / a.cpu_seconds for a, b in zip(ours, theirs, strict=True)]
    return {
        "ours": _spread([_per_second(s) for s in ours]),
        "reference": _spread([_per_second(s) for s in theirs]),
        "ratio": _spread(ratios),
        # what an idle machine would do, when others are at work on this one
        "ratio_per_cpu_second": _spread(cpu_ratios),
        "last_loss": {"ours": ours[-1].loss, "reference": theirs[-1].loss},
    }


def run_sides(folder: Path, options: argparse.Namespace) -> list[list[Speed]]:
    """Run both sides at the same time, though only one of them works at any moment."""
    environment = {"WORLD_SIZE": "1", "OMP_NUM_THREADS": str(options.threads)}
    # two processes that are no ranks of each other: RANK only tells them who they are
    return run_ranks(_side, 2, folder, options, environment=environment, timeout_seconds=7200)


def _side(folder: Path, options: argparse.Namespace) -> list[Speed]:
    side = int(os.environ["RANK"])
    os.environ.update(RANK="0", LOCAL_RANK="0")
    return compare(side, folder, options)


# --- several ranks --------------------------------------------------------------------------


def measure_rank(folder: Path, options: argparse.Namespace) -> Speed:
    """Measure this rank among its peers, one thread each."""
    with (
        process_group() as rank,
        deepspeed_group(),
        freed_memory_kept(),
        open_trainer(folder, options, rank, zero_stage=options.stages[0]) as trainer,
    ):
        batches = ready_batches(trainer)

        def step(number: int) -> float:
            return trainer.one_step(batches[number % len(batches)])["loss"]

        for number in range(WARM_UP):
            step(number)
        barrier(rank)
        samples = trainer.config.global_batch_size
        return timed(step, range(options.steps), samples=samples, device="cpu")


def ranks(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return samples a second of one rank and of several, in turns, at the same micro batch."""
    speeds: dict[int, list[float]] = {1: [], options.ranks: []}
    per_cpu: dict[int, list[float]] = {1: [], options.ranks: []}
    for _ in range(options.rounds):
        for count in speeds:
            found = run_ranks(measure_rank, count, folder, options, timeout_seconds=3600)
            speeds[count].append(found[0].samples / max(s.seconds for s in found))
            per_cpu[count].append(found[0].samples / max(s.cpu_seconds for s in found))
    ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
    return {
        "samples_per_second": {str(count): _spread(found) for count, found in speeds.items()},
        "ratio": _spread(ratios),
        "ratio_per_cpu_second": _spread([b / a for a, b in zip(*per_cpu.values(), strict=True)]),
    }


# --- ZeRO stages, on a GPU -------------------------------------------------------------------


def measure_stage(folder: Path, options: argparse.Namespace, stage: int) -> dict[str, float]:
    """Measure one ZeRO stage on this rank: speed, share of the device's peak, memory."""
    with (
        process_group() as rank,
        deepspeed_group(),
        freed_memory_kept(),
        open_trainer(folder, options, rank, zero_stage=stage) as trainer,
    ):
        batches = ready_batches(trainer)
        values: dict[str, float] = {}

        def step(number: int) -> float:
            values.update(trainer.one_step(batches[number % len(batches)]))
            return values["loss"]

        for number in range(WARM_UP):
            step(number)
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        barrier(rank)
        samples = trainer.config.global_batch_size
        speed = timed(step, range(options.steps), samples=samples, device=options.device)
        flops = options.steps * values["num_flops"] / speed.seconds
        return {"samples_per_second": _per_second(speed)} | trainer.usage(flops)


def zero(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return speed and memory of a rank by ZeRO stage."""
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here. Leave --device out to see the path work on the CPU.")
    environment = {"DS_ACCELERATOR": options.device}
    stages = {}
    for stage in options.stages:
        found = run_ranks(
            measure_stage,
            options.ranks,
            folder,
            options,
            stage,
            environment=environment,
            timeout_seconds=1800,
        )
        stages[f"zero_{stage}"] = {name: round(value, 4) for name, value in found[0].items()}
    return {
        "device_name": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "stages": stages,
    }


def _per_second(speed: Speed) -> float:
    return speed.samples / speed.seconds


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("reference", "ranks", "zero"))
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--layers", type=int, help="instead of the size's")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--max-text-tokens", type=int, default=128)
    parser.add_argument("--text-words", type=float, default=45.0, help="of the median text")
    parser.add_argument("--text-spread", type=float, default=0.25, help="deviation of log words")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--items", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="micro batch of a rank")
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches in a step")
    parser.add_argument("--steps", type=int, default=3, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of each side of reference")
    parser.add_argument("--ranks", type=int, help="of ranks (default 2) and zero (default 1)")
    parser.add_argument("--stages", type=int, nargs="+", help="ZeRO; reference, ranks: 0")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fused-reference", action="store_true", help="its AdamW is fused, too")
    parser.add_argument("--autocast-reference", action="store_true", help="it computes in bf16")
    parser.add_argument(
        "--full-length-reference",
        action="store_true",
        help="its texts are padded to --max-text-tokens, as BEiT-3's own data sets do",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of zero")
    parser.add_argument("--output", type=Path, help="default: results/pretrain_<what>...json")
    options = parser.parse_args()
    narrow = options.precision == "bf16"
    stages = {"reference": [0], "ranks": [0], "zero": [1, 2, 3] if narrow else [0, 1, 2, 3]}
    options.stages = options.stages or stages[options.what]
    options.ranks = options.ranks or (2 if options.what == "ranks" else 1)
    work = {"reference": reference, "ranks": ranks, "zero": zero}[options.what]
    with tempfile.TemporaryDirectory() as folder:
        write_catalogue(Path(folder), options)
        result = work(Path(folder), options)
    result["versions_compared"] = {n: metadata.version(n) for n in ("deepspeed", "torchscale")}
    how = [options.precision] * (options.precision != "fp32") + ["compiled"] * options.compile
    how += ["autocast"] * options.autocast_reference
    how += ["full_length"] * options.full_length_reference
    if options.what == "ranks" and options.stages[0]:
        how.append(f"zero{options.stages[0]}")
    name = "_".join(["pretrain", options.what, options.size, options.device, *how]) + ".json"
    write_result(options.output or RESULTS / name, vars(options), result)


if __name__ == "__main__":
    main()
