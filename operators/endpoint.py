"""Keys of endpoints from Airflow's connections: read just before a job is submitted, and handed to it sealed.

A connection has the type `model_endpoint`, the key as its password, and as its host the address that the key is for.
Both are checked, because whoever triggers a run chooses connection and endpoint: no other connection's password can be
sent anywhere, and this one's nowhere else. Neither the key nor its seal is in an XCom, a log, a template or the store.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from stages.config.endpoint_keys import KeyedEndpoint, keyed_endpoints, keyed_endpoints_of_run
from stages.config.endpoints import is_below, is_fit_for_header
from stages.config.errors import ConfigError
from stages.config.gate_records import GateRequest
from stages.config.look import LookRequest
from stages.config.pipeline import PipelineConfig, stage_config_from_json
from stages.config.request import StageRequest
from stages.config.seals import SEALED_KEYS, require_sealing, seal
from stages.config.servers import AddressError, server_address

if TYPE_CHECKING:
    from operators.ray.jobs import ConnectionLike

_CREATE = (
    "Create one in Airflow (Admin, Connections) with the type Model endpoint, the endpoint's address as host and its "
    "key as password."
)


class EndpointHook(BaseHook):
    """The connection to an OpenAI-compatible endpoint. Airflow itself asks none: jobs do."""

    conn_name_attr = "endpoint_conn_id"
    conn_type = "model_endpoint"
    hook_name = "Model endpoint"

    def __init__(self, endpoint_conn_id: str) -> None:
        super().__init__()
        self.endpoint_conn_id = endpoint_conn_id

    def key_for(self, endpoint: str, *, field: str) -> str:
        """Return the key for an endpoint; raises ConfigError that names field and connection, and never the key."""
        named = f"{field}={self.endpoint_conn_id!r}"
        try:
            connection = self.get_connection(self.endpoint_conn_id)
        except AirflowNotFoundException:
            raise ConfigError(
                f"{named} is not a connection of this Airflow, or Airflow cannot read it", advice=_CREATE
            ) from None
        if connection.conn_type != self.conn_type:
            raise ConfigError(
                f"{named} is a connection of type {connection.conn_type!r}; keys are taken from type "
                f"{self.conn_type!r} only",
                advice=_CREATE,
            )
        address = _address(connection, named)
        if not is_below(endpoint, address):
            raise ConfigError(
                f"{named} holds a key for {address}, and {endpoint} is not below that address",
                advice="Name the connection of this endpoint, or correct the host of the connection.",
            )
        key = (connection.password or "").strip()
        if not key:
            raise ConfigError(f"{named} is a connection without a password", advice="Set it to the endpoint's key.")
        if not is_fit_for_header(key):
            raise ConfigError(
                f"{named}: its password holds characters that no HTTP header may have; allowed are printable ASCII "
                "characters",
                advice="Set it again: the key alone, without line ends in it.",
            )
        return key


def require_sealable_keys(config: PipelineConfig) -> None:
    """Raise ConfigError unless every key that the run sends is there and could be sealed now."""
    _keys(keyed_endpoints_of_run(config))


def sealed_environment(request: StageRequest | LookRequest | GateRequest, *, job: str) -> dict[str, str]:
    """Return what the job's environment needs for its keys: nothing where no connection is named."""
    keys = _keys(_endpoints_of(request))
    return {SEALED_KEYS: seal(keys, job=job)} if keys else {}


def _endpoints_of(request: StageRequest | LookRequest | GateRequest) -> tuple[KeyedEndpoint, ...]:
    match request:
        case StageRequest():
            return keyed_endpoints(stage_config_from_json(request.stage, request.config), request.stage.value)
        case LookRequest():
            return keyed_endpoints_of_run(PipelineConfig.model_validate(request.config))
        case GateRequest():  # it asks none
            return ()


def _keys(endpoints: Sequence[KeyedEndpoint]) -> dict[str, str]:
    """The keys by connection; each is checked for each of its endpoints."""
    if endpoints:
        require_sealing()
    return {one.connection: EndpointHook(one.connection).key_for(one.endpoint, field=one.field) for one in endpoints}


def _address(connection: "ConnectionLike", named: str) -> str:
    """The address that the key is for; without it, a key could be sent to any endpoint that a run may ask."""
    host = str(connection.host or "").strip()
    scheme = str(connection.schema or "https")
    advice = "Set its host to the endpoint's address, such as https://host/v1."
    if not host:
        raise ConfigError(
            f"{named} is a connection without a host, so nothing says where its key may go", advice=advice
        )
    # Wherever the '@' is: a password with a '/' in it ends the host early, and what follows '?' may be a token.
    if any(mark in host for mark in "@?#"):
        raise ConfigError(f"{named}: its host holds more than an address, such as a login", advice=advice)
    try:
        default = 80 if scheme.lower() == "http" else 443
        return server_address(host, scheme=scheme, port=connection.port, default_port=default)
    except AddressError as error:
        raise ConfigError(f"{named}: {error}", advice=advice) from None
