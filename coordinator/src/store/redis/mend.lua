-- Puts shards of a job back where they belong if they are not there. Arguments: now, job, tenant, the
-- version that was read, its shards. Answers how many were put back.
local job, tenant, expected = argument(), argument(), argument()
if redis.call('HGET', P .. ':job:' .. job, 'v') ~= expected then return 0 end
file(job, tenant)
redis.call('SADD', P .. ':open', job)

local function is_listed(id, place)
  if redis.call('ZSCORE', P .. ':delayed', id) then return true end
  if not place.entry then return false end
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

local mended = 0
for _, shard in ipairs(shards()) do
  local place = get_place(shard.id)
  local whole
  if shard.leased then
    whole = place and not place.queued and redis.call('ZSCORE', P .. ':leases', shard.id)
  else
    whole = place and place.queued and is_listed(shard.id, place)
  end
  if not (whole and redis.call('HEXISTS', P .. ':shards', shard.id) == 1) then
    put(shard)
    mended = mended + 1
  end
end
return mended
