-- The quota ledger of one token, as the server runs it, in one atomic step. The same rules as `core.quota.Ledger` and, for
-- operations with a limit of their own, `core.operations.Operations`. While Redis answers, this script decides; the Python
-- ones decide for a replica that cannot reach Redis. `tests/storage/test_ledger.py` holds them equal.
--
-- KEYS  1  the ledger (a hash)
--       2  the mark of a token that the upstream accepted lately; without it the token is unverified
--       3  the calls in the hour that others made with the token (a hash: bucket of the hour → calls)
--       4  the cool-down of one operation
--       5  the path of the operation that was stopped last
--       6  a lease, if the question is asked only while it is held
-- ARGV  1  the question: admit, foresee, give back, settle, cool, cool operation
--       2  the time in Unix seconds; empty: the server's
--       3  the longest time of a call in seconds
--       4, 5, 6  the minute: limit in calls, length and bucket in seconds
--       7, 8, 9  the hour: the same
--       10 and more  what the question needs, see there; the owner of the lease stands last
-- Gives an empty list where the lease is not held, and the question was not asked.
--
-- Python writes these constants before the text: CORRUPT, KNOWN_S, LONGEST_RETRY_AFTER_S, MARGIN_S, PAUSES, PROBE_S,
-- TURN_S. `storage/ledger.py` and `core/quota.py` say what they mean.
--
-- In the ledger, the calls of each bucket stand in `m<number>` (minute) and `h<number>` (hour). Each other field is one
-- capital letter, a time in Unix seconds where nothing else is said:
--   A  until then a serialized call holds the others back
--   B  when the ledger began
--   C  until then the token cools down
--   D  from then on one verification call may exceed the limit, if only calls by others fill it
--   E  when the upstream last reported that no call is left
--   L  the limit of the hour, in calls, as the upstream reported it
--   N  the calls that were added to the minute at E, to fill it
--   O  when calls of others were last seen
--   P  until then the probe of the cool-down may take
--   S  1: the upstream sends no `ratelimit-remaining`
--   T  when the upstream reported `ratelimit-remaining` last
--   U  how many further calls by others may fall into the minute
--   V  until then U counts
--   X  when the upstream last reported more calls by others than a minute allows, or that no call is left
-- Replicas of another version may write letters that are not among these, in the form `%.6f`, and may not know all
-- of these.

if KEYS[6] and redis.pcall('GET', KEYS[6]) ~= ARGV[#ARGV] then return {} end
local question, given, call = ARGV[1], ARGV[2], tonumber(ARGV[3])
local now = tonumber(given)
if not now then
  local time = redis.call('TIME')
  now = time[1] + time[2] / 1000000
end
local function window(name, prefix, first)
  return {name = name, prefix = prefix, limit = tonumber(ARGV[first]), length = tonumber(ARGV[first + 1]),
          bucket = tonumber(ARGV[first + 2]), total = 0, buckets = {}}
end
local minute, hour = window('minute', 'm', 4), window('hour', 'h', 7)
local key, known_key, others_key, operation_key, path_key, fields = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], {}

-- Read the ledger: buckets of both windows, and letters. With anything else in it, it is deleted.
local windows = {m = minute, h = hour}
local flat = redis.pcall('HGETALL', key)
local corrupt = flat.err
local find, sub, number = string.find, string.sub, tonumber -- a full minute has 60 of these
for i = 1, #flat, 2 do
  local name, value = flat[i], flat[i + 1]
  if find(name, '^[mh]%d+$') and find(value, '^%d+$') and #value < 10 then
    windows[sub(name, 1, 1)].buckets[number(sub(name, 2))] = number(value)
  elseif find(name, '^%u$') and find(value, '^%d+%.%d+$') then
    fields[name] = number(value)
  else
    corrupt = true
  end
end
if corrupt then
  redis.call('DEL', key)
  return redis.error_reply(CORRUPT .. ' it is deleted')
end

local function set(name, value)
  if value then
    value = string.format('%.6f', value)
    if fields[name] == tonumber(value) then return end
    redis.call('HSET', key, name, value)
    fields[name] = tonumber(value)
  elseif fields[name] then
    redis.call('HDEL', key, name)
    fields[name] = nil
  end
end
local known_now
local function is_known()
  if known_now == nil then known_now = redis.call('EXISTS', known_key) == 1 end
  return known_now
end
local function expire()
  local window = (fields.C or is_known()) and hour or minute
  redis.call('EXPIRE', key, math.ceil(window.length + call) + MARGIN_S)
