"""What an error costs: one suite of one model, or the evaluation.

After hours of training an evaluation must not end over one suite. But an outage, a full disk or memory that ran out is
no fact about a suite: then the attempt ends, and the retry continues with what is missing.
"""

from stages.config.errors import StageError
from stages.job.failures import is_out_of_memory
from stages.judge.subjects import is_permanent


def costs_its_suite(error: Exception, *, of_champion: bool = False) -> bool:
    """Whether the other suites are measured without this one. The champion is not the run's own model, so even the
    memory that it lacks costs its comparison alone."""
    if isinstance(error, StageError | FileNotFoundError):
        return is_permanent(error)
    return not is_of_the_machine(error) or (of_champion and is_out_of_memory(error))


def is_of_the_machine(error: Exception) -> bool:
    """Whether an error says nothing about the suite that met it. After an error of the accelerator, every later call
    to it fails too."""
    if isinstance(error, StageError):
        return not is_permanent(error)
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)
    return is_out_of_memory(error) or type(error).__name__ == "AcceleratorError"


def reason_of(error: Exception) -> str:
    """One line for people."""
    if isinstance(error, StageError):
        return f"{error.message} {error.advice}".strip()
    return f"{type(error).__name__}: {error}"
