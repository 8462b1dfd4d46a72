"""Hostile records through the decoder of traces.

    python -m benchmarks.faults.fuzz                     # 10 million records, minutes on two cores
    python -m benchmarks.faults.fuzz --records 100000

Sound traces of every kind (rows in bfloat16, fp8, float32 or none; with rounds and without) are
changed in a dozen ways: bits, bytes and numbers, header and table, JSON, cuts and joints; and some
records are rubbish from the start. Each goes through ``decode_traces`` in a forked process whose
memory is limited. A record that is taken for a trace is compared with ``oracles/plain_trace.py``,
which says in plain Python what a sound trace is and shares no code with the decoder.

The same seed gives the same records: a failure names the worker's seed and the record's number.
Writes ``benchmarks/results/fuzz.json`` and, with ``--publish``, ``rows/faults.json``.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.harness.results import (
    RESULTS,
    Row,
    at_least,
    at_most,
    say,
    write_result,
    write_rows,
)
from buffer.codec import UnreadableRecordError, decode_traces, encode_trace
from buffer.columns import ENTRY, HEAD
from buffer.records import FeatureRows, Round, Rounds, Sampling, Trace
from oracles.plain_trace import problems_of

MEMORY_MIB = 64
"""The process may grow by so much; the system refuses more."""
_AT_ONCE = 64
_HEADROOM = 1.5  # address space is taken in larger steps than memory is used
_INTERESTING = (
    *(0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 65535),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
)
_REALS = (math.nan, math.inf, -math.inf, -0.0, 1e-3, 1e-2, 1.0, 1 + 1e-9, 1e9, 1e10, 1e38, 1e308)
_JSON = (
    b"null", b"true", b"-1", b"1e999", b"NaN", b"[]", b"{}", b'""', b"0.5", b"9" * 40, b"[[[[[[[[",
    b'{"a":' * 20, b'"\\ud800"', b"\xff\xfe", b"1" + b"0" * 400, b'"sampling":{"temperature":-1},',
)  # fmt: skip


# ---- sound traces --------------------------------------------------------------------------------


def sound_records() -> list[bytes]:
    """One record of each kind."""
    kinds: list[tuple[Any, int, int]] = [
        (dtype, num_rounds, num_tokens)
        for dtype in ("bfloat16", "float8_e4m3fn", "float32", None)
        for num_rounds, num_tokens in ((0, 1), (2, 9), (6, 40))
    ]
    return [bytes(encode_trace(_trace(*kind, seed=i))) for i, kind in enumerate(kinds)]


def _trace(dtype: Any, num_rounds: int, num_tokens: int, seed: int) -> Trace:
    random = np.random.default_rng(seed)
    return Trace(
        producer="server-1",
        epoch=1_700_000_000_000,
        seq=seed,
        request_id="cmpl-1",
        tenant="acme",
        target_fingerprint="ab" * 32,
        sampling=Sampling({"temperature": 0.7, "top_p": 0.9, "seed": 7, "user": None}),
        prompt_length=1,
        token_ids=random.integers(0, 50_000, num_tokens, dtype=np.int32),
        rounds=Rounds.of(_round(random, i) for i in range(num_rounds)),
        features=None if dtype is None else _rows(random, dtype, num_tokens),
        finished_unix_ms=1_700_000_001_000,
    )


def _round(random: np.random.Generator, anchor: int) -> Round:
    k = int(random.integers(0, 4))
    num_accepted = int(random.integers(0, k + 1))
    logps = tuple((-random.random(k)).tolist())
    ids = tuple(random.integers(0, 50_000, k).tolist())
    return Round(
        anchor, "neural" if k else "none", 3, ids, logps or None, logps, num_accepted, 9, k, 0.98,
        4, 0.004, policy="goodput", step=anchor,
    )  # fmt: skip


def _rows(random: np.random.Generator, dtype: Any, num_tokens: int) -> FeatureRows:
    positions = np.arange(num_tokens, dtype=np.int32)
    values = random.standard_normal((num_tokens, 3, 4)).astype(np.float32)
    scale = None
    rows: Any = values
    if dtype == "bfloat16":
        rows = (values.view(np.uint32) >> 16).astype(np.uint16)
    elif dtype == "float8_e4m3fn":
        rows = random.integers(0, 120, values.shape, dtype=np.uint8)
        scale = np.ones((num_tokens, 3), np.float32)
    return FeatureRows(positions, (2, 4), dtype, rows, scale)


# ---- ways to spoil them --------------------------------------------------------------------------

Spoil = Callable[[random.Random, bytearray, Sequence[bytes]], bytearray]
"""Changes a record; may use another one."""


def _flip_bits(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        record[chance.randrange(len(record))] ^= 1 << chance.randrange(8)
    return record


def _set_bytes(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    for _ in range(chance.choice((1, 2, 4))):
        record[chance.randrange(len(record))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
    return record


def _put(record: bytearray, at: int, value: bytes) -> bytearray:
    record[at : at + len(value)] = value
    return record


def _set_integer(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    size = chance.choice((2, 4, 8))
    at = chance.randrange(max(1, len(record) // size)) * size
    number = chance.choice(_INTERESTING) % (1 << 8 * size)
    return _put(record, min(at, len(record) - size), number.to_bytes(size, "little"))


def _set_real(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    kind = chance.choice(("<f", "<d"))
    value = chance.choice(_REALS)
    if kind == "<f" and abs(value) == 1e308:
        value = math.inf
    packed = struct.pack(kind, value)
    at = chance.randrange(max(1, len(record) // len(packed))) * len(packed)
    return _put(record, min(at, len(record) - len(packed)), packed)


def _set_head(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    """Number of columns or bytes of text."""
    at, size = chance.choice(((16, 2), (18, 2), (20, 4)))
    before = int.from_bytes(record[at : at + size], "little")
    number = chance.choice((before + 1, before - 1, before + 8, *_INTERESTING)) % (1 << 8 * size)
    return _put(record, at, number.to_bytes(size, "little"))


def _set_table(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    """Name, dtype or size of a column."""
    num_columns = max(1, int.from_bytes(record[18:20], "little"))
    at = HEAD.size + chance.randrange(min(num_columns, 12)) * ENTRY.size
    what = chance.randrange(3)
    if what == 0:
        name = chance.choice((b"rows", b"counts", b"reals", b"scale", b"\xff", b"", b"token_ids"))
        return _put(record, at, name.ljust(16, b"\0"))
    if what == 1:
        tag = chance.choice((b"U8", b"I32", b"F32", b"F64", b"BF16", b"F8_E4M3", b"I64", b"??"))
        return _put(record, at + 16, tag.ljust(8, b"\0"))
    size = int.from_bytes(record[at + 24 : at + 32], "little")
    number = chance.choice((size + 4, size - 4, size + 8, size - 8, size * 2, *_INTERESTING))
    return _put(record, at + 24, (number % (1 << 64)).to_bytes(8, "little"))


def _spoil_json(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    """Replace a piece of the text, of which the header then tells the new length."""
    num_columns, num_text = struct.unpack_from("<HI", record, 18)
    start = HEAD.size + num_columns * ENTRY.size
    end = start + num_text
    at = chance.randrange(start, max(start + 1, end))
    cut = chance.randrange(0, 12)
    piece = chance.choice(_JSON)
    text = bytes(record[start:at]) + piece + bytes(record[min(end, at + cut) : end])
    return _with_text(record, start, end, text)


def _change_json(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    """Replace the value of a key, so that the JSON stays JSON."""
    num_columns, num_text = struct.unpack_from("<HI", record, 18)
    start = HEAD.size + num_columns * ENTRY.size
    end = start + num_text
    body = json.loads(bytes(record[start:end]))
    place = body
    if chance.random() < 0.4:
        place = chance.choice([one for one in body.values() if isinstance(one, dict)] or [body])
    key = chance.choice([*place, "temperature", "extra"])
    if chance.random() < 0.15:
        place.pop(key, None)
    else:
        place[key] = chance.choice(
            [None, True, -1, 0, 2**63, 2**64, 0.5, -0.5, 1e300, "", "x" * 5000, [], [1], {}, [None],
             {"a": {}}, [[]], "neural", 10**400, ["none"], [-1], [2, 4, 6]]
        )  # fmt: skip
    return _with_text(record, start, end, json.dumps(body).encode())


def _with_text(record: bytearray, start: int, end: int, text: bytes) -> bytearray:
    """The record with another text, and with the columns where they then belong."""
    aligned = -(-end // 8) * 8
    head = bytearray(record[:start]) + text
    head[20:24] = len(text).to_bytes(4, "little")
    return head + bytes(-len(head) % 8) + record[aligned:]


def _cut(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    del record[chance.randrange(len(record)) :]
    return record


def _lengthen(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    return record + chance.choice((bytes(1), bytes(8), b"\xff" * 8, bytes(record[:64])))


def _move(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    """Copy a piece of the record to another place of it."""
    size = chance.choice((1, 4, 8, 32, 64))
    source, goal = (chance.randrange(max(1, len(record) - size)) for _ in range(2))
    return _put(record, goal, bytes(record[source : source + size]))


def _join(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    """The front of this record and the back of another one."""
    other = chance.choice(others)
    at = chance.randrange(min(len(record), len(other)))
    return record[:at] + other[at:]


def _rubbish(chance: random.Random, record: bytearray, others: Sequence[bytes]) -> bytearray:
    head = chance.choice((b"", b"slipstream.trace", b"slipstream.trace\2\0", bytes(record[:24])))
    return bytearray(head + chance.randbytes(chance.randrange(300)))


WAYS: tuple[Spoil, ...] = (
    *(_flip_bits, _set_bytes, _set_integer, _set_real, _set_head, _set_table, _spoil_json),
    *(_change_json, _cut, _lengthen, _move, _join, _rubbish),
)


# ---- one process ---------------------------------------------------------------------------------


class Fuzzed:
    """A forked process that decodes spoilt records."""

    def __init__(self, seed: int, num_records: int, memory_mib: int = MEMORY_MIB) -> None:
        self.seed = seed
        self._out, inward = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._out)
            _limit_memory(memory_mib)
            try:
                answer = json.dumps(_fuzz(seed, num_records)).encode()
            except BaseException as error:  # the process's outermost loop
                text = f"{type(error).__name__}: {error}"[:500]
                answer = json.dumps({"failures": [text]}).encode()
            os.write(inward, answer)
            os._exit(0)
        os.close(inward)

    def outcome(self) -> dict[str, Any]:
        """Wait for its end.

        Returns:
            Counts by outcome and way, the growth of its memory in MiB, and ``failures``: what went
            wrong, with the number of the record; a death of the process is one.
        """
        with os.fdopen(self._out, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self._pid, 0)
        found: dict[str, Any] = json.loads(answer) if answer else {"failures": []}
        if status or not answer:
            found["failures"].append(f"the process ended with status {status}")
        return {"seed": self.seed, **found}


def _limit_memory(memory_mib: int) -> None:
    """Let the system refuse memory beyond what is used now and ``memory_mib``."""
    most = int(_status_kib("VmData") * 1024 + _HEADROOM * (memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _fuzz(seed: int, num_records: int) -> dict[str, Any]:
    chance = random.Random(seed)
    sound = sound_records()
    _check_sound(sound)
    outcomes: Counter[str] = Counter()
    ways: Counter[str] = Counter()
    failures: list[str] = []
    before = peak = _status_kib("VmRSS")
    for start in range(0, num_records, _AT_ONCE):
        names, records = list[str](), list[bytearray]()
        for _ in range(min(_AT_ONCE, num_records - start)):
            spoil = chance.choice(WAYS)
            record = bytearray(chance.choice(sound))
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                if len(record) > HEAD.size + ENTRY.size * 12:
                    record = _spoilt(spoil, chance, record, sound)
                    names.append(spoil.__name__.strip("_"))
            records.append(record)
        ways.update(names)
        for number, trace in enumerate(decode_traces(records), start=start):
            if isinstance(trace, UnreadableRecordError):
                outcomes[trace.reason] += 1
            elif problems := problems_of(trace):
                failures.append(f"record {number} was accepted with {problems}"[:500])
            else:
                outcomes["accepted"] += 1
        if start % (_AT_ONCE * 64) == 0:
            peak = max(peak, _status_kib("VmRSS"))
    return {
        "records": num_records,
        "outcomes": dict(outcomes),
        "ways": dict(ways),
        "grown_mib": (max(peak, _status_kib("VmRSS")) - before) / 1024,
        "rss_mib": max(peak, _status_kib("VmHWM")) / 1024,
        "failures": failures[:20],
        "num_failures": len(failures),
    }


def _spoilt(
    spoil: Spoil, chance: random.Random, record: bytearray, sound: Sequence[bytes]
) -> bytearray:
    try:
        return spoil(chance, record, sound)
    except (ValueError, IndexError, struct.error, KeyError):  # an earlier change left no JSON
        return _flip_bits(chance, record, sound)


def _check_sound(records: Sequence[bytes]) -> None:
    for trace in decode_traces(records):
        assert not isinstance(trace, UnreadableRecordError), trace
        assert not (problems := problems_of(trace)), problems


def _status_kib(name: str) -> int:
    """A figure of this process from the system, KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


