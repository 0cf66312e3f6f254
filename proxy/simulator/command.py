"""`snapshot-proxy simulate`: the simulator alone, until SIGINT, SIGTERM or SIGHUP."""

import argparse
import asyncio
import inspect
import signal
import ssl
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import orjson

from proxy.simulator import control
from proxy.simulator.faults import Fault, FaultKind
from proxy.simulator.limits import Limits
from proxy.simulator.server import Simulator
from proxy.simulator.world import READ_ONLY, World

_USAGE_ERROR = 2


_CONTROL = f"""\
It prints one line of JSON when it is ready: its url, and its tokens by label.

{inspect.cleandoc(control.__doc__ or "")}

{textwrap.fill(f"Kinds of faults: {', '.join(FaultKind)}.", 100)}
Fields of a fault: {", ".join(field.name for field in fields(Fault) if field.name != "kind")}.

For instance, with the url that it printed:

  curl "$url/_simulator/faults" -d '{{"kind": "status", "status": 503, "times": 3}}'
  curl "$url/_simulator/counters"
  curl -X POST "$url/_simulator/reset"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `run` reads, and say in the help how it is controlled."""
    parser.epilog = _CONTROL
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    limits = Limits()
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address (%(default)s)")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="equal seeds make equal worlds (%(default)s)")
    parser.add_argument(
        "--latency-ms", type=float, default=0.0, help="how long each answer is delayed (%(default)s)"
    )
    parser.add_argument(
        "--per-minute", type=int, default=limits.per_minute, help="burst limit of a token (%(default)s)"
    )
    parser.add_argument(
        "--per-hour", type=int, default=limits.per_hour, help="hourly limit of a token (%(default)s)"
    )
    parser.add_argument(
        "--minute-s", type=float, default=limits.minute_s, help="length of a minute (%(default)s)"
    )
    parser.add_argument("--hour-s", type=float, default=limits.hour_s, help="length of an hour (%(default)s)")
    parser.add_argument("--tls-cert", type=Path, metavar="FILE", help="PEM; with --tls-key: https")
    parser.add_argument("--tls-key", type=Path, metavar="FILE", help="PEM")


async def run(args: argparse.Namespace) -> int:
    """Run until SIGINT, SIGTERM or SIGHUP (a terminal that is closed), then return 0.

    Prints one line of JSON when ready: `{"event": "ready", "url": …, "tokens": {label: value}}`. Three
    tokens, the same for equal seeds: `full` and `reader` (read only, without `tag:read`) of one team,
    `other` of another. Returns 1 where it cannot listen, 2 for arguments that make no sense, each with one
    line on stderr.
    """
    world = World(args.seed)
    tokens = [
        world.token(label="full"),
        world.token(label="reader", scopes=READ_ONLY - {"tag:read"}),
        world.token(label="other", team="other"),
    ]
    try:
        simulator = Simulator(
            world=world,
            limits=Limits(args.per_minute, args.per_hour, args.minute_s, args.hour_s),
            latency_s=args.latency_ms / 1_000,
            ssl_context=_ssl_context(args.tls_cert, args.tls_key),
            host=args.host,
            port=args.port,
        )
    except (OSError, ValueError) as error:
        sys.stderr.write(f"snapshot-proxy simulate: {error}\n")
        return _USAGE_ERROR
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stopped.set)
    try:
        async with simulator:
            ready = {
                "event": "ready",
                "url": simulator.url,
                "tokens": {token.label: token.value for token in tokens},
            }
            sys.stdout.write(orjson.dumps(ready).decode() + "\n")
            sys.stdout.flush()
            await stopped.wait()
    except OSError as error:
        sys.stderr.write(f"snapshot-proxy simulate: cannot listen: {error}\n")
        return 1
    return 0


def _ssl_context(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ValueError("--tls-cert and --tls-key go together")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    return context
