"""Specs: *what* to build. Strict, frozen, hashed; a stage receives the `model_dump(mode="json")` of its slice."""
