-- Stores a job. Arguments: now, job, tenant, idempotency key or '', its entry, limit of queued shards, the
-- same of the tenant's or -1, its images a minute or 0, those that may be withheld or 0, images of the job, lookups, its shards, then what
-- `write` reads. Answers {'new'}, {'existing', entry}, {'full'}, {'tenant'}, or {'rate'} or
-- {'withheld'} and milliseconds to wait.
local job, tenant, key, entry = argument(), argument(), argument(), argument()
local limit, own_limit, per_minute, withheld, images = number(), number(), number(), number(), number()
local lookups = {}
for i = 1, number() do lookups[i] = {argument(), argument()} end
if redis.call('EXISTS', P .. ':job:' .. job) == 1 then return {'new'} end -- asked again after a lost answer
if key ~= '' then
  local taken = redis.call('GET', P .. ':lookup:' .. key)
  if taken then return {'existing', taken} end
end
local queued = number()
local own = queued
for _, name in ipairs(redis.call('SMEMBERS', P .. ':waits')) do
  local waiting = redis.call('SCARD', P .. ':waiting:' .. name)
  queued = queued + waiting
  if string.match(name, '|([^|]*)$') == tenant then own = own + waiting end
end
if queued > limit then return {'full'} end
if own_limit >= 0 and own > own_limit then return {'tenant'} end
if withheld > 0 then
  local wait = withheld_wait(no_earlier(P .. ':withheld:' .. tenant), withheld)
  if wait > 0 then return {'withheld', string.format('%.0f', wait)} end
end
if per_minute > 0 then -- as store/rates.rs
  local minute, rate = MINUTE, P .. ':rate:' .. tenant
  local whole = no_earlier(rate)
  local cost = math.floor(images * minute / per_minute)
  local used = whole - now + math.min(cost, minute)
  if used > minute then return {'rate', string.format('%.0f', used - minute)} end
  whole = string.format('%.0f', whole + cost)
  redis.call('SET', rate, whole, 'PX', string.format('%.0f', math.max(1, whole - now)))
end
if key ~= '' then
  redis.call('SET', P .. ':lookup:' .. key, entry)
  redis.call('HSET', P .. ':job:' .. job, 'k', key)
end
for _, lookup in ipairs(lookups) do redis.call('SET', P .. ':lookup:' .. lookup[1], lookup[2]) end
file(job, tenant)
redis.call('SADD', P .. ':open', job)
write(job, 0)
return {'new'}
