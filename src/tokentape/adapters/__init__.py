"""Adapters for agent frameworks and trainers: `letta.py` is Letta's, with parts beside it, `trl.py` TRL's."""
