#!/usr/bin/env bash
# Lint and tests in .venv, made if there is none:  bash runs/test.sh [--slow] [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
# torch first and alone, so that no other package chooses its version; bytecode is made of what is
# imported, not of every file of every package: a minute less
install=".venv/bin/pip install -q --disable-pip-version-check --no-compile"
$install "$(grep '^torch==' requirements.txt)"
$install -r requirements-dev.txt
.venv/bin/ruff check .
# three processes, for tests that start ranks wait a lot. A file stays in one, for its fixtures
.venv/bin/python -m pytest -q -n 3 --dist loadfile "$@"
