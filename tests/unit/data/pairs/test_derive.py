"""Pairs out of symbols: right answers are the authors' own, wrong ones are wrong in the way they say."""

from collections import Counter

from stages.config.curate import CurateConfig
from stages.data.curation.ledger import Step
from stages.data.pairs.derive import Question, distinct_questions, instruction, preferences
from stages.data.sources.records import Symbol

_VERBS = ("Sort", "Merge", "Count", "Invert", "Filter", "Rotate", "Shuffle", "Split")


def _symbols(count: int, *, heldout: bool = False) -> list[Symbol]:
    group = "held==1" if heldout else "pkg==1"
    return [
        Symbol(
            id=f"{group}/{number}",
            name=f"{group[:4]}.f{number}",
            kind=("function", "class", "method")[number % 3],
            summary=f"{_VERBS[number % 8]} the values of column {number} of {group} in place.",
            body=f"The column {number} is read once and then written back to where it came from, row by row. " * 2,
            group=group,
            heldout=heldout,
        )
        for number in range(count)
    ]


def _questions(symbols: list[Symbol], config: CurateConfig) -> list[Question]:
    return distinct_questions(symbols, config, Step("unique_symbols"))


def test_names_and_summaries_are_unique_and_held_out_ones_win() -> None:
    train, held = _symbols(3), _symbols(3, heldout=True)
    copy = Symbol("c", "pkg.copy", "function", held[0].summary.upper(), "", "pkg==1", heldout=False)
    again = Symbol("d", train[0].name, "function", "A summary of its own, never seen.", "", "pkg==1", heldout=False)
    step = Step("unique_symbols")
    kept = distinct_questions([*train, copy, again, *held], CurateConfig(), step)
    step.verify()
    assert [question.symbol.id for question in kept] == [symbol.id for symbol in [*held, *train]]
    assert {reason: amount.documents for reason, amount in step.dropped.items()} == {
        "repeated_summary": 1,
        "repeated_name": 1,
    }


def test_a_question_names_its_symbol_and_is_answered_by_its_summary() -> None:
    config = CurateConfig(seed=3)
    for question in _questions(_symbols(30), config):
        row = instruction(question)
        assert f"`{question.symbol.name}`" in row["messages"][0]["content"]
        assert row["messages"][1] == {"role": "assistant", "content": question.symbol.summary}
        assert row["origin"] == "derived"


def test_rejected_answers_are_wrong_in_the_way_they_say() -> None:
    config = CurateConfig()
    symbols = _symbols(300)
    summaries = {symbol.id: symbol.summary for symbol in symbols}
    step = Step("wrong_answers")
    rows = preferences(_questions(symbols, config), config, step)
    step.verify()
    assert len(rows) == 300
    for row in rows:
        right = summaries[row["id"]]
        assert row["chosen"] == right
        match row["kind"]:
            case "mismatch":
                assert row["rejected"] != right
                assert row["rejected"] in summaries.values()
            case "truncated":
                assert right.startswith(row["rejected"])
                assert len(row["rejected"]) < len(right) - 1
            case "rambling":
                assert row["rejected"].startswith(right)
                assert row["rejected"].count("row by row") >= 2
            case "garbled":
                mine, theirs = right.split(), row["rejected"].split()
                assert len(mine) == len(theirs)
                assert (mine[0], mine[-1]) == (theirs[0], theirs[-1])
                assert mine != theirs
    shares = Counter(row["kind"] for row in rows)
    # 300 draws with p = .15, .25, .25: five standard deviations are 31 and 38
    assert abs(shares["mismatch"] - 45) < 31
    assert abs(shares["truncated"] - 75) < 38
    assert abs(shares["rambling"] - 75) < 38


def test_wrong_answers_never_cross_the_held_out_border() -> None:
    config = CurateConfig(preference_mix=(1.0, 0.0, 0.0, 0.0))
    rows = preferences(_questions(_symbols(50) + _symbols(50, heldout=True), config), config, Step("wrong_answers"))
    assert all(("of held==1" in row["rejected"]) is row["heldout"] for row in rows)


def test_a_lonely_symbol_has_no_wrong_answer_and_is_counted() -> None:
    config = CurateConfig(preference_mix=(1.0, 0.0, 0.0, 0.0))
    step = Step("wrong_answers")
    assert preferences(_questions(_symbols(1), config), config, step) == []
    assert step.dropped["no_wrong_answer"].documents == 1
