"""Which areas a published reason names: tags of raters do, words of their comments do not."""

import pytest

from stages.config.principles import Area
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
