"""SIGHUP: which settings are followed while the service runs, and how a part follows them.

A part is followed by a function that takes the settings; it is registered with the names of the settings that
it reads, beside where the part is made. All that can fail is read before the first part follows, so a bad
file changes nothing. What is not in `IN_FLIGHT` waits for the next start, and one line of the log names it.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final

from proxy.logs import event
from proxy.settings.sections import KEYS, Settings

LOG: Final = ("log.level", "log.format", "log.access")
CLIENTS: Final = ("metrics.client_header", "metrics.clients")
IN_FLIGHT: Final = frozenset((*LOG, *CLIENTS))
"""The settings that are followed while the service runs."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """What a new configuration means: `settings` are the old ones with those that are followed.

    `followed` and `waiting` name the settings that differ.
    """

    settings: Settings
    followed: tuple[str, ...]
    waiting: tuple[str, ...]


class Following:
    """The settings in force, and the parts that follow them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._parts: list[tuple[frozenset[str], Callable[[Settings], None]]] = []

    def part(self, names: Iterable[str], follow: Callable[[Settings], None]) -> None:
        """Call `follow` with the settings whenever one of these changes. It must not fail."""
        self._parts.append((frozenset(names), follow))

    def plan(self, wanted: Settings) -> Change:
        """Tell what changes if `wanted` is followed; nothing does yet."""
        settings = self.settings
        differ = [name for name, key in KEYS.items() if key.of(wanted) != key.of(settings)]
        followed = tuple(name for name in differ if name in IN_FLIGHT)
        for key in map(KEYS.__getitem__, followed):
            section = replace(getattr(settings, key.section), **{key.name: key.of(wanted)})
            settings = replace(settings, **{key.section: section})
        return Change(settings, followed, tuple(name for name in differ if name not in IN_FLIGHT))

    def take(self, change: Change) -> None:
        """Follow it, and name in the log what waits."""
        self.settings = change.settings
        for names, follow in self._parts:
            if not names.isdisjoint(change.followed):
                follow(change.settings)
        for name in change.waiting:
            event(
                _LOG,
                logging.WARNING,
                "needs-restart",
                setting=name,
                consequence="the value from the last start stays in force until the next one",
            )
