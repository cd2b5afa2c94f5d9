"""OpenAI Responses ↔ turns: one request in, a response or a stream of events out."""

from tokentape.gateway.responses.reply import error_body
from tokentape.gateway.responses.request import decode
from tokentape.gateway.responses.stored import Answer, cancel, delete, input_items, retrieve
from tokentape.gateway.wire import Wire

__all__ = ["WIRE", "Answer", "cancel", "delete", "input_items", "retrieve"]

WIRE = Wire("responses", decode, error_body)
