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
from proxy.settings.sections import KEYS, Loaded, Settings

LOG: Final = ("log.level", "log.format", "log.access")
CLIENTS: Final = ("metrics.client_header", "metrics.clients")
IN_FLIGHT: Final = frozenset((*LOG, *CLIENTS))
"""The settings that are followed while the service runs."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """What a new configuration means: `loaded` is the old one with the settings that are followed.

    `followed` and `waiting` name the settings that differ.
    """

    loaded: Loaded
    followed: tuple[str, ...]
    waiting: tuple[str, ...]


class Following:
    """The settings in force, as `loaded`, and the parts that follow them."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._parts: list[tuple[frozenset[str], Callable[[Settings], None]]] = []

    def part(self, names: Iterable[str], follow: Callable[[Settings], None]) -> None:
        """Call `follow` with the settings whenever one of these changes. It must not fail."""
        self._parts.append((frozenset(names), follow))

    def plan(self, wanted: Loaded) -> Change:
        """Tell what changes if `wanted` is followed; nothing does yet."""
        settings = self.loaded.settings
        differ = [name for name, key in KEYS.items() if key.of(wanted.settings) != key.of(settings)]
        followed = tuple(name for name in differ if name in IN_FLIGHT)
        for key in map(KEYS.__getitem__, followed):
            section = replace(getattr(settings, key.section), **{key.name: key.of(wanted.settings)})
            settings = replace(settings, **{key.section: section})
        origins = {**self.loaded.origins, **{name: wanted.origins[name] for name in followed}}
        waiting = tuple(name for name in differ if name not in IN_FLIGHT)
        return Change(Loaded(settings, origins), followed, waiting)

    def take(self, change: Change) -> None:
        """Follow it, and name in the log what waits."""
        self.loaded = change.loaded
        for names, follow in self._parts:
            if not names.isdisjoint(change.followed):
                follow(change.loaded.settings)
        for name in change.waiting:
            event(
                _LOG,
                logging.WARNING,
                "needs-restart",
                setting=name,
                consequence="the value from the last start stays in force until the next one",
            )
