"""What a service does to its process while it runs."""

from __future__ import annotations

import gc
import weakref

from configs.schema import Settings
from serving.build import build_service


def service_of(target, run_dir):
    settings = {"target": str(target), "run_dir": run_dir, "device": "cpu"}
    return build_service(Settings.model_validate({**settings, "engine": {"max_model_len": 64}}))


def is_tracked(wanted) -> bool:
    return any(found is wanted for found in gc.get_objects())


def test_a_full_collection_does_not_look_at_the_engine_while_it_serves(tiny_target_dir, tmp_path):
    before = gc.get_threshold()
    service = service_of(tiny_target_dir, tmp_path)
    assert is_tracked(service.engine)

    service.start()
    try:
        assert gc.get_threshold() == (*before[:2], 1000)
        assert not is_tracked(service.engine)
        assert len(gc.get_objects()) < gc.get_freeze_count() / 100
    finally:
        service.stop()
    assert gc.get_threshold() == before


def test_a_service_that_ended_can_be_freed(tiny_target_dir, tmp_path):
    service = service_of(tiny_target_dir, tmp_path)
    service.start()
    service.stop()
    gone = weakref.ref(service.engine)

    assert gc.get_freeze_count() == 0
    del service
    gc.collect()
    assert gone() is None
