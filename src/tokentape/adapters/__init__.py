"""Adapters for agent frameworks and trainers; `letta.py` is Letta's, the modules beside it are its parts."""
