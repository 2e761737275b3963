"""Copy the reference numbers the tests need into this folder, without what they do not read.

    python tests/golden/collect.py PATH_TO_SHARED_GOLDEN

Left out, to keep the folder small: full gradients of parameters (the JSON beside each file holds
the norm of every one), intermediate activations, and RAE state dicts that ``decoder.pt`` and
``encoder/`` beside them already hold. Kept whole: the one step of stage 1 and the
discriminator in it, small files whose every number is checked.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

FOLDERS = ("stage2", "rae", "keymaps", "transport", "train", "disc", "eval")
KEPT_WHOLE = ("train/stage1_one_step", "disc/dinodisc_a")
SKIPPED_PREFIXES = ("grad.", "gradall.", "mid.")
INPUT_GRADIENTS = ("grad.a", "grad.x", "grad.fake_eval")
SAVED_BESIDE = ("state.encoder.", "state.decoder.")


def wanted(case: str, key: str) -> bool:
    """Whether a tensor of a case is read by a test."""
    if case in KEPT_WHOLE or (case.startswith("disc/") and key in INPUT_GRADIENTS):
        return True
    if key.startswith(SKIPPED_PREFIXES):
        return False
    full_rae = case.startswith("rae/") and "/golden" in case
    return not (full_rae and key.startswith(SAVED_BESIDE))


def main() -> None:
    """Copy every file of the folders above, trimming the safetensors."""
    source, target = Path(sys.argv[1]), Path(__file__).parent
    for folder in FOLDERS:
        for path in sorted((source / folder).rglob("*")):
            relative = path.relative_to(source)
            case = relative.with_suffix("").as_posix()
            if path.is_dir():
                continue
            out = target / relative
            out.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".safetensors" or path.name == "model.safetensors":
                shutil.copyfile(path, out)
                continue
            with safe_open(str(path), "pt") as tensors:
                kept = {k: tensors.get_tensor(k) for k in tensors.keys() if wanted(case, k)}  # noqa: SIM118
            save_file(kept, str(out))


if __name__ == "__main__":
    main()
