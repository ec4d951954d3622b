"""The memory of large results on the CPU: kept for the next ones, never that of two at a time, never without bound."""

from __future__ import annotations

import gc
import multiprocessing
import threading

import pytest
import torch
from extension import requires_extension
from torch import Tensor

from smart_kernels import empty_cache, perturbation_step, symmetric_kl, symmetric_kl_grad

pytestmark = [
    requires_extension,
    pytest.mark.skipif(torch.__version__ < "2.11", reason="this torch cannot hand out memory that is kept"),
]
MIB = 1 << 20
LIMIT, COUNT = 256 * MIB, 32


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    gc.collect()  # what other tests have left in cycles
    empty_cache()


def logits(mib: int, seed: int = 0) -> Tensor:
    return torch.randn(mib, 1 << 18, generator=torch.Generator().manual_seed(seed))


def grad(mib: int) -> Tensor:
    """A result of so many MiB, all of its rows the same."""
    a, b = logits(1), logits(1, seed=1)
    return symmetric_kl_grad(a.expand(mib, -1), b.expand(mib, -1), reduction="sum")


def test_results_that_live_share_no_memory_and_the_next_takes_over_what_is_gone() -> None:
    first, second = grad(8), grad(8)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    expected = first.clone()
    assert torch.equal(second, expected)
    first.fill_(torch.nan)
    second.fill_(torch.nan)
    del first, second
    third, fourth, fifth = grad(8), grad(8), grad(8)
    assert {third.data_ptr(), fourth.data_ptr()} == places
    assert fifth.data_ptr() not in places
    assert all(torch.equal(x, expected) for x in (third, fourth, fifth))
    del third
    assert empty_cache() == 8 * MIB
    assert torch.equal(fourth, expected)  # what is in use is not given back


def test_all_kernels_share_what_is_kept() -> None:
    a, b = logits(8).requires_grad_(), logits(8, seed=1).requires_grad_()
    symmetric_kl(a, b).backward()
    places = {a.grad.data_ptr(), b.grad.data_ptr()}
    a.grad = b.grad = None
    delta = perturbation_step(torch.zeros(4, 1 << 9, 1 << 10), torch.ones(4, 1 << 9, 1 << 10), 1.0, 2.0)
    assert delta.data_ptr() in places
    assert torch.equal(delta, torch.ones_like(delta))


def test_a_result_takes_no_memory_of_twice_its_size() -> None:
    kept = grad(8)
    place = kept.data_ptr()
    del kept
    assert grad(4).data_ptr() != place
    assert grad(9).data_ptr() != place
    assert grad(5).data_ptr() == place


def test_so_much_is_kept_and_no_more() -> None:
    results = [grad(30) for _ in range(12)]
    places = [x.data_ptr() for x in results]
    while results:
        del results[0]  # in order, so that the last ones are kept
    assert empty_cache() == 8 * 30 * MIB <= LIMIT
    assert empty_cache() == 0
    assert len(set(places)) == 12
    results = [grad(1) for _ in range(COUNT + 8)]
    del results
    assert empty_cache() == COUNT * MIB


def test_small_results_are_none_of_it() -> None:
    small, least = (symmetric_kl_grad(x, x) for x in (torch.zeros(1, n) for n in ((1 << 15) - 1, 1 << 15)))
    del small, least
    assert empty_cache() == 1 << 17


def test_what_is_larger_than_all_that_may_be_kept_displaces_nothing() -> None:
    large, small = grad((LIMIT // MIB) + 1), grad(4)
    del small, large
    assert empty_cache() == 4 * MIB


def test_threads_take_and_leave_memory_at_the_same_time() -> None:
    expected = {mib: grad(mib) for mib in (4, 5, 7)}
    wrong = []

    def work(mib: int) -> None:
        for _ in range(30):
            mine = grad(mib)
            if not torch.equal(mine, expected[mib]):
                wrong.append(mib)
            mine.fill_(mib)
            if not bool((mine == mib).all()):
                wrong.append(mib)

    threads = [threading.Thread(target=work, args=(mib,)) for mib in (4, 5, 7, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_fork_in_the_midst_of_it_leaves_a_child_that_can_go_on() -> None:
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            grad(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    codes = []
    for _ in range(30):
        child = multiprocessing.get_context("fork").Process(target=empty_cache)
        child.start()
        child.join(20)
        codes.append(child.exitcode)
        if child.exitcode is None:
            child.kill()
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert codes == [0] * 30


def test_a_result_that_cannot_be_is_refused() -> None:
    rows = torch.zeros(1, 1, dtype=torch.float64).expand(2**41 + 1, 2**20)  # 8 MiB, if counted in 64 bits
    with pytest.raises(RuntimeError):
        symmetric_kl_grad(rows, rows)


def test_a_result_is_a_tensor_like_others_but_for_its_fixed_size() -> None:
    with pytest.raises(RuntimeError, match="not resizable"):
        grad(4).resize_(5 * MIB)
    result = grad(4)
    expected = result.clone()
    assert result.is_contiguous()
    assert result.untyped_storage().nbytes() == 4 * MIB
    array = result.numpy()
    result.share_memory_()
    assert torch.equal(result, expected)
    del result
    assert (array == expected.numpy()).all()
