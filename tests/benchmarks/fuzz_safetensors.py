"""`make fuzz`: the safetensors reader against files that are broken on purpose. One JSON line last.

Each case is a small valid file with one to three harms, drawn from its number alone, so a case can be made again. The
reader must answer with its entries or with one BadInput line; what it accepts the reference implementation must accept
with the same tensors. Large hostile headers are read in a process of their own, whose memory is measured.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from mansard.errors import BadInput
from mansard.store.safetensors_header import DTYPE_BITS, parse_safetensors_header

CASES = 10_000
LARGE_BYTES = 32 << 20
MAX_MESSAGE = 900
"""Characters of a refusal, the path not counted: one line that a person reads."""
ODD = (
    -1, -8, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 0.0, 1.5, True, None, "8", [], {}, [0], float("nan"), float("inf"),
)  # fmt: skip

Tree = dict[str, Any]


@dataclass
class Found:
    """What a campaign saw; `crashes` and `disagreements` are numbers of cases with what happened."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)


def valid(draw: random.Random) -> tuple[Tree, bytes]:
    """A header that tiles its data, and the data."""
    tree: Tree = {}
    position = 0
    for number in range(draw.randrange(5)):
        dtype = draw.choice(sorted(d for d, bits in DTYPE_BITS.items() if bits >= 8))
        shape = [draw.randrange(4) for _ in range(draw.randrange(4))]
        size_bytes = DTYPE_BITS[dtype] // 8
        for length in shape:
            size_bytes *= length
        name = draw.choice(["w", "é.", "model.layers.", "x" * 300, '"', "\\"]) + str(number)
        tree[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size_bytes]}
        position += size_bytes
    if draw.random() < 0.5:
        tree["__metadata__"] = {"format": "pt", "é": "\n"}
    return tree, draw.randbytes(position)


def odd_number(tree: Tree, draw: random.Random) -> None:
    """An offset, length, type or key that is none."""
    name = draw.choice(sorted(tree) or ["w"])
    entry = tree.setdefault(name, {})
    if not isinstance(entry, dict):
        return
    key = draw.choice(["shape", "data_offsets", "dtype", "more", "format"])
    if isinstance(entry.get(key), list) and entry[key] and draw.random() < 0.7:
        entry[key][draw.randrange(len(entry[key]))] = draw.choice(ODD)
    else:
        entry[key] = draw.choice(ODD)


def moved(tree: Tree, draw: random.Random) -> None:
    """Offsets that overlap, leave holes, run backwards or past the end."""
    for name in draw.sample(sorted(tree), k=min(len(tree), 1 + draw.randrange(2))):
        entry = tree[name]
        if isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            shift = draw.choice([-9, -8, -1, 1, 4, 8, 2**40])
            kind = draw.randrange(3)
            offsets = [o + shift if isinstance(o, int) else o for o in entry["data_offsets"]]
            entry["data_offsets"] = [offsets, offsets[::-1], entry["data_offsets"][::-1]][kind]


def missing(tree: Tree, draw: random.Random) -> None:
    """A tensor, or a key of one, is gone."""
    if tree:
        name = draw.choice(sorted(tree))
        if isinstance(tree[name], dict) and tree[name] and draw.random() < 0.7:
            tree[name].pop(draw.choice(sorted(tree[name])))
        else:
            del tree[name]


def strange_name(tree: Tree, draw: random.Random) -> None:
    """Half a surrogate pair, an empty name, a very long one, metadata that is none."""
    name = draw.choice(["\ud800", "", "y" * 5000, "__metadata__", "\0"])
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    tree[name] = draw.choice([empty, {"k": 1}, [], "x", {"k": "\udfff"}])


TREE_HARMS: tuple[Callable[[Tree, random.Random], None], ...] = (odd_number, moved, missing, strange_name)


def cut(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw) + 1)]


def longer(raw: bytes, draw: random.Random) -> bytes:
    return raw + draw.randbytes(draw.randrange(1, 20))


def flipped(raw: bytes, draw: random.Random) -> bytes:
    """Some bytes anywhere are others, the length too."""
    changed = bytearray(raw)
    for _ in range(draw.randrange(1, 4)):
        if changed:
            changed[draw.randrange(min(len(changed), draw.choice([8, 64, len(changed)])))] = draw.randrange(256)
    return bytes(changed)


def another_length(raw: bytes, draw: random.Random) -> bytes:
    """The header claims to be huge, or a little longer or shorter."""
    claimed = int.from_bytes(raw[:8], "little")
    other = draw.choice([claimed + 1, max(claimed - 1, 0), 0, 100_000_000, 100_000_001, 2**63, 2**64 - 1])
    return min(other, 2**64 - 1).to_bytes(8, "little") + raw[8:]


