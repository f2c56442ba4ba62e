-- Adds the time that has passed since the store was as old as a process knows it, unless another process
-- has. Arguments: now, the age that was known or '', milliseconds since then. Answers the age.
local known, passed = argument(), number()
local age = redis.call('GET', P .. ':age') or '0'
if age == known then
  age = string.format('%.0f', tonumber(age) + passed)
  redis.call('SET', P .. ':age', age)
end
-- An earlier release noted ends by the clock: as if those jobs had ended now.
for _, job in ipairs(redis.call('ZRANGE', P .. ':ended', 0, 999)) do
  redis.call('ZADD', P .. ':aged', 'NX', age, job)
  redis.call('ZREM', P .. ':ended', job)
end
return age
