"""A benchmark as it is written in the form: where its items are and, after `#`, how they are read and judged.

`s3://bucket/gsm8k.jsonl.gz#rule=number&name=gsm8k`. Some need no address, because their items come with Athanor or are
made from the run's own held-out data; some are tasks of lm-evaluation-harness. docs/BENCHMARKS.md shows them all.
"""

import difflib
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Any
from urllib.parse import unquote

from pydantic import Field, ValidationError

from stages.config.base import Config
from stages.config.records import first_error

LM_EVAL = "lm-eval://"
"""Before the name of a task or group that lm-evaluation-harness itself brings."""
LONGEST_RESPONSE = 256
"""Tokens that a model may write for an item where neither the benchmark nor a task file says how many."""

_OPTIONS = re.compile(r"#((?:\w+=[^#&]*)(?:&\w+=[^#&]*)*)$")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_YAML = (".yaml", ".yml")
TAKEN = (
    *("language", "rows", "responses", "pairs", "preferences", "preference_margins", "reward_margins", "score", "kl"),
    *("length", "repetition", "shown", "shown_score"),
    *("gold", "gold_agreement", "rule", "judge", "judge_agreement"),
)
"""Names of suites that every evaluation may have."""


class BuiltIn(StrEnum):
    """Benchmarks without an address."""

    HELDOUT_CONTINUATION = "heldout-continuation"
    HELDOUT_QUESTION = "heldout-question"
    REFUSALS = "refusals"
    TOXICITY = "toxicity"


class BenchmarkFormat(StrEnum):
    """Formats of benchmark rows; docs/BENCHMARKS.md says by which fields each is detected."""

    CHOICES = "choices"
    CONTINUATION = "continuation"
    ANSWERS = "answers"
    TRUTHFULQA = "truthfulqa"
    REFUSALS = "refusals"


class Rule(StrEnum):
    """How a response is compared with the expected answers."""

    EXACT = "exact"
    NUMBER = "number"
    REGEX = "regex"
    FUNCTION = "function"


class Benchmark(Config):
    """One line of `benchmarks`, parsed."""

    uri: str
    """Where the items are, without options."""
    format: BenchmarkFormat | None = None
    """Format of the rows; none = detected from the fields."""
    name: str = ""
    """Name of the suite; empty = by the file, the task or the built-in benchmark."""
    rule: Rule | None = None
    """How responses are judged, for items with answers; none = exact match."""
    pattern: str = ""
    """Regular expression of `rule=regex`, whose first group (or whole match) is the answer."""
    function: str = ""
    """`module:name` of `rule=function`; the module must be one that the workers' administrators allow."""
    judge: bool = False
    """Whether the run's judge says which responses decline, instead of phrases; for refusals."""
    metric: str = ""
    """The one metric of a task of lm-evaluation-harness that counts; empty = all that there are by item."""
    chat: bool = False
    """Whether items are asked as a user's message, in the model's own chat template, instead of as plain text."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest response; none = what the task says, else 256."""
    stop: str = ""
    """Text at which a response ends; empty = by format, and a model's end token ends it in any case."""
    limit: int = Field(default=0, ge=0)
    """Items that are used, spread evenly over all; 0 = all."""

    @property
    def built_in(self) -> BuiltIn | None:
        """Which benchmark without an address this is, if it is one."""
        return BuiltIn(self.uri) if self.uri in list(BuiltIn) else None

    @property
    def is_task(self) -> bool:
        """Whether lm-evaluation-harness runs it."""
        return self.uri.startswith(LM_EVAL) or self.uri.lower().endswith(_YAML)

    @property
    def suite(self) -> str:
        """Name of its suite; a task file names its own."""
        if self.name or self.built_in:
            return self.name or self.uri
        if self.uri.startswith(LM_EVAL):
            return self.uri.removeprefix(LM_EVAL)
        path = re.split(r"\?", self.uri, maxsplit=1)[0].rstrip("/")
        last = re.sub(r"(\.(gz|zst))?$", "", path.rpartition("/")[2])
        return re.sub(r"[^A-Za-z0-9._-]+", "-", re.sub(r"\.[A-Za-z]+$", "", last)).strip("-.") or "benchmark"

    @property
    def known_tokens(self) -> int:
        """About how many tokens a model reads and writes for it; 0 where only the items would tell, and for toxicity,
        which reads answers that are there anyway."""
        match self.built_in:
            case BuiltIn.HELDOUT_CONTINUATION | BuiltIn.HELDOUT_QUESTION:
                return 5 * 64 * min(self.limit or 128, 128)  # five options of about 64 tokens each
            case BuiltIn.REFUSALS:
                return (self.limit or 60) * (32 + (self.max_tokens or 48))
            case _:
                return 0


