#!/usr/bin/env bash
# python-digitalocean: an error on a later page makes a list shorter, and nothing is raised
#
# Versions:  python-digitalocean 1.17.0, Python 3.11.7.
# Behaviour: get_all_snapshots() and its likes read further pages while an answer names a next one. The status of the
#            first page is checked, that of the others is not: a 429, 500 or 401 with a JSON body is merged into the
#            result, has no next page, and so ends the list. The caller gets the pages before it as if they were all.
# Expected:  the DataReadError that the same answer raises on the first page.
# Seen:      2026-11-27: "429 on page 2 of 2: get_all_snapshots() returned 2 of 4 snapshots and raised nothing".
# Source:    digitalocean/baseapi.py BaseAPI.get_data (checks) and __deal_with_pagination (does not).
# Hurts:     accounts with more than 200 of anything: scripts that compare what exists with what should exist make
#            the missing ones again, or remove what only the missing ones still need, and a 429 is most likely just
#            when many pages are read.
# Live with: read page by page with get_data("snapshots/", params={"page": n}), where each answer is checked, and
#            compare the number with meta.total.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check python-digitalocean==1.17.0 ||
  { echo "not tried: the package could not be installed"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import json
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import digitalocean

signal.alarm(50)
failing_page = 0
REFUSED = {"id": "too_many_requests", "message": "API rate limit exceeded."}


class Upstream(BaseHTTPRequestHandler):
    """Lists four snapshots on two pages; the failing page answers 429."""

    def do_GET(self):
        page = int(parse_qs(urlsplit(self.path).query).get("page", ["1"])[0])
        names = [f"snapshot-{page}-{number}" for number in (1, 2)]
        answer = {"snapshots": [{"id": name, "name": name} for name in names], "meta": {"total": 4}, "links": {}}
        if page == 1:
            address = f"http://127.0.0.1:{self.server.server_port}/v2/snapshots?page=2&per_page=2"
            answer["links"] = {"pages": {"next": address, "last": address}}
        refused = page == failing_page
        body = json.dumps(REFUSED if refused else answer).encode()
        self.send_response(429 if refused else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
threading.Thread(target=server.serve_forever, daemon=True).start()
address = f"http://127.0.0.1:{server.server_port}/v2/"
found = []
for failing_page in (0, 1, 2):
    manager = digitalocean.Manager(token="token-of-the-test", end_point=address)
    try:
        found.append(len(manager.get_all_snapshots()))
    except digitalocean.DataReadError:
        found.append("DataReadError")
if found != [4, "DataReadError", 2]:
    sys.exit(f"changed: without a 429, with one on page 1, with one on page 2: {found}")
print("still so: 429 on page 2 of 2: get_all_snapshots() returned 2 of 4 snapshots and raised nothing")
PY
