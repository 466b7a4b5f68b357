"""ms-swift's own `llamapro` tuner, where its package is: in `.swift`, which `make bench NAME=training` fills.

It inserts a copied block after every equal group and zeroes its two output projections, as plan(blocks=N) does, and
leaves training to Hugging Face's loop. What else it needs (transformers, peft) is the main environment's.
"""

import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / ".swift"


def has_swift() -> bool:
    """Whether it can be imported; a line on stderr where it cannot."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    try:
        import swift.tuners  # noqa: F401
    except ImportError as error:
        print(f"left out: ms-swift ({error}); it comes with: make .swift/.ready", file=sys.stderr)
        return False
    return True


def prepared(base: Any, new_blocks: int) -> Any:
    """The transformers model `base` (a Llama; modified) with so many new blocks, which alone train."""
    from swift.tuners import LLaMAProConfig, Swift

    return Swift.prepare_model(base, LLaMAProConfig(model_type="llama", num_new_blocks=new_blocks))
