"""Log lines: their two forms, and that no value of a third party ever gets into one."""

import asyncio
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from aiohttp import web

from proxy import logs

TOKEN = "dop_v1_0123456789abcdef"
FORMS = ["json", "text"]
ours = logging.getLogger("proxy.test_logs")
theirs = logging.getLogger("aiohttp.server")


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give logging and warnings back to pytest."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers[:])
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    level = root.level
    yield
    root.setLevel(level)


def lines(text: str) -> list[dict[str, Any]]:
    """Parse JSON lines."""
    return [json.loads(line) for line in text.splitlines()]


def fail() -> None:
    """Raise an error that holds a token."""
    raise LookupError(TOKEN)


def failure() -> LookupError:
    """Give an error that was raised two functions deep."""
    try:
        fail()
    except LookupError as error:
        return error
    raise AssertionError


def record(name: str, message: object, *args: object, **attributes: object) -> logging.LogRecord:
    """Make a record of this file's line 7, at a quarter past the second."""
    made = logging.LogRecord(name, logging.ERROR, __file__, 7, message, args, None, "func")
    made.created = 1_767_225_600.25
    vars(made).update(attributes)
    return made


# -- our own events ----------------------------------------------------------------------------


def test_event_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """An event is one JSON object: time in UTC with milliseconds, level, event, then its fields."""
    logs.configure("info", "json")
    logs.event(ours, logging.INFO, "ready", api="http://127.0.0.1:8080", took_s=0.5, ids=[1, None])
    (line,) = lines(capsys.readouterr().err)
    assert list(line) == ["time", "level", "event", "api", "took_s", "ids"]
    assert line | {"time": ""} == {
        "time": "",
        "level": "info",
        "event": "ready",
        "api": "http://127.0.0.1:8080",
        "took_s": 0.5,
        "ids": [1, None],
    }


@pytest.mark.parametrize(
    ("write", "fields", "expected"),
    [
        pytest.param(
            logs._json,
            {"a": "b"},
            '{"time":"2026-01-01T00:00:00.250Z","level":"error","event":"crashed","a":"b"}',
            id="json",
        ),
        pytest.param(
            logs._json,
            {"time": 1, "level": 2, "event": 3},
            '{"time":"2026-01-01T00:00:00.250Z","level":"error","event":"crashed"}',
            id="fields-replace-no-fact",
        ),
        pytest.param(
            logs._json,
            {"a": object(), "b": b"x"},
            '{"time":"2026-01-01T00:00:00.250Z","level":"error","event":"crashed","a":"object","b":"bytes"}',
            id="other-types-by-name",
        ),
        pytest.param(
            logs._json,
            {"a": 1 << 64},
            '{"time":"2026-01-01T00:00:00.250Z","level":"error","event":"unloggable","at":"FILE:7:func"}',
            id="what-json-cannot-hold",
        ),
        pytest.param(
            logs._text,
            {"url": "http://h:1/", "n": 3, "s": 'a "b"\n', "o": object(), "empty": "", "esc": "\x9b"},
            '2026-01-01T00:00:00.250Z error   crashed url=http://h:1/ n=3 s="a \\"b\\"\\n" o="object"'
            ' empty="" esc="\\u009b"',
            id="text",
        ),
    ],
)
def test_line(write: Callable[[logs.Line], str], fields: dict[str, object], expected: str) -> None:
    """The same facts in both forms; a line is always one line, and always comes out."""
    line = logs.Formatter(write).format(record("proxy.x", "crashed", fields=fields))
    assert line == expected.replace("FILE", "tests/test_logs.py")


@pytest.mark.parametrize("form", FORMS)
def test_own_exception(capsys: pytest.CaptureFixture[str], form: str) -> None:
    """Of an exception only the type and the places are told: its message may hold anything."""
    logs.configure("info", form)
    logs.event(ours, logging.ERROR, "crashed", exc=failure())
    text = capsys.readouterr().err
    assert TOKEN not in text
    assert "LookupError" in text
    assert len(text.splitlines()) == 1
    assert re.search(r'\["tests/test_logs\.py:\d+:failure", ?"tests/test_logs\.py:\d+:fail"\]', text)


def test_plain_messages_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """A message with arguments is an event too; one that does not fit its arguments is told by place."""
    logs.configure("info", "json")
    ours.info("%d entries", 3)
    ours.info("%d entries", TOKEN)
    text = capsys.readouterr().err
    good, bad = lines(text)
    assert good["event"] == "3 entries"
    assert bad["event"] == "unloggable"
    assert bad["at"].endswith(":test_plain_messages_of_ours")
    assert TOKEN not in text


