"""Parts of the HTML page: charts, statistics, escaping, users shown."""

import json
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from alignrec import artifacts, configuration
from alignrec.data import schema
from alignrec.data.csr import CSR
from alignrec.evaluation import charts, comparison, report, showcase
from alignrec.evaluation.config import EvaluationConfig, ReportConfig
from alignrec.evaluation.ranking import inner_product
from alignrec.evaluation.reconstructions import read_reconstructions
from alignrec.evaluation.statistics import group_rejected, read_flows, read_statistics
from alignrec.export.config import ExportConfig
from alignrec.testing.datasets import write_dataset
from alignrec.testing.results import write_embeddings

HOSTILE = '<script>alert("x")</script>"\'><img src=x onerror=alert(1)>'
RESULTS = {
    model: {split: {"recall@10": value, "recall@20": value, "ndcg@10": value, "ndcg@20": value}}
    for split in ("test",)
    for model, value in (("alignrec", 0.3), ("popularity", 0.2), ("ablation", 0.0))
}
OUTCOME = report.Outcome(RESULTS, {}, "test", 20)


class ParsedPage(HTMLParser):
    """Tags of a page, and those that were never closed."""

    VOID = frozenset({"meta", "img", "link", "br", "line", "circle", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def make_page(tmp_path: Path, **changes: object) -> str:
    dataset = write_dataset(tmp_path / "data_prep")
    inputs = {"dataset": dataset, "embeddings": write_embeddings(tmp_path / "align", dataset)}
    values = report.page_values(report.Page(OUTCOME, [], {"num_removed_items": 0}, inputs, "demo"))
    return report.render({**values, **changes})


def test_hostile_titles_keys_and_names_are_text(tmp_path: Path) -> None:
    tile = showcase.Tile(HOSTILE, None, is_hit=True)
    user = showcase.ShownUser(
        HOSTILE, 1, (tile,), (tile,), (showcase.HeldOut(HOSTILE, 1, is_shown=True),)
    )
    page = make_page(
        tmp_path, users=[user], run=HOSTILE, quarantine=group_rejected([(HOSTILE, HOSTILE, 3)])
    )
    parsed = ParsedPage(page)
    assert parsed.attributes("script") == []
    assert not any("onerror" in attributes for _, attributes in parsed.tags)
    assert "&lt;script&gt;" in page


def test_page_is_well_formed_and_asks_for_nothing_outside(tmp_path: Path) -> None:
    parsed = ParsedPage(make_page(tmp_path))
    assert parsed.open == []
    for _, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert parsed.attributes("link") == []
    policy = [a["content"] for a in parsed.attributes("meta") if "http-equiv" in a]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert parsed.attributes("html") == [{"lang": "en"}]
    assert all(a.get("aria-label") for a in parsed.attributes("svg"))


def test_margins_are_means_and_errors_of_the_users_differences() -> None:
    own = torch.tensor([0.5, 0.0, 1.0, 0.5], dtype=torch.float64)
    other = torch.tensor([0.0, 0.0, 1.0, 0.6], dtype=torch.float64)
    margins = comparison.margins({"alignrec": own, "other": other, "none": torch.zeros(4)})
    differences = [0.5, 0.0, 0.0, -0.1]
    assert margins["other"].difference == pytest.approx(0.1)
    assert margins["other"].relative == pytest.approx(0.25)
    assert margins["other"].error == pytest.approx(statistics.stdev(differences) / 2)
    assert margins["other"].words == f"+0.1000 ± {margins['other'].error:.4f} (+25.0 %)"
    assert margins["none"].relative is None
    assert comparison.margins({"alignrec": own[:1], "other": own[:1]})["other"].error is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"content": False, "layers": 2}, "Without content"),
        ({"content": False, "layers": 1}, "the same model with content False, layers 1"),
        ({"content": True, "layers": 2}, "the same model with another seed"),
    ],
)
def test_the_ablation_is_named_by_what_differs(
    tmp_path: Path, settings: dict[str, object], words: str
) -> None:
    inputs = {}
    for name, config in (("embeddings", {"content": True, "layers": 2}), ("ablation", settings)):
        inputs[name] = tmp_path / name
        with artifacts.writing(
            inputs[name], kind="embeddings", fingerprint=name, config=config, inputs={}
        ):
            pass
    assert words in report.ablation_words(inputs)["ablation"]


def test_best_of_each_column_is_found() -> None:
    results = {
        "alignrec": {"test": {"recall@20": 0.3, "ndcg@20": 0.1}},
        "popularity": {"test": {"recall@20": 0.2, "ndcg@20": 0.4}},
    }
    table = report.metric_table(results, "test", ("recall@20", "ndcg@20"))
    assert table.best == (0.3, 0.4)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.012, 0.0975), (-3, 7), (100, 51234), (1e-6, 2e-6), (99.9, 100.1)]
)
def test_ticks_enclose_the_range_evenly(low: float, high: float) -> None:
    places = charts.ticks(low, high, 4)
    steps = np.diff(places)
    assert places[0] <= low + 1e-12
    assert places[-1] >= high - 1e-12
    assert 2 <= len(places) <= 8
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


