#!/usr/bin/env bash
# Every test of the workspace, with nextest where it is installed; then the documentation's.
set -euo pipefail
if ! command -v redis-server >/dev/null; then
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "test: installing redis-server" >&2
    apt-get update -qq && apt-get install -y -qq redis-server >/dev/null
  else
    echo "test: no redis-server: run 'sudo apt-get install redis-server' or your system's equivalent" >&2
    exit 1
  fi
fi
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run --locked --workspace --no-fail-fast
else
  cargo test --locked --workspace --no-fail-fast --lib --bins --tests
fi
cargo test --locked --workspace --doc --quiet
