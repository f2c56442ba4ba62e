#!/usr/bin/env bash
# Every test of the workspace, with nextest where it is installed; then the documentation's.
set -euo pipefail
if cargo nextest --version >/dev/null 2>&1; then
  cargo nextest run --locked --workspace --no-fail-fast
else
  cargo test --locked --workspace --no-fail-fast --lib --bins --tests
fi
cargo test --locked --workspace --doc --quiet
