"""A stack for drills on the services beside Airflow: a real Postgres is its database, a real MLflow tracks the stages,
and both, as the Ray head, can be killed and started again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient

from stages.artifacts.store import Store
from tests.chaos.stack import ChaosStack, chaos_stack
from tests.postgres import PostgresServer, postgres_server
from tests.servers import Restartable, restartable_mlflow


@dataclass(frozen=True)
class Services:
    """The stack, and what may be killed beside it."""

    stack: ChaosStack
    postgres: PostgresServer
    mlflow: Restartable
    mlflow_url: str

    @property
    def store(self) -> Store:
        return self.stack.store

    def client(self) -> MlflowClient:
        return MlflowClient(self.mlflow_url)


@contextmanager
def services(root: Path, dag_files: list[Path]) -> Iterator[Services]:
    """Everything up; ended with all its processes when the block ends."""
    with ExitStack() as stack:
        postgres = stack.enter_context(postgres_server())
        postgres.sql("CREATE DATABASE airflow")
        url, mlflow = restartable_mlflow(root / "mlflow")
        stack.callback(mlflow.stop)
        mlflow.start()
        variables = {
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": postgres.url("airflow"),
            "MLFLOW_TRACKING_URI": url,
        }
        airflow = stack.enter_context(chaos_stack(root / "airflow", dag_files, variables=variables))
        yield Services(airflow, postgres, mlflow, url)
