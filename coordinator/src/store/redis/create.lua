-- Stores a job. Arguments: now, job, idempotency key or '', its entry, limit of queued shards, lookups,
-- then what `write` reads. Answers {'new'}, {'existing', entry} or {'full'}.
local job, key, entry, limit = argument(), argument(), argument(), number()
local lookups = {}
for i = 1, number() do lookups[i] = {argument(), argument()} end
if redis.call('EXISTS', P .. ':job:' .. job) == 1 then return {'new'} end -- asked again after a lost answer
if key ~= '' then
  local taken = redis.call('GET', P .. ':lookup:' .. key)
  if taken then return {'existing', taken} end
end
local queued = number()
for _, count in ipairs(redis.call('HVALS', P .. ':queued')) do queued = queued + tonumber(count) end
if queued > limit then return {'full'} end
if key ~= '' then
  redis.call('SET', P .. ':lookup:' .. key, entry)
  redis.call('HSET', P .. ':job:' .. job, 'k', key)
end
for _, lookup in ipairs(lookups) do redis.call('SET', P .. ':lookup:' .. lookup[1], lookup[2]) end
redis.call('ZADD', P .. ':jobs', 0, job)
redis.call('SADD', P .. ':open', job)
write(job)
return {'new'}
