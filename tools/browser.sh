#!/usr/bin/env bash
# Chromium for tests/test_report_browser.py: there already, or installed as root by apt-get, or a word on how.
set -euo pipefail
if command -v chromium >/dev/null; then
  exit 0
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
else
  echo "No chromium here: the browser tests will be skipped. As root: apt-get install chromium" >&2
fi
