"""What AWQ can take: no mixture of experts, and every input width a multiple of the group size.

Reads a manifest only and loads no torch, so that a flow can refuse a base before anything is trained.
"""

from mansard.errors import BadInput
from mansard.store.snapshot import Manifest, TensorFile


def check_quantizable(model: Manifest, group_size: int) -> None:
    """Refuse a mixture of experts, and the first decoder matrix whose input width `group_size` does not divide.

    llm-compressor 0.14 takes a block's experts apart, but the packed names that `save_quantized` looks for are not in
    what it writes, so the quantize stage would refuse the result, after all the training (tried on a small Mixtral).

    Decoder matrices are the two-dimensional `*.weight` tensors of numbered layers, all of which the quantizer takes;
    embeddings and lm_head stay as they are.
    """
    for path, file in sorted(model.files.items()):
        if isinstance(file, TensorFile):
            for entry in file.entries(path):
                if ".experts." in entry.name:
                    raise BadInput(
                        f"{entry.name}: mixtures of experts cannot be quantized to W4A16 here; a base without experts "
                        "can, and `from mansard import expand, train, fuse` adds blocks to this one without quantizing"
                    )
                is_matrix = ".layers." in entry.name and entry.name.endswith(".weight") and len(entry.shape) == 2
                if is_matrix and entry.shape[1] % group_size:
                    raise BadInput(
                        f"{entry.name}: its input width {entry.shape[1]} is not a multiple of AWQ's group size "
                        f"{group_size}; this model cannot be quantized to W4A16"
                    )
