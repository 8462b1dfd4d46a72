"""Settings come from four layers, and every misspelt or mistyped one is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from configs.checks import MASK, check_settings
from configs.choices import SettingsError
from configs.load import load_settings, to_yaml
from configs.schema import Settings

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write ``mine.yaml`` in the working directory and return its relative path."""
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("mine.yaml").write_text(text, encoding="utf-8")
        return Path("mine.yaml")

    return write


def problem(*, files=(), overrides=(), env=None):
    with pytest.raises(SettingsError) as caught:
        load_settings(files, overrides, env or {})
    return str(caught.value)


def test_later_layers_override_earlier_ones(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\nengine: {max_batch: 2, max_queue: 2, page_size: 2}\n")
    second.write_text("engine: {max_batch: 3, max_queue: 3}\nserver:\n")
    env = {"SLIPSTREAM_ENGINE__MAX_BATCH": "4", "HOME": "/nowhere"}

    settings = load_settings([first, second], ["policy.explore=0.1"], env)

    assert (settings.seed, settings.engine.page_size) == (1, 2)
    assert (settings.engine.max_queue, settings.engine.max_batch) == (3, 4)
    assert load_settings([first], ["engine.max_batch=5"], env).engine.max_batch == 5
    assert settings.trainer == Settings().trainer


def test_without_any_source_the_defaults_hold():
    assert load_settings([], [], {}).engine == Settings().engine


def test_an_empty_file_sets_nothing(mine):
    assert load_settings([mine("# nothing\n")], [], {}).policy == Settings().policy


def test_an_unknown_key_names_file_key_and_nearest_known_key(mine):
    text = problem(files=[mine("engine: {max_batc: 3}\n")])
    assert text == "mine.yaml: unknown key 'engine.max_batc'; did you mean 'engine.max_batch'?"


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("max_batch", "did you mean 'engine.max_batch'?"),
        ("drafter.maxdraft", "did you mean 'drafter.max_draft'?"),
        ("drafter.sufix.enabled", "did you mean 'drafter.suffix.enabled'?"),
        ("qqqq", "--print-config lists the known ones"),
    ],
)
def test_an_unknown_override_names_the_flag_and_the_nearest_key(key, answer):
    assert problem(overrides=[f"{key}=1"]) == f"--set: unknown key '{key}'; {answer}"


@pytest.mark.parametrize("key", ["buffer.uri", "buffr.url", "url"])
def test_an_unknown_override_is_named_as_it_was_given(key):
    """``log:`` would be a mapping in YAML, and its key part of the name."""
    with pytest.raises(SettingsError, match=rf"^--set: unknown key '{key}'; .*'buffer\.url'"):
        load_settings([], [f"{key}=log:"], {})


def test_an_unknown_environment_variable_is_named():
    assert problem(env={"SLIPSTREAM_ENGINE__MAX_BACH": "1"}) == (
        "SLIPSTREAM_ENGINE__MAX_BACH: unknown key 'engine.max_bach'; "
        "did you mean 'engine.max_batch'?"
    )


def test_several_problems_are_several_lines(mine):
    text = problem(
        files=[mine("engine: {max_batch: x}\n")],
        overrides=["trainer.optimizer=best"],
        env={"SLIPSTREAM_SEED": "1.5"},
    )
    assert sorted(text.splitlines()) == [
        "--set: 'trainer.optimizer' must be one of 'adamw', 'muon', got str ('best')",
        "SLIPSTREAM_SEED: 'seed' must be int, got float (1.5)",
        "mine.yaml: 'engine.max_batch' must be int, got str ('x')",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine=3", "'engine' must be a section (key: value lines), got int (3)"),
        ("engine.max_batch=true", "'engine.max_batch' must be int, got bool (True)"),
        (
            "engine.max_batch=0",
            "'engine.max_batch' must be greater than or equal to 1, got int (0)",
        ),
        ("engine.num_pages=[1]", "'engine.num_pages' must be int or None, got list ([1])"),
        (
            "drafter.layer_ids=[1, x]",
            "'drafter.layer_ids' must be a list of int or None, got list ([1, 'x'])",
        ),
        ("trainer.lr=.nan", "'trainer.lr' must be finite, got nan"),
        ("trainer.lr='1'", "'trainer.lr' must be float, got str ('1')"),
    ],
)
def test_a_wrong_value_is_reported_with_what_was_expected(override, said):
    assert problem(overrides=[override]) == f"--set: {said}"


@pytest.mark.parametrize(
    ("override", "value"),
    [("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1E2", 100.0), ("2", 2.0), (".5", 0.5)],
)
def test_numbers_may_be_written_in_any_usual_form(override, value):
    assert load_settings([], [f"trainer.lr={override}"], {}).trainer.lr == value


def test_overrides_are_yaml():
    settings = load_settings(
        [],
        ["capture.enabled=false", "trainer.max_steps=null", "drafter.layer_ids=[2, 4, 6]"],
        {},
    )
    assert settings.capture.enabled is False
    assert settings.trainer.max_steps is None
    assert settings.drafter.layer_ids == (2, 4, 6)


