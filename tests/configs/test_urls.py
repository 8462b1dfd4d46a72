"""URLs are shown without what may be a secret, whatever they look like."""

from __future__ import annotations

import random
from urllib.parse import quote

import pytest

from configs.urls import (
    MASK,
    has_secret,
    shown_option,
    shown_place,
    shown_scheme,
    shown_url,
    without_secrets,
)

PLAIN = [
    "log:",
    "log:/some/folder",
    "log:?key_file=/some/key",
    "log:/some/folder?key_env=SLIPSTREAM_KEY",
    "file:///some/folder",
    "socket:",
    "socket:/run/traces.sock",
    "memory:test",
    "redis://127.0.0.1:6379/0?run=x&timeout_s=2.5&cluster=true",
    "rediss://valkey.example/1?ca_file=/etc/ca.pem&password_env=REDIS_PASSWORD",
    "redis://[::1]:6379/0",
    "kafka://a.example:9092,b.example:9092/prefix?partitions=3&compression=zstd",
    "s3://bucket/prefix",
    "s3://bucket/prefix?traces=redis://host:6379/0?run=x",
    "shm:?traces=kafka://host:9092/p",
    "fsspec:gs://bucket/prefix",
]


@pytest.mark.parametrize("url", PLAIN)
def test_a_url_without_a_secret_is_shown_as_it_is(url):
    assert shown_url(url) == url
    assert not has_secret(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://me:hunter2@host:6379/0?run=x", f"redis://{MASK}@host:6379/0?run=x"),
        ("redis://:p%40ss@host", f"redis://{MASK}@host"),
        ("redis://me:hun@ter2@host/0", f"redis://{MASK}@host/0"),
        ("redis://me:hun/ter2@host/0", f"redis://{MASK}"),
        ("redis://me:hun#ter2@host/0", f"redis://{MASK}"),
        ("redis://me:hun?ter2@host/0", f"redis://{MASK}"),
        ("redis://host/0?run=x&password=hunter2&db=3", f"redis://host/0?run=x&password={MASK}"),
        ("redis://host/0?hunter2", f"redis://host/0?{MASK}"),
        ("shm:redis://me:hunter2@host", f"shm:redis://{MASK}@host"),
        ("shm:?traces=redis://me:hunter2@host", f"shm:?traces=redis://{MASK}@host"),
        ("log:?key=" + "ab" * 32, f"log:?key={MASK}"),
        ("log:?key_file=" + "ab" * 32, f"log:?key_file={MASK}"),
        ("log:?key_env=" + "AB" * 32, f"log:?key_env={MASK}"),
        ("s3://KEY:SECRET@bucket/prefix", f"s3://{MASK}@bucket/prefix"),
        ("s3://bucket/prefix?aws_secret=x", f"s3://bucket/prefix?aws_secret={MASK}"),
        ("me:hunter2@host", MASK),
        ("hunter2", MASK),
        ("redis://me:hunter2 @host", f"redis:{MASK}"),
    ],
)
def test_secrets_are_masked_and_the_rest_is_shown(url, shown):
    assert shown_url(url) == shown
    assert has_secret(url)
    assert shown_url(shown) in (shown, MASK, f"{shown_scheme(shown)}://{MASK}")


def test_a_user_alone_is_hidden_but_no_secret():
    url = "kafka://slipstream@host:9092/prefix"
    assert shown_url(url) == f"kafka://{MASK}@host:9092/prefix"
    assert not has_secret(url)
    assert has_secret("kafka://slipstream:hunter2@host:9092/prefix")


def test_no_password_of_any_letters_is_shown():
    drawn = random.Random(3)
    letters = "/?#@:&=%[]\\ \t\n;,+~|'\"ü→aA0"
    for _ in range(20_000):
        around = ["".join(drawn.choices(letters, k=drawn.randrange(4))) for _ in range(2)]
        password = around[0] + "CANARY" + around[1]
        raw = drawn.choice([password, quote(password, safe=""), quote(password)])
        user = drawn.choice(["", "me", "me%40x"])
        rest = drawn.choice(["", "/0", "/0?run=x", "?timeout_s=1", "/a/b"])
        url = f"{drawn.choice(['redis', 'kafka', 's3', 'shm:redis'])}://{user}:{raw}@host:1{rest}"
        assert "CANARY" not in shown_url(url), url
        assert "CANARY" not in shown_place(url), url
        said = f"cannot open {url!r}: {url} and {raw}"
        assert "CANARY" not in without_secrets(said, url), url


def test_an_option_is_shown_only_in_its_form():
    assert shown_option("run", "x-1") == "x-1"
    assert shown_option("run", "a b") == MASK
    assert shown_option("password", "x") == MASK


def test_urls_within_urls_end_somewhere():
    assert shown_url("shm:" * 100) == shown_url("shm:" * 5) == f"shm:shm:shm:shm:{MASK}"
    assert shown_url("redis://" + "a" * 10_000) == MASK
