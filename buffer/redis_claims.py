"""Which traces a group has learnt in Redis, and which record each of the others is learnt from.

See ``claims.py`` for the rule. Here the server decides, in scripts: two members that claim records
with one trace at once get one answer, and a trace is learnt in the same step in which its record is
acknowledged. What was learnt takes a bit for each trace, in strings of 256 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from buffer.interface import Location, Record
from buffer.redis_batches import (
    claimed_key,
    claims_key,
    committed_field,
    committed_key,
    id_of,
    learnt_key,
    records_key,
)
from buffer.redis_client import RedisClient
from buffer.seen import Identity

COMMIT = """
local done = redis.call('XACK', KEYS[1], ARGV[1], unpack(ARGV, 4))
if done > 0 then redis.call('HINCRBY', KEYS[2], ARGV[2], done) end
local records = {}
for i = 4, #ARGV do records[#records + 1] = ARGV[3] .. '/' .. ARGV[i] end
local traces, parts, over = redis.call('HMGET', KEYS[4], unpack(records)), {}, {}
for _, trace in ipairs(traces) do
  if trace then
    local name, number = string.match(trace, '^(.*):(%d+)$')
    local bytes = parts[name]
    if not bytes then
      bytes = {string.byte(redis.call('HGET', KEYS[5], name) or '', 1, -1)}
      parts[name] = bytes
    end
    local at = math.floor(number / 8) + 1
    for i = #bytes + 1, at do bytes[i] = 0 end
    bytes[at] = bit.bor(bytes[at], bit.lshift(1, number % 8))
    over[#over + 1] = trace
  end
end
for name, bytes in pairs(parts) do
  redis.call('HSET', KEYS[5], name, string.char(unpack(bytes)))
end
if #over > 0 then
  redis.call('HDEL', KEYS[3], unpack(over))
  redis.call('HDEL', KEYS[4], unpack(records))
end
return done
"""
"""Acknowledges records, counts them and remembers their traces, all or nothing; a record counts
once, however often it is committed. KEYS: stream, hash of counts, claims, claimed, learnt. ARGV:
group, field of the hash, writer, ids."""
_CLAIM = """
local traces = {}
for i = 1, #ARGV, 2 do traces[#traces + 1] = ARGV[i] end
local known = redis.call('HMGET', KEYS[1], unpack(traces))
local answers, parts, mine, new, inverse = {}, {}, {}, {}, {}
for i, trace in ipairs(traces) do
  local name, number = string.match(trace, '^(.*):(%d+)$')
  parts[name] = parts[name] or redis.call('HGET', KEYS[3], name) or ''
  local byte = string.byte(parts[name], math.floor(number / 8) + 1) or 0
  if bit.band(bit.rshift(byte, number % 8), 1) == 1 then
    answers[i] = ''
  else
    answers[i] = known[i] or mine[trace]
    if not answers[i] then
      local record = ARGV[2 * i]
      mine[trace], answers[i] = record, record
      new[#new + 1], new[#new + 2] = trace, record
      inverse[#inverse + 1], inverse[#inverse + 2] = record, trace
    end
  end
end
if #new > 0 then
  redis.call('HSET', KEYS[1], unpack(new))
  redis.call('HSET', KEYS[2], unpack(inverse))
end
return answers
"""
"""Returns the record that each trace is learnt from, which becomes the one given if there is none;
an empty string if it was learnt. KEYS: claims, claimed, learnt. ARGV: trace and record in turn."""
_DROP = """
for _, record in ipairs(ARGV) do
  local trace = redis.call('HGET', KEYS[2], record)
  if trace then
    redis.call('HDEL', KEYS[1], trace)
    redis.call('HDEL', KEYS[2], record)
  end
end
"""
"""Frees the traces of records that are gone. KEYS: claims, claimed. ARGV: records."""
_CHUNK = 2048
_AT_ONCE = 500


class RedisClaims:
    """Claims of one group."""

    def __init__(self, client: RedisClient, group: str) -> None:
        options = client.options
        self._client = client
        self._group = group
        self._claims = claims_key(options, group), claimed_key(options, group)
        self._learnt = learnt_key(options, group)

    def claim(
        self,
        found: Sequence[tuple[Record, Identity]],
        is_gone: Callable[[Location], bool],
    ) -> list[bool]:
        """See ``RecordReader.claim``.

        Args:
            is_gone: whether nobody has this record, given by writer and number, any more.
        """
        answers = self._holders(found)
        others = {holder for holder, (one, _) in zip(answers, found, strict=True) if holder}
        others -= {_record(one.writer, int(one.location)) for one, _ in found}
        gone = [holder for holder in others if is_gone(_location_of(holder))]
        if gone:
            self._drop(gone)
            answers = self._holders(found)
        pairs = zip(answers, found, strict=True)
        return [holder == _record(one.writer, int(one.location)) for holder, (one, _) in pairs]

    def commit(self, writer: str, numbers: Sequence[int]) -> None:
        """Nobody is handed these records again, and nobody learns their traces again."""
        options = self._client.options
        keys = records_key(options, writer), committed_key(options), *self._claims, self._learnt
        field = committed_field(self._group, writer)
        for start in range(0, len(numbers), _AT_ONCE):
            ids = map(id_of, numbers[start : start + _AT_ONCE])
            self._client.call("EVAL", COMMIT, len(keys), *keys, self._group, field, writer, *ids)

    def drop(self, writer: str, numbers: Sequence[int]) -> None:
        """These records are gone and were not learnt: their traces are free."""
        if numbers:
            self._drop([_record(writer, number) for number in numbers])

    def _holders(self, found: Sequence[tuple[Record, Identity]]) -> list[bytes]:
        keys, holders = (*self._claims, self._learnt), list[bytes]()
        for start in range(0, len(found), _AT_ONCE):
            arguments = [
                text
                for one, trace in found[start : start + _AT_ONCE]
                for text in (_trace(trace), _record(one.writer, int(one.location)))
            ]
            holders += self._client.call("EVAL", _CLAIM, len(keys), *keys, *arguments)
        return holders

    def _drop(self, records: Sequence[bytes]) -> None:
        self._client.call("EVAL", _DROP, len(self._claims), *self._claims, *records)


def _trace(identity: Identity) -> bytes:
    """The string of 2,048 bits that a trace's is in, and which it is. Numbers are split here:
    those of the server's language are exact up to 2**53 only."""
    producer, epoch, seq = identity
    text = f"{producer}/{epoch}/{seq // _CHUNK}:{seq % _CHUNK}"
    return text.encode(errors="surrogatepass")


def _record(writer: str, number: int) -> bytes:
    return f"{writer}/{id_of(number)}".encode()


def _location_of(record: bytes) -> Location:
    """Inverse of ``_record``."""
    writer, _, entry_id = record.decode().rpartition("/")
    return writer, str(int(entry_id.partition("-")[0]) - 1)
