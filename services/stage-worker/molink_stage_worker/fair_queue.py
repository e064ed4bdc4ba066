"""Fair shares between tenants: whose sequence gets a place next, and whose gives one up.

A virtual token counter for each tenant ("Fairness in Serving Large Language Models", Sheng et al., OSDI 2024): every
token that is computed for a tenant is added to what it has been served, and the tenant that was served least goes
first. Who comes back after a while with nothing to do is lifted to nearly the least of those who are here, so that
nobody saves up service for later, but for `CREDIT`: enough that who asks now and then has its prompt computed before
the next one of who asks all the time. Between two tenants that both have work waiting, what they were served then
drifts apart by no more than that, the largest request and what is under way.

Within a tenant the smaller priority goes first, then who came first. Without keys all requests are of one tenant.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator

from molink_stage_worker.batch_sequence import Sequence

PROMPT_TOKEN = 1
OUTPUT_TOKEN = 2
"""What a token counts. A token of an answer takes a pass of its own, and holds its place until the next one."""
CREDIT = 2048
"""By so many tokens a tenant that comes may have been served less than anybody here."""
MOST_REMEMBERED = 1024
"""Tenants without a sequence that were served more than others: they are not forgiven by going away."""


def turn(sequence: Sequence) -> tuple[int, int]:
    """Sorts the sequences of one tenant: whose turn comes first."""
    return sequence.priority, sequence.arrival


class Shares:
    """What each tenant was served. Not thread-safe; no IO, no clock."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._present: Counter[str] = Counter()
        """Sequences, waiting and running."""
        self._last_left = 0
        """What the tenant that left last was served: a pool that was empty begins there."""

    @property
    def num_present(self) -> int:
        """Tenants that have a sequence here."""
        return len(self._present)

    def served(self, tenant: str) -> int:
        """Weighted tokens."""
        return self._served.get(tenant, 0)

    def enter(self, tenant: str, *, has_waiting: bool = False) -> None:
        """A sequence of this tenant has come; whether another one of it waits for a place."""
        if not has_waiting:
            self._served[tenant] = max(self.served(tenant), self._least(but=tenant) - CREDIT)
        self._present[tenant] += 1

    def leave(self, tenant: str) -> None:
        """A sequence of this tenant is gone."""
        self._present[tenant] -= 1
        if self._present[tenant]:
            return
        del self._present[tenant]
        self._last_left = self.served(tenant)
        self._forget()

    def charge(self, sequence: Sequence, start: int, end: int) -> None:
        """Its tokens ``[start, end)`` are being computed. What is computed again because of a loss costs nothing."""
        first = max(start, sequence.charged)
        if end <= first:
            return
        sequence.charged = end
        of_prompt = max(min(end, len(sequence.prompt)) - first, 0)
        self._served[sequence.tenant] = (
            self.served(sequence.tenant) + PROMPT_TOKEN * of_prompt + OUTPUT_TOKEN * (end - first - of_prompt)
        )

    def most_served(self, sequences: Iterable[Sequence], *, above: float = 0) -> Sequence | None:
        """Who gives way first: the last in turn of the tenant that was served most.

        Only tenants with more than `above` of these sequences count. None: there is no such tenant.
        """
        counts = Counter[str]()
        last: dict[str, Sequence] = {}
        for sequence in sequences:
            counts[sequence.tenant] += 1
            known = last.get(sequence.tenant)
            if known is None or turn(sequence) > turn(known):
                last[sequence.tenant] = sequence
        found = [sequence for tenant, sequence in last.items() if counts[tenant] > above]
        return max(found, key=lambda one: (self.served(one.tenant), turn(one)), default=None)

    def _least(self, *, but: str | None = None) -> int:
        others = [self.served(tenant) for tenant in self._present if tenant != but]
        if not others:
            return self.served(but) if but is not None and but in self._present else self._last_left
        return min(others)

    def _forget(self) -> None:
        least = self._least()
        absent = [tenant for tenant in self._served if tenant not in self._present]
        absent.sort(key=self.served)
        for index, tenant in enumerate(absent):
            if self.served(tenant) <= least - CREDIT or index < len(absent) - MOST_REMEMBERED:
                del self._served[tenant]


class FairQueue:
    """Sequences that wait for a place. Not thread-safe; no IO, no clock."""

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._lines: dict[str, list[Sequence]] = {}
        """By tenant, in turn. No line is empty."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def has(self, tenant: str) -> bool:
        """Whether a sequence of this tenant waits."""
        return tenant in self._lines

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line

    def add(self, sequence: Sequence) -> None:
        """Queue it, by its turn: one that was here before comes before those who came later."""
        insort(self._lines.setdefault(sequence.tenant, []), sequence, key=turn)

    def remove(self, sequence: Sequence) -> None:
        """Take it out; it must be here."""
        line = self._lines[sequence.tenant]
        line.remove(sequence)
        if not line:
            del self._lines[sequence.tenant]

    def first(self, running: Iterable[Sequence]) -> Sequence | None:
        """Whose turn it is: of the tenant served least; of two served alike, the one with fewer running."""
        if not self._lines:
            return None
        if len(self._lines) == 1:
            return next(iter(self._lines.values()))[0]
        counts = Counter(one.tenant for one in running)
        return min(
            (line[0] for line in self._lines.values()),
            key=lambda one: (self._shares.served(one.tenant), counts[one.tenant], turn(one)),
        )
