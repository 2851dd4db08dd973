import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from alignrec import configuration
from alignrec.configuration import option
from alignrec.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    kind: Literal["random", "time"] = option("random", "how users' histories are divided")
    ratios: tuple[float, ...] = option((0.8, 0.1, 0.1), "shares")


@dataclasses.dataclass(frozen=True)
class Sample:
    learning_rate: float = option(1e-3, "Adam step size", minimum=0.0)
    epochs: int = option(10, "passes over the data", minimum=1, maximum=1000)
    shuffle: bool = option(True, "new order every epoch")
    source: Path | None = option(None, "raw file")
    split: Split = option(Split(), "division of the log")
    num_ranks: int = option(1, "processes", affects_result=False)
    names: dict[str, str] = option({}, "column mapping")


def build(**values: Any) -> Sample:
    return configuration.build(Sample, values, section="sample")


def test_values_are_typed_and_nested() -> None:
    config = build(
        learning_rate=1,
        source="a/b",
        split={"kind": "time", "ratios": [1, 2]},
        names={"id": "asin"},
    )
    assert config.learning_rate == 1.0
    assert isinstance(config.learning_rate, float)
    assert config.source == Path("a/b")
    assert config.split == Split("time", (1.0, 2.0))
    assert config.names == {"id": "asin"}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"learning_rat": 1}, ["sample.learning_rat", "learning_rate"]),
        ({"split": {"knd": "time"}}, ["sample.split.knd", "kind"]),
        ({"split": {"kind": "rnd"}}, ["sample.split.kind", "random, time", "random"]),
        ({"epochs": "ten"}, ["sample.epochs", "whole number", "'ten'"]),
        ({"epochs": 1.5}, ["sample.epochs", "whole number"]),
        ({"epochs": 0}, ["sample.epochs=0", "at least 1", "passes over the data"]),
        ({"epochs": 1001}, ["at most 1000"]),
        ({"epochs": True}, ["sample.epochs", "whole number"]),
        ({"learning_rate": float("nan")}, ["NaN"]),
        ({"learning_rate": None}, ["sample.learning_rate", "empty"]),
        ({"shuffle": "yes"}, ["true or false"]),
        ({"names": [1]}, ["sample.names", "a list"]),
        ({"split": {"ratios": 3}}, ["sample.split.ratios", "a list"]),
    ],
)
def test_mistakes_name_the_setting_and_the_cure(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build(**values)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_section_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(UserError, match="must be a section"):
        configuration.build(Sample, ["a"], section="sample")  # type: ignore[arg-type]


def test_required_setting() -> None:
    @dataclasses.dataclass(frozen=True)
    class Needs:
        path: str = option(help="where the log is")

    with pytest.raises(UserError, match=r"needs\.path is required \(where the log is\)"):
        configuration.build(Needs, {}, section="needs")


def test_assignments_are_typed_and_do_not_alter_their_input() -> None:
    tree = {"align": {"epochs": 3}}
    result = configuration.apply_assignments(
        tree,
        [
            "align.learning_rate=1e-4",
            "align.split.kind=time",
            "new.flag=true",
            "new.word=2a",
            "new.s=",
        ],
    )
    assert result == {
        "align": {"epochs": 3, "learning_rate": 1e-4, "split": {"kind": "time"}},
        "new": {"flag": True, "word": "2a", "s": None},
    }
    assert tree == {"align": {"epochs": 3}}


@pytest.mark.parametrize(
    "text", ["align", "align=3", ".x=1", "align.epochs.deep=1", "align.x=[1", "align.x=2026-13-45"]
)
def test_malformed_assignments(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        configuration.apply_assignments({"align": {"epochs": 3}}, [text])


def test_only_settings_that_affect_the_result_count() -> None:
    assert configuration.result_settings(build(num_ranks=4)) == configuration.result_settings(
        build()
    )
    assert configuration.result_settings(build(epochs=4)) != configuration.result_settings(build())
    assert configuration.to_mapping(build(num_ranks=4))["num_ranks"] == 4


def test_unreadable_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        configuration.load_yaml(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1\nb: 2")
    with pytest.raises(UserError, match="not valid YAML"):
        configuration.load_yaml(bad)
    bad.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="a list"):
        configuration.load_yaml(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        configuration.load_yaml(bad)
    bad.write_text("align: {seed: 2026-13-45}")
    with pytest.raises(UserError, match="not valid YAML: month must be in"):
        configuration.load_yaml(bad)
    bad.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="not valid YAML"):
        configuration.load_yaml(bad)


def test_environment_variables_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNREC_TEST_DATA", "/data")
    monkeypatch.delenv("ALIGNREC_TEST_NONE", raising=False)
    tree = {"a": ["${ALIGNREC_TEST_DATA}/x", 3], "b": {"c": "${ALIGNREC_TEST_NONE:-here}/y"}}
    assert configuration.expand_variables(tree) == {"a": ["/data/x", 3], "b": {"c": "here/y"}}
    with pytest.raises(UserError, match="ALIGNREC_TEST_NONE is not set"):
        configuration.expand_variables({"a": "${ALIGNREC_TEST_NONE}"})
