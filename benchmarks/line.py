"""In which order processes do the cells of a grid."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable

from .task import Task


class Line:
    """Which task a process does next: of the problem that it has at hand, so that problem and truth are worked out
    once; else of one that no other process is at; else where most is left. The dearest come first, so that a run ends
    with what is short, and equals in the order in which they were given."""

    def __init__(self, todo: Iterable[Task]) -> None:
        self._lock = threading.Lock()
        self._left: dict[tuple[str, str], deque[Task]] = defaultdict(deque)
        self._hands: Counter[tuple[str, str]] = Counter()
        for task in sorted(todo, key=_size, reverse=True):
            self._left[_place(task)].append(task)

    def next(self, last: Task | None) -> Task | None:
        """The next for the process that has done `last`; None at the end."""
        with self._lock:
            before = _place(last) if last is not None else None
            left = {place: tasks for place, tasks in self._left.items() if tasks}
            if not left:
                return None
            if before in left:
                return left[before].popleft()
            if before is not None:
                self._hands[before] -= 1
            place = min(left, key=lambda place: (self._hands[place], -sum(map(_size, left[place]))))
            self._hands[place] += 1
            return left[place].popleft()


def _place(task: Task) -> tuple[str, str]:
    """What cells have in common that a process keeps from one to the next."""
    return task.cell.problem, task.theta


def _size(task: Task) -> float:
    """A guess of what it costs, by which to order: a budget of its own, or of seconds, counts as a large one."""
    return task.cell.budget.calls or 1e5
