"""The upstream's JSON and what becomes of it: bytes that are equal for equal snapshots, or a named fault."""

import json
from decimal import Decimal
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, strategies as st

from proxy.core.document import parse
from proxy.core.errors import UpstreamInvalid
from proxy.core.snapshot import error_envelope, ids_in_list, normalize_list, normalize_snapshot

SNAPSHOT: dict[str, Any] = {
    "id": "6372321",
    "name": "web-01-1595954862243",
    "created_at": "2020-07-28T16:47:44Z",
    "regions": ["nyc3", "sfo3"],
    "min_disk_size": 25,
    "size_gigabytes": 2.34,
    "resource_id": "200776916",
    "resource_type": "droplet",
    "tags": ["web", "env:prod"],
}
DOCUMENTED = [
    *("id", "created_at", "min_disk_size", "name", "regions", "resource_id", "resource_type"),
    *("size_gigabytes", "tags"),
]
ABSENT = object()
CANARY = "canary"
"""Stands in values that must not be shown."""


# -- helpers -----------------------------------------------------------------------------------


def answer(**changes: Any) -> bytes:
    """Write the upstream's answer with some fields changed; `ABSENT` leaves one out."""
    fields = {name: value for name, value in (SNAPSHOT | changes).items() if value is not ABSENT}
    return json.dumps({"snapshot": fields}).encode()


def raw(field: str, literal: str) -> bytes:
    """Write the upstream's answer with the JSON `literal` for a field."""
    return answer(**{field: "@@"}).replace(b'"@@"', literal.encode())


def bytes_of(body: bytes, expected_id: str | None) -> bytes:
    """Normalize."""
    return normalize_snapshot(body, expected_id).body


def normalized(body: bytes, expected_id: str | None = None) -> dict[str, Any]:
    """Normalize, and read the result."""
    result: dict[str, Any] = json.loads(bytes_of(body, expected_id))["snapshot"]
    return result


def fault(body: bytes, expected_id: str | None = None) -> str:
    """Normalize what cannot be normalized, and give what is said about it."""
    with pytest.raises(UpstreamInvalid) as raised:
        bytes_of(body, expected_id)
    return raised.value.fact


# -- the normalized form -----------------------------------------------------------------------


def test_the_normalized_bytes() -> None:
    """Documented keys in the documented order, then the unknown ones sorted, without spaces, in UTF-8."""
    body = answer(name="b\u00fccher & \u2603", zone={"b": 1, "a": [None, {"d": 1, "c": 2}]}, area=None)
    assert bytes_of(body, "6372321").decode() == (
        '{"snapshot":{"id":"6372321","created_at":"2020-07-28T16:47:44Z","min_disk_size":25,'
        '"name":"b\u00fccher & \u2603","regions":["nyc3","sfo3"],"resource_id":"200776916",'
        '"resource_type":"droplet","size_gigabytes":2.34,"tags":["web","env:prod"],'
        '"area":null,"zone":{"a":[null,{"c":2,"d":1}],"b":1}}}'
    )


