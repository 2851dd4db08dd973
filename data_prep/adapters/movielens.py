"""MovieLens: movies and ratings as .dat (:: between values, Latin-1) or .csv files."""

import functools
import posixpath
from collections.abc import Iterator

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from alignrec.errors import UserError
from data_prep.adapters.mapping import Reader, as_strings, read_renamed, reader_of
from data_prep.delimited import CsvFormat, read_csv
from data_prep.locations import Piece
from data_prep.readers import ROW, Columns, MalformedRow, short

_SOURCE = "movielens"
_NO_GENRES = "(no genres listed)"
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_MOVIES = {"item_id": "movieId", "title": "title", "genres": "genres"}
_RATINGS = {
    "user_id": "userId",
    "item_id": "movieId",
    "rating": "rating",
    "timestamp": "timestamp",
}


def read_items(piece: Piece, columns: Columns, malformed: list[MalformedRow]) -> Iterator[pa.Table]:
    """Yield the movies; a picture is ``<movieId>.jpg`` (or .png ...) where the folder has it."""
    reader = reader_of(piece, _readers(tuple(_MOVIES.values())), _SOURCE)
    wanted = Columns(columns.setting, text=tuple(_MOVIES))
    pictures = _pictures(piece.file.pictures) if "image" in columns.names else {}
    keys = pa.array(list(pictures), pa.string())
    names = pa.array(list(pictures.values()), pa.string())
    for table in read_renamed(
        piece, wanted, malformed, reader=reader, names=_MOVIES, source=_SOURCE
    ):
        movie = as_strings(table["item_id"])
        found = {
            "item_id": movie,
            "title": as_strings(table["title"]),
            "genres": _genres(as_strings(table["genres"])),
            "image": names.take(pc.index_in(movie, value_set=keys).combine_chunks()),
        }
        yield pa.table({**{name: found[name] for name in columns.names}, ROW: table[ROW]})


def read_interactions(
    piece: Piece, columns: Columns, malformed: list[MalformedRow]
) -> Iterator[pa.Table]:
    """Yield the ratings."""
    reader = reader_of(piece, _readers(tuple(_RATINGS.values())), _SOURCE)
    yield from read_renamed(
        piece, columns, malformed, reader=reader, names=_RATINGS, source=_SOURCE
    )


def _readers(names: tuple[str, ...]) -> dict[str, Reader]:
    # The unit separator stands for "::", of which pyarrow wants one character.
    old = CsvFormat(delimiter="\x1f", separator="::", quoted=False, names=names, latin_1=True)
    return {".csv": read_csv, ".dat": functools.partial(read_csv, dialect=old)}


def _genres(column: pa.ChunkedArray) -> pa.ChunkedArray:
    listed = pc.if_else(pc.equal(column, _NO_GENRES), "", column)
    return pc.replace_substring(listed, "|", ", ")


def _pictures(folder: str) -> dict[str, str]:
    """Return movieId -> name of its picture in the folder; none without a folder."""
    if not folder:
        return {}
    try:
        fs, root = fsspec.core.url_to_fs(folder)
        paths = sorted(str(path) for path in fs.ls(root, detail=False))
    except OSError as error:
        raise UserError(
            f"the folder of pictures {folder} cannot be listed: {short(error)}. Correct "
            f"data_prep.images.root, or leave it out: MovieLens itself has no pictures."
        ) from error
    parts = [posixpath.splitext(posixpath.basename(path)) for path in paths]
    return {stem: stem + suffix for stem, suffix in parts if suffix.lower() in _PICTURE_SUFFIXES}
