"""A process takes the environment for large pages by beginning again, once, as what it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from molink_common.large_pages import LARGE_PAGES

CODE = """
import json, os, sys
from molink_common.large_pages import begin_again_with_large_pages
print("begun", flush=True)
begin_again_with_large_pages()
print(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))
"""


def lines_of(environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "one", "--two"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="nothing to gain elsewhere")
def test_it_begins_again_once_with_its_arguments() -> None:
    without = {name: value for name, value in os.environ.items() if name not in LARGE_PAGES}
    *begun, last = lines_of(without)
    said = json.loads(last)
    assert begun == ["begun", "begun"]
    assert said["arguments"] == ["one", "--two"]
    assert said["environment"].items() >= LARGE_PAGES.items()


def test_what_somebody_has_chosen_stays() -> None:
    chosen = {**os.environ, **LARGE_PAGES, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    begun, last = lines_of(chosen)
    assert begun == "begun"
    assert json.loads(last)["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"