@pytest.mark.parametrize(
    ("field", "given_", "expected"),
    [
        pytest.param("id", 6372321, "6372321", id="old-payloads-have-integer-ids"),
        pytest.param("resource_id", 200776916, "200776916", id="and-integer-resource-ids"),
        pytest.param("id", 2**64, str(2**64), id="integer-id-beyond-64-bits"),
        pytest.param("tags", ABSENT, None, id="no-tags-without-tag:read"),
        pytest.param("tags", None, None, id="null-tags"),
        pytest.param("tags", [], [], id="empty-tags-stay-empty"),
        pytest.param("tags", ["b", "a"], ["b", "a"], id="tags-keep-their-order"),
        pytest.param("regions", [], [], id="no-regions"),
        pytest.param("regions", ["sfo3", "ams3"], ["sfo3", "ams3"], id="regions-keep-their-order"),
        pytest.param("min_disk_size", 0, 0, id="volumes-have-no-minimum"),
        pytest.param("resource_type", "volume", "volume", id="volume"),
        pytest.param("resource_type", "nfs", "nfs", id="a-new-resource_type"),
        pytest.param("resource_type", "Droplet", "Droplet", id="a-resource_type-in-another-case"),
        pytest.param("resource_type", "", "", id="empty-resource_type"),
        pytest.param("regions", ["mars1"], ["mars1"], id="a-new-region"),
        pytest.param("name", "", "", id="empty-name"),
        pytest.param("name", "caf\u00e9 \U0001f4be \x00", "caf\u00e9 \U0001f4be \x00", id="any-unicode-name"),
        pytest.param("name", "a\u0026b</script>", "a&b</script>", id="escapes-are-undone"),
        pytest.param("some_new_key", {"x": [1, 2.5]}, {"x": [1, 2.5]}, id="unknown-keys-survive"),
        pytest.param("", "x", "x", id="an-unknown-key-without-name"),
    ],
)
def test_a_field_that_is_taken(field: str, given_: Any, expected: Any) -> None:
    """The variants that the API is known to send, and one form of each."""
    assert normalized(answer(**{field: given_}))[field] == expected


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        pytest.param("id", ABSENT, "is neither a string nor an integer", id="no-id"),
        pytest.param("id", None, "is neither a string nor an integer", id="null-id"),
        pytest.param("id", "", "is neither a string nor an integer", id="empty-id"),
        pytest.param("id", True, "is neither a string nor an integer", id="boolean-id"),
        pytest.param("id", 1.5, "is neither a string nor an integer", id="fractional-id"),
        pytest.param("id", [CANARY], "is neither a string nor an integer", id="id-in-a-list"),
        pytest.param("created_at", ABSENT, "is not a string", id="no-created_at"),
        pytest.param("created_at", 1595954864, "is not a string", id="timestamp"),
        pytest.param("created_at", CANARY, "is not an RFC 3339 date-time", id="created_at-in-words"),
        pytest.param("min_disk_size", ABSENT, "is not an integer", id="no-min_disk_size"),
        pytest.param("min_disk_size", None, "is not an integer", id="null-min_disk_size"),
        pytest.param("min_disk_size", 25.0, "is not an integer", id="min_disk_size-with-a-point"),
        pytest.param("min_disk_size", "25 " + CANARY, "is not an integer", id="min_disk_size-in-quotes"),
        pytest.param("min_disk_size", False, "is not an integer", id="boolean-min_disk_size"),
        pytest.param("name", ABSENT, "is not a string", id="no-name"),
        pytest.param("name", None, "is not a string", id="null-name"),
        pytest.param("name", {CANARY: 1}, "is not a string", id="object-for-a-name"),
        pytest.param("regions", ABSENT, "is not a list of strings", id="no-regions"),
        pytest.param("regions", None, "is not a list of strings", id="null-regions"),
        pytest.param("regions", CANARY, "is not a list of strings", id="one-region"),
        pytest.param("regions", [CANARY, 1], "is not a list of strings", id="number-among-regions"),
        pytest.param("resource_id", ABSENT, "is neither a string nor an integer", id="no-resource_id"),
        pytest.param("resource_type", ABSENT, "is not a string", id="no-resource_type"),
        pytest.param("resource_type", None, "is not a string", id="null-resource_type"),
        pytest.param("resource_type", 1, "is not a string", id="number-for-a-resource_type"),
        pytest.param("resource_type", [CANARY], "is not a string", id="resource_type-in-a-list"),
        pytest.param("size_gigabytes", ABSENT, "is not a number", id="no-size"),
        pytest.param("size_gigabytes", "2.34" + CANARY, "is not a number", id="size-in-quotes"),
        pytest.param("size_gigabytes", True, "is not a number", id="boolean-size"),
        pytest.param("tags", CANARY, "is not a list of strings", id="one-tag"),
        pytest.param("tags", [None, CANARY], "is not a list of strings", id="null-among-tags"),
        pytest.param("tags", False, "is not a list of strings", id="false-for-tags"),
    ],
)
def test_a_field_that_is_refused(field: str, value: Any, said: str) -> None:
    """The fault names the field and what it should be, and never shows the value."""
    assert fault(answer(**{field: value})) == f"snapshot.{field} {said}"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param(b"", "it is not JSON", id="nothing"),
        pytest.param(b"<html>canary</html>", "it is not JSON", id="html"),
        pytest.param(answer()[:-1], "it is not JSON", id="truncated"),
        pytest.param(answer() + b"{}", "it is not JSON", id="something-behind"),
        pytest.param(b"\xef\xbb\xbf" + answer(), "it is not JSON", id="byte-order-mark"),
        pytest.param(answer(name="@").replace(b"@", b"\xff"), "it is not JSON", id="not-utf-8"),
        pytest.param(raw("name", '"\\ud800"'), "it is not JSON", id="half-a-character"),
        pytest.param(raw("size_gigabytes", "NaN"), "it is not JSON", id="nan"),
        pytest.param(raw("size_gigabytes", "1" * 30 + ',"x":Infinity'), "it is not JSON", id="infinity"),
        pytest.param(raw("size_gigabytes", "0" * 30), "it is not JSON", id="leading-zeros"),
        pytest.param(raw("size_gigabytes", "1" * 30 + "."), "it is not JSON", id="point-without-digits"),
        pytest.param(raw("size_gigabytes", "1e" + "9" * 30), "it is not JSON", id="exponent-without-end"),
        pytest.param(
            raw("x", "1" * 30 + ',"y":"\\ud800"'),
            "it is nested too deeply or not Unicode",
            id="half-a-character-beside-a-long-number",
        ),
        pytest.param(b"[" * 2000, "it is not JSON", id="deep"),
        pytest.param(b"1" * 30 + b"[" * 10_000, "it is not JSON", id="deep-behind-a-long-number"),
        pytest.param(b'{"x":' + b"1" * 30 + b',"y":' + b"[" * 10_000, "it is not JSON", id="deep-and-long"),
        *(
            pytest.param(many, "it holds more than 20,000 values", id=f"many-{kind}")
            for kind, many in (
                ("numbers", raw("x", "[" + "1," * 20_000 + "1]")),
                ("objects", raw("x", "[" + "{}," * 10_000 + "1]")),
                ("lists", raw("x", "[" + ("[" * 100 + "]" * 100 + ",") * 200 + "1]")),
                ("fields", raw("x", "1," + ",".join(f'"{number}":1' for number in range(20_000)))),
            )
        ),
        *(
            pytest.param(
                raw("x", "[" + f"{number}," * 1_000 + f"{number}]"),
                "it holds more than 1,000 numbers with more than 15 digits or an exponent",
                id=f"many-{kind}",
            )
            for kind, number in (
                ("exponents", "1e999"),
                ("long-integers", "9" * 21),
                ("long-fractions", "0.1234567890123456"),
            )
        ),
        pytest.param(
            raw("x", "[" * 300 + "]" * 300), "it is nested too deeply or not Unicode", id="too-deep-to-write"
        ),
        pytest.param(b"null", "there is no snapshot in it", id="null"),
        pytest.param(b"[]", "there is no snapshot in it", id="list"),
        pytest.param(b'"snapshot"', "there is no snapshot in it", id="string"),
        pytest.param(b"{}", "there is no snapshot in it", id="empty-object"),
        pytest.param(b'{"snapshots": []}', "there is no snapshot in it", id="snapshots"),
        pytest.param(b'{"snapshot": null}', "snapshot is not an object", id="null-snapshot"),
        pytest.param(b'{"snapshot": ["canary"]}', "snapshot is not an object", id="list-for-a-snapshot"),
        pytest.param(answer(id=CANARY), "snapshot.id is not the one that was asked for", id="another-id"),
    ],
)
def test_a_body_that_is_refused(body: bytes, said: str) -> None:
    """What is no snapshot is a fault of the upstream's, whatever it is."""
    assert fault(body, "6372321") == said


