"""The Kafka part of ``benchmarks.buffer``: our writer and reader against kafka-python, with equal
settings and pipelines of the same size, over Tansu."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from buffer.backends import open_backend
from buffer.interface import Backend, TraceLimits
from oracles.kafka_brokers import running_broker

RECORD_BYTES = 64 << 10
BATCH = 16
"""Records sent before their acknowledgements are waited for."""
PerS = Callable[[Callable[[], int]], float]
Compare = Callable[[dict[str, Callable[[], float]], int], Any]


def write_bare(address: str, topic: str, record: bytes, num_records: int, per_s: PerS) -> float:
    producer = KafkaProducer(
        bootstrap_servers=address, acks="all", batch_size=0, metrics_enabled=False
    )
    producer.partitions_for(topic)

    def work() -> int:
        for _ in range(num_records // BATCH):
            for future in [producer.send(topic, record, partition=0) for _ in range(BATCH)]:
                future.get(30)
        return num_records // BATCH * BATCH * len(record)

    rate = per_s(work)
    producer.close()
    return rate


def read_bare(address: str, topic: str, num_records: int, per_s: PerS) -> float:
    consumer = KafkaConsumer(
        bootstrap_servers=address,
        fetch_max_wait_ms=50,
        max_partition_fetch_bytes=4 << 20,
        check_crcs=False,
        metrics_enabled=False,
    )
    consumer.assign([TopicPartition(topic, 0)])
    consumer.seek(TopicPartition(topic, 0), 0)
    consumer.poll(timeout_ms=5000, max_records=1)

    def work() -> int:
        num_bytes = 0
        while num_bytes < num_records * RECORD_BYTES:
            for messages in consumer.poll(timeout_ms=1000, max_records=BATCH).values():
                num_bytes += sum(len(message.value) for message in messages)
        return num_bytes

    rate = per_s(work)
    consumer.close()
    return rate


def write_ours(
    backend: Backend, limits: TraceLimits, record: bytes, num_records: int, per_s: PerS
) -> float:
    with backend.open_trace_writer(limits) as writer:
        writer.append(record)  # connects
        writer.sync()

        def work() -> int:
            for _ in range(num_records // BATCH):
                writer.append_all([record] * BATCH)
                writer.sync()
            return num_records // BATCH * BATCH * len(record)

        return per_s(work)


def read_ours(backend: Backend, num_records: int, per_s: PerS) -> float:
    reader = backend.open_record_reader()
    reader.read(1)  # connects

    def work() -> int:
        num_bytes = 0
        while num_bytes < num_records * RECORD_BYTES:
            num_bytes += sum(len(record.payload) for record in reader.read(BATCH))
        return num_bytes

    rate = per_s(work)
    reader.close()
    return rate


def measure_kafka(
    root: Path,
    limits: TraceLimits,
    num_bytes: int,
    num_turns: int,
    per_s: PerS,
    compare: Compare,
) -> Iterator[tuple[str, Any]]:
    """Rates of writing and reading, by side."""
    record = os.urandom(RECORD_BYTES)
    num_records = num_bytes // len(record) // BATCH * BATCH
    with running_broker("tansu", root / "tansu") as broker:
        turn = 0
        read: dict[str, list[float]] = {"buffer": [], "kafka-python": []}

        def url(name: str) -> str:
            return f"kafka://{broker.address}/{name}?partitions=1&batch_bytes=0"

        def ours() -> float:
            nonlocal turn
            turn += 1
            backend = open_backend(url(f"run-{turn}"), root)
            rate = write_ours(backend, limits, record, num_records, per_s)
            read["buffer"].append(read_ours(backend, num_records, per_s))
            return rate

        def bare() -> float:
            nonlocal turn
            turn += 1
            with open_backend(url(f"bare-{turn}"), root).open_trace_writer(limits) as writer:
                writer.append(record)  # creates the topic
                writer.sync()
            topic = f"bare-{turn}.traces"
            rate = write_bare(broker.address, topic, record, num_records, per_s)
            read["kafka-python"].append(read_bare(broker.address, topic, num_records, per_s))
            return rate

        yield "write, 64 KiB", compare({"buffer": ours, "kafka-python": bare}, num_turns)
        sides = {name: iter(rates).__next__ for name, rates in read.items()}
        yield "read, 64 KiB", compare(sides, num_turns)
