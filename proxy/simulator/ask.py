"""One request to the simulated API, and what several actions need: its body, a snapshot, a page of the list.

Pure: time and the World come in. Where the specification is silent: a `per_page` above 200 counts as 200, a
page or `per_page` that is no positive number as not given.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import orjson

from proxy.simulator.answers import Answer, encode
from proxy.simulator.world import ResourceType, Snapshot, Token, World

_PER_PAGE: Final = 20
_PER_PAGE_MAX: Final = 200


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `path` is raw, without query; `url` begins absolute links; `now` is Unix seconds."""

    world: World
    token: Token
    method: str
    path: str
    query: str
    body: bytes
    url: str
    now: float

    def may(self, *scopes: str) -> bool:
        """Tell whether the token has one of `scopes`."""
        return not self.token.scopes.isdisjoint(scopes)

    def json(self) -> Any:
        """Parse the body; None where it is no JSON."""
        try:
            return orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None

    def snapshot(self, snapshot_id: str, resource_type: ResourceType) -> Snapshot | None:
        """Find a snapshot of the token's team; None where there is none of this type."""
        found = self.world.find(snapshot_id, team=self.token.team)
        return found if found and found.resource_type == resource_type else None


def one_snapshot(ask: Ask, snapshot: Snapshot, status: int = 200) -> Answer:
    """Answer with one snapshot, as the token may see it."""
    return Answer(status, b'{"snapshot":%b}' % snapshot.fragment(ask.token))


def one_page(
    ask: Ask,
    snapshots: Sequence[Snapshot],
    fragment: Callable[[Snapshot, Token], bytes] = Snapshot.fragment,
) -> Answer:
    """Answer with the page of `snapshots` that the query names, its links and the total."""
    query = dict(parse_qsl(ask.query))
    page = _positive(query.get("page")) or 1
    per_page = min(_positive(query.get("per_page")) or _PER_PAGE, _PER_PAGE_MAX)
    total = len(snapshots)
    shown = snapshots[(page - 1) * per_page : page * per_page]
    last = max(1, -(-total // per_page))

    def link(number: int) -> str:
        return f"{ask.url}{ask.path.removesuffix('/')}?{urlencode({**query, 'page': number})}"

    pages: dict[str, str] = {}
    if page > 1:
        pages |= {"first": link(1), "prev": link(min(page - 1, last))}
    if page < last:
        pages |= {"next": link(page + 1), "last": link(last)}
    body = b'{"snapshots":[%b],"links":%b,"meta":{"total":%d}}' % (
        b",".join(fragment(snapshot, ask.token) for snapshot in shown),
        encode({"pages": pages} if pages else {}),
        total,
    )
    return Answer(200, body)


def _positive(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch("[1-9][0-9]{0,8}", text) else None
