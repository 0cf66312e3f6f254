"""JSON documents of the upstream: read within bounds, and written so that no number changes.

Numbers keep value and kind. orjson keeps every integer of 64 bits and every number of at most fifteen
significant digits exactly; a document with a longer number takes the slower way through `_parse_exactly`.

Both run on the event loop, so a document that would stop it for long is rejected. With the bounds below, and
that of `snapshot.py`, the worst of 2 MiB takes 20 ms: `python -m benchmarks.documents`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal, DecimalException
from types import MappingProxyType
from typing import Any, NamedTuple

import orjson

from proxy.core.errors import UpstreamInvalid
from proxy.core.events import EnumField

MOST_VALUES = 20_000
"""Values in one document: 100 for each snapshot of the longest page that the API documents (200). A snapshot
with 20 regions and 20 tags counts 50."""

MOST_DOCUMENT_VALUES = 200_000
"""Values in a document that is only written again. A Droplet counts some 150: a page of 200 has 30,000."""

MOST_LONG_NUMBERS = 1_000
"""Numbers in one document that a double may not hold: five for each snapshot of the longest page. Each takes
some 6 µs, however short it is."""

MOST_DIGITS = 1_000
"""Characters of such a number: each takes some 10 ns."""

# `_SHAPE` turns a document into one that is quick to search: each digit and point is a 0, each E an e, and
# each `,`, `[` and `{` a comma, of which every value has one in front. Signs are left out.
_SHAPE = bytes.maketrans(b"123456789.E[{", b"0000000000e,,")
# A number that a double may not hold has sixteen digits or an exponent of three. Some texts look so, too.
_LONG_NUMBERS = (b"0" * 16, b"0e000")
_LONGEST_INTEGER = 20  # characters of a 64-bit integer
_SHORT_FRACTION = 16  # characters of fifteen digits and a point


class Normalized(NamedTuple):
    """A document's normalized body. `unknown` names a field once for each value beyond the documented ones.

    `seeds` are the snapshots in a list, by id: each the body that a single read of it has.
    """

    body: bytes
    unknown: tuple[EnumField, ...] = ()
    seeds: Mapping[str, bytes] = MappingProxyType({})


def parse(body: bytes, most_values: int = MOST_VALUES) -> Any:
    """Parse JSON of at most `most_values` values. A number that orjson would change becomes an `Exact`."""
    shape = body.translate(_SHAPE, b"+-")
    if shape.count(b",") > most_values:
        raise UpstreamInvalid(f"it holds more than {most_values:,} values")
    if any(number in shape for number in _LONG_NUMBERS):
        return _parse_exactly(body)
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        raise UpstreamInvalid("it is not JSON") from None


def write_sorted(value: Any) -> bytes:
    """Write JSON with the keys of each object in one order."""
    return write(value, orjson.OPT_SORT_KEYS)


def write(value: Any, option: int = 0) -> bytes:
    """Write JSON; `option` is orjson's."""
    try:
        return orjson.dumps(value, default=_literal, option=option | orjson.OPT_PASSTHROUGH_DATACLASS)
    except TypeError:  # orjson writes 254 levels, and no lone surrogates
        raise UpstreamInvalid("it is nested too deeply or not Unicode") from None


@dataclass(frozen=True, slots=True)
class Exact:
    """A JSON number with more digits, or a larger exponent, than orjson keeps."""

    literal: str
    integer: bool


def _literal(number: Exact) -> orjson.Fragment:
    return orjson.Fragment(number.literal)


def _parse_exactly(body: bytes) -> Any:
    numbers = _Numbers()
    try:
        return json.loads(
            body.decode(),
            parse_int=numbers.integer,
            parse_float=numbers.fraction,
            parse_constant=_refuse_constant,
        )
    except (ValueError, RecursionError, DecimalException):
        raise UpstreamInvalid("it is not JSON") from None


def _refuse_constant(name: str) -> Any:
    """JSON has no NaN and no Infinity; Python's parser takes them."""
    raise ValueError(name)


class _Numbers:
    """Reads the numbers of one document: as Python does where that keeps them, else as `Exact`."""

    def __init__(self) -> None:
        self._long = 0

    def integer(self, digits: str) -> int | Exact:
        """Read a number without point and exponent."""
        if len(digits) <= _LONGEST_INTEGER and -(2**63) <= (value := int(digits)) < 2**64:
            return value
        self._count(digits)
        return Exact(digits, integer=True)

    def fraction(self, digits: str) -> float | Exact:
        """Read a number with a point or an exponent."""
        if len(digits) <= _SHORT_FRACTION and "e" not in digits and "E" not in digits:
            return float(digits)
        self._count(digits)
        value, exact = float(digits), Decimal(digits)
        if math.isfinite(value) and Decimal(repr(value)) == exact:
            return value
        # Without zeros at its end: 1.50 and 1.5 are one number.
        literal = str(exact.normalize(Context(prec=len(digits), Emax=MAX_EMAX, Emin=MIN_EMIN)))
        return Exact(literal if "." in literal or "E" in literal else literal + ".0", integer=False)

    def _count(self, digits: str) -> None:
        if len(digits) > MOST_DIGITS:
            raise UpstreamInvalid(f"it holds a number of more than {MOST_DIGITS:,} digits")
        self._long += 1
        if self._long > MOST_LONG_NUMBERS:
            raise UpstreamInvalid(
                f"it holds more than {MOST_LONG_NUMBERS:,} numbers with more than 15 digits or an exponent"
            )
