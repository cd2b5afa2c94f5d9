"""More than one machine: gateways as replicas on Ray, behind one base URL.

`tokentape serve --ray` from the command line, `Cluster` from Python.
"""

from typing import TYPE_CHECKING, Any

from tokentape.errors import ConfigError
from tokentape.scale.config import ScaleConfig

if TYPE_CHECKING:
    from tokentape.scale.ray import Cluster

__all__ = ["Cluster", "ScaleConfig"]


def __getattr__(name: str) -> Any:
    """Ray is imported when it is first asked for."""
    if name != "Cluster":
        raise AttributeError(f"module 'tokentape.scale' has no attribute {name!r}")
    try:
        from tokentape.scale.ray import Cluster
    except ImportError as error:
        raise ConfigError(f"replicas on Ray need an extra: pip install 'tokentape[ray]' ({error})") from error
    return Cluster
