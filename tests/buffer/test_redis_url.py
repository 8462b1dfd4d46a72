"""A Redis URL says all that is needed, its mistakes are named, and its password never shows."""

import logging
import ssl
from dataclasses import replace

import pytest
import redis
import trustme

from buffer.backends import open_backend
from buffer.interface import ServiceAwayError
from buffer.redis_url import parse_redis_url
from buffer.tensors import join_tensors
from oracles.places import PLACES, close_servers
from oracles.proxies import Proxy
from oracles.redis_servers import RedisServer, free_port, valkey_binary
from tests.buffer.sample_bundle import MANIFEST, tensors

SECRET = "s3cret/@word"


@pytest.fixture(scope="module", autouse=True)
def servers():
    yield
    close_servers()


def test_a_url_names_server_user_run_and_options(tmp_path):
    found = parse_redis_url(
        "rediss://me:s3cret%2F%40word@example.org:7000/3?run=demo&timeout_s=2.5&cluster=false",
        tmp_path,
    )
    assert (found.host, found.port, found.db, found.user) == ("example.org", 7000, 3, "me")
    assert (found.password, found.tls, found.run, found.timeout_s) == (SECRET, True, "demo", 2.5)
    assert found.key("ends") == "slipstream:{demo}:ends"
    plain = parse_redis_url("redis://[::1]", tmp_path / "my-run")
    assert (plain.host, plain.port, plain.db, plain.run) == ("::1", 6379, 0, "my-run")


def test_the_password_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("BUFFER_PASSWORD", SECRET)
    url = "redis://me@localhost?password_env=BUFFER_PASSWORD"
    assert parse_redis_url(url, tmp_path).password == SECRET


@pytest.mark.parametrize(
    ("rest", "problem"),
    [
        ("", "must name a host"),
        ("//", "must name a host"),
        ("//localhost:x", "host and port"),
        ("//localhost:99999", "host and port"),
        ("//localhost/one", "number of the database"),
        ("//localhost#x", "'#'"),
        ("//localhost?timeout=3", "unknown option 'timeout'; known are run, "),
        ("//localhost?run=a&run=b", "'run' is given twice"),
        ("//localhost?run=a%20b", "option run='********': it must match"),
        ("//localhost?timeout_s=0", "timeout_s='0': it must be above 0"),
        ("//localhost?timeout_s=inf", "above 0"),
        ("//localhost?spool_bytes=many", "spool_bytes='********': it must be a number"),
        ("//localhost?cluster=yes", "must be true or false"),
        ("//localhost?ca_file=/nowhere", "needs rediss://"),
        ("//localhost?password_env=NO_SUCH_NAME_HERE", "the environment has no"),
        ("//localhost?run", "name=value"),
        ("//localhost/3?cluster=true", "a cluster has database 0 only"),
    ],
)
def test_what_a_url_gets_wrong_is_named_and_the_password_is_not(tmp_path, rest, problem):
    rest = rest.replace("//localhost", "//me:s3cret@localhost")
    with pytest.raises(ValueError, match=r"^buffer\.url cannot be used: ") as caught:
        open_backend(f"redis:{rest}", tmp_path)
    assert problem in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_certificate_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"ca_file='/nowhere': there is no such file"):
        open_backend("rediss://localhost?ca_file=/nowhere", tmp_path)


def test_opening_needs_no_server_and_the_first_use_says_what_is_wrong(tmp_path, limits):
    port = free_port()
    buffer = open_backend(f"redis://me:s3cret@127.0.0.1:{port}/0", tmp_path)
    writer = buffer.open_trace_writer(limits)
    writer.append(b"waits")
    for use in (writer.sync, buffer.stats, buffer.open_weights().versions):
        with pytest.raises(ServiceAwayError, match=f"127.0.0.1:{port}") as caught:
            use()
        assert "s3cret" not in str(caught.value)
    buffer.keep_unreadable("x", b"is best effort")
    assert writer.counts.pending == 1


