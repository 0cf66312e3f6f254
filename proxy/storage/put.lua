-- Store one entry, unless something newer stands in its place since the lookup that its fetch rests on.
--
-- KEYS  1  the entry
--       2  the mark that an entry was invalidated here while fetches may have been in flight
--       3  the lease of its fetch, if there is one: given up where the entry is stored, in the same step
-- ARGV  1  the first SEEN_BYTES of what the lookup saw there; empty: nothing
--       2  the sealed entry
--       3  for how many seconds it is kept
--       4  the owner of the lease
-- Gives 1 where it was stored, else 0.
--
-- Python writes these constants before the text (core/entry.py has the layout): SEEN_BYTES; CALLED_AT_FIRST and
-- CALLED_AT_LAST, the bytes of `called_at` in an envelope, counted from 0; TOMBSTONE, the status of what an
-- invalidation puts in an entry's place.

local seen = redis.call('GETRANGE', KEYS[1], 0, SEEN_BYTES - 1)
if seen ~= '' and seen ~= ARGV[1] then
  local head = redis.call('GETRANGE', KEYS[1], SEEN_BYTES, CALLED_AT_LAST)
  -- Which fetch began first is then not for clocks to say: only one that looked since may be stored.
  if redis.call('GET', KEYS[2]) then return 0 end
  if #head < 10 or struct.unpack('>H', head) == TOMBSTONE then return 0 end
  if struct.unpack('>d', head, 3) >= struct.unpack('>d', ARGV[2], CALLED_AT_FIRST + 1) then return 0 end
end
-- What replaces a tombstone is kept for as long as the tombstone would have been: if the place were empty, a fetch that
-- began before the invalidation could be stored there.
redis.call('SET', KEYS[1], ARGV[2], 'EX', math.max(ARGV[3], redis.call('TTL', KEYS[1])))
if KEYS[3] and redis.pcall('GET', KEYS[3]) == ARGV[4] then redis.call('DEL', KEYS[3]) end
return 1
