"""Each command on each kind of place, also one that is missing, empty or somebody else's: the exit
code that the docs name, one line that says why, and no traceback."""

import json
import socket
import threading
from contextlib import closing

import pytest
import redis
from kafka import KafkaProducer
from typer.testing import CliRunner

from buffer.backends import open_backend
from buffer.cli import app
from buffer.codec import encode_trace
from buffer.interface import TraceLimits
from oracles.kafka_brokers import running_broker
from oracles.redis_servers import RedisServer, valkey_binary

LIMITS = TraceLimits(segment_bytes=1 << 16, max_bytes=1 << 24, ttl_s=1e9, sync_interval_s=0.0)
READS = (
    ["stats"],
    ["inspect"],
    ["inspect", "--records"],
    ["delete", "--list"],
    ["delete", "--tenant", "T"],
    ["undelete", "--tenant", "T"],
)
OTHERS = ("copy from", "copy to", "replay from", "replay to")


@pytest.fixture
def full(tmp_path, make_trace):
    """The URL of a log with three traces."""
    with open_backend("log:", tmp_path / "full").open_trace_writer(LIMITS) as writer:
        for seq in range(3):
            writer.append(encode_trace(make_trace(seq=seq)))
    return f"log:{tmp_path}/full/traces"


@pytest.fixture
def outcomes(tmp_path, full):
    """Exit codes of all commands on a place, and what they say on errors."""

    def run(url, *, but=()):
        calls = [[*one, url] for one in READS if " ".join(one) not in but]
        calls += [["copy", url, str(tmp_path / "out")], ["copy", full, url]]
        calls += [["replay", url, str(tmp_path / "out")], ["replay", full, url]]
        found = {}
        for call in calls:
            result = CliRunner().invoke(app, [*call, "--set", f"run_dir={tmp_path}/here"])
            broken = result.exception is not None and not isinstance(result.exception, SystemExit)
            assert not broken, (call, result.exception)
            assert "Traceback" not in result.output
            said = result.stderr.splitlines()
            assert len(said) == (result.exit_code == 2), (call, result.output)
            assert "[Errno" not in result.output
            found[" ".join(call)] = result.exit_code
        return list(found.values()), "\n".join(said)

    return run


REFUSED = [2] * (len(READS) + len(OTHERS))
EMPTY = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
"""A deletion is taken back that the same list of commands has made."""


@pytest.mark.parametrize(
    "url",
    [
        *("foo:", "foo://me:secret@host", "memory:x", "memory:", "log:relative", "log:/x?a=b"),
        *("redis:", "redis://127.0.0.1:1/0?run=a&timeout_s=1", "kafka:", "kafka://127.0.0.1:1"),
        *("redis://127.0.0.1:1/0?x=1", "shm:?traces=memory:x", "shm:?x=1", "shm:?traces=foo:"),
        *("s3://", "rediss://127.0.0.1:1/0?run=a&timeout_s=1", "kafka://127.0.0.1:1/p?x=1"),
        "kafka://127.0.0.1:1/p?timeout_s=0.1",
    ],
)
def test_what_is_no_buffer_or_cannot_be_reached_is_refused(outcomes, url):
    codes, said = outcomes(url)
    assert codes == REFUSED
    assert "secret" not in said


@pytest.mark.parametrize("kind", ["socket:", "log:", "file:", ""])
def test_files_where_folders_or_sockets_belong_are_refused(outcomes, tmp_path, kind):
    (tmp_path / "file").write_text("somebody's")
    codes, said = outcomes(f"{kind}{tmp_path}/file")
    assert codes == REFUSED and f"{tmp_path}/file" in said
    assert (tmp_path / "file").read_text() == "somebody's"


def test_a_missing_place_is_refused_unless_it_is_written_to(outcomes, tmp_path):
    for kind in ("log:", "file:", ""):
        codes, _ = outcomes(f"{kind}{tmp_path}/missing-{kind.strip(':')}")
        # A copy makes it, and then it is there to be read.
        assert codes == [2, 2, 2, 2, 2, 2, 2, 0, 0, 0]
    assert outcomes(f"socket:{tmp_path}/missing")[0] == REFUSED


