"""What each fault does to the world. `plan.py` says when, and to whom.

The law of this file: a fault does what a network, a server, an operator or a caller can do, and nothing that
none of them can. A kind that stands in the plan and not here is an error.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simulation.plan import AT_ONE_REPLICA, OF_THE_API, PAUSED_AT_AN_ANSWER, SNAPSHOTS, TOKENS, Fault
from simulation.replica import Replica
from simulation.upstream import Trouble

if TYPE_CHECKING:
    from simulation.world import World

_REFUSALS = (
    "OOM command not allowed when used memory > 'maxmemory'.",
    "READONLY You can't write against a read only replica.",
    "LOADING Redis is loading the dataset in memory",
)
_LONGEST_RESTART_S = 0.5
_LONGEST_LAG_S = 0.3


def strike(world: "World", fault: Fault) -> None:
    """Let a fault begin now."""
    replica = world.replicas[fault.which % len(world.replicas)]
    one = fault.kind in (*AT_ONE_REPLICA, PAUSED_AT_AN_ANSWER)
    world.meet(fault.kind, [replica] if one else world.replicas)
    world.tell("FAULT", f"{fault.kind} for {fault.seconds:.3f} s" + (f" at {replica.name}" if one else ""))
    if fault.kind in OF_THE_API:
        until = world.loop.now + fault.seconds
        world.api.troubles.append(Trouble(fault.kind.removeprefix("api-"), world.loop.now, until))
    else:
        _EFFECTS[fault.kind](world, fault, replica)


# -- Redis -----------------------------------------------------------------------------------------


def _slow(world: "World", fault: Fault, _: Replica) -> None:
    world.redis.slow_until, world.redis.slow_s = world.loop.now + fault.seconds, 0.15


def _hung(world: "World", fault: Fault, _: Replica) -> None:
    world.redis.hung_until = world.loop.now + fault.seconds


def _breaks(world: "World", fault: Fault, _: Replica) -> None:
    world.redis.breaks += [fault.kind.removeprefix("redis-breaks-")] * (1 + fault.which % 3)


def _restarts_empty(world: "World", fault: Fault, _: Replica) -> None:
    _lose(world, fault, {}, {})


def _fails_over(world: "World", fault: Fault, _: Replica) -> None:
    """Let the replica of Redis lag from now on, and take its place after a moment."""
    values, expires = world.redis.database.copy()
    since = world.loop.now

    def promoted() -> None:
        world.tell("FAULT", "the replica of Redis takes over, without the last writes")
        world.meet("redis-fails-over", world.replicas)
        world.redis.lost_writes.append((since, world.loop.now))
        _lose(world, fault, values, expires)

    world.later(min(fault.seconds, _LONGEST_LAG_S), promoted)


def _lose(world: "World", fault: Fault, values: dict[bytes, Any], expires: dict[bytes, int]) -> None:
    redis = world.redis
    redis.database.values, redis.database.expires = values, expires
    redis.lost_keys_at.append(world.loop.now)
    if fault.which % 2:
        redis.database.scripts.clear()
    _away(world, min(fault.seconds, _LONGEST_RESTART_S))


def _evicts(world: "World", fault: Fault, _: Replica) -> None:
    redis = world.redis
    keys = sorted(redis.database.values)
    for key in redis.random.sample(keys, min(len(keys), 1 + fault.which)):
        redis.database.evict(key)
    redis.lost_keys_at.append(world.loop.now)


def _refuses_writes(world: "World", fault: Fault, _: Replica) -> None:
    world.redis.refuses = _REFUSALS[fault.which % len(_REFUSALS)]
    world.later(fault.seconds, setattr, world.redis, "refuses", "")


def _server_clock_steps(world: "World", fault: Fault, _: Replica) -> None:
    step_s = round(fault.seconds if fault.which % 2 else -fault.seconds, 3)
    world.tell("FAULT", f"the clock of Redis steps by {step_s:+.3f} s")
    world.redis.skew_s += step_s
    world.redis.steps.append((world.loop.now, step_s))


def _unreachable(world: "World", fault: Fault, _: Replica) -> None:
    _away(world, fault.seconds)


def _away(world: "World", seconds: float) -> None:
    world.redis.unreachable = True
    world.redis.drop_all()
    world.later(seconds, setattr, world.redis, "unreachable", False)


def _deaf(world: "World", fault: Fault, _: Replica) -> None:
    world.redis.deaf_until = world.loop.now + fault.seconds


def _stalls(world: "World", fault: Fault, replica: Replica) -> None:
    """Let no message of the channel come to one replica for a while; then all come."""
    until = world.loop.now + fault.seconds
    for connection in world.redis.connections:
        if connection.process is replica.process and connection.channel is not None:
            connection.stalls_until = until


def _cut_off(world: "World", fault: Fault, replica: Replica) -> None:
    """Let one replica not reach Redis for a while."""
    world.redis.cut_off[replica.process] = world.loop.now + fault.seconds
    world.redis.drop_all(replica.process)


# -- replicas and tokens ---------------------------------------------------------------------------


def _clock_steps(world: "World", fault: Fault, replica: Replica) -> None:
    step_s = round(fault.seconds if fault.which % 2 else -fault.seconds, 3)
    replica.skew_s += step_s
    world.most_skew_s += 2 * abs(step_s)


def _paused(world: "World", fault: Fault, replica: Replica) -> None:
    if replica.process.paused or replica.process.dead:
        return
    world.paused.append(replica)
    began = world.loop.now
    world.loop.pause(replica.process)

    def go_on() -> None:
        replica.paused_s += world.loop.now - began
        world.tell(replica.name, "goes on")
        world.loop.go_on(replica.process)

    world.later(fault.seconds, go_on)


def _paused_at_an_answer(world: "World", fault: Fault, replica: Replica) -> None:
    """Pause a replica when the next answer of the API has come to it, and before it has read that."""
    world.api.when_told[replica.process.name] = lambda: _paused(world, fault, replica)


def _killed(world: "World", fault: Fault, replica: Replica) -> None:
    if replica.process.dead:
        return
    number = world.replicas.index(replica)
    if replica.stops:
        world.stopping -= 1
    world.killed.append(replica)
    world.leave(replica)
    for made in [*world.api.flying]:
        if made.replica == replica.process.name:
            world.api.over(made)
    for request in world.requests:
        if request.replica is replica:
            request.done = True
    world.later(fault.seconds, world.boot, number)


def _stopped(world: "World", fault: Fault, replica: Replica) -> None:
    """Let the operator stop a replica (SIGTERM), and start it again."""
    if not (replica.process.dead or replica.stops) and replica.opening.done():
        world.stop(replica, fault.seconds)


def _revoked(world: "World", fault: Fault, _: Replica) -> None:
    token = TOKENS[fault.which % len(TOKENS)]
    world.truth.revoked.setdefault(token, world.loop.now)
    world.tell("API", f"{token}'s token is revoked")


def _scope_changed(world: "World", fault: Fault, _: Replica) -> None:
    token, name = pair = TOKENS[fault.which % 2], SNAPSHOTS[fault.which // 2 % 2]
    world.truth.readable ^= {pair}
    world.truth.forbidden = {pair} - world.truth.readable
    world.tell("API", f"{token} {'may' if pair in world.truth.readable else 'may not'} read {name}")


_EFFECTS: dict[str, Callable[["World", Fault, Replica], None]] = {
    "redis-slow": _slow,
    "redis-hung": _hung,
    "redis-breaks-before": _breaks,
    "redis-breaks-after": _breaks,
    "redis-restarts-empty": _restarts_empty,
    "redis-fails-over": _fails_over,
    "redis-evicts": _evicts,
    "redis-refuses-writes": _refuses_writes,
    "redis-is-unreachable": _unreachable,
    "redis-clock-steps": _server_clock_steps,
    "channel-deaf": _deaf,
    "channel-stalls": _stalls,
    "cut-off": _cut_off,
    "clock-steps": _clock_steps,
    "paused": _paused,
    PAUSED_AT_AN_ANSWER: _paused_at_an_answer,
    "killed": _killed,
    "stopped": _stopped,
    "token-revoked": _revoked,
    "scope-changed": _scope_changed,
}
