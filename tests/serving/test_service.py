"""What a service does to its process while it runs."""

from __future__ import annotations

import gc
import weakref

from buffer.load import LoadReader
from configs.schema import Settings
from oracles.engines import request_of, run
from serving.build import build_service


def service_of(target, run_dir):
    settings = {"target": str(target), "run_dir": run_dir, "device": "cpu"}
    return build_service(Settings.model_validate({**settings, "engine": {"max_model_len": 64}}))


def is_tracked(wanted) -> bool:
    return any(found is wanted for found in gc.get_objects())


def test_a_full_collection_does_not_look_at_the_engine_while_it_serves(
    tiny_target_dir, tmp_path, real_collector
):
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


def test_a_service_that_ended_can_be_freed(tiny_target_dir, tmp_path, real_collector):
    service = service_of(tiny_target_dir, tmp_path)
    service.start()
    service.stop()
    gone = weakref.ref(service.engine)

    assert gc.get_freeze_count() == 0
    del service
    gc.collect()
    assert gone() is None


def test_a_trainer_of_the_run_sees_the_load_while_the_service_lives(tiny_target_dir, tmp_path):
    service = service_of(tiny_target_dir, tmp_path)
    seen = []

    def between(engine, step):
        seen.append(LoadReader(tmp_path).read())

    run(service.engine, [request_of("a", [5, 6, 7], 8), request_of("b", [5, 6, 8], 12)], between)
    last = LoadReader(tmp_path).read()

    assert last is not None and last.running == 0
    assert last.tokens == service.figures().generation_tokens == 20
    assert last.passes == len(seen)
    during = [load for load in seen if load is not None]
    assert max(load.running for load in during) == 2
    assert 0 < during[1].busy_s < last.busy_s
    service.stop()
    assert LoadReader(tmp_path).read() is None