def test_a_text_setting_keeps_its_text():
    env = {"SLIPSTREAM_SERVER__API_KEY": "0123 #: *x"}
    assert load_settings([], [], env).server.api_key == "0123 #: *x"
    assert load_settings([], ["server.api_key="], env).server.api_key is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "mine.yaml, line 2: key 'seed' appears twice"),
        ("trainer: &a {lr: {x: *a}}\n", "mine.yaml: a value contains itself"),
        (f"seed: {'[' * 3000}{']' * 3000}\n", "mine.yaml: nested too deep"),
        ("seed: !!int x\n", "mine.yaml: a value is not of the type that its tag says"),
        ("engine:\n  max_batch: 1\n  max_batch: 1\n", "mine.yaml, line 3: key 'max_batch' appears"),
        ("- 1\n", "mine.yaml: must be key: value lines, got list"),
        ("engine: [\n", "mine.yaml, line 2: "),
        ("target: !!python/object:os.system x\n", "mine.yaml, line 1: could not determine"),
        ("? [a]\n: 1\n", "mine.yaml, line 1: found unhashable key"),
    ],
)
def test_an_invalid_file_is_reported_with_its_line(mine, text, said):
    assert problem(files=[mine(text)]).startswith(said)


def test_a_missing_file_is_named(tmp_path):
    assert problem(files=[tmp_path / "no.yaml"]) == f"{tmp_path / 'no.yaml'}: no such file"


def test_a_bare_name_is_a_shipped_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_settings([Path("demo")], [], {}) == load_settings([DEMO], [], {})
    assert problem(files=[Path("dmeo")]) == (
        "dmeo: no such file; shipped settings: compare, demo, one_gpu, real, two_gpu"
    )


def test_a_path_that_ends_like_a_shipped_name_is_still_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/demo").write_text("seed: 5\n")
    assert load_settings([Path("folder/demo")], [], {}).seed == 5


def test_dotted_keys_in_a_file_equal_nested_ones(mine):
    file = mine("engine.max_batch: 3\nengine: {max_queue: 4}\n")
    engine = load_settings([file], [], {}).engine
    assert (engine.max_batch, engine.max_queue) == (3, 4)


def test_every_key_of_an_unknown_section_is_named(mine):
    assert problem(files=[mine("enigne: {max_batch: 1, nope: {qqqq: 2}}\n")]).splitlines() == [
        "mine.yaml: unknown key 'enigne.max_batch'; did you mean 'engine.max_batch'?",
        "mine.yaml: unknown key 'enigne.nope.qqqq'; --print-config lists the known ones",
    ]


def test_an_error_is_reported_even_if_a_later_layer_overrides_it(mine):
    text = problem(files=[mine("seed: x\n")], overrides=["seed=1"])
    assert text == "mine.yaml: 'seed' must be int, got str ('x')"


def test_an_override_without_a_value_is_refused_with_an_example():
    assert "expected KEY=VALUE" in problem(overrides=["engine.max_batch"])


def test_an_open_address_needs_a_key():
    text = problem(overrides=["server.host=0.0.0.0"])
    assert text.startswith("server.host '0.0.0.0' is not loopback and server.api_key is not set")
    load_settings([], ["server.host=0.0.0.0", "server.api_key=k"], {})
    for host in ("127.0.0.2", "::1", "localhost"):
        assert check_settings(load_settings([], [f"server.host={host}"], {})) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("policy.kind=fixed", "drafter.max_draft=3"), "policy.draft_k 4 is above"),
        (("policy.kind=fixed", "drafter.kind=suffix"), "policy.drafter 'eagle3' is not loaded"),
        (("policy.kind=fixed", "drafter.kind=mine"), "policy.drafter 'eagle3' is not loaded"),
        (
            ("policy.kind=fixed", "policy.drafter=suffix", "drafter.suffix.enabled=false"),
            "policy.drafter 'suffix' needs",
        ),
        (("drafter.kind=suffix", "drafter.suffix.enabled=false"), "drafter.kind 'suffix' needs"),
        (("drafter.kind=none", "drafter.former=true"), "drafter.former keeps the version"),
        (
            ("drafter.former=true", "drafter.suffix.mixed=true", "drafter.suffix.place=device"),
            "drafter.former needs rounds of the drafter alone",
        ),
        (("drafter.kind=suffix", "drafter.suffix.mixed=true"), "drafter.suffix.mixed needs the"),
        (
            ("drafter.suffix.mixed=true", "drafter.suffix.enabled=false"),
            "drafter.suffix.mixed needs the index beside a neural drafter",
        ),
        (("drafter.suffix.min_match=13",), "drafter.suffix.min_match 13 is above"),
        (
            ("drafter.kind=none", "drafter.beside=[{kind: mtp}]"),
            "drafter.beside names 'mtp', but drafter.kind is 'none'",
        ),
        (
            ("drafter.beside=[{kind: mtp}, {kind: eagle3}]",),
            "drafter.beside names 'eagle3', which is a drafter of this server already",
        ),
        (
            ("drafter.beside=[{kind: mtp, model: x}]",),
            "drafter.beside sets model for kind 'mtp'",
        ),
        (("drafter.beside=[{kind: mtp, kinds: x}]",), "--set: unknown key"),
        (
            ("engine.num_pages=100", "engine.max_model_len=2048"),
            "engine.num_pages 100 of engine.page_size 16",
        ),
        (("buffer.max_bytes=8192",), "buffer.max_bytes 8192 holds less than two segments"),
        ((f"server.api_key={MASK}",), "server.api_key is the mask"),
        (
            ("policy.table.lengths=[[8, 3], [1, 5], [8, 1]]",),
            "policy.table.lengths has two entries for batch 8",
        ),
        (
            ("policy.ema_tiers.tiers=[[1, [0, 3]], [1, [1]]]",),
            "policy.ema_tiers.tiers has two entries for batch 1",
        ),
        (
            ("policy.ema_tiers.tiers=[[1, [1, 3]], [4, [3, 1]]]",),
            "policy.ema_tiers.tiers: K for batch 4 must rise, got 3, 1",
        ),
    ],
)
def test_contradictions_between_keys_are_reported(overrides, said):
    assert problem(overrides=overrides).startswith(said)


