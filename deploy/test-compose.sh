#!/bin/sh
# Build the images, bring the system up as containers, use it, hurt it, take it down again (see compose_check.py).
exec python3 "$(dirname "$0")/compose_check.py" "$@"
