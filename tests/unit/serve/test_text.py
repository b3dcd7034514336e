"""Pieces of text: together they are the whole, no piece splits a character, and nothing of a stop comes out."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stages.serve.loading import ServedModel
from stages.serve.text import StopTexts, TextStream, token_bytes, token_text

TEXT = "Grüße, 世界! 👩‍🔬 x\u0301 'ok'  two  spaces\n"


def byte_level() -> Tokenizer:
    """One token a byte, so every character beyond ASCII takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: place for place, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece() -> Tokenizer:
    """As Llama 2's: spaces as `▁`, unknown characters as bytes, and no space in front of the first word."""
    pieces = ["▁", "a", "b", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES, PIECES = byte_level(), sentence_piece()


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def test_a_character_comes_out_whole_with_its_last_byte() -> None:
    ids = BYTES.encode("a世b").ids
    assert streamed(BYTES, ids) == ["a", "", "", "世", "b", ""]


def test_what_is_no_character_comes_out_at_the_end_and_is_not_lost() -> None:
    ids = BYTES.encode("a世").ids[:-1]
    assert streamed(BYTES, ids) == ["a", "", "", "\ufffd"]


def test_bytes_that_are_no_characters_do_not_hold_the_text_up() -> None:
    """A model may loop on them, and whoever waits should see that."""
    (byte,) = BYTES.encode("é").ids[1:]
    assert streamed(BYTES, [byte] * 4) == ["", "\ufffd", "\ufffd", "\ufffd", "\ufffd"]


def test_text_survives_byte_by_byte() -> None:
    pieces = streamed(BYTES, BYTES.encode(TEXT).ids)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=24))
def test_pieces_of_any_bytes_are_together_what_decoding_gives(ids: list[int]) -> None:
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([[0], [1], [2], [3], [4 + 0xE4, 4 + 0xB8, 4 + 0x96], [4 + 0x41]]), max_size=16))
def test_pieces_keep_the_spaces_that_decoding_keeps(units: list[list[int]]) -> None:
    """Of bytes only whole characters: for one bad byte this decoder takes back the whole run, what is out included."""
    ids = [token for unit in units for token in unit]
    assert "".join(streamed(PIECES, ids)) == PIECES.decode(ids)


def test_a_control_token_between_words_takes_no_space_away(served: ServedModel) -> None:
    backend = served.tokenizer.backend
    ids = [*backend.encode("array of", add_special_tokens=False).ids, served.tokenizer.pad_id]
    ids += backend.encode(" trees", add_special_tokens=False).ids
    assert "".join(streamed(backend, ids)) == "array of trees"


def test_a_stop_is_found_across_pieces_and_nothing_of_it_comes_out() -> None:
    stops = StopTexts(["\nUser:", "END"])
    assert [stops.push(piece) for piece in ("one\n", "Us", "ual ", "\nUse", "r: two")] == [
        "one",
        "",
        "\nUsual ",
        "",
        "",
    ]
    assert stops.found
    assert (stops.push("more"), stops.finish()) == ("", "")


def test_the_stop_that_comes_first_counts() -> None:
    stops = StopTexts(["c", "bc"])
    assert (stops.push("abc"), stops.found) == ("a", True)


def test_what_was_held_back_for_nothing_comes_out_at_the_end() -> None:
    stops = StopTexts(["END"])
    assert (stops.push("the EN"), stops.finish()) == ("the ", "EN")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_text_ends_where_the_first_stop_begins_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    watch = StopTexts(stops)
    found = "".join(watch.push(piece) for piece in pieces) + watch.finish()
    whole = "".join(pieces)
    assert not any(stop in found for stop in stops)
    assert whole.startswith(found)
    assert watch.found == any(stop in whole for stop in stops)
    if not watch.found:
        assert found == whole


def test_tokens_are_spelled_by_their_bytes() -> None:
    ids = BYTES.encode("é").ids
    assert [token_bytes(BYTES, token) for token in ids] == [b"\xc3", b"\xa9"]
    assert [token_text(token_bytes(BYTES, token)) for token in ids] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert token_bytes(PIECES, 3) == b" a"
    assert token_bytes(PIECES, 4 + 0xE4) == b"\xe4"
    assert b"".join(token_bytes(BYTES, token) for token in BYTES.encode(TEXT).ids).decode() == TEXT