end
local function put(window, bucket, calls, by_others)
  if calls == 0 then return end
  if by_others then redis.call('HINCRBY', others_key, string.format('%d', bucket), calls) end
  window.total = window.total + calls
  window.buckets[bucket] = (window.buckets[bucket] or 0) + calls
  redis.call('HINCRBY', key, window.prefix .. string.format('%d', bucket), calls)
end
local function add(window, at, calls)
  put(window, math.floor(at / window.bucket), calls)
end
local function spread(window, since, calls, by_others)
  local first = math.floor(math.max(math.min(since, now), now - window.length) / window.bucket)
  local steps = math.floor(now / window.bucket) - first + 1
  for step = 0, steps - 1 do
    local share = math.floor((step + 1) * calls / steps) - math.floor(step * calls / steps)
    put(window, first + step, share, by_others)
  end
end
local function take(window, at)
  local bucket = math.floor(at / window.bucket)
  if (window.buckets[bucket] or 0) < 1 then return 0 end
  put(window, bucket, -1)
  return 1
end
local function move(window, at) -- count as made now what was counted as made at another time
  if math.floor(at / window.bucket) ~= math.floor(now / window.bucket) then add(window, now, take(window, at)) end
end
local function wait(window, ceiling, need)
  local excess = window.total + need - ceiling
  if excess <= 0 then return 0 end
  local numbers = {}
  for number in pairs(window.buckets) do table.insert(numbers, number) end
  table.sort(numbers)
  for _, number in ipairs(numbers) do
    excess = excess - window.buckets[number]
    if excess <= 0 then return (number + 1) * window.bucket + window.length - now end
  end
  return window.length
end
local function ceiling(limit, kept, share) return math.max(math.floor(limit * kept * share), 1) end
local function pause()
  return math.min(math.max(now - (fields.X or 0), minute.length / PAUSES), hour.length / PAUSES)
end
local function probe_ends(at) return tonumber(string.format('%.6f', at - math.max(call - PROBE_S, 0))) end
local function turn_ends(at) return tonumber(string.format('%.6f', at - math.max(call - TURN_S, 0))) end
local function left(window) return math.max(window.limit - window.total, 0) end
local function postpone(seconds, why)
  return {0, string.format('%.6f', seconds), why, left(minute), left(hour), hour.limit}
end
-- Give the calls in the hour that others made, as far as the upstream told: by bucket, and their sum.
local function others()
  local found, total, flat = {}, 0, redis.pcall('HGETALL', others_key)
  if flat.err then
    redis.call('DEL', others_key)
    return found, 0
  end
  for i = 1, #flat, 2 do
    local bucket, calls = tonumber(flat[i]), tonumber(flat[i + 1])
    if bucket and calls and hour.buckets[bucket] then
      found[bucket] = math.min(calls, hour.buckets[bucket])
      total = total + found[bucket]
    else
      redis.call('HDEL', others_key, flat[i])
    end
  end
  return found, total
end
local function called_by_others()
  local _, total = others()
  return total
end
-- Give the calls that the minute counts because of E.
local function filled()
  if not fields.E or not fields.N then return 0 end
  return math.min(fields.N, minute.buckets[math.floor(fields.E / minute.bucket)] or 0)
end
local function unfill()
  local calls = filled()
  if calls > 0 then put(minute, math.floor(fields.E / minute.bucket), -calls) end
  set('N', nil)
  return calls
end
local function take_back(found, calls)
  local numbers = {}
  for number in pairs(found) do table.insert(numbers, number) end
  table.sort(numbers, function(one, other) return one > other end)
  for _, number in ipairs(numbers) do
    local back = math.min(calls, found[number])
    if back > 0 then
      put(hour, number, -back, true)
      calls = calls - back
    end
  end
end

-- Drop what has left its window, and what lies in the future: after a failover the clock of the new server may be behind.
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
local furthest = {
  A = TURN_S, C = LONGEST_RETRY_AFTER_S, P = math.max(call, minute.length / PAUSES),
  T = 0, O = 0, E = 0, V = minute.length, D = hour.length / PAUSES, X = 0,
}
for name, seconds in pairs(furthest) do
  if fields[name] and fields[name] > now + seconds + minute.bucket then
    set(name, name == 'C' and now or nil)
  end
end

if fields.L and fields.L >= 1 then hour.limit = fields.L end

