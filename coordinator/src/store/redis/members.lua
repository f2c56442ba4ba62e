-- Who is in the cluster. Arguments: now, then one of
--   join    member, registration, until, record, entries of what it has
--   keep    until, members with their registrations; answers which of them, from 0, are no longer members
--   leave   member, registration; answers 1 if it was one
--   retire  entries of what nobody has any longer; answers how many there were
--   recall  entries of what was seen and is not known here
--   roster  version that is known; answers {version, records, seen, retired}, the last three nil if it is
--           the same
local function changed()
  -- At least the time in microseconds, of which a change takes several: a server that has lost its last
  -- writes, or all of them, does not give one twice.
  local time = redis.call('TIME')
  local last = tonumber(redis.call('GET', P .. ':roster') or '0')
  local version = math.max(last + 1, time[1] * 1000000 + time[2])
  redis.call('SET', P .. ':roster', string.format('%.0f', version))
  ring('members', '')
end

local function remove(member)
  redis.call('HDEL', P .. ':members', member)
  redis.call('HDEL', P .. ':registered', member)
  redis.call('ZREM', P .. ':present', member)
end

local function is_registered(member, registration)
  return redis.call('HGET', P .. ':registered', member) == registration
end

local function see()
  for _ = 1, number() do
    local entry = argument()
    redis.call('SADD', P .. ':seen', entry)
    redis.call('SREM', P .. ':retired', entry)
  end
end

local what = argument()
if what == 'join' then
  local member, registration = argument(), argument()
  redis.call('ZADD', P .. ':present', argument(), member)
  redis.call('HSET', P .. ':members', member, argument())
  redis.call('HSET', P .. ':registered', member, registration)
  see()
  changed()
elseif what == 'keep' then
  local til, lost = argument(), {}
  for i = 0, number() - 1 do
    local member, registration = argument(), argument()
    if is_registered(member, registration) then
      redis.call('ZADD', P .. ':present', 'GT', til, member)
    else
      lost[#lost + 1] = i
    end
  end
  return lost
elseif what == 'leave' then
  local member, registration = argument(), argument()
  if not is_registered(member, registration) then return 0 end
  remove(member)
  changed()
  return 1
elseif what == 'retire' then
  local removed = 0
  for _ = 1, number() do
    local entry = argument()
    removed = removed + redis.call('SREM', P .. ':seen', entry)
    redis.call('SADD', P .. ':retired', entry)
  end
  if removed > 0 then changed() end
  return removed
elseif what == 'recall' then
  see()
  changed()
else
  -- At 0 nobody is found to be gone.
  local gone = now > 0 and due(P .. ':present', 1000) or {}
  for _, member in ipairs(gone) do remove(member) end
  if #gone > 0 then changed() end
  local version = redis.call('GET', P .. ':roster') or '0'
  if version == argument() then return {version, false, false, false} end
  return {
    version, redis.call('HVALS', P .. ':members'), redis.call('SMEMBERS', P .. ':seen'),
    redis.call('SMEMBERS', P .. ':retired'),
  }
end
