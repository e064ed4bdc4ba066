"""A process takes the memory environment by beginning again, once, as what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molink_common.memory import MEMORY_ENVIRONMENT

CODE = """
import json, os, sys
from molink_common.memory import begin_again_with_memory_environment
print("begun", flush=True)
begin_again_with_memory_environment()
print(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))
"""


def lines_of(environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "one", "--two"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="nothing to gain elsewhere")
def test_it_begins_again_once_with_its_arguments() -> None:
    without = {name: value for name, value in os.environ.items() if name not in MEMORY_ENVIRONMENT}
    *begun, last = lines_of(without)
    said = json.loads(last)
    assert begun == ["begun", "begun"]
    assert said["arguments"] == ["one", "--two"]
    assert said["environment"].items() >= MEMORY_ENVIRONMENT.items()


def test_what_somebody_has_chosen_stays() -> None:
    chosen = {**os.environ, **MEMORY_ENVIRONMENT, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    begun, last = lines_of(chosen)
    assert begun == "begun"
    assert json.loads(last)["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


def test_what_lives_is_not_looked_at_again_and_is_freed_all_the_same() -> None:
    code = """
import gc, weakref
from molink_common.memory import spare_what_lives
class Engine: pass
engine = Engine()
engine.weights = [object() for _ in range(1000)]
gone = weakref.ref(engine)
spare_what_lives()
print(len(gc.get_objects()) < 100, gc.get_freeze_count() > 1000)
del engine
print(gone() is None)
"""
    assert _said(code) == ["True", "True", "True"]


def test_a_cycle_that_was_spared_is_found_when_all_is_looked_at() -> None:
    code = """
import gc, weakref
from molink_common.memory import collect_all, spare_what_lives
class Engine: pass
engine = Engine()
engine.itself = engine
gone = weakref.ref(engine)
spare_what_lives()
del engine
gc.collect()
print(gone() is None)
collect_all()
print(gone() is None)
"""
    assert _said(code) == ["False", "True"]


def _said(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_image_asks_for_memory_as_everybody_does() -> None:
    dockerfile = (Path(__file__).parents[2] / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    for name, value in MEMORY_ENVIRONMENT.items():
        assert f"{name}={value}" in dockerfile
