-- Says a number that the store keeps as long as what else it was told, and the time there: seconds, microseconds.
--
-- KEYS  the number
-- ARGV  what it is to be, if there is none

local number = redis.call('GET', KEYS[1])
if not number then
    number = ARGV[1]
    redis.call('SET', KEYS[1], number)
end
local time = redis.call('TIME')
return {tonumber(number), tonumber(time[1]), tonumber(time[2])}
