"""How far a run is, on a terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Watch:
    """Counts episodes and shows them; nothing is shown where stderr is no terminal, or not `shown`."""

    def __init__(self, *, shown: bool, total: int | None) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("episodes"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self._task = self._progress.add_task("", total=total)
        self._num_failed = self._num_groups = self._num_rewards = 0
        self._sum_rewards = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def skipped(self, num_episodes: int) -> None:
        """A group was delivered by an earlier driver."""
        self._num_groups += 1
        self._show(num_episodes)

    def finished(self, reward: float | None) -> None:
        """An episode is there, whole."""
        if reward is not None:
            self._num_rewards += 1
            self._sum_rewards += reward
        self._show(1)

    def failed(self) -> None:
        """An attempt has failed."""
        self._num_failed += 1
        self._show(0)

    def ready(self, num_missing: int) -> None:
        """A group waits for its consumer, without so many episodes."""
        self._num_groups += 1
        self._show(num_missing)

    def _show(self, advance: int) -> None:
        words = [f"{self._num_groups} groups"]
        if self._num_rewards:
            words.append(f"mean reward {self._sum_rewards / self._num_rewards:.2f}")
        if self._num_failed:
            words.append(f"{self._num_failed} attempts failed")
        self._progress.update(self._task, advance=advance, description=", ".join(words))
