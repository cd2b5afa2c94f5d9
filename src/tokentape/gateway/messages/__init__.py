"""Anthropic Messages ↔ turns: one request in, a message or a stream of events out."""

from tokentape.gateway.messages.reply import error_body
from tokentape.gateway.messages.request import decode, decode_count
from tokentape.gateway.wire import Wire

WIRE = Wire("messages", decode, error_body)
COUNT = Wire("messages/count_tokens", decode_count, error_body)
"""The same requests, only to be counted: without `max_tokens` and `stream`."""
