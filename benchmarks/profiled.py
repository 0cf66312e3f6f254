"""`snapshot-proxy` under cProfile, from SIGUSR1 to SIGUSR2: `python -m benchmarks.profiled FILE serve ...`.

So that neither the start nor the filling of its cache is among the figures, which go to `FILE`.
"""

import asyncio
import signal
import sys
from collections.abc import Callable
from cProfile import Profile

from proxy import serve
from proxy.cli import main
from proxy.settings.sections import Settings

_serve = serve.serve


async def profiled(settings: Settings, load_again: Callable[[], Settings]) -> int:
    """Run the service. The event loop is told of the signals: uvloop keeps them from handlers of Python's."""
    profile, loop = Profile(), asyncio.get_running_loop()

    def stop() -> None:
        profile.disable()
        profile.dump_stats(sys.argv[1])

    loop.add_signal_handler(signal.SIGUSR1, profile.enable)
    loop.add_signal_handler(signal.SIGUSR2, stop)
    return await _serve(settings, load_again)


if __name__ == "__main__":
    serve.serve = profiled
    sys.exit(main(sys.argv[2:]))
