"""The transcript of the demo, step by step: each makes its requests and says what they should show.

The numbers that a step expects depend on the steps before it: they share one proxy and one simulator, apart
from the two steps that set up their own.
"""

import asyncio
import json
from collections import Counter
from http import HTTPStatus
from typing import Final

from proxy.core.errors import UpstreamUnreachable
from proxy.core.http import CACHE_NAME
from proxy.demo.stage import SNAPSHOTS, SNAPSHOTS_PATH, WIDTH, Expected, Stage, set_up
from proxy.demo.words import dim, say, title
from proxy.simulator import DROPLET_SNAPSHOT_ID, VOLUME_SNAPSHOT_ID, Limits

_CROWD: Final = 200
_PER_MINUTE: Final = 20
_MINUTE_S: Final = 2
_MAX_WAIT_S: Final = 3
_BURST: Final = 60
"""More than the limit, and than what comes free while callers wait: some are answered late, some are not."""

_DROPLET: Final = f"{SNAPSHOTS_PATH}/{DROPLET_SNAPSHOT_ID}"
_VOLUME: Final = f"{SNAPSHOTS_PATH}/{VOLUME_SNAPSHOT_ID}"
_UNKNOWN: Final = f"{SNAPSHOTS_PATH}/404404404"
_MISS: Final = Expected(HTTPStatus.OK, "fwd=uri-miss; fwd-status=200; stored", 1)
_HIT: Final = Expected(HTTPStatus.OK, "hit; ttl=", 0)
_GONE: Final = Expected(HTTPStatus.NOT_FOUND, "fwd=uri-miss; fwd-status=404; stored", 1)


async def _miss(stage: Stage) -> None:
    title("The first request for this snapshot: a miss. The proxy asks upstream, and keeps the answer.")
    await stage.ask(stage.owner, _DROPLET, _MISS)


async def _hit(stage: Stage) -> None:
    title("Again: a hit. No call upstream.")
    await stage.ask(stage.owner, _DROPLET, _HIT)


async def _not_modified(stage: Stage) -> None:
    title("A client that names the entity tag it got need not even receive the snapshot again.")
    known = await stage.ask(stage.owner, _DROPLET, _HIT)
    expected = Expected(HTTPStatus.NOT_MODIFIED, _HIT.cache_status, 0)
    await stage.ask(stage.owner, _DROPLET, expected, **{"If-None-Match": known.etag})


async def _kept_apart(stage: Stage) -> None:
    title("A colleague's token, without the scope tag:read, is kept apart: it sees what it may see.")
    theirs = await stage.ask(stage.colleague, _DROPLET, _MISS)
    ours = await stage.ask(stage.owner, _DROPLET, _HIT)
    seen = [answer.document["snapshot"]["tags"] for answer in (theirs, ours)]
    expected = [None, ["web", "env:prod"]]
    stage.show(
        f"tags: {json.dumps(seen[0])} for the colleague, {json.dumps(seen[1])} for the first",
        seen == expected,
        json.dumps(expected),
    )


async def _refused(stage: Stage) -> None:
    title("An invented token gets nothing of what is cached for others. The 401 is remembered.")
    expected = Expected(HTTPStatus.UNAUTHORIZED, "fwd=uri-miss; fwd-status=401", 1)
    await stage.ask(stage.stranger, _DROPLET, expected)
    await stage.ask(stage.stranger, _DROPLET, Expected(HTTPStatus.UNAUTHORIZED, _HIT.cache_status, 0))


async def _unknown(stage: Stage) -> None:
    title("A snapshot that does not exist is asked for once. Then the 404 is remembered for a while.")
    await stage.ask(stage.owner, _UNKNOWN, _GONE)
    await stage.ask(stage.owner, _UNKNOWN, Expected(HTTPStatus.NOT_FOUND, _HIT.cache_status, 0))


async def _crowd(stage: Stage) -> None:
    title(f"{_CROWD} callers at once want a snapshot that is not cached: one call upstream for all of them.")
    await stage.ask_at_once(stage.owner, [_VOLUME] * _CROWD, _MISS)


async def _list(stage: Stage) -> None:
    title(f"A list: one call. It brings all {SNAPSHOTS} single snapshots too: reading them makes no call.")
    listed = (await stage.ask(stage.owner, f"{SNAPSHOTS_PATH}?per_page={SNAPSHOTS}", _MISS)).document
    await stage.ask_at_once(
        stage.owner, [f"{SNAPSHOTS_PATH}/{one['id']}" for one in listed["snapshots"]], _HIT
    )
    seeded = await stage.metric("snapshot_proxy_upstream_avoided_total", 'reason="seeded"')
    stage.show(
        f"{seeded} of {listed['meta']['total']} were answered with what came with the list",
        seeded == listed["meta"]["total"] == SNAPSHOTS,
        f"{SNAPSHOTS} of {SNAPSHOTS}",
    )


