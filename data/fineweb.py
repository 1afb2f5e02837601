#!/usr/bin/env python3
"""Fetches FineWeb-Edu, tokenised with GPT-2's vocabulary, as token shards, and the tokenizer.

    python3 data/fineweb.py [N]

N is the number of training shards, 1 to 99 (default 1). A shard has 100 million tokens and takes 200 MB; all
of them are 10 billion. They go to data/fineweb/, with one shard for validation, for

    --data 'data/fineweb/finewebedu_train_*.bin' --val-data 'data/fineweb/finewebedu_val_*.bin' \\
    --tokenizer data/fineweb/gpt2_tokenizer.bin

What is there is not fetched again, and what was interrupted goes on where it stopped.
"""
import http.client
import os
import struct
import sys
import urllib.error
import urllib.request

SHARDS = "https://huggingface.co/datasets/kjj0/finewebedu10B-gpt2/resolve/main/"
TOKENIZER = "https://huggingface.co/datasets/karpathy/llmc-starter-pack/resolve/main/"
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fineweb")
MOST_SHARDS = 99
HEADER = 256 * 4


def fail(message):
    sys.exit(print(message, file=sys.stderr) or 2)


def check(path):
    """What is wrong with a fetched file, or None: an error page must not pass for data."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header = file.read(HEADER)
    if len(header) < HEADER:
        return f"{size} bytes, less than a header"
    magic, version, count = struct.unpack("<3I", header[:12])
    if magic == 20240520 and version == 1:
        return None if size == HEADER + 2 * count else f"{size} bytes, expected {HEADER + 2 * count}"
    return None if magic == 20240328 else f"magic number {magic}, expected a token shard or a tokenizer"


def download(url, part, name):
    """Appends to part what it lacks of url."""
    have = os.path.getsize(part) if os.path.exists(part) else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=30) as answer:
        if have and answer.status != 206:       # the server starts from the beginning
            have = 0
        left = answer.headers.get("Content-Length")
        total = have + int(left) if left else None
        with open(part, "ab" if have else "wb") as file:
            while block := answer.read(1 << 20):
                file.write(block)
                have += len(block)
                if sys.stdout.isatty():
                    print(f"\r{name}: {have >> 20} of {(total or have) >> 20} MB", end="", flush=True)
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke after {have} of {total} bytes")


def fetch(base, name):
    path = os.path.join(FOLDER, name)
    part = path + ".part"
    if os.path.exists(path):
        print(f"{path}: already there")
        return
    try:
        os.makedirs(FOLDER, exist_ok=True)
        try:
            download(base + name, part, name)
        except urllib.error.HTTPError as error:
            if error.code != 416:               # 416: part is whole already
                raise
        wrong = check(part)
        if wrong:
            os.remove(part)
            clean_up()
            fail(f"{path}: {wrong}; removed, try again")
        os.rename(part, path)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        clean_up()
        fail(f"{path}: cannot be fetched from {base + name}: {reason}; try again, it goes on from there")
    print(f"\r{path}: {os.path.getsize(path)} bytes")


def clean_up():
    """Leaves no empty folder behind when nothing was fetched at all."""
    try:
        os.rmdir(FOLDER)
    except OSError:
        pass


def main():
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return
    number = arguments[0] if arguments else "1"
    if len(arguments) > 1 or not number.isdecimal() or not 1 <= int(number) <= MOST_SHARDS:
        fail(f"{' '.join(arguments)}: expected the number of training shards, 1 to {MOST_SHARDS}")
    fetch(TOKENIZER, "gpt2_tokenizer.bin")
    fetch(SHARDS, "finewebedu_val_000000.bin")
    for k in range(1, int(number) + 1):
        fetch(SHARDS, f"finewebedu_train_{k:06d}.bin")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("\ninterrupted; the next call goes on from here")
