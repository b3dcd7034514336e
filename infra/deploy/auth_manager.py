"""Airflow's FAB auth manager, in which people may answer questions without any right over the DAGs that ask them.

FAB's own takes an answer only from who has "can edit" on the DAG, and that right also pauses the DAG: nobody could rate
answers or approve promotions without being able to stop the pipeline. Here the right to edit "HITL Detail" is enough,
on DAGs that the user may see. All else is FAB's.
"""

from __future__ import annotations

from airflow.api_fastapi.auth.managers.base_auth_manager import ResourceMethod
from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity, DagDetails
from airflow.providers.fab.auth_manager.fab_auth_manager import FabAuthManager
from airflow.providers.fab.auth_manager.models import User

from infra.deploy.roles import QUESTIONS


class PeopleAuthManager(FabAuthManager):
    """`[core] auth_manager` of the deployments."""

    def is_authorized_dag(
        self,
        *,
        method: ResourceMethod,
        user: User,
        access_entity: DagAccessEntity | None = None,
        details: DagDetails | None = None,
    ) -> bool:
        if access_entity is not DagAccessEntity.HITL_DETAIL or method != "PUT":
            return super().is_authorized_dag(method=method, user=user, access_entity=access_entity, details=details)
        sees = super().is_authorized_dag(method="GET", user=user, access_entity=access_entity, details=details)
        return sees and self.is_authorized_custom_view(method="PUT", resource_name=QUESTIONS, user=user)
