"""The embedded engine: any Hugging Face causal model, batched. The only part that imports torch."""

from tokentape.engines.local.engine import LocalEngine, run_engine

__all__ = ["LocalEngine", "run_engine"]
