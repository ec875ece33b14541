"""The checker of leases passes what an honest store did, and catches every fault that is put into one."""

import random
from collections import Counter

import pytest
from crash.lease_checker import check_leases
from crash.operations import ACKNOWLEDGED, REFUSED, UNKNOWN
from crash.simulated_leases import FAULTS, random_leases

HONEST = 60
INJECTED = 8


def test_an_honest_store_passes() -> None:
    first = random.randrange(1 << 30)
    print(f"seeds from {first}")
    seen: Counter[str] = Counter()
    for seed in range(first, first + HONEST):
        history = random_leases(seed)
        violations = check_leases(history.operations, one_counter=True)
        assert not violations, (seed, [str(each) for each in violations])
        seen.update(each.outcome for each in history.operations)
        seen.update(each.reason for each in history.operations if each.reason)
        seen.update("fenced" for each in history.operations if each.changed and each.fencing_token)
    print(dict(seen))
    for name in (ACKNOWLEDGED, UNKNOWN, REFUSED, "LEASE_HELD", "LEASE_LOST", "fenced"):
        assert seen[name] > HONEST, name


@pytest.mark.parametrize("one_counter", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_every_time(fault: str, one_counter: bool) -> None:
    first = random.randrange(1 << 30)
    print(f"seeds from {first}")
    tried = 0
    for seed in range(first, first + 20 * INJECTED):
        history = random_leases(seed, fault)
        if not history.hit:
            continue
        violations = check_leases(history.operations, one_counter=one_counter)
        kinds = {each.kind for each in violations if each.key == history.hit}
        assert kinds & set(FAULTS[fault]), (seed, history.hit, [str(each) for each in violations])
        tried += 1
        if tried == INJECTED:
            break
    assert tried == INJECTED
