"""The checker passes what an honest store did, and catches every fault that is put into one."""

import random
from collections import Counter

import pytest
from crash.checker import check
from crash.operations import ACKNOWLEDGED, REFUSED, UNKNOWN
from crash.simulated_history import FAULTS, random_history

HONEST = 30
INJECTED = 5


def test_an_honest_store_passes() -> None:
    first = random.randrange(1 << 30)
    print(f"seeds from {first}")
    outcomes: Counter[str] = Counter()
    for seed in range(first, first + HONEST):
        history = random_history(seed)
        violations = check(history.operations, history.final)
        assert not violations, (seed, [str(each) for each in violations])
        outcomes.update(each.outcome for each in history.operations)
    print(dict(outcomes))
    assert min(outcomes[name] for name in (ACKNOWLEDGED, UNKNOWN, REFUSED)) > HONEST


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_every_time(fault: str) -> None:
    first = random.randrange(1 << 30)
    print(f"seeds from {first}")
    caught = tried = 0
    for seed in range(first, first + 10 * INJECTED):
        history = random_history(seed, fault)
        if not history.hit:
            continue
        violations = check(history.operations, history.final)
        kinds = {each.kind for each in violations}
        assert kinds & set(FAULTS[fault]), (seed, history.hit, [str(each) for each in violations])
        tried += 1
        caught += history.hit in {each.key for each in violations}
        if tried == INJECTED:
            break
    assert caught == tried == INJECTED
