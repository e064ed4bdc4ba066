"""Who has KV blocks and who waits for some, on the head's side.

    waiting ── blocks for all its tokens ──▶ running ── finished, stopped, failed ──▶ leaving ──▶ closed
       ▲                                        │
       └───────────── out of blocks ────────────┘   (computed again from prompt + tokens so far)

Places and blocks go to the tenant that was served least, to each of its sequences in turn; when blocks run out, the
newest of the tenant that was served most gives way (see `fair_queue`). A tenant that holds more than its share gives
way to one that holds less. So nobody starves. With one tenant all that is the order of arrival.

Who comes in begins with the blocks of others that hold the beginning of its tokens (see `prefix_cache`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from molink_common.errors import CapacityError
from molink_common.messages import StartSequence
from molink_common.wire import Traffic
from molink_stage_worker.batch_plan import BatchLimits
from molink_stage_worker.batch_sequence import Sequence
from molink_stage_worker.departures import Departures, Leaving
from molink_stage_worker.fair_queue import FairQueue, Shares
from molink_stage_worker.kv_blocks import BlockAllocator
from molink_stage_worker.planning.observation import Demand
from molink_stage_worker.prefix_cache import ChainKeys


class Residents:
    """Sequences and their blocks. Not thread-safe; no IO, no clock."""

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._blocks = BlockAllocator(limits.num_blocks)
        self._chain = ChainKeys(limits.prefix_secret or b"", limits.block_size)
        self.shares_prefixes = limits.prefix_secret is not None
        self._sequences: dict[str, Sequence] = {}
        self.shares = Shares()
        self._waiting = FairQueue(self.shares)
        self.running: dict[str, Sequence] = {}
        """By time of last service, longest ago first."""
        self.departures = Departures()
        self.preemptions = 0
        self._failed: list[str] = []
        self._arrivals = 0

    @property
    def ids(self) -> tuple[str, ...]:
        """Of all that are waiting or running."""
        return tuple(self._sequences)

    @property
    def num_waiting(self) -> int:
        """How many have no blocks."""
        return len(self._waiting)

    def demand(self, *, window: float) -> Demand:
        """What the planner must know of them. `window`: tokens a step of each who decodes, guesses included."""
        decoding = [sequence for sequence in self.running.values() if sequence.is_decoding]
        begun = [one for one in self.running.values() if one.unplanned and not one.is_decoding]
        prompt_tokens = sum(one.unplanned for one in begun)
        context = sum(len(one.tokens) for one in decoding)
        to_rebuild = sum(one.to_rebuild > 0 for one in self.running.values())
        return Demand(
            decoding=len(decoding),
            context_tokens=context // len(decoding) if decoding else 0,
            prompt_tokens_waiting=prompt_tokens + sum(one.unplanned for one in self._waiting),
            admitted_prompt_tokens=prompt_tokens,
            longest_prompt_tokens=max((len(one.tokens) for one in begun), default=0),
            prompts_waiting=len(begun) + to_rebuild + self.num_waiting,
            window=window,
        )

    @property
    def free_blocks(self) -> int:
        """That nobody has."""
        return self._blocks.num_free

    @property
    def cached_blocks(self) -> int:
        """Of the free blocks, those that hold the beginning of a text."""
        return self._blocks.num_idle

    def get(self, name: str) -> Sequence | None:
        """A sequence that is here."""
        return self._sequences.get(name)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-num_tokens // self._limits.block_size)

    def table(self, sequence: Sequence) -> tuple[int, ...]:
        """Its blocks, in the order of its tokens."""
        return self._blocks.table(sequence.number)

    def add(self, start: StartSequence) -> None:
        """See `Batcher.add`."""
        if start.sequence in self._sequences:
            return
        num_tokens = len(start.prompt) + len(start.generated)
        if len(start.generated) >= start.options.max_tokens:
            raise ValueError(f"the sequence has its {start.options.max_tokens} tokens already")
        room = self._limits.num_blocks * self._limits.block_size
        if num_tokens > room:
            raise CapacityError(f"{num_tokens} tokens do not fit into the pipeline's KV memory of {room} tokens")
        if len(self._waiting) >= self._limits.max_waiting:
            raise CapacityError(f"{len(self._waiting)} sequences are waiting already")
        self._arrivals += 1
        sequence = Sequence.starting(start, self._arrivals)
        self._sequences[sequence.id] = sequence
        self.shares.enter(sequence.tenant, has_waiting=self._waiting.has(sequence.tenant))
        self._waiting.add(sequence)

    def admit(self) -> None:
        """Let sequences in, by turns, while their blocks leave one for each that runs."""
        while (sequence := self._waiting.first(self.running.values())) is not None:
            if len(self.running) >= self._limits.max_running and not self._yield_place(sequence):
                return
            needed = self.blocks_for(len(sequence.tokens))
            if needed > self._limits.num_blocks:
                self.fail(sequence)  # it grew until not even the whole memory holds it
                continue
            if not self.departures.may_come_back(sequence.id, sequence.number):
                return
            known, in_use = self._known(sequence)
            while self._blocks.num_free - (needed - in_use) < len(self.running):
                # the room is for this one: who gave way could be the next in turn, and they would change for ever
                if not self._yield_blocks(sequence, needed):
                    return
                known, in_use = self._known(sequence)
            self._waiting.remove(sequence)
            most = len(sequence.prompt) + sequence.options.max_tokens
            self._blocks.share(sequence.number, sequence.keys[:known])
            self._blocks.take(sequence.number, needed - known, expected=self.blocks_for(most))
            sequence.begin_at(known * self._limits.block_size, self.table(sequence))
            self.running[sequence.id] = sequence

    def look_again(self, sequence: Sequence) -> None:
        """Let a new sequence begin with what has become known since it got its blocks."""
        next_key = sequence.cached // self._limits.block_size
        if next_key < len(sequence.keys) and self._blocks.knows(sequence.keys[next_key]):
            known, _ = self._known(sequence)
            self._blocks.share(sequence.number, sequence.keys[:known])
            sequence.begin_at(known * self._limits.block_size, self.table(sequence))

    def publish(self, sequence: Sequence) -> None:
        """Its tokens up to `confirmed` are on every stage: others may begin with them."""
        full = sequence.confirmed // self._limits.block_size
        if self.shares_prefixes and full > sequence.published:
            self._chain.extend(sequence.keys, full, sequence.tenant, sequence.tokens)
            self._blocks.publish(sequence.number, sequence.keys[:full], sequence.published)
            sequence.published = full

    def enter_epoch(self, kept: Mapping[str, int]) -> None:
        """Nothing is known any more. Of whoever runs, `kept` tokens are to be given to the stage that is rebuilt.

        What comes behind these is computed anew: who would have to do that in blocks of another waits for some of its
        own. To be called when nothing is on its way.
        """
        self._blocks.forget_all()
        for sequence in sorted(self.running.values(), key=lambda one: kept.get(one.id, 0)):
            sequence.kept = kept.get(sequence.id, 0)
            sequence.confirmed = sequence.cached = sequence.published = 0
            if self._blocks.may_write(sequence.number, sequence.kept // self._limits.block_size):
                sequence.go_back(self.table(sequence))
            else:
                self._send_back(sequence)

    def skip_rebuilt(self, sequence: Sequence) -> None:
        """Let a sequence that is to be rebuilt go on behind what others have given to that stage already."""
        size = self._limits.block_size
        known = min(self._blocks.num_known(sequence.number), sequence.kept // size)
        if known * size > sequence.confirmed:
            sequence.confirmed = sequence.planned = known * size

    def is_rebuilt_by_others(self, sequence: Sequence, chosen: Mapping[str, int]) -> bool:
        """Whether others, `chosen` ones or those at it already, fill blocks that the sequence would have to fill."""
        first = sequence.confirmed // self._limits.block_size
        if self._blocks.may_write(sequence.number, first):
            return False
        lacking = set(self.table(sequence)[first : self.blocks_for(sequence.kept)])
        others = (one for one in self.running.values() if one.kept and (one.is_open or one.id in chosen))
        return any(not lacking.isdisjoint(self.table(one)) for one in others if one is not sequence)

    def begin_anew(self, sequence: Sequence) -> None:
        """A stage lacks what it should have: compute all of a running sequence, in blocks that nobody else reads."""
        sequence.is_distrustful = True
        self._blocks.forget(sequence.number)
        if self._blocks.is_sole_user(sequence.number):
            sequence.confirmed = sequence.kept = sequence.cached = sequence.published = 0
            sequence.go_back(self.table(sequence))
        else:
            self._send_back(sequence)

    def make_room(self, sequence: Sequence, num_tokens: int, chosen: dict[str, int]) -> bool:
        """Blocks for so many tokens of a sequence, at the expense of who gives way first if there are no others.

        Who has to give way is taken out of `chosen`. False: there is no room for now, or the sequence itself gave way.
        """
        if sequence.id not in self.running:
            return False  # it gave way when another needed room
        needed = self.blocks_for(num_tokens) - self._blocks.held(sequence.number)
        while needed > self._blocks.num_free:
            if self.departures.numbers:
                return False  # blocks are about to be free
            last = self.shares.most_served(self.running.values())
            assert last is not None, "the sequence itself runs"
            if last is sequence and len(self.running) == 1:
                self.fail(sequence)
                return False
            self._preempt(last)
            chosen.pop(last.id, None)
            if last is sequence:
                return False
        if needed > 0:
            sequence.unsent_blocks.extend(self._blocks.take(sequence.number, needed))
        return True

    def has_spare_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Blocks for so many tokens of a sequence that runs, while one is left for each that does."""
        needed = self.blocks_for(num_tokens) - self._blocks.held(sequence.number)
        if needed > 0:
            if self._blocks.num_free - needed < len(self.running):
                return False
            sequence.unsent_blocks.extend(self._blocks.take(sequence.number, needed))
        return True

    def step_returned(self, step: int, traffic: Traffic, closes: Mapping[str, int]) -> None:
        """A step came back: what could only have been on its way before it is not any more."""
        for number in self.departures.step_returned(step, traffic, closes):
            self._blocks.release(number)

    def nothing_on_its_way(self, step: int) -> None:
        """See `Departures.nothing_on_its_way`."""
        for number in self.departures.nothing_on_its_way(step):
            self._blocks.release(number)

    def forget(self, sequence: Sequence) -> None:
        """It is done, or nobody wants it any more."""
        del self._sequences[sequence.id]
        self.shares.leave(sequence.tenant)
        if sequence.id in self.running:
            self._leave_stages(sequence)
        else:
            self._waiting.remove(sequence)

    def fail(self, sequence: Sequence) -> None:
        """Give it up; `take_failed` tells."""
        self._failed.append(sequence.id)
        self.forget(sequence)

    def take_failed(self) -> tuple[str, ...]:
        """Those given up since the last call."""
        failed, self._failed = tuple(self._failed), []
        return failed

    def check_invariants(self) -> None:
        """Assert what must hold after every event."""
        self._blocks.check_invariants()
        assert len(self.running) <= self._limits.max_running
        assert {sequence.id for sequence in self._waiting} | set(self.running) == set(self._sequences)
        assert len(self._waiting) + len(self.running) == len(self._sequences)
        assert self.shares.num_present == len({one.tenant for one in self._sequences.values()})
        for sequence in self._waiting:
            assert self._blocks.held(sequence.number) == 0 or self.departures.is_leaving(sequence.number)
            assert sequence.planned == sequence.confirmed == sequence.kept == 0
            assert not sequence.is_open
        for sequence in self.running.values():
            assert not self.departures.is_leaving(sequence.number)
            assert sequence.confirmed <= sequence.planned <= len(sequence.tokens)
            assert not sequence.kept or sequence.planned <= sequence.kept < len(sequence.tokens)
            assert sequence.kept or sequence.cached <= sequence.confirmed
            first = max(sequence.confirmed, sequence.kept) // self._limits.block_size
            assert self._blocks.may_write(sequence.number, first), "it would write to a block of another"
            assert self._blocks.held(sequence.number) >= self.blocks_for(max(sequence.planned, sequence.kept))
        assert self._blocks.holders == {*self.departures.numbers, *(one.number for one in self.running.values())}

    def _yield_place(self, newcomer: Sequence) -> bool:
        """A place for a tenant that has less than its share of them, from one that has more."""
        share = max(self._limits.max_running // self.shares.num_present, 1)
        if sum(one.tenant == newcomer.tenant for one in self.running.values()) >= share:
            return False
        last = self.shares.most_served(self.running.values(), above=share)
        if last is None:
            return False
        self._preempt(last)
        return True

    def _yield_blocks(self, newcomer: Sequence, needed: int) -> bool:
        """Blocks for a tenant that stays within its share of them, from one that has more. False: not for now."""
        if self.departures.numbers:
            return False  # blocks are about to be free
        held = Counter[str]()
        for one in self.running.values():
            held[one.tenant] += self._blocks.held(one.number)
        share = self._limits.num_blocks // self.shares.num_present
        if held[newcomer.tenant] + needed > share:
            return False
        last = self.shares.most_served(one for one in self.running.values() if held[one.tenant] > share)
        if last is None:
            return False
        self._preempt(last)
        return True

    def _known(self, sequence: Sequence) -> tuple[int, int]:
        """Of its first blocks, how many are known, and how many of these are in use. One token is left to compute."""
        # what is known of a prompt tells no log probabilities of its tokens
        if not self.shares_prefixes or sequence.is_distrustful or sequence.options.prompt_logprobs is not None:
            return 0, 0
        most = (len(sequence.tokens) - 1) // self._limits.block_size
        self._chain.extend(sequence.keys, most, sequence.tenant, sequence.tokens)
        return self._blocks.known(sequence.keys[:most])

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self._send_back(sequence)

    def _send_back(self, sequence: Sequence) -> None:
        self._leave_stages(sequence)
        self._waiting.add(sequence)

    def _leave_stages(self, sequence: Sequence) -> None:
        del self.running[sequence.id]
        leaving = Leaving(
            id=sequence.id,
            number=sequence.number,
            last_steps=dict(sequence.last_steps),
            opened_by=sequence.opened_by,
        )
        sequence.forget_stages()
        if self.departures.leave(leaving):
            self._blocks.release(leaving.number)
