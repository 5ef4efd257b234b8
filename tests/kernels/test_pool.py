import os
import re
import subprocess
import sys
import threading

import pytest

from hmoe_jax.kernels import _native
from hmoe_jax.kernels.pool import ThreadPool, available_isas, cpu_name, resolve_num_threads

# The kernel's files and cgroups are read by ffi/machine/topology and tested there, on made-up machines.
RESOLVE_ON_ONE_CPU = """
import os
from hmoe_jax.kernels.pool import resolve_num_threads

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(resolve_num_threads("auto"))
"""


def test_auto_stays_within_the_cpus_that_the_process_may_use():
    child = subprocess.run([sys.executable, "-c", RESOLVE_ON_ONE_CPU], capture_output=True, text=True, check=True)
    assert child.stdout == "1\n"


def test_auto_is_one_thread_per_core_of_the_topology():
    assert resolve_num_threads("auto", topology="0-1;5,7,9") == 5
    assert 1 <= resolve_num_threads("auto") <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize("wrong", [0, -1, 4])
def test_numbers_outside_the_cpus_are_refused(wrong):
    with pytest.raises(ValueError, match=f"expected 1 <= num_threads <= 3, the CPUs of this process, got {wrong}"):
        resolve_num_threads(wrong, topology="3,5,8")


@pytest.mark.parametrize(("num_threads", "num_nodes"), [(1, 1), (2, 2), (4, 2)])
def test_a_declared_topology_stands_in_for_a_larger_machine(num_threads, num_nodes):
    with ThreadPool(num_threads, topology="0-1;0-1") as pool:
        assert (pool.num_threads, pool.num_nodes) == (num_threads, num_nodes)


def test_a_wrong_topology_is_named():
    with pytest.raises(ValueError, match='topology: expected CPUs below 8192 like "0-3,8", got "two", or "auto"'):
        ThreadPool(1, topology="two")


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
    _native.ThreadPool(64, "scalar", "auto")
except ValueError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert num_threads() == before, (num_threads(), before)
_native.ThreadPool(64, "scalar", "auto").close()
"""


def test_threads_that_do_not_start_are_an_error_and_leave_none_behind():
    child = subprocess.run([sys.executable, "-c", TOO_FEW_THREADS], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    sentence = r"num_threads: 64 need 63 threads beside the caller, \d+ started: Resource temporarily unavailable\n"
    assert re.fullmatch(sentence, child.stdout)


UNCLOSED = """
import os
from hmoe_jax.kernels.pool import ThreadPool

pools = [ThreadPool(4, topology="0-1;0-1"), ThreadPool(1)]
assert all(pool.read_gbps(megabytes=8) > 0 for pool in pools)
child = os.fork()
assert all(pool.read_gbps(megabytes=8) > 0 for pool in pools)
if child:
    assert os.waitpid(child, 0)[1] == 0
print(len(os.listdir("/proc/self/task")))
"""


def test_a_program_and_its_fork_end_with_pools_open():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", UNCLOSED]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.splitlines()[0] == "1"  # the fork, which has the caller alone


def test_closing_a_pool_ends_its_threads():
    def num_threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = num_threads()
    with ThreadPool(300, topology=";".join(["0-1," * 37 + "0"] * 4)) as pool:
        assert (pool.num_nodes, num_threads() - before) == (4, 299)
        assert pool.read_gbps(megabytes=8) > 0
    assert num_threads() == before


def test_read_bandwidth_is_a_positive_number(pool):
    assert pool.read_gbps(megabytes=8) > 0
    with pytest.raises(ValueError, match="megabytes: expected a positive number, got 0"):
        pool.read_gbps(megabytes=0)


def test_the_processor_has_a_name():
    assert cpu_name()