@pytest.mark.parametrize(
    ("sent", "expected_id"),
    [
        pytest.param("6372321", "6372321", id="number"),
        pytest.param(6372321, "6372321", id="integer"),
        pytest.param(10**18, str(10**18), id="nineteen-digits"),
        pytest.param(
            "0D3DB13E-A604-4944-9827-7EC2642D32AC", "0d3db13e-a604-4944-9827-7ec2642d32ac", id="uuid"
        ),
        pytest.param("anything", None, id="any"),
    ],
)
def test_the_id_that_was_asked_for(sent: str | int, expected_id: str | None) -> None:
    """It is compared in lower case and kept as it came."""
    assert normalized(answer(id=sent), expected_id)["id"] == str(sent)


# -- dates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        pytest.param("2020-07-28T16:47:44Z", "2020-07-28T16:47:44Z", id="utc"),
        pytest.param("2020-07-28t16:47:44z", "2020-07-28T16:47:44Z", id="lower-case"),
        pytest.param("2020-07-28 16:47:44Z", "2020-07-28T16:47:44Z", id="space"),
        pytest.param("2020-07-28T16:47:44+00:00", "2020-07-28T16:47:44Z", id="offset-zero"),
        pytest.param("2020-07-28T16:47:44-00:00", "2020-07-28T16:47:44Z", id="unknown-offset"),
        pytest.param("2020-07-28T16:47:44+05:30", "2020-07-28T11:17:44Z", id="east"),
        pytest.param("2020-12-31T20:00:00-05:00", "2021-01-01T01:00:00Z", id="west-over-new-year"),
        pytest.param("2020-03-01T00:30:00+01:00", "2020-02-29T23:30:00Z", id="leap-day"),
        pytest.param("2020-07-28T16:47:44.120300Z", "2020-07-28T16:47:44.1203Z", id="fraction"),
        pytest.param("2020-07-28T16:47:44.000Z", "2020-07-28T16:47:44Z", id="fraction-of-nothing"),
        pytest.param(
            "2020-07-28T16:47:44.1234567891Z", "2020-07-28T16:47:44.1234567891Z", id="fine-fraction"
        ),
        pytest.param("2016-12-31T23:59:60Z", "2016-12-31T23:59:60Z", id="leap-second"),
        pytest.param("2017-01-01T00:59:60.5+01:00", "2016-12-31T23:59:60.5Z", id="leap-second-elsewhere"),
        pytest.param("0999-01-01T00:00:00Z", "0999-01-01T00:00:00Z", id="year-of-three-digits"),
    ],
)
def test_a_date_that_is_taken(sent: str, expected: str) -> None:
    """Any RFC 3339 date-time becomes UTC with `Z`, without a fraction of zeros."""
    assert normalized(answer(created_at=sent))["created_at"] == expected
    assert normalized(answer(created_at=expected))["created_at"] == expected


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param("", id="empty"),
        pytest.param("2020-07-28", id="date-alone"),
        pytest.param("2020-07-28T16:47Z", id="no-seconds"),
        pytest.param("2020-07-28T16:47:44", id="no-zone"),
        pytest.param("2020-07-28T16:47:44.Z", id="point-without-fraction"),
        pytest.param("2020-07-28T16:47:44+0530", id="offset-without-colon"),
        pytest.param("2020-07-28T16:47:44+24:00", id="offset-of-a-day"),
        pytest.param("2020-07-28T16:47:44+05:60", id="offset-of-sixty-minutes"),
        pytest.param("2020-07-28T24:00:00Z", id="hour-24"),
        pytest.param("2020-07-28T16:60:00Z", id="minute-60"),
        pytest.param("2020-07-28T16:47:61Z", id="second-61"),
        pytest.param("2020-13-01T00:00:00Z", id="month-13"),
        pytest.param("2021-02-29T00:00:00Z", id="no-leap-year"),
        pytest.param("0000-01-01T00:00:00Z", id="year-0"),
        pytest.param("0001-01-01T00:00:00+01:00", id="before-year-1"),
        pytest.param("9999-12-31T23:59:59-01:00", id="after-year-9999"),
        pytest.param("20200728T164744Z", id="basic-format"),
        pytest.param("2020-W31-2T16:47:44Z", id="week-date"),
        pytest.param("2020-07-28T16:47:44Z\n", id="newline-at-the-end"),
        pytest.param("\u0662\u0660\u0662\u0660-07-28T16:47:44Z", id="arabic-digits"),
        pytest.param("-2020-07-28T16:47:44Z", id="negative-year"),
    ],
)
def test_a_date_that_is_refused(sent: str) -> None:
    """What RFC 3339 does not allow, or no calendar has, is a fault."""
    assert fault(answer(created_at=sent)) == "snapshot.created_at is not an RFC 3339 date-time"


