"""Deletion of a tenant's records from Redis.

Entries are removed from the streams, and their numbers noted, so that readers tell deleted records
from lost ones. Small entries share memory with their neighbours in the server, which frees it with
the last of them; its append-only file holds what was deleted until it is rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator

from buffer.deletions import Deleted, Deletions, Ends, digest_of, may_be_of, now_ms, owner_of
from buffer.redis_batches import (
    deleted_key,
    deletions_key,
    ends_key,
    id_of,
    number_of,
    numbers_of,
    payload_of,
    records_key,
    removed_key,
)
from buffer.redis_client import RedisClient
from buffer.redis_eviction import forget_unreadable

_DELETE = """
local groups, names = redis.pcall('XINFO', 'GROUPS', KEYS[1]), {}
for _, group in ipairs(groups.err and {} or groups) do
  local facts = {}
  for i = 1, #group, 2 do facts[group[i]] = group[i + 1] end
  names[facts['name']] = tonumber(string.match(facts['last-delivered-id'], '^(%d+)'))
end
local gone = 0
for i = 2, #ARGV do
  local number = tonumber(ARGV[i])
  local id = string.format('%.0f-0', number + 1)
  if redis.call('XDEL', KEYS[1], id) == 1 then
    gone = gone + 1
    redis.call('ZADD', KEYS[2], ARGV[i], ARGV[i])
    for name, delivered in pairs(names) do
      if number + 1 > delivered or redis.call('XACK', KEYS[1], name, id) == 1 then
        redis.call('HINCRBY', KEYS[3], name .. '/' .. ARGV[1], 1)
      end
    end
  end
end
return gone
"""
"""Removes records, and counts each for the groups that had not committed it; a member that has one
at that moment commits it in vain. KEYS: stream, set of deleted numbers, hash of counts. ARGV:
writer, numbers."""
_AT_ONCE = 64
_NUMBERS_AT_ONCE = 1000


def read_deletions(client: RedisClient) -> Deletions:
    """The list of a run.

    Raises:
        ServiceAwayError: the server does not answer.
        ValueError: somebody else has damaged the list.
    """
    key = deletions_key(client.options)
    return Deletions(numbers_of(client.call("HGETALL", key), key))


def delete_from_redis(client: RedisClient, tenant: str, until_ms: int | None = None) -> Deleted:
    """Delete all records of a tenant, put-aside ones included.

    Args:
        until_ms: as ``Backend.delete`` takes it.

    Raises:
        ServiceAwayError: the server does not answer; do it again.
    """
    options, digest, ends = client.options, digest_of(tenant), Ends()
    before = read_deletions(client)
    # At once, for what arrives meanwhile; until when it holds, the records will tell.
    _list(client, before.with_tenant(digest, now_ms() if until_ms is None else until_ms), digest)
    records = num_bytes = 0
    for writer in [name.decode() for name in client.call("HKEYS", ends_key(options))]:
        sizes = dict(_numbers_of(client, writer, tenant, ends))
        keys = records_key(options, writer), removed_key(options, writer), deleted_key(options)
        numbers = list(sizes)
        for at in range(0, len(numbers), _NUMBERS_AT_ONCE):
            some = numbers[at : at + _NUMBERS_AT_ONCE]
            records += client.call("EVAL", _DELETE, len(keys), *keys, writer, *some)
        num_bytes += sum(sizes.values())
    listed = before.with_tenant(digest, ends.until_ms(until_ms))
    _list(client, listed, digest)
    aside = _delete_from_quarantine(client, tenant)
    return Deleted(records, num_bytes, aside, until_ms=listed.until_ms[digest])


def undelete_in_redis(client: RedisClient, digest: str) -> bool:
    """Take a deletion off the list; whether it was there.

    Raises:
        ServiceAwayError: the server does not answer.
    """
    return bool(client.call("HDEL", deletions_key(client.options), digest))


def _list(client: RedisClient, listed: Deletions, digest: str) -> None:
    client.call("HSET", deletions_key(client.options), digest, listed.until_ms[digest])


def _numbers_of(
    client: RedisClient, writer: str, tenant: str, ends: Ends
) -> Iterator[tuple[int, int]]:
    """Number and size of each record of a tenant; ``ends`` takes note of all records."""
    key, start = records_key(client.options, writer), "-"
    while entries := client.call("XRANGE", key, start, "+", "COUNT", _AT_ONCE):
        for entry_id, fields in entries:
            payload = payload_of(fields)
            owner = owner_of(payload)
            if owner is not None and ends.see(owner, tenant):
                yield number_of(entry_id), len(payload)
        start = id_of(number_of(entries[-1][0]) + 1)


def _delete_from_quarantine(client: RedisClient, tenant: str) -> int:
    key = client.options.key("unreadable")
    names = client.call("HKEYS", f"{key}:sizes")
    theirs = [name for name in names if may_be_of(tenant, client.call("HGET", key, name) or b"")]
    if theirs:
        forget_unreadable(client, theirs)
    return len(theirs)
