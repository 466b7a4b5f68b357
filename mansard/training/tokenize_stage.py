"""Stage `tokenize`: one text -> packed rows in shards, once for every training that reads it with the same tokenizer.

Inputs: `data.NAME.PART` (a snapshot of data.jsonl) and `tokenizer` (`mansard.models.tokenizer_files`: a base's and its
upgrades' are one). Spec: {"sequence_tokens", "seed"}. Documents are shuffled by the seed, each ends with EOS and every
segment starts with BOS, where the tokenizer has them. Makes what shards.py describes. In memory are a batch of
documents, a shuffled index (16 bytes a document) and a chunk of rows; token ids wait in the work folder. A killed one
begins again.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mansard.errors import BadInput
from mansard.models.loading import load_tokenizer
from mansard.models.vocabulary import end_of
from mansard.records import SnapshotId
from mansard.store.snapshot import Blob
from mansard.store.stream import file_chunks
from mansard.training.data import each_text
from mansard.training.packing import Rows, packed_rows
from mansard.training.shards import write_shards
from mansard.training.sources import TEXT_FILE
from mansard.training.tokens import tokenized

if TYPE_CHECKING:
    from mansard.worker import StageContext

CODE_VERSION = 2
PACKAGES = ("numpy", "tokenizers", "transformers")


def run(context: "StageContext") -> SnapshotId:
    name, text = next((n, s) for n, s in context.inputs.items() if n.startswith("data."))
    source, row_tokens = name.removeprefix("data.").rpartition(".")[0], int(context.spec["sequence_tokens"])
    output, spool = context.work / "shards", context.work / "ids"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # its order of results does not depend on it
    with context.store.using(context.inputs["tokenizer"]) as tree:
        tokenizer = load_tokenizer(tree)
        found = tokenized(_texts(context, name, text), tokenizer, spool)
    special = [t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None]
    if not len(found.ids):
        raise BadInput(f"{name}: the tokenizer makes no token of its {found.size_bytes} bytes; name other text")
    documents = found.shuffled(f"{context.spec['seed']}:{source}", end_of(tokenizer))
    chunks = _told(context, packed_rows(documents, row_tokens, tokenizer.bos_token_id), name, len(found.ids))
    facts = {
        "made_with": {"seed": context.spec["seed"], "source": source, "tokenizer": context.inputs["tokenizer"]},
        "documents": len(found.ends),
        "text_bytes": found.size_bytes,
        "text_tokens": len(found.ids),
        "bytes_per_token": found.size_bytes / len(found.ids),
    }
    write_shards(output, chunks, row_tokens, max(found.highest, *special, 0), facts)
    spool.unlink()
    return context.store.snapshot(output)


def _texts(context: "StageContext", name: str, snapshot: SnapshotId) -> Iterator[str]:
    """The documents; half of the work is told by the bytes that were read."""
    file = context.store.manifest(snapshot).files.get(TEXT_FILE)
    if not isinstance(file, Blob):
        raise BadInput(f"{name}: snapshot {snapshot} has no {TEXT_FILE}; a text as it was taken is expected")
    done = 0

    def chunks() -> Iterator[bytes]:
        nonlocal done
        for chunk in file_chunks(context.store, snapshot, TEXT_FILE):
            yield chunk
            done += len(chunk)
            context.progress(done / 2, file.size_bytes, "bytes", name)

    return each_text(chunks(), name)


def _told(
    context: "StageContext", chunks: Iterable[tuple[Rows, Rows]], name: str, tokens: int
) -> Iterator[tuple[Rows, Rows]]:
    """The other half: packed tokens."""
    done = 0
    for tokens_RT, positions_RT in chunks:
        yield tokens_RT, positions_RT
        done += tokens_RT.size
        context.progress(tokens / 2 + min(done, tokens) / 2, tokens, "tokens", name)
