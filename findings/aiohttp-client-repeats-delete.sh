#!/usr/bin/env bash
# aiohttp client: a DELETE whose answer is lost is sent a second time, and the caller sees only the second answer
#
# Versions:  aiohttp 3.14.5, Python 3.11.7.
# Behaviour: the server reads a DELETE, carries it out and closes before it has answered. The client sends the DELETE
#            again on a new connection and says nothing, neither to the caller nor to the log. The second DELETE
#            finds nothing left: the caller's one answer is 404 for what its own call deleted. The first connection
#            need not be an old one. GET, HEAD, OPTIONS, TRACE, PUT and DELETE are treated so.
# Expected:  ServerDisconnectedError, or a documented setting: RFC 9112, section 9.3.1, lets a client repeat such a
#            request, and does not ask it to; what the caller then reads is the answer to another request.
# Seen:      2026-11-27: "one delete() sent 2 DELETEs and returned 404; with the middleware it sent 1 and raised".
# Source:    aiohttp/client.py IDEMPOTENT_METHODS and ClientSession._request (retry_persistent_connection). The
#            switch is private, and aiohttp/test_utils.py TestClient turns it off: tests with it never show this.
# Hurts:     callers who count their calls, pay for them or take a 404 for "was not there", and proxies, which turn
#            one caller's write into two.
# Live with: a client middleware (middlewares= of ClientSession) that turns ServerDisconnectedError and ClientOSError
#            into an error of one's own: the repeat looks at the type, and the script shows that it stays away.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check aiohttp==3.14.5 ||
  { echo "not tried: the package could not be installed"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import asyncio
import sys

import aiohttp


class MayHaveBeenCarriedOut(aiohttp.ClientError):
    """The connection ended before the answer came."""


async def no_repeat(request, handler):
    """Hide the two errors from the client's own repeat."""
    try:
        return await handler(request)
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as lost:
        raise MayHaveBeenCarriedOut from lost


async def deletes(*middlewares):
    """Call delete() once; return what the caller saw and how many DELETEs the server read."""
    read = 0

    async def serve(reader, writer):
        nonlocal read
        await reader.readuntil(b"\r\n\r\n")
        read += 1
        if read > 1:
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v2/snapshots/1"
        async with aiohttp.ClientSession(middlewares=middlewares) as session:
            try:
                async with session.delete(url) as answer:
                    return answer.status, read
            except aiohttp.ClientError as error:
                return type(error).__name__, read


async def main():
    default = await deletes()
    guarded = await deletes(no_repeat)
    if (default, guarded) != ((404, 2), ("MayHaveBeenCarriedOut", 1)):
        return f"changed: (caller saw, DELETEs read) is {default}, and {guarded} with the middleware"
    return "still so: one delete() sent 2 DELETEs and returned 404; with the middleware it sent 1 and raised"


verdict = asyncio.run(asyncio.wait_for(main(), 30))
print(verdict)
sys.exit(verdict.startswith("changed"))
PY
