"""`tokentape doctor`: would a gateway with this model, engine and store work here, and what is to be changed?

checks    what a check says, as data
machine   Python, packages, limits, memory, a port
model     the model directory: tokenizer, template, end of turn, format
engine    a server: who it is, whether it has this model, whether log-probabilities come
same      whether an engine's model is ours, before it is sent ids
sqlite    a store in a file, looked at without touching it
postgres  a store in PostgreSQL, likewise
show      a table for a terminal

Nothing is changed anywhere. An engine is asked for one generation of a few tokens.
"""

from tokentape.doctor.checks import Check, Status

__all__ = ["Check", "Status"]
