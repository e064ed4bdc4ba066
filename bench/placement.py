"""How good placements are, against all there are, and how long planning takes.

    python -m bench.placement                            60 pools of up to 6 workers; 500 workers × 80 layers
    python -m bench.placement --pools 300 --seed 7 --json

For a small pool the brute force walks through every subset of the workers in every order with every cut, so it has
nothing in common with the search but the cost of a stage. Speeds, memory, sites, links and layers are random. For a
large pool there is no such figure: `ratio_to_bound` compares with a pool in which the embedding and the output
head go to a worker that has nothing else to do. Planning is pure computing; its seconds are the processor's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import mean
from typing import Any

from molink_common.messages import Dtype, ModelCard
from molink_scheduler.placement import Forecast, Link, Offer, Placement, PlacementSettings, place
from molink_scheduler.placement_sizes import Candidate, Roads, Sizes, candidates_of
from molink_scheduler.placement_times import least_time

DTYPE = Dtype.BFLOAT16
SETTINGS = PlacementSettings()
Bests = dict[tuple[int, int], float]
"""By slow crossings and stages: the shortest slowest stage or link, in seconds."""


def random_card(dice: random.Random, *, num_layers: int, alike: bool = False) -> ModelCard:
    """Between a small model and one of 70B; now and then with layers of two kinds."""
    parameters = int(10 ** dice.uniform(6.5, 9.0))
    large = 1 if alike else dice.choice((1, 1, 3))
    layers = tuple(parameters * (large if layer % 4 == 3 else 1) for layer in range(num_layers))
    hidden = dice.choice((576, 2048, 8192))
    vocabulary = dice.choice((32_000, 128_000))
    return ModelCard(
        name="Random",
        fingerprint="f" * 16,
        family="llama",
        packed=True,
        num_layers=num_layers,
        hidden_size=hidden,
        vocabulary_size=vocabulary,
        context_length=8192,
        checkpoint_dtype="bfloat16",
        layer_parameters=layers,
        embedding_parameters=hidden * vocabulary,
        output_parameters=hidden * vocabulary,
        kv_scalars_per_token=(hidden // 4,) * num_layers,
    )


def random_pool(
    dice: random.Random, card: ModelCard, *, workers: int, sites: int, measured: bool = True
) -> list[Offer]:
    """Mixed workers that hold the model one and a half to six times in sum, mostly not one of them alone."""
    sizes = Sizes(card, DTYPE, SETTINGS)
    needed = sizes.needed_bytes(0, card.num_layers, sizes.least_blocks)
    shares = [dice.uniform(0.2, 1.0) ** 2 for _ in range(workers)]
    plenty = dice.uniform(1.5, 6.0) * needed / sum(shares)
    names = [f"w{index}" for index in range(workers)]
    offers: list[Offer] = []
    for name, share in zip(names, shares, strict=True):
        links = []
        for peer in names:
            if measured and peer > name and dice.random() < 0.2:
                links.append(
                    Link(peer=peer, round_trip_s=10 ** dice.uniform(-4, -1), bytes_per_s=10 ** dice.uniform(6, 9))
                )
        offers.append(
            Offer(
                worker=name,
                memory_bytes=int(plenty * share) + SETTINGS.overhead_bytes,
                site=f"site{dice.randrange(sites)}",
                parameters_per_s=10 ** dice.uniform(9.3, 11.7),
                links=tuple(links),
            )
        )
    return offers


def brute_force(card: ModelCard, offers: Sequence[Offer], settings: PlacementSettings = SETTINGS) -> Bests:
    """The best of all orders of all subsets with all cuts. Empty where the model does not fit. Up to 6 workers."""
    sizes = Sizes(card, DTYPE, settings)
    roads = Roads(offers, sizes.step_bytes)
    bests: Bests = {}

    def follow(order: list[Candidate], rest: list[Candidate], reached: dict[int, float]) -> None:
        """`reached`: by the layers that the order holds, its slowest stage."""
        if card.num_layers in reached:
            crossings = sum(roads.crosses(a.offer, b.offer) for a, b in pairwise(order))
            slowest_s = max([reached[card.num_layers], *(roads.step_s(a.offer, b.offer) for a, b in pairwise(order))])
            key = (crossings, len(order))
            bests[key] = min(slowest_s, bests.get(key, slowest_s))
        for one in rest:
            further: dict[int, float] = {}
            for first, slowest_s in reached.items():
                for last in range(first + 1, card.num_layers + 1):
                    if sizes.needed_bytes(first, last, sizes.least_blocks) > one.room_bytes:
                        break
                    time_s = max(slowest_s, sizes.stage_s(one.pace, first, last))
                    if time_s < further.get(last, float("inf")):
                        further[last] = time_s
            if further:
                follow([*order, one], [other for other in rest if other is not one], further)

    follow([], _able(card, offers, sizes, settings), {0: 0.0})
    return bests


def bottleneck_s(card: ModelCard, offers: Sequence[Offer], placement: Placement) -> float:
    """Of the first pipeline, over the offers that hold a layer at all."""
    able = _able(card, offers, Sizes(card, DTYPE, SETTINGS), SETTINGS)
    forecast = Forecast(card, [one.offer for one in able], dtype=DTYPE, settings=SETTINGS)
    return forecast.bottleneck_s(placement.pipelines[0])


def _able(card: ModelCard, offers: Sequence[Offer], sizes: Sizes, settings: PlacementSettings) -> list[Candidate]:
    """A worker without room for a layer takes no part, also not in the median of the speeds."""
    least = sizes.smallest_layer_bytes + settings.overhead_bytes
    return candidates_of([one for one in offers if one.memory_bytes >= least], DTYPE, settings.overhead_bytes)


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    dice = random.Random(arguments.seed)
    large = (arguments.workers, arguments.layers)
    return {
        "seed": arguments.seed,
        "small": _small_pools(dice, arguments.pools),
        "medium": _pools(dice, arguments.large_pools, 30, arguments.layers, times=1, pipelines=1),
        "large": _pools(dice, arguments.large_pools, *large, times=20, pipelines=1),
        "large_four_pipelines": _pools(dice, 1, *large, times=20, pipelines=4),
    }


def _small_pools(dice: random.Random, pools: int) -> dict[str, Any]:
    ratios: list[float] = []
    seconds: list[float] = []
    disagree = crossings_more = 0
    for _ in range(pools):
        card = random_card(dice, num_layers=dice.randint(4, 28))
        offers = random_pool(dice, card, workers=dice.randint(2, 6), sites=dice.randint(1, 3))
        bests = brute_force(card, offers)
        began_s = time.process_time()
        placement = place(card, offers, dtype=DTYPE, settings=SETTINGS)
        seconds.append(time.process_time() - began_s)
        disagree += bool(bests) != bool(placement.pipelines)
        if bests and placement.pipelines:
            best_s = min(bests.values())
            ratios.append(bottleneck_s(card, offers, placement) / best_s)
            fewest = min(crossings for (crossings, _), slowest_s in bests.items() if slowest_s <= best_s * 1.024)
            roads = Roads(offers, 0)
            by_worker = {offer.worker: offer for offer in offers}
            chain = [by_worker[stage.worker] for stage in placement.pipelines[0].stages]
            crossings_more += sum(roads.crosses(a, b) for a, b in pairwise(chain)) > fewest
    return {
        "pools": pools,
        "placed": len(ratios),
        "fits_by_one_only": disagree,
        "ratio_worst": round(max(ratios), 4),
        "ratio_mean": round(mean(ratios), 4),
        "more_crossings_than_needed": crossings_more,
        "planning_worst_s": round(max(seconds), 4),
    }


def _pools(dice: random.Random, pools: int, workers: int, layers: int, *, times: int, pipelines: int) -> dict[str, Any]:
    """`times`: up to how many times as much memory as `random_pool` gives, for hundreds hold the model many times."""
    seconds: list[float] = []
    ratios: list[float] = []
    settings = PlacementSettings(max_pipelines=pipelines)
    for _ in range(pools):
        card = random_card(dice, num_layers=layers, alike=True)
        offers = [
            replace(one, memory_bytes=one.memory_bytes * dice.randint(1, times))
            for one in random_pool(dice, card, workers=workers, sites=max(2, workers // 25), measured=False)
        ]
        began_s = time.process_time()
        placement = place(card, offers, dtype=DTYPE, settings=settings)
        seconds.append(time.process_time() - began_s)
        if placement.pipelines:
            ratios.append(bottleneck_s(card, offers, placement) / _bound_s(card, offers))
    report: dict[str, Any] = {"workers": workers, "layers": layers, "pools": pools, "placed": len(ratios)}
    report |= {"planning_worst_s": round(max(seconds), 3), "planning_mean_s": round(mean(seconds), 3)}
    if pipelines == 1 and ratios:
        report |= {"ratio_to_bound_worst": round(max(ratios), 4), "ratio_to_bound_mean": round(mean(ratios), 4)}
    return report


def _bound_s(card: ModelCard, offers: Sequence[Offer]) -> float:
    """No bottleneck is shorter: every worker as in the middle of the model, whose layers are alike."""
    sizes = Sizes(card, DTYPE, SETTINGS)
    able = _able(card, offers, sizes, SETTINGS)

    def is_enough(most_s: float) -> bool:
        worth = [sizes.usual_reach(one, most_s, sizes.least_blocks) for one in able]
        return sum(sorted(worth)[-card.num_layers :]) >= card.num_layers

    tail_s = min(sizes.stage_s(one.pace, card.num_layers - 1, card.num_layers) for one in able)
    slowest_s = max(sizes.stage_s(one.pace, 0, card.num_layers) for one in able)
    return max(tail_s, least_time(is_enough, slowest_s))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.placement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pools", type=int, default=60, help="small pools, each compared with brute force")
    parser.add_argument("--large-pools", type=int, default=5)
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    chosen = parse(sys.argv[1:])
    outcome = main(chosen)
    print(json.dumps(outcome) if chosen.json else json.dumps(outcome, indent=2))
