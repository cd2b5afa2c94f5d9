"""Where the viewer shows a sample: the one place that knows the form of its links."""

from urllib.parse import quote, urlsplit

from tokentape.addresses import is_http
from tokentape.errors import ConfigError

DEFAULT_VIEWER = "http://127.0.0.1:8000/ui/"
"""The viewer of a gateway with the default address."""


def checked_viewer(url: str) -> str:
    """The viewer's URL, if it is one that a page may link to.

    Raises:
        ConfigError: it is not http:// or https://, or has a fragment.
    """
    if not is_http(url) or urlsplit(url).fragment:
        raise ConfigError(
            f"--viewer {url}: a page links only to http:// and https://; give the viewer's own URL, as "
            f"{DEFAULT_VIEWER}"
        )
    return url


def sample_link(viewer: str, session_id: str, sample_id: str) -> str:
    """The viewer's page of one branch, its tokens; ids are quoted, whatever is in them."""
    session, sample = (quote(each, safe="", errors="replace") for each in (session_id, sample_id))
    return f"{viewer}#/s/{session}?b={sample}&tab=tokens"
