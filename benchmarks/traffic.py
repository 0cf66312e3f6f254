"""What is asked: requests as bytes, in an order that is known in advance, for our own load and for wrk's.

Callers and snapshots are numbers. The snapshots are those of the upstream's list, so that a list fills them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, cycle, islice
from pathlib import Path
from random import Random

from benchmarks.figures import Zipf
from benchmarks.upstream import FIRST, PAGE

HOST = "localhost"

_SPLIT_AT = "\0"
_DONE = """
    done = function(summary)
      local e = summary.errors
      io.write(string.format("figures %d %d %d %d %d %d %d\\n", summary.requests, summary.duration,
               e.status, e.connect, e.read, e.write, e.timeout))
    end
"""


def token(caller: int) -> str:
    """Name the token of a caller."""
    return f"dop_v1_{caller:064x}"


def head(caller: int, name: str, more: str = "") -> str:
    """Write a request for `/v2/snapshots` and `name`, with `more` header lines."""
    line = f"GET /v2/snapshots{name} HTTP/1.1\r\nHost: {HOST}\r\n"
    return f"{line}Authorization: Bearer {token(caller)}\r\n{more}\r\n"


def single(caller: int, snapshot: int) -> bytes:
    """Ask for one snapshot."""
    return head(caller, f"/{FIRST + snapshot}").encode()


def document(caller: int, size: int) -> bytes:
    """Ask for a document of another collection that has so many bytes."""
    return single(caller, 0).replace(b"/v2/snapshots/%d" % FIRST, b"/v2/droplets/%d" % size)


@dataclass(frozen=True, slots=True)
class Cycled:
    """Prepared requests, from a place on, again and again."""

    requests: Sequence[bytes]
    start: int = 0

    def __iter__(self) -> Iterator[bytes]:
        return islice(cycle(self.requests), self.start, None)

    def script(self, directory: Path) -> str:
        """Write what wrk needs in `directory`, and give its script. One request is wrk's fastest case."""
        if len(self.requests) == 1:
            line, *headers = self.requests[0].decode().rstrip("\r\n").split("\r\n")
            pairs = (header.split(": ", 1) for header in headers)
            return f'wrk.path = "{line.split(" ")[1]}"\n' + "\n".join(
                f'wrk.headers["{name}"] = "{value}"' for name, value in pairs
            )
        path = directory / "requests"
        path.write_bytes(_SPLIT_AT.encode().join(self.requests))
        return f"""
    local all, at = {{}}, {self.start % len(self.requests)}
    local file = io.open("{path}", "rb")
    for each in file:read("*a"):gmatch("[^%z]+") do all[#all + 1] = each end
    file:close()
    local number = #all
    request = function()
      at = at % number + 1
      return all[at]
    end"""


@dataclass(frozen=True, slots=True)
class Numbered:
    """One request with a number in it, which is another each time."""

    before: str
    after: str
    first: int

    def __iter__(self) -> Iterator[bytes]:
        return (f"{self.before}{number}{self.after}".encode() for number in count(self.first))

    def script(self, directory: Path) -> str:
        """Give wrk's script."""
        del directory
        before, after = (text.replace("\r\n", "\\r\\n") for text in (self.before, self.after))
        return f"""
    local number, before, after = {self.first - 1}, "{before}", "{after}"
    local write = string.format
    request = function()
      number = number + 1
      return write("%s%.0f%s", before, number, after)
    end"""


Traffic = Cycled | Numbered


def wrk_script(traffic: Traffic, directory: Path) -> str:
    """Give the whole script: the requests, and a line of figures at the end."""
    return traffic.script(directory) + _DONE


# -- the loads -------------------------------------------------------------------------------------

_FRESH = count(1)
_A_LOT = 10_000_000


def identical() -> Cycled:
    """Ask for one snapshot with one token, always."""
    return Cycled([single(0, 0)])


def another_request_id() -> Traffic:
    """Ask for one snapshot with one token, each time with another request id: no two requests are equal."""
    before, after = head(0, f"/{FIRST}", "X-Request-Id: request-@\r\n").split("@")
    return Numbered(before, after, next(_FRESH) * _A_LOT)


def misses() -> Traffic:
    """Ask for another snapshot each time."""
    before, after = head(0, "/@").split("@")
    return Numbered(before, after, next(_FRESH) * _A_LOT)


def zipf(callers: int, snapshots: int, length: int) -> list[bytes]:
    """Draw callers and snapshots by Zipf's law. The same each time."""
    chance = Random(1)  # noqa: S311 # the same requests for all servers, and in each run
    who, what = Zipf(callers, chance), Zipf(snapshots, chance)
    ask = cache(single)
    return [ask(who.draw(), what.draw()) for _ in range(length)]


def uniform(callers: int, snapshots: int, length: int) -> list[bytes]:
    """Draw callers and snapshots, each as often as the other. The same each time."""
    chance = Random(1)  # noqa: S311 # the same
    ask = cache(single)
    return [ask(chance.randrange(callers), chance.randrange(snapshots)) for _ in range(length)]


def lists(callers: int, snapshots: int) -> Iterator[bytes]:
    """Ask for every snapshot of every caller by lists: each of them fills as many as one page has."""
    size = min(PAGE, snapshots)
    pages = range(1, -(-snapshots // size) + 1)
    return (
        head(caller, f"?page={page}&per_page={size}").encode() for caller in range(callers) for page in pages
    )


def own_lists(callers: int, snapshots: int) -> Iterator[bytes]:
    """Ask for the snapshots of callers each of whom sees others: one page each."""
    return (head(caller, f"?page={caller + 1}&per_page={snapshots}").encode() for caller in range(callers))


def own(callers: int, snapshots: int, length: int) -> list[bytes]:
    """Draw callers and what such a list brought them, each as often as the other. The same each time."""
    chance = Random(1)  # noqa: S311 # the same
    drawn = (chance.randrange(callers * snapshots) for _ in range(length))
    return [single(number // snapshots, number) for number in drawn]