def test_an_empty_folder_is_an_empty_buffer(outcomes, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    assert outcomes(f"log:{tmp_path}/a")[0] == EMPTY
    assert outcomes(str(tmp_path / "b"))[0] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert outcomes(f"shm:?traces=log:{tmp_path}/c")[0] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_run_folder_whose_traces_are_a_file_is_refused(outcomes, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "traces").write_text("somebody's")
    codes, said = outcomes(str(tmp_path / "run"))
    assert codes == REFUSED and said.endswith("it is no folder")


def test_a_damaged_list_of_deletions_is_named(outcomes, tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "DELETED.json").write_text("[]")
    codes, said = outcomes(f"log:{tmp_path}/log")
    assert codes == [0, 1, 1, 2, 2, 2, 2, 2, 2, 2]
    assert "DELETED.json is damaged" in said


@pytest.fixture(scope="module")
def valkey():
    with closing(RedisServer(valkey_binary())) as server:
        yield server


def test_redis_empty_and_with_keys_of_somebody_else(outcomes, valkey):
    assert outcomes(f"{valkey.url}?run=empty")[0] == EMPTY
    with redis.Redis(port=valkey.port) as client:
        for key in ("ends", "deletions", "committed"):
            client.set(f"slipstream:{{texts}}:{key}", "somebody's")
            client.hset(f"slipstream:{{hashes}}:{key}", "w1", "somebody's")
    codes, said = outcomes(f"{valkey.url}?run=texts")
    assert codes == REFUSED and "(run texts)" in said
    codes, said = outcomes(f"{valkey.url}?run=hashes")
    assert set(codes) <= {1, 2} and "slipstream:{hashes}:deletions" in said


def test_which_run_of_a_service_is_meant_is_said_and_noted(tmp_path, valkey):
    call = ["stats", valkey.url, "--set", f"run_dir={tmp_path}/default"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0
    assert result.stderr.startswith("the URL names no run: this is run default, after ")
    call[1] += "?run=other"
    assert CliRunner().invoke(app, call).stderr == ""
    lines = (tmp_path / "default" / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["run"] for line in lines] == ["default", "other"]


def test_kafka_empty_and_with_topics_of_somebody_else(outcomes, tmp_path):
    with running_broker("tansu", tmp_path / "broker") as broker:
        url = f"kafka://{broker.address}"
        assert outcomes(f"{url}/empty?partitions=1&batch_bytes=0")[0] == EMPTY
        producer = KafkaProducer(bootstrap_servers=broker.address)
        for topic in ("traces", "deleted", "unreadable"):
            producer.send(f"foreign.{topic}", b"somebody's").get(10)
        producer.close()
        codes, _ = outcomes(f"{url}/foreign?partitions=1&batch_bytes=0")
        # The records are reported as none of ours, and copies leave them where they are.
        assert codes == [0, 1, 1, 0, 0, 0, 1, 0, 1, 0]


def test_a_deletion_says_which_folder_and_not_of_which_run_where_the_url_says_it(tmp_path, full):
    call = ["delete", "--tenant", "nobody", full, "--set", f"run_dir={tmp_path}/here"]
    said = CliRunner().invoke(app, call).output
    assert f"put aside; {full}\n" in said and f"{tmp_path}/here" not in said
    listed = CliRunner().invoke(app, ["undelete", *call[1:]]).output
    assert listed.endswith(f"was taken back; {full}\n")
    said = CliRunner().invoke(app, [*call[:3], str(tmp_path / "full")]).output
    assert f"put aside; log: of {tmp_path}/full\n" in said


def test_a_server_of_another_kind_is_no_buffer(outcomes, tmp_path):
    def answer(listening):
        while True:
            try:
                connected, _ = listening.accept()
            except OSError:
                return
            connected.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
            connected.close()

    here, there = socket.socket(), socket.socket(socket.AF_UNIX)
    here.bind(("127.0.0.1", 0))
    there.bind(str(tmp_path / "s"))
    for listening in (here, there):
        listening.listen(50)
        threading.Thread(target=answer, args=(listening,), daemon=True).start()
    port = here.getsockname()[1]
    for url in (
        f"redis://127.0.0.1:{port}/0?run=a&timeout_s=1",
        f"kafka://127.0.0.1:{port}/p?timeout_s=0.1",
        f"socket:{tmp_path}/s",
    ):
        assert outcomes(url)[0] == REFUSED
    here.close(), there.close()
