"""The prompts that a policy answers: those of instructions, of prompt sets, or of both, with what judges responses."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from stages.config.errors import DataError
from stages.config.graph import INSTRUCTIONS, PROMPTS
from stages.data.tokens.prompt_sets import read_prompt_set
from stages.data.tokens.views import Split, TokensArtifact, require
from stages.rules.ready import Row


class Prompts(Protocol):
    """Ids of prompts by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Joined:
    """One list of prompts after another."""

    first: Prompts
    second: Prompts

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int) -> np.ndarray:
        own = len(self.first)
        return self.first[index] if index < own else self.second[index - own]


@dataclass(frozen=True)
class Asked:
    """The prompts of one split, in order."""

    prompts: Prompts
    rows: Sequence[Row]
    """Of each prompt, if scorers read texts; else none."""
    counts: dict[str, int]
    """How many come from where, for the ledger."""


def asked_of(
    fields: Sequence[str], tokens: TokensArtifact, split: Split, *, needs: Sequence[str] | None = None
) -> Asked:
    """Return the prompts of a split, of these fields of the form. With `needs` also their rows, for scorers that read
    texts; raises DataError where a row lacks one of them."""
    parts: list[Asked] = []
    if INSTRUCTIONS in fields:
        found = tokens.prompts(split)
        parts.append(
            Asked(found, _texts(tokens, split, len(found)) if needs is not None else (), {"prompts": len(found)})
        )
    if PROMPTS in fields:
        parts.append(_of_prompt_sets(tokens, split, needs))
    if len(parts) == 1:
        return parts[0]
    one, two = parts
    return Asked(Joined(one.prompts, two.prompts), [*one.rows, *two.rows], one.counts | two.counts)


def _of_prompt_sets(tokens: TokensArtifact, split: Split, needs: Sequence[str] | None) -> Asked:
    given = read_prompt_set(tokens.folder, split)
    if split is Split.TRAIN:
        require(len(given), "prompts of prompt sets", advice="Give some (prompts), or ppo.prompts_from=instructions.")
    for need in needs or ():
        if lacking := sum(not getattr(row, need) for row in given.rows):
            raise DataError(
                f"{lacking} of {len(given)} {split} prompts have no {need}, which ppo.scorer needs of each",
                advice=f"Add the field {need!r} to the rows, or leave those rows out.",
            )
    return Asked(given.prompts, given.rows if needs is not None else (), {"prompt_sets": len(given)})


def _texts(tokens: TokensArtifact, split: Split, number: int) -> list[Row]:
    """The last question of each prompt of the instructions, as `tokenize` wrote it next to the ids."""
    path = Path(tokens.folder) / "prompts" / split / "texts.json"
    try:
        texts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", advice="Run `tokenize` again.") from error
    if not isinstance(texts, list) or len(texts) != number:
        raise DataError(f"{path} does not have the texts of {number} prompts", advice="Run `tokenize` again.")
    return [Row(prompt=str(text)) for text in texts]
