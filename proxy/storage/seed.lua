-- Store the single entries that came with a list, if the stamp of the caller's lists is still the one that the list's
-- lookup saw. An entry whose call began later than the list's stays.
--
-- KEYS  1  the stamp of the caller's lists
--       2 and more  the entries
-- ARGV  1  the stamp that the lookup saw
--       2i - 2, 2i - 1  for KEYS[i]: the sealed entry, and for how many seconds it is kept
-- Gives 1 where they are stored, 0 where the stamp has changed.
--
-- Python writes these constants before the text: CALLED_AT_FIRST and CALLED_AT_LAST, the bytes of `called_at` in an
-- envelope, counted from 0.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
for i = 2, #KEYS do
  local value = ARGV[2 * i - 2]
  local at = redis.pcall('GETRANGE', KEYS[i], CALLED_AT_FIRST, CALLED_AT_LAST)
  local later = type(at) == 'string' and #at == 8
    and struct.unpack('>d', at) > struct.unpack('>d', value, CALLED_AT_FIRST + 1)
  if not later then
    -- kept for as long as a tombstone that stands there: see put.lua
    redis.call('SET', KEYS[i], value, 'EX', math.max(ARGV[2 * i - 1], redis.call('TTL', KEYS[i])))
  end
end
return 1
