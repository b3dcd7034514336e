"""Which Airflow connections hold keys that a stage or a run sends to endpoints."""

from collections.abc import Iterator
from dataclasses import dataclass

from stages.config.base import Config
from stages.config.endpoints import KEY_CONNECTION, EndpointConfig
from stages.config.judging import JudgeConfig
from stages.config.pipeline import PipelineConfig


@dataclass(frozen=True)
class KeyedEndpoint:
    """An endpoint whose key an Airflow connection holds."""

    field: str
    """Path of the setting that names the connection."""
    connection: str
    endpoint: str
    """Where the key is sent."""


def keyed_endpoints(config: Config, path: str) -> tuple[KeyedEndpoint, ...]:
    """Return those in the settings at `path`, on whatever level they are."""
    return tuple(_found(config, path))


def keyed_endpoints_of_run(config: PipelineConfig) -> tuple[KeyedEndpoint, ...]:
    """Return those of all stages that the run executes."""
    return tuple(
        found for stage in sorted(config.selected) for found in _found(config.stage_config(stage), stage.value)
    )


def _found(value: object, path: str) -> Iterator[KeyedEndpoint]:
    match value:
        case EndpointConfig() | JudgeConfig() if value.api_key_connection:
            yield KeyedEndpoint(f"{path}.{KEY_CONNECTION}", value.api_key_connection, value.endpoint)
        case Config():
            for name in type(value).model_fields:
                yield from _found(getattr(value, name), f"{path}.{name}")
        case tuple():
            for number, item in enumerate(value):
                yield from _found(item, f"{path}.{number}")
