"""Instruction and preference pairs from documented symbols: what a symbol does, against a wrong answer.

The labels are derived, not judged by people: the right answer is the summary its author wrote, the rejected one is
another symbol's summary, the right one cut in the middle, with foreign words in it, or followed by another symbol's
text over and over.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.config.curate import CurateConfig
from stages.data.curation.ledger import Step
from stages.data.sources.records import Symbol, stable_hash, utf8_size

_QUESTIONS: dict[str, tuple[str, ...]] = {
    "function": (
        "What does `{name}` do?",
        "What is `{name}` for?",
        "Describe `{name}` in one sentence.",
        "Explain what `{name}` does.",
        "When would I use `{name}`?",
    ),
    "class": (
        "What is `{name}`?",
        "What is `{name}` for?",
        "Describe `{name}` in one sentence.",
        "Explain the class `{name}`.",
        "When would I use `{name}`?",
    ),
}
_QUESTIONS["method"] = _QUESTIONS["function"]
_MIN_BODY = 80


@dataclass(frozen=True, slots=True)
class Question:
    """A symbol with the question that is asked about it."""

    symbol: Symbol
    text: str


def distinct_questions(symbols: Iterable[Symbol], config: CurateConfig, step: Step) -> list[Question]:
    """One question per symbol, with names and summaries unique; held-out symbols win over training ones."""
    names: set[str] = set()
    summaries: set[str] = set()
    kept: list[Question] = []
    everything = sorted(symbols, key=lambda symbol: not symbol.heldout)  # stable: source order within each split
    for symbol in everything:
        step.entered.add(utf8_size(symbol.summary))
        summary = symbol.summary.lower()
        reason = "repeated_name" if symbol.name in names else "repeated_summary" if summary in summaries else ""
        if reason:
            step.drop(reason, symbol.id, symbol.summary, samples=config.samples_per_reason)
            continue
        names.add(symbol.name)
        summaries.add(summary)
        step.kept.add(utf8_size(symbol.summary))
        templates = _QUESTIONS[symbol.kind]
        template = templates[stable_hash(config.seed, "question", symbol.id) % len(templates)]
        kept.append(Question(symbol, template.format(name=symbol.name)))
    return kept


def instruction(question: Question) -> dict[str, Any]:
    """The row of one instruction pair."""
    return {
        "id": question.symbol.id,
        "messages": [
            {"role": "user", "content": question.text},
            {"role": "assistant", "content": question.symbol.summary},
        ],
        "group": question.symbol.group,
        "origin": "derived",
        "heldout": question.symbol.heldout,
    }


def preferences(questions: Sequence[Question], config: CurateConfig, step: Step) -> list[dict[str, Any]]:
    """One pair per question; wrong answers come from the same split, so held-out text stays out of training."""
    rows: list[dict[str, Any]] = []
    for heldout in (False, True):
        split = [question for question in questions if question.symbol.heldout is heldout]
        bodies = [question.symbol.body for question in split if len(question.symbol.body) >= _MIN_BODY]
        for position, question in enumerate(split):
            size = utf8_size(question.symbol.summary)
            step.entered.add(size)
            kind, rejected = _rejected(question, position, split, bodies, config)
            if not rejected or rejected == question.symbol.summary:
                step.drop(
                    "no_wrong_answer", question.symbol.id, question.symbol.summary, samples=config.samples_per_reason
                )
                continue
            step.kept.add(size)
            rows.append(_preference(question, kind, rejected))
    return rows


def _preference(question: Question, kind: str, rejected: str) -> dict[str, Any]:
    return {
        "id": question.symbol.id,
        "prompt": [{"role": "user", "content": question.text}],
        "chosen": question.symbol.summary,
        "rejected": rejected,
        "kind": kind,
        "group": question.symbol.group,
        "origin": "derived",
        "heldout": question.symbol.heldout,
    }


def _rejected(
    question: Question, position: int, split: Sequence[Question], bodies: Sequence[str], config: CurateConfig
) -> tuple[str, str]:
    """The kind and the text of a wrong answer; empty when the split is too small for one."""
    symbol = question.symbol

    def draw(what: str, below: int) -> int:
        return stable_hash(config.seed, what, symbol.id) % below

    # One draw chooses the kind. Answers too short to be cut or garbled fall through to `mismatch`.
    share = draw("kind", 1_000_000) / 1_000_000
    mismatch, truncated, rambling, _ = config.preference_mix
    words = symbol.summary.split()
    if mismatch <= share < mismatch + truncated and len(words) >= 5:
        return "truncated", " ".join(words[: 2 + draw("cut", len(words) - 4)])
    if mismatch + truncated <= share < mismatch + truncated + rambling and bodies:
        body = bodies[draw("body", len(bodies))]
        return "rambling", _ramble(symbol.summary, body, lambda below: draw("length", below))
    if len(split) < 2:
        return "mismatch", ""
    other = split[(position + 1 + draw("other", len(split) - 1)) % len(split)]
    if share >= mismatch + truncated + rambling and len(words) >= 5:
        return "garbled", _garble(words, split, draw)
    return "mismatch", other.symbol.summary


def _garble(words: Sequence[str], split: Sequence[Question], draw: Callable[[str, int], int]) -> str:
    """The right answer with about half of its inner words from other answers: what a weak model says."""
    garbled = list(words)
    for place in range(1, len(words) - 1):
        if place % 2 == draw("phase", 2) or draw(f"garble-{place}", 4) == 0:
            donor = split[draw(f"donor-{place}", len(split))].symbol.summary.split()
            garbled[place] = donor[draw(f"word-{place}", len(donor))]
    return " ".join(garbled)


def _ramble(summary: str, body: str, draw: Callable[[int], int]) -> str:
    """The right answer, then an unrelated passage two or three times, cut at a word."""
    passage = " ".join(body[:160].split())
    return f"{summary} {' '.join([passage] * (2 + draw(2)))}"
