"""Lists without a socket: which queries are cached, what a list's bytes are, what a DELETE means."""

import gzip
import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given, strategies as st

from proxy.core.entry import CorruptValue, Entry, Lifetimes, make_stamp, seal, unseal
from proxy.core.errors import BadRequest, UpstreamInvalid
from proxy.core.http import etag_of, gzipped
from proxy.core.identity import Keyring
from proxy.core.policy import Absent, Answer, Deleted, Denied, Keep, PassOn, Policy, TokenRejected
from proxy.core.request import accepts_gzip
from proxy.core.resources import SNAPSHOT_LIST, Target, list_target
from proxy.core.snapshot import normalize_list, normalize_list_of_droplet, normalize_snapshot

POLICY = Policy(
    ttls_s={"fresh_s": 60, "list_fresh_s": 10},
    negative_s=10,
    stale_while_revalidate_s=60,
    stale_if_error_s=300,
    max_fresh_s=600,
    jitter=0.0,
)
LIST = list_target("")
SNAPSHOT: dict[str, Any] = {
    "id": "6372321",
    "created_at": "2020-07-28T16:47:44Z",
    "min_disk_size": 25,
    "name": "web-01",
    "regions": ["nyc3"],
    "resource_id": "200776916",
    "resource_type": "droplet",
    "size_gigabytes": 2.34,
    "tags": ["web"],
}


def list_of(*snapshots: Any, **rest: Any) -> bytes:
    """Write a list as the upstream does."""
    return json.dumps(
        {"snapshots": snapshots, "links": {}, "meta": {"total": len(snapshots)}} | rest
    ).encode()


# -- the query ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "canonical"),
    [
        pytest.param("", "page=1&per_page=20", id="nothing"),
        pytest.param("page=1", "page=1&per_page=20", id="page-as-by-default"),
        pytest.param("per_page=20", "page=1&per_page=20", id="per-page-as-by-default"),
        pytest.param("per_page=200&page=3", "page=3&per_page=200", id="another-order"),
        pytest.param("per_page=1", "page=1&per_page=1", id="fewest"),
        pytest.param("per_page=199", "page=1&per_page=199", id="three-digits"),
        pytest.param("page=999999999", "page=999999999&per_page=20", id="farthest-page"),
        pytest.param("resource_type=volume", "page=1&per_page=20&resource_type=volume", id="volumes"),
        pytest.param(
            "resource_type=droplet&page=2&per_page=5",
            "page=2&per_page=5&resource_type=droplet",
            id="all-three",
        ),
        pytest.param(
            "region=nyc1&resource_type=volume",
            "page=1&per_page=20&resource_type=volume&region=nyc1",
            id="region",
        ),
    ],
)
def test_cached_queries(query: str, canonical: str) -> None:
    """One page has one name, however it is asked for."""
    assert list_target(query) == Target(SNAPSHOT_LIST, canonical)


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("page=1&page=1", id="repeated"),
        pytest.param("per_page=20&page=1&per_page=20", id="repeated-apart"),
        pytest.param("page=", id="empty-value"),
        pytest.param("page", id="no-value"),
        pytest.param("=1", id="no-name"),
        pytest.param("&", id="empty-pairs"),
        pytest.param("page=1&", id="empty-pair-last"),
        pytest.param("resource_type=", id="empty-type"),
        pytest.param("p%61ge=1", id="encoded-name"),
        pytest.param("page=%31", id="encoded-value"),
        pytest.param("page=1%26per_page=2", id="encoded-ampersand"),
        pytest.param("page=+1", id="plus"),
        pytest.param("page=0", id="page-0"),
        pytest.param("page=-1", id="negative"),
        pytest.param("page=01", id="leading-zero"),
        pytest.param("page=1.0", id="fraction"),
        pytest.param("page=1e2", id="exponent"),
        pytest.param("page=1000000000", id="page-of-ten-digits"),
        pytest.param("per_page=0", id="none-a-page"),
        pytest.param("per_page=201", id="too-many-a-page"),
        pytest.param("per_page=2000", id="far-too-many"),
        pytest.param("resource_type=image", id="no-such-type"),
        pytest.param("resource_type=Droplet", id="type-in-upper-case"),
        pytest.param("Page=1", id="name-in-upper-case"),
        pytest.param("page=1;per_page=2", id="semicolon"),
        pytest.param("page=1=1", id="two-equals-signs"),
        pytest.param("tag_name=web", id="another-parameter"),
        pytest.param("page=1&per_page=20&x=", id="another-one-beside"),
        pytest.param("page=1?per_page=2", id="second-question-mark"),
    ],
)
def test_forwarded_queries(query: str) -> None:
    """Whatever is not exactly the three parameters goes up as it came, and is not cached."""
    assert list_target(query) == Target(SNAPSHOT_LIST, query, cacheable=False)


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("page=1 ", id="space"),
        pytest.param("page=1\r\nX: y", id="line-end"),
        pytest.param("page=1#x", id="fragment"),
        pytest.param("tag[]=web", id="brackets"),
        pytest.param('name="web"', id="quotes"),
        pytest.param("name=bücher", id="not-ascii"),
        pytest.param("page=\u0661", id="arabic-digit"),
        pytest.param("page=1\x00", id="nul"),
    ],
)
def test_refused_queries(query: str) -> None:
    """What no request target may hold is the caller's mistake."""
    with pytest.raises(BadRequest):
        list_target(query)


