"""What the engine is to be sent for a request: attach → extend, or render; and how to sample."""

import asyncio
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from tokentape.constrain import constrain
from tokentape.conversation import Conversation, MessageKey
from tokentape.engines.base import EngineInfo
from tokentape.errors import ContextOverflow, LimitReached, RequestError
from tokentape.formats import Format
from tokentape.gateway.exchange import TurnRequest
from tokentape.gateway.session import Session
from tokentape.parse import ThinkTags
from tokentape.render import Ended, NotExtendable, Rendered, Renderer
from tokentape.tape import Turn
from tokentape.tree import Attachment
from tokentape.types import Message, Prompt, Sampling
from tokentape.volatile import Superseded, Volatile

log = logging.getLogger(__name__)

_LONG = 100_000  # characters: some 5 ms of work


@dataclass(frozen=True, slots=True)
class Plan:
    """A turn before it is sampled.

    `parent` is None where the prompt had to be rendered whole; `reason` then says why if the template is to
    blame. `new` are the messages that `rendered` renders, `keys` theirs. `sampling` is the engine's, `stop`
    the caller's own stop strings. `reasoning_open`: the prompt ends inside a thought.
    """

    parent: Turn | None
    reason: str | None
    new: tuple[Message, ...]
    keys: Sequence[MessageKey]
    rendered: Rendered
    prompt: Prompt
    sampling: Sampling
    stop: tuple[str, ...]
    reasoning_open: bool
    superseded: tuple[Superseded, ...]


