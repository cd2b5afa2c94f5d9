"""The control side without HTTP: what creates and what finishes a session."""

from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Raw

from tokentape.errors import RequestError
from tokentape.gateway.fields import session_sampling
from tokentape.gateway.sessions import Session, Sessions
from tokentape.types import Json

_T = TypeVar("_T")
_Limit = Annotated[int, Meta(ge=1, le=2**53)] | None
_Name = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00]*$")]  # PostgreSQL takes no NUL


class Create(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /sessions`.

    `sampling` has any of `fields.SAMPLING`; `deadline_s` is from now on; `group_id` is the same for the
    episodes that are compared with each other.
    """

    session_id: str | None = None
    metadata: Json = msgspec.field(default_factory=dict[str, Any])
    sampling: dict[str, Raw] | None = None
    max_turns: _Limit = None
    max_tokens: _Limit = None
    deadline_s: Annotated[float, Meta(gt=0, le=10**9)] | None = None
    group_id: _Name | None = None


class Announce(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /weights`."""

    version: _Name


def read_body(body: bytes, type_: type[_T]) -> _T:
    """A JSON body of the control side; an empty one is an empty object.

    Raises:
        RequestError: it is not of this type.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not what this route takes: {error}") from None


async def create(sessions: Sessions, body: Create) -> Session:
    """Create an open session.

    Raises:
        SessionExists: its id is taken.
        RequestError: the id, the metadata or the sampling cannot be used.
    """
    return await sessions.create(
        body.session_id,
        metadata=body.metadata,
        sampling=session_sampling(body.sampling or {}),
        max_turns=body.max_turns,
        max_tokens=body.max_tokens,
        deadline_s=body.deadline_s,
        group_id=body.group_id,
    )