def test_level(capsys: pytest.CaptureFixture[str]) -> None:
    """What is below the level is not logged, and `configure` can be called again."""
    logs.configure("debug", "json")
    logs.configure("warning", "json")
    logs.event(ours, logging.INFO, "quiet")
    logs.event(ours, logging.WARNING, "loud")
    assert [line["event"] for line in lines(capsys.readouterr().err)] == ["loud"]


# -- everybody else ----------------------------------------------------------------------------


@pytest.mark.G7
def test_arguments_of_others_are_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The format string that stands in the source is printed, the arguments and the error's text are not."""
    logs.configure("info", "json")
    theirs.error("Error handling request from %s", TOKEN, exc_info=failure())
    (line,) = lines(capsys.readouterr().err)
    assert line.pop("at").endswith(":test_arguments_of_others_are_not_printed")
    assert line.pop("time")
    assert line == {
        "level": "error",
        "event": "library",
        "logger": "aiohttp.server",
        "message": "Error handling request from %s",
        "error": "LookupError",
    }


@pytest.mark.G7
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("message", "args"),
    [
        pytest.param(f"headers {TOKEN}", (), id="formatted-before"),
        pytest.param(f"{TOKEN} %s", (1,), id="formatted-with-arguments"),
        pytest.param("%(token)s", ({"token": TOKEN},), id="mapping"),
        pytest.param("%d", (TOKEN,), id="arguments-that-do-not-fit"),
        pytest.param(ValueError(TOKEN), (), id="an-object"),
        pytest.param(TOKEN[4:], (), id="a-piece"),
    ],
)
def test_no_token_in_lines_of_others(
    capsys: pytest.CaptureFixture[str], message: object, args: tuple[object, ...], form: str
) -> None:
    """However a library puts a token into its message, it is not in ours."""
    logs.configure("info", form)
    theirs.error(message, *args, exc_info=failure(), stack_info=True)
    logging.getLogger().error(message, *args)
    logging.getLogger("proxyish").error(message, *args)
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 3
    assert TOKEN[4:] not in text


@pytest.mark.G7
async def test_no_token_in_lines_of_aiohttp(capsys: pytest.CaptureFixture[str]) -> None:
    """A malformed header, which aiohttp logs with its value, is a line without it."""
    logs.configure("debug", "json")

    async def never(_request: web.BaseRequest) -> web.Response:
        raise AssertionError

    loop = asyncio.get_running_loop()
    service = web.Server(never)
    listener = await loop.create_server(service, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + TOKEN.encode() + b"\x00\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    listener.close()
    await service.shutdown()
    text = capsys.readouterr().err
    assert TOKEN.encode() in answer  # it is the edge that has to keep it out of there
    assert TOKEN not in text
    assert [line["message"] for line in lines(text) if line["logger"] == "aiohttp.server"] == [
        "Error handling request from %s"
    ]


def test_unknown_source() -> None:
    """A message from a file that cannot be read is told by its place alone."""
    line = logs.Formatter(logs._json).format(
        record("x", "literal", pathname="/lib/pkg/gone.py", funcName=None)
    )
    assert json.loads(line) == {
        "time": "2026-01-01T00:00:00.250Z",
        "level": "error",
        "event": "library",
        "logger": "x",
        "at": "pkg/gone.py:7",
    }


def test_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    """A warning is logged with category and place, without its text."""
    logs.configure("info", "json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"unclosed <{TOKEN}>", ResourceWarning, stacklevel=1)
    text = capsys.readouterr().err
    (line,) = lines(text)
    assert line["event"] == "python_warning"
    assert line["category"] == "ResourceWarning"
    assert line["at"].startswith("tests/test_logs.py:")
    assert TOKEN not in text


async def test_loop_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """What a callback raises is logged by type and place, without the callback's arguments."""
    logs.configure("info", "json")
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(logs.on_loop_error)
    done = loop.create_future()

    def callback(_argument: str) -> None:
        done.set_result(None)
        fail()

    loop.call_soon(callback, TOKEN)
    await done
    text = capsys.readouterr().err
    (line,) = lines(text)
    assert (line["event"], line["error"]) == ("loop_error", "LookupError")
    assert line["traceback"][-1].endswith(":fail")
    assert TOKEN not in text
