"""OpenAI Chat Completions ↔ turns: one request in, choices or a stream of chunks out."""

from tokentape.gateway.chat.reply import error_body
from tokentape.gateway.chat.request import decode
from tokentape.gateway.wire import Wire

WIRE = Wire("chat", decode, error_body)
