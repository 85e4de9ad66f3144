-- Leases a part of one stretch of a counter to one daemon. Says all of what it is to have, so that running it twice changes nothing.
--
-- KEYS  the stretch, the one before, the one before that: hashes with
--         leased    the sum of all leases
--         carried   what the stretches before took beyond their limit
--         hungry    there if somebody needed what was not there
--         <daemon>  "process ask lease": its latest ask, and what it has
-- ARGV  1 daemon, 2 number of its process, 3 number of the ask: later ones are larger
--       4 "1": what its earlier processes leased is in the sums of this one
--       5 what it keeps at least, 6 what it needs beyond, 7 what it would like beyond that
--       8 the limit, or -1: not known
--       9 how much of the stretch before counts, 10 of how much; 0 of 0: none, and what is beyond the limit is carried
--       11 of what is left it may have this part beyond its need, 12 milliseconds until the stretch is forgotten
-- Says  1 if it is answered, 0 if a later ask was; lease, leases of others, carried, leases of the stretch before, short, hungry, known

local function number(key, field)
    return tonumber(redis.call('HGET', key, field) or '0')
end
-- Lua would write large numbers in another way.
local function text(value)
    return string.format('%.0f', value)
end

local daemon, process, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local keep, need, ahead, limit = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local overlap, length = tonumber(ARGV[9]), tonumber(ARGV[10])

local leased, mine, known = number(KEYS[1], 'leased'), 0, 0
local record = redis.call('HGET', KEYS[1], daemon)
if record then
    local of, at, lease = string.match(record, '^(%d+) (%d+) (%d+)$')
    of, at, lease = tonumber(of), tonumber(at), tonumber(lease)
    if of > process or (of == process and at > count) then
        return {0, 0, 0, 0, 0, 0, 0, 0}
    end
    -- What an earlier process leased and nobody can tell how much of it was taken stays in the sum.
    if of == process or ARGV[4] == '1' then
        mine = lease
    end
    if of == process then
        known = 1
    end
end
local others = leased - mine

local before, carried, faded = number(KEYS[2], 'leased'), 0, 0
if length > 0 then
    faded = math.ceil(before * overlap / length)
elseif limit >= 0 then
    if redis.call('EXISTS', KEYS[2]) == 1 then
        carried = math.max(0, before + number(KEYS[2], 'carried') - limit)
    else
        carried = math.max(0, number(KEYS[3], 'leased') + number(KEYS[3], 'carried') - 2 * limit)
    end
    redis.call('HSET', KEYS[1], 'carried', text(carried))
end

local lease, short = keep, 0
local hungry = redis.call('HEXISTS', KEYS[1], 'hungry')
if limit >= 0 and need + ahead > 0 then
    local room = math.max(0, limit - carried - faded - others - keep)
    if room < need then
        lease, short, hungry = keep + room, 1, 1
        redis.call('HSET', KEYS[1], 'hungry', '1')
    else
        local spare = math.floor((room - need) * tonumber(ARGV[11]))
        if hungry == 1 and spare > limit * tonumber(ARGV[11]) / 2 then
            redis.call('HDEL', KEYS[1], 'hungry')
            hungry = 0
        end
        lease = keep + need
        if hungry == 0 then
            lease = lease + math.min(ahead, spare)
        end
    end
end
redis.call('HSET', KEYS[1], 'leased', text(others + lease), daemon, text(process) .. ' ' .. text(count) .. ' ' .. text(lease))
redis.call('PEXPIRE', KEYS[1], ARGV[12])
return {1, lease, others, carried, before, short, hungry, known}
