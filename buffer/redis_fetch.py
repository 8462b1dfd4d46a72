"""Records in Redis at known locations, without reading what lies between them."""

from __future__ import annotations

import re
from collections.abc import Collection

from buffer.interface import Location, Payload
from buffer.redis_batches import id_of, payload_of, records_key
from buffer.redis_client import RedisClient

_LOCATION = re.compile(r"0|[1-9][0-9]{0,17}")
"""Number of a record within its writer, as ``RedisReader`` gives it."""
_AT_ONCE = 16
"""Records in one round trip. Those of a large drafter have megabytes."""


def records_at(client: RedisClient, locations: Collection[Location]) -> dict[Location, Payload]:
    """The records at these locations. Missing are those that were evicted or deleted, and locations
    that no reader gives.

    Raises:
        ServiceAwayError: the server does not answer.
    """
    found = dict[Location, Payload]()
    wanted = [one for one in locations if _LOCATION.fullmatch(one[1])]
    for begin in range(0, len(wanted), _AT_ONCE):
        some = wanted[begin : begin + _AT_ONCE]
        answers = client.at_once(
            ("XRANGE", records_key(client.options, writer), id_of(int(number)), id_of(int(number)))
            for writer, number in some
        )
        for location, entries in zip(some, answers, strict=True):
            for _, fields in entries:
                found[location] = payload_of(fields)
    return found
