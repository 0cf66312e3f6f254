"""The quota ledger in Redis: `core.quota.Ledger` as one atomic script, for all replicas of a token.

The script reads the server's clock, so that replicas need not agree about the time. Its questions are the
ledger's: admit, give back, settle, cool. A test holds it equal to the ledger in Python, step by step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from proxy.core.events import StoreOperation
from proxy.core.http import LONGEST_RETRY_AFTER_S
from proxy.core.identity import Partition
from proxy.core.quota import PAUSES, TURN_S, Admitted, CallClass, Limits, Postponed
from proxy.storage.keys import Keys
from proxy.storage.link import Link, Unavailable
from proxy.storage.readiness import Command

_MARGIN_S = 60
"""A ledger is kept for so much longer than it counts: the hour, but for the minute only where the upstream
did not take the token lately. Tokens can be made up."""

_KNOWN_S = 7 * 24 * 3600
"""That the upstream took a token is kept longer than its calls: it may be used once a day."""

_CORRUPT = "CORRUPT"

_SCRIPT = f"""
local question, given, call = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = tonumber(given)
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
local function window(name, prefix, first)
  return {{name = name, prefix = prefix, limit = tonumber(ARGV[first]), length = tonumber(ARGV[first + 1]),
          bucket = tonumber(ARGV[first + 2]), total = 0, buckets = {{}}}}
end
local minute, hour = window('minute', 'm', 4), window('hour', 'h', 7)
local key, known_key, fields = KEYS[1], KEYS[2], {{}}

-- what is there: buckets of both windows, and moments; anything else is not ours
local windows = {{m = minute, h = hour}}
local flat = redis.pcall('HGETALL', key)
local corrupt = flat.err
for i = 1, #flat, 2 do
  local name, value = flat[i], flat[i + 1]
  local prefix, bucket = string.match(name, '^([mh])(%d+)$')
  if prefix and string.match(value, '^%d+$') and #value < 10 then
    windows[prefix].buckets[tonumber(bucket)] = tonumber(value)
  elseif string.match(name, '^%u$') and string.match(value, '^%d+%.%d+$') then
    fields[name] = tonumber(value)
  else
    corrupt = true
  end
end
if corrupt then
  redis.call('DEL', key)
  return redis.error_reply('{_CORRUPT} it is deleted')
end

local function set(name, value)
  if value then
    value = string.format('%.6f', value)
    redis.call('HSET', key, name, value)
    fields[name] = tonumber(value)
  elseif fields[name] then
    redis.call('HDEL', key, name)
    fields[name] = nil
  end
end
local function is_known()
  return redis.call('EXISTS', known_key) == 1
end
local function expire()
  local window = (fields.C or is_known()) and hour or minute
  redis.call('EXPIRE', key, math.ceil(window.length + call) + {_MARGIN_S})
end
local function put(window, bucket, calls)
  if calls == 0 then return end
  window.total = window.total + calls
  window.buckets[bucket] = (window.buckets[bucket] or 0) + calls
  redis.call('HINCRBY', key, window.prefix .. string.format('%d', bucket), calls)
end
local function add(window, at, calls)
  put(window, math.floor(at / window.bucket), calls)
end
local function spread(window, since, calls)
  local first = math.floor(math.max(math.min(since, now), now - window.length) / window.bucket)
  local steps = math.floor(now / window.bucket) - first + 1
  for step = 0, steps - 1 do
    put(window, first + step, math.floor((step + 1) * calls / steps) - math.floor(step * calls / steps))
  end
end
local function take(window, at)
  local bucket = math.floor(at / window.bucket)
  if (window.buckets[bucket] or 0) < 1 then return 0 end
  put(window, bucket, -1)
  return 1
end
local function wait(window, ceiling, need)
  local excess = window.total + need - ceiling
  if excess <= 0 then return 0 end
  local numbers = {{}}
  for number in pairs(window.buckets) do table.insert(numbers, number) end
  table.sort(numbers)
  for _, number in ipairs(numbers) do
    excess = excess - window.buckets[number]
    if excess <= 0 then return (number + 1) * window.bucket + window.length - now end
  end
  return window.length
end
local function turn_ends(at)
  return tonumber(string.format('%.6f', at - math.max(call - {TURN_S}, 0)))
