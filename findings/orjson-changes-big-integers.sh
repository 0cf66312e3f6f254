#!/usr/bin/env bash
# orjson: an integer of more than 64 bits is read as a float, and so as another number
#
# Versions:  orjson 3.13.0, Python 3.11.7.
# Behaviour: loads() turns integers above 18446744073709551615 and below -9223372036854775808 into the nearest float,
#            and raises nothing. dumps() refuses the same integers with an error.
# Expected:  the integer, as json of the standard library gives it, or the error that dumps() gives.
# Seen:      2026-11-27: "loads() of 18446744073709551617 gave the float 1.8446744073709552e+19, 1 less; dumps() of it
#            raised JSONEncodeError".
# Source:    README of orjson, section "int": it names the 64-bit range as supported for both directions, and an error
#            for dumps() alone.
# Hurts:     caches, proxies and queues that read JSON and write it again: numeric ids, serial numbers and hashes leave
#            them changed, as 1.8446744073709552e19, and a comparison by id finds the wrong thing or nothing.
# Live with: pass the bytes on instead of writing them anew; where numbers may be that long, look for a float where
#            an integer belongs, or read with json.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check orjson==3.13.0 ||
  { echo "not tried: the package could not be installed"; exit 2; }
"$work/venv/bin/python" - <<'PY'
import json
import sys

import orjson

NUMBER = 2**64 + 1
text = str(NUMBER)
read = orjson.loads(text)
try:
    wrote = orjson.dumps(NUMBER)
except orjson.JSONEncodeError:
    wrote = "JSONEncodeError"
if not isinstance(read, float) or int(read) == NUMBER or wrote != "JSONEncodeError" or json.loads(text) != NUMBER:
    sys.exit(f"changed: loads() of {text} gave {read!r}; dumps() of it gave {wrote!r}")
print(
    f"still so: loads() of {text} gave the float {read}, {NUMBER - int(read)} less; dumps() of it raised {wrote}"
)
PY
