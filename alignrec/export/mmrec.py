"""The files that MMRec reads: interactions by line, features by row (-> bundle)."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv

from alignrec.data import schema
from alignrec.data.embeddings import FEATURES

INTER = pa.schema(
    [
        ("userID", pa.int64()),
        ("itemID", pa.int64()),
        ("rating", pa.float32()),
        ("timestamp", pa.int64()),
        ("x_label", pa.int64()),
    ]
)
FEATURE_FILE = "content_feat.npy"
_BATCH_ROWS = 65_536


def write(folder: Path, dataset: Path, features: Path | None, *, name: str) -> None:
    """Write ``<name>.inter`` and, where there are features, ``content_feat.npy``.

    Users and items are numbered as in users.parquet and items.parquet; x_label is 0, 1, 2 for
    train, valid, test. An unknown rating becomes 1, an unknown timestamp 0, as MMRec's own sets.
    """
    # pyarrow quotes the names of a header, whatever the quoting style.
    options = pc_csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with (folder / f"{name}.inter").open("wb") as file:
        file.write("\t".join(INTER.names).encode() + b"\n")
        with pc_csv.CSVWriter(file, INTER, write_options=options) as writer:
            for label, split in enumerate(schema.SPLITS):
                path = schema.interactions_path(dataset, split)
                for batch in schema.read_batches(path, batch_size=_BATCH_ROWS):
                    writer.write_batch(_lines(batch, label))
    if features is not None:
        shutil.copyfile(features / FEATURES, folder / FEATURE_FILE)


def _lines(batch: pa.RecordBatch, label: int) -> pa.RecordBatch:
    columns = [
        batch["user_index"],
        batch["item_index"],
        pc.fill_null(batch["rating"], pa.scalar(1.0, pa.float32())),
        pc.fill_null(batch["timestamp"], 0),
        pa.array([label] * batch.num_rows, pa.int64()),
    ]
    return pa.record_batch(columns, schema=INTER)
