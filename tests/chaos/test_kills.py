"""What the campaign kills: every process that an upgrade starts."""

from mansard.stages import STAGES
from tests.chaos.kills import ANYWHERE, REGISTERED, plan_kills

NOT_IN_IT = {"corpus", "pretrain", "importance", "remove-storey", "average", "kept-gain", "capture", "train-branch",
             "compose"}  # fmt: skip
"""Stages of other verbs, or that the campaign's spec does not ask for."""


def test_every_stage_of_the_campaigns_upgrade_is_killed() -> None:
    for seed in range(5):
        moments = {kill.moment for upgrade in plan_kills(seed) for kill in upgrade}
        assert moments == set(STAGES) - NOT_IN_IT | {ANYWHERE, REGISTERED}
