"""Four verdicts for those on call: on callers, cache, upstream and machinery.

Each is one state, one figure and one sentence, and comes from numbers alone. The order of the cases is the
order of urgency: the first that holds is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from proxy.core.events import Standing
from proxy.telemetry.history import Span, share

State = Literal["ok", "warn", "bad", "quiet"]
"""`quiet`: nothing was asked, so there is nothing to judge."""

_NONE = "\N{EN DASH}"
_FAILING, _FAILED = 0.005, 0.05
"""The share of answers with 429 or 5xx from which a verdict warns, and from which it is bad."""
_CALLS_FAILING = 0.1
_POOR = 0.2
_FEW = 20
"""So few reads in a minute do not make a cache a poor one."""
_LOW = 0.1
"""The part of an hour's calls below which a token is said to run low."""
_CROWDED = 0.9


@dataclass(frozen=True, slots=True)
class Verdict:
    """One verdict, for people."""

    about: Literal["callers", "cache", "upstream", "machinery"]
    state: State
    figure: str
    says: str


@dataclass(frozen=True, slots=True)
class Machinery:
    """The state of this process and of its store."""

    ready: bool
    store_up: bool
    store_shared: bool
    secret_mismatch: bool
    pending_invalidations: int
    replicas: int
    connections: int
    max_connections: int


def percent(part: float | None) -> str:
    """Write a share. Only a whole is 100 %, and only nothing is 0 %."""
    if part is None:
        return _NONE
    if part in {0, 1}:
        return f"{part * 100:.0f} %"
    return f"{min(max(part * 100, 0.1), 99.9):.1f} %"


def callers(recent: Span) -> Verdict:
    """Judge whether callers get answers."""
    asked, failed = recent.counts.requests, recent.counts.failed
    if not asked:
        return Verdict("callers", "quiet", _NONE, "No request in the last minute.")
    part = failed / asked
    figure = percent(share(asked - failed, asked))
    if not failed:
        return Verdict("callers", "ok", figure, f"{_count(asked, 'request')} answered, none with 429 or 5xx.")
    state: State = "bad" if part >= _FAILED else "warn" if part >= _FAILING else "ok"
    return Verdict("callers", state, figure, f"{failed:,.0f} of {_count(asked, 'request')} got 429 or 5xx.")


def cache(recent: Span, *, store_up: bool) -> Verdict:
    """Judge whether the cache answers reads."""
    reads, cached = recent.counts.reads, recent.counts.cached
    hit_ratio = share(cached, reads)
    if not store_up:
        return Verdict(
            "cache", "warn", percent(hit_ratio), "Redis is away: only this replica's memory answers."
        )
    if not reads:
        return Verdict("cache", "quiet", _NONE, "No read in the last minute.")
    says = f"{cached:,.0f} of {_count(reads, 'read')} answered from the cache."
    poor = reads >= _FEW and cached / reads < _POOR
    return Verdict("cache", "warn" if poor else "ok", percent(hit_ratio), says)


def upstream(recent: Span, breakers_open: Sequence[str], standings: Mapping[str, Standing]) -> Verdict:
    """Judge whether the upstream answers, and how many calls it is spared."""
    calls, avoided = recent.counts.calls, recent.counts.avoided
    figure = percent(share(avoided, avoided + calls))
    failed = recent.counts.calls_failed
    paused, seconds = max(
        ((caller, standing.cooldown_s) for caller, standing in standings.items()),
        key=lambda pair: pair[1],
        default=("", 0.0),
    )
    lowest, left = min(
        ((caller, standing.hour / (standing.per_hour or 1)) for caller, standing in standings.items()),
        key=lambda pair: pair[1],
        default=("", 1.0),
    )
    state: State = "warn"
    if breakers_open:
        state, says = "bad", f"It does not answer; only probed with: {', '.join(breakers_open)}."
    elif calls and failed / calls >= _CALLS_FAILING:
        says = f"{failed:,.0f} of {_count(calls, 'call')} failed."
    elif seconds > 0:
        says = f"A 429 pauses {paused} for {seconds:,.0f} s."
    elif left < _LOW:
        says = f"{lowest} has {percent(round(left, 4))} of its hour left."
    elif not calls + avoided:
        state, says = "quiet", "No call in the last minute."
    else:
        state, says = "ok", f"{_count(calls, 'call')} made, {avoided:,.0f} spared."
    return Verdict("upstream", state, figure, says)


def machinery(now: Machinery) -> Verdict:
    """Judge this process, its store, and the other replicas."""
    state: State = "bad"
    if not now.store_up:
        says = "Redis is not usable: every miss goes upstream."
    elif now.secret_mismatch:
        says = "A replica has another secret: entries are not shared."
    elif now.pending_invalidations:
        says = f"{_count(now.pending_invalidations, 'invalidation')} not taken by Redis yet."
    elif not now.ready:
        state, says = "warn", "This replica takes no new traffic: it is starting or stopping."
    elif now.connections >= now.max_connections * _CROWDED:
        state = "warn"
        says = f"{now.connections:,} of {now.max_connections:,} connections are open."
    else:
        kind = "Redis answers" if now.store_shared else "The embedded store answers"
        state, says = "ok", f"{kind}; {_count(now.connections, 'connection')} open."
    return Verdict("machinery", state, _count(now.replicas, "replica"), says)


def _count(number: float, noun: str) -> str:
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"
