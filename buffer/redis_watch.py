"""Notification of published versions by a channel of Redis."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import redis

from buffer.redis_client import RedisClient
from buffer.spool import Breaker
from configs.logs import Outage

log = logging.getLogger(__name__)

_LISTEN_S = 0.5
"""Longest time to wait for a message before looking whether it is over."""


def watch_channel(
    client: RedisClient, channel: str, notify: Callable[[], None]
) -> Callable[[], None]:
    """Call ``notify``, on a thread of its own, for each message, and whenever the channel can be
    heard again after messages may have been missed.

    Returns:
        Ends it.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_listen, args=(client, channel, notify, ended), name="versions", daemon=True
    )
    thread.start()

    def end() -> None:
        ended.set()
        thread.join(2 * client.options.timeout_s)

    return end


def _listen(
    client: RedisClient, channel: str, notify: Callable[[], None], ended: threading.Event
) -> None:
    breaker, outage = Breaker(), Outage("listen for new versions")
    while not ended.wait(0.0 if breaker.is_closed else 0.05):
        if not breaker.is_closed:
            continue
        try:
            with client.redis.pubsub() as heard:
                heard.subscribe(channel)
                while not ended.is_set():
                    if heard.get_message(timeout=_LISTEN_S) is not None:
                        notify()  # the answer to ``subscribe`` is the first message
                        breaker.worked()
                        if line := outage.ended():
                            log.info("%s", line)
        except (redis.RedisError, OSError):
            breaker.failed()
        except Exception as error:  # a fault of the client must not end the thread: versions come
            breaker.failed()
            if line := outage.failed(f"{type(error).__name__}: {error}"):
                log.warning("%s; this is tried again", line)
