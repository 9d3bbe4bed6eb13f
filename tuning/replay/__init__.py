"""Any schedule on recorded traces, with no model."""

from tuning.replay.run import Replay, replay_full_share, replay_policy

__all__ = ["Replay", "replay_full_share", "replay_policy"]
