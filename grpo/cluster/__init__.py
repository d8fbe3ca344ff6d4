"""Ray: the session, the placement of actors, the actors, their groups, jobs. Nothing else in grpo imports ray."""

__all__ = ["actors", "engines", "jobs", "reward_workers", "session"]
