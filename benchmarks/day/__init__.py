"""A simulated day: `python -m benchmarks.day`. No machine is measured, only what is decided.

A fleet reads snapshots for a day: directly, through plain caches, and through this proxy. `fleet.py` says
who reads what and when, `api.py` is DigitalOcean with its two limits, `systems.py` what stands between,
`run.py` lets them do the same day and checks the books.

Of this proxy everything is real that decides: the main path (`proxy.cache`), its flights (`proxy.tasks`), the
gate with its lines, ledgers and breaker (`proxy.gate`), and the whole of `proxy.core`. They run on an event
loop whose time is a number (`clock.py`), so a day takes as long as its work. None of their steps is written
again here; only Redis is (`redis.py`), as dictionaries: a test holds its store equal to the real one.

What is simpler than the world:

- A call takes a fixed time, and a limit or an outage shows in the instant in which it is made. Redis takes no
  time, and does not fail.
- Nobody repeats what failed. Without a proxy that would make it worse.
- Snapshots do not change, and none is deleted. The API sends no validators. The first page names a token's
  first 200 snapshots, and no token has many more.
- The day begins with empty caches; the API took all tokens before.
- A replica that just answered from a fresh entry answers again for `systems.REPEAT_S` without being asked, as
  long as that entry stands in the store: a test shows that this changes nothing.
- Some tokens stand for all. They share nothing but the replicas' breakers, so what becomes of them is scaled;
  for 1,000 fleets, one token for each 1,000 that have as many readers and snapshots, drawn apart.
"""
