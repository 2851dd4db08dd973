"""Payload bytes of single samples from a dataset's shards (dataset -> loader).

A sample's bytes are read at the offsets in ``samples.parquet``, so any sample costs one or two
reads and nothing is unpacked. Every shard is checked against the manifest when it is first opened.
"""

import dataclasses
import hashlib
import json
import os
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from alignrec import artifacts
from alignrec.data import schema
from alignrec.errors import StageFailure, UserError

Ints = npt.NDArray[np.int64]

_MAX_OPEN_SHARDS = 64


@dataclasses.dataclass(frozen=True)
class RawSample:
    """One item as it lies in its shard; ``image`` is empty where there is no picture."""

    item_index: int
    image: bytes
    text: str


@dataclasses.dataclass(frozen=True)
class SampleTable:
    """Where each sample lies; row r is the r-th sample of the dataset in item_index order."""

    item_index: Ints
    shard_names: tuple[str, ...]
    shard: npt.NDArray[np.int32]
    image_offset: Ints
    image_bytes: Ints
    json_offset: Ints
    json_bytes: Ints

    @classmethod
    def read(cls, dataset: Path) -> "SampleTable":
        """Read a dataset's ``samples.parquet``.

        Raises:
            UserError: the dataset has neither pictures nor texts.
        """
        table = schema.read_samples(dataset)
        if table.num_rows == 0:
            raise UserError(
                f"{dataset} has no samples (no pictures, no texts), so there is nothing to encode. "
                f"Import features instead (features.files), and leave the pretrain section out."
            )
        encoded = pc.dictionary_encode(table["shard"]).combine_chunks()
        names = ("item_index", "image_offset", "image_bytes", "json_offset", "json_bytes")
        numbers = {name: table[name].to_numpy() for name in names}
        return cls(
            shard_names=tuple(encoded.dictionary.to_pylist()),
            shard=encoded.indices.to_numpy().astype(np.int32),
            **numbers,
        )

    def __len__(self) -> int:
        return len(self.item_index)


class ShardReader:
    """Reads samples by row number; safe to use from several threads."""

    def __init__(self, dataset: Path, table: SampleTable) -> None:
        self._dataset = dataset
        self._table = table
        self._sums = {name: e["sha256"] for name, e in artifacts.read(dataset).files.items()}
        self._open: OrderedDict[str, int] = OrderedDict()
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    def read(self, row: int) -> RawSample:
        """Return the sample in row ``row`` of the table.

        Raises:
            StageFailure: the shard is missing, damaged, or does not hold what the table says.
        """
        table = self._table
        name = table.shard_names[table.shard[row]]
        image = self._bytes(name, int(table.image_offset[row]), int(table.image_bytes[row]))
        payload = self._bytes(name, int(table.json_offset[row]), int(table.json_bytes[row]))
        try:
            text = json.loads(payload)["text"] if payload else ""
        except (ValueError, KeyError) as error:
            raise self._damaged(name, f"sample {table.item_index[row]} is unreadable") from error
        return RawSample(int(table.item_index[row]), image, text)

    def close(self) -> None:
        """Close all shards."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _bytes(self, name: str, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        with self._lock:  # held during the read, so that no other thread closes the shard
            content = os.pread(self._descriptor(name), size, offset)
        if len(content) != size:
            raise self._damaged(name, f"{size} bytes at {offset} reach past its end")
        return content

    def _descriptor(self, name: str) -> int:
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path = self._dataset / name
        try:
            if name not in self._verified:
                self._verify(name, path)
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise self._damaged(name, error.strerror or "unreadable") from error
        self._open[name] = descriptor
        if len(self._open) > _MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _verify(self, name: str, path: Path) -> None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self._sums.get(name):
            raise self._damaged(name, "its checksum differs from the manifest")
        self._verified.add(name)

    def _damaged(self, name: str, fault: str) -> StageFailure:
        return StageFailure(
            f"shard {self._dataset / name}: {fault}, so the samples in it cannot be trusted. "
            f"Delete {self._dataset} and run data_prep again."
        )
