"""The library bound to Prefect (retries, progress) and MLflow (runs, metrics, registry)."""