if question == 'admit' or question == 'foresee' then
  local cools = redis.call('PTTL', operation_key)
  if cools == -1 or cools > 1000 * LONGEST_RETRY_AFTER_S then
    redis.call('DEL', operation_key)
  elseif cools > 0 then
    return postpone(cools / 1000, 'operation')
  end
  local kept, share, need = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
  local minutes, hours = ceiling(minute.limit, kept, share), ceiling(hour.limit, kept, share)
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
  local checks = false
  for _, each in ipairs({{minute, minutes, filled}, {hour, hours, called_by_others}}) do
    local window, most, told = each[1], each[2], each[3]
    local seconds, excess = wait(window, most, need), window.total + need - most
    if seconds > 0 and question == 'admit' and excess <= told() then
      seconds, checks = math.min(seconds, math.max((fields.D or 0) - now, 0)), true
    end
    if seconds > 0 then return postpone(seconds, window.name) end
  end
  if question == 'foresee' then return {2} end
  if checks then set('D', now + pause()) end
  local at = tonumber(string.format('%.6f', now + call))
  add(minute, at, 1)
  add(hour, at, 1)
  if fields.C then set('P', probe_ends(at)) elseif alone then set('A', turn_ends(at)) end
  if not fields.B then set('B', now) end
  expire()
  return {1, string.format('%.6f', at), left(minute), left(hour), fields.C and 1 or 0, is_known() and 1 or 0,
          string.format('%.6f', fields.B), hour.limit}
end

if question == 'give back' then
  local at = tonumber(ARGV[10])
  take(minute, at)
  take(hour, at)
  if fields.A == turn_ends(at) then set('A', nil) end
  if fields.P == probe_ends(at) then set('P', nil) end
  return {}
end

if question == 'settle' then
  local at, told, probe = tonumber(ARGV[10]), tonumber(ARGV[11]), ARGV[12] == '1'
  local answered, known, limit, kept = ARGV[13] == '1', ARGV[14], tonumber(ARGV[15]), tonumber(ARGV[16])
  move(minute, at)
  move(hour, at)
  if probe and fields.P == probe_ends(at) then
    if answered then
      set('P', nil)
      set('C', nil)
    else
      set('P', now + minute.length / PAUSES)
    end
  end
  if fields.A == turn_ends(at) then set('A', nil) end
  if limit then
    local credible = limit >= hour.limit
    if not credible then credible = ceiling(limit, kept, 1) > hour.total - called_by_others() end
    if credible then
      hour.limit = limit
      set('L', limit)
    end
  end
  if not told then
    if known == '1' then set('S', 1) end
  elseif told == 0 then
    if unfill() == 0 then set('X', now) end
    set('E', now)
    set('N', math.max(minute.limit - minute.total, 0))
    add(minute, fields.E, fields.N)
    set('D', now + pause())
  else
    if fields.E and at - call >= fields.E then unfill() end
    local missing = (limit or hour.limit) - told - hour.total
    if missing < 0 and fields.T and at - call >= fields.T then
      local on_their_way = 0
      for bucket, calls in pairs(minute.buckets) do
        if bucket > math.floor(now / minute.bucket) then on_their_way = on_their_way + calls end
      end
      take_back(others(), math.max(-missing - on_their_way, 0))
    end
    missing = math.max(missing, 0)
    local since = fields.T or now - hour.length
    local lately = math.floor(missing * minute.length / math.max(now - since, minute.length) + 0.5)
    if missing > minute.limit * (1 + (now - since) / minute.length) then lately = 0 end
    if missing > 0 then
      spread(hour, since, missing, true)
      add(minute, now, lately)
      set('O', now)
    end
    if not fields.T then
      set('U', math.max(math.min(missing, minute.limit) - lately, 0))
      set('V', now + minute.length)
    end
    if missing > minute.limit then set('X', now) end
    set('T', now)
    set('D', now + pause())
    redis.call('EXPIRE', others_key, math.ceil(hour.length + call) + MARGIN_S)
  end
  if known == '1' then redis.call('SET', known_key, 1, 'EX', KNOWN_S) end
  if known == '0' then redis.call('DEL', known_key) end
  if known ~= '' then known_now = known == '1' end
  expire()
  return {}
end

if question == 'cool operation' then
  local cools, within, path = tonumber(ARGV[10]), tonumber(ARGV[11]), ARGV[12]
  local last = redis.pcall('GET', path_key)
  redis.call('SET', path_key, path, 'PX', within)
  if redis.call('PTTL', operation_key) < cools then redis.call('SET', operation_key, 1, 'PX', cools) end
  return type(last) == 'string' and last ~= path and 1 or 0
end

local seconds = tonumber(ARGV[10])
if not seconds then
  local oldest_leaves = wait(minute, math.max(minute.total, 1), 1)
  seconds = math.min(math.max(oldest_leaves, minute.length / PAUSES), minute.length)
elseif minute.total < minute.limit then
  spread(minute, now - minute.length + seconds, minute.limit - minute.total)
  set('V', nil)
end
set('C', math.max(fields.C or 0, now + seconds))
set('P', nil)
expire()
return {string.format('%.6f', fields.C - now)}