@given(
    page=st.none() | st.integers(1, 999_999_999),
    per_page=st.none() | st.integers(1, 200),
    resource_type=st.none() | st.sampled_from(["droplet", "volume"]),
    order=st.permutations(range(3)),
)
def test_one_page_one_name(
    page: int | None, per_page: int | None, resource_type: str | None, order: list[int]
) -> None:
    """The name of a page depends on what is asked and not on how; it names itself."""
    pairs = [("page", page), ("per_page", per_page), ("resource_type", resource_type)]
    asked = "&".join(f"{name}={value}" for name, value in (pairs[i] for i in order) if value is not None)
    query = list_target(asked)
    kind = f"&resource_type={resource_type}" if resource_type else ""
    assert query == Target(SNAPSHOT_LIST, f"page={page or 1}&per_page={per_page or 20}{kind}")
    assert list_target(query.name) == query


@given(st.text(alphabet="pager_=&012%31 #[]é\r\n", max_size=24))
def test_any_query(query: str) -> None:
    """Any text is cached under its canonical name, goes up unchanged, or is refused."""
    try:
        parsed = list_target(query)
    except BadRequest:
        return
    assert parsed.name.isascii()
    assert not set(parsed.name) & set(" #\r\n")
    assert parsed.name == query or (parsed.cacheable and list_target(parsed.name) == parsed)


# -- the body ----------------------------------------------------------------------------------


def test_shape_of_a_list() -> None:
    """Documented keys in the documented order, integers as ids, tags null where there are none."""
    old = {key: value for key, value in SNAPSHOT.items() if key != "tags"} | {
        "id": 6372321,
        "resource_id": 200776916,
        "zone": {"b": 1, "a": 2},
        "created_at": "2020-07-28T18:47:44+02:00",
    }
    shuffled = dict(reversed(old.items()))
    body = b'{"meta":{"z":1,"total":1},"unknown":1,"links":null,"snapshots":[%b]}' % orjson.dumps(shuffled)
    assert normalize_list(body, "").body == (
        b'{"snapshots":[{"id":"6372321","created_at":"2020-07-28T16:47:44Z","min_disk_size":25,'
        b'"name":"web-01","regions":["nyc3"],"resource_id":"200776916","resource_type":"droplet",'
        b'"size_gigabytes":2.34,"tags":null,"zone":{"a":2,"b":1}}],"links":{},"meta":{"total":1,"z":1}}'
    )


@pytest.mark.parametrize(
    ("body", "fact"),
    [
        pytest.param(b"", "it is not JSON", id="empty"),
        pytest.param(b"<html>", "it is not JSON", id="page"),
        pytest.param(b"[]", "there are no snapshots", id="array"),
        pytest.param(b"null", "there are no snapshots", id="null"),
        pytest.param(b'{"meta":{"total":0}}', "there are no snapshots", id="no-snapshots"),
        pytest.param(b'{"snapshots":null,"meta":{"total":0}}', "there are no snapshots", id="null-list"),
        pytest.param(b'{"snapshots":{},"meta":{"total":0}}', "there are no snapshots", id="object-for-list"),
        pytest.param(b'{"snapshots":[]}', "there are no snapshots", id="no-meta"),
        pytest.param(b'{"snapshots":[],"meta":{}}', "there are no snapshots", id="no-total"),
        pytest.param(b'{"snapshots":[],"meta":{"total":"1"}}', "there are no snapshots", id="total-as-text"),
        pytest.param(b'{"snapshots":[],"meta":{"total":1.5}}', "there are no snapshots", id="total-broken"),
        pytest.param(
            b'{"snapshots":[],"links":[1],"meta":{"total":0}}', "links is not an object", id="links-as-array"
        ),
        pytest.param(list_of(SNAPSHOT, 1), "snapshots[1] is not an object", id="not-an-object"),
        pytest.param(
            list_of(SNAPSHOT, SNAPSHOT | {"regions": None}),
            "snapshots[1].regions is not a list of strings",
            id="second-one-wrong",
        ),
        pytest.param(
            list_of(SNAPSHOT | {"id": ""}), "snapshots[0].id is neither a string nor an integer", id="no-id"
        ),
        pytest.param(
            list_of(SNAPSHOT | {"tags": ["secret-value", 1]}),
            "snapshots[0].tags is not a list of strings",
            id="names-the-field-and-not-its-value",
        ),
    ],
)
def test_not_a_list(body: bytes, fact: str) -> None:
    """What does not fit the schema is refused as a whole, with the place and never the value."""
    with pytest.raises(UpstreamInvalid) as refused:
        normalize_list(body, "")
    assert refused.value.fact.startswith(fact)
    assert "secret-value" not in str(refused.value)


