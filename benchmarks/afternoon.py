"""The cache that one writes in an afternoon, of the same libraries as the proxy.

A handler, a `GET`, a `SET` with a lifetime, a counter and a histogram. It keeps callers apart and nothing
more: no coalescing, no quota, no check of what the API sent, no invalidation, no deadline of its own.
`python -m benchmarks.afternoon REDIS_PORT UPSTREAM_PORT` prints its port.
"""

import asyncio
import sys
from hashlib import sha256
from time import perf_counter

import uvloop
from aiohttp import ClientSession, web
from prometheus_client import Counter, Histogram, generate_latest
from redis.asyncio import Redis

TTL_S = 3600

REQUESTS = Counter("afternoon_requests", "Requests", ["cache", "status"])
DURATION = Histogram("afternoon_request_duration_seconds", "Time to answer", ["cache"])


class Cache:
    """Answers from Redis, else from the upstream."""

    def __init__(self, redis: Redis, session: ClientSession) -> None:
        self._redis = redis
        self._session = session

    async def answer(self, request: web.Request) -> web.Response:
        """Answer one read."""
        started = perf_counter()
        authorization = request.headers.get("Authorization", "")
        key = sha256(f"{authorization} {request.path}".encode()).hexdigest()
        body, status, cache = await self._redis.get(key), 200, "hit"
        if body is None:
            headers = {"Authorization": authorization}
            async with self._session.get(request.path, headers=headers) as answer:
                body, status, cache = await answer.read(), answer.status, "miss"
            if status == web.HTTPOk.status_code:
                await self._redis.set(key, body, ex=TTL_S)
        REQUESTS.labels(cache, status).inc()
        DURATION.labels(cache).observe(perf_counter() - started)
        headers = {"Content-Type": "application/json", "X-Cache": cache}
        return web.Response(body=body, status=status, headers=headers)


async def metrics(_: web.Request) -> web.Response:
    """Show the counter and the histogram."""
    return web.Response(body=generate_latest())


async def main(redis_port: int, upstream_port: int) -> None:
    """Run until killed."""
    redis = Redis(host="127.0.0.1", port=redis_port, max_connections=1000)  # 100 by default, and a 500 beyond
    async with ClientSession(f"http://127.0.0.1:{upstream_port}") as session:
        app = web.Application()
        app.add_routes(
            [web.get("/v2/snapshots/{id}", Cache(redis, session).answer), web.get("/metrics", metrics)]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        sys.stdout.write(f"{runner.addresses[0][1]}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:3])))