@pytest.mark.parametrize("user", ["me", ""])
def test_the_password_of_a_url_is_never_printed(user):
    url = f"redis://{user}:hunter2@host:6379/0?run=x"
    printed = to_yaml(load_settings([], [f"buffer.url={url}"], {}))
    assert "url: redis://********@host:6379/0?run=x" in printed
    with pytest.raises(SettingsError, match=r"buffer\.url has the mask"):
        load_settings([], [f"buffer.url=redis://{user}:********@host"], {})


@pytest.mark.parametrize("key", ["run_dir", "target", "device", "server.host"])
@pytest.mark.parametrize("value", ["", " "])
def test_a_variable_of_the_shell_that_is_not_set_stands_for_no_folder(key, value):
    kind = "a path" if key == "run_dir" else "str"
    said = f"{key!r} must be {kind}, got nothing; leave it out for the default"
    assert problem(overrides=[f"{key}={value}"]) == f"--set: {said}"
    name = f"SLIPSTREAM_{key.upper().replace('.', '__')}"
    assert problem(env={name: value}) == f"{name}: {said}"


def test_an_empty_path_in_a_file_is_an_error_and_the_current_folder_is_none(mine):
    said = "mine.yaml: 'target_cache' must be a path or None, got nothing"
    assert problem(files=[mine("target_cache: ''\n")]).startswith(said)
    assert load_settings([], ["target_cache="], {}).target_cache is None
    assert load_settings([], ["run_dir=."], {}).run_dir == Path()


def test_a_policy_may_name_a_drafter_beside_the_main_one():
    keys = ["policy.kind=fixed", "policy.drafter=mtp", "drafter.beside=[{kind: mtp}]"]
    assert load_settings([], keys, {}).drafter.beside[0].kind == "mtp"


def test_a_secret_is_never_printed(mine):
    assert "hunter2" not in to_yaml(load_settings([], ["server.api_key=hunter2"], {}))
    assert "12345" not in problem(files=[mine("server: {api_key: 12345}\n")])


def test_printed_settings_can_be_read_back(mine):
    settings = load_settings([], ["trainer.lr=1e-5", "drafter.layer_ids=[1, 2, 3]"], {})
    assert load_settings([mine(to_yaml(settings))], [], {}) == settings


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_loads_and_changes_the_defaults(path):
    settings = load_settings([path], [], {})
    assert yaml.safe_load(path.read_text()) is not None
    assert settings != load_settings([], [], {})


def test_the_demo_file_is_shipped():
    assert {path.name for path in SHIPPED} >= {"demo.yaml", "one_gpu.yaml", "real.yaml"}


def test_a_bundled_path_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load_settings([], ["target=configs", "drafter.path=configs"], {})
    assert settings.target == str(Path(__file__).parents[2] / "configs")
    assert settings.drafter.path == Path(settings.target)

    (tmp_path / "configs").mkdir()
    assert load_settings([], ["target=configs"], {}).target == "configs"
    assert load_settings([], ["target=ORG/no-such"], {}).target == "ORG/no-such"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2", "must be less than or equal to 1, got int (2)"),
        ("fast", "must be float or one of 'auto', got str ('fast')"),
    ],
)
def test_a_value_of_one_of_two_types_is_told_its_limit_alone(value, said):
    with pytest.raises(SettingsError) as caught:
        load_settings([], [f"trainer.duty={value}"], {})
    assert str(caught.value) == f"--set: 'trainer.duty' {said}"
