"""An engine over a target that is in memory already."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.schema import Settings
from oracles.engines import request_of, run
from serving.build import build_service, load_target, ring_rows
from serving.engine.drafter_rows import BLOCK


def settings_for(target, run_dir):
    return Settings.model_validate(
        {
            "target": str(target),
            "run_dir": run_dir,
            "device": "cpu",
            "engine": {"max_batch": 2, "max_model_len": 100, "page_size": 4},
            "drafter": {"max_draft": 2},
            "policy": {"kind": "fixed", "draft_k": 2},
        }
    )


def test_a_target_in_memory_serves_as_the_one_of_the_folder(tiny_target_dir, tmp_path):
    named = settings_for(tiny_target_dir, tmp_path / "named")
    loaded = replace(load_target(named), name="in-memory", fingerprint="ab" * 32)

    services = [
        build_service(named),
        build_service(settings_for(tmp_path / "nowhere", tmp_path / "own"), loaded),
    ]

    requests = [request_of("0", [40, 41, 42], 20)]
    answers = [run(service.engine, requests)["0"].token_ids for service in services]
    assert answers[0] == answers[1] and len(answers[0]) == 20
    assert services[0].model.model_name == tiny_target_dir.name
    assert services[1].model.model_name == "in-memory"
    assert services[1].model.vocab_size == loaded.model.config.vocab_size


@pytest.mark.parametrize(
    ("policy", "is_mixed"),
    [({"kind": "goodput"}, True), ({"kind": "fixed", "drafter": "suffix", "draft_k": 2}, False)],
)
def test_an_index_on_the_device_serves(tiny_target_dir, tmp_path, policy, is_mixed):
    raw = settings_for(tiny_target_dir, tmp_path).model_dump(mode="json")
    raw["policy"] = policy
    raw["drafter"]["suffix"] = {"place": "device", "mixed": is_mixed}
    raw["drafter"]["on_request"] = ["suffix_request"]
    service = build_service(Settings.model_validate(raw))

    drafting = service.engine.drafting
    assert not drafting.hosts and set(drafting.texts) == {"suffix", "suffix_request"}
    assert set(drafting.on_device) == {
        "eagle3", "suffix", "suffix_request", *(["eagle3+suffix"] if is_mixed else [])
    }  # fmt: skip
    requests = [request_of(str(n), [40, 41, 42], 60, capture=True) for n in range(4)]
    answers = run(service.engine, requests)
    assert len({tuple(one.token_ids) for one in answers.values()}) == 1
    if not is_mixed:  # what goodput decides depends on how long steps take
        assert service.engine.figures().drafters["suffix"].accepted > 0


def _loop(path):
    path.symlink_to(path.name)


def _junk(path):
    path.parent.mkdir(parents=True)
    path.write_text("junk")


@pytest.mark.parametrize(
    ("place", "damage", "said"),
    [
        (".", _loop, "Too many levels of symbolic links"),
        ("traces", _loop, "Too many levels of symbolic links"),
        ("traces/KEYCHECK", lambda path: path.mkdir(parents=True), "it is a folder"),
        ("weights/7", lambda path: path.mkdir(parents=True), "no version in"),
        ("weights/HIGHEST", _junk, "HIGHEST must hold"),
        ("weights/EPOCH", _junk, "EPOCH must hold"),
        ("weights/DENIED.json", _junk, "DENIED.json must be a list"),
    ],
)
def test_whatever_lies_in_the_run_folder_the_server_answers(
    tiny_target_dir, tmp_path, caplog, place, damage, said
):
    run_dir = tmp_path / "run"
    if place != ".":
        run_dir.mkdir()
    damage(run_dir / place)
    service = build_service(settings_for(tiny_target_dir, run_dir))
    assert said in caplog.text
    assert len(run(service.engine, [request_of("0", [40, 41, 42], 4)])["0"].token_ids) == 4
    service.start()
    service.stop()
    if place == "weights/DENIED.json":
        assert (run_dir / place).read_text() == "junk"  # what it said may yet be found out


def test_a_name_that_no_disk_takes_stops_no_server(tiny_target_dir, tmp_path, caplog):
    service = build_service(settings_for(tiny_target_dir, tmp_path / ("x" * 300)))
    assert "File name too long" in caplog.text
    assert len(run(service.engine, [request_of("0", [40, 41, 42], 4)])["0"].token_ids) == 4


GIB = 1 << 30


@pytest.mark.parametrize(
    ("settings", "memory_bytes", "rows"),
    [
        # a long answer for each request that decodes
        ({"engine": {"max_batch": 128, "max_model_len": 4096}}, 128 * GIB, 128 * 2048),
        ({"engine": {"max_batch": 64, "max_model_len": 1024}}, 128 * GIB, 64 * 1024),
        # a sixteenth of 16 GiB, rows of 2,304 values in two bytes or one
        ({"engine": {"max_batch": 512, "max_model_len": 4096}}, 16 * GIB, GIB // 4608),
        (
            {
                "engine": {"max_batch": 512, "max_model_len": 4096},
                "capture": {"dtype": "float8_e4m3fn"},
            },
            16 * GIB,
            GIB // 2304,
        ),
        # what the settings say, and never less than two steps may append
        ({"capture": {"ring_rows": 50_000}}, GIB, 50_000),
        ({"capture": {"ring_rows": 1}}, GIB, 2 * (256 + BLOCK * 16 + 2 * 16 * 9)),
    ],
)
def test_the_capture_ring_follows_batch_and_memory(settings, memory_bytes, rows):
    assert ring_rows(Settings.model_validate(settings), 2304, memory_bytes) == rows
