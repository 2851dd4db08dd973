"""Public datasets in their own formats: names, quirks, order, and what malformed lines do."""

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignrec.errors import UserError
from data_prep import STAGE, tables
from data_prep.adapters import amazon2023
from data_prep.config import DataPrepConfig
from data_prep.sources import PUBLIC_SOURCES
from data_prep.tables import ROW, Columns, MalformedRow

Rows = list[dict[str, Any]]


def config_of(source: str, folder: Path, items: str, log: str, **images: Any) -> DataPrepConfig:
    config: DataPrepConfig = STAGE.load_config(
        {
            "source": source,
            "items": {"path": str(folder / items)},
            "interactions": {"path": str(folder / log)},
            "images": images,
        }
    )
    return config


def read_items(config: DataPrepConfig) -> tuple[Rows, list[MalformedRow]]:
    names = config.items.columns
    text = tuple(name for name in (names.key, names.title, *names.text) if name)
    assert names.image
    columns = Columns("s", text=text, binary=(names.image,))
    malformed: list[MalformedRow] = []
    batches = tables.read_batches(config.item_files(), columns, malformed)
    return [row for batch in batches for row in batch.to_pylist()], malformed


def read_log(config: DataPrepConfig) -> tuple[Rows, list[MalformedRow]]:
    names = config.interactions.columns
    other = tuple(name for name in (names.rating, names.timestamp) if name)
    columns = Columns("s", text=(names.user, names.item), other=other)
    malformed: list[MalformedRow] = []
    batches = tables.read_batches(config.interaction_files(), columns, malformed)
    return [row for batch in batches for row in batch.to_pylist()], malformed


def without_numbers(rows: Rows) -> list[tuple[Any, ...]]:
    return [tuple(value for name, value in row.items() if ":" not in name) for row in rows]


# --- Amazon 2014 ---------------------------------------------------------------------------------

OLD_ITEMS: Rows = [
    {
        "asin": "0000031852",
        "related": {"also_bought": ["B00JHONN1S"]},
        "title": 'Girls Ballet Tutu "Zebra" Hot Pink',
        "price": 3.17,
        "salesRank": {"Toys & Games": 211836},
        "imUrl": "http://ecx.images-amazon.com/images/I/51fAmVkTbyL._SY300_.jpg",
        "brand": "Coxlures",
        "categories": [["Sports", "Other Sports"], ["Sports", "Dance"]],
        "description": "It's a tutu",
    },
    {"asin": "B000", "categories": [["Books"]], "title": "Café\\d \U0001f600"},
]
OLD_EXPECTED = [
    ("0000031852", 'Girls Ballet Tutu "Zebra" Hot Pink', "Coxlures",
     "Sports, Other Sports, Dance", "It's a tutu", OLD_ITEMS[0]["imUrl"], None),
    ("B000", "Café\\d \U0001f600", None, "Books", "", None, None),
]  # fmt: skip


