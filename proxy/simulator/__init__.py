"""DigitalOcean's snapshot API on loopback, for the demo, the tests and the benchmarks.

async with Simulator() as simulator:
    token = simulator.world.token()
    ...  # GET simulator.url + "/v2/snapshots/6372321" with token.value
    assert simulator.count(method="GET") == 1
"""

from proxy.simulator.faults import Fault, FaultKind
from proxy.simulator.gates import Gate
from proxy.simulator.limits import Limits
from proxy.simulator.log import Call
from proxy.simulator.server import Simulator
from proxy.simulator.world import (
    DROPLET_ID,
    DROPLET_SNAPSHOT_ID,
    FULL_ACCESS,
    READ_ONLY,
    VOLUME_ID,
    VOLUME_SNAPSHOT_ID,
    Snapshot,
    Token,
    World,
)

__all__ = [
    "DROPLET_ID",
    "DROPLET_SNAPSHOT_ID",
    "FULL_ACCESS",
    "READ_ONLY",
    "VOLUME_ID",
    "VOLUME_SNAPSHOT_ID",
    "Call",
    "Fault",
    "FaultKind",
    "Gate",
    "Limits",
    "Simulator",
    "Snapshot",
    "Token",
    "World",
]
