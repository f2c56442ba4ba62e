-- Deletes a job that has ended. Arguments: now, job, tenant, lookups. Answers 1, or 0 if it is gone already.
local job, tenant = argument(), argument()
local key = redis.call('HGET', P .. ':job:' .. job, 'k')
if key then redis.call('DEL', P .. ':lookup:' .. key) end
for _ = 1, number() do redis.call('DEL', P .. ':lookup:' .. argument()) end
redis.call('ZREM', P .. ':aged', job)
redis.call('ZREM', P .. ':ended', job)
redis.call('SREM', P .. ':open', job)
redis.call('ZREM', P .. ':jobs', job)
redis.call('ZREM', P .. ':jobs:' .. tenant, job)
redis.call('DEL', P .. ':events:' .. job)
return redis.call('DEL', P .. ':job:' .. job)
