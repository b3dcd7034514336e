"""Where MLflow is and how to log in to it, from the variables that MLflow's own client reads."""

import base64
import os

from stages.config.servers import is_web_address


def tracking_server() -> str:
    """Return the address of the MLflow server; empty when MLFLOW_TRACKING_URI is unset, a database or a folder."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    return address if is_web_address(address) else ""


def authorization() -> str:
    """Return the value of the header `Authorization`, empty without a login; a user name wins over a token."""
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else ""
