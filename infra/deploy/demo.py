"""`make compose-demo`: the demo inside the Compose network, where names such as `airflow-api-server` are known.

The recipes `demo` and `smollm` read the documentation of packages that the Ray image does not have, Airflow's above
all; here they read those of the image instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from infra.airflow_api import AirflowApi
from infra.demo import Deployment, run

PACKAGES = {
    "curate.packages": [
        *("datasets", "huggingface-hub", "networkx", "numpy", "pandas"),
        *("ray", "scikit-learn", "scipy", "torch", "transformers"),
    ]
}


def with_packages_of_the_image(recipe: str, params: dict[str, Any]) -> dict[str, Any]:
    """The run's own choice of documents wins."""
    overrides = params.get("overrides") or {}
    if recipe not in ("demo", "smollm") or params.get("documents") or "curate.packages" in overrides:
        return params
    return {**params, "overrides": {**PACKAGES, **overrides}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m infra.deploy.demo", description=__doc__)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--params", type=json.loads, default={}, help="JSON object of trigger form fields")
    options = parser.parse_args()
    deployment = Deployment(
        api=AirflowApi(os.environ["AIRFLOW_API_URL"], user="admin", password=os.environ["AIRFLOW_ADMIN_PASSWORD"]),
        artifact_store=os.environ["ARTIFACT_STORE"],
        airflow_url=os.environ["AIRFLOW_URL"].rstrip("/"),
        mlflow_url=os.environ["MLFLOW_URL"].rstrip("/"),
        login="user admin, password AIRFLOW_ADMIN_PASSWORD of .env",
        stopping="`make compose-down`",
    )
    params = with_packages_of_the_image(options.recipe, options.params)
    try:
        return run(deployment, recipe=options.recipe, params=params, begin=time.monotonic())
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
