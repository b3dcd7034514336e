"""How the processes of a stage log: every line says which run, stage and try it belongs to, and which rank of training.

ATHANOR_LOG_FORMAT in the environment of Ray's processes is `text` (the default: a line for people, with
`[run=... stage=... try=...]` at its end) or `json` (one object a line, tracebacks included, for Loki and Elastic).
Airflow's task log shows text in either case, and leaves out the run that it belongs to, see operators.ray.logs.
"""

import json
import logging
import os
import sys
from datetime import UTC, datetime

from stages.config.errors import ConfigError
from stages.config.request import StageRequest
from stages.config.text import printable

FORMAT = "ATHANOR_LOG_FORMAT"
_MARKED = "ATHANOR_"
_CONSOLE = "console"
"""Name of the handler, the same as Ray Train's, because there must be one at a time."""
_TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


class Origin(logging.Filter):
    """Sets the origin as attributes of every record, so that formatters of other libraries can use it too."""

    def __init__(self, origin: dict[str, str | int]) -> None:
        super().__init__()
        self.origin = origin

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__.update(self.origin)
        return True


class TextFormatter(logging.Formatter):
    """The origin ends the first line; further lines, such as tracebacks, follow."""

    def __init__(self, origin: dict[str, str | int]) -> None:
        super().__init__(_TEXT)
        self._origin = " ".join(f"{name}={value}" for name, value in origin.items() if name != "job")

    def formatMessage(self, record: logging.LogRecord) -> str:
        first, *rest = super().formatMessage(record).split("\n")
        return "\n".join([f"{first} [{self._origin}]", *rest])

    def format(self, record: logging.LogRecord) -> str:
        # Messages quote names and texts of other people. A line of theirs must not look like one of the marked lines
        # that Airflow reads (ATHANOR_PROGRESS, ATHANOR_MLFLOW_RUN), nor move the cursor of a terminal.
        return printable(super().format(record)).replace(f"\n{_MARKED}", f"\n {_MARKED}")


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC, ISO 8601), level, logger, message, exception if any, and the origin."""

    def __init__(self, origin: dict[str, str | int]) -> None:
        super().__init__()
        self._origin = origin

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, str | int] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._origin,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return printable(json.dumps(line, ensure_ascii=False))


def log_for_uri(config_uri: str) -> None:
    """Set logging up before the request has been read: its address ends in `<run id>/<stage>/config.json`."""
    *_, run_id, stage, _ = ["", "", "", *config_uri.split("/")]
    _log({"run": run_id, "stage": stage})


def log_for_request(request: StageRequest, *, rank: int | None = None) -> None:
    """Set logging up for one attempt at a stage; `rank` in a training worker."""
    origin: dict[str, str | int] = {
        "run": request.run.run_id,
        "stage": request.stage.value,
        "try": request.try_number,
        "job": request.submission_id,
    }
    _log(origin if rank is None else {**origin, "rank": rank})


def _log(origin: dict[str, str | int]) -> None:
    """Replace every console handler, also the one that Ray Train gives its workers; its log files get the origin."""
    wanted = os.environ.get(FORMAT) or "text"
    if wanted not in ("text", "json"):
        raise ConfigError(
            f"{FORMAT}={wanted!r} is not a log format; allowed: text, json",
            advice="Correct it in the environment of Ray's processes.",
        )
    root = logging.getLogger()
    for handler in list(root.handlers):
        if handler.get_name() == _CONSOLE:
            root.removeHandler(handler)
        else:
            _give_origin(handler, origin)
    console = logging.StreamHandler(sys.stdout)
    console.set_name(_CONSOLE)
    console.setFormatter(JsonFormatter(origin) if wanted == "json" else TextFormatter(origin))
    root.addHandler(console)
    root.setLevel(logging.INFO)
    for handler in logging.getLogger("ray.train").handlers:
        _give_origin(handler, origin)


def _give_origin(handler: logging.Handler, origin: dict[str, str | int]) -> None:
    for former in [entry for entry in handler.filters if isinstance(entry, Origin)]:
        handler.removeFilter(former)
    handler.addFilter(Origin(origin))
