-- What every script begins with. All keys carry the prefix `P`, whose braces keep them in one slot.
--
-- P:job:ID      hash     v version, r record, k idempotency key
-- P:events:ID   stream   durable events; an entry's id is its sequence number
-- P:jobs        zset     job ids in the order of their creation
-- P:jobs:TENANT zset     the same of one tenant
-- P:open        set      jobs that have not ended
-- P:aged        zset     jobs that have, by the age of the store at their end
-- P:age         string   how long the store has been in use, milliseconds
-- P:ended       zset     jobs that an earlier release ended
-- P:lookup:KEY  string   where a key, shard or record leads
-- P:shards      hash     shards that have not ended
-- P:places      hash     where each of them is: queue, lane, work, stream entry
-- P:waiting:W   set      shards that wait, of a generator and tenant W, `QUEUE|TENANT`
-- P:waits       set      every W of which some do
-- P:rate:TENANT string   when a tenant's allowance of images is whole again
-- P:withheld:TENANT string when what was withheld of a tenant's images is made up for
-- P:delayed     zset     shards that are not due, by when they are
-- P:claims      zset     shards that were taken and not yet granted, by when they are free again
-- P:leases      zset     leased shards by the end of their lease
-- P:lanes:Q     hash     lanes of a queue, `CLASS|TENANT`, with their streams
-- P:turns:Q     hash     start of each tenant's next shard (t:TENANT) and of the last one (level)
-- P:members     hash     energy nodes and workers, `KIND|ID`
-- P:present     zset     the same by the end of their membership
-- P:registered  hash     the same with the registration that is valid
-- P:seen        set      what any member ever had
-- P:roster      string   differs after every change of the members
-- P:bell        stream   what changed, for every coordinator
-- P:rung        string   how often it rang
-- P:retired     set      what was seen and is no longer required
-- P:mender      string   whose turn it is to mend
--
-- A queue is a stream for each lane with one consumer group. A shard's entry stays pending while a
-- worker holds it, so that lag counts what waits and pending what runs.
local P, now = KEYS[1], tonumber(ARGV[1])
local GROUP = 'workers'
local MINUTE = 60000 -- an allowance is for this long, as in store/rates.rs
local FARTHEST = 86400000 -- as clock.rs

