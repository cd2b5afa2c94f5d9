"""Text on its way out: cut at stop strings, its last spaces held until more follows."""

from dataclasses import dataclass, field

from tokentape.parse.source import Marks


class StopCutter:
    """Passes text on up to the stop string whose last character comes first: that one stopped the engine."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._marks = [Marks((stop,)) for stop in self._stops]
        self._held: str = ""
        self.stopped = False

    def feed(self, text: str, *, final: bool) -> str:
        """The text that is certain to stand before any stop string."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return text[: min(matches)[1]]
        num_held = 0 if final else max(mark.num_partial(text, 0) for mark in self._marks)
        end = len(text) - num_held
        self._held = text[end:]
        return text[:end]


@dataclass(slots=True)
class Trimmed:
    """Text whose last spaces are held until it is known that more follows."""

    spaces: str
    parts: list[str] = field(default_factory=list[str])
    held: list[str] = field(default_factory=list[str])

    def push(self, text: str, *, trim_left: bool) -> str:
        """Take `text`, return what may be shown. `trim_left`: spaces at the very beginning do not count."""
        body = text.rstrip(self.spaces) if self.spaces else text
        if not body:
            self.held.append(text)
            return ""
        shown = "".join(self.held) + body
        if trim_left and not self.parts and self.spaces:
            shown = shown.lstrip(self.spaces)
        self.held = [text[len(body) :]]
        self.parts.append(shown)
        return shown

    def release(self) -> str:
        """Show the held spaces too: nothing follows, and they belong to the text."""
        shown = "".join(self.held)
        self.held = []
        self.parts.append(shown)
        return shown
