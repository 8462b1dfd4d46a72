"""In a cluster all keys of a run are on one node, and everything works as on one server."""

from dataclasses import replace

import pytest
import redis

from buffer.backends import open_backend
from buffer.tensors import join_tensors
from oracles.redis_servers import redis_cluster, valkey_binary
from tests.buffer.sample_bundle import MANIFEST, tensors


@pytest.fixture(scope="module")
def cluster():
    with redis_cluster(valkey_binary()) as url:
        yield url


@pytest.mark.parametrize("run", ["a", "b", "c"])  # on different nodes
def test_traces_and_weights_of_a_run_live_in_a_cluster(cluster, tmp_path, limits, run):
    buffer = open_backend(f"{cluster}&run={run}", tmp_path)
    with buffer.open_trace_writer(replace(limits, max_bytes=65_536)) as writer:
        for i in range(100):
            writer.append(i.to_bytes(8, "little") * 200)
    assert writer.counts.durable == 100
    assert writer.counts.evicted_records > 0
    alone, member = buffer.open_record_reader(), buffer.open_record_reader(group="trainer")
    read = alone.read(200)
    assert [one.payload for one in read] == [one.payload for one in member.read(200)]
    member.commit(member.offsets())
    (found,) = buffer.stats().groups
    assert found.committed == len(read) == 100 - found.lost
    assert found.pending == 0

    store = buffer.open_weights()
    end = store.watch(lambda: None)
    epoch = store.take_over()
    for version in range(3):
        blob = join_tensors(tensors(), {})
        store.publish(replace(MANIFEST, version=version), {"drafter.safetensors": blob}, epoch)
    assert store.prune(keep=1) == [1]
    assert store.read(2).files == {"drafter.safetensors": blob}
    end()
    for one in (alone, member):
        one.close()


def test_the_keys_of_a_run_are_on_one_node(cluster, tmp_path, limits):
    with open_backend(f"{cluster}&run=one", tmp_path).open_trace_writer(limits) as writer:
        writer.append(b"x")
    client = redis.RedisCluster.from_url(cluster.partition("?")[0])
    keys = list(client.scan_iter("slipstream:{one}:*"))
    assert len(keys) == 3
    assert len({client.keyslot(key) for key in keys}) == 1
    client.close()
