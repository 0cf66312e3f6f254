"""The map of slots, from whichever node of a Cluster gives it, over a connection of its own."""

from collections.abc import Sequence

from hiredis import ProtocolError
from redis.exceptions import ResponseError

from proxy.storage.readiness import Refusal, refused
from proxy.storage.slots import SlotRange, read_slots
from proxy.storage.wire import Endpoint, Wire
from proxy.tasks.listening import ListeningTimeout

_ASK_S = 0.5
"""Each node that is asked has so long."""


async def find_map(nodes: Sequence[Endpoint]) -> list[SlotRange] | Refusal:
    """Ask `nodes` for the map of slots, one after the other, until one gives it."""
    trouble = Refusal("unreachable", "no node was found")
    for node in nodes:
        wire = Wire(node)
        try:
            with ListeningTimeout(_ASK_S):
                await wire.open()
                (reply,) = await wire.run([("CLUSTER", "SLOTS")])
            if isinstance(reply, Exception):
                raise reply
            return read_slots(reply, node.host)
        except (OSError, ResponseError, ProtocolError, ValueError) as error:
            trouble = refused(error, password=wire.password)
        finally:
            wire.close()
    return trouble