# -- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("literal", "written"),
    [
        pytest.param("25", "25", id="integer-stays-one"),
        pytest.param("25.0", "25.0", id="float-stays-one"),
        pytest.param("25.00", "25.0", id="zeros-at-the-end"),
        pytest.param("0", "0", id="zero"),
        pytest.param("0.0", "0.0", id="zero-with-a-point"),
        pytest.param("2.34", "2.34", id="usual"),
        pytest.param("0.1008", "0.1008", id="small"),
        pytest.param("1e2", "100.0", id="exponent"),
        pytest.param(str(2**63), str(2**63), id="beyond-signed-64-bits"),
        pytest.param(str(2**64 - 1), str(2**64 - 1), id="the-last-of-64-bits"),
        pytest.param(str(2**64), str(2**64), id="beyond-64-bits"),
        pytest.param(str(-(2**63)), str(-(2**63)), id="the-first-of-64-bits"),
        pytest.param(str(-(2**63) - 1), str(-(2**63) - 1), id="below-64-bits"),
        pytest.param("1" * 1000, "1" * 1000, id="integer-of-1000-digits"),
        pytest.param("0." + "1" * 998, "0." + "1" * 998, id="fraction-of-1000-characters"),
        pytest.param("0.1000000000000000055", "0.1000000000000000055", id="more-digits-than-a-double"),
        pytest.param("1.50000000000000000000", "1.5", id="long-but-exact"),
        pytest.param("12345678901234567891.0", "12345678901234567891.0", id="large-float"),
        pytest.param("12345678901234567890.0", "1.234567890123456789E+19", id="large-float-of-tens"),
        pytest.param("12345678901234567890.50", "12345678901234567890.5", id="large-float-with-zeros"),
        pytest.param(
            "123456789012345678901234567890e-10", "12345678901234567890.123456789", id="long-with-exponent"
        ),
        pytest.param("1e400", "1E+400", id="beyond-double"),
        pytest.param("10e399", "1E+400", id="beyond-double-written-otherwise"),
        pytest.param("-1.0e-400", "-1E-400", id="below-double"),
        pytest.param("0e-400", "0.0", id="zero-below-double"),
    ],
)
def test_a_number_keeps_value_and_kind(literal: str, written: str) -> None:
    """Also where a double would not hold it; and a number has one form, however it came."""
    for field in ("size_gigabytes", "new_key"):
        body = bytes_of(raw(field, literal), None)
        assert f'"{field}":{written}' in body.decode()
        assert bytes_of(body, None) == body