OF_DROPLET = b'{ "snapshots": [{"id": 7, "type": "snapshot", "min_disk_size": 25.0}], "meta": {"total": 1}}'


def test_a_list_of_a_droplet() -> None:
    """Its elements have another schema, and stay as they are; it seeds nothing."""
    normalized = normalize_list_of_droplet(OF_DROPLET, "https://proxy.test")
    assert normalized.body == OF_DROPLET.replace(b" ", b"")
    assert not normalized.seeds
    linked = (
        OF_DROPLET[:-1] + b',"links":{"pages":{"last":"https://api.test/v2/droplets/7/snapshots?page=3"}}}'
    )
    moved = orjson.loads(normalize_list_of_droplet(linked, "https://proxy.test").body)
    assert moved["links"] == {"pages": {"last": "https://proxy.test/v2/droplets/7/snapshots?page=3"}}


@pytest.mark.parametrize("body", [b"", b"[]", b'{"snapshots":[]}', b'{"snapshots":{},"meta":{"total":0}}'])
def test_not_a_list_of_a_droplet(body: bytes) -> None:
    """It is refused like another list."""
    with pytest.raises(UpstreamInvalid):
        normalize_list_of_droplet(body, "")


@pytest.mark.parametrize(
    ("public_url", "link", "expected"),
    [
        pytest.param(
            "",
            "https://api.digitalocean.com/v2/snapshots?page=2",
            "https://api.digitalocean.com/v2/snapshots?page=2",
            id="no-public-url",
        ),
        pytest.param(
            "https://proxy.test",
            "https://api.digitalocean.com/v2/snapshots?page=2",
            "https://proxy.test/v2/snapshots?page=2",
            id="authority-replaced",
        ),
        pytest.param(
            "https://proxy.test/do",
            "http://127.0.0.1:81/v2/snapshots?page=2&per_page=5",
            "https://proxy.test/do/v2/snapshots?page=2&per_page=5",
            id="port-and-path",
        ),
        pytest.param(
            r"https://proxy.test/\1\g<0>",
            "https://api.digitalocean.com/v2/snapshots",
            r"https://proxy.test/\1\g<0>/v2/snapshots",
            id="nothing-in-it-is-a-pattern",
        ),
        pytest.param("https://proxy.test", "/v2/snapshots?page=2", "/v2/snapshots?page=2", id="relative"),
        pytest.param(
            "https://proxy.test",
            "https://elsewhere.test/other?to=https://x.test/v2/",
            "https://elsewhere.test/other?to=https://x.test/v2/",
            id="not-a-path-of-the-api",
        ),
        pytest.param("https://proxy.test", None, None, id="null"),
        pytest.param("https://proxy.test", 7, 7, id="not-text"),
    ],
)
def test_page_links(public_url: str, link: Any, expected: Any) -> None:
    """Page links begin with the public URL where there is one."""
    body = list_of(links={"pages": {"next": link}})
    assert orjson.loads(normalize_list(body, public_url).body)["links"] == {"pages": {"next": expected}}


