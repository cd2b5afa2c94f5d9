"""tokentape: token-exact reinforcement-learning data from any LLM agent."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokentape.inprocess import RecordedSession, Recorder, Reply, open  # noqa: A004
    from tokentape.rollout import rollouts

__all__ = ["RecordedSession", "Recorder", "Reply", "__version__", "open", "rollouts"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What is here is imported when it is first asked for: the package alone costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'tokentape' has no attribute {name!r}")
    if name == "rollouts":
        from tokentape.rollout import rollouts

        return rollouts
    from tokentape import inprocess

    return vars(inprocess)[name]
