"""What an engine captured beside the tokens, from its wire form to ours. No I/O."""

import base64
import binascii
from array import array
from collections.abc import Sequence

from tokentape.errors import EngineProtocolError
from tokentape.types import RoutedExperts, Support


def read_support(kept: Sequence[Sequence[int]], logprobs: Sequence[float]) -> Support:
    """Kept ids [C][1 to k] and log-probabilities float[C] (nats), as a `Support`."""
    ids: array[int] = array("i")
    for one in kept:
        ids.extend(one)
    lengths = array("i", map(len, kept))
    return Support(lengths.tobytes(), ids.tobytes(), array("f", logprobs).tobytes())


def read_experts(text: str, num_rows: int) -> RoutedExperts:
    """Base64 of int32[R, width] → as few bytes an entry as hold them; R is `num_rows`.

    Raises:
        EngineProtocolError: it is not of so many rows, or an entry is no expert's number.
    """
    values: array[int] = array("i")
    try:
        values.frombytes(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise EngineProtocolError(f"routed_experts cannot be read: {error}") from None
    if not values or len(values) % num_rows:
        raise EngineProtocolError(f"routed_experts has {len(values)} entries for {num_rows} tokens")
    if min(values) < 0 or max(values) >= 2**16:
        raise EngineProtocolError(f"routed_experts has an expert {min(values)} or {max(values)}")
    width = len(values) // num_rows
    if max(values) < 2**8:
        return RoutedExperts(bytes(values.tolist()), "uint8", width)
    return RoutedExperts(array("H", values).tobytes(), "uint16", width)
