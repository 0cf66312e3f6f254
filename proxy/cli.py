"""The command line. Exit status: 0 fine, 1 runtime failure, 2 bad configuration or usage."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from proxy import __version__
from proxy.core.errors import SettingsError
from proxy.settings.load import check_files, load
from proxy.settings.sections import Loaded
from proxy.settings.show import to_toml
from proxy.system import process

FINE, FAILED, MISUSED = 0, 1, 2

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and give its exit status."""
    process.open_missing()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(simulating=arguments[:1] == ["simulate"])
    if not arguments:
        parser.print_help(sys.stderr)
        return MISUSED
    args = parser.parse_args(arguments)
    command: Command = args.command
    try:
        return command(args)
    except SettingsError as error:
        print(f"snapshot-proxy: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        return FINE if command in UNTIL_INTERRUPTED else FAILED
    except BrokenPipeError:  # the reader has closed the pipe: `snapshot-proxy config | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at its end
        return FAILED
    except Exception as error:  # noqa: BLE001 # the last line of defence: Python's own traceback shows messages
        _report(error)
        return FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one line, where argparse would repeat the usage."""
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(MISUSED)


class _Once(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, _: object = None
    ) -> None:
        """Refuse a second value, where argparse would forget the first: one was to be purged, too."""
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {self.option_strings[0]}: give it once")
        setattr(namespace, self.dest, values)


def _parser(*, simulating: bool) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="snapshot-proxy", description="A caching read-through proxy for DigitalOcean's snapshot API."
    )
    parser.add_argument("--version", action="version", version=f"snapshot-proxy {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
        )
        added.set_defaults(command=command)
        return added

    configured = [
        add("serve", _serve, "run the service"),
        add("check", _check, "say what would keep the service from working well, and how to mend it"),
        add("config", _config, "print the effective configuration and where each value came from"),
        add("healthcheck", _healthcheck, "ask the running service whether it lives"),
    ]
    purge = add("purge", _purge, "purge entries from the cache of every replica, through the admin listener")
    which = purge.add_mutually_exclusive_group(required=True)
    which.add_argument("ids", nargs="*", default=[], metavar="ID", type=_snapshot_id, help="a snapshot")
    which.add_argument(
        "--collection", metavar="NAME", action=_Once, help="all documents of a collection of the API"
    )
    which.add_argument("--all", action="store_true", help="everything")
    purge.add_argument(
        "--soft", action="store_true", help="make it stale and not gone: it still covers an outage"
    )
    for one in [*configured, purge]:
        one.add_argument("--config", metavar="FILE", help="the configuration, TOML")
        one.add_argument(
            "--set",
            metavar="SECTION.KEY=VALUE",
            action="append",
            default=[],
            dest="overrides",
            help="one setting; may be given several times, and wins over environment and file",
        )
    demo = add("demo", _demo, "show the main job on this machine, with a simulator of the API")
    demo.add_argument("--once", action="store_true", help="end after the transcript")
    simulate = add("simulate", _simulate, "run a simulator of DigitalOcean's snapshot API")
    if simulating:
        _simulator_arguments(simulate)
    return parser


def _snapshot_id(text: str) -> str:
    from proxy.core.resources import cached_id

    if cached_id(text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r}: must be a number or a UUID")


def _load(args: argparse.Namespace) -> Loaded:
    loaded = load(config_file=args.config, overrides=args.overrides, environ=os.environ)
    check_files(loaded)
    return loaded


def _load_again(args: argparse.Namespace) -> Loaded:
    """Load what `_load` loaded; files with secrets are read once only, at the start."""
    if args.config is not None and Path(args.config).exists() and not Path(args.config).is_file():
        raise SettingsError(f"file {args.config}: is no regular file, and cannot be read a second time")
    return load(config_file=args.config, overrides=args.overrides, environ=os.environ)


def _run(work: Coroutine[Any, Any, int]) -> int:
    """Run on uvloop where the extra `fast` is installed, else on asyncio's own loop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


def _report(error: Exception) -> None:
    """Log a bug of ours in one line: its type and its places. What it says might be a token."""
    from proxy import logs

    if not logging.getLogger().handlers:
        logs.configure("error", "text")
    logs.event(logging.getLogger(__name__), logging.ERROR, "bug", exc=error)


# -- commands ----------------------------------------------------------------------------------
# Each imports what it needs: a health check runs every few seconds, and should not load a server.


def _serve(args: argparse.Namespace) -> int:
    process.ignore_signals()
    from proxy import serve

    return _run(serve.serve(_load(args), partial(_load_again, args)))


def _check(args: argparse.Namespace) -> int:
    from proxy import check

    return _run(check.check(_load(args).settings))


def _config(args: argparse.Namespace) -> int:
    sys.stdout.write(to_toml(_load(args)))
    return FINE


def _healthcheck(args: argparse.Namespace) -> int:
    from proxy.admin import client

    loaded = load(config_file=args.config, overrides=args.overrides, environ=os.environ)
    return client.healthcheck(loaded.settings.admin)


def _purge(args: argparse.Namespace) -> int:
    from proxy.admin import client

    loaded = load(config_file=args.config, overrides=args.overrides, environ=os.environ)
    if args.collection is not None:
        return client.purge(loaded.settings.admin, {"collection": args.collection}, soft=args.soft)
    what = {"ids": args.ids} if args.ids else {"all": True}
    return client.purge(loaded.settings.admin, what, soft=args.soft)


def _demo(args: argparse.Namespace) -> int:
    process.ignore_signals()
    from proxy import demo

    return _run(demo.demo(once=args.once))


def _simulate(args: argparse.Namespace) -> int:
    process.ignore_signals()
    from proxy.simulator import command

    return _run(command.run(args))


def _simulator_arguments(parser: argparse.ArgumentParser) -> None:
    from proxy.simulator import command

    command.add_arguments(parser)


UNTIL_INTERRUPTED = frozenset({_serve, _demo, _simulate})
"""What runs until Ctrl-C has done its job then; the others have not given their answer."""
