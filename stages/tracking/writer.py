"""Writes values into MLflow so that one that it refuses costs no other; what is too long is cut there and kept whole.

Surprising on purpose: a call carries a thousand values, and MLflow refuses all of them for one. The one is found by
halves, left out and listed in `refused`.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.config import mlflow_limits as limits
from stages.tracking.client import clean_tags, log_file
from stages.tracking.spool import Refused
from stages.tracking.trouble import Trouble, explain, trouble_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

_SHORTENED_NAME = "shortened-values.json"


class Writer:
    """Writes for one stage, and remembers what MLflow did not take and what was cut."""

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client
        self._shortened: dict[str, str] = {}
        self.refused: list[Refused] = []
        """What MLflow did not take, with its reasons."""

    @contextmanager
    def attempt(self, what: str, *, even_lasting: bool = False) -> Iterator[None]:
        """Note what MLflow refuses for good, and continue; an outage is the caller's, and so is what a person must
        change first, unless it concerns this step alone (`even_lasting`)."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            trouble = trouble_of(error)
            if trouble is not Trouble.REFUSAL and not (even_lasting and trouble is Trouble.LASTING):
                raise
            self.refuse(what, explain(error))

    def refuse(self, what: str, reason: str) -> None:
        """Note something that MLflow does not get."""
        entry = Refused(what, reason)
        if entry not in self.refused:  # a step that an outage interrupted is repeated
            logger.error("MLflow refused %s, the rest is logged: %s", what[:200], reason)
            self.refused.append(entry)

    def fitting(self, tags: Mapping[str, str]) -> dict[str, str]:
        """Return tags that MLflow takes, and remember the whole values of those that are cut."""
        fitting = clean_tags(tags)
        self._shortened |= {key: value for key, value in tags.items() if fitting.get(limits.key(key), value) != value}
        return fitting

    def fitting_params(self, params: Mapping[str, str]) -> dict[str, str]:
        """The same for params."""
        fitting = {limits.key(key): limits.shortened(value, limits.PARAM_VALUE) for key, value in params.items()}
        self._shortened |= {f"param {key}": params[key] for key in params if fitting[limits.key(key)] != params[key]}
        return fitting

    def keep_shortened(self, run_id: str) -> None:
        """Store the whole of what was cut, as a file of the run."""
        if not self._shortened:
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / _SHORTENED_NAME
            path.write_text(json.dumps(self._shortened, indent=1), encoding="utf-8")
            try:
                log_file(self._client, run_id, path, _SHORTENED_NAME)
            except Exception as error:  # noqa: BLE001 - storage of files has errors of its own; manifest.json has all
                logger.warning("%s is not in MLflow: %s", _SHORTENED_NAME, explain(error))
        self._shortened = {}

    def log_inputs(self, run_id: str, inputs: list[Any]) -> None:
        """Log datasets and models that a run read."""
        from mlflow.entities import LoggedModelInput

        def log(part: list[Any]) -> None:
            models = [entry for entry in part if isinstance(entry, LoggedModelInput)]
            datasets = [entry for entry in part if not isinstance(entry, LoggedModelInput)]
            self._client.log_inputs(run_id, datasets=datasets, models=models)

        for start in range(0, len(inputs), limits.INPUTS_PER_CALL):
            self._halved_if_refused(inputs[start : start + limits.INPUTS_PER_CALL], log)

    def log_items(self, run_id: str, items: list[Any]) -> None:
        """Log metrics, params or tags in calls that MLflow accepts; what it refuses is found by halves and left out."""
        from mlflow.entities import Metric, Param

        def log(part: list[Any]) -> None:
            metrics = [item for item in part if isinstance(item, Metric)]
            params = [item for item in part if isinstance(item, Param)]
            tags = [item for item in part if not isinstance(item, Metric | Param)]
            self._client.log_batch(run_id, metrics=metrics, params=params, tags=tags)

        for part in _calls(items):
            self._halved_if_refused(part, log)

    def _halved_if_refused(self, items: list[Any], log: Callable[[list[Any]], None]) -> None:
        from mlflow.exceptions import MlflowException

        if not items:
            return
        try:
            log(items)
        except MlflowException as error:
            if trouble_of(error) is not Trouble.REFUSAL:
                raise
            if len(items) == 1:
                self.refuse(str(items[0]), explain(error))
                return
            middle = len(items) // 2
            self._halved_if_refused(items[:middle], log)
            self._halved_if_refused(items[middle:], log)


def _calls(items: list[Any]) -> Iterator[list[Any]]:
    """Cut items into calls by number and by size."""
    from mlflow.entities import Metric

    part: list[Any] = []
    size = others = 0
    for item in items:
        length = len(json.dumps([item.key, str(item.value)])) + 120  # step, time and the names of the fields
        other = not isinstance(item, Metric)
        if part and (
            len(part) >= limits.METRICS_PER_CALL
            or others + other > limits.PARAMS_AND_TAGS_PER_CALL
            or size + length > limits.BYTES_PER_CALL
        ):
            yield part
            part, size, others = [], 0, 0
        part.append(item)
        size, others = size + length, others + other
    if part:
        yield part
