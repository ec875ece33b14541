"""The bound on calls that are under way."""

import pytest
from sessionstored.calls import Calls
from sessionstored.engine import Refused
from sessionstored.service import SERVICE


def test_more_calls_than_the_bound_are_refused_with_a_reason() -> None:
    calls = Calls(SERVICE, bytes_max=1 << 20, calls_max=2)
    with calls._under_way(1), calls._under_way(1):
        with pytest.raises(Refused) as caught, calls._under_way(1):
            pass
        assert caught.value.refusal.reason == "OVERLOADED"
        assert caught.value.refusal.metadata == {"limit": "2"}
    with calls._under_way(1), calls._under_way(1):
        pass