end
local function left(window)
  return math.max(window.limit - window.total, 0)
end
local function postpone(seconds, why)
  return {{0, string.format('%.6f', seconds), why, left(minute), left(hour)}}
end

-- what has left its window; and what cannot be yet, after a failover to a server whose clock is behind
for _, window in pairs(windows) do
  for bucket, calls in pairs(window.buckets) do
    if (bucket + 1) * window.bucket + window.length <= now or bucket * window.bucket > now + call then
      redis.call('HDEL', key, window.prefix .. string.format('%d', bucket))
      window.buckets[bucket] = nil
    else
      window.total = window.total + calls
    end
  end
end
local furthest = {{
  A = {TURN_S}, C = {LONGEST_RETRY_AFTER_S}, P = math.max(call, minute.length / {PAUSES}),
  T = 0, O = 0, V = minute.length,
}}
for name, seconds in pairs(furthest) do
  if fields[name] and fields[name] > now + seconds + minute.bucket then
    set(name, name == 'C' and now or nil)
  end
end

if question == 'admit' then
  local minutes, hours, need = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
  local refresh = ARGV[13] == '1'
  local alone = call > 0 and not fields.T and not fields.S
  if call > 0 and fields.T then
    alone = now < (fields.V or 0) and minute.total + fields.U + need > minutes
      or fields.O and now - fields.O < hour.length and now - fields.T > minute.bucket and not refresh
  end
  if fields.C then
    if now < fields.C then return postpone(fields.C - now, 'cooldown') end
    if now < (fields.P or 0) then return postpone(fields.P - now, 'turn') end
  elseif alone and now < (fields.A or 0) then
    return postpone(fields.A - now, 'turn')
  end
  local seconds = wait(minute, minutes, need)
  if seconds > 0 then return postpone(seconds, 'minute') end
  seconds = wait(hour, hours, need)
  if seconds > 0 then return postpone(seconds, 'hour') end
  if need > 1 then return {{2}} end
  local at = tonumber(string.format('%.6f', now + call))
  add(minute, at, 1)
  add(hour, at, 1)
  if fields.C then set('P', at) elseif alone then set('A', turn_ends(at)) end
  if not fields.B then set('B', now) end
  expire()
  return {{1, string.format('%.6f', at), left(minute), left(hour), fields.C and 1 or 0, is_known() and 1 or 0,
          string.format('%.6f', fields.B)}}
end

if question == 'give back' then
  local at = tonumber(ARGV[10])
  take(minute, at)
  take(hour, at)
  if fields.A == turn_ends(at) then set('A', nil) end
  if fields.P == at then set('P', nil) end
  return {{}}
end

if question == 'settle' then
  local at, told, probe = tonumber(ARGV[10]), tonumber(ARGV[11]), ARGV[12] == '1'
  local answered, known = ARGV[13] == '1', ARGV[14]
  add(minute, now, take(minute, at))
  add(hour, now, take(hour, at))
  if probe and fields.P == at then
    if answered then
      set('P', nil)
      set('C', nil)
    else
      set('P', now + minute.length / {PAUSES})
    end
  end
  if fields.A == turn_ends(at) then set('A', nil) end
  if not told then
    if known == '1' then set('S', 1) end
  elseif told == 0 then
    add(minute, now, math.max(minute.limit - minute.total, 0))
  else
    local missing = math.max(hour.limit - hour.total - told, 0)
    local since = fields.T or now - hour.length
    local lately = math.floor(missing * minute.length / math.max(now - since, minute.length) + 0.5)
    if missing > 0 then
      spread(hour, since, missing)
      add(minute, now, lately)
      set('O', now)
    end
    if not fields.T then
      set('U', math.max(math.min(missing, minute.limit) - lately, 0))
      set('V', now + minute.length)
    end
    set('T', now)
  end
  if known == '1' then redis.call('SET', known_key, 1, 'EX', {_KNOWN_S}) end
  if known == '0' then redis.call('DEL', known_key) end
  expire()
  return {{}}
end

local seconds = tonumber(ARGV[10])
if not seconds then
  local oldest_leaves = wait(minute, math.max(minute.total, 1), 1)
  seconds = math.min(math.max(oldest_leaves, minute.length / {PAUSES}), minute.length)
