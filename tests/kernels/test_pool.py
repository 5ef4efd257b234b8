import os
import re
import subprocess
import sys
import threading

import pytest

from hmoe_jax.kernels import _native
from hmoe_jax.kernels import pool as pool_module
from hmoe_jax.kernels.pool import ThreadPool, available_isas, cpu_name, resolve_num_threads


def test_auto_is_one_thread_per_allowed_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(pool_module, "CPU_MAX", tmp_path / "absent")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8})
    assert resolve_num_threads("auto") == 3


@pytest.mark.parametrize(("quota", "expected"), [("max 100000", 3), ("200000 100000", 2), ("50000 100000", 1)])
def test_auto_respects_a_cgroup_quota(monkeypatch, tmp_path, quota, expected):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(pool_module, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8})
    assert resolve_num_threads("auto") == expected


@pytest.mark.parametrize("wrong", [0, -1, 4])
def test_numbers_outside_the_allowed_cpus_are_refused(monkeypatch, wrong):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8})
    with pytest.raises(ValueError, match=f"expected 1 <= num_threads <= 3, the CPUs of this process, got {wrong}"):
        resolve_num_threads(wrong)


@pytest.mark.parametrize("wrong", ["two", "2", True])
def test_what_is_not_a_number_is_refused(wrong):
    with pytest.raises(ValueError, match="num_threads: expected 'auto' or a positive integer, got"):
        resolve_num_threads(wrong)


def test_the_best_isa_is_chosen_and_every_offered_one_can_be_forced():
    with ThreadPool(1) as pool:
        assert pool.isa == available_isas()[0]
    for isa in available_isas():
        with ThreadPool(1, isa=isa) as pool:
            assert pool.isa == isa


def test_an_unavailable_isa_is_refused_with_those_that_are():
    for isa in set(_native.all_isa_names()) - set(available_isas()):
        with pytest.raises(ValueError, match=f"isa '{isa}' is not available on this machine, which offers .*scalar"):
            ThreadPool(1, isa=isa)
    with pytest.raises(ValueError, match="isa 'mmx' is unknown: expected auto, amx, avx512_bf16, avx512, avx2, scalar"):
        ThreadPool(1, isa="mmx")


def test_a_closed_pool_says_so():
    pool = ThreadPool(1)
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match=f"thread pool {pool.id} is closed"):
        _ = pool.num_threads


def test_two_threads_may_close_a_pool_at_once():
    for _ in range(50):
        pool, start = ThreadPool(1), threading.Barrier(2)

        def close(pool: ThreadPool = pool, start: threading.Barrier = start) -> None:
            start.wait()
            pool.close()

        closers = [threading.Thread(target=close) for _ in range(2)]
        for closer in closers:
            closer.start()
        for closer in closers:
            closer.join()


# Memory for the stacks of a few threads, not of 63.
TOO_FEW_THREADS = """
import os, re, resource
from hmoe_jax.kernels import _native

num_threads = lambda: len(os.listdir("/proc/self/task"))
before = num_threads()
size = int(re.search(r"VmSize:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (40 << 20), resource.RLIM_INFINITY))
try:
    _native.ThreadPool(64, "scalar")
except ValueError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert num_threads() == before, (num_threads(), before)
_native.ThreadPool(64, "scalar").close()
"""


def test_threads_that_do_not_start_are_an_error_and_leave_none_behind():
    child = subprocess.run([sys.executable, "-c", TOO_FEW_THREADS], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    sentence = r"num_threads: 64 need 63 threads beside the caller, \d+ started: Resource temporarily unavailable\n"
    assert re.fullmatch(sentence, child.stdout)


def test_read_bandwidth_is_a_positive_number(pool):
    assert pool.read_gbps(megabytes=8) > 0
    with pytest.raises(ValueError, match="megabytes: expected a positive number, got 0"):
        pool.read_gbps(megabytes=0)


def test_the_processor_has_a_name():
    assert cpu_name()
