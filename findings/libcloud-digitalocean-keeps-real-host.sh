#!/usr/bin/env bash
# apache-libcloud: a DigitalOcean driver that is pointed at a test server asks the real API, with the token
#
# Versions:  apache-libcloud 3.9.1, Python 3.11.7.
# Behaviour: the keywords host, port, secure, timeout, proxy_url and even the driver's own ex_per_page raise a
#            TypeError of object.__new__() that names neither keyword nor driver: only the token can be given. The
#            next try, to set driver.connection.host, .port and .secure, raises nothing and has no effect: the
#            address was taken when the driver was made, and the first request looks up api.digitalocean.com.
# Expected:  the keywords work, as the docstrings of the driver and of every libcloud driver say; or the attributes
#            are read when a request is made.
# Seen:      2026-11-27: "host, timeout and ex_per_page raise TypeError; with the host set afterwards the driver looks
#            up api.digitalocean.com, and after connect() it asks 127.0.0.1".
# Source:    libcloud/common/digitalocean.py DigitalOceanBaseDriver.__new__ and libcloud/compute/drivers/
#            digitalocean.py DigitalOceanNodeDriver.__new__, which pass the keywords on to object.__new__;
#            DigitalOcean_v2_BaseDriver.__init__, which drops host, port and secure; libcloud/common/base.py
#            Connection.connect, which reads the attributes once.
# Hurts:     tests, trial runs and users of a proxy or recorder in front of the API: what they create and destroy is
#            real.
# Live with: after setting the attributes call driver.connection.connect(), and check driver.connection.connection.host
#            before the first request. ex_per_page can be set on the driver at any time.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check apache-libcloud==3.9.1 ||
  { echo "not tried: the package could not be installed"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from libcloud.compute.providers import get_driver
from libcloud.compute.types import Provider

signal.alarm(50)
for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[name]
looked_up = []
resolve = socket.getaddrinfo


def only_loopback(host, *args, **settings):
    """Note each name that is looked up, and let nothing leave this computer."""
    looked_up.append(host)
    if host != "127.0.0.1":
        raise socket.gaierror(socket.EAI_NONAME, "not looked up in this test")
    return resolve(host, *args, **settings)


socket.getaddrinfo = only_loopback


class TestServer(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"droplets": [], "links": {}, "meta": {"total": 0}}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def refused(**keyword):
    try:
        Driver("token-of-the-test", **keyword)
    except TypeError:
        return True
    return False


def asked(*, connect):
    """Point a driver at the test server by its attributes; return the host that it then asks."""
    driver = Driver("token-of-the-test")
    driver.connection.host, driver.connection.port = "127.0.0.1", server.server_port
    driver.connection.secure = False
    if connect:
        driver.connection.connect()
    looked_up.clear()
    try:
        driver.list_nodes()
    except OSError:
        pass
    return looked_up[0]


server = ThreadingHTTPServer(("127.0.0.1", 0), TestServer)
threading.Thread(target=server.serve_forever, daemon=True).start()
Driver = get_driver(Provider.DIGITAL_OCEAN)
refusals = refused(host="127.0.0.1"), refused(timeout=5), refused(ex_per_page=50)
real, own = asked(connect=False), asked(connect=True)
if (refusals, real, own) != ((True, True, True), "api.digitalocean.com", "127.0.0.1"):
    sys.exit(f"changed: host, timeout, ex_per_page refused: {refusals}; asked {real}, and {own} after connect()")
print(
    "still so: host, timeout and ex_per_page raise TypeError; with the host set afterwards the driver looks up"
    f" {real}, and after connect() it asks {own}"
)
PY
