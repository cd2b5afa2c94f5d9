"""tokentape: token-exact reinforcement-learning data from any LLM agent."""

__version__ = "0.1.0"
