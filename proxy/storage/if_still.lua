-- Run one command on a key if its value is still the expected one. A replica whose lease has expired must not renew,
-- release or overwrite the next one's; a value that does not verify must not be deleted if it has been replaced.
--
-- KEYS  1  the key
-- ARGV  1  the expected value
--       2  the command, 3 and more its arguments after the key
-- Gives 1 where the command was run, else 0.

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call(ARGV[2], KEYS[1], unpack(ARGV, 3))
return 1
