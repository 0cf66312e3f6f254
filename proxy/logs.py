"""Log lines on stderr: one JSON object, or one line for people.

Its law is that no line can hold a token. Our own loggers, below `proxy.`, say what they mean to say;
of an exception only its type and places are printed, never its message. What other loggers say may
hold anything (aiohttp prints header lines, asyncio the arguments of callbacks, redis-py server
replies), so of them only what is in the source code is printed: the place, and a message that is a
literal there, without its arguments.
"""

import json
import linecache
import logging
import re
import traceback
import warnings
from asyncio import AbstractEventLoop
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any, Final, TextIO

import orjson

_OURS: Final = "proxy"
_log: Final = logging.getLogger(__name__)

Line = dict[str, object]


def configure(level: str, form: str) -> None:
    """Send all loggers and `warnings` to stderr, and nowhere else.

    `level` is `debug`, `info`, `warning` or `error`; `form` is `json` or `text`. Calling it again
    replaces what an earlier call did.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(_json if form == "json" else _text))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.raiseExceptions = False  # it would print the arguments of a record that cannot be written
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line shows these
    warnings.showwarning = _on_warning


def event(
    logger: logging.Logger, level: int, name: str, /, *, exc: BaseException | None = None, **fields: object
) -> None:
    """Log that `name` happened, with `fields`, which must never hold a token.

    `exc` adds `error`, the exception's type, and `traceback`, its places, outermost first.
    """
    if logger.isEnabledFor(level):
        told = None if exc is None else (type(exc), exc, exc.__traceback__)
        # Not `logger.log`, which looks for the line of the caller: no line of ours shows it.
        logger.handle(logger.makeRecord(logger.name, level, "", 0, name, (), told, extra={"fields": fields}))


def announce(logger: logging.Logger, name: str, /, **fields: object) -> None:
    """Log a step of the service's life at level info, whatever level is configured: others wait for it."""
    logger.handle(
        logger.makeRecord(logger.name, logging.INFO, "", 0, name, (), None, extra={"fields": fields})
    )


def on_loop_error(_loop: AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what no task caught; give it to `loop.set_exception_handler`.

    asyncio's own handler makes one text of message, callback arguments and exception: none of it
    could be printed.
    """
    event(_log, logging.ERROR, "loop_error", exc=context.get("exception"))


class Formatter(logging.Formatter):
    """Make a line of a record, by `write`. Never raises: else the line says where it was logged."""

    def __init__(self, write: Callable[[Line], str]) -> None:
        super().__init__()
        self._write = write
        self._second, self._date = 0, ""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line, without its end."""
        head: Line = {"time": self._time(record.created), "level": record.levelname.lower()}
        describe = _ours if f"{record.name}.".startswith(f"{_OURS}.") else _theirs
        try:
            return self._write({**head, **describe(record), **head})
        except Exception:  # noqa: BLE001 -- a value of any type may fail in any way, and logging must not
            return self._write(head | {"event": "unloggable", "at": _place(*_origin(record))})

    def _time(self, at: float) -> str:
        """Write a time in milliseconds; its date and second are written once for all lines of a second."""
        second, ms = divmod(int(at * 1000), 1000)
        if second != self._second:
            self._second, self._date = second, datetime.fromtimestamp(second, UTC).isoformat()[:-6]
        return f"{self._date}.{ms:03d}Z"


def _ours(record: logging.LogRecord) -> Line:
    name: Line = {"event": record.getMessage()}
    line = {**name, **getattr(record, "fields", {}), **name}
    if (error := _error(record)) is not None:
        line["error"] = _type_name(error)
        line["traceback"] = [
            _place(frame.f_code.co_filename, number, frame.f_code.co_name)
            for frame, number in traceback.walk_tb(error.__traceback__)
        ]
    return line


def _theirs(record: logging.LogRecord) -> Line:
    line: Line = {"event": "library", "logger": record.name, "at": _place(*_origin(record))}
    if _is_literal(record.msg, record.pathname):
        line["message"] = record.msg
    if (error := _error(record)) is not None:
        line["error"] = _type_name(error)
    return line


def _is_literal(message: object, path: str) -> bool:
    """Tell whether the source file has `message` between quotes, so that it cannot hold data."""
    source = "".join(linecache.getlines(path))
    return isinstance(message, str) and (f'"{message}"' in source or f"'{message}'" in source)


def _on_warning(  # noqa: PLR0917 -- the signature of `warnings.showwarning`
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Log category and place of a warning. Its text can hold the `repr` of anything."""
    del message, file, line
    event(_log, logging.WARNING, "python_warning", category=category.__name__, at=_place(filename, lineno))


def _error(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


def _origin(record: logging.LogRecord) -> tuple[str, int, str]:
    return record.pathname, record.lineno, record.funcName or ""


def _place(path: str, number: int, function: str = "") -> str:
    """`package/module.py:line:function`: the last folder tells which package, the rest is the machine's."""
    return ":".join(filter(None, ["/".join(PurePath(path).parts[-2:]), str(number), function]))


def _json(line: Line) -> str:
    return orjson.dumps(line, default=_type_name).decode()


def _text(line: Line) -> str:
    time, level, name, *rest = line
    facts = [f"{key}={_word(line[key])}" for key in rest]
    return " ".join([str(line[time]), f"{line[level]!s:7}", _word(line[name]), *facts])


def _word(value: object) -> str:
    """Give text as it is where it is clear, else JSON in ASCII, which no terminal obeys."""
    if isinstance(value, str) and re.fullmatch(r"[!#-<>-Z^-z|~-]+", value):
        return value
    return json.dumps(value, default=_type_name)


def _type_name(value: object) -> str:
    return type(value).__qualname__