def test_every_point_of_a_curve_lies_in_the_plot() -> None:
    points = [(float(i), float(np.sin(i) * 10**-i)) for i in range(30)]
    chart = charts.line_chart("x", {"a": points, "b": [(0.0, 3.0)]})
    for line in chart.lines:
        for x, y in line.points:
            assert chart.left <= x <= chart.right
            assert 0 <= y <= chart.bottom


def test_a_constant_curve_and_a_single_point_can_be_drawn() -> None:
    assert charts.line_chart("x", {"a": [(0.0, 2.0), (1.0, 2.0)]}).lines[0].last == "2"
    assert len(charts.line_chart("x", {"a": [(5.0, 1.0)]}).lines[0].points) == 1


def test_long_histories_keep_their_ends() -> None:
    points = [(float(i), 0.0) for i in range(10_000)]
    thin = charts.thin_out(points)
    assert len(thin) == 160
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert thin == sorted(set(thin))


def test_measurements_that_are_never_numbers_have_no_chart() -> None:
    histories = {"a": [{"step": 1, "time": 0.0, "loss/bpr": None, "loss/uia": 1.0}]}
    assert charts.measurement_names(histories) == ["loss/uia"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("loss/bpr", "Loss: BPR"),
        ("valid/ndcg@20", "Validation NDCG@20"),
        ("learning_rate", "Learning rate"),
    ],
)
def test_curves_are_named_in_words(name: str, words: str) -> None:
    assert report.curve_words(name) == words


def test_facts_are_sorted_by_shape() -> None:
    facts = {
        "images": {"good": 7, "side": {"edges": [0, 1, 4, 8], "counts": [0, 2, 5, 0]}},
        "per_user": {"mean": 2.5, "quantiles": {"0.0": 1.0, "0.5": 2.0, "1.0": 9.0}},
        "strange": [1, {"a": None}],
        "nothing": None,
    }
    found = read_statistics(facts)
    assert found.numbers == [("images: good", 7)]
    assert found.histograms[0].bars == (("1-3", 2), ("4-7", 5))
    assert found.quantiles[0].values == (("mean", 2.5), ("min", 1.0), ("median", 2.0), ("max", 9.0))


def test_flows_add_up_to_the_rows_that_were_read() -> None:
    rejected = group_rejected([("images", "image_truncated", 3), ("interactions", "bad_rating", 5),
                               ("images", "image_missing", 1)])  # fmt: skip
    facts = {
        "images": {"good": 40},
        "interactions": {
            "rows": 100, "left": 80, "repeated": 9, "below_min_rating": 0, "outside_of_core": 6,
        },
    }  # fmt: skip
    flows = read_flows({"num_items": 50, "num_removed": 2}, facts, rejected)
    found = {flow.title: [(part.kind, part.count) for part in flow.parts] for flow in flows}
    assert found == {
        "Catalogue": [("kept", 48)],
        "Pictures": [("kept", 40), ("bad", 4)],
        "Log": [("kept", 80), ("left-out", 9), ("left-out", 6), ("bad", 5)],
    }
    assert [flow.total for flow in flows] == [48, 44, 100]
    assert rejected[0].reasons == (("Truncated", 3), ("Missing", 1))
    assert read_flows({"num_items": 3}, {}, []) == []


def test_a_histogram_with_quantiles_tells_them_below_its_title() -> None:
    facts = {"per_user": {"edges": [1, 2], "counts": [4, 1], "mean": 1.2, "quantiles": {"0.5": 1}}}
    found = read_statistics({"interactions": facts})
    assert [(h.title, h.note) for h in found.histograms] == [
        ("users by interactions", "mean 1.2 · median 1")
    ]
    assert found.quantiles == []


def test_an_empty_histogram_can_be_drawn() -> None:
    found = read_statistics({"side": {"edges": [0, 4], "counts": [0, 0]}})
    assert found.histograms[0].largest == 1


def test_shown_users_have_history_and_are_spread_evenly() -> None:
    train = CSR.from_pairs([u for u in range(40) for _ in range(6)], [*range(6)] * 40, 40, 9)
    held_out = CSR.from_pairs([*range(1, 40, 2)], [8] * 20, 40, 9)
    config = ReportConfig(num_users=4, min_history=6)
    users = showcase.choose_users(train, held_out, config)
    assert users == [5, 15, 25, 35]
    assert showcase.choose_users(train, held_out, ReportConfig(min_history=7)) == []


