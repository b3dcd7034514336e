"""Prompt sets in a `tokens` artifact: the ids of each prompt, and next to them what its responses are judged by.

`prompt_sets/<split>/ids-*.npy` and `rows.jsonl` have the same order. Without prompt sets there is no such folder.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.config.errors import DataError
from stages.config.tokens import TokenizeConfig
from stages.data.pairs.turns import Unusable
from stages.data.sources.records import source_of
from stages.data.tokens.chat import ChatEncoder
from stages.data.tokens.encoding import Account
from stages.data.tokens.ragged import Ragged, RaggedWriter
from stages.rules.ready import Row

FOLDER = "prompt_sets"


class PromptSetWriter:
    """Writes one split of the prompt sets."""

    def __init__(self, output: Path, split: str, chat: ChatEncoder, config: TokenizeConfig, dtype: np.dtype) -> None:
        self._folder, self._chat, self._config = output / FOLDER / split, chat, config
        self._ids = RaggedWriter(self._folder, "ids", dtype)
        self._account = Account()
        self._seen: set[bytes] = set()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Write all rows and return their account. All tokens of a prompt are masked: none is trained on."""
        with (self._folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                if self._add(source_of(row), row):
                    kept = {name: row[name] for name in ("id", "reference", "tests", "schema")}
                    kept |= {"source": source_of(row), "prompt": row["messages"][-1]["content"]}
                    file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        self._ids.close()
        return self._account.to_dict("prompt sets")

    def _add(self, source: str, row: Mapping[str, Any]) -> bool:
        self._account.count(source, **{"in": 1})
        try:
            prompt = self._chat.encode_prompt(row["messages"], tools=row.get("tools") or [])
        except Unusable as error:
            self._account.drop(source, error.reason)
            return False
        if len(prompt) > self._config.max_prompt_length:
            self._account.drop(source, "prompt_too_long", tokens=len(prompt))
            return False
        if (key := prompt.tobytes()) in self._seen:  # with another reference, or the same after scrubbing
            self._account.drop(source, "repeated", tokens=len(prompt))
            return False
        self._seen.add(key)
        self._ids.append(prompt)
        self._account.count(source, kept=1, tokens_in=len(prompt), masked_tokens=len(prompt))
        return True


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one split with their rows."""

    prompts: Ragged | tuple[np.ndarray, ...]
    """Their ids."""
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)


def read_prompt_set(folder: Path, split: str) -> PromptSet:
    """The prompt sets of a `tokens` folder; raises DataError when ids and rows do not belong together."""
    room = folder / FOLDER / split
    if not room.is_dir():
        return PromptSet((), ())
    ids = Ragged(room, "ids")
    try:
        with (room / "rows.jsonl").open(encoding="utf-8") as lines:
            rows = tuple(map(_row, lines))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{room}/rows.jsonl cannot be read: {error}", advice="Run `tokenize` again.") from error
    if len(rows) != len(ids):
        raise DataError(f"{room} has {len(ids)} prompts and {len(rows)} rows", advice="Run `tokenize` again.")
    return PromptSet(ids, rows)


def _row(line: str) -> Row:
    read = json.loads(line)
    return Row(
        prompt=str(read["prompt"]),
        reference=tuple(map(str, read["reference"])),
        tests=tuple(map(str, read["tests"])),
        schema=str(read["schema"]),
    )
