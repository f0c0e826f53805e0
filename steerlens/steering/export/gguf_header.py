"""The lengths that a GGUF file claims, seen before the reader believes them."""

import struct

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4


def check_lengths(content: bytes) -> None:
    """Raise `ValueError` when a header claims more than the file holds, or a key occurs twice.

    The `gguf` package loops over what a header claims, for ever if that is 2^60 numbers. Format:
    magic, version, numbers of tensors and of keys; keys with type and value; little-endian.
    """
    if content[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    n_tensors, n_keys = _number(content, 8, "Q"), _number(content, 16, "Q")
    if n_tensors > len(content) or n_keys > len(content):
        raise ValueError(f"it claims {n_tensors} tensors and {n_keys} keys in {len(content)} bytes")
    at = 24
    keys: set[bytes] = set()
    for _ in range(n_keys):
        start, at = at + 8, _skip_string(content, at)
        key = content[start:at]
        if key in keys:
            raise ValueError(f"its key {key.decode('utf-8', 'backslashreplace')!r} occurs twice")
        keys.add(key)
        at = _skip_value(content, at + 4, _number(content, at, "I"))


def _skip_value(content: bytes, at: int, kind: int, depth: int = 0) -> int:
    if kind == _STRING:
        return _skip_string(content, at)
    if kind == _ARRAY:
        if depth == _MAX_DEPTH:
            raise ValueError("its arrays are nested too deep")
        inner, count = _number(content, at, "I"), _number(content, at + 4, "Q")
        at += 12
        if inner in _SIZES:
            return _within(content, at, count * _SIZES[inner])
        if count > len(content) - at:
            raise ValueError(f"it claims an array of {count} in {len(content) - at} bytes")
        for _ in range(count):
            at = _skip_value(content, at, inner, depth + 1)
        return at
    if kind not in _SIZES:
        raise ValueError(f"it has a value of the unknown type {kind}")
    return _within(content, at, _SIZES[kind])


def _skip_string(content: bytes, at: int) -> int:
    return _within(content, at + 8, _number(content, at, "Q"))


def _number(content: bytes, at: int, kind: str) -> int:
    size = struct.calcsize(kind)
    _within(content, at, size)
    return int(struct.unpack_from(f"<{kind}", content, at)[0])


def _within(content: bytes, at: int, size: int) -> int:
    """The place behind `size` bytes at `at`."""
    if at + size > len(content):
        raise ValueError(f"it claims {size} bytes where {max(len(content) - at, 0)} are left")
    return at + size