@pytest.mark.parametrize(
    "links",
    [
        pytest.param({"self": "https://api.test/v2/snapshots"}, id="beside-pages"),
        pytest.param({"pages": ["https://api.test/v2/snapshots"]}, id="pages-as-array"),
        pytest.param({"pages": {"next": {"href": "https://api.test/v2/snapshots"}}}, id="deeper"),
    ],
)
def test_other_links(links: Any) -> None:
    """Nothing but the values of links.pages is rewritten."""
    body = list_of(SNAPSHOT | {"name": "https://api.test/v2/snapshots"}, links=links)
    normalized = orjson.loads(normalize_list(body, "https://proxy.test").body)
    assert normalized["links"] == links
    assert normalized["snapshots"][0]["name"] == "https://api.test/v2/snapshots"


numbers = (
    st.integers(-(2**70), 2**70).map(str)
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.from_regex(r"-?(0|[1-9][0-9]{0,20})\.[0-9]{1,20}", fullmatch=True)
    | st.from_regex(r"[1-9](\.[0-9]{1,4})?[eE][+-]?[1-9][0-9]{0,2}", fullmatch=True)
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(sizes=st.lists(numbers, min_size=1, max_size=5), name=names, disk=st.integers(0, 2**70))
@example(sizes=["2.34", "12345678901234567890.125", "1E+400"], name="", disk=0)
def test_a_single_in_a_list(sizes: list[str], name: str, disk: int) -> None:
    """A seed has the very bytes that a single read has, also beside numbers that need the exact parser."""
    ids = range(1, len(sizes) + 1)
    singles = [
        json.dumps(SNAPSHOT | {"id": id_, "name": name, "min_disk_size": disk, "size_gigabytes": 0})
        .replace('"size_gigabytes": 0', f'"size_gigabytes": {size}')
        .encode()
        for id_, size in zip(ids, sizes, strict=True)
    ]
    listed = normalize_list(b'{"snapshots":[%b],"meta":{"total":9}}' % b",".join(singles), "")
    assert list(listed.seeds) == [str(id_) for id_ in ids]
    for id_, single in zip(ids, singles, strict=True):
        alone = normalize_snapshot(b'{"snapshot":%b}' % single, str(id_)).body
        assert listed.seeds[str(id_)] == alone
        assert alone.removeprefix(b'{"snapshot":').removesuffix(b"}") in listed.body


@given(st.permutations(list(SNAPSHOT.items())), st.sampled_from([None, 2]), st.booleans())
def test_equal_lists_have_equal_bytes(
    order: list[tuple[str, Any]], indent: int | None, escaped: bool
) -> None:
    """Order of keys, spaces, escapes and the kind of an id make no difference."""
    usual = normalize_list(list_of(SNAPSHOT | {"name": "ü&"}), "")
    document = {"meta": {"total": 1}, "snapshots": [dict(order) | {"name": "ü&", "id": 6372321}]}
    odd = json.dumps(document, indent=indent, ensure_ascii=escaped)
    odd = odd.replace("&", r"\u0026") if escaped else odd
    assert normalize_list(odd.encode(), "") == usual
    assert normalize_list(usual.body, "") == usual


# -- what is kept of a list --------------------------------------------------------------------


def keep(body: bytes, policy: Policy = POLICY, draw: float = 0.0, **more: Any) -> Keep:
    """Keep a list; `more` is told with its answer."""
    verdict = policy.on_answer(Answer(200, body, 1000.0, **more), LIST, request_id="r", draw=draw)
    assert isinstance(verdict, Keep)
    return verdict


def test_list_and_seeds() -> None:
    """The list has its own TTL and no stale-while-revalidate; a seed is what a single read would leave."""
    uuid = "FBE805E8-866B-11E6-96BF-000F53315A41"
    kept = keep(list_of(SNAPSHOT, SNAPSHOT | {"id": uuid, "resource_type": "volume"}))
    assert kept.entry.lifetimes == Lifetimes(10, 0, 300)
    assert not kept.entry.seeded
    assert list(kept.seeds) == ["6372321", uuid.lower()]
    seed = kept.seeds["6372321"]
    body = normalize_snapshot(orjson.dumps({"snapshot": SNAPSHOT}), "6372321").body
    assert seed == Entry(200, body, etag_of(body), 1000.0, Lifetimes(60, 60, 300), seeded=True)
    assert kept.seeds[uuid.lower()].body.startswith(b'{"snapshot":{"id":"%b"' % uuid.encode())


def test_only_the_list_is_validated() -> None:
    """The entity tag is of the page: a single read could not be asked with it."""
    kept = keep(list_of(SNAPSHOT), validator='"theirs"')
    assert kept.entry.validator == '"theirs"'
    assert [seed.validator for seed in kept.seeds.values()] == [""]


@pytest.mark.parametrize(
    ("remaining_share", "seed_s"),
    [
        pytest.param(1.0, 60, id="all-is-left"),
        pytest.param(0.3, 330, id="half-of-the-way"),
        pytest.param(0.0, 600, id="nothing-is-left"),
    ],
)
def test_seeds_stretch_and_lists_do_not(remaining_share: float, seed_s: int) -> None:
    """A list is young or asked for, lest a new snapshot is missing; a seed lives like a single read."""
    kept = keep(list_of(SNAPSHOT), remaining_share=remaining_share)
    assert kept.entry.lifetimes == Lifetimes(10, 0, 300)
    assert kept.seeds["6372321"].lifetimes == Lifetimes(seed_s, 60, 300)


def test_seeds_do_not_expire_together() -> None:
    """The jitter spreads the seeds of one list over its whole range."""
    policy = Policy({"fresh_s": 1000, "list_fresh_s": 10}, 10, 0, 0, max_fresh_s=1000, jitter=0.1)
    seeds = keep(list_of(*(SNAPSHOT | {"id": number} for number in range(1, 201))), policy, 0.5).seeds
    lifetimes = sorted(seed.lifetimes.fresh_s for seed in seeds.values())
    assert 900 <= lifetimes[0] <= 905
    assert 995 <= lifetimes[-1] <= 1000
    assert len(set(lifetimes)) >= 90


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 300_000])
def test_compressed_in_steps(size: int) -> None:
    """No step takes more than 64 KiB, so that others are served in between; equal bodies give equal bytes."""
    body = bytes(number * number % 251 for number in range(size))
    steps = list(gzipped(body))
    assert gzip.decompress(b"".join(steps)) == body
    assert len(steps) == -(-size // 65_536) + 1
    assert steps == list(gzipped(body))


NO_SUCH = b'{"id":"x","message":"the resource is not a snapshot","request_id":"theirs"}'


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        pytest.param(
            401,
            TokenRejected(NO_SUCH, Entry(401, NO_SUCH, etag_of(NO_SUCH), 0.0, Lifetimes(10))),
            id="401-ends-all",
        ),
        pytest.param(403, Denied(NO_SUCH), id="403-ends-the-lists"),
        pytest.param(404, Denied(NO_SUCH), id="404-of-a-list-is-not-kept-and-ends-the-lists"),
        pytest.param(400, PassOn(NO_SUCH), id="400-of-a-list-is-not-kept"),
        pytest.param(422, PassOn(NO_SUCH), id="422"),
        pytest.param(429, PassOn(NO_SUCH), id="429"),
        pytest.param(500, PassOn(NO_SUCH), id="500"),
    ],
)
def test_errors_of_lists(status: int, verdict: TokenRejected | Denied | PassOn) -> None:
    """No error to a list is kept, also where a single read's would be; a refusal is one of the token."""
    given = POLICY.on_answer(Answer(status, NO_SUCH, 0.0), LIST, request_id="r", draw=0.0)
    assert given == verdict


