"""The openai package for Python."""

from __future__ import annotations

from tests.clients.openai_python import chat, completions, refusals, responses, structured, tools
from tests.clients.reporting import Checks

checks = Checks("openai-python")
for part in (chat, completions, structured, tools, responses, refusals):
    part.add_to(checks)

if __name__ == "__main__":
    checks.run()
