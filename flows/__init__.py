"""Operator verbs: order and branching only. The work is done in `tasks` and `mansard`."""