# -- the envelope ------------------------------------------------------------------------------

KEYRING = Keyring(b"s" * 32)
entries = st.builds(
    Entry,
    status=st.sampled_from([200, 404]),
    body=st.binary(max_size=60),
    etag=st.sampled_from(['"0123"', ""]),
    called_at=st.floats(0, 2e9),
    lifetimes=st.builds(Lifetimes, *[st.integers(0, 2**32 - 1)] * 3),
    gzip=st.binary(max_size=60),
    seeded=st.booleans(),
    validator=st.sampled_from(['W/"theirs"', ""]),
)


@given(entries, st.integers(0, 4), st.data())
def test_sealed(entry: Entry, stamps: int, data: st.DataObject) -> None:
    """Both bodies and the seed's mark come back as they were; a flipped bit or a cut end does not."""
    made = tuple(make_stamp(b"s%d" % n, bytes((n,)) * 16) for n in range(stamps))
    value = seal(entry, made, b"key", KEYRING)
    assert unseal(value, b"key", KEYRING) == (entry, made)
    at, bit = data.draw(st.integers(0, len(value) - 1)), data.draw(st.integers(0, 7))
    flipped = value[:at] + bytes((value[at] ^ 1 << bit,)) + value[at + 1 :]
    for wrong in (flipped, value[:at], value + b"\0"):
        with pytest.raises(CorruptValue):
            unseal(wrong, b"key", KEYRING)
    with pytest.raises(CorruptValue):
        unseal(value, b"other", KEYRING)


