"""The models of one run of `llm_pipeline`, found by what its stages left in the store."""

from stages.artifacts.addresses import run_key
from stages.artifacts.store import Store, read_json
from stages.config.errors import ConfigError, DataError
from stages.config.graph import Stage, language_models, stage_providing
from stages.config.records import parse_record
from stages.config.request import BASE_MODEL, StageResult, run_folder, safe_run_id
from stages.serve.address import Address

_DAG_ID = "llm_pipeline"
_CONFIGURATION = "pipeline.json"


def models_of_run(store: Store, run: str) -> list[Address]:
    """Return the models that write text, in the order of the pipeline, named by their roles: the one that the run
    started from, and those that it has made so far. Raises ConfigError when there is no such run, or none in it."""
    folder = find_run(store, run)
    found: list[Address] = []
    for spec in language_models():
        if uri := _made(store, folder, spec.stage):
            found.append(Address(spec.role, uri))
    base_role = language_models()[0].role
    if all(address.name != base_role for address in found) and (given := _given(store, folder)):
        found.insert(0, Address(base_role, given))
    if not found:
        raise ConfigError(
            f"the run {run!r} has no model yet, in {store.root_uri}/runs/{folder}",
            advice="Wait until one of its training stages has succeeded, or give the address of a model.",
        )
    return found


def find_run(store: Store, run: str) -> str:
    """The folder under `runs/`: of Airflow's run id, of its own name, or of the newest run with this run name."""
    for folder in (run, run_folder(_DAG_ID, run), safe_run_id(run)):
        if folder.strip(".") and "/" not in folder and store.exists(f"runs/{folder}/{_CONFIGURATION}"):
            return folder
    named = [folder for folder in _newest_first(store) if _run_name(store, folder) == run]
    if not named:
        raise ConfigError(
            f"there is no run {run!r} in {store.root_uri}",
            advice="Give the run id that Airflow shows, such as manual__2026-01-31T12:00:00+00:00, or the run name of "
            f"the form; the store has {_some(store)}.",
        )
    return named[0]


def _newest_first(store: Store) -> list[str]:
    listed = [entry for entry in store.listing() if entry.key.startswith("runs/")]
    runs = [entry for entry in listed if entry.key.count("/") == 2 and entry.key.endswith(f"/{_CONFIGURATION}")]
    return [entry.key.split("/")[1] for entry in sorted(runs, key=lambda entry: entry.modified, reverse=True)]


def _some(store: Store) -> str:
    names = _newest_first(store)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "no runs"


def _run_name(store: Store, folder: str) -> str:
    try:
        return str(read_json(store, f"runs/{folder}/{_CONFIGURATION}").get("run_name", ""))
    except (DataError, FileNotFoundError):
        return ""


def _made(store: Store, folder: str, stage: Stage) -> str:
    key = run_key(folder, stage, "result.json")
    try:
        result = parse_record(StageResult, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        return ""
    return result.artifact.uri


def _given(store: Store, folder: str) -> str:
    """The model that the run was given, as its stages read it."""
    convert = stage_providing(BASE_MODEL)
    if convert is not None and (made := _made(store, folder, convert)):
        return made
    return str(read_json(store, f"runs/{folder}/{_CONFIGURATION}").get("base_model") or "")
