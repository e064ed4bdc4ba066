"""A stage by itself: what it loads, what it refuses, and that sequences cannot harm each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from molink_common.errors import ModelError, ProtocolError
from molink_common.wire import Entry, Logits
from molink_stage_worker.engine.interface import Engine
from molink_stage_worker.engine.loading import load_engine
from tests.architectures.staggered_run import tiny_spec
from tests.architectures.tiny_models import NUM_LAYERS, make_tiny_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_model("llama", folder)
    return folder


@pytest.fixture(params=["llama", "stablelm"], scope="module")
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Both kinds of engine."""
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_model(request.param, folder)
    return load_engine(tiny_spec(folder, 0, NUM_LAYERS, NUM_LAYERS))


def entry(sequence: int, start: int, count: int, *blocks: int, logits: Logits = Logits.LAST) -> Entry:
    return Entry(sequence=sequence, start=start, count=count, opens=start == 0, logits=logits, new_blocks=blocks)


def logits_of(engine: Engine, entries: list[Entry], token_ids: list[int]) -> torch.Tensor:
    logits_RV = engine.run(entries, (), token_ids=token_ids).logits_RV
    assert logits_RV is not None
    return logits_RV


def test_stages_share_the_weights_of_the_whole(checkpoint: Path) -> None:
    sizes = [load_engine(tiny_spec(checkpoint, at, at + 1, NUM_LAYERS)).weight_bytes for at in range(NUM_LAYERS)]
    whole_bytes = load_engine(tiny_spec(checkpoint, 0, NUM_LAYERS, NUM_LAYERS)).weight_bytes
    rotary_bytes = 2 * 4 * 4
    assert abs(sum(sizes) - whole_bytes) <= 3 * rotary_bytes
    assert sizes[1] == sizes[2]
    assert sizes[0] > sizes[1] < sizes[3]


def test_only_the_stages_tensors_need_to_be_there(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    save_file(own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    load_engine(tiny_spec(tmp_path, 1, 2, NUM_LAYERS))
    with pytest.raises(ModelError, match=r"lacks \d+ tensors of this stage"):
        load_engine(tiny_spec(tmp_path, 1, 3, NUM_LAYERS))


def test_progress_ends_at_one(checkpoint: Path) -> None:
    shares: list[float] = []
    load_engine(tiny_spec(checkpoint, 0, 2, NUM_LAYERS), shares.append)
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("token_ids", "says"),
    [(None, "takes token ids"), ([5], "1 token ids for 2 tokens"), ([5, 128], "vocabulary"), ([5, -1], "vocabulary")],
)
def test_bad_token_ids_are_refused_and_change_nothing(whole: Engine, token_ids: list[int] | None, says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        whole.run([entry(1, 0, 2, 0)], (), token_ids=token_ids)
    with pytest.raises(ProtocolError, match="not known"):
        whole.run([Entry(sequence=1, start=2, count=1)], (), token_ids=[5])


@pytest.mark.parametrize("hidden", [None, memoryview(b""), memoryview(bytes(32 * 4 - 1))])
def test_bad_hidden_states_are_refused(checkpoint: Path, hidden: memoryview | None) -> None:
    middle = load_engine(tiny_spec(checkpoint, 1, 2, NUM_LAYERS))
    with pytest.raises(ProtocolError, match="hidden states"):
        middle.run([entry(1, 0, 1, 0)], (), hidden=hidden)


def test_a_step_without_entries_only_forgets(whole: Engine, checkpoint: Path) -> None:
    output = whole.run((), [123])
    assert output.logits_RV is not None
    assert output.logits_RV.shape == (0, 128)
    middle = load_engine(tiny_spec(checkpoint, 1, 2, NUM_LAYERS))
    assert middle.run((), ()).hidden is not None


def test_going_back_gives_what_going_straight_gives(whole: Engine) -> None:
    straight = logits_of(whole, [entry(1, 0, 6, 0, 1, logits=Logits.ALL)], [5, 6, 7, 8, 9, 10])
    logits_of(whole, [entry(2, 0, 6, 2, 3)], [5, 6, 7, 99, 98, 97])
    again = logits_of(whole, [entry(2, 3, 3, logits=Logits.ALL)], [8, 9, 10])
    torch.testing.assert_close(again, straight[3:], atol=1e-4, rtol=1e-4)
    whole.run((), [1, 2])


def test_a_sequence_on_anothers_prefix_gives_what_it_gives_alone(checkpoint: Path) -> None:
    engine = load_engine(tiny_spec(checkpoint, 0, NUM_LAYERS, NUM_LAYERS))
    alone = logits_of(engine, [entry(1, 0, 7, 4, 6)], [5, 6, 7, 8, 9, 10, 11])
    sharing = Entry(sequence=2, start=4, count=3, opens=True, logits=Logits.LAST, new_blocks=(4, 9))
    torch.testing.assert_close(logits_of(engine, [sharing], [9, 10, 11]), alone, atol=1e-4, rtol=1e-4)


def test_what_a_former_owner_left_in_a_block_is_never_seen(checkpoint: Path) -> None:
    """Not even NaN, in a group whose shorter sequences are padded."""
    engine = load_engine(tiny_spec(checkpoint, 1, 2, NUM_LAYERS))
    poison = memoryview(torch.full((12, 32), float("nan")).numpy().tobytes())
    engine.run([entry(1, 0, 12, 0, 1, 2)], (), hidden=poison)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(24, 32, generator=generator)

    def run(entries: list[Entry], rows: torch.Tensor) -> torch.Tensor:
        hidden = engine.run(entries, [1], hidden=memoryview(rows.numpy().tobytes())).hidden
        assert hidden is not None
        return torch.frombuffer(bytearray(hidden), dtype=torch.float32).view(-1, 32)

    run([entry(2, 0, 2, 0), entry(3, 0, 9, 1, 7, 2)], states[:11])
    together = run([entry(2, 2, 1), entry(3, 9, 1)], states[11:13])
    assert bool(torch.isfinite(together).all())
    run([entry(4, 0, 2, 10)], states[:2])
    alone = run([entry(4, 2, 1)], states[11:12])
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


def test_families_without_shared_prefixes_say_so(tmp_path: Path) -> None:
    make_tiny_model("mamba", tmp_path)
    engine = load_engine(tiny_spec(tmp_path, 0, NUM_LAYERS, NUM_LAYERS))
    with pytest.raises(ProtocolError, match="share no prefixes"):
        engine.run([Entry(sequence=1, start=4, count=1, opens=True, new_blocks=(0, 1))], (), token_ids=[5])
    engine.run([entry(1, 0, 3, 0)], (), token_ids=[5, 6, 7])
    with pytest.raises(ProtocolError, match="only go on"):
        engine.run([Entry(sequence=1, start=1, count=1)], (), token_ids=[5])