-- Up to `limit` members of a set whose time has come, or is one that nobody can have meant.
local function due(set, limit)
  local found = redis.call('ZRANGEBYSCORE', set, '-inf', now, 'LIMIT', 0, limit)
  if #found < limit then
    local from = string.format('(%.0f', now + FARTHEST)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', set, from, '+inf', 'LIMIT', 0, limit - #found)) do
      found[#found + 1] = id
    end
  end
  return found
end

local function ring(kind, value)
  local number = redis.call('INCR', P .. ':rung') -- one that is missing was trimmed before it was read
  redis.call('XADD', P .. ':bell', 'MAXLEN', '~', 10000, '*', 'kind', kind, 'value', value, 'number', number)
end

-- The time kept at `key`, not before now; one that nobody can have meant counts as now.
local function no_earlier(key)
  local time = math.max(now, tonumber(redis.call('GET', key) or '0'))
  if time - now > FARTHEST then return now end
  return time
end

-- How long a tenant has to wait whose withheld images are made up for at `whole`.
local function withheld_wait(whole, per_minute)
  return math.max(0, whole - now + math.floor(MINUTE / per_minute) - MINUTE)
end

local function group(stream)
  redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
end

local function get_place(id)
  local packed = redis.call('HGET', P .. ':places', id)
  return packed and cmsgpack.unpack(packed)
end

local function set_place(id, place)
  redis.call('HSET', P .. ':places', id, cmsgpack.pack(place))
end

-- Lists a job among all and its tenant's.
local function file(job, tenant)
  redis.call('ZADD', P .. ':jobs', 0, job)
  redis.call('ZADD', P .. ':jobs:' .. tenant, 0, job)
end

-- Notes that a shard waits, or no longer does.
local function waits(id, of, does)
  local name = of.queue .. '|' .. of.tenant
  local set = P .. ':waiting:' .. name
  if does then
    redis.call('SADD', set, id)
    redis.call('SADD', P .. ':waits', name)
  else
    redis.call('SREM', set, id)
    if redis.call('EXISTS', set) == 0 then redis.call('SREM', P .. ':waits', name) end
  end
end

-- Takes the entry of a shard out of its stream.
local function unlist(id, place)
  if place.entry then
    redis.pcall('XACK', place.stream, GROUP, place.entry)
    redis.call('XDEL', place.stream, place.entry)
    place.entry, place.stream = nil, nil
  end
  redis.call('ZREM', P .. ':delayed', id)
  redis.call('ZREM', P .. ':claims', id)
end

-- Appends a shard that is due to the stream of its lane.
local function list(id, place)
  local lane = place.class .. '|' .. place.tenant
  local lanes = P .. ':lanes:' .. place.queue
  place.stream = P .. ':queue:' .. place.queue .. ':' .. lane
  redis.call('HSET', lanes, lane, place.stream)
  if redis.call('EXISTS', place.stream) == 0 then group(place.stream) end
  place.entry = redis.call('XADD', place.stream, '*', 'shard', id, 'work', place.work)
  set_place(id, place)
end

-- Forgets a shard that has ended, of a queue and tenant; tells those who may hold it if `told`.
local function drop(id, of, told)
  local place = get_place(id)
  unlist(id, place or {})
  waits(id, of, false)
  if told and not (place and place.queued) then ring('lease', id) end
  redis.call('ZREM', P .. ':leases', id)
  redis.call('HDEL', P .. ':places', id)
  redis.call('HDEL', P .. ':shards', id)
end

-- Puts a shard where its state belongs. A leased one keeps its entry. Tells those who may hold it if `told`.
local function put(shard, told)
  local id = shard.id
  redis.call('HSET', P .. ':shards', id, shard.blob)
  local place = get_place(id)
  if shard.leased then
    place = place or {queue = shard.queue, class = shard.class, tenant = shard.tenant, work = shard.work}
    waits(id, place, false)
    place.queued = false
    redis.call('ZREM', P .. ':delayed', id)
    redis.call('ZREM', P .. ':claims', id)
    redis.call('ZADD', P .. ':leases', shard.expires, id)
    set_place(id, place)
    return
  end
  if place then unlist(id, place) end
  if told and place and not place.queued then ring('lease', id) end
  waits(id, shard, true)
  redis.call('ZREM', P .. ':leases', id)
  place = {queue = shard.queue, class = shard.class, tenant = shard.tenant, work = shard.work, queued = true}
  if shard.not_before > now then
    redis.call('ZADD', P .. ':delayed', shard.not_before, id)
    set_place(id, place)
  else
    list(id, place)
  end
end

-- Reads the arguments one after the other.
local at = 1
local function argument()
  at = at + 1
  return ARGV[at]
end

local function number()
  return tonumber(argument())
end

local function shards()
  local all = {}
  for i = 1, number() do
    all[i] = {
      id = argument(), queue = argument(), class = argument(), tenant = argument(), work = number(),
      leased = argument() == '1', expires = number(), not_before = number(), blob = argument(),
    }
  end
  return all
end

-- Writes a job in place of the version `before`: record, whether it has ended, whether somebody else than its holder may have ended a
-- lease, events, shards that changed, those that ended with queue and tenant. Returns its version, which is at
-- least the time: a server that has lost its last writes does not give one twice.
local function write(job, before)
  local record, ended, told = argument(), argument() == '1', argument() == '1'
  local time = redis.call('TIME')
  local version = string.format('%.0f', math.max(before + 1, time[1] * 1000000 + time[2]))
  redis.call('HSET', P .. ':job:' .. job, 'v', version, 'r', record)
  if ended then
    redis.call('ZADD', P .. ':aged', redis.call('GET', P .. ':age') or '0', job)
    redis.call('SREM', P .. ':open', job)
  end
  local events = number()
  for _ = 1, events do
    local sequence, event = argument(), argument()
    redis.call('XADD', P .. ':events:' .. job, sequence .. '-0', 'event', event)
  end
  local queued = false
  for _, shard in ipairs(shards()) do
    put(shard, told)
    queued = queued or not shard.leased
  end
  if queued then ring('queue', '') end
  for _ = 1, number() do
    local id = argument()
    drop(id, {queue = argument(), tenant = argument()}, told)
  end
  if events > 0 then ring('job', job) end
  return version
end
