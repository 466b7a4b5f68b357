"""The host: the process that owns engines, journal connection and rollouts."""
