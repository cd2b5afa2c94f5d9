"""What passes between the wires and the turns: a request, the events of its answer, the committed turns."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tokentape.conversation import Conversation
from tokentape.parse import SaidEvent
from tokentape.render import Frame
from tokentape.tape import Origin, Turn
from tokentape.types import Demand, Prompt, Sampling, Usage


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """What a wire asks for. `conversation` is the whole of it; `frame_key` is the identity of `frame`.

    `parse_calls` is False where the caller wants no tool calls, `single_call` where it wants one at most;
    `demand` is what the reply must be. `num_choices` turns are sampled from one prompt. `clamp`:
    `sampling.max_tokens` is an upper bound, and the context may end the turn before it.
    """

    conversation: Conversation
    frame: Frame
    frame_key: tuple[bytes, bytes]
    sampling: Sampling
    origin: Origin
    stream: bool = False
    parse_calls: bool = False
    single_call: bool = False
    demand: Demand | None = None
    num_choices: int = 1
    num_top_logprobs: int = 0
    clamp: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """A request is on its way to the engine: the ids of the turns to come, one a choice."""

    turn_ids: tuple[str, ...]
    num_prompt: int
    created_at: float


@dataclass(frozen=True, slots=True)
class Progress:
    """New tokens of one choice as they come, and what the text means so far.

    `ids` int[n] and `logprobs` float[n]; `top` are the alternatives of each, None where not asked for.
    """

    choice: int
    ids: Sequence[int]
    logprobs: Sequence[float]
    events: Sequence[SaidEvent]
    top: Sequence[Sequence[tuple[int, float]]] | None = None


Event: TypeAlias = Started | Progress
Emit: TypeAlias = Callable[[Event], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Done:
    """A committed turn with what a reply needs. `prompt` is all that the engine was sent.

    `top` are the alternatives of each token, None where not asked for, or no longer known.
    """

    turn: Turn
    prompt: Prompt
    usage: Usage
    top: Sequence[Sequence[tuple[int, float]]] | None = None