_ALLOWED = tuple(name for name in Benchmark.model_fields if name != "uri")
_FOR_ROWS = ("format", "rule", "pattern", "function")


def parse_benchmark(text: str) -> Benchmark:
    """Parse one line; raises ValueError for an option that is unknown, invalid, or does not go with the others."""
    found = _OPTIONS.search(text)
    given = {} if not found else dict(part.split("=", 1) for part in found[1].split("&"))
    for name in given:
        if name not in _ALLOWED:
            close = difflib.get_close_matches(name, _ALLOWED, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(_ALLOWED)}"
            raise ValueError(f"benchmark {text!r} has an unknown option {name!r}; {hint}")
    # A regular expression may hold what separates options; %23 is #, %26 is &.
    options: dict[str, Any] = {name: unquote(value) for name, value in given.items()}
    try:
        made = Benchmark(uri=text[: found.start()] if found else text, **options)
    except ValidationError as error:
        raise ValueError(f"benchmark {text!r}: {first_error(error)}") from None
    _check(made, text)
    return made


def _check(made: Benchmark, text: str) -> None:
    if not made.uri.strip():
        # An empty path would be the folder in which the job works.
        raise ValueError(f"benchmark {text!r} names no file; give an address or one of {', '.join(BuiltIn)}")
    if made.name and not _NAME.fullmatch(made.name):
        raise ValueError(f"benchmark {text!r}: name={made.name!r} may hold letters, digits, '.', '_' and '-' only")
    if made.uri.startswith(LM_EVAL) and not _NAME.fullmatch(made.uri.removeprefix(LM_EVAL)):
        raise ValueError(f"benchmark {text!r} names no task; write {LM_EVAL}<task>, such as {LM_EVAL}arc_easy")
    for name, rule in (("pattern", Rule.REGEX), ("function", Rule.FUNCTION)):
        if bool(getattr(made, name)) != (made.rule is rule):
            raise ValueError(f"benchmark {text!r}: rule={rule.value} and {name}= belong together; give both or none")
    if made.pattern:
        try:
            re.compile(made.pattern)
        except re.error as error:
            raise ValueError(
                f"benchmark {text!r}: pattern={made.pattern!r} is no regular expression: {error}"
            ) from None
    if made.function and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", made.function, re.ASCII):
        raise ValueError(f"benchmark {text!r}: function={made.function!r} is not of the form module:name")
    rows = not (made.is_task or made.built_in)
    for name in _FOR_ROWS:
        if getattr(made, name) and not rows:
            raise ValueError(f"benchmark {text!r}: {name}= is for files of rows; {made.uri!r} has rules of its own")
    if made.judge and (made.is_task or made.built_in not in (None, BuiltIn.REFUSALS)):
        raise ValueError(f"benchmark {text!r}: judge=true is for refusals; leave it out")
    if made.metric and not made.is_task:
        raise ValueError(f"benchmark {text!r}: metric= is for tasks of lm-evaluation-harness; leave it out")


def names_of(made: Benchmark) -> tuple[str, ...]:
    """All suites that it may become, by its format."""
    return (made.suite, f"{made.suite}-raw", f"{made.suite}-greedy", f"over-{made.suite}")


def parse_benchmarks(lines: Iterable[str]) -> tuple[Benchmark, ...]:
    """Parse all lines; raises ValueError also for two suites of one name."""
    found = tuple(parse_benchmark(line) for line in lines)
    names = [name for made in found for name in names_of(made)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"benchmarks: {repeated} are the names of more than one suite; give each its own by #name=")
    if taken := sorted(set(names) & set(TAKEN)):
        raise ValueError(f"benchmarks: {taken} are names of suites that every evaluation has; give others by #name=")
    return found
