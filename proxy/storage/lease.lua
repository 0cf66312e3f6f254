-- Take the lease of a fetch, unless another replica holds it, or the entry is not the one that the lookup saw.
--
-- KEYS  1  the lease
--       2  the entry
-- ARGV  1  the owner
--       2  for how many milliseconds it lasts
--       3  for how many seconds at least an entry that stands there is kept
--       4  the first SEEN_BYTES of what the lookup saw there; empty: nothing
-- Gives {0} where it is taken, {1} where the entry is another one; else {2, what stands in its place, its PTTL}, false
-- for a value of another type.
--
-- Python writes this constant before the text: SEEN_BYTES, see core/entry.py.

local seen = redis.pcall('GETRANGE', KEYS[2], 0, SEEN_BYTES - 1)
if type(seen) ~= 'string' then seen = ARGV[4] end -- a value of another type: the lookup deletes it
if seen ~= '' then redis.call('EXPIRE', KEYS[2], ARGV[3], 'GT') end
local held = redis.pcall('GET', KEYS[1])
if held then return {2, type(held) == 'string' and held, redis.call('PTTL', KEYS[1])} end
if seen ~= ARGV[4] then return {1} end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {0}
