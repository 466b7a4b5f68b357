"""Mansard's library: everything that is true without an orchestrator.

It imports neither prefect nor mlflow. Imports point one way; `pyproject.toml` (import-linter) says which.
"""
