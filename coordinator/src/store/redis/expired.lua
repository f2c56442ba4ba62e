-- Shards whose lease has ended. Arguments: now, limit. Answers the shards; a lease of what is no longer
-- there is removed.
local found = {}
for _, id in ipairs(due(P .. ':leases', number())) do
  local shard = redis.call('HGET', P .. ':shards', id)
  if shard then
    found[#found + 1] = shard
  else
    redis.call('ZREM', P .. ':leases', id)
  end
end
return found
