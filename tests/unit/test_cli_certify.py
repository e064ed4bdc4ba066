"""The verdict of `molink certify`, and what the comparison with the whole model reports."""

from __future__ import annotations

import torch

from molink.certify import PROMPTS, judge
from molink_stage_worker.reference import compare

SAME = {"first_differing": None}
OTHER = {"first_differing": 3, "token": 5, "whole_model_token": 6, "margin": 0.01}


def test_all_the_same_is_identical() -> None:
    verdict = judge([{"answers": [SAME, SAME]}, {"answers": [SAME, SAME]}])
    assert verdict == {"identical": True, "prompts": 2, "differing": 0, "differences": []}


def test_a_prompt_that_differs_in_both_rounds_counts_once() -> None:
    verdict = judge([{"answers": [SAME, SAME]}, {"answers": [OTHER, OTHER]}, {"answers": [SAME, OTHER]}])
    assert (verdict["identical"], verdict["prompts"], verdict["differing"]) == (False, 3, 2)
    assert verdict["differences"][0] == {"prompt": PROMPTS[1], "round": "alone", **OTHER}
    assert verdict["differences"][2] == {"prompt": PROMPTS[2], "round": "together", **OTHER}


def test_the_first_differing_token_and_its_margin() -> None:
    logits = [torch.tensor([0.0, 2.0, 1.5]), torch.tensor([3.0, 1.0, 0.0])]
    assert compare([1, 0], [1, 0], logits) == {"first_differing": None}
    assert compare([1, 2], [1, 0], logits) == {
        "first_differing": 1,
        "token": 2,
        "whole_model_token": 0,
        "margin": 3.0,
    }


def test_the_built_in_prompts_are_twenty_and_different() -> None:
    assert len(set(PROMPTS)) == 20
