-- Counts withheld images against their tenant's bound, as store/rates.rs. Arguments: now, tenant, images, how
-- many there may be in a minute. Answers whether that reached the bound just now.
local tenant, images, per_minute = argument(), number(), number()
local key = P .. ':withheld:' .. tenant
local whole = no_earlier(key)
local after = whole + math.floor(images * MINUTE / per_minute)
redis.call('SET', key, string.format('%.0f', after), 'PX', string.format('%.0f', math.max(1, after - now)))
if withheld_wait(whole, per_minute) == 0 and withheld_wait(after, per_minute) > 0 then return 1 end
return 0