def test_long_integers_where_integers_belong() -> None:
    """Each field that takes an integer takes one of any length."""
    digits = "9" * 40
    assert normalized(raw("id", digits))["id"] == digits
    assert normalized(raw("min_disk_size", digits))["min_disk_size"] == int(digits)
    assert fault(raw("min_disk_size", digits + ".5")) == "snapshot.min_disk_size is not an integer"
    assert fault(raw("id", digits + ".5")) == "snapshot.id is neither a string nor an integer"


@pytest.mark.parametrize(
    "literal",
    [
        pytest.param("9" * 1001, id="integer"),
        pytest.param("-" + "9" * 1000, id="negative-integer"),
        pytest.param("0." + "1" * 999, id="fraction"),
        pytest.param("1." + "0" * 998 + "1", id="zeros"),
        pytest.param("1e" + "9" * 999, id="exponent"),
        pytest.param("9" * 1_000_000, id="a-million"),
    ],
)
def test_no_number_has_more_than_1000_digits(literal: str) -> None:
    """What it takes to keep a number exactly grows with its length."""
    for field in ("size_gigabytes", "new_key"):
        assert fault(raw(field, literal)) == "it holds a number of more than 1,000 digits"


@pytest.mark.parametrize(
    "literal",
    [
        pytest.param("1e999999", id="exponent"),
        pytest.param("1e-999999999", id="negative-exponent"),
        pytest.param("[" + "1e400," * 999 + "0]", id="many"),
    ],
)
def test_no_exponent_is_written_out(literal: str) -> None:
    """However large a number is, it takes as many bytes as it came with."""
    body = bytes_of(raw("x", literal), None)
    assert bytes_of(body, None) == body
    assert len(body) < len(raw("x", literal)) + 1000


