#!/usr/bin/env bash
# CacheControl: an answer with "no-cache" and a lifetime is served from the cache, and the server is not asked
#
# Versions:  CacheControl 0.14.4 (cache in memory, default settings), requests 2.34.2, Python 3.11.7.
# Behaviour: an answer says "Cache-Control: no-cache, max-age=3600", or "no-cache" beside an Expires header, and has an
#            ETag. Until that lifetime is over each GET gets the first body. "no-cache" counts only where nothing else
#            gives a lifetime.
# Expected:  a conditional request each time: RFC 9111, section 5.2.2.4, forbids to use such an answer without
#            successful validation, whatever its lifetime, which is for caches too old to know the directive.
# Seen:      2026-11-27: "of 2 GETs the server saw 1 with no-cache and max-age, 1 with no-cache and Expires, 2 with
#            no-cache alone; no-cache in the request made it 2".
# Source:    cachecontrol/controller.py CacheController.cached_request, which looks for no-cache in the request and for
#            max-age and Expires in the stored answer; psf/cachecontrol issue 132, open since 2016, and pull request
#            460, closed.
# Hurts:     readers of feeds and clients of APIs that send both: one real feed says "no-cache, max-age=315360000"
#            (lemon24/reader issue 384) and would be read once in ten years, without any error.
# Live with: send "Cache-Control: no-cache" with such requests: CacheControl then asks with If-None-Match, and a 304
#            still saves the body.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check CacheControl==0.14.4 requests==2.34.2 ||
  { echo "not tried: the packages could not be installed"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import collections
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests
from cachecontrol import CacheControl

ANSWERS = {
    "/max-age": {"Cache-Control": "no-cache, max-age=3600"},
    "/expires": {"Cache-Control": "no-cache", "Expires": formatdate(time.time() + 3600, usegmt=True)},
    "/alone": {"Cache-Control": "no-cache"},
    "/asked": {"Cache-Control": "no-cache, max-age=3600"},
}
seen = collections.Counter()


class Server(BaseHTTPRequestHandler):
    """Another body, and another ETag, each time."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        seen[self.path] += 1
        body = str(seen[self.path]).encode()
        self.send_response(200)  # with Date
        headers = {**ANSWERS[self.path], "ETag": f'"{body.decode()}"', "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    session = CacheControl(requests.Session())
    session.trust_env = False
    bodies = {}
    for path in ANSWERS:
        url = f"http://127.0.0.1:{server.server_port}{path}"
        session.get(url, timeout=10)
        second = {"Cache-Control": "no-cache"} if path == "/asked" else {}
        bodies[path] = session.get(url, headers=second, timeout=10).text
    session.close()
    server.shutdown()

said = (
    f"of 2 GETs the server saw {seen['/max-age']} with no-cache and max-age, {seen['/expires']} with no-cache and "
    f"Expires, {seen['/alone']} with no-cache alone; no-cache in the request made it {seen['/asked']}"
)
if bodies != {"/max-age": "1", "/expires": "1", "/alone": "2", "/asked": "2"}:
    sys.exit(f"changed: {said}")
print(f"still so: {said}")
PY