def with_header(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """Change the header's text and keep its length true."""

    def changed(raw: bytes, draw: random.Random) -> bytes:
        end = 8 + min(int.from_bytes(raw[:8], "little"), len(raw))
        text = change(raw[8:end], draw)
        return len(text).to_bytes(8, "little") + text + raw[end:]

    return changed


def inserted(text: bytes, draw: random.Random) -> bytes:
    """Pieces of JSON, bytes that are no UTF-8, and deep nesting, in the middle of the header."""
    piece = draw.choice(
        [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\0", b" ",
         b"1e3", b"NaN", b"-", b'{"a":' * 5000, b"[" * 50_000, b'"k":' * 3, b"9" * 5000, b"null"]
    )  # fmt: skip
    place = draw.randrange(len(text) + 1)
    return text[:place] + piece + text[place + draw.randrange(3) :]


def doubled(text: bytes, draw: random.Random) -> bytes:
    """The same names twice."""
    return text.rstrip()[:-1] + b"," + text.lstrip()[1:] if len(text) > 3 else text + text


def blanks(text: bytes, draw: random.Random) -> bytes:
    """White space that JSON allows, or does not."""
    spot = draw.randrange(len(text) + 1)
    return text[:spot] + draw.choice([b" ", b"\n\t", b"\r", b"\x0b", b"\xc2\xa0"]) * draw.randrange(1, 4) + text[spot:]


RAW_HARMS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    cut, longer, flipped, another_length, with_header(inserted), with_header(doubled), with_header(blanks),
)  # fmt: skip


def case(number: int) -> bytes:
    """The file of a case."""
    draw = random.Random(number)
    tree, data = valid(draw)
    for _ in range(draw.randrange(3)):
        draw.choice(TREE_HARMS)(tree, draw)
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.5, separators=draw.choice([(",", ":"), (", ", ": ")]))
    header = text.encode(errors="surrogatepass")
    raw = len(header).to_bytes(8, "little") + header + data
    for _ in range(draw.randrange(3)):
        raw = draw.choice(RAW_HARMS)(raw, draw)
    return raw


def try_case(number: int, path: Path, found: Found) -> None:
    """Read the case's file; whatever is not an answer is written down."""
    raw = case(number)
    path.write_bytes(raw)
    found.cases += 1
    try:
        _, entries = parse_safetensors_header(path)
    except BadInput as refusal:
        found.refused += 1
        told = str(refusal)
        if not told.startswith(str(path)) or not told.isprintable() or len(told) > len(str(path)) + MAX_MESSAGE:
            found.crashes.append(f"case {number}: not one clear line: {told!r:.200}")
        return
    except Exception as error:  # noqa: BLE001 - anything else is what the campaign looks for
        found.crashes.append(f"case {number}: {type(error).__name__}: {error!s:.200}")
        return
    found.accepted += 1
    try:
        reference = {name: (t["dtype"], tuple(t["shape"]), len(t["data"])) for name, t in deserialize(raw)}
    except SafetensorError as error:
        found.disagreements.append(f"case {number}: the reference refuses it: {error!s:.200}")
        return
    ours = {e.name: (e.dtype, e.shape, e.size_bytes) for e in entries}
    if {n: (d.upper(), s, b) for n, (d, s, b) in reference.items()} != ours:
        found.disagreements.append(f"case {number}: the reference reads other tensors")


def campaign(cases: int) -> Found:
    found = Found()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(cases):
            try_case(number, Path(folder) / "case.safetensors", found)
    return found


def large_headers(size_bytes: int) -> dict[str, Callable[[], bytes]]:
    """Headers of about this size that would be many times larger as Python objects."""
    entry = b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    long_shape = b'{"a":{"dtype":"U8","shape":['
    return {
        "lists": lambda: b'{"a":[' + b"[]," * (size_bytes // 3) + b"0]}",
        "objects": lambda: b'{"a":[' + b"{}," * (size_bytes // 3) + b"0]}",
        "pairs": lambda: b"{" + b",".join(b'"%x":1' % i for i in range(size_bytes // 10)) + b"}",
        "numbers": lambda: long_shape + b"9999," * (size_bytes // 5) + b'0],"data_offsets":[0,0]}}',
        "metadata": lambda: b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(size_bytes // 10)) + b"}}",
        "tensors": lambda: b"{" + b",".join(entry % i for i in range(size_bytes // 56)) + b"}",
        "name": lambda: b'{"' + b"x" * size_bytes + b'":1}',
        "depth": lambda: b'{"a":' * (size_bytes // 5),
        "no UTF-8": lambda: b'{"' + b"\xe9" * size_bytes,
    }


READ = """
import re, sys
from pathlib import Path
from mansard.errors import BadInput
from mansard.store.safetensors_header import parse_safetensors_header
def peak():  # of this program alone; getrusage's began with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
try:
    parse_safetensors_header(Path(sys.argv[1]))
except BadInput as error:
    assert len(str(error)) < 2000 and str(error).isprintable(), "not one clear line"
print(peak() - before)
"""


def largest_growth(size_bytes: int) -> dict[str, float]:
    """Peak memory over the header's bytes, by kind."""
    grown = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.safetensors"
        for kind, header in large_headers(size_bytes).items():
            raw = header()
            path.write_bytes(len(raw).to_bytes(8, "little") + raw)
            done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
            grown[kind] = round(int(done.stdout) / len(raw), 1)
    return grown


def main() -> None:
    begun = time.monotonic()
    found = campaign(CASES)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    grown = largest_growth(LARGE_BYTES)
    for line in (*found.crashes, *found.disagreements):
        print(line)
    for kind, ratio in grown.items():
        print(f"header of {LARGE_BYTES >> 20} MiB, {kind}: reading it took {ratio} times its bytes")
    result = {
        "cases": found.cases,
        "accepted": found.accepted,
        "refused": found.refused,
        "crashes": len(found.crashes),
        "disagreements": len(found.disagreements),
        "peak_mb": round(peak_mb, 1),
        "large_header_ratio": max(grown.values()),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(result))
    sys.exit(1 if found.crashes or found.disagreements else 0)


if __name__ == "__main__":
    main()
