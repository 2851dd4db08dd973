"""The export stage: dataset + embeddings -> a bundle for serving (safetensors, ranked lists)."""

import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from alignrec import artifacts, configuration
from alignrec.data import schema
from alignrec.data.csr import CSR
from alignrec.data.embeddings import EMBEDDINGS, check_same_dataset, read_embeddings
from alignrec.data.interactions import read_csr
from alignrec.data.schema import read_removed_items
from alignrec.distributed.process_group import rank_from_environment
from alignrec.evaluation.ranking import (
    NO_ITEM,
    Block,
    ScoreFunction,
    inner_product,
    rank_blocks,
)
from alignrec.export import mmrec
from alignrec.export.config import ExportConfig
from alignrec.stage import Context
from alignrec.telemetry import Telemetry

TOPK = pa.schema(
    [
        pa.field("user_key", pa.string(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("item_key", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
TOPK_FILE = "topk.parquet"
_PART_USERS = 65_536  # ranked again at most when a run is killed


def run(config: ExportConfig, context: Context) -> None:
    """Write the bundle. One rank does the work; others return at once."""
    if not rank_from_environment().is_first:
        return
    dataset, embeddings = context.inputs["dataset"], context.inputs["embeddings"]
    for name in ("embeddings", "features"):
        if name in context.inputs:
            check_same_dataset(context.inputs[name], dataset)
    with Telemetry(context.log_dir, "export") as telemetry:
        with artifacts.writing(
            context.output,
            kind="bundle",
            fingerprint=context.fingerprint,
            config=configuration.to_mapping(config),
            inputs=context.inputs,
        ) as draft:
            seen, removed = read_seen(dataset), torch.from_numpy(read_removed_items(dataset))
            parts = rank_parts(dataset, embeddings, seen, removed, config, draft.work, telemetry)
            draft.counts["num_removed_items"] = removed.numel()
            draft.counts["num_recommendations"] = merge_parts(parts, draft.path / TOPK_FILE)
            draft.counts["num_users_without_history"] = int((seen.row_lengths == 0).sum())
            shutil.copyfile(embeddings / EMBEDDINGS, draft.path / EMBEDDINGS)
            for name in ("items.parquet", "users.parquet"):
                shutil.copyfile(dataset / name, draft.path / name)
            counts = artifacts.read(dataset, "dataset").counts
            draft.counts |= {name: counts[name] for name in ("num_users", "num_items")}
            draft.facts["score"] = "inner product of a user row and an item row"
            if config.mmrec:
                features = context.inputs.get("features")
                mmrec.write(draft.path, dataset, features, name=config.mmrec_name)
        telemetry.say(f"bundle: {context.output}")


def read_seen(dataset: Path) -> CSR:
    """Return the training items of each user."""
    counts = artifacts.read(dataset, "dataset").counts
    return read_csr(dataset, "train", num_users=counts["num_users"], num_items=counts["num_items"])


def rank_parts(
    dataset: Path,
    embeddings: Path,
    seen: CSR,
    removed: Int64[Tensor, " num_removed"],
    config: ExportConfig,
    work: Path,
    telemetry: Telemetry,
) -> list[Path]:
    """Rank for users in order, a file for some ten thousand users at a time.

    A user without training items has an untrained embedding: an arbitrary list, which is left out.
    Files that a killed run has finished are kept.

    Args:
        dataset: whose keys are written.
        embeddings: what scores.
        seen: training items of each user, which are not recommended.
        removed: items that are recommended to nobody.
        config: list length and block size.
        work: where the files lie until they are merged.
        telemetry: shows progress.
    """
    ranker = _Ranker(
        inner_product(
            *read_embeddings(embeddings, num_users=seen.num_rows, num_items=seen.num_cols)
        ),
        seen,
        removed,
        config,
    )
    item_keys = schema.read_items(dataset, ["item_key"])["item_key"].combine_chunks()
    paths, first = [], 0
    with telemetry.progress(seen.num_rows, "users") as bar:
        for batch in schema.read_user_keys(dataset, batch_size=_PART_USERS):
            paths.append(work / f"topk_{first:012d}.parquet")
            if not paths[-1].exists():
                rows = seen.row_lengths[first : first + batch.num_rows].nonzero().squeeze(1)
                keys = batch["user_key"].take(pa.array(rows.numpy()))
                _write_part(paths[-1], rows + first, keys, item_keys, ranker)
            bar.update(batch.num_rows)
            first += batch.num_rows
    return paths


def merge_parts(parts: Iterable[Path], path: Path) -> int:
    """Write the rows of all parts, in order, into one file and return their number."""
    num_rows = 0
    with pq.ParquetWriter(path, TOPK) as writer:
        for part in parts:
            for batch in pq.ParquetFile(part).iter_batches():
                writer.write_batch(batch)
                num_rows += batch.num_rows
    return num_rows


@dataclasses.dataclass(frozen=True)
class _Ranker:
    """What the lists of any users are made from."""

    scores: ScoreFunction
    seen: CSR
    removed: Int64[Tensor, " num_removed"]
    config: ExportConfig

    def blocks(self, users: Int64[Tensor, " part"]) -> Iterator[Block]:
        """Yield users, items and scores, a block of users at a time."""
        return rank_blocks(
            self.scores,
            users=users,
            seen=self.seen,
            removed=self.removed,
            k=self.config.top_k,
            block_users=self.config.block_users,
        )


def _write_part(
    path: Path,
    users: Int64[Tensor, " part"],
    user_keys: pa.Array,
    item_keys: pa.Array,
    ranker: "_Ranker",
) -> None:
    unfinished = path.with_suffix(".writing")
    with pq.ParquetWriter(unfinished, TOPK) as writer:
        for block, items, values in ranker.blocks(users):
            keys = user_keys.take(pa.array(torch.searchsorted(users, block).numpy()))
            writer.write_table(topk_table(keys, item_keys, items, values))
    unfinished.replace(path)


def topk_table(
    user_keys: pa.Array,
    item_keys: pa.Array,
    items: Int64[Tensor, "block k"],
    scores: Float32[Tensor, "block k"],
) -> pa.Table:
    """Return one row a recommendation, best first; places without an item are left out."""
    filled = items != NO_ITEM
    row, place = (index.numpy() for index in filled.nonzero(as_tuple=True))
    columns = {
        "user_key": user_keys.take(pa.array(row)),
        "rank": pa.array((place + 1).astype(np.int32)),
        "item_key": item_keys.take(pa.array(items[filled].numpy())),
        "score": pa.array(scores[filled].numpy()),
    }
    return pa.table(columns, schema=TOPK)
