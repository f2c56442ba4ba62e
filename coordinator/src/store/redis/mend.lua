-- Puts shards back where they belong if they are not there. Arguments: now, how many jobs, and of each its
-- id, tenant, the version that was read or '' if it is gone, and its shards. Answers how many were put back.
local function is_listed(id, place)
  if redis.call('ZSCORE', P .. ':delayed', id) then return true end
  if not place.entry then return false end
  local lane = place.class .. '|' .. place.tenant
  if redis.call('HEXISTS', P .. ':lanes:' .. place.queue, lane) == 0 then return false end
  local entry = redis.pcall('XRANGE', place.stream, place.entry, place.entry)
  if entry.err or #entry == 0 then return false end
  if redis.call('ZSCORE', P .. ':claims', id) then return true end
  local pending = redis.pcall('XPENDING', place.stream, GROUP, place.entry, place.entry, 1)
  if pending.err then -- no group any longer: a new one hands everything out
    group(place.stream)
    return true
  end
  return #pending == 0
end

local function does_wait(id, place)
  local name = place.queue .. '|' .. place.tenant
  return redis.call('SISMEMBER', P .. ':waiting:' .. name, id) == 1
    and redis.call('SISMEMBER', P .. ':waits', name) == 1
end

local function is_whole(shard, place)
  if not place or redis.call('HEXISTS', P .. ':shards', shard.id) == 0 then return false end
  if shard.leased then return not place.queued and redis.call('ZSCORE', P .. ':leases', shard.id) end
  return place.queued and does_wait(shard.id, place) and is_listed(shard.id, place)
end

local mended = 0
for _ = 1, number() do
  local job, tenant, expected, active = argument(), argument(), argument(), shards()
  local version = redis.call('HGET', P .. ':job:' .. job, 'v')
  if not version then
    redis.call('SREM', P .. ':open', job)
  elseif version == expected then
    file(job, tenant)
    redis.call(#active > 0 and 'SADD' or 'SREM', P .. ':open', job)
    for _, shard in ipairs(active) do
      if not is_whole(shard, get_place(shard.id)) then
        put(shard, true)
        mended = mended + 1
      end
    end
  end
end
return mended
