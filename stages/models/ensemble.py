"""Several reward models that are read as one: each answer has as many scores as there are members.

An ensemble's folder is that of its first member, which plain transformers loads as any model; the others are whole
folders in `members/`. `ensemble.json` says how many there are.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from stages.config.errors import ConfigError
from stages.models.folder import read_settings

RECORD = "ensemble.json"


class Ensemble(nn.Module):
    """Reward models with one tokenizer. Where a single score is wanted, it is the members' mean."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def config(self) -> Any:
        """That of the first member: all have one architecture."""
        return self.members[0].config


def members_of(model: nn.Module) -> list[nn.Module]:
    """The members of an ensemble; a single model is its own only member."""
    return list(model.members) if isinstance(model, Ensemble) else [model]


def as_one(members: list[Any]) -> Any:
    """A single model as it is, several as an ensemble."""
    return members[0] if len(members) == 1 else Ensemble(members)


def place_of_member(folder: Path, number: int) -> Path:
    return folder if number == 0 else folder / "members" / f"{number:02d}"


def write_record(folder: Path, *, seeds: list[int]) -> None:
    """Say that a folder is that of an ensemble; `seeds` are those of its members."""
    (folder / RECORD).write_text(json.dumps({"members": len(seeds), "seeds": seeds}))


def member_folders(folder: Path) -> list[Path]:
    """The folders of all members of a reward model, the first of which is its own; raises ConfigError when one is
    missing."""
    if not (folder / RECORD).is_file():
        return [folder]
    count = read_settings(folder / RECORD).get("members")
    if not isinstance(count, int) or count < 1:
        raise ConfigError(
            f"{folder / RECORD} says members={count!r}", advice="Give the folder that `reward` published."
        )
    found = [place_of_member(folder, number) for number in range(count)]
    if missing := [str(place.relative_to(folder)) for place in found if not (place / "config.json").is_file()]:
        raise ConfigError(
            f"{folder} is an ensemble of {count} reward models without {', '.join(missing)}",
            advice=f"Give the whole folder that `reward` published, or remove {RECORD} to use its first member alone.",
        )
    return found
