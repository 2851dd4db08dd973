"""MMRec's files: interactions with ready splits and feature files in, clean columns out.

Such a dataset has neither pictures nor texts: features are given, and later stages start at them.
"""

import dataclasses

import numpy as np
import pyarrow as pa

from alignrec.errors import UserError
from data_prep import locations, tables
from data_prep.config import MMRecConfig
from data_prep.interaction_files import LabelledRows
from data_prep.log import UNKNOWN_TIME
from data_prep.quarantine import Quarantine, Reason
from data_prep.values import Bools, Ints, to_ratings, to_timestamps, whole_numbers

USER, ITEM, RATING, TIMESTAMP, LABEL = "userID", "itemID", "rating", "timestamp", "x_label"
_SETTING = "MMRec's format"
_NUM_LABELS = 3
_MAX_USERS_PER_ROW = 10
_MAX_USERS_OF_FEW_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class MMRecData:
    """What the files hold.

    Attributes:
        rows: the good interactions; users and items are the file's own numbers.
        num_users: one more than the largest userID.
        item_keys: key of every item.
        num_rows: rows of the file, good and bad.
    """

    rows: LabelledRows
    num_users: int
    item_keys: pa.Array
    num_rows: int


def read(config: MMRecConfig, quarantine: Quarantine) -> MMRecData:
    """Read the interactions and the number of items.

    Raises:
        UserError: a missing or damaged file, or feature files that disagree.
    """
    num_items = count_items(config)
    keys = _item_keys(config, num_items)
    files = locations.find([config.interactions])
    present = tables.column_names(files[0])
    optional = tuple(name for name in (RATING, TIMESTAMP) if name in present)
    columns = tables.Columns(_SETTING, text=(USER, ITEM, LABEL), other=optional)
    malformed: list[tables.MalformedRow] = []
    batches = list(tables.read_batches(files, columns, malformed))
    quarantine.add("interactions", ((m.where, Reason.MALFORMED_ROW, m.detail) for m in malformed))
    table = pa.concat_tables(batches) if batches else pa.table({})
    if not len(table):
        raise UserError(
            f"{config.interactions} holds no interaction, so there is nothing to learn from. "
            f"Check data_prep.mmrec.interactions."
        )
    rows = _interactions(table, num_items, quarantine)
    if not len(rows):
        raise UserError(
            f"no row of {config.interactions} can be used: user and item must be whole numbers, "
            f"items below the {num_items:,} rows of the features, x_label 0, 1 or 2."
        )
    num_rows = len(table) + len(malformed)
    return MMRecData(rows, _count_users(config, rows.user, num_rows), keys, num_rows)


def count_items(config: MMRecConfig) -> int:
    """Return the number of rows of the feature files.

    Raises:
        UserError: a file is missing, is no .npy table, or has other rows than the first.
    """
    rows = {path: _num_rows(path) for path in config.features}
    if len(set(rows.values())) != 1:
        listed = ", ".join(f"{path} {n:,}" for path, n in rows.items())
        raise UserError(
            f"the feature files disagree on the number of items: {listed} rows. Each needs one row "
            f"per item, in itemID order."
        )
    return next(iter(rows.values()))


def _count_users(config: MMRecConfig, user: Ints, num_rows: int) -> int:
    num_users = int(user.max()) + 1
    if num_users > _MAX_USERS_PER_ROW * num_rows + _MAX_USERS_OF_FEW_ROWS:
        raise UserError(
            f"{config.interactions} has the userID {num_users - 1} in {num_rows:,} rows, but users "
            f"are numbered densely from 0: each number up to the largest becomes a user. Renumber "
            f"the users."
        )
    return num_users


def _num_rows(path: str) -> int:
    with locations.find([path])[0].open() as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(file)
        except (ValueError, KeyError, EOFError) as error:
            raise UserError(
                f"{path} is not a .npy file ({error}). Give the files that numpy.save wrote."
            ) from error
    if len(shape) != 2 or dtype.kind != "f":
        raise UserError(
            f"{path} holds {dtype} of shape {shape}, but features are a table of floating-point "
            f"numbers, one row per item."
        )
    return int(shape[0])


def _item_keys(config: MMRecConfig, num_items: int) -> pa.Array:
    if config.item_keys is None:
        return pa.array(np.arange(num_items)).cast(pa.string())
    file = locations.find([config.item_keys])[0]
    names = tables.column_names(file)
    key_columns = [name for name in names if name != ITEM]
    if ITEM not in names or len(key_columns) != 1:
        raise UserError(
            f"{config.item_keys} has the columns {', '.join(names)}, but {ITEM} and one column of "
            f"keys are needed."
        )
    columns = tables.Columns(_SETTING, text=(ITEM, key_columns[0]))
    batches = list(tables.read_batches([file], columns, []))
    if not batches:
        raise UserError(
            f"{config.item_keys} has a header and no rows, but each of the {num_items:,} items "
            f"needs a key. Correct it or set data_prep.mmrec.item_keys to null."
        )
    table = pa.concat_tables(batches)
    number, good = _whole_numbers(table[ITEM])
    keys = np.full(num_items, None, dtype=object)
    inside = good & (number >= 0) & (number < num_items)
    keys[number[inside]] = table[key_columns[0]].to_numpy()[inside]
    array = pa.array(keys, pa.string())
    if array.null_count or len(array.unique()) != num_items:
        raise UserError(
            f"{config.item_keys} does not give each of the {num_items:,} items a key of its own. "
            f"Correct it or set data_prep.mmrec.item_keys to null."
        )
    return array


def _interactions(table: pa.Table, num_items: int, quarantine: Quarantine) -> LabelledRows:
    user, good_user = _whole_numbers(table[USER])
    item, good_item = _whole_numbers(table[ITEM])
    label, good_label = _whole_numbers(table[LABEL])
    names = table.column_names
    rating, bad_rating = to_ratings(table[RATING] if RATING in names else None, len(table))
    time, has_time, bad_time = to_timestamps(
        table[TIMESTAMP] if TIMESTAMP in names else None, len(table)
    )
    good = np.ones(len(table), dtype=bool)
    for mask, reason in (
        (~good_user | (user < 0), Reason.MISSING_USER),
        (~good_item, Reason.MISSING_ITEM),
        ((item < 0) | (item >= num_items), Reason.UNKNOWN_ITEM),
        (~good_label | (label < 0) | (label >= _NUM_LABELS), Reason.BAD_LABEL),
        (bad_rating, Reason.BAD_RATING),
        (bad_time, Reason.BAD_TIMESTAMP),
    ):
        bad = np.flatnonzero(mask & good)
        good &= ~mask
        quarantine.add(
            "interactions",
            ((f"{user[r]} -> {item[r]}", reason, f"row {r + 1}") for r in bad.tolist()),
        )
    known_time = np.where(has_time, time, UNKNOWN_TIME)
    return LabelledRows(user, item, rating, known_time, label.astype(np.int8)).select(good)


def _whole_numbers(column: pa.ChunkedArray) -> tuple[Ints, Bools]:
    numbers = whole_numbers(column)
    return numbers.fill_null(0).to_numpy(), numbers.is_valid().to_numpy(zero_copy_only=False)
