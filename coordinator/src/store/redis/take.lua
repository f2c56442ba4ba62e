-- Takes due shards of a queue. Arguments: now, queue, limit, how long they are kept from others. Answers
-- the shards. One consumer serves all coordinators: claims say who may hand out what, not the group.
local queue, limit, claim = argument(), number(), number()

for _, id in ipairs(due(P .. ':delayed', 1000)) do
  redis.call('ZREM', P .. ':delayed', id)
  local place = get_place(id)
  if place then list(id, place) end
end
-- Whoever took these has died.
for _, id in ipairs(due(P .. ':claims', 1000)) do
  redis.call('ZREM', P .. ':claims', id)
  local place = get_place(id)
  if place and place.queued then
    unlist(id, place)
    list(id, place)
  end
end

local turns = P .. ':turns:' .. queue
local level = tonumber(redis.call('HGET', turns, 'level') or '0')
local lanes, flat = {}, redis.call('HGETALL', P .. ':lanes:' .. queue)
for i = 1, #flat, 2 do
  local class, tenant = string.match(flat[i], '^(%d)|(.*)$')
  local start = tonumber(redis.call('HGET', turns, 't:' .. tenant) or '0')
  lanes[#lanes + 1] = {name = flat[i], stream = flat[i + 1], class = class, tenant = tenant, start = start}
end

local function start(lane)
  return math.max(lane.start, level)
end

local function before(one, other)
  if one.class ~= other.class then return one.class < other.class end
  if start(one) ~= start(other) then return start(one) < start(other) end
  return one.tenant < other.tenant
end

local function read(lane)
  local command = {'XREADGROUP', 'GROUP', GROUP, GROUP, 'COUNT', 1, 'STREAMS', lane.stream, '>'}
  local entries = redis.pcall(unpack(command))
  if entries and entries.err then
    if not string.find(entries.err, 'NOGROUP') then redis.call(unpack(command)) end -- fails again, aloud
    group(lane.stream) -- somebody flushed or deleted it
    return nil
  end
  return entries and entries[1][2][1]
end

local taken = {}
while #taken < limit do
  local first
  for _, lane in ipairs(lanes) do
    if not lane.empty and (not first or before(lane, first)) then first = lane end
  end
  if not first then break end
  local entry = read(first)
  if not entry then
    first.empty = true
    if redis.call('XLEN', first.stream) == 0 then
      redis.call('DEL', first.stream)
      redis.call('HDEL', P .. ':lanes:' .. queue, first.name)
    end
  else
    local id = entry[2][2]
    local place, shard = get_place(id), redis.call('HGET', P .. ':shards', id)
    if not (place and shard) or place.entry ~= entry[1] then -- it has moved or ended
      redis.call('XACK', first.stream, GROUP, entry[1])
      redis.call('XDEL', first.stream, entry[1])
    elseif place.queued then
      redis.call('ZADD', P .. ':claims', now + claim, id)
      level = start(first)
      local next = level + place.work
      for _, lane in ipairs(lanes) do
        if lane.tenant == first.tenant then lane.start = next end
      end
      redis.call('HSET', turns, 'level', string.format('%.0f', level), 't:' .. first.tenant, string.format('%.0f', next))
      taken[#taken + 1] = shard
    end
  end
end
return taken
