"""An engine over a target that is in memory already."""

from __future__ import annotations

from dataclasses import replace

from configs.schema import Settings
from oracles.engines import request_of, run
from serving.build import build_service, load_target


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
