"""Failures that a user can act on. Each carries a category (which decides about retries) and an advice (what to do)."""

import re
from enum import IntEnum, StrEnum

# Up to the last @, which a password may hold as well; without a password, up to where a query begins.
_LOGIN = re.compile(r"""(?<=://)(?:[^\s/'"?#:]*:[^\s/'"]*|[^\s/'"?#]+)@""")


def without_logins(text: str) -> str:
    """Take user names and passwords out of the addresses in a text that people will read."""
    return _LOGIN.sub("", text)


class Category(StrEnum):
    """Why a stage failed; `config` and `data` are never retried, the others resume from the last checkpoint."""

    CONFIG = "config"
    DATA = "data"
    NON_FINITE = "non_finite"
    OUT_OF_MEMORY = "out_of_memory"
    PREEMPTED = "preempted"
    LOST = "lost"
    STALLED = "stalled"
    INFRASTRUCTURE = "infrastructure"


class ExitCode(IntEnum):
    """Exit status of `python -m stages`, the part of the failure contract that survives a lost object store."""

    OK = 0
    INFRASTRUCTURE = 1
    CONFIG = 2
    DATA = 3
    NON_FINITE = 4
    OUT_OF_MEMORY = 5
    PREEMPTED = 6
    STALLED = 7


EXIT_CODES: dict[Category, ExitCode] = {
    Category.CONFIG: ExitCode.CONFIG,
    Category.DATA: ExitCode.DATA,
    Category.NON_FINITE: ExitCode.NON_FINITE,
    Category.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY,
    Category.PREEMPTED: ExitCode.PREEMPTED,
    Category.LOST: ExitCode.INFRASTRUCTURE,
    Category.STALLED: ExitCode.STALLED,
    Category.INFRASTRUCTURE: ExitCode.INFRASTRUCTURE,
}


class StageError(Exception):
    """A failure with a category and an advice; the message names field, value and what is allowed."""

    category = Category.INFRASTRUCTURE

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.advice = advice


class ConfigError(StageError):
    """The run was asked for something impossible; retrying cannot help."""

    category = Category.CONFIG


class DataError(StageError):
    """The data cannot be used as asked; retrying cannot help."""

    category = Category.DATA


class NonFiniteError(StageError):
    """Loss or gradient was not finite several steps in a row."""

    category = Category.NON_FINITE


class CapacityError(StageError):
    """The cluster did not find room for the workers in the time that it was given."""


class DamagedArtifactError(StageError):
    """A stored object is missing or differs from its manifest; the stage must be rebuilt."""

    category = Category.INFRASTRUCTURE


class BadManifestError(DamagedArtifactError):
    """A manifest is malformed, or describes another artifact than the one that it lies with."""

    category = Category.DATA


class NewerManifestError(BadManifestError):
    """A manifest was written by a newer version; the artifact may be intact."""

    category = Category.CONFIG
