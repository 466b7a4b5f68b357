"""What AWQ can take: no mixture of experts, and every input width a multiple of the group size.

Reads headers only and loads no torch, so that a spec is refused before anything is started, taken or trained.
"""

from collections.abc import Iterable

from mansard.errors import BadInput
from mansard.specs.surgery import Quantize
from mansard.store.safetensors_header import TensorEntry
from mansard.store.snapshot import Manifest, TensorFile

GROUP_SIZES = (32, 64, 128)


def check_quantizable(model: Manifest, spec: Quantize) -> None:
    """`check_widths` of a model in the store."""
    files = [file.entries(path) for path, file in sorted(model.files.items()) if isinstance(file, TensorFile)]
    check_widths((entry for entries in files for entry in entries), spec)


def check_widths(tensors: Iterable[TensorEntry], spec: Quantize) -> None:
    """BadInput where `awq` meets a mixture of experts, or a decoder matrix whose input width the group does not divide.
    `none` takes every model.

    llm-compressor 0.14 takes a block's experts apart, but the packed names that `save_quantized` looks for are not in
    what it writes, so the quantize stage would refuse the result, after all the training (tried on a small Mixtral).

    Decoder matrices are the two-dimensional `*.weight` tensors of numbered layers, all of which the quantizer takes;
    embeddings and lm_head stay as they are.
    """
    if spec.scheme == "none":
        return
    matrices = [t for t in tensors if ".layers." in t.name and t.name.endswith(".weight") and len(t.shape) == 2]
    for matrix in matrices:
        if ".experts." in matrix.name:
            raise BadInput(
                f"quantize.scheme: awq cannot quantize mixtures of experts ({matrix.name}); "
                "take scheme: none, which serves the model as it is"
            )
    narrow = [m for m in matrices if m.shape[1] % spec.group_size]
    if narrow:
        dividing = [str(g) for g in GROUP_SIZES if not any(m.shape[1] % g for m in matrices)]
        remedy = f"take group_size: {' or '.join(dividing)}, or" if dividing else "no group size divides all;"
        raise BadInput(
            f"quantize.group_size: {spec.group_size} does not divide the input width {narrow[0].shape[1]} of "
            f"{narrow[0].name}; {remedy} scheme: none serves it as it is"
        )
