#!/bin/sh
# Install the agents of tests/agents: install.sh DIRECTORY. Nothing is done twice; the pins decide.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"

pins=$(cat "$here/requirements.txt" "$here/requirements-older.txt" "$here/package.json" "$here/install.sh" | sha256sum)
if [ "$(cat ready 2>/dev/null)" = "$pins" ]; then exit 0; fi
rm -f ready

for name in requirements requirements-older; do
    [ -x "$name/bin/python" ] || "${PYTHON:-python3}" -m venv "$name"
    "$name/bin/python" -m pip install -q --disable-pip-version-check -r "$here/$name.txt"
done

if command -v npm >/dev/null; then
    mkdir -p node
    cp "$here/package.json" node/package.json
    # The two packages whose script puts the binary of this platform in place; no other script runs.
    if ! npm install --prefix node --ignore-scripts --no-audit --no-fund --no-package-lock --loglevel error \
        --fetch-timeout 60000 --fetch-retries 1; then
        echo "npm cannot install the coding CLIs of tests/agents here: they will be skipped" >&2
        rm -rf node
        pins="without npm"  # to be tried again
    else
        (cd node/node_modules/@anthropic-ai/claude-code && node install.cjs)
        (cd node/node_modules/opencode-ai && node postinstall.mjs)
    fi
else
    echo "no npm here: the coding CLIs of tests/agents will be skipped" >&2
fi
echo "$pins" >ready
