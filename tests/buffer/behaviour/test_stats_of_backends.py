"""What ``stats`` says adds up, whoever writes, reads, commits, evicts and deletes meanwhile."""

import threading
from contextlib import suppress

from buffer.codec import encode_trace
from buffer.interface import ServiceAwayError

_LOOKS = 6


def check(stats):
    """Every record is in one place, and none is owed."""
    assert 0 <= stats.held <= stats.appended
    assert min(stats.held_bytes, stats.deleted) >= 0
    for group in stats.groups:
        parts = (group.committed, group.pending, group.lost, group.deleted)
        assert min(parts) >= 0, group
        assert sum(parts) == stats.appended, (group, stats.appended)


class _Traffic:
    """A writer and a member of a group that go on until the end of a ``with`` block."""

    def __init__(self, place, limits, payloads):
        self._place, self._limits, self._payloads = place, limits, payloads
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=one) for one in (self._write, self._read)]
        self.committed = threading.Event()

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _write(self):
        with self._place.open().open_trace_writer(self._limits) as writer:
            while not self._stop.is_set():
                for payload in self._payloads:
                    writer.append(payload)
                with suppress(OSError):
                    writer.sync()
                    writer.tend()
                self._stop.wait(0.01)

    def _read(self):
        member = self._place.open().open_record_reader(group="trainer")
        while not self._stop.is_set():
            with suppress(ServiceAwayError):
                if member.read(7):
                    member.commit(member.offsets())
                    self.committed.set()
        member.close()


def test_counts_add_up_while_others_write_and_commit(place, limits, make_trace):
    payloads = [
        bytes(encode_trace(make_trace(seq=seq, tenant="umbrella" if seq % 3 else "acme")))
        for seq in range(6)
    ]
    with _Traffic(place, limits, payloads) as traffic:
        assert traffic.committed.wait(60)
        for look in range(_LOOKS):
            check(place.open().stats())
            if look == _LOOKS // 2:
                place.open().delete("umbrella")
    check(place.open().stats())
