"""Whether what somebody typed is an address."""

from urllib.parse import urlsplit


def is_http(url: str) -> bool:
    """Whether it looks like http://HOST:PORT or https://HOST:PORT, with a path or without."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, a port that is none
        return False
