"""What an error of MLflow means: wait, leave one thing out, or ask a person; and how it is told.

MLflow's client gives all of them one class, and spells a refused connection over half a screen.
"""

import os
import re
from enum import Enum

from stages.config.errors import Category, ConfigError, StageError, without_logins


class Trouble(Enum):
    """What helps against an error."""

    OUTAGE = "a retry may help: MLflow is away, restarts or is overloaded"
    REFUSAL = "this one thing will never be taken; the rest may be"
    LASTING = "nothing is taken until a person has changed something"


_REFUSALS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "MALFORMED_REQUEST",
        "INVALID_STATE",
        "RESOURCE_DOES_NOT_EXIST",
        "RESOURCE_ALREADY_EXISTS",
        "NOT_FOUND",
    }
)
ABSENT = frozenset({"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE"})
"""Codes with which MLflow says that a registered model, version or alias does not exist."""
_FORBIDDEN, _UNKNOWN_LOGIN = "PERMISSION_DENIED", ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
_PROXY_ERRORS = (429, 502, 503, 504)
_REFUSING = (400, 413)  # 413: larger than a proxy allows
_INTERNAL = "too many 500 error responses"
"""What MLflow's client says when the server answered HTTP 500 each time: it has retried and dropped the answer."""
_DELETED = re.compile(r"The (run|experiment) (\S+) must be in the 'active' state")
_GONE = re.compile(r"Run with id=(\S+) not found|No Experiment with id=(\S+)")


def trouble_of(error: Exception) -> Trouble:
    """Sort an error of MLflow's client, or one of ours, whose category says whether a retry may help."""
    if isinstance(error, StageError):
        return Trouble.LASTING if error.category in (Category.CONFIG, Category.DATA) else Trouble.OUTAGE
    code, text = str(getattr(error, "error_code", "")), str(error)
    if _status(error) in _REFUSING:
        return Trouble.REFUSAL
    if _DELETED.search(text) or _GONE.search(text):
        return Trouble.LASTING
    if code == _FORBIDDEN or code in _UNKNOWN_LOGIN or code == "ENDPOINT_NOT_FOUND":
        return Trouble.LASTING
    return Trouble.REFUSAL if code in _REFUSALS else Trouble.OUTAGE


def is_unreachable(error: Exception) -> bool:
    """Whether MLflow did not answer at all, or what is in front of it answered in its place."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if (status := _status(error)) is not None:
        return status in _PROXY_ERRORS
    if _INTERNAL in str(error):  # its storage is full, closed or away
        return False
    is_network = any(kind.__module__.startswith("requests.") for kind in type(error).__mro__)
    is_mlflow = any(kind.__name__ == "MlflowException" for kind in type(error).__mro__)
    return is_network or (is_mlflow and trouble_of(error) is Trouble.OUTAGE)


def _status(error: Exception) -> int | None:
    """The HTTP status of an answer that is no JSON of MLflow's, such as those of its storage of files."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: Exception) -> str:
    """Return in one sentence why a call failed and, where a person must act, what to do."""
    if isinstance(error, StageError):
        return f"{error.message}. {error.advice}".rstrip()
    server = without_logins(os.environ.get("MLFLOW_TRACKING_URI", ""))
    text = without_logins(str(error))
    if found := _DELETED.search(text):
        return deleted(found[1], found[2].strip("'\""))
    if found := _GONE.search(text):
        what = "run" if found[1] else "experiment"
        return f"MLflow's {what} {found[1] or found[2]} was removed for good; what is left for it waits in the store"
    code = str(getattr(error, "error_code", ""))
    if code in _UNKNOWN_LOGIN:
        return (
            f"{server} does not accept the login; correct MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, in the environment of Ray's processes"
        )
    if code == _FORBIDDEN and "host header" in text.lower():
        return f"{server} does not accept this host name; add it to MLFLOW_HOSTS of the MLflow server"
    if code == _FORBIDDEN:
        return f"{server} forbids that to the account; give it the permission EDIT on the experiment"
    if code == "ENDPOINT_NOT_FOUND":
        return f"{server} is not an MLflow server, or an older one: {text[:200]}"
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    if isinstance(cause, OSError):  # the exceptions of requests are OSErrors
        return _unreachable(server, cause)
    return text[:300]


def as_stage_error(error: Exception, what: str, *, advice: str = "") -> StageError:
    """Return the failure of a step that needs MLflow: retried in an outage, else `config`, because a retry is in
    vain."""
    kind = StageError if trouble_of(error) is Trouble.OUTAGE else ConfigError
    return kind(f"{what}: {explain(error)}", advice=advice if kind is StageError else "")


def deleted(what: str, name: str, *, label: str = "") -> str:
    """Say that a run or an experiment was deleted, and the way out."""
    if what == "run":
        return f"MLflow's run {name} was deleted; restore it (`mlflow runs restore --run-id {name}`)"
    shown = f"{label!r} (id {name})" if label else name
    return (
        f"MLflow's experiment {shown} was deleted; restore it (`mlflow experiments restore --experiment-id {name}`) or "
        "name another experiment"
    )


def _unreachable(server: str, cause: OSError) -> str:
    kind = type(cause).__name__
    if kind == "SSLError":
        return (
            f"the certificate of {server} is not accepted; set REQUESTS_CA_BUNDLE to the file of its authority, or "
            "correct the address"
        )
    if kind in ("InvalidURL", "MissingSchema", "InvalidSchema"):
        return f"MLFLOW_TRACKING_URI={server!r} is not an address ({kind}); expected http://host:port"
    if _INTERNAL in str(cause):
        return f"{server} answered with HTTP 500 each time; its log says why"
    if (status := _status(cause)) is not None:
        return f"{server} answered with HTTP {status}: {without_logins(str(cause))[:200]}"
    if not type(cause).__module__.startswith("requests.") and not isinstance(cause, ConnectionError | TimeoutError):
        return without_logins(f"{kind}: {cause}")[:300]  # a folder that cannot be written, a full disk
    return f"{server} does not answer ({kind})"
