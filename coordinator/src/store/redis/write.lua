-- Replaces a job's record if nobody else has since it was read. Arguments: now, job, the version that
-- was read, then what `write` reads. Answers the version that it has now, or nothing if it has changed.
local job, expected = argument(), argument()
if redis.call('HGET', P .. ':job:' .. job, 'v') ~= expected then return false end
return write(job, tonumber(expected))