async def _delete(stage: Stage) -> None:
    title("The first token deletes what the colleague has just fetched. The colleague sees that at once.")
    await stage.ask(stage.colleague, _VOLUME, _MISS)
    deleted = Expected(HTTPStatus.NO_CONTENT, "fwd=method; fwd-status=204", 1)
    await stage.ask(stage.owner, _VOLUME, deleted, method="DELETE")
    await stage.ask(stage.colleague, _VOLUME, _GONE)


async def _down(stage: Stage) -> None:
    title("The upstream is gone. What is fresh is still answered, what is not cached gets a clear error.")
    await stage.simulator.stop()
    await stage.ask(stage.owner, _DROPLET, _HIT)
    cold = f"{SNAPSHOTS_PATH}/{stage.simulator.world.snapshots()[-1].id}"
    error = Expected(HTTPStatus.BAD_GATEWAY, "fwd=uri-miss", 0)
    envelope = (await stage.ask(stage.colleague, cold, error)).document
    stage.show(
        f"{envelope['id']}, {envelope['message']}",
        envelope["id"] == UpstreamUnreachable.id,
        UpstreamUnreachable.id,
    )
    await stage.simulator.start()


async def _stale(stage: Stage) -> None:
    title(
        "The same where nothing is fresh (a second proxy, with a TTL of a second): stale answers are served."
    )
    async with set_up("cache.fresh_s=1", "cache.stale_while_revalidate_s=0") as other:
        await other.ask(other.owner, _DROPLET, _MISS)
        await asyncio.sleep(1.0)  # the TTL: what is shown is an entry after it
        await other.simulator.stop()
        stale = Expected(HTTPStatus.OK, "fwd=stale; detail=stale-if-error", 0)
        await other.ask(other.owner, _DROPLET, stale)
        await other.simulator.start()
    stage.surprises += other.surprises


async def _limit(stage: Stage) -> None:
    title(
        f"The limit (a third proxy; {_PER_MINUTE} calls in {_MINUTE_S} s, instead of 250 in a minute):"
        f" {_BURST} callers at once,",
        f"each for another snapshot. Who can be answered within {_MAX_WAIT_S} s waits, the others are told.",
    )
    async with set_up(
        f"quota.per_minute={_PER_MINUTE}",
        f"quota.max_wait_s={_MAX_WAIT_S}",
        limits=Limits(per_minute=_PER_MINUTE, minute_s=_MINUTE_S, hour_s=_MINUTE_S * 60),
        clock_scale=_MINUTE_S / 60,
    ) as other:
        ids = [snapshot.id for snapshot in other.simulator.world.snapshots()[:_BURST]]
        with other.watch() as seen:
            answers = await asyncio.gather(
                *(other.fetch(other.owner, f"{SNAPSHOTS_PATH}/{id_}") for id_ in ids)
            )
        say(dim(f"   {_BURST} x GET {SNAPSHOTS_PATH}/ID, each another one ({other.owner.name})"))
        statuses = Counter(answer.status for answer in answers)
        given = ", ".join(f"{status:d} x {times}" for status, times in sorted(statuses.items()))
        other.show(
            f"{given:<{WIDTH + 4}} {seen}",
            statuses.keys() == {HTTPStatus.OK, HTTPStatus.TOO_MANY_REQUESTS}
            and _PER_MINUTE < seen.calls == statuses[HTTPStatus.OK],
            f"200 for more than {_PER_MINUTE}, as many upstream, 429 for the others",
        )
        told = next((each.document for each in answers if each.status != HTTPStatus.OK), None) or {}
        message = str(told.get("message"))
        other.show(f"429: {message}", message.startswith(f"{CACHE_NAME}: this token's calls"), "a reason")
        refusals = other.simulator.count(status=HTTPStatus.TOO_MANY_REQUESTS)
        other.show(f"429s that the upstream sent: {refusals}", refusals == 0, "none")
        await other.ask(other.owner, f"{SNAPSHOTS_PATH}/{ids[0]}", _HIT)
    stage.surprises += other.surprises


async def _saved(stage: Stage) -> None:
    title("What the first proxy saved, by its own metrics:")
    requests = await stage.metric("snapshot_proxy_requests_total")
    calls = await stage.metric("snapshot_proxy_upstream_requests_total")
    failed = await stage.metric("snapshot_proxy_upstream_requests_total", 'status="error"')
    stage.show(
        f"{requests} requests answered with {calls} calls, {failed} of which found the upstream gone:"
        f" {requests - calls} calls saved ({(requests - calls) / max(requests, 1):.0%})",
        failed > 0 and (requests, calls - failed) == (stage.requests, stage.simulator.count()),
        f"{stage.requests} requests, {stage.simulator.count()} calls that arrived, and one that did not",
    )


STEPS = (
    _miss,
    _hit,
    _not_modified,
    _kept_apart,
    _refused,
    _unknown,
    _crowd,
    _list,
    _delete,
    _down,
    _stale,
    _limit,
    _saved,
)
