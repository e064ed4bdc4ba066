"""What is known of texts in KV blocks: keys, who begins with what, what is given up first."""

from __future__ import annotations

import pytest

from molink_common.errors import CapacityError
from molink_common.wire import Entry
from molink_stage_worker.fence import Drop, Fence
from molink_stage_worker.kv_blocks import BlockAllocator
from molink_stage_worker.prefix_cache import ChainKeys

BLOCK = 4
SYSTEM = tuple(range(100, 114))
"""Three full blocks and a half."""


def keys_of(text: tuple[int, ...] | str, *, tenant: str = "", secret: bytes = b"s") -> list[bytes]:
    tokens = tuple(map(ord, text)) if isinstance(text, str) else text
    keys: list[bytes] = []
    ChainKeys(secret, BLOCK).extend(keys, len(tokens) // BLOCK, tenant, tokens)
    return keys


def test_a_key_stands_for_everything_from_the_first_token_on() -> None:
    one, other = keys_of("aaaabbbbcccc"), keys_of("aaaabbbbdddd")
    assert one[:2] == other[:2]
    assert one[2] != other[2]
    assert keys_of("bbbb")[0] != one[1]
    assert len(set(keys_of("aaaaaaaa"))) == 2


def test_tenants_and_processes_have_keys_of_their_own() -> None:
    assert len({keys_of("aaaa")[0], keys_of("aaaa", tenant="b")[0], keys_of("aaaa", secret=b"t")[0]}) == 3


def test_keys_go_on_where_they_ended() -> None:
    tokens = tuple(range(20))
    keys = keys_of(tokens[:9])
    ChainKeys(b"s", BLOCK).extend(keys, 5, "", tokens)
    assert keys == keys_of(tokens)
    ChainKeys(b"s", BLOCK).extend(keys, 2, "", tokens)
    assert len(keys) == 5


def hold(blocks: BlockAllocator, sequence: int, text: str, *, extra: int = 0) -> tuple[int, ...]:
    """Let a sequence hold a text in known blocks, and `extra` blocks that nobody knows."""
    keys = keys_of(text)
    known, _ = blocks.known(keys)
    blocks.share(sequence, keys[:known])
    blocks.take(sequence, len(keys) - known + extra)
    blocks.publish(sequence, keys, known)
    blocks.check_invariants()
    return blocks.table(sequence)


def test_what_a_sequence_leaves_is_free_and_found_again() -> None:
    blocks = BlockAllocator(10)
    left = hold(blocks, 1, "aaaabbbb", extra=1)
    blocks.release(1)
    assert (blocks.num_free, blocks.num_idle) == (10, 2)
    assert blocks.known(keys_of("aaaabbbbcccc")) == (2, 0)
    assert blocks.known(keys_of("bbbb")) == (0, 0)
    assert hold(blocks, 2, "aaaabbbb", extra=1) == left
    assert (blocks.num_free, blocks.num_idle) == (7, 0)


def test_those_who_run_share_and_the_last_one_leaves_it_idle() -> None:
    blocks = BlockAllocator(10)
    hold(blocks, 1, "aaaabbbb", extra=1)
    assert blocks.known(keys_of("aaaabbbb")) == (2, 2)
    hold(blocks, 2, "aaaabbbbcccc")
    assert blocks.table(1)[:2] == blocks.table(2)[:2]
    assert blocks.num_free == 6
    assert not blocks.is_sole_user(1)
    assert not blocks.may_write(2, 2)
    assert blocks.may_write(1, 2)
    blocks.release(1)
    assert (blocks.num_free, blocks.num_idle) == (7, 0)
    blocks.release(2)
    assert (blocks.num_free, blocks.num_idle) == (10, 3)


def test_what_was_used_longest_ago_is_given_up_first_and_of_a_text_its_end() -> None:
    blocks = BlockAllocator(6)
    for sequence, text in enumerate(("aaaabbbb", "ccccdddd", "eeeeffff")):
        hold(blocks, sequence, text)
    for sequence in range(3):
        blocks.release(sequence)
    hold(blocks, 9, "aaaabbbb")
    blocks.release(9)  # it is the newest again
    known = []
    for count in range(1, 7):
        blocks.take(50 + count, 1)
        blocks.check_invariants()
        known.append([blocks.known(keys_of(text))[0] for text in ("aaaabbbb", "ccccdddd", "eeeeffff")])
    assert known == [[2, 1, 2], [2, 0, 2], [2, 0, 1], [2, 0, 0], [1, 0, 0], [0, 0, 0]]
    with pytest.raises(CapacityError):
        blocks.take(60, 1)


def test_empty_blocks_are_taken_before_idle_ones() -> None:
    blocks = BlockAllocator(10)
    hold(blocks, 1, "aaaabbbb")
    blocks.release(1)
    assert not set(blocks.take(2, 8)) & {0, 1}
    assert blocks.num_idle == 2


def test_a_text_goes_on_next_to_its_beginning() -> None:
    blocks = BlockAllocator(20)
    assert hold(blocks, 1, "aaaabbbb", extra=1) == (0, 1, 2)
    blocks.release(1)
    blocks.share(2, keys_of("aaaabbbb"))
    assert blocks.take(2, 2, expected=8) == (2, 3)
    assert blocks.take(3, 2) == (8, 9)  # behind what the other may come to need
    assert blocks.take(2, 1) == (4,)


def test_blocks_given_up_together_make_a_run() -> None:
    blocks = BlockAllocator(12)
    for sequence, text in enumerate(("aaaabbbbccccdddd", "eeeeffffgggghhhh", "iiiijjjjkkkkllll")):
        hold(blocks, sequence, text)
    for sequence in (1, 0, 2):
        blocks.release(sequence)
    taken = blocks.take(9, 4)
    assert taken == (4, 5, 6, 7)
    blocks.check_invariants()


def test_who_grows_takes_the_old_idle_block_beside_it_but_not_a_new_one() -> None:
    blocks = BlockAllocator(8)
    hold(blocks, 0, "aaaabbbb")
    for sequence, text in enumerate(("ccccdddd", "eeeeffff", "gggghhhh"), start=1):
        hold(blocks, sequence, text)
    for sequence in (1, 3, 2):
        blocks.release(sequence)
    assert blocks.take(0, 1) == (2,)  # of the older half, though not the oldest
    blocks.check_invariants()
    blocks = BlockAllocator(6)
    hold(blocks, 0, "aaaabbbb")
    hold(blocks, 1, "ccccdddd")
    hold(blocks, 2, "eeeeffff")
    for sequence in (2, 1):
        blocks.release(sequence)
    assert blocks.take(0, 1) == (5,)


def test_what_is_given_up_takes_what_follows_upon_it_along() -> None:
    blocks = BlockAllocator(10)
    hold(blocks, 1, "aaaabbbb")
    blocks.release(1)
    hold(blocks, 2, "aaaa")
    blocks.forget(2)
    assert (blocks.num_free, blocks.num_idle) == (9, 0)
    assert blocks.known(keys_of("aaaabbbb")) == (0, 0)
    blocks.check_invariants()


def test_of_two_that_computed_the_same_one_is_known() -> None:
    blocks = BlockAllocator(10)
    keys = keys_of("aaaabbbb")
    for sequence in (1, 2):
        blocks.take(sequence, 2)
    blocks.publish(1, keys[:1], 0)
    blocks.publish(2, keys, 0)
    blocks.check_invariants()
    blocks.release(1)
    assert blocks.known(keys) == (2, 1)
    blocks.take(3, 8)  # the beginning that was known is gone, and what followed upon it
    assert blocks.known(keys) == (0, 0)
    blocks.publish(2, keys, 2)
    assert blocks.known(keys) == (2, 2)
    blocks.check_invariants()


def test_a_stage_takes_an_opening_behind_blocks_that_are_full_here() -> None:
    fence = Fence(pipeline=1, epoch=1, block_size=BLOCK)

    def enter(sequence: int, at: int, count: int, blocks: tuple[int, ...], step: int) -> Drop | None:
        entry = Entry(sequence=sequence, start=at, count=count, opens=True, new_blocks=blocks)
        return fence.enter(step, [entry], {})

    assert enter(1, 0, 9, (5, 6, 7), 1) is None
    assert enter(2, 8, 2, (5, 6, 8), 2) is None
    assert enter(3, 12, 1, (5, 6, 7, 9), 3) is Drop.HOLE  # block 7 has one token
    assert enter(4, 8, 1, (5, 8, 9), 4) is Drop.HOLE  # another's block, half full
    assert enter(5, 7, 1, (5, 6), 5) is Drop.HOLE  # only whole blocks are shared
    assert enter(6, 0, 1, (6,), 6) is None  # its owner is gone: somebody else fills it
    assert enter(7, 8, 1, (5, 6, 9), 7) is Drop.HOLE
