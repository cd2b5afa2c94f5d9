"""Rollouts at scale: many episodes through a gateway, in groups that are delivered whole.

    async with tokentape.rollouts(episode, tasks, gateway=URL, group_size=8, concurrency=64) as groups:
        async for group in groups:
            train(group.table, group.rewards)

A client of the gateway's control API, nothing more: of one gateway, or of several behind one URL.
"""

from tokentape.rollout.onray import OnRay
from tokentape.rollout.records import Episode, EpisodeFailure, Group, Member, Result
from tokentape.rollout.start import Rollouts, rollouts

__all__ = ["Episode", "EpisodeFailure", "Group", "Member", "OnRay", "Result", "Rollouts", "rollouts"]
