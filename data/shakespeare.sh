#!/bin/sh
# Fetches tiny Shakespeare (1.1 MB) into data/tinyshakespeare.txt, for --data data/tinyshakespeare.txt.
set -eu

url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
bytes=1115394
file=$(dirname "$0")/tinyshakespeare.txt

fail() {
    rm -f "$file.part"
    echo "$1" >&2
    exit 2
}

if [ -f "$file" ]; then
    echo "$file: already there"
    exit 0
fi
trap 'fail "$file: interrupted"' INT TERM

if command -v curl >/dev/null; then
    curl --fail --silent --location --connect-timeout 20 --output "$file.part" "$url" || got=no
elif command -v wget >/dev/null; then
    wget --quiet --tries=2 --timeout=20 --output-document="$file.part" "$url" || got=no
else
    fail "$file: neither curl nor wget is installed, install one or save $url under this name"
fi
[ "${got-yes}" = yes ] || fail "$file: cannot fetch $url, check the network and try again"
found=$(wc -c < "$file.part")
[ "$found" -eq "$bytes" ] || fail "$file: $found bytes came from $url, expected $bytes, try again"
mv "$file.part" "$file"
echo "$file: $bytes bytes"