# ---- the page ------------------------------------------------------------------------------------


def fuzz_all(num_records: int, num_workers: int, seed: int) -> dict[str, Any]:
    """Share the records among forked processes, one for each core at a time; their counts
    together."""
    begun = time.monotonic()
    share = math.ceil(num_records / num_workers)
    running = deque[Fuzzed]()
    parts = list[dict[str, Any]]()
    for number in range(num_workers):
        running.append(Fuzzed(seed + number, share))
        if len(running) == (os.cpu_count() or 1):
            parts.append(running.popleft().outcome())
    parts += [one.outcome() for one in running]
    outcomes: Counter[str] = Counter()
    for part in parts:
        outcomes.update(part.get("outcomes", {}))
    failures = [f"seed {part['seed']}: {text}" for part in parts for text in part["failures"]]
    return {
        "records": sum(part.get("records", 0) for part in parts),
        "outcomes": dict(outcomes),
        "failures": failures,
        "grown_mib": max((part.get("grown_mib", 0.0) for part in parts), default=0.0),
        "rss_mib": max((part.get("rss_mib", 0.0) for part in parts), default=0.0),
        "seconds": time.monotonic() - begun,
        "parts": parts,
    }


def rows_of(found: dict[str, Any]) -> list[Row]:
    row = "decoder of traces, fuzzed"
    return [
        at_least(row, "records decoded", found["records"], 10_000_000),
        at_most(
            row, "crashes, other errors and invalid records accepted", len(found["failures"]), 0
        ),
        at_most(row, "growth of the process, MiB", round(found["grown_mib"], 2), MEMORY_MIB),
    ]


def main(
    records: Annotated[int, typer.Option(min=1)] = 10_000_000,
    workers: Annotated[int, typer.Option(min=1, help="processes, each with a seed")] = 40,
    seed: Annotated[int, typer.Option(help="of the first process")] = 0,
    publish: Annotated[bool, typer.Option(help="write rows/faults.json, too")] = False,
    out: Annotated[Path, typer.Option(help="result file")] = RESULTS / "fuzz.json",
    rows_dir: Annotated[Path, typer.Option(help="folder of rows/faults.json")] = RESULTS,
) -> None:
    """Fuzz the decoder."""
    found = fuzz_all(records, workers, seed)
    say(f"{ {k: v for k, v in found.items() if k != 'parts'} }")
    write_result(out, found)
    if publish:
        write_rows("faults", rows_of(found), "python -m benchmarks.faults.fuzz", rows_dir)
    if found["failures"]:
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
