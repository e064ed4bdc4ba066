"""The images install what pyproject.toml asks for, and torch only where it computes."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", ROOT / "deploy" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


requirements = _load("requirements")


@pytest.mark.parametrize("extra", ["gateway", "scheduler", "stage-worker"])
def test_the_core_is_part_of_every_image(extra: str) -> None:
    assert set(PYPROJECT["project"]["dependencies"]) <= set(requirements.requirements_of(PYPROJECT, extra))


def test_only_the_stage_worker_gets_torch() -> None:
    with_torch = [
        extra
        for extra in ("gateway", "scheduler", "stage-worker")
        if any(line.startswith("torch") for line in requirements.requirements_of(PYPROJECT, extra))
    ]
    assert with_torch == ["stage-worker"]


def test_a_change_elsewhere_in_pyproject_changes_nothing() -> None:
    changed = {**PYPROJECT, "tool": {}}
    assert requirements.requirements_of(changed, "gateway") == requirements.requirements_of(PYPROJECT, "gateway")


def test_an_unknown_extra_is_named() -> None:
    with pytest.raises(ValueError, match=r"no extra 'nonsense'.*gateway"):
        requirements.requirements_of(PYPROJECT, "nonsense")


def test_the_image_finds_the_pinned_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert sum(line.startswith("torch==") for line in lines) == 1
