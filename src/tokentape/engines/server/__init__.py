"""SGLang's native protocol on a socket, over an embedded engine; and how this project serves HTTP."""

from tokentape.engines.server.app import make_app, running, serve

__all__ = ["make_app", "running", "serve"]
