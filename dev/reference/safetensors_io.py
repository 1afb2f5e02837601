"""Reads and writes safetensors files with numpy alone: 8 bytes of header length, a JSON header, the data.

Reads F32, BF16 (as float32) and I32, also BOOL and U8 (GPT-2's mask buffers); writes F32, I32 and BOOL.
"""

import json
import struct

import numpy as np

READ = {"F32": "<f4", "I32": "<i4", "BF16": "<u2", "BOOL": "?", "U8": "u1"}
WRITE = {"float32": ("F32", "<f4"), "int32": ("I32", "<i4"), "bool": ("BOOL", "?")}


def read(path):
    """(tensors by name in file order, metadata). ValueError names the file and what is wrong with it."""
    with open(path, "rb") as file:
        data = file.read()
    if len(data) < 8:
        raise ValueError(f"{path}: {len(data)} bytes, expected a safetensors file")
    header_size = struct.unpack("<Q", data[:8])[0]
    if header_size > len(data) - 8:
        raise ValueError(
            f"{path}: header of {header_size} bytes in a file of {len(data)}, the file is cut short"
        )
    header = json.loads(data[8 : 8 + header_size])
    metadata = header.pop("__metadata__", {})
    return {
        name: _tensor(path, name, entry, data[8 + header_size :]) for name, entry in header.items()
    }, metadata


def _tensor(path, name, entry, data):
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in READ:
        raise ValueError(f"{path}: {name} is {entry['dtype']}, expected one of {', '.join(READ)}")
    kind = np.dtype(READ[entry["dtype"]])
    size = int(np.prod(shape, dtype=object)) * kind.itemsize
    if not 0 <= begin <= end <= len(data) or end - begin != size:
        raise ValueError(
            f"{path}: {name} {list(shape)} at bytes {begin} to {end} of {len(data)}, expected {size} bytes"
        )
    values = np.frombuffer(data[begin:end], dtype=kind).reshape(shape)
    if entry["dtype"] == "BF16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.copy()


def write(path, tensors, metadata=None):
    """Writes arrays by name in the order given. float64 is stored as F32, integers as I32."""
    header, blobs, offset = {}, [], 0
    if metadata:
        header["__metadata__"] = {key: str(value) for key, value in metadata.items()}
    for name, values in tensors.items():
        values = np.asarray(values)
        kind = {"f": "float32", "i": "int32", "b": "bool"}[values.dtype.kind]
        label, stored = WRITE[kind]
        blob = values.astype(stored).tobytes()
        header[name] = {
            "dtype": label,
            "shape": list(values.shape),
            "data_offsets": [offset, offset + len(blob)],
        }
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))
