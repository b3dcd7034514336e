"""The account adds up, or says where it does not."""

import pytest

from stages.config.errors import DataError
from stages.data.curation.ledger import Amount, Step, verify_chain


def _step(
    name: str, entered: tuple[int, int], kept: tuple[int, int], dropped: tuple[int, int], rewritten: int = 0
) -> Step:
    return Step(name, Amount(*entered), Amount(*kept), rewritten, {"why": Amount(*dropped)})


def test_three_documents_of_ten_bytes_of_which_one_goes() -> None:
    _step("x", (3, 30), (2, 20), (1, 10)).verify()


def test_rewritten_bytes_are_part_of_the_sum() -> None:
    _step("x", (3, 30), (2, 17), (1, 10), rewritten=3).verify()


@pytest.mark.parametrize("kept", [(1, 20), (2, 19), (3, 30)])
def test_a_lost_document_or_byte_is_an_error(kept: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="does not conserve"):
        _step("x", (3, 30), kept, (1, 10)).verify()


def test_a_document_lost_between_steps_is_an_error() -> None:
    first, second = _step("a", (3, 30), (2, 20), (1, 10)), _step("b", (1, 10), (1, 10), (0, 0))
    with pytest.raises(DataError, match="between 'a' and 'b'"):
        verify_chain([first, second])


def test_samples_are_the_first_ones_and_hold_no_personal_data() -> None:
    first, second = Step("x"), Step("x")
    for number in range(3):
        first.drop("short", f"a{number}", "write to jane.doe@example.com", samples=2)
        second.drop("short", f"b{number}", "text", samples=2)
    first.merge(second, samples=3)
    assert [row["id"] for row in first.samples["short"]] == ["a0", "a1", "b0"]
    assert first.samples["short"][0]["text"] == "write to <EMAIL>"
    assert first.dropped["short"].documents == 6