def test_user_tiles_show_history_hits_and_places(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data_prep", without_image=(0, 1, 2))
    num_users, num_items = 24, 48
    train, test = (
        CSR.from_pairs(*schema.read_interactions(dataset, split), num_users, num_items)
        for split in ("train", "test")
    )
    item = torch.eye(num_items)
    user = torch.zeros(num_users, num_items)
    for u in range(num_users):
        user[u, test.row(u)] = 1.0  # scores its own held-out item first
    removed = torch.tensor([0, 47])
    user[:, removed] = 0.5  # would come next
    shown = showcase.show_users(
        dataset, train, test, inner_product(user, item), ReportConfig(), removed=removed
    )
    assert len(shown) == 6
    gone = set(showcase.read_titles(dataset, [0, 47]).values())
    assert not gone & {tile.title for row in shown for tile in row.recommended}
    for row in shown:
        assert [tile.is_hit for tile in row.recommended] == [True] + [False] * 9
        assert [(h.rank, h.is_shown) for h in row.held_out] == [(1, True)]
        assert row.num_train == len(row.history) == 6
    tiles = [tile for row in shown for tile in (*row.history, *row.recommended)]
    assert {tile.thumbnail.width for tile in tiles if tile.thumbnail} == {32}


def test_only_pictures_that_can_be_decoded_are_shown(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data_prep", without_image=(3,))
    samples = schema.read_samples(dataset).to_pylist()
    samples[5]["image_offset"] = samples[6]["image_offset"] + 40  # the middle of another picture
    table = pa.Table.from_pylist(samples, schema=schema.SAMPLES)
    pq.write_table(table, dataset / "samples.parquet")
    pictures = showcase.read_thumbnails(dataset, [3, 4, 5], 16)
    assert list(pictures) == [4]
    assert (pictures[4].width, pictures[4].height) == (16, 16)


def test_reconstructions_of_bytes_and_of_fractions_are_shown(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    as_bytes = (stack * 255).round().astype(np.uint8)
    np.savez(tmp_path / "reconstructions.npz", original=as_bytes, masked=stack, predicted=stack)
    rows = read_reconstructions(tmp_path)
    assert len(rows) == 2
    assert rows[0].pictures["original"] == rows[0].pictures["masked"]


def test_codes_of_patches_are_shown_by_their_mean_patches_and_counted(tmp_path: Path) -> None:
    stack = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    arrays = {"original": stack, "masked": stack, "has_image": np.array([True, False])}
    np.savez(tmp_path / "reconstructions.npz", **arrays, patches_right=[[3, 6], [0, 0]])
    without_pixels, absent = read_reconstructions(tmp_path)
    assert list(without_pixels.pictures) == ["original", "masked"]
    assert (without_pixels.patches_right, absent.patches_right) == ((3, 6), None)
    np.savez(tmp_path / "reconstructions.npz", **arrays, predicted=stack, target=stack)
    shown = read_reconstructions(tmp_path)[0]
    assert list(shown.pictures) == ["original", "masked", "predicted", "true codes"]
    page = make_page(tmp_path, reconstructions=[without_pixels], held_out=["Held-out patches: <b>"])
    assert "3 of 6 masked patches: right code" in page
    assert "Held-out patches: &lt;b&gt;" in page


def test_reconstructed_texts_are_text_and_samples_may_lack_a_picture(tmp_path: Path) -> None:
    stack = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    pictures = {"original": stack, "masked": stack, "predicted": stack}
    words = np.array([HOSTILE, "red<mask>shoe<mask>"])
    texts = {f"text_{state}": words for state in ("original", "masked", "predicted")}
    has_image = np.array([True, False])
    np.savez(tmp_path / "reconstructions.npz", **pictures, **texts, has_image=has_image)
    rows = read_reconstructions(tmp_path)
    assert [bool(row.pictures) for row in rows] == [True, False]
    assert rows[1].masked_text == ("red", "shoe", "")
    page = ParsedPage(make_page(tmp_path, reconstructions=rows))
    assert page.attributes("script") == []
    assert len([a for a in page.attributes("span") if a.get("class") == "mask"]) == 2


def test_a_dataset_without_samples_table_shows_titles(tmp_path: Path) -> None:
    assert showcase.read_thumbnails(tmp_path, [0, 1], 16) == {}


def test_lineage_survives_a_deleted_source(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data_prep")
    embeddings = write_embeddings(tmp_path / "align", dataset)
    manifest = json.loads((embeddings / artifacts.MANIFEST).read_text())
    manifest["inputs"]["graph"] = {"path": str(tmp_path / "gone"), "identity": "f" * 64}
    artifacts.write_json(embeddings / artifacts.MANIFEST, manifest)
    inputs = {"dataset": dataset, "embeddings": embeddings}
    values = report.page_values(report.Page(OUTCOME, [], {"num_removed_items": 0}, inputs, "demo"))
    steps = values["steps"]
    assert [step.kind for step in steps] == ["dataset", "graph", "embeddings"]
    assert re.search(r"no longer at its place", report.render(values))


def test_the_settings_in_the_documents_are_the_defaults() -> None:
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    written = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    for section, cls in (("evaluation", EvaluationConfig), ("export", ExportConfig)):
        assert written[section] == configuration.to_mapping(cls())
        assert configuration.build(cls, written[section], section=section) == cls()