elseif minute.total < minute.limit then
  spread(minute, now - minute.length + seconds, minute.limit - minute.total)
  set('V', nil)
end
set('C', math.max(fields.C or 0, now + seconds))
set('P', nil)
expire()
return {{string.format('%.6f', fields.C - now)}}
"""


class Admission(NamedTuple):
    """A call that the ledger admits.

    `known` tells whether the upstream took the token lately; `born` tells this ledger from one that was lost.
    """

    admitted: Admitted
    known: bool
    born: str


class RedisLedger:
    """The ledgers of all tokens. Every question is one round trip; None where Redis does not answer it.

    What is no ledger is no answer either; it is deleted. `call_s` is as in `core.quota.Ledger`. `now` is for
    tests that hold it against that one; without it, the server's clock counts.
    """

    def __init__(
        self,
        link: Link,
        keys: Keys,
        limits: Limits,
        *,
        call_s: float,
        observe: Callable[[StoreOperation], None],
    ) -> None:
        self._link = link
        self._keys = keys
        self._limits = limits
        self._call_s = call_s
        self._observe = observe

    async def admit(
        self, partition: Partition, call_class: CallClass, *, now: float | None = None
    ) -> Admission | Postponed | None:
        """Ask for one call."""
        match await self._admit(partition, call_class, 1, now):
            case [1, at, minute, hour, probe, known, born]:
                admitted = Admitted(float(at), (minute, hour), bool(probe))
                return Admission(admitted, bool(known), born.decode())
            case [0, wait_s, window, minute, hour]:
                return Postponed(float(wait_s), window.decode(), (minute, hour))
            case _:
                return None

    async def foresee(
        self, partition: Partition, call_class: CallClass, need: int, *, now: float | None = None
    ) -> Postponed | None:
        """Ask when `need` calls, two or more, will be admitted; None: now, or Redis cannot tell."""
        match await self._admit(partition, call_class, need, now):
            case [0, wait_s, window, *_]:
                return Postponed(float(wait_s), window.decode())
            case _:
                return None

    async def give_back(self, partition: Partition, admitted: Admitted, *, now: float | None = None) -> None:
        """Take back an admission that was not used."""
        await self._ask("give back", partition, now, repr(admitted.at))

    async def settle(
        self,
        partition: Partition,
        admitted: Admitted,
        remaining_told: int | None,
        *,
        answered: bool,
        known: bool | None,
        now: float | None = None,
    ) -> None:
        """Take note of what became of a call.

        `answered` tells whether there was an answer other than 429, `known` whether it took the token; None:
        it did not say.
        """
        told = "" if remaining_told is None else remaining_told
        took = "" if known is None else int(known)
        await self._ask(
            "settle", partition, now, repr(admitted.at), told, int(admitted.probe), int(answered), took
        )

    async def cool(
        self, partition: Partition, retry_after_s: float | None, *, now: float | None = None
    ) -> float | None:
        """Stop the token's calls on all replicas. Gives for how many seconds."""
        match await self._ask("cool", partition, now, "" if retry_after_s is None else retry_after_s):
            case [bytes(seconds)]:
                return float(seconds)
            case _:
                return None

    async def _admit(self, partition: Partition, call_class: CallClass, need: int, now: float | None) -> Any:
        ceilings = (window.ceiling(call_class, self._limits.reserve) for window in self._limits.windows)
        return await self._ask("admit", partition, now, *ceilings, need, int(call_class is CallClass.REFRESH))

    async def _ask(self, question: str, partition: Partition, now: float | None, *arguments: object) -> Any:
        command: Command = (
            "EVAL",
            _SCRIPT,
            2,
            self._keys.quota(partition),
            self._keys.known(partition),
            question,
            "" if now is None else repr(now),
            repr(self._call_s),
            *(str(part) for window in self._limits.windows for part in window[1:]),
            *(str(argument) for argument in arguments),
        )
        try:
            (reply,) = await self._link.ask(command)
        except Unavailable as error:
            self._observe(StoreOperation("quota", "timeout" if error.too_slow else "error"))
            return None
        match reply:
            case Exception():
                is_corrupt = str(reply).startswith(_CORRUPT)
                self._observe(StoreOperation("quota", "corrupt" if is_corrupt else "error"))
                return None
            case _:
                self._observe(StoreOperation("quota", "ok"))
                return reply
