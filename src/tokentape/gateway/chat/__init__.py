"""OpenAI Chat Completions ↔ turns: one request in, choices or a stream of chunks out."""

from tokentape.gateway.chat.request import decode
from tokentape.gateway.wire import Wire, openai_error

WIRE = Wire("chat", decode, openai_error)
