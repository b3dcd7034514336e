"""What Airflow learns about this package through its entry point `apache_airflow_provider`."""

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Connection form, links and modules, as the metadata that Airflow 3 reads instead of code."""
    return {
        "package-name": "athanor",
        "name": "Athanor",
        "description": "Language-model stages as Ray jobs: hook, deferrable operator, trigger and links.",
        "integrations": [
            {"integration-name": "Ray Jobs", "external-doc-url": "https://docs.ray.io/", "tags": ["service"]},
            {
                "integration-name": "Model endpoint",
                "external-doc-url": "https://platform.openai.com/docs/api-reference/chat",
                "tags": ["service"],
            },
        ],
        "operators": [
            {
                "integration-name": "Ray Jobs",
                "python-modules": ["operators.operator", "operators.people.approval", "operators.people.rating"],
            }
        ],
        "hooks": [
            {"integration-name": "Ray Jobs", "python-modules": ["operators.ray.hook"]},
            {"integration-name": "Model endpoint", "python-modules": ["operators.endpoint"]},
        ],
        "triggers": [{"integration-name": "Ray Jobs", "python-modules": ["operators.trigger", "operators.watcher"]}],
        "connection-types": [
            {
                "connection-type": "ray_jobs",
                "hook-class-name": "operators.ray.hook.RayJobHook",
                "hook-name": "Ray Jobs",
                "ui-field-behaviour": {
                    "hidden-fields": ["login"],
                    "relabeling": {"host": "Ray head", "password": "Token", "schema": "Scheme"},
                    "placeholders": {
                        "host": "ray-head.example.org",
                        "port": "8265",
                        "schema": "https",
                        "password": "the cluster's RAY_AUTH_TOKEN",
                    },
                },
                "conn-fields": _CONNECTION_FIELDS,
            },
            {
                "connection-type": "model_endpoint",
                "hook-class-name": "operators.endpoint.EndpointHook",
                "hook-name": "Model endpoint",
                "ui-field-behaviour": {
                    "hidden-fields": ["login", "schema", "port", "extra"],
                    "relabeling": {"host": "Address", "password": "API key"},
                    "placeholders": {
                        "host": "https://api.example.org/v1",
                        "password": "sent to endpoints below this address only",
                    },
                },
            },
        ],
        "notifications": ["operators.notify.WebhookNotifier"],
        "extra-links": [
            "operators.links.RayJobLink",
            "operators.links.MlflowRunLink",
            "operators.links.ArtifactLink",
            "operators.links.ReportLink",
        ],
    }


_CONNECTION_FIELDS: dict[str, Any] = {
    "verify": {
        "label": "Verify TLS",
        "description": "Check the head's certificate when the scheme is https.",
        "schema": {"type": "boolean", "default": True},
    },
    "ca_path": {
        "label": "CA file",
        "description": "Certificate authorities to trust instead of the system's (PEM file on the Airflow machines).",
        "schema": {"type": ["string", "null"]},
    },
    "secret_headers": {
        "label": "Extra headers",
        "description": 'HTTP headers for a proxy in front of Ray as a JSON object: {"X-Team": "llm"}. Kept secret.',
        "schema": {"type": ["string", "null"], "format": "password"},
    },
    "dashboard_url": {
        "label": "Dashboard URL",
        "description": "Address of Ray's dashboard as browsers see it, if it differs from the address above.",
        "schema": {"type": ["string", "null"]},
    },
    "timeout_seconds": {
        "label": "Timeout",
        "description": "Seconds to wait for one answer.",
        "schema": {"type": ["number", "null"], "default": 15, "minimum": 1},
    },
}