# -- properties --------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.one_of(
    st.integers(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.decimals(allow_nan=False, allow_infinity=False),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)
DATES = st.datetimes().map(lambda moment: f"{moment.isoformat()}Z")
SNAPSHOTS = st.builds(
    lambda known, unknown: unknown | known,
    st.fixed_dictionaries(
        {
            "id": st.one_of(st.integers(min_value=0), TEXT.filter(bool)),
            "created_at": DATES,
            "min_disk_size": st.integers(),
            "name": TEXT,
            "regions": st.lists(TEXT, max_size=3),
            "resource_id": st.one_of(st.integers(), TEXT.filter(bool)),
            "resource_type": st.sampled_from(["droplet", "volume"]),
            "size_gigabytes": NUMBERS,
        },
        optional={"tags": st.one_of(st.none(), st.lists(TEXT, max_size=3))},
    ),
    st.dictionaries(TEXT.filter(lambda name: name not in DOCUMENTED), JSON, max_size=4),
)


def written(value: Any) -> str:
    """Write JSON, decimals as the numbers they are."""
    match value:
        case dict():
            return "{" + ",".join(f"{json.dumps(key)}:{written(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ",".join(map(written, value)) + "]"
        case Decimal():
            return str(value)
        case _:
            return json.dumps(value)


def exactly(body: bytes | str) -> Any:
    """Read JSON without losing a digit, and tell integers from other numbers."""
    return json.loads(
        body,
        parse_int=lambda digits: ("int", Decimal(digits)),
        parse_float=lambda digits: ("float", Decimal(digits)),
    )


def shuffled(value: Any, chance: Random) -> Any:
    """Give the same JSON with the keys of its objects in another order, and new lists."""
    match value:
        case dict():
            items = [(key, shuffled(item, chance)) for key, item in value.items()]
            chance.shuffle(items)
            return dict(items)
        case list():
            return [shuffled(item, chance) for item in value]
        case _:
            return value


@given(snapshot=SNAPSHOTS)
@example(snapshot=SNAPSHOT | {"x": Decimal("1.10000000000000000000")})
def test_normalizing_again_changes_nothing(snapshot: dict[str, Any]) -> None:
    """The normalized form is its own normalized form."""
    once = bytes_of(written({"snapshot": snapshot}).encode(), None)
    assert bytes_of(once, None) == once


@given(snapshot=SNAPSHOTS, seed=st.integers())
def test_equal_snapshots_give_equal_bytes(snapshot: dict[str, Any], seed: int) -> None:
    """The order of keys, at any depth, is not part of a snapshot."""
    chance = Random(seed)  # noqa: S311 # a failure can be repeated
    one = bytes_of(written({"snapshot": snapshot}).encode(), None)
    other = bytes_of(written({"more": 1, "snapshot": shuffled(snapshot, chance)}).encode(), None)
    assert one == other


@given(snapshot=SNAPSHOTS)
def test_nothing_is_lost(snapshot: dict[str, Any]) -> None:
    """Values, kinds of numbers and unknown keys come through exactly; only documented keys change."""
    sent = exactly(written(snapshot))
    got = exactly(bytes_of(written({"snapshot": snapshot}).encode(), None))["snapshot"]
    for name in ("id", "resource_id"):
        sent[name] = sent[name] if isinstance(sent[name], str) else str(snapshot[name])
    del sent["created_at"], got["created_at"]
    assert got == {"tags": None} | sent


@given(snapshot=SNAPSHOTS)
def test_documented_keys_come_first(snapshot: dict[str, Any]) -> None:
    """All of them, always, in one order; the rest is sorted."""
    names = [*normalized(written({"snapshot": snapshot}).encode())]
    assert names[: len(DOCUMENTED)] == DOCUMENTED
    assert names[len(DOCUMENTED) :] == sorted(snapshot.keys() - set(DOCUMENTED))


