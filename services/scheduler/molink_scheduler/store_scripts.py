"""What the store's server carries out itself, in Lua: each script runs as one, with nothing else in between."""

from __future__ import annotations

# What scripts answer about a term.
HOLDS, LOST, FORGOTTEN = 0, 1, 2

# Every script begins with it. KEYS[1]: term. ARGV[1]: number of the term that asks; ARGV[2]: its owner.
_CHECK_TERM = f"""
local function check()
  local number, owner = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (.*)$')
  if not number or tonumber(number) < tonumber(ARGV[1]) then return {FORGOTTEN} end
  if tonumber(number) == tonumber(ARGV[1]) and owner == ARGV[2] then return {HOLDS} end
  return {LOST}
end
"""
# KEYS[2]: lease. ARGV[3]: milliseconds. Gives the number of the new term, 0 while another holds the lease.
TAKE_LEASE = """
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[2] then return 0 end
local last = tonumber(string.match(redis.call('GET', KEYS[1]) or '', '^%d+') or '0')
local number = math.max(last, tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], string.format('%d', number) .. ' ' .. ARGV[2])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return number
"""
# As above. A lease that has run out without anybody taking it is held again: nobody has written meanwhile.
RENEW_LEASE = (
    _CHECK_TERM
    + f"""
local answer = check()
if answer == {HOLDS} then redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3]) end
return answer
"""
)
RELEASE_LEASE = (
    _CHECK_TERM
    + f"""
if check() == {HOLDS} then redis.call('DEL', KEYS[2]) end
"""
)
# KEYS[2]: epoch. ARGV[3]: a number that the new one must exceed. Gives the answer about the term, and the epoch.
NEXT_EPOCH = (
    _CHECK_TERM
    + f"""
local answer = check()
if answer ~= {HOLDS} then return {{answer, 0}} end
local last = tonumber(redis.call('GET', KEYS[2]) or '0')
if last < tonumber(ARGV[3]) then redis.call('SET', KEYS[2], ARGV[3]) end
return {{answer, redis.call('INCR', KEYS[2])}}
"""
)
# ARGV[3] and on: commands, each after the number of its words.
WRITE = (
    _CHECK_TERM
    + f"""
local answer = check()
if answer ~= {HOLDS} then return answer end
local at, last = 3, #ARGV
while at <= last do
  local stop = at + ARGV[at]
  redis.call(unpack(ARGV, at + 1, stop))
  at = stop + 1
end
return answer
"""
)
