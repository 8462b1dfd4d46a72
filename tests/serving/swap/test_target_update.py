"""The target's weights are replaced in a running service: whole, between two steps, and never by
wrong ones."""

from __future__ import annotations

import asyncio
import shutil
import threading
from dataclasses import replace

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from buffer.backends import open_backend
from buffer.fingerprint import target_fingerprint
from buffer.folder_weights import FolderWeights
from buffer.run_target import read_run_target
from buffer.traces import TraceReader
from configs.schema import Settings
from oracles.border import across_the_border
from oracles.engines import Collected, request_of
from oracles.support import save_tiny_target
from serving.border.in_process import InProcess
from serving.build import build_service
from serving.http.app import create_app
from tests.serving.engine.test_target_update import by_the_book
from tests.serving.swap.test_swaps import ask, publish_next, settings_for, wait_until

PROMPT = [40, 41, 42, 43]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Other weights of the tiny target."""
    return save_tiny_target(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def service(tiny_target_dir, tmp_path):
    service = build_service(settings_for(tiny_target_dir, tmp_path))
    service.start()
    yield service
    service.stop()


def reference(folder, prompt, max_tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False,
                         eos_token_id=None)  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_requests_begun_after_an_update_are_answered_as_by_a_fresh_server(
    service, tiny_target_dir, other, tmp_path
):
    wanted = [reference(folder, PROMPT, 30) for folder in (tiny_target_dir, other)]
    assert wanted[0] != wanted[1]
    before = ask(service, "before", ignore_eos=True)
    first = service.target.status()

    result = service.target.update(other)
    after = ask(service, "after", ignore_eos=True)
    back = service.target.update(tiny_target_dir)
    again = ask(service, "again", ignore_eos=True)

    assert [before.token_ids, after.token_ids, again.token_ids] == [*wanted, wanted[0]]
    assert [x.last.stats.target_version for x in (before, after, again)] == [0, 1, 2]
    assert after.last.stats.target_switches == ()
    assert first["fingerprint"] == target_fingerprint(tiny_target_dir) == back["fingerprint"]
    assert (result["changed"], result["version"], result["folder"]) == (True, 1, str(other))
    assert result["fingerprint"] == target_fingerprint(other)
    assert len(back["history"]) == 2
    figures = service.figures()
    assert figures.target_version == 2
    assert figures.target_updates == {"updated": 2, "unchanged": 0, "refused": 0}
    assert figures.num_draft_tokens > 0
    noted = read_run_target(tmp_path)
    assert noted.fingerprint == back["fingerprint"]
    assert noted.former == (result["fingerprint"],)


def test_an_answer_in_flight_goes_on_under_the_new_weights(service, tiny_target_dir, other):
    request = request_of("long", PROMPT, 70, ignore_eos=True)
    collected, has_begun, has_ended = Collected(), threading.Event(), threading.Event()

    def take(output):
        collected.take(output)
        has_begun.set()
        if output.finish_reason:
            has_ended.set()

    service.inbox.submit(request, take)
    assert has_begun.wait(60)
    service.target.update(other)
    assert has_ended.wait(60)

    stats = collected.last.stats
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tiny_target_dir, other)
    ]
    # On a fast machine it may have ended before the new weights were read.
    assert len(stats.target_switches) == stats.target_version
    assert collected.token_ids == by_the_book(
        models, request, stats.target_switches, stats.target_version
    )
    assert service.target.status()["untraced"] == len(stats.target_switches)


def test_traces_are_told_apart_by_the_weights_that_answered(service, other, tmp_path):
    ask(service, "one")
    fingerprints = [service.target.status()["fingerprint"]]
    fingerprints.append(service.target.update(other)["fingerprint"])
    ask(service, "two")
    service.stop()

    traces = TraceReader(open_backend("log:", tmp_path)).read(10)
    assert {t.request_id: t.target_fingerprint for t in traces} == dict(
        zip(("one", "two"), fingerprints, strict=True)
    )


@pytest.fixture
def damaged(other, tmp_path):
    """The other weights with one NaN."""
    folder = tmp_path / "damaged"
    shutil.copytree(other, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_wrong_weights_are_refused_and_the_old_ones_go_on(service, damaged):
    want = ask(service, "before").token_ids

    with pytest.raises(ValueError, match=r"down_proj.weight holds NaN.*weights in force go on"):
        service.target.update(damaged)

    status = service.target.status()
    assert status["version"] == 0
    assert "model.layers.1.mlp.down_proj.weight holds NaN" in status["last_error"]
    assert service.figures().target_updates["refused"] == 1
    assert ask(service, "after").token_ids == want


def test_the_same_weights_again_change_nothing(service, tiny_target_dir):
    ask(service, "warm", prompt=list(range(40, 60)))
    result = service.target.update(tiny_target_dir)
    assert (result["changed"], result["version"]) == (False, 0)
    # Not even the prefix cache.
    assert ask(service, "same", prompt=list(range(40, 60))).last.num_cached_tokens > 0


def test_of_two_updates_at_once_one_is_refused(tiny_target_dir, other, tmp_path):
    """The first waits for an engine that does not run yet."""
    service = build_service(settings_for(tiny_target_dir, tmp_path))
    results = []
    first = threading.Thread(target=lambda: results.append(service.target.update(other)))
    first.start()
    wait_until(lambda: service.target._orders)

    with pytest.raises(ValueError, match="another update of the target is under way"):
        service.target.update(tiny_target_dir)

    service.start()
    first.join(60)
    service.stop()
    assert results[0]["version"] == 1
    assert service.target.counts() == {"updated": 1, "unchanged": 0, "refused": 1}


def test_many_updates_from_many_sides_leave_whole_weights(service, tiny_target_dir, other):
    folders = [tiny_target_dir, other]
    wanted = {target_fingerprint(f): reference(f, PROMPT, 20) for f in folders}
    outcomes = []

    def send(first):
        for turn in range(4):
            try:
                outcomes.append(service.target.update(folders[(first + turn) % 2])["changed"])
            except ValueError as error:
                assert "another update" in str(error)
                outcomes.append(None)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ask(service, f"during {len(outcomes)} {threading.active_count()} {id(object())}", 5)
    for thread in threads:
        thread.join()

    assert len(outcomes) == 12 and outcomes.count(True) == service.target.version
    in_force = service.target.status()["fingerprint"]
    assert ask(service, "last", 20, ignore_eos=True).token_ids == wanted[in_force]


def test_versions_for_the_new_weights_are_taken_and_others_refused(
    service, tiny_target_dir, other, tmp_path
):
    root = tmp_path / "weights"
    fingerprint = service.target.update(other)["fingerprint"]
    publish_next(root)
    wait_until(lambda: service.figures().swaps["rejected"] == 1)
    assert f"this server runs {fingerprint[:12]}" in service.drafter_status()["last_error"]

    publish_next(root, target_fingerprint=fingerprint)
    wait_until(lambda: service.drafter_status()["version"] == 2)
    events = [entry["event"] for entry in service.drafter_status()["history"]]
    assert events == ["the target's weights were replaced", "swapped"]


def test_a_server_that_starts_with_the_new_weights_goes_on_with_the_runs_drafter(
    service, other, tmp_path
):
    fingerprint = service.target.update(other)["fingerprint"]
    service.stop()
    assert FolderWeights(tmp_path / "weights").read(0).manifest.target_fingerprint != fingerprint

    again = build_service(settings_for(other, tmp_path))

    assert again.drafter_status()["version"] == 0
    assert again.target.status()["fingerprint"] == fingerprint


def test_a_server_that_starts_with_former_weights_says_so_to_the_trainer(
    service, tiny_target_dir, other, tmp_path
):
    first = service.target.status()["fingerprint"]
    second = service.target.update(other)["fingerprint"]
    service.stop()
    assert read_run_target(tmp_path).fingerprint == second

    again = build_service(settings_for(tiny_target_dir, tmp_path))
    again.start()
    again.stop()

    assert read_run_target(tmp_path) == replace(
        read_run_target(tmp_path), fingerprint=first, former=(second,)
    )


async def routes(server, steps):
    app = create_app(server, Settings())
    transport = httpx.ASGITransport(app=app)
    client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60)
    async with app.router.lifespan_context(app), client:
        return await steps(client)


@pytest.mark.parametrize("crosses", [False, True])
def test_the_route_says_what_became_of_an_update(service, other, damaged, tiny_target_dir, crosses):
    async def steps(client):
        url = "/admin/target/update"
        good = await client.post(url, json={"path": str(other)})
        answer = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3})
        bad = await client.post(url, json={"path": str(damaged)})
        none = [await client.post(url, json=body) for body in ({}, {"path": ""}, {"pth": "x"})]
        return good, answer, bad, none, await client.get("/admin/target")

    async def scenario():
        if not crosses:
            return await routes(InProcess(service), steps)
        async with across_the_border(service) as server:
            return await routes(server, steps)

    good, answer, bad, none, status = asyncio.run(scenario())
    assert (good.status_code, good.json()["version"]) == (200, 1)
    assert good.json()["fingerprint"] == target_fingerprint(other)
    assert answer.json()["speculation"]["target_version"] == 1
    assert "target_switches" not in answer.json()["speculation"]
    assert (bad.status_code, bad.json()["error"]["code"]) == (409, "target_update_refused")
    assert "down_proj.weight holds NaN" in bad.json()["error"]["message"]
    assert [one.status_code for one in none] == [400, 400, 400]
    assert status.json()["version"] == 1
    assert "holds NaN" in status.json()["last_error"]