@pytest.fixture
def limited_server():
    """A server on which one user may do just what docs/buffer.md says it must."""
    server = RedisServer(valkey_binary())
    with redis.Redis(port=server.port) as control:
        control.execute_command(
            *("ACL", "SETUSER", "slipstream", "on", f">{SECRET}", "resetkeys"),
            *("~slipstream:{demo}:*", "resetchannels", "&slipstream:{demo}:*", "-@all"),
            *ALLOWED,
        )
        control.execute_command("ACL", "SETUSER", "default", "off")
    yield server
    server.close()


# The line of docs/buffer.md.
ALLOWED = [
    *(
        "+@stream",
        "+@hash",
        "+@sortedset",
        "+@transaction",
        "+get",
        "+set",
        "+del",
        "+unlink",
        "+exists",
    ),
    *("+persist", "+eval", "+publish", "+subscribe", "+unsubscribe", "+ping", "+client|setinfo"),
]


def test_a_user_with_the_documented_rights_can_do_everything(tmp_path, limited_server, limits):
    password = SECRET.replace("/", "%2F").replace("@", "%40")
    url = f"redis://slipstream:{password}@127.0.0.1:{limited_server.port}/0?run="
    buffer = open_backend(url + "demo", tmp_path)
    with buffer.open_trace_writer(limits) as writer:
        for _ in range(3):
            writer.append(bytes(900_000 // 2))
        writer.tend()
    reader = buffer.open_record_reader(group="trainer")
    assert len(reader.read(10)) > 0
    reader.commit(reader.offsets())
    reader.close()
    assert buffer.stats().groups[0].pending == 0
    buffer.keep_unreadable("x", b"y")
    store = buffer.open_weights()
    end = store.watch(lambda: None)
    store.mark_in_use("server", [0])
    for version in range(3):
        manifest = replace(MANIFEST, version=version)
        blob = join_tensors(tensors(), {})
        store.publish(manifest, {"drafter.safetensors": blob}, store.take_over())
    assert store.prune(keep=1) == [1]
    store.write_denied({2})
    end()
    with pytest.raises(ServiceAwayError, match="permission"):
        open_backend(url + "another", tmp_path).open_weights().versions()


def test_a_wrong_password_is_an_error_that_does_not_show_it(
    tmp_path, limited_server, limits, caplog
):
    caplog.set_level(logging.DEBUG)
    url = f"redis://slipstream:wr0ngword@127.0.0.1:{limited_server.port}/0"
    writer = open_backend(url, tmp_path).open_trace_writer(limits)
    writer.append(b"waits")
    with pytest.raises(ServiceAwayError) as caught:
        writer.sync()
    assert "wr0ngword" not in str(caught.value) + caplog.text
    assert writer.counts.pending == 1


@pytest.fixture
def authority(tmp_path):
    """A certificate authority and the certificate of 127.0.0.1, as a server's TLS context."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tmp_path / "ca.pem", context


def test_traces_and_weights_travel_over_tls(tmp_path, authority, limits):
    ca_file, context = authority
    place = PLACES["valkey"](tmp_path)
    if place.server is None:
        pytest.skip("the server is somebody else's")
    with Proxy(place.server.port, context) as proxy:
        url = f"rediss://127.0.0.1:{proxy.port}/0?run=tls-{proxy.port}"
        buffer = open_backend(f"{url}&ca_file={ca_file}", tmp_path)
        with buffer.open_trace_writer(limits) as writer:
            writer.append(b"over TLS")
        (record,) = buffer.open_record_reader().read(10)
        assert bytes(record.payload) == b"over TLS"
        assert buffer.open_weights().versions() == []

        with pytest.raises(ServiceAwayError, match="certificate"):
            open_backend(url, tmp_path).stats()
        # The certificate is for 127.0.0.1 alone.
        other = url.replace("127.0.0.1", "localhost")
        with pytest.raises(ServiceAwayError, match=r"(?i)hostname"):
            open_backend(f"{other}&ca_file={ca_file}", tmp_path).stats()
