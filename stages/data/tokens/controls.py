"""Which tokens control a model, and copies of a tokenizer for which they are ordinary text.

A tokenizer finds all its added tokens in a text. Only those marked as special can be switched off, and many tokenizers
do not mark the tokens that begin and end turns. So the copies mark them.
"""

import contextlib
import json
import re
from collections.abc import Collection, Container, Iterator, Mapping
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from stages.config.errors import ConfigError

RESERVED = "\ue000"
"""Begins every stand-in, so a text that holds it cannot be put among stand-ins."""
_CONTROL_FORM = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
"""How most models spell them; DeepSeek writes wide bars."""


def control_tokens(tokenizer: Tokenizer, written: str, named: Container[str]) -> dict[int, AddedToken]:
    """By id: all special tokens, and of the other added ones those that have a role, that the template writes, or that
    are spelled like control tokens. Others, such as `<think>`, are words that a text may use."""
    return {
        number: token
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
        or token.content in named
        or (token.content in written and token.content.strip())
        or _CONTROL_FORM.fullmatch(token.content)
    }


def plain_text_copy(tokenizer: Tokenizer, controls: Collection[int]) -> Tokenizer:
    """A copy that encodes these tokens, and all special ones, as plain text."""
    copy = Tokenizer.from_str(json.dumps(_described(tokenizer, controls)))
    copy.encode_special_tokens = True  # despite its name: text that looks special is ordinary text
    return copy


def copy_with_stand_ins(
    tokenizer: Tokenizer, controls: Mapping[int, AddedToken]
) -> tuple[Tokenizer, dict[str, str], np.ndarray]:
    """A copy that encodes control tokens as plain text and stand-ins as control tokens; the stand-in of each; and the
    real id of each id of the copy."""
    names = {token.content: f"{RESERVED}{chr(0xE100 + place)}" for place, token in enumerate(controls.values())}
    data = _described(tokenizer, controls)
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    after = max(ids, default=-1) + 1
    if isinstance(data["model"].get("vocab"), dict) and len(ids) < after:
        # Added tokens are numbered from the size of the vocabulary, which is an id in use where ids have holes.
        data["model"]["vocab"] |= {name: after + place for place, name in enumerate(names.values())}
    copy = Tokenizer.from_str(json.dumps(data))
    copy.encode_special_tokens = True
    copy.add_tokens(
        [
            AddedToken(
                names[token.content],
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=False,
            )
            for token in controls.values()
        ]
    )
    made = {number: copy.token_to_id(names[token.content]) for number, token in controls.items()}
    # Ids of the copy are those of the tokenizer, with the stand-ins after them; this maps stand-ins back.
    real_ids = np.arange(max(copy.get_vocab(with_added_tokens=True).values(), default=-1) + 1, dtype=np.int64)
    for number, stand_in in made.items():
        real_ids[stand_in] = number
    return copy, names, real_ids


def _described(tokenizer: Tokenizer, controls: Collection[int]) -> dict[str, Any]:
    """The tokenizer as JSON, with these tokens marked as special and without what changes the length of a text."""
    data = json.loads(tokenizer.to_str())
    data["post_processor"] = None  # it adds tokens that only the template may add, and trims offsets
    data["truncation"] = data["padding"] = None
    for entry in data["added_tokens"]:
        entry["special"] = entry["special"] or entry["id"] in controls
    return data


def is_of_tokenizers(error: BaseException) -> bool:
    """Whether the library tokenizers raised it: Exception itself, such as for a file that is no tokenizer or an unknown
    word without a token for such; and where its Rust code panics, a class of its own that is no Exception."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def encodable() -> Iterator[None]:
    """Raise ConfigError for a tokenizer that fails on a text, because no text is to blame for that."""
    try:
        yield
    except BaseException as error:
        if not is_of_tokenizers(error):
            raise
        raise ConfigError(
            f"the tokenizer cannot encode a text: {error}",
            advice="Provide a tokenizer.json that can encode any text, such as one with byte-level pieces.",
        ) from error
