-- What waits and what runs. Arguments: now. Answers {names and numbers of what waits, how many run, when
-- the next shard is due that is not yet or nil}.
local counts = {}
for _, name in ipairs(redis.call('SMEMBERS', P .. ':waits')) do
  counts[#counts + 1] = name
  counts[#counts + 1] = redis.call('SCARD', P .. ':waiting:' .. name)
end
local due = redis.call('ZRANGEBYSCORE', P .. ':delayed', '(' .. ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
return {counts, redis.call('ZCARD', P .. ':leases'), due[2] or false}
