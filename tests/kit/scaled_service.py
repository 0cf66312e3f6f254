"""`snapshot-proxy serve` whose quota has a shorter minute and hour: `scaled_service.py SCALE --set=…`."""

import sys
from functools import partial

from proxy import serve
from proxy.app import App
from proxy.cli import main

if __name__ == "__main__":
    serve.App = partial(App, clock_scale=float(sys.argv[1]))
    sys.exit(main(["serve", *sys.argv[2:]]))