@given(
    body=st.one_of(
        st.binary(),
        TEXT.map(str.encode),
        JSON.map(written).map(str.encode),
        JSON.map(lambda value: written({"snapshot": value}).encode()),
        st.builds(
            lambda name, value: written({"snapshot": SNAPSHOT | {name: value}}).encode(),
            st.sampled_from(DOCUMENTED),
            JSON,
        ),
        st.builds(
            lambda at, byte: answer()[:at] + byte + answer()[at + 1 :],
            st.integers(0, len(answer())),
            st.binary(max_size=2),
        ),
    ),
    expected_id=st.sampled_from([None, "6372321"]),
)
@example(body=b"[" * 5000, expected_id=None)
@example(body=b"1" * 20 + b"e" + b"9" * 20, expected_id=None)
def test_no_body_is_a_surprise(body: bytes, expected_id: str | None) -> None:
    """Any bytes at all are normalized, or are a fault of the upstream's."""
    try:
        once = bytes_of(body, expected_id)
    except UpstreamInvalid:
        return
    assert bytes_of(once, expected_id) == once


@given(value=JSON)
def test_both_ways_of_parsing_agree(value: Any) -> None:
    """What a document means does not depend on whether a long number is somewhere in it."""
    text = written(value)
    try:
        quick = parse(text.encode())
    except UpstreamInvalid:
        return
    slow = parse(f"[{text},{'7' * 30}]".encode())[0]
    assert slow == quick
    assert repr(slow) == repr(quick)


# -- the upstream's errors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "envelope"),
    [
        pytest.param(
            b'{"id":"not_found","message":"gone","request_id":"theirs"}',
            b'{"id":"not_found","message":"gone","request_id":"theirs"}',
            id="whole",
        ),
        pytest.param(
            b'{"id":"not_found","message":"gone"}',
            b'{"id":"not_found","message":"gone","request_id":"ours"}',
            id="request_id-added",
        ),
        pytest.param(
            b'{"id":"x","message":"y","request_id":null}',
            b'{"id":"x","message":"y","request_id":"ours"}',
            id="null-request_id",
        ),
        pytest.param(
            b'{"more":[1],"message":"y","id":"x","request_id":"theirs"}',
            b'{"more":[1],"message":"y","id":"x","request_id":"theirs"}',
            id="more-keys-in-their-order",
        ),
        pytest.param(
            b'{ "id": "x", "message": "\\u00fc" }',
            '{"id":"x","message":"\u00fc","request_id":"ours"}'.encode(),
            id="unicode",
        ),
        pytest.param(
            b'{"id":"x","message":"y","limit":12345678901234567890.125,"request_id":"theirs"}',
            b'{"id":"x","message":"y","limit":12345678901234567890.125,"request_id":"theirs"}',
            id="long-number-kept-exactly",
        ),
        pytest.param(
            b'{"id":"x","message":"y","limits":[123456789012345678901234567890]}',
            b'{"id":"x","message":"y","limits":[123456789012345678901234567890],"request_id":"ours"}',
            id="long-integer-kept-exactly",
        ),
        pytest.param(
            b'{"id":"x","message":"y","limit":1e400}',
            b'{"id":"x","message":"y","limit":1E+400,"request_id":"ours"}',
            id="larger-than-a-double",
        ),
        pytest.param(
            b'{"id":123456789012345678901234567890,"message":"y"}', None, id="long-number-for-an-id"
        ),
        pytest.param(b'{"id":"x","message":"\\ud800","n":12345678901234567890}', None, id="lone-surrogate"),
        pytest.param(b"", None, id="nothing"),
        pytest.param(b"<html>", None, id="html"),
        pytest.param(b"null", None, id="null"),
        pytest.param(b'[{"id":"x","message":"y"}]', None, id="list"),
        pytest.param(b"{}", None, id="empty"),
        pytest.param(b'{"id":"x"}', None, id="no-message"),
        pytest.param(b'{"message":"y"}', None, id="no-id"),
        pytest.param(b'{"id":404,"message":"y"}', None, id="number-for-an-id"),
        pytest.param(b'{"id":"x","message":{"a":1}}', None, id="object-for-a-message"),
        pytest.param(b'{"id":"x","message":"\xff"}', None, id="not-utf-8"),
        pytest.param(b'{"id":"x","message":"y","z":' + b"[" * 300 + b"]" * 300 + b"}", None, id="deep"),
        pytest.param(b"[" * 5000, None, id="too-deep"),
    ],
)
def test_error_envelopes(body: bytes, envelope: bytes | None) -> None:
    """An error with id and message is kept, and has a request_id; whatever else is none."""
    assert error_envelope(body, "ours") == envelope


