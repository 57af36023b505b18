"""How ranks begin together: each comes to their common store with nothing or with the reason why it cannot train, and
all hear it. So none waits for one that was refused, whatever started them."""

from datetime import timedelta

from torch.distributed import Store
from torch.distributed.rendezvous import rendezvous


class RankRefusedError(ValueError):
    """Another process of the run cannot train, for the reason that this one names."""


def meet(rank: int, size: int, timeout: float, reason: str = "") -> Store:
    """Wait up to `timeout` seconds until every rank has come. RankRefusedError where one came with a reason."""
    wait = timedelta(seconds=timeout)
    store: Store
    store, _, _ = next(rendezvous("env://", rank, size, timeout=wait))
    store.set_timeout(wait)
    store.set(f"gdn2 {rank} came", reason)
    reasons = [store.get(f"gdn2 {other} came").decode() for other in range(size)]
    refused = next((other for other in range(size) if reasons[other]), None)
    if refused is None:
        return store
    store.set(f"gdn2 {rank} heard", "")
    if rank == 0:  # the store may lie in this process, and ends with it
        for other in range(size):
            store.get(f"gdn2 {other} heard")
    raise RankRefusedError(f"rank {refused} of {size}: {reasons[refused]}")
