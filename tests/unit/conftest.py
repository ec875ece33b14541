"""Fixtures of the SDK's tests."""

from sdk_fixtures import driver, open_store, store

__all__ = ["driver", "open_store", "store"]
