"""From a request to the answers that are to be written: prompts as token ids, limits checked, nothing computed yet."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.config.errors import ConfigError
from stages.data.pairs.turns import Message, Unusable, read_turns
from stages.serve.answer import Choice
from stages.serve.loading import ServedModel
from stages.serve.protocol import ChatAsked, CompletionAsked, RequestError

_REASONS = {
    "unknown_role": "a message has an unknown role; allowed: system, developer, user, assistant, tool",
    "malformed_turn": "a message is no object with a role and a content",
    "refused_by_template": "the model's chat template refuses these messages (roles out of turn, or a system message)",
    "reserved_character": "a message holds U+E000, which this server reserves",
}


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model reads it."""

    ids: np.ndarray
    text: str = ""
    """As it was given, for an answer that repeats it."""


def chat_prompt(served: ServedModel, messages: Sequence[Message]) -> Prompt:
    """Encode a conversation up to the assistant's next turn; raises RequestError for one that cannot be."""
    for number, message in enumerate(messages):
        _require_text(message, number)
    try:
        turns = read_turns(list(messages), role="role", text="content")
        return Prompt(served.chat.encode_prompt(turns))
    except Unusable as error:
        reason = _REASONS.get(error.reason, error.reason.replace("_", " "))
        raise RequestError(f"messages: {reason}", param="messages") from error
    except ConfigError as error:
        raise RequestError(f"messages: {error.message}", param="messages") from error


def _require_text(message: Message, number: int) -> None:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    other = [part for part in parts if not (isinstance(part, dict) and part.get("type") == "text")]
    if other or not (content is None or isinstance(content, str | list)):
        kind = other[0].get("type") if other and isinstance(other[0], dict) else type(content).__name__
        raise RequestError(
            f"messages[{number}].content is {kind!r}; this model reads text: a string, or parts of type 'text'",
            param="messages",
        )


def completion_prompts(served: ServedModel, asked: CompletionAsked) -> list[Prompt]:
    """Encode the prompts as the tokenizer does by itself, begin token included; text that spells a control token is
    text. Whoever wants control tokens gives ids. Raises RequestError for ids that the model does not have."""
    prompts = []
    for given in asked.prompts:
        if isinstance(given, str):
            prompts.append(Prompt(_encoded(served, given), given))
            continue
        rows = served.model.get_input_embeddings().weight.shape[0]
        if (largest := max(given)) >= rows:  # before numpy sees it, which has no integers of more than 64 bits
            raise RequestError(f"prompt holds the token {str(largest)[:80]}; the model has {rows}", param="prompt")
        ids = np.asarray(given, dtype=np.int64)
        prompts.append(Prompt(ids, served.tokenizer.backend.decode(given, skip_special_tokens=False)))
    return prompts


def _encoded(served: ServedModel, text: str) -> np.ndarray:
    tokenizer = served.tokenizer
    whole = tokenizer.encode_texts([text])[0]  # with a begin token, where there is one, and an end token
    ids = whole[1 if tokenizer.bos_id >= 0 else 0 : -1]
    begin = tokenizer.backend.encode("", add_special_tokens=True).ids
    head = [tokenizer.bos_id] if tokenizer.bos_id >= 0 and begin[:1] == [tokenizer.bos_id] else []
    if not head and not len(ids):
        # Something must precede the first token: the end of an earlier text, as in a packed row.
        head = [tokenizer.eos_id]
    return np.concatenate([np.asarray(head, dtype=np.int64), ids])


def chat_choice(served: ServedModel, prompt: Prompt, asked: ChatAsked) -> Choice:
    return Choice(
        max_tokens=_room(served, prompt, asked.longest, field="max_tokens"),
        temperature=asked.temperature,
        top_p=asked.top_p,
        stops=(*asked.stop, *served.chat_stops),
        end_ids=served.end_ids,
        seed=asked.seed,
        top_logprobs=asked.scores,
    )


def completion_choice(served: ServedModel, prompt: Prompt, asked: CompletionAsked) -> Choice:
    return Choice(
        max_tokens=_room(served, prompt, asked.max_tokens, field="max_tokens"),
        temperature=asked.temperature,
        top_p=asked.top_p,
        stops=tuple(asked.stop),
        end_ids=served.end_ids,
        seed=asked.seed,
        top_logprobs=asked.logprobs,
        echo=asked.echo,
    )


def room(served: ServedModel, prompt: Prompt) -> int:
    """Tokens that an answer to this prompt may have; 0 or less when the context is full."""
    return served.context_length - len(prompt.ids)


def _room(served: ServedModel, prompt: Prompt, wanted: int | None, *, field: str) -> int:
    """The longest answer that was asked for, or that there is room for; RequestError where there is none."""
    left = room(served, prompt)
    if left < (1 if wanted is None else wanted):
        asked = "" if wanted is None else f" and {field}={wanted}"
        raise RequestError(
            f"the prompt has {len(prompt.ids)} tokens{asked}; {served.name} reads and writes at most "
            f"{served.context_length} together. Shorten the prompt" + (f", or lower {field}" if wanted else ""),
            param=field if wanted else "messages",
            code="context_length_exceeded",
        )
    return left if wanted is None else wanted
