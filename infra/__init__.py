"""The local stack: Airflow, a Ray head and an MLflow server on this machine, and the demo that drives them."""
