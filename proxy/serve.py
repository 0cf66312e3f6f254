"""The service as a process: signals in, exit status out."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable

from proxy import logs
from proxy.app import App
from proxy.core.collections import undocumented
from proxy.core.errors import SettingsError
from proxy.settings.sections import Loaded, Settings
from proxy.storage.embedded import EmbeddedServerError
from proxy.system.activation import take_sockets
from proxy.system.start import StartError
from proxy.tracing.start import start_tracing

_MEND = "snapshot-proxy check, with the same configuration, says how to mend it"
_YOUNG_OBJECTS, _YOUNG_COLLECTIONS = 10_000, 20
"""Python's own 700 and 10 look at what a miss makes while it is used: a twentieth of its time. Most of that
goes without the collector, by its reference counts."""

_LOG = logging.getLogger(__name__)


async def serve(loaded: Loaded, load_again: Callable[[], Loaded]) -> int:
    """Run until SIGTERM (lame duck, then drain) or SIGINT (drain at once); a second signal ends it now.

    At SIGHUP the settings that `load_again` gives are followed, as far as they can be while it runs.
    Gives the exit status: 0 after a signal, 1 where it could not start.
    """
    settings = loaded.settings
    logs.configure(settings.log.level, settings.log.format)
    _warn_of_collections(settings)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(logs.on_loop_error)
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, signals.put_nowait, number)
    hangups: asyncio.Queue[None] = asyncio.Queue()
    loop.add_signal_handler(signal.SIGHUP, hangups.put_nowait, None)

    try:
        app = App(
            settings,
            origins=loaded.origins,
            handed=take_sockets(os.environ, pid=os.getpid()),
            tracing=start_tracing(os.environ),
        )
        await app.start()
    except (StartError, EmbeddedServerError) as error:
        logs.event(_LOG, logging.ERROR, "cannot-start", cause=str(error), mend=_MEND)
        return 1
    except OSError as error:
        cause = error.strerror or type(error).__name__
        logs.event(_LOG, logging.ERROR, "cannot-start", cause=cause, mend=_MEND)
        return 1

    gc.set_threshold(_YOUNG_OBJECTS, _YOUNG_COLLECTIONS)
    gc.freeze()  # what the start made lives as long as the process: no collection looks at it again
    following = asyncio.create_task(_follow(hangups, app, load_again))
    first = await signals.get()
    following.cancel()  # what it reads again is for requests that no longer come
    stopping = asyncio.create_task(app.stop(lame_duck=first is signal.SIGTERM))
    second = asyncio.create_task(signals.get())
    await asyncio.wait([stopping, second], return_when=asyncio.FIRST_COMPLETED)
    if not stopping.done():
        stopping.cancel()  # it may be in the lame duck, without a request to wait for
        await app.kill()
    second.cancel()
    await asyncio.gather(following, stopping, second, return_exceptions=True)
    return 0


def _warn_of_collections(settings: Settings) -> None:
    """Name in the log the cached collections that the API's documentation does not have."""
    for name, nearest in undocumented(settings.cache.collections):
        logs.event(
            _LOG,
            logging.WARNING,
            "unknown-collection",
            setting="cache.collections",
            name=name,
            nearest=nearest,
            consequence="it caches nothing, unless the API has that collection by now",
        )


async def _follow(hangups: "asyncio.Queue[None]", app: App, load_again: Callable[[], Loaded]) -> None:
    """Read again at each SIGHUP what can be read again; what cannot be read or used changes nothing."""
    while True:
        await hangups.get()
        try:
            app.reload(load_again())
        except (SettingsError, OSError) as error:  # OSError: a folder may not be looked into any more
            cause = str(error) if isinstance(error, SettingsError) else error.strerror
            logs.event(_LOG, logging.WARNING, "not-reloaded", cause=cause, consequence="nothing changed")
