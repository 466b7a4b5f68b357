"""Carry-on: a small branch beside a frozen base in service, trained on the states that the base's engines give away."""
