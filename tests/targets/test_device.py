"""The device of a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from configs.choices import SettingsError
from targets.device import pick_device


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu", "trainer.device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("cpu:0", "trainer.device must be auto"),
        ("cuda:x", "trainer.device must be auto"),
        ("cuda:00001", "trainer.device must be auto"),
        ("cuda:999", "trainer.device is 'cuda:999', but"),
    ],
)
def test_a_device_that_is_not_there_is_a_wrong_setting(name, said):
    with pytest.raises(SettingsError, match=f"^{said}"):
        pick_device(name, setting="trainer.device")


def test_a_cpu_is_always_there():
    assert pick_device("cpu") == torch.device("cpu")


def test_a_further_process_of_a_cpu_has_the_same_device():
    assert pick_device("cpu", further=3) == torch.device("cpu")


CONFINED = """
import os, threading, torch
from configs.choices import SettingsError
from targets.device import pick_device
last = torch.cuda.device_count() - 1
uuid = torch.cuda._raw_device_uuid_nvml()[last]
for _ in range(2):
    assert pick_device(f"cuda:{last}") == torch.device("cuda")
found = []
def look():
    found.append(str(torch.cuda.get_device_properties(torch.zeros(1, device="cuda").device).uuid))
thread = threading.Thread(target=look)
thread.start()
thread.join()
assert uuid.endswith(found[0]), (uuid, found)
try:
    pick_device(f"cuda:{last + 1}")
except SettingsError as error:
    assert "device is 'cuda:" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.gpu
def test_every_thread_of_a_process_uses_its_gpu():
    """On a machine with one GPU that is the first one, which no process is confined to."""
    # The driver counts all GPUs, whatever this process may see of them.
    all_of_them = {name: x for name, x in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    subprocess.run([sys.executable, "-c", CONFINED], env=all_of_them, check=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_process_that_uses_one_gpu_does_not_change_to_another():
    script = """
import torch
from configs.choices import SettingsError
from targets.device import pick_device
torch.zeros(1, device="cuda")
try:
    pick_device("cuda:1")
except SettingsError as error:
    assert "uses other GPUs already" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)
