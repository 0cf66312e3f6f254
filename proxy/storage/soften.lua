-- Make stale what depends on a stamp, and leave it there: the stamp keeps its first part, and gets another second one.
--
-- KEYS  1  the stamp
-- ARGV  1  its new second part
-- Gives 1, or 0 where there is no stamp: then no entry counts that depends on it.
--
-- Python writes this constant before the text (core/entry.py has the layout): STAMP_BYTES, the length of the first part.

local first = redis.pcall('GETRANGE', KEYS[1], 0, STAMP_BYTES - 1)
if type(first) ~= 'string' or #first < STAMP_BYTES then
  redis.call('DEL', KEYS[1]) -- nothing, or no stamp of ours
  return 0
end
local set = redis.pcall('SET', KEYS[1], first .. ARGV[1], 'KEEPTTL')
-- A server that is full deletes, though it does not set. What has to be stale is gone then, rather than fresh.
if set.err then redis.call('DEL', KEYS[1]) end
return 1
