"""How an item's text becomes a model's tokens: as plain text like lm-evaluation-harness, or as a chat.

Plain text is encoded as plain transformers does, with the begin token where its tokenizer puts one, except that a text
which spells out a control token stays text. A model without a chat template cannot be asked as a chat.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.config.errors import StageError
from stages.data.pairs.turns import Message, Unusable
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.judge.heldout import NO_TEMPLATE

EMPTY = "no_tokens"


@dataclass(frozen=True)
class Pair:
    """A text of which the end is predicted."""

    context: np.ndarray
    continuation: np.ndarray

    def __len__(self) -> int:
        return len(self.context) + len(self.continuation)


class CannotAskError(Exception):
    """Why an item cannot be put to a model; the message is the reason that is counted."""


def plain_pair(tokenizer: LoadedTokenizer, context: str, continuation: str) -> Pair:
    """Encode both together and cut where the context ends, so that the tokens at the border are those of the text.

    Spaces at the end of the context belong to what follows: most tokenizers join them to the next word.
    """
    if not context:
        (ids,) = tokenizer.encode_plain([continuation])
        begin = begin_id(tokenizer)
        if len(ids) and ids[0] == begin:
            return Pair(ids[:1], ids[1:])
        return Pair(np.asarray([begin], dtype=np.int64), ids)
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    whole, start = tokenizer.encode_plain([context + continuation, context])
    prefix = tokenizer.text_prefix
    if not len(prefix) and not len(start):  # a context of spaces only
        return plain_pair(tokenizer, "", continuation)
    return Pair(np.concatenate([prefix, start]), whole[len(start) :])


def begin_id(tokenizer: LoadedTokenizer) -> int:
    """What stands before a text that has nothing before it: the begin token, else the end of another text."""
    return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id


def chat_pair(tokenizer: LoadedTokenizer, question: str, answer: str) -> Pair:
    """A user's message and the assistant's answer, without the token that ends the turn."""
    prompt = chat_prompt(tokenizer, question)
    chat = tokenizer.chat()
    try:
        whole = chat.encode([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    except Unusable as error:
        raise CannotAskError(error.reason) from error
    except StageError as error:
        raise CannotAskError(NO_TEMPLATE) from error
    if not np.array_equal(whole.ids[: len(prompt)], prompt):
        raise CannotAskError("prompt_unlike_conversation")
    answered = whole.ids[len(prompt) :][whole.loss_mask[len(prompt) :] == 1]
    ends = np.isin(answered, list(chat.control_ids)).nonzero()[0]
    return Pair(prompt, answered[: ends[0]] if len(ends) else answered)


def chat_prompt(tokenizer: LoadedTokenizer, question: str) -> np.ndarray:
    """A user's message up to where the assistant begins; raises CannotAskError."""
    return messages_prompt(tokenizer, [{"role": "user", "content": question}])


def messages_prompt(tokenizer: LoadedTokenizer, messages: Sequence[Message]) -> np.ndarray:
    """A conversation up to where the assistant begins; raises CannotAskError."""
    if not tokenizer.chat_template:
        raise CannotAskError(NO_TEMPLATE)
    try:
        return tokenizer.chat().encode_prompt(messages)
    except Unusable as error:
        raise CannotAskError(error.reason) from error
    except StageError as error:  # a template that this release cannot run
        raise CannotAskError(NO_TEMPLATE) from error


def plain_prompt(tokenizer: LoadedTokenizer, text: str) -> np.ndarray:
    """A text that the model continues."""
    (ids,) = tokenizer.encode_plain([text])
    ids = np.concatenate([tokenizer.text_prefix, ids])
    if not len(ids):
        raise CannotAskError(EMPTY)
    return ids