@given(body=st.one_of(st.binary(), JSON.map(written).map(str.encode)))
def test_no_error_is_a_surprise(body: bytes) -> None:
    """Any bytes are an envelope with all three keys, or none."""
    envelope = error_envelope(body, "ours")
    assert envelope is None or {"id", "message", "request_id"} <= json.loads(envelope).keys()


def page(snapshots: int, **changes: Any) -> bytes:
    """Write a page of that many snapshots, with some fields changed."""
    values = [SNAPSHOT | {"id": str(number)} | changes for number in range(snapshots)]
    return json.dumps({"snapshots": values, "links": {}, "meta": {"total": snapshots}}).encode()


@pytest.mark.parametrize(
    ("snapshots", "changes"),
    [
        pytest.param(
            200,
            {
                "regions": [f"reg{number}" for number in range(20)],
                "tags": [f"tag:{number}" for number in range(20)],
                "size_gigabytes": 0.10080000013113022,
            },
            id="the-longest-page-with-all-that-is-documented",
        ),
        pytest.param(200, {"tags": ["t"] * 85}, id="85-tags-each"),
        pytest.param(
            200, {"x": {f"key{number}": number for number in range(80)}}, id="80-unknown-values-each"
        ),
        pytest.param(400, {}, id="twice-the-longest-page"),
        pytest.param(1, {"tags": ["t"] * 19_980}, id="one-with-all-the-values"),
    ],
)
def test_a_page_that_is_taken(snapshots: int, changes: dict[str, Any]) -> None:
    """The bounds are well above what the API documents."""
    normalized_list = normalize_list(page(snapshots, **changes), "")
    assert len(normalized_list.seeds) == snapshots
    assert ids_in_list(normalized_list.body) == normalized_list.seeds.keys()


@pytest.mark.G9
@pytest.mark.parametrize(
    ("body", "fact"),
    [
        pytest.param(page(401), "it holds more than 400 snapshots", id="snapshots"),
        pytest.param(page(200, tags=["t"] * 100), "it holds more than 20,000 values", id="values"),
        pytest.param(
            page(200, x=[0.10080000013113022] * 6),
            "it holds more than 1,000 numbers with more than 15 digits or an exponent",
            id="long-numbers",
        ),
    ],
)
def test_a_page_that_is_refused(body: bytes, fact: str) -> None:
    """A document that would stop the event loop is refused, and the fault names the bound."""
    with pytest.raises(UpstreamInvalid) as refused:
        normalize_list(body, "")
    assert refused.value.fact == fact


@pytest.mark.parametrize(
    ("resource_type", "unknown"),
    [
        pytest.param("droplet", (), id="droplet"),
        pytest.param("volume", (), id="volume"),
        pytest.param("nfs", ("resource_type",), id="new"),
        pytest.param("Volume", ("resource_type",), id="another-case"),
        pytest.param("", ("resource_type",), id="empty"),
    ],
)
def test_values_beyond_an_enum(resource_type: str, unknown: tuple[str, ...]) -> None:
    """The field is named, once for each snapshot, and the body says what the API said."""
    single = normalize_snapshot(answer(resource_type=resource_type), None)
    assert single.unknown == unknown
    assert json.loads(single.body)["snapshot"]["resource_type"] == resource_type
    listed = normalize_list(page(3, resource_type=resource_type), "")
    assert listed.unknown == unknown * 3
    assert {one["resource_type"] for one in json.loads(listed.body)["snapshots"]} == {resource_type}
    assert single.body.replace(b"6372321", b"2") == listed.seeds["2"]
