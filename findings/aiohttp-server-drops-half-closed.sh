#!/usr/bin/env bash
# aiohttp server: a caller that half-closes after its request gets no answer, though the handler ran
#
# Versions:  aiohttp 3.14.5 (web.Application and web.Server), Python 3.11.7.
# Behaviour: a caller sends one complete request and then shuts down its sending side (shutdown(SHUT_WR)), which
#            says "this was all" and nothing about reading. The server closes the whole connection at once. The
#            handler goes on to its end all the same, a DELETE is carried out, and its answer is thrown away.
# Expected:  the answer to the complete request; http.server of the standard library gives it. A TCP user that has
#            closed its side may go on receiving (RFC 9293, section 3.6).
# Seen:      2026-11-27: "DELETE carried out 2 times, answered 1 time; http.server answered both".
# Source:    aiohttp/web_protocol.py RequestHandler.eof_received, which returns None; the documentation of
#            asyncio.Protocol.eof_received says that the transport then closes itself.
# Hurts:     callers that half-close (netcat -N, socat, small scripts, some TCP relays): a write is done, they see an
#            empty answer, take it for a failure and send it again.
# Live with: callers send "Connection: close" and keep their side open; a server can build its own protocol objects
#            in web.Server.__call__ from a subclass of RequestHandler whose eof_received returns True.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check aiohttp==3.14.5 ||
  { echo "not tried: the package could not be installed"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import asyncio
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from aiohttp import web

REQUEST = b"DELETE /v2/snapshots/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
carried_out = 0


async def handler(request):
    global carried_out
    await asyncio.sleep(0.3)
    carried_out += 1
    return web.Response(status=204)


class Standard(BaseHTTPRequestHandler):
    def do_DELETE(self):
        time.sleep(0.3)
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass


async def ask(port, *, half_close):
    """Send the request; return whether any answer came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(REQUEST)
    if half_close:
        writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer.startswith(b"HTTP/1.")


async def aiohttp_answers():
    global carried_out
    carried_out = 0
    runner = web.ServerRunner(web.Server(handler))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    answers = [await ask(port, half_close=False), await ask(port, half_close=True)]
    await asyncio.sleep(0.6)
    await runner.cleanup()
    return answers


async def standard_answers():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Standard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    answers = [await ask(port, half_close=False), await ask(port, half_close=True)]
    server.shutdown()
    return answers


async def main():
    theirs = await aiohttp_answers()
    standard = await standard_answers()
    said = f"DELETE carried out {carried_out} times, answered {sum(theirs)} time(s); http.server answered {standard}"
    if (theirs, carried_out, standard) != ([True, False], 2, [True, True]):
        return f"changed: {said}"
    return "still so: DELETE carried out 2 times, answered 1 time; http.server answered both"


verdict = asyncio.run(asyncio.wait_for(main(), 30))
print(verdict)
sys.exit(verdict.startswith("changed"))
PY
