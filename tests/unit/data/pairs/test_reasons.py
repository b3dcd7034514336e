"""Which areas a published reason names: tags of raters do, words of their comments do not."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from stages.config.curate import CurateConfig
from stages.config.principles import Area
from stages.config.sources import PreferenceFormat, parse_sources
from stages.data.pairs.given import given_preferences, given_unpaired
from stages.data.pairs.reasons import areas_of, joined, reason_of


@pytest.mark.parametrize(
    ("reason", "named"),
    [
        ("", ()),
        ("helpful", (Area.HELPFUL,)),
        ("harmless, helpful", (Area.HELPFUL, Area.HARMLESS)),
        ("Honest ,clear", (Area.HONEST,)),
        # an area and the principle that it is of, as the constitution writes them
        ("harmless, no-insults", (Area.HARMLESS,)),
        ("helpful\nIt names the harmless ones, too.\nhonest", (Area.HELPFUL, Area.HONEST)),
        ("not honest", ()),
        ("unhelpful", ()),
        ("It is far from being honest, helpful", ()),
        ("rejected: helpful", ()),
    ],
)
def test_areas_are_whole_tags_of_a_line_of_tags(reason: str, named: tuple[Area, ...]) -> None:
    assert areas_of(reason) == named


def test_what_raters_tick_and_write_is_read_after_it_was_published() -> None:
    """The way of `collect_preferences`: two raters of one pair, of whom one says something in words."""
    first = reason_of({"reasons": ["helpful", "honest"], "comment": "The other one is harmless, but wrong."})
    second = reason_of({"reasons": ["harmless"]})
    assert areas_of(first) == (Area.HELPFUL, Area.HONEST)
    assert areas_of(joined([*first.split("\n"), *second.split("\n")])) == tuple(Area)


def _read(tmp_path: Path, row: Mapping[str, object], options: str) -> str:
    """The reason of the only row of a source with these options."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (source,) = parse_sources("preferences", [f"{path}#{options}"], PreferenceFormat)
    read = given_unpaired if source.is_unpaired else given_preferences
    (made,) = read([source], CurateConfig(heldout_fraction=0.0), [], {})
    return made.get("reason", "")


PAIR = {"prompt": "Who?", "chosen": "You.", "rejected": "Me."}


def test_the_area_of_a_source_is_a_reason_of_all_its_rows(tmp_path: Path) -> None:
    assert _read(tmp_path, PAIR, "area=harmless") == "harmless"
    said = _read(tmp_path, {**PAIR, "reasons": ["helpful", "clear"], "comment": "So."}, "area=harmless+honest")
    assert said == "harmless, honest\nhelpful, clear\nSo."
    assert areas_of(said) == tuple(Area)
    assert _read(tmp_path, {**PAIR, "reason": "harmless"}, "format=pair&area=harmless") == "harmless"
    alone = {"prompt": "Who?", "completion": "You.", "label": True}
    assert _read(tmp_path, alone, "format=unpaired&area=honest") == "honest"
    assert _read(tmp_path, PAIR, "format=pair") == ""


def test_the_area_of_a_source_is_part_of_what_is_curated() -> None:
    (source,) = parse_sources("preferences", ["/p#area=helpful+honest&weight=2"], PreferenceFormat)
    assert str(source) == "/p#area=helpful+honest"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/p#area=harm", "preferences: area='harm' of '/p' is not one of helpful, honest, harmless"),
        ("/p#area=honest+honest", "names an area twice"),
        ("derived#area=helpful", "area='helpful' of 'derived' is for given preferences"),
    ],
)
def test_other_areas_and_areas_of_derived_pairs_are_refused(line: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_sources("preferences", [line], PreferenceFormat)