def old_order(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("item_id", "title", "brand", "categories", "description", "image", "image:bytes")
    return tuple(row[name] for name in names)


@pytest.mark.parametrize("write", [repr, json.dumps])
def test_amazon_2014_items_are_literals_or_json(tmp_path: Path, write: Any) -> None:
    lines = [write(OLD_ITEMS[0]), "", write(OLD_ITEMS[1])]
    (tmp_path / "meta_Baby.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    rows, malformed = read_items(config_of("amazon2014", tmp_path, "meta_Baby.json.gz", "x"))
    assert [old_order(row) for row in rows] == OLD_EXPECTED
    assert [row[ROW] for row in rows] == [1, 3]
    assert not malformed


@pytest.mark.parametrize(
    "line",
    [
        "{'asin': 'x', 'title': __import__('os').getcwd()}",
        "{'asin': open('/etc/passwd')}",
        "{'asin': [i for i in range(9)]}",
        "{'asin': 'cut off",
        "{" * 100_000,
        "[" * 300 + "]" * 300,
        "-" * 100_000 + "1",
        "1" * 5000,
        "{'a': 2 ** 99}",
        "{['unhashable']: 1}",
        "{'asin': '" + "x" * (1 << 20) + "'}",
        "['no dict']",
        "{'asin': f'{1}'}",
        "{'nul': '\x00'}",
    ],
)
def test_amazon_2014_runs_no_code_and_reports_bad_lines(tmp_path: Path, line: str) -> None:
    text = "\n".join([repr(OLD_ITEMS[0]), line, repr(OLD_ITEMS[1])])
    (tmp_path / "meta.json").write_text(text)
    rows, malformed = read_items(config_of("amazon2014", tmp_path, "meta.json", "x"))
    assert [row["item_id"] for row in rows] == ["0000031852", "B000"]
    assert [row.where.rpartition("/")[2] for row in malformed] == ["meta.json line 2"]


@pytest.mark.parametrize("depth", [10, 99, 150, 200, 500, 900, 5000])
@pytest.mark.parametrize("name", ["title", "description", "categories", "imUrl", "other"])
def test_amazon_2014_lines_of_any_depth_are_rows_or_malformed(
    tmp_path: Path, name: str, depth: int
) -> None:
    deep = f'{{"asin": "x", "{name}": ' + "[" * depth + '"y"' + "]" * depth + "}"
    text = "\n".join([repr(OLD_ITEMS[0]), deep, repr(OLD_ITEMS[1])])
    (tmp_path / "meta.json").write_text(text)
    rows, malformed = read_items(config_of("amazon2014", tmp_path, "meta.json", "x"))
    expected = ["0000031852", *["x"] * (depth < 100), "B000"]
    assert [row["item_id"] for row in rows] == expected
    assert len(malformed) == 3 - len(expected)


@pytest.mark.parametrize(
    "value",
    [
        "{1: 2, 'a': (3, b'x')}",
        "{(1, 'a'): {None: {1, 2}}}",
        "{'a': 0x" + "f" * 5000 + "}",
        "0x" + "f" * 5000,
        "'\\ud800'",
        "{'\\ud800': '\\udfff'}",
        "{1j: ...}",
        "[" * 90 + "{1: {'a': 2}}" + "]" * 90,
    ],
)
def test_amazon_2014_literals_of_any_kind_are_texts(tmp_path: Path, value: str) -> None:
    line = f"{{'asin': 'x', 'title': {value}, 'description': {value}, 'imUrl': {value}}}"
    (tmp_path / "meta.json").write_text(line)
    rows, malformed = read_items(config_of("amazon2014", tmp_path, "meta.json", "x"))
    assert [row["item_id"] for row in rows] == ["x"]
    assert isinstance(rows[0]["title"], str)
    assert malformed == []


def test_amazon_2014_icons_are_no_pictures(tmp_path: Path) -> None:
    icon = "http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-sm._CB192198896_.gif"
    lines = [repr({**OLD_ITEMS[0], "imUrl": icon}), repr(OLD_ITEMS[0])]
    (tmp_path / "meta.json").write_text("\n".join(lines))
    rows, _ = read_items(config_of("amazon2014", tmp_path, "meta.json", "x"))
    assert [row["image"] for row in rows] == [None, OLD_ITEMS[0]["imUrl"]]


REVIEW = {
    "reviewerID": "A2IBPI20UZIR0U",
    "asin": "1384719342",
    "reviewerName": 'cassandra tu "Yeah, well...',
    "helpful": [0, 0],
    "reviewText": "Not much to write",
    "overall": 5.0,
    "summary": "good",
    "unixReviewTime": 1393545600,
    "reviewTime": "02 28, 2014",
}


@pytest.mark.parametrize("write", [repr, json.dumps])
def test_amazon_2014_reviews(tmp_path: Path, write: Any) -> None:
    second = {**REVIEW, "asin": "0000031852", "overall": 3.0}
    lines = "\n".join([write(REVIEW), "{broken", write(second)])
    (tmp_path / "reviews_Baby_5.json.gz").write_bytes(gzip.compress(lines.encode()))
    rows, malformed = read_log(config_of("amazon2014", tmp_path, "x", "reviews_Baby_5.json.gz"))
    found = [(r["user_id"], r["item_id"], float(r["rating"]), int(r["timestamp"])) for r in rows]
    assert found == [
        ("A2IBPI20UZIR0U", "1384719342", 5.0, 1393545600),
        ("A2IBPI20UZIR0U", "0000031852", 3.0, 1393545600),
    ]
    assert [row.where.rpartition(" ")[2] for row in malformed] == ["2"]
    assert [row[ROW] for row in rows] == [1, 3]


@pytest.mark.parametrize("header", ["", "UserId,ProductId,Rating,Timestamp\n"])
def test_amazon_2014_ratings_have_no_header(tmp_path: Path, header: str) -> None:
    (tmp_path / "ratings.csv").write_text(header + "A,0000031852,5.0,1\nB,B000,1.0,2\n")
    rows, _ = read_log(config_of("amazon2014", tmp_path, "x", "ratings.csv"))
    assert without_numbers(rows) == [("A", "0000031852", "5.0", "1"), ("B", "B000", "1.0", "2")]


# --- Amazon 2023 ---------------------------------------------------------------------------------


def picture(variant: str | None, **urls: str | None) -> dict[str, str | None]:
    return {"hi_res": None, "thumb": None, "large": None, **urls, "variant": variant}


NEW_ITEMS: Rows = [
    {
        "main_category": "All Beauty",
        "title": "Howard LC0008 Leather Conditioner",
        "average_rating": 4.8,
        "rating_number": 10,
        "features": ["Made from 100% fine Italian", "", "Works"],
        "description": ["Two", "parts"],
        "price": 14.95,
        "images": [
            picture("PT01", large="https://m.media-amazon.com/images/I/b.jpg"),
            picture("MAIN", hi_res="https://m.media-amazon.com/images/I/a_hi.jpg",
                    large="https://m.media-amazon.com/images/I/a.jpg"),
        ],
        "videos": [],
        "store": "Howard Products",
        "categories": ["Beauty", "Hair"],
        "details": {"Package Dimensions": "7.1 x 5.5", "UPC": "617390882781"},
        "parent_asin": "B01CUPMQZE",
        "bought_together": None,
    },
    {
        "title": "Thumb only", "features": [], "description": [], "price": None, "store": None,
        "images": [picture("MAIN"), picture("PT01", large="", thumb="https://x/t.jpg")],
        "categories": [], "details": {}, "parent_asin": "B076WQZGPM",
    },
    {
        "title": "No picture", "features": ["f"], "description": [], "price": "from 12.99",
        "images": [], "categories": ["Beauty"], "details": {}, "parent_asin": "B000000003",
    },
]  # fmt: skip
NEW_EXPECTED = [
    ("B01CUPMQZE", "Howard LC0008 Leather Conditioner", "Howard Products", "Beauty, Hair",
     "Made from 100% fine Italian Works Two parts", "https://m.media-amazon.com/images/I/a.jpg",
     None),
    ("B076WQZGPM", "Thumb only", None, "", "", "https://x/t.jpg", None),
    ("B000000003", "No picture", None, "Beauty", "f", None, None),
]  # fmt: skip


@pytest.mark.parametrize("bad", ["", "{broken\n"])
def test_amazon_2023_items_by_blocks_and_by_lines(tmp_path: Path, bad: str) -> None:
    text = "".join(json.dumps(row) + "\n" for row in NEW_ITEMS) + bad
    (tmp_path / "meta.jsonl").write_text(text)
    rows, malformed = read_items(config_of("amazon2023", tmp_path, "meta.jsonl", "x"))
    assert [old_order(row) for row in rows] == NEW_EXPECTED
    assert [row[ROW] for row in rows] == [1, 2, 3]
    assert len(malformed) == bool(bad)


def test_amazon_2023_items_as_parquet_have_pictures_in_lists(tmp_path: Path) -> None:
    names = ("hi_res", "large", "thumb", "variant")
    columns = ("parent_asin", "title", "store", "categories", "features", "description")
    lists = [{n: [p[n] for p in row["images"]] for n in names} for row in NEW_ITEMS]
    kind = pa.struct([(name, pa.list_(pa.string())) for name in names])
    table = pa.table(
        {name: [row.get(name) for row in NEW_ITEMS] for name in columns}
        | {"images": pa.array(lists, kind)}
    )
    pq.write_table(table, tmp_path / "full.parquet")
    rows, _ = read_items(config_of("amazon2023", tmp_path, "full.parquet", "x"))
    assert [old_order(row) for row in rows] == NEW_EXPECTED


def test_amazon_2023_blocks_and_lines_agree_on_any_item() -> None:
    rng = np.random.default_rng(0)

    def maybe(value: Any) -> Any:
        return None if rng.random() < 0.2 else value

    def texts() -> Any:
        return maybe([maybe(f"t{rng.integers(9)}") for _ in range(rng.integers(4))])

    def url() -> Any:
        return maybe("" if rng.random() < 0.2 else f"https://x/{rng.integers(99)}.jpg")

    def item() -> dict[str, Any]:
        pictures = [
            maybe(picture(maybe(rng.choice(["MAIN", "PT01"])), large=url(), hi_res=url(),
                          thumb=url()))
            for _ in range(rng.integers(4))
        ]  # fmt: skip
        lists = {name: texts() for name in ("categories", "features", "description")}
        return {"parent_asin": "a", "title": "t", "images": maybe(pictures), **lists}

    items = [item() for _ in range(300)]
    raw = pa.Table.from_pylist(items, amazon2023._SCHEMA)
    by_block = amazon2023._items(raw).to_pylist()
    by_line = [amazon2023._item(row) for row in items]
    assert by_block == by_line


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_amazon_2023_reviews_and_benchmark_files(tmp_path: Path, kind: str) -> None:
    review = {
        "rating": 5.0, "title": "t", "text": "x", "images": [], "asin": "B0", "user_id": "A",
        "parent_asin": "B1", "timestamp": 1588687728923, "verified_purchase": True,
    }  # fmt: skip
    if kind == "jsonl":
        (tmp_path / "r.jsonl").write_text(json.dumps(review) + "\n")
    else:
        header = "user_id,parent_asin,rating,timestamp,history\n"
        (tmp_path / "r.csv").write_text(header + "A,B1,5.0,1588687728923,B2 B3\n")
    (row,), _ = read_log(config_of("amazon2023", tmp_path, "x", f"r.{kind}"))
    assert (row["user_id"], row["parent_asin"]) == ("A", "B1")
    assert (float(row["rating"]), int(row["timestamp"])) == (5.0, 1588687728923)


# --- MovieLens -----------------------------------------------------------------------------------

MOVIES = [
    ("1", "Toy Story (1995)", "Animation|Children's|Comedy"),
    ("11", "American President, The (1995)", "Comedy"),
    ("2", 'Misérables, Les "1995" (1995)', "(no genres listed)"),
]


def write_movies(folder: Path, kind: str) -> None:
    if kind == "dat":
        text = "".join("::".join(movie) + "\n" for movie in MOVIES)
        (folder / "movies.dat").write_bytes(text.encode("latin-1"))
        (folder / "ratings.dat").write_text("1::1193::5::978300760\n6040::1::3::956715648\n")
        return
    quoted = [
        [f'"{v.replace(chr(34), chr(34) * 2)}"' if "," in v else v for v in m] for m in MOVIES
    ]
    lines = ["movieId,title,genres", *(",".join(movie) for movie in quoted)]
    (folder / "movies.csv").write_bytes(("\r\n".join(lines) + "\r\n").encode())
    header = "userId,movieId,rating,timestamp\n"
    (folder / "ratings.csv").write_text(header + "1,1193,5,978300760\n6040,1,3,956715648\n")


@pytest.mark.parametrize("kind", ["dat", "csv"])
def test_movielens_old_and_new(tmp_path: Path, kind: str) -> None:
    write_movies(tmp_path, kind)
    pictures = tmp_path / "posters"
    pictures.mkdir()
    for name in ("11.jpg", "2.PNG", "3.jpg", "1.txt"):
        (pictures / name).write_bytes(b"")
    config = config_of(
        "movielens", tmp_path, f"movies.{kind}", f"ratings.{kind}", root=str(pictures)
    )
    rows, malformed = read_items(config)
    assert [(r["item_id"], r["title"], r["genres"], r["image"]) for r in rows] == [
        ("1", "Toy Story (1995)", "Animation, Children's, Comedy", None),
        ("11", "American President, The (1995)", "Comedy", "11.jpg"),
        ("2", 'Misérables, Les "1995" (1995)', "", "2.PNG"),
    ]
    log, _ = read_log(config)
    assert without_numbers(log) == [
        ("1", "1193", "5", "978300760"), ("6040", "1", "3", "956715648"),
    ]  # fmt: skip
    assert not malformed


def test_movielens_without_pictures_has_none(tmp_path: Path) -> None:
    write_movies(tmp_path, "dat")
    rows, _ = read_items(config_of("movielens", tmp_path, "movies.dat", "ratings.dat"))
    assert {row["image"] for row in rows} == {None}


def test_movielens_rows_of_another_width_are_reported(tmp_path: Path) -> None:
    (tmp_path / "movies.dat").write_text("1::A::x\n2::B: the: colon::x\n3::C::D::x\n4\n5::E:::y\n")
    rows, malformed = read_items(config_of("movielens", tmp_path, "movies.dat", "x"))
    assert [(r["item_id"], r["title"], r[ROW]) for r in rows] == [
        ("1", "A", 1), ("2", "B: the: colon", 2), ("5", "E", 5),
    ]  # fmt: skip
    assert [m.where.rpartition(" ")[2] for m in malformed] == ["3", "4"]


# --- H&M -----------------------------------------------------------------------------------------

ARTICLES_HEADER = (
    "article_id,product_code,prod_name,product_type_no,product_type_name,product_group_name,"
    "colour_group_code,colour_group_name,department_no,department_name,detail_desc"
)


def test_hm_keeps_the_leading_zeros_and_finds_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "articles.csv").write_text(
        ARTICLES_HEADER + "\n"
        '0108775015,0108775,Strap top,253,Vest top,Garment Upper body,09,Black,1676,Jersey,"Jersey '
        'top, with narrow straps."\n'
        "0663713001,0663713,T-shirt,255,T-shirt,Garment,10,White,1676,Jersey,\n"
    )
    (tmp_path / "transactions_train.csv").write_text(
        "t_dat,customer_id,article_id,price,sales_channel_id\n"
        "2018-09-20,000058a12d5b43e6,0663713001,0.0508,2\n"
    )
    config = config_of("hm", tmp_path, "articles.csv", "transactions_train.csv")
    rows, _ = read_items(config)
    assert without_numbers(rows) == [
        ("0108775015", "Strap top", "Vest top", "Black", "Jersey",
         "Jersey top, with narrow straps.", "images/010/0108775015.jpg"),
        ("0663713001", "T-shirt", "T-shirt", "White", "Jersey", None,
         "images/066/0663713001.jpg"),
    ]  # fmt: skip
    log, _ = read_log(config)
    assert without_numbers(log) == [("000058a12d5b43e6", "0663713001", "2018-09-20")]


def test_hm_keys_that_became_numbers_are_the_same_keys(tmp_path: Path) -> None:
    log = pa.table({"t_dat": ["2018-09-20"], "customer_id": ["c"], "article_id": [663713001]})
    pq.write_table(log, tmp_path / "t.parquet")
    (row,), _ = read_log(config_of("hm", tmp_path, "x", "t.parquet"))
    assert row["item_id"] == "0663713001"


# --- all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", sorted(PUBLIC_SOURCES))
def test_a_file_of_another_kind_is_named(tmp_path: Path, source: str) -> None:
    (tmp_path / "items.xlsx").write_bytes(b"PK")
    if source == "amazon2014":  # its items are lines, whatever the name
        rows, malformed = read_items(config_of(source, tmp_path, "items.xlsx", "x"))
        assert (rows, len(malformed)) == ([], 1)
        return
    with pytest.raises(UserError, match=rf"items.xlsx: {source} has no such file"):
        read_items(config_of(source, tmp_path, "items.xlsx", "x"))


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("amazon2014", "r.json", "has no column 'reviewerID', which source amazon2014 names"),
        ("amazon2023", "r.jsonl", "has no column 'parent_asin', which"),
        ("movielens", "r.csv", "has no column 'userId', which source movielens names"),
        ("hm", "r.csv", "has no column 'customer_id', which source hm names"),
    ],
)
def test_a_log_of_another_dataset_is_named(
    tmp_path: Path, source: str, name: str, message: str
) -> None:
    text = "user,article\n1,2\n" if name.endswith("csv") else '{"user_id": "x", "b": 1}\n'
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_log(config_of(source, tmp_path, "x", name))


def test_every_packing_is_read(tmp_path: Path) -> None:
    write_movies(tmp_path, "csv")
    plain = (tmp_path / "ratings.csv").read_bytes()
    (tmp_path / "ratings.csv.bz2").write_bytes(bz2.compress(plain))
    (tmp_path / "ratings.csv.zst").write_bytes(pa.Codec("zstd").compress(plain).to_pybytes())
    logs = [
        read_log(config_of("movielens", tmp_path, "x", f"ratings.csv{suffix}"))[0]
        for suffix in ("", ".bz2", ".zst")
    ]
    assert logs[0] == logs[1] == logs[2] != []