class Planner:
    """Plans turns of any session.

    `context_length` in tokens bounds prompt plus completion; None: only the engine knows it. What the engine
    says of it replaces it, unless it `is_fixed`. `end_ids` are the tokens that may end a turn.
    `default_max_tokens` holds where neither the request, the session, nor the context says how much to
    sample.
    """

    def __init__(
        self,
        renderer: Renderer,
        format: Format,  # noqa: A002  # the field's word
        volatile: Volatile,
        *,
        context_length: int | None,
        is_fixed: bool,
        end_ids: frozenset[int],
        default_max_tokens: int,
    ) -> None:
        self.context_length = context_length
        self._is_fixed = is_fixed
        self.engine_sampling: Sampling | None = None
        self._renderer = renderer
        self._format = format
        self._volatile = volatile
        self._end_ids = end_ids
        self._default_max_tokens = default_max_tokens

    def learn(self, info: EngineInfo) -> None:
        """Take what the engine says of itself."""
        self.engine_sampling = info.sampling
        if not self._is_fixed and info.context_length is not None:
            self.context_length = info.context_length

    async def plan(self, session: Session, request: TurnRequest) -> Plan:
        """Find what the request continues, what its prompt is, and how to sample.

        A long text is rendered and tokenised in a thread: everybody else would wait for it.

        Raises:
            RequestError: it cannot be served; the session is unchanged.
        """
        budget = session.budget(request.num_choices)
        attachment = session.tree.attach(request.frame_key, request.conversation)
        new = request.conversation.keys_from(attachment.num_matched)
        if sum([len(key.message.content or "") for key in new]) < _LONG:
            plan = self._joined(session, request, attachment)
        else:
            plan = await asyncio.to_thread(self._joined, session, request, attachment)
        # The engine's own defaults are sent back to it: the turn then records all that it was sampled with.
        sampling = _merged(
            _merged(self.engine_sampling or Sampling(), session.record.sampling), request.sampling
        )
        stop = sampling.stop
        if request.demand is not None:
            wanted = constrain(
                request.demand, self._format, request.frame.tools, reasoning_open=plan.reasoning_open
            )
            sampling = _merged(sampling, wanted)
        if request.single_call and request.parse_calls:
            # The engine stops behind the first call: what would follow is never sampled, nothing is masked.
            ends = [end for grammar in self._format.calls if (end := grammar.one_call_stop)]
            sampling = replace(sampling, stop=(*stop, *ends))
        num_prompt = len(plan.prompt)
        sampling = replace(sampling, max_tokens=self._max_tokens(sampling, request, num_prompt, budget))
        return dataclasses.replace(plan, sampling=sampling, stop=stop)

    def count(self, session: Session, request: TurnRequest) -> int:
        """How many tokens the prompt would have.

        Raises:
            RequestError: the request cannot be served.
        """
        attachment = session.tree.attach(request.frame_key, request.conversation)
        return len(self._joined(session, request, attachment).prompt)

    def _joined(self, session: Session, request: TurnRequest, attachment: Attachment) -> Plan:
        try:
            return self._join(session, request, attachment)
        except RecursionError:
            raise RequestError("tools or tool-call arguments are nested too deep", param="messages") from None

    def _join(self, session: Session, request: TurnRequest, attachment: Attachment) -> Plan:
        keys = request.conversation.keys_from(attachment.num_matched)
        new = tuple(key.message for key in keys)
        parent, before = attachment.turn, attachment.prompt
        reason = None
        if parent is not None:
            new = _with_recorded_ids(new, keys, parent)
            # An ordinary token that stopped the engine (`stop_token_ids`) ends no turn of the template's.
            stop_id = parent.stop_id if parent.stop_id in self._end_ids else None
            ended = Ended(parent.reply, stop_id, parent.in_reasoning)
            rendered = self._renderer.extend(request.frame, attachment.before, ended, new)
            if isinstance(rendered, NotExtendable):
                log.info(
                    "session %s: new branch: %s (%s)", session.session_id, rendered.reason, rendered.detail
                )
                reason = rendered.reason.value
                new, parent = (*_recorded(session, parent), *new), None
                keys, before = request.conversation.keys_from(0), Prompt()
                rendered = self._renderer.render(request.frame, new)
        else:
            rendered = self._renderer.render(request.frame, new)
        tags = self._format.reasoning
        return Plan(
            parent=parent,
            reason=reason,
            new=new,
            keys=keys,
            rendered=rendered,
            prompt=before.followed_by(rendered.run),
            sampling=Sampling(),
            stop=(),
            reasoning_open=isinstance(tags, ThinkTags) and rendered.tail.rstrip().endswith(tags.open),
            superseded=self._superseded(session, request.conversation, attachment),
        )

    def _superseded(
        self, session: Session, conversation: Conversation, attachment: Attachment
    ) -> tuple[Superseded, ...]:
        """The volatile texts that the recorded prompt does not have as the request asks for them."""
        if attachment.turn is None or not conversation.is_volatile:
            return ()
        matched = conversation.known(0, attachment.num_matched)
        pairs = zip(_recorded(session, attachment.turn), matched, strict=True)
        return tuple(
            difference
            for recorded, known in pairs
            if known.volatile
            for difference in self._volatile.superseded(recorded, known.message)
        )

    def _max_tokens(
        self, sampling: Sampling, request: TurnRequest, num_prompt: int, budget: int | None
    ) -> int:
        """A definite number of tokens to sample.

        Raises:
            ContextOverflow: the prompt, or prompt + `max_tokens`, does not fit.
            LimitReached: not every choice can have a token.
        """
        if budget is not None:  # all choices together must fit
            budget //= request.num_choices
            if not budget:
                raise LimitReached(
                    f"the session has fewer than {request.num_choices} sampled tokens left: too few for `n`"
                )
        asked = sampling.max_tokens
        room = None if self.context_length is None else self.context_length - num_prompt
        if room is not None and room < (1 if request.clamp else asked or 1):
            also = f" and {asked} in the completion" if asked else ""
            raise ContextOverflow(
                f"This model's maximum context length is {self.context_length} tokens. However, your request "
                f"has {num_prompt} tokens in the messages{also}. Please reduce the length of the messages "
                "or completion.",
                num_prompt_tokens=num_prompt,
                context_length=self.context_length,
            )
        limits = [n for n in (asked, budget, room) if n is not None]
        if asked is None and room is None:
            limits.append(self._default_max_tokens)
        return min(limits)


def _merged(first: Sampling, second: Sampling) -> Sampling:
    """`second` over `first`: what it does not give stays."""
    given = {f: value for f in Sampling.__struct_fields__ if (value := getattr(second, f)) not in (None, ())}
    return replace(first, **given) if given else first


def _recorded(session: Session, turn: Turn) -> list[Message]:
    """The messages through a turn as they were recorded: with the reasoning that the agent did not replay."""
    path = session.tree.path(turn.turn_id)
    return [message for one in path for message in (*one.messages, one.reply)]


def _with_recorded_ids(
    new: tuple[Message, ...], keys: Sequence[MessageKey], parent: Turn
) -> tuple[Message, ...]:
    """Tool results under the recorded ids of the calls: agents renumber, templates look up."""
    calls = parent.reply.tool_calls
    out: list[Message] = []
    for position, (message, key) in enumerate(zip(new, keys, strict=True)):
        if message.role == "assistant":  # what follows answers that message's calls
            return (*out, *new[position:])
        if message.role == "tool" and 0 <= key.ordinal < len(calls):
            message = replace(message, tool_call_id=calls[key.ordinal].id)
        out.append(message)
    return tuple(out)
