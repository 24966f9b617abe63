"""Who shares a row in prediction: nothing lost, nothing twice, rows long enough and no longer."""

import numpy as np
import pytest

from datamux_jax import grouping
from datamux_jax.errors import InputError

SIZES = np.random.default_rng(0).integers(2, 41, size=123)


def plan(sizes=SIZES, *, groups=4, instances=4, lengths=(16, 32, 40), ensemble=1):
    return list(grouping.batches(sizes, groups=groups, instances=instances, lengths=lengths, ensemble=ensemble))


def test_lengths_double_up_to_the_full_one():
    assert grouping.bucket_lengths(100) == (16, 32, 64, 100)
    assert grouping.bucket_lengths(64) == (16, 32, 64)
    assert grouping.bucket_lengths(12) == (12,)


@pytest.mark.parametrize("ensemble", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 3, 4, 15, 16, 17, 123])
def test_every_input_counts_as_often_as_asked_and_fits_its_row(n, ensemble):
    counted = np.zeros(n, int)
    for batch in plan(SIZES[:n], ensemble=ensemble):
        assert batch.rows.shape == batch.real.shape == (4, 4)
        assert SIZES[batch.rows[batch.real]].max() <= batch.length
        counted[batch.rows[batch.real]] += 1
    assert (counted == ensemble).all()


@pytest.mark.parametrize("ensemble", [2, 4])
@pytest.mark.parametrize("n", [5, 16, 17, 20, 123])
def test_copies_are_in_other_slots_and_with_other_companions(n, ensemble):
    slots = [set() for _ in range(n)]
    companions = [[] for _ in range(n)]
    for batch in plan(SIZES[:n], ensemble=ensemble):
        for row, real in zip(batch.rows, batch.real, strict=True):
            if real.any():
                assert len(set(row)) == 4, "two copies in one group"
            for slot in np.flatnonzero(real):
                slots[row[slot]].add(slot)
                companions[row[slot]].append(frozenset(row) - {row[slot]})
    assert all(len(of_one) == ensemble for of_one in slots)
    if (n, ensemble) == (16, 2):
        assert all(len(frozenset.union(*met)) == 6 for met in companions), "somebody meets a companion twice"


def test_rows_are_cut_to_few_lengths_and_only_the_last_batch_is_filled():
    batches = plan()
    lengths = [batch.length for batch in batches]
    assert lengths == sorted(lengths, reverse=True)
    assert set(lengths) == {40, 32, 16}
    assert all(batch.real.all() for batch in batches[:-1])


def test_one_length_keeps_the_order():
    batches = plan(lengths=(40,))
    assert np.concatenate([batch.rows[batch.real] for batch in batches]).tolist() == list(range(len(SIZES)))


def test_the_order_stays_inside_of_a_bucket():
    for length in (16, 32, 40):
        rows = np.concatenate([batch.rows[batch.real] for batch in plan()])
        low = {16: 0, 32: 16, 40: 32}[length]
        inside = [row for row in rows if low < SIZES[row] <= length]
        assert inside == sorted(inside)


@pytest.mark.parametrize("ensemble", [0, -1, 3, 8])
def test_copies_must_divide_the_slots(ensemble):
    with pytest.raises(InputError, match=r"Choose one of: 1, 2, 4\."):
        grouping.check_ensemble(ensemble, 4)
