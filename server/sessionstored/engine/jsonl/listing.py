"""Listing: the catalogue's rows, merged with the heads that changed since. Opens no session file.

The overlay of changed heads is taken before the catalogue is read. So a session that does not change
meanwhile is in exactly one of the two, and is listed exactly once.
"""

from collections.abc import Iterator
from heapq import merge

from sessionstored.engine import Order, Page, Query
from sessionstored.engine.jsonl.journal import Reader
from sessionstored.engine.jsonl.state import State
from sessionstored.engine.jsonl.vault import Vault
from sessionstored.rules import Head

_Position = tuple[int, bytes]


def page(vault: Vault, query: Query) -> Page:
    """One page of heads, in the order asked for."""
    with vault.lock:
        changed = {key: _shown(vault, state) for key, state in vault.dirty.items()}
    overlay = [head for head in changed.values() if head is not None and _selected(head, query)]
    overlay.sort(key=lambda head: position(head, query), reverse=_down(query))

    def merged(reader: Reader) -> list[Head]:
        heads = reader.heads(query, vault.expired)
        stored: Iterator[Head] = (head for head in heads if head.key not in changed)
        both = merge(stored, overlay, key=lambda head: position(head, query), reverse=_down(query))
        return [head for _, head in zip(range(query.page_size + 1), both, strict=False)]

    heads = vault.reading(merged)
    return Page(heads[: query.page_size], len(heads) > query.page_size)


def _shown(vault: Vault, state: State) -> Head | None:
    """A head, unless it has expired; damaged sessions do not."""
    head = state.head
    return None if head is not None and state.refusal is None and vault.expired(head) else head


def position(head: Head, query: Query) -> _Position:
    """Where a head stands in an order."""
    by_time = query.order in (Order.UPDATE_TIME, Order.UPDATE_TIME_DESC)
    return (head.update_time_us if by_time else 0, head.key.encode())


def _down(query: Query) -> bool:
    return query.order in (Order.KEY_DESC, Order.UPDATE_TIME_DESC)


def _selected(head: Head, query: Query) -> bool:
    if not head.key.startswith(query.prefix):
        return False
    if query.updated_since_us is not None and head.update_time_us < query.updated_since_us:
        return False
    if query.after is None:
        return True
    by_time = query.order in (Order.UPDATE_TIME, Order.UPDATE_TIME_DESC)
    after = (query.after[0] if by_time else 0, query.after[1].encode())
    mine = position(head, query)
    return mine < after if _down(query) else mine > after
