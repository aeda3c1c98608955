"""Memory kept from step to step: nobody's numbers are overwritten, and it is never too much."""

from __future__ import annotations

import copy
import io
import mmap
import os
import pickle
import threading
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from coterie.experts import ExpertPool, dispatch
from coterie.experts.dispatch import native, plan_choices
from coterie.experts.dispatch.native import memory, op
from coterie.experts.dispatch.native.memory import KeptMemory
from coterie.experts.kinds import SwiGLU

needs_operator = pytest.mark.skipif(not native.library().ready, reason=native.library().reason)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> KeptMemory:
    """Memory of this test alone, which keeps pieces from a page on."""
    made = KeptMemory()
    monkeypatch.setattr(memory, "LARGE", 4096)
    monkeypatch.setattr(op, "kept", made)
    monkeypatch.setattr(native, "kept", made)
    return made


def test_a_piece_comes_back_when_the_last_reference_to_it_dies(kept: KeptMemory) -> None:
    first = kept.empty((4, 512))
    assert first.shape == (4, 512) and first.dtype == torch.float32 and not first._is_view()
    address, row = first.data_ptr(), first.fill_(7.0)[1]
    assert (kept.lent, kept.waiting) == (8192, 0)
    del first
    other = kept.empty((4, 512))
    assert other.data_ptr() != address  # a view holds the piece
    other.zero_()
    assert bool((row == 7.0).all())
    del row
    assert kept.empty((2, 1024)).data_ptr() == address
    assert kept.empty((3,)).data_ptr() != 0 and kept.lent == 2 * 8192  # small ones are torch's own


def test_only_pieces_of_about_the_size_are_handed_out(kept: KeptMemory) -> None:
    address = kept.empty((9 * 1024,)).data_ptr()
    assert kept.empty((8 * 1024,)).data_ptr() == address
    small = kept.empty((4 * 1024,))
    assert small.data_ptr() != address and small.untyped_storage().nbytes() == 4 * 4096


def test_all_is_never_more_than_twice_what_was_in_use(kept: KeptMemory) -> None:
    for rows in (*range(1, 40), *range(40, 1, -1)):  # as steps of other lengths ask for it
        made = kept.empty((rows, 1024)).zero_()
        assert kept.waiting + kept.lent <= 2 * kept.most
        del made
    assert kept.most == 40 * 4096


def test_no_memory_is_an_error_that_leaves_nothing_behind(kept: KeptMemory) -> None:
    with pytest.raises(MemoryError, match="no memory for"):
        kept.empty((1 << 58,))
    assert (kept.lent, kept.waiting, kept.most) == (0, 0, 0)


def test_what_nobody_wants_goes(kept: KeptMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_IDLE", 5)
    kept.empty((16, 1024)).zero_()
    for _ in range(5):
        kept.empty((1, 1024))
        assert kept.waiting >= 16 * 4096
    kept.empty((1, 1024))
    assert kept.waiting == 4096
    assert native.release_memory() == 4096
    assert (kept.waiting, kept.lent) == (0, 0)


def test_copies_files_and_shared_memory_own_their_numbers(kept: KeptMemory) -> None:
    made = kept.empty((2048,)).copy_(torch.arange(2048.0))
    file = io.BytesIO()
    torch.save(made, file)
    twins = [copy.deepcopy(made), pickle.loads(pickle.dumps(made)), made.clone()]
    moved = made.share_memory_()
    kept.waiting  # noqa: B018  collects what moving gave back
    del made
    kept.empty((2048,)).fill_(-1.0)
    file.seek(0)
    for twin in (*twins, moved, torch.load(file)):
        assert torch.equal(twin, torch.arange(2048.0))


def test_threads_never_share_a_piece(kept: KeptMemory) -> None:
    wrong: list[float] = []

    def work(mark: float) -> None:
        for _ in range(200):
            held = [kept.empty((2, 1024)).fill_(mark) for _ in range(3)]
            wrong.extend(float(v.sum()) for v in held if not bool((v == mark).all()))

    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0 < kept.waiting <= kept.most and kept.lent == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_its_own(kept: KeptMemory) -> None:
    held = kept.empty((2048,)).fill_(3.0)
    kept.empty((4096,)).fill_(4.0)
    with kept._lock:  # as another thread may hold it
        child = os.fork()
        if child == 0:
            held.fill_(9.0)
            kept.empty((4096,)).fill_(9.0)
            os._exit(0 if kept.waiting == 16384 and bool((held == 9.0).all()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert bool((held == 3.0).all())


def test_it_can_be_switched_off() -> None:
    off = KeptMemory(False)
    assert off.empty((1 << 20,)).shape == (1 << 20,)
    assert (off.lent, off.waiting) == (0, 0)


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


@needs_operator
@pytest.mark.parametrize("to_none", [True, False])
def test_training_is_the_same_and_maps_nothing_anew(
    kept: KeptMemory, monkeypatch: pytest.MonkeyPatch, to_none: bool
) -> None:
    torch.manual_seed(0)
    pools = [ExpertPool(SwiGLU(hidden=48), 4, 32) for _ in range(2)]
    x, gates = torch.randn(64, 32), torch.rand(64, 2)
    ids = torch.rand(64, 4).argsort(dim=1)[:, :2]
    parameters = [p for pool in pools for p in pool.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    asked: list[int] = []
    found: list[list[Tensor]] = []

    def mapped(size: int) -> mmap.mmap:
        asked.append(step)
        return plain(size)

    plain = memory._mapped
    monkeypatch.setattr(memory, "_mapped", mapped)
    for step in range(6):
        kept.on = step != 5
        optimizer.zero_grad(set_to_none=to_none)
        for _ in range(2):  # gradients of two batches are added up
            h = x
            for pool in pools:
                h = h + dispatch(h, plan_choices(ids, gates, 4), pool, "native")
            h.square().sum().backward()
        if step > 3:
            found.append(gradients(parameters))
        if step != 4:
            optimizer.step()
        del h
    assert 0 in asked and not set(asked) - {0, 1}
    # Step 5 took step 4's weights again, from torch's own memory.
    assert all(torch.equal(a, b) for a, b in zip(*found))


@needs_operator
def test_a_gradient_that_is_kept_stays(kept: KeptMemory) -> None:
    pool = ExpertPool(SwiGLU(hidden=48), 4, 32)
    ids, gates = torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1)

    def run(scale: float) -> list[Tensor]:
        pool.zero_grad(set_to_none=True)
        y = dispatch(scale * torch.ones(8, 32), plan_choices(ids, gates, 4), pool, "native")
        y.sum().backward()
        return [p.grad for p in pool.parameters() if p.grad is not None]

    held = run(1.0)
    before = [gradient.clone() for gradient in held]
    for scale in (2.0, 3.0):
        run(scale)
    assert before and all(torch.equal(a, b) for a, b in zip(before, held))
