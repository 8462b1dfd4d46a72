"""A canary in each place of a URL that may hold a secret, and a look at all that anybody sees: the
printed settings, errors and what led to them, the output of each command, the audit and the log."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from buffer.audit import FILE, audit
from buffer.backends import open_backend
from buffer.cli import app
from configs.choices import SettingsError
from configs.load import load_settings, to_yaml
from configs.options import unknown_words
from configs.urls import has_secret
from trainer.places import Job, plan_for, shown_locally

CANARY = "CaNaRy7"
PASSWORDS = ["{c}", "{c}/x", "x/{c}", "x?{c}", "{c}?x=1", "x#{c}", "{c}#", "x@{c}", "x%2F{c}%40"]
PASSWORDS += [
    "x:{c}",
    "x&run={c}",
    "12?run={c}",
    "x%23%43aNaRy7",
    "x\\{c}",
    "[{c}]",
    "{c}ü",
    "x {c}",
]
URLS = [
    *(f"redis://me:{one}@127.0.0.1:1/0" for one in PASSWORDS),
    *(f"rediss://:{one}@127.0.0.1:1" for one in PASSWORDS[:6]),
    *(f"kafka://me:{one}@127.0.0.1:1/p" for one in PASSWORDS[:6]),
    *(f"shm:?traces=redis://me:{one}@127.0.0.1:1" for one in PASSWORDS),
    *(f"s3://key:{one}@bucket/prefix" for one in PASSWORDS[:6]),
    *(f"fsspec:ftp://me:{one}@127.0.0.1:1/x" for one in PASSWORDS[:6]),
    "redis://{c}@127.0.0.1:1/0",
    "redis://me:{c}",
    "redis://me:12/{c}@127.0.0.1:1",
    "redis://127.0.0.1:1/0?password={c}",
    "redis://127.0.0.1:1/0?{c}",
    "redis://127.0.0.1:1/0?{c}=1",
    "redis://127.0.0.1:1/0?timeout_s={c}",
    "redis://127.0.0.1:1/0?cluster={c}",
    "redis://127.0.0.1:1/0?password_env={c}",
    "rediss://127.0.0.1:1/0?ca_file={c}",
    "redis://127.0.0.1:1/0#{c}",
    "redis://me%40{c}:1/0",
    "redis:{c}@127.0.0.1",
    "redis:me:{c}@127.0.0.1",
    "reddis://me:{c}@127.0.0.1:1/0",
    "kafka://me@127.0.0.1:1/p?password={c}",
    "kafka://me@127.0.0.1:1/p?partitions={c}",
    "kafka://me@127.0.0.1:1/p?password_env={c}&timeout_s=0.1",
    "kafka://{c}@127.0.0.1:1/p?timeout_s=0.1",
    "kafka://127.0.0.1:1/p?{c}",
    "log:?key={c}",
    "log:?key_file={c}",
    "log:?key_env={c}",
    "log:/some/folder?key={c}",
    "log://me:{c}@host/folder",
    "file://me:{c}@host/folder",
    "log:me:{c}@host",
    "socket:?key={c}",
    "socket:/some/path?key={c}",
    "socket://me:{c}@host/path",
    "socket:me:{c}@host",
    "shm:redis://me:{c}@127.0.0.1:1",
    "shm:?key={c}",
    "shm:?traces=log:?key={c}",
    "memory:x?key={c}",
    "memory:me:{c}@host",
    "s3://bucket/prefix?key={c}",
    "s3://bucket/prefix?key=x&secret={c}",
    "s3://bucket/prefix?traces=redis://me:{c}@127.0.0.1:1",
    "fsspec:me:{c}@host://x/y",
    "fsspec:memory://x?token={c}",
    "fsspec:ftp://{c}@127.0.0.1:1/x",
    "me:{c}@host",
    " redis://me:{c}@127.0.0.1:1",
]
URLS = [one.replace("{c}", CANARY) for one in URLS]


def check(text: str, url: str) -> None:
    for form in (text, unquote(text)):
        assert CANARY not in form, f"{url}: {text}"


def check_error(error: BaseException | None, url: str) -> None:
    """The text of an error, and of all that led to it, whether or not a traceback shows it."""
    while error is not None:
        check(f"{error} {error!r}", url)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("url", URLS)
def test_settings_show_no_secret(url, tmp_path):
    with suppress(SettingsError):
        check(to_yaml(load_settings([], [f"buffer.url={url}"], {})), url)
    tree = tmp_path / "settings.yaml"
    for overrides, text in (
        ([url], ""),
        ([f"buffer={url}"], ""),
        ([f"{url}=1"], ""),
        ([f"buffer.ulr={url}"], ""),
        ([f"engine.max_batch={url}"], ""),
        ([], f"buffer: {url}\n"),
        ([], f"buffer.url: [{url}]\n"),
        ([], f"{url}\n"),
        ([], f"'{url}': 1\n"),
        ([], f"'{url}': 1\n'{url}': 1\n"),
        ([], f"buffer:\n  url: {url}\n url: x\n"),
        ([], f"buffer: {{url: {url}\n"),
    ):
        tree.write_text(text)
        try:
            load_settings([tree], overrides, {"SLIPSTREAM_BUFFER__URL": url})
        except SettingsError as error:
            check_error(error, url)
    with pytest.raises(SettingsError) as caught:
        load_settings([Path(url)], [], {})
    check_error(caught.value, url)
    check(unknown_words([url, f"--model={url}", f"--bufer={url}"]), url)


@pytest.mark.parametrize("url", URLS)
def test_neither_a_backend_nor_its_errors_show_a_secret(url, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    run = tmp_path / "run"
    audit(run, "write", url)
    try:
        backend = open_backend(url, run)
        for use in (
            backend.stats,
            lambda: backend.open_record_reader().read(1),
            lambda: backend.open_weights().versions(),
            lambda: backend.open_weights("line").location.encode("\0"),
        ):
            try:
                use()
            except (ValueError, OSError, LookupError) as error:
                check_error(error, url)
        check(f"{backend!r} {backend.open_weights().location}", url)
    except (ValueError, OSError) as error:
        check_error(error, url)
    check((run / FILE).read_text(), url)
    check(caplog.text, url)


COMMANDS = ["stats", "inspect", "delete", "undelete", "copy", "replay"]
EACH = [(url, COMMANDS[index % len(COMMANDS)]) for index, url in enumerate(URLS)]
ALL = [(url, command) for url in URLS[3::17] for command in COMMANDS]


@pytest.mark.parametrize(("url", "command"), sorted({*EACH, *ALL}))
def test_no_command_shows_a_secret(url, command, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.DEBUG)
    (tmp_path / "run").mkdir()
    arguments = {
        "delete": [["--tenant", "x", url], ["--list", url], ["x", url]],
        "undelete": [["--tenant", "x", url], ["--digest", url, url]],
        "copy": [[url, "memory:target"], ["run", url], [url, url, url]],
        "replay": [[url, "memory:target"], ["run", url]],
    }.get(command, [[url], [url, url], ["--limit", url]])
    ways = [[command, *words] for words in arguments]
    ways.append([command, "--set", f"buffer.url={url}", "--set", f"run_dir={tmp_path / 'run'}"])
    ways.append([command, f"--{url}"])
    for words in ways:
        found = CliRunner().invoke(app, words)
        check(found.output + found.stderr, url)
        check_error(found.exception, url)
    check(caplog.text, url)
    for path in tmp_path.rglob(FILE):
        check(path.read_text(), url)


PATHS = [
    f"redis://u:{CANARY}@h:1/0",
    f"kafka://u:{CANARY}@h:1/p",
    f"s3://u:{CANARY}@bucket/x",
    f"http://u:{CANARY}@h/x?y=z",
    f"redis:u:{CANARY}@h",
]


@pytest.mark.parametrize("url", PATHS)
def test_a_url_where_a_path_or_a_time_belongs_is_refused_and_not_shown(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for words in (
        ["replay", "run", "to", "--since", url],
        ["replay", "run", "to", "--until", url],
        ["delete", "--tenant", "t", "--until", url, "run"],
        ["delete", "--list", "--run", url],
        ["delete", "--tenant", "t", "--run", url],
        ["undelete", "--tenant", "t", "--run", url],
        ["stats", "redis://127.0.0.1:1/0", "--set", f"run_dir={url}"],
        ["stats", "--set", f"run_dir={url}"],
        ["keys", url, "public"],
        ["keys", "private", url],
        ["keys", url, url],
        ["stats", "--set", f"trainer.signing_key={url}"],
        ["stats", "--set", f"swap.public_key={url}"],
    ):
        found = CliRunner().invoke(app, words)
        assert found.exit_code == 2, (words, found.output)
        check(found.output + found.stderr, url)
        check_error(found.exception, url)
        assert "path" in found.stderr or "must be a time such as 2026-11-28T09:30" in found.stderr
    # No folder was made of it; a copy's destination may have been.
    assert not [path for path in tmp_path.rglob("*") if CANARY in path.name]


@pytest.mark.parametrize(
    ("url", "example"),
    [
        ("socket:{c}@", "must name an absolute path, as in 'socket:/some/path'"),
        ("redis:{c}@", "as in redis://127.0.0.1:6379/0"),
        ("kafka:{c}@", "must look like kafka://[USER@]HOST:PORT"),
        ("shm:{c}@", "'shm:' is enough"),
        ("fsspec:{c}@", "as in 'fsspec:gs://bucket/run'"),
    ],
)
def test_the_example_of_an_error_is_not_masked_with_what_was_typed(url, example, tmp_path):
    url = url.replace("{c}", CANARY)
    with pytest.raises(ValueError, match=r"buffer\.url") as caught:
        open_backend(url, tmp_path)
    check_error(caught.value, url)
    assert example in str(caught.value)


def test_a_mistyped_time_is_repeated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for typed in ("2026-11-31T09:30:00", "yesterday"):
        found = CliRunner().invoke(app, ["delete", "--tenant", "t", "--until", typed, "run"])
        assert found.stderr.strip().endswith(f"got '{typed}'")


@pytest.mark.parametrize("url", PATHS)
def test_no_setting_prints_a_secret_of_a_url(url):
    shown = to_yaml(load_settings([], [f"target={url}", f"wandb.entity={url}"], {}))
    check(shown, url)
    assert sum("********" in line for line in shown.splitlines()) == 2
    plain = ["target=hf://org/model", "wandb.entity=a/b:c"]
    assert "target: hf://org/model\n" in to_yaml(load_settings([], plain, {}))


@pytest.mark.parametrize("url", URLS)
def test_a_dry_run_shows_no_secret(url):
    try:
        settings = load_settings([], [f"buffer.url={url}"], {})
    except SettingsError:
        return
    if not has_secret(url):  # a user alone, which a job's script has to name
        return
    job = Job(settings=settings, configs=(), overrides=(f"buffer.url={url}",))
    check(shown_locally(job, 1, Path()) + shown_locally(job, 2, Path()), url)
    for place in ("torchrun", "slurm", "kubernetes"):
        try:
            check(plan_for(place, job, Path()).shown(), url)
        except (ValueError, KeyError) as error:
            check_error(error, url)


@pytest.mark.parametrize("url", [CANARY, f"{CANARY}:", f":{CANARY}", f"//{CANARY}"])
def test_a_password_in_place_of_the_url_is_not_repeated(url, tmp_path):
    check(to_yaml(load_settings([], [f"buffer.url={url}"], {})), url)
    with pytest.raises(ValueError, match=r"known are 'log:'") as caught:
        open_backend(url, tmp_path)
    check_error(caught.value, url)
