"""Import of MMRec's files."""

import dataclasses
import gzip
from pathlib import Path

import numpy as np
import pytest

from alignrec.errors import UserError
from data_prep import mmrec
from data_prep.config import MMRecConfig
from data_prep.log import UNKNOWN_TIME
from data_prep.quarantine import Quarantine

HEADER = "userID\titemID\trating\ttimestamp\tx_label\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "image.npy", np.zeros((4, 3), dtype=np.float32))
    np.save(tmp_path / "text.npy", np.zeros((4, 2), dtype=np.float16))
    (tmp_path / "keys.csv").write_text("itemID,asin\n2,C\n0,A\n1,B\n3,D\n")
    return tmp_path


def make_config(
    folder: Path,
    rows: str,
    *,
    features: tuple[str, ...] = ("image.npy", "text.npy"),
    keys: str | None = None,
) -> MMRecConfig:
    (folder / "x.inter").write_text(rows)
    return MMRecConfig(
        interactions=str(folder / "x.inter"),
        features=tuple(str(folder / name) for name in features),
        item_keys=None if keys is None else str(folder / keys),
    )


def test_numbers_and_labels_are_those_of_the_file(folder: Path) -> None:
    rows = HEADER + "0\t2\t5.0\t11\t0\n3\t0\t4.0\t12\t2\n0\t1\t1.0\t13\t1\n"
    data = mmrec.read(make_config(folder, rows, keys="keys.csv"), Quarantine())
    assert data.num_users == 4
    assert data.item_keys.to_pylist() == ["A", "B", "C", "D"]
    assert data.rows.user.tolist() == [0, 3, 0]
    assert data.rows.item.tolist() == [2, 0, 1]
    assert data.rows.rating.tolist() == [5.0, 4.0, 1.0]
    assert data.rows.label.tolist() == [0, 2, 1]


def test_rating_and_time_may_be_absent(folder: Path) -> None:
    data = mmrec.read(make_config(folder, "userID\titemID\tx_label\n1\t2\t0\n"), Quarantine())
    assert np.isnan(data.rows.rating).all()
    assert (data.rows.time == UNKNOWN_TIME).all()
    assert data.item_keys.to_pylist() == ["0", "1", "2", "3"]


def test_a_packed_file_keeps_its_optional_columns(folder: Path) -> None:
    config = make_config(folder, "")
    packed = folder / "x.inter.gz"
    packed.write_bytes(gzip.compress((HEADER + "0\t2\t5.0\t11\t0\n").encode()))
    data = mmrec.read(dataclasses.replace(config, interactions=str(packed)), Quarantine())
    assert data.rows.rating.tolist() == [5.0]
    assert data.rows.time.tolist() == [11]


def test_only_whole_numbers_are_numbers(folder: Path) -> None:
    rows = "0\t0\t1\t1\t0\n1.0\t1\t1\t1\t0\n1.7\t0\t1\t1\t0\n1\t0.9\t1\t1\t0\n1\t2\t1\t1\t0.5\n"
    quarantine = Quarantine()
    rows += "2020-02-01\t0\t1\t1\t0\n"
    data = mmrec.read(make_config(folder, HEADER + rows), quarantine)
    assert data.rows.user.tolist() == [0, 1]
    assert quarantine.reasons() == {
        "interactions": {"missing_user": 2, "missing_item": 1, "bad_split_label": 1}
    }


def test_bad_rows_are_listed(folder: Path) -> None:
    rows = "0\t0\t1\t1\t0\n0\t4\t1\t1\t0\nx\t1\t1\t1\t0\n0\t1\t1\t1\t3\n0\t-1\t1\t1\t0\n0\t1\n"
    quarantine = Quarantine()
    data = mmrec.read(make_config(folder, HEADER + rows), quarantine)
    assert len(data.rows) == 1
    assert data.num_rows == 6
    assert quarantine.reasons() == {
        "interactions": {
            "unknown_item": 2, "missing_user": 1, "bad_split_label": 1, "malformed_row": 1,
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (HEADER, "holds no interaction"),
        (HEADER + "a\tb\t1\t1\t0\n", "no row of .* can be used"),
        (HEADER + "999999999999\t0\t1\t1\t0\n", "userID 999999999999 in 1 rows.*densely"),
        ("user\titem\n0\t0\n", "no column 'userID'"),
        ("", "no column|cannot be read"),
    ],
)
def test_an_unusable_file_is_the_users_mistake(folder: Path, rows: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mmrec.read(make_config(folder, rows), Quarantine())


def test_feature_files_must_agree(folder: Path) -> None:
    np.save(folder / "other.npy", np.zeros((5, 2), dtype=np.float32))
    np.save(folder / "flat.npy", np.zeros(4, dtype=np.float32))
    (folder / "junk.npy").write_bytes(b"junk")
    for features, message in (
        (("image.npy", "other.npy"), "disagree"),
        (("flat.npy",), "features are a table"),
        (("junk.npy",), "is not a .npy file"),
        (("absent.npy",), "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            mmrec.count_items(make_config(folder, HEADER, features=features))


def test_every_item_needs_a_key_of_its_own(folder: Path) -> None:
    (folder / "few.csv").write_text("itemID,asin\n0,A\n1,A\n2,C\n3,D\n")
    with pytest.raises(UserError, match="a key of its own"):
        mmrec.read(make_config(folder, HEADER + "0\t0\t1\t1\t0\n", keys="few.csv"), Quarantine())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("itemID,asin\n", "has a header and no rows"),
        ("itemID,itemID,asin\n0,0,A\n", "has 2 columns 'itemID'"),
        ("itemID,asin,asin\n0,A,A\n", "one column of keys are needed"),
    ],
)
def test_a_mistaken_file_of_keys_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "wrong.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        mmrec.read(make_config(folder, HEADER + "0\t0\t1\t1\t0\n", keys="wrong.csv"), Quarantine())
