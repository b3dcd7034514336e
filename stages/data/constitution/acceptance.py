"""Which critiques and revisions are good enough to train on: rules over words, each with the name that is counted.

The rules find what is certainly useless. They cannot tell a right critique from a wrong one: read the sample.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from stages.config.constitution import ConstitutionConfig
from stages.config.principles import Area, Principle
from stages.data.constitution.asking import WORKED_EXAMPLES
from stages.data.constitution.prompts import Prompt

ACCEPTED = "accepted"
_MIN_CRITIQUE_WORDS = 3
_LONGEST_PREFACE = 160
_MOST_REPEATED = 0.4
"""Good prose of this length repeats next to no run of four words; SmolLM2 in a loop, more than half."""
_LABEL = re.compile(
    r"^\W*(?:the |my |your )?(?:revised|rewritten|improved|better|new|corrected) (?:response|answer|version)\W*:[\s*_]*"
    r"|^\W*(?:revision|response|answer|assistant|rewrite)\W*:[\s*_]*",
    re.IGNORECASE,
)
_PREFACE = re.compile(
    r"^[^\n:]*\b(?:revis|rewrit|rewrote|improved|updated|corrected|better version|here is|here's)[^\n:]*:\s*\n+",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


@dataclass(frozen=True)
class Attempt:
    """One critique and one revision, and what they are about."""

    prompt: Prompt
    principle: Principle
    response: str
    critique: str
    revision: str
    revision_ended: bool = True
    """False where the revision was cut off at its longest."""


def words(text: str) -> list[str]:
    """The words of a text, in small letters and without punctuation."""
    return re.findall(r"[\w']+", text.lower())


def similarity(first: str, second: str) -> float:
    """Share of words (0..1) that two texts have in common in the same order: twice their number over all words."""
    return _matcher(words(first), words(second)).ratio()


def copied(text: str, source: str) -> float:
    """Share of the words of `text` (0..1) that `source` has in the same order; 0 for a text without words."""
    mine = words(text)
    matches = _matcher(mine, words(source)).get_matching_blocks()
    return sum(block.size for block in matches) / len(mine) if mine else 0.0


def repeated(text: str) -> float:
    """Share (0..1) of the runs of four words that stood there before: near 1 for a model that loops."""
    found = words(text)
    runs = [tuple(found[place : place + 4]) for place in range(len(found) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _matcher(first: Sequence[str], second: Sequence[str]) -> SequenceMatcher:
    return SequenceMatcher(None, first, second, autojunk=False)


def cleaned(revision: str) -> str:
    """The revision alone: models announce it, with a line such as "Here is the revised response:"."""
    text = revision.strip()
    preface = _PREFACE.match(text[:_LONGEST_PREFACE])
    text = text[preface.end() :] if preface else text
    text = _LABEL.sub("", text, count=1).strip()
    quoted = len(text) > 2 and text[0] == text[-1] == '"' and text.count('"') == 2
    return text[1:-1].strip() if quoted else text


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; empty when there is none."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def verdict_on(attempt: Attempt, config: ConstitutionConfig, *, declines: Callable[[str], bool]) -> str:
    """Return `accepted`, or the first rule that the attempt breaks; `declines` tells a refusal."""
    response, critique, revision = attempt.response, attempt.critique, attempt.revision
    if len(words(critique)) < _MIN_CRITIQUE_WORDS:
        return "no_critique"
    if repeated(critique) > _MOST_REPEATED:
        return "critique_repeats_itself"
    if copied(critique, response) > config.max_copied:
        return "critique_copies_response"
    if copied(critique, f"{attempt.principle.critique} {attempt.prompt.text}") > config.max_copied:
        return "critique_copies_request"
    if _copies_example(critique, config.max_copied):
        return "critique_copies_example"
    if not attempt.revision_ended:
        return "cut_off"
    if len(words(revision)) < config.min_words:
        return "too_short"
    if repeated(revision) > _MOST_REPEATED:
        return "repeats_itself"
    if similarity(revision, response) >= config.max_similarity:
        return "unchanged"
    if copied(revision, attempt.prompt.text) > config.max_copied:
        return "copies_prompt"
    if copied(revision, critique) > config.max_copied:
        return "copies_critique"
    if copied(revision, f"{attempt.principle.revision} {attempt.principle.critique}") > config.max_copied:
        return "copies_request"
    if _copies_example(revision, config.max_copied):
        return "copies_example"
    if declines(revision) and not _may_decline(attempt):
        return "refuses_harmless"
    return ACCEPTED


def _copies_example(text: str, most: float) -> bool:
    """Whether a text is one of the worked examples' own: small models repeat those in place of an answer."""
    return any(copied(text, shown) > most for example in WORKED_EXAMPLES for shown in example)


def _may_decline(attempt: Attempt) -> bool:
    """A prompt of the area harmless may be declined; of one for all principles, nobody said whether it is harmless, and
    only a principle of that area may make the answer a refusal."""
    prompt = attempt.prompt
    return prompt.may_be_refused and (prompt.is_labelled or attempt.principle.area is Area.HARMLESS)


def unusable_response(text: str, *, ended: bool, config: ConstitutionConfig) -> str:
    """Why a sampled response can be neither revised nor compared; empty when it can."""
    if not ended:
        return "cut_off"
    return "too_short" if len(words(text)) < config.min_words else ""