# -- Accept-Encoding ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept_encoding", "expected"),
    [
        pytest.param([], False, id="absent"),
        pytest.param([""], False, id="empty"),
        pytest.param(["gzip"], True, id="gzip"),
        pytest.param(["GZip"], True, id="any-case"),
        pytest.param(["x-gzip"], True, id="its-old-name"),
        pytest.param(["br"], False, id="another-coding"),
        pytest.param(["br, deflate"], False, id="two-others"),
        pytest.param(["br, gzip, deflate"], True, id="among-others"),
        pytest.param(["identity"], False, id="identity"),
        pytest.param(["br", "gzip"], True, id="two-headers"),
        pytest.param(["gzip;q=0"], False, id="q-0"),
        pytest.param(["gzip;q=0.000"], False, id="q-0.000"),
        pytest.param(["gzip;q=0."], False, id="q-0-and-a-dot"),
        pytest.param(["gzip ; q = 0"], False, id="q-0-with-spaces"),
        pytest.param(["GZIP;Q=0"], False, id="q-0-in-upper-case"),
        pytest.param(["gzip;q=0.001"], True, id="smallest-weight"),
        pytest.param(["gzip;q=0.5, br;q=1"], True, id="less-wanted-than-another"),
        pytest.param(["gzip;q=1.000"], True, id="q-1.000"),
        pytest.param(["*"], True, id="anything"),
        pytest.param(["*;q=0"], False, id="nothing-else"),
        pytest.param(["gzip, *;q=0"], True, id="gzip-and-nothing-else"),
        pytest.param(["gzip;q=0, *"], False, id="anything-but-gzip"),
        pytest.param(["br, *;q=0.1"], True, id="anything-if-need-be"),
        pytest.param(["gzipped"], False, id="only-begins-so"),
        pytest.param([",, gzip,"], True, id="empty-elements"),
    ],
)
def test_accepts_gzip(accept_encoding: list[str], expected: bool) -> None:
    """Each row is a sentence of RFC 9110 §12.5.3; what it leaves open is answered uncompressed."""
    assert accepts_gzip(accept_encoding) is expected


# -- DELETE ------------------------------------------------------------------------------------

ENVELOPE = b'{"id":"x","message":"y","request_id":"theirs"}'


@pytest.mark.G6
@pytest.mark.parametrize("status", [*range(400, 600)])
def test_on_delete(status: int) -> None:
    """404 ends the caller's own, 401 all of the caller's, a refusal nothing, and doubt counts as deleted."""
    expected: Deleted | Absent | TokenRejected | PassOn
    match status:
        case 404:
            expected = Absent(ENVELOPE)
        case 401:
            expected = TokenRejected(ENVELOPE, Entry(401, ENVELOPE, etag_of(ENVELOPE), 0.0, Lifetimes(10)))
        case _:
            expected = PassOn(ENVELOPE) if status < 500 else Deleted(ENVELOPE)
    assert POLICY.on_delete(Answer(status, ENVELOPE, 0.0), request_id="r", draw=0.0) == expected


@pytest.mark.G6
def test_on_delete_done() -> None:
    """204 is what the API says when it is gone."""
    assert POLICY.on_delete(Answer(204, b"", 0.0), request_id="r", draw=0.0) == Deleted(b"")


@pytest.mark.G6
@pytest.mark.parametrize("status", [200, 201, 202, 205, 206, 301, 302, 304, 307, 308, 600, 999])
def test_on_delete_undocumented(status: int) -> None:
    """No other success, redirect or number above 599 is documented: it means as little as no answer."""
    with pytest.raises(UpstreamInvalid):
        POLICY.on_delete(Answer(status, b'{"id":"x","message":"y"}', 0.0), request_id="r", draw=0.0)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        pytest.param(404, b"<html>", Absent(None), id="404-without-a-reason"),
        pytest.param(401, b"", TokenRejected(None), id="401-without-a-reason"),
        pytest.param(409, b"[]", PassOn(None), id="409-without-a-reason"),
        pytest.param(502, b"<html>", Deleted(None), id="gateway-page"),
        pytest.param(
            404,
            b'{"id":"a","message":"b"}',
            Absent(b'{"id":"a","message":"b","request_id":"r"}'),
            id="request-id-added",
        ),
    ],
)
def test_reasons_of_a_delete(status: int, body: bytes, expected: Any) -> None:
    """The upstream's reason is passed on; where there is none, the meaning of the status stands."""
    assert POLICY.on_delete(Answer(status, body, 0.0), request_id="r", draw=0.0) == expected
