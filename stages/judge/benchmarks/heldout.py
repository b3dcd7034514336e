"""Multiple choice from the run's own held-out data, easy enough for a model of a few million parameters.

- `heldout-continuation`: which of five beginnings is that of this passage? The others begin other held-out documents.
- `heldout-question`: which of five questions is it that this answer answers? The others are of other conversations.

The text whose likelihood counts is the same in all five options and only what stands before it differs, so neither the
length of a text nor how common its words are decides: chance is one in five for a model that does not read what is
before. All texts are from documents and conversations that were held out, and every item is a document of its own.
"""

import re
from collections.abc import Iterable, Sequence

from stages.config.benchmarks import BuiltIn
from stages.data.sources.records import stable_hash
from stages.judge.benchmarks.heldout_rows import HeldoutConversation, HeldoutDocument
from stages.judge.benchmarks.items import ChoiceItem, Option

NUM_OPTIONS = 5
MAX_ITEMS = 128
_BEGINNING, _PASSAGE = 160, 160
"""Characters that a beginning and a passage have at most, and half of it at least."""


def continuation_items(documents: Iterable[HeldoutDocument]) -> list[ChoiceItem]:
    """One item per document that is long enough; none with fewer documents than options."""
    parts: dict[str, tuple[str, str]] = {}
    for document in documents:
        cut = _cut(document.text)
        if cut is not None and cut not in parts.values():
            parts[document.id] = cut
    return _items(list(parts.items()), what="continuation")


def question_items(conversations: Iterable[HeldoutConversation]) -> list[ChoiceItem]:
    """One item per conversation of one question; none with fewer conversations than options."""
    asked: dict[str, tuple[str, str]] = {}
    questions: set[str] = set()
    for one in conversations:
        if len(one.prompt) != 1 or one.has_tools or not one.answer.strip():
            continue
        question = one.prompt[0]["content"]
        if isinstance(question, str) and question not in questions:
            questions.add(question)
            asked[one.id] = (question, one.answer)
    return _items(list(asked.items()), what="question")


def _items(parts: Sequence[tuple[str, tuple[str, str]]], *, what: str) -> list[ChoiceItem]:
    """Draw, by hash, which items there are and which of the others stand next to each: the same for every model."""
    if len(parts) < NUM_OPTIONS:
        return []
    drawn = sorted(parts, key=lambda part: stable_hash("item", what, part[0]))[:MAX_ITEMS]
    items = []
    for key, (context, text) in drawn:
        others = [other for other in parts if other[0] != key]
        wrong = sorted(others, key=lambda other: stable_hash("option", what, key, other[0]))[: NUM_OPTIONS - 1]
        contexts = [context, *(other[1][0] for other in wrong)]
        order = sorted(range(NUM_OPTIONS), key=lambda place: stable_hash("order", what, key, place))
        options = tuple(Option(contexts[place], text) for place in order)
        items.append(ChoiceItem(key, options, gold=(order.index(0),)))
    return items


def _cut(text: str) -> tuple[str, str] | None:
    """A document's beginning and the passage after it, each cut between words; None for a document too short."""
    text = re.sub(r"\s+", " ", text).strip()
    beginning = _whole_words(text, _BEGINNING)
    passage = _whole_words(text[len(beginning) :].strip(), _PASSAGE)
    return (beginning, passage) if min(len(beginning), len(passage)) >= _PASSAGE // 2 else None


def _whole_words(text: str, at_most: int) -> str:
    return text if len(text) <= at_most else text[: at_most + 1].rpartition(" ")[0]


def heldout_items(
    kind: BuiltIn, documents: Iterable[HeldoutDocument], conversations: Iterable[HeldoutConversation]
) -> list[ChoiceItem]:
    """The items of one of the two."""
    if kind is BuiltIn.HELDOUT_CONTINUATION:
        return continuation_items(documents)
    return question_items(conversations)
