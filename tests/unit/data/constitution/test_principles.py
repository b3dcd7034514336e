"""A file of principles is read as it states them, and every mistake in it is named with its place."""

from collections import Counter
from pathlib import Path

import pytest

from stages.config.errors import ConfigError, DataError
from stages.config.principles import SHIPPED, Area, Principle
from stages.data.constitution.principles import parse_constitution, read_constitution, snapshot_principles

ONE = """
  - id: short
    area: helpful
    critique: Is it long?
    revision: Make it shorter.
    comparison: Which is shorter?
"""
FILE = f"name: Ours\nversion: 2\nprinciples:{ONE}"


def test_the_principles_that_ship_cover_all_areas_and_differ_in_every_request() -> None:
    found = read_constitution(SHIPPED)
    assert Counter(principle.area for principle in found.principles) == {
        Area.HARMLESS: 8,
        Area.HONEST: 4,
        Area.HELPFUL: 4,
    }
    for name in ("id", "critique", "revision", "comparison"):
        assert len({getattr(principle, name) for principle in found.principles}) == len(found.principles)


def test_a_file_states_a_name_a_version_and_principles_by_area(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text(FILE)
    found = read_constitution(str(path))
    assert (found.name, found.version) == ("Ours", 2)
    assert found.of(frozenset({Area.HELPFUL})) == (
        Principle(
            id="short",
            area=Area.HELPFUL,
            critique="Is it long?",
            revision="Make it shorter.",
            comparison="Which is shorter?",
        ),
    )
    assert found.of(frozenset({Area.HONEST, Area.HARMLESS})) == ()


def test_its_identity_is_its_content_and_not_its_place(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(FILE)
    before = snapshot_principles(str(tmp_path / "a.yaml"))
    assert before == snapshot_principles(str(tmp_path / "b.yaml"))
    (tmp_path / "a.yaml").write_text(FILE.replace("shorter?", "the shorter one?"))
    assert snapshot_principles(str(tmp_path / "a.yaml")) != before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (FILE + ONE, r"principles: the ids \['short'\] stand there more than once"),
        (FILE.replace("Make it shorter.", "'  '"), r"principles\.1 \(short\)\.revision: it is empty"),
        (FILE.replace("critique:", "critic:"), r"principles\.1 \(short\)\.critic: unknown field"),
        (FILE.replace("critique:", "critic:"), r"principles\.1 \(short\)\.critique: Field required"),
        (FILE.replace("helpful", "pretty"), r"area: Input should be 'helpful', 'honest' or 'harmless', got 'pretty'"),
        (FILE.replace("short\n", "Short One\n"), r"principles\.1 \(Short One\)\.id: String should match"),
        ("name: x\nversion: 1\nprinciples: []\n", r"principles: Tuple should have at least 1 item"),
        ("- a\n- b\n", r"holds list and no mapping"),
        ("", r"holds NoneType and no mapping"),
        ("name: [", r"is no YAML"),
        (FILE.replace("version: 2", "version: 2\nversion: 3"), r"'version' stands twice, again in line 3"),
        (FILE.replace("Is it long?", "&a x").replace("Make it shorter.", "*a"), r"an alias \(\*\) in line 7"),
        ("name: !!python/object/apply:os.getcwd []\n", r"is no YAML: could not determine a constructor"),
    ],
)
def test_a_mistake_is_named_with_its_place(text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        parse_constitution(text.encode(), "ours.yaml")


def test_an_address_must_lead_to_one_file(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(FILE)
    with pytest.raises(ConfigError, match="is not one file, it holds 2"):
        read_constitution(str(tmp_path))
    with pytest.raises(ConfigError, match="does not exist"):
        read_constitution(str(tmp_path / "c.yaml"))
