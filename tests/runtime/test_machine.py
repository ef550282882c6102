from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.runtime import machine
from clipdistill.runtime.machine import cpu_count, free_memory, pick_device, wait_for

CPU = torch.device("cpu")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /proc (proc) and /sys/fs/cgroup (groups)."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "groups").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "groups")
    return tmp_path


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


def test_free_memory_is_the_kernels_figure(system: Path) -> None:
    assert free_memory(CPU) == free_memory() == 8000 * 1024
    group(system / "groups", memory_max="max\n", memory_current="1000000\n")
    assert free_memory(CPU) == 8000 * 1024


def test_free_memory_respects_the_control_group(system: Path) -> None:
    group(system / "groups", memory_max="5000000\n", memory_current="1000000\n")
    assert free_memory(CPU) == 4_000_000
    # what the disk's cache takes up is given back when it is needed
    group(system / "groups", memory_stat="anon 200000\ninactive_file 800000\n")
    assert free_memory(CPU) == 4_800_000


def test_the_tightest_of_the_groups_above_counts(system: Path) -> None:
    (system / "proc" / "self" / "cgroup").write_text("0::/batch/job7\n")
    group(system / "groups" / "batch", memory_max="3000000\n", memory_current="1000000\n", cpu_max="150000 100000\n")
    group(system / "groups" / "batch" / "job7", memory_max="2500000\n", memory_current="1000000\n")
    assert free_memory(CPU) == 1_500_000
    assert cpu_count() == min(2, len(os.sched_getaffinity(0)))


def test_control_groups_of_version_1(system: Path) -> None:
    (system / "proc" / "self" / "cgroup").write_text("5:memory:/docker/a\n3:cpu,cpuacct:/docker/a\n")
    folder = system / "groups" / "memory" / "docker" / "a"
    group(folder, memory_limit_in_bytes="4000000\n", memory_usage_in_bytes="1000000\n")
    group(system / "groups" / "cpu" / "docker" / "a", cpu_cfs_quota_us="100000\n", cpu_cfs_period_us="100000\n")
    assert free_memory(CPU) == 3_000_000
    assert cpu_count() == 1


def test_a_system_that_tells_nothing(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "proc" / "meminfo").unlink()
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert free_memory(CPU) is None
    assert cpu_count() == 1


def test_devices() -> None:
    assert pick_device("cpu") == pick_device(CPU) == CPU
    with pytest.raises(InputError, match="unknown device 'tpux'"):
        pick_device("tpux")
    with pytest.raises(InputError, match="cuda:99"):
        pick_device("cuda:99")
    if not torch.cuda.is_available():
        assert pick_device(None) == CPU
        with pytest.raises(InputError, match="leave the device out"):
            pick_device("cuda")


def test_apples_gpu_is_taken_where_there_is_one(monkeypatch) -> None:
    if not torch.backends.mps.is_available():
        with pytest.raises(InputError, match="no such Apple GPU is visible; leave the device out"):
            pick_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device(None) == pick_device("mps") == torch.device("mps")
    assert pick_device("cpu") == CPU
    with pytest.raises(InputError, match="no such Apple GPU"):
        pick_device("mps:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device(None).type == "cuda"


def test_memory_and_clocks_ask_apples_gpu(monkeypatch) -> None:
    waited = []
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 100)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 30)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    assert free_memory(torch.device("mps")) == 70
    wait_for(torch.device("mps"))
    wait_for(CPU)
    assert waited == ["mps"]


def test_autocast_and_precision_on_apples_gpu() -> None:
    from clipdistill.train.config import resolve
    from clipdistill.train.run import with_precision
    from clipdistill.train.step import autocast

    device = torch.device("mps")
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        entered = autocast(device, precision)
        assert (entered.device, entered.fast_dtype) == ("mps", dtype)
        with entered:
            assert torch.is_autocast_enabled("mps")
    config = resolve("clip", {"data": "scenes", "student": "scenes-student", "out": "x"})
    assert with_precision(config, device).train.precision == "fp32"  # bf16 where the matrix units have it


def test_the_package_lets_the_cpu_do_what_apples_gpu_cannot() -> None:
    import os

    import clipdistill  # noqa: F401

    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] in ("0", "1")


_BLOCKS = """
import resource, sys
import torch
from clipdistill.runtime.machine import keep_freed_memory, return_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def fill():
    before = faults()
    for _ in range(20):
        torch.ones(8 << 20)
    return faults() - before
fill()
again = fill()
return_freed_memory()
print(again, fill())
"""


@pytest.mark.sampled(2)
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("given", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}])
def test_freed_blocks_are_kept_for_the_next_unless_the_user_says_otherwise(given):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | given
    done = subprocess.run(
        [sys.executable, "-c", _BLOCKS], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    again, returned = (int(number) for number in done.stdout.split())
    pages = 8 << 20 >> 10  # of one block
    assert (again > 10 * pages) if given else (again < pages)
    assert returned > pages / 2
