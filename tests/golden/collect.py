"""Copy the reference numbers the tests need into this folder, without what they do not read.

    python tests/golden/collect.py PATH_TO_SHARED_GOLDEN

Left out, to keep the folder small: full gradients of parameters (the JSON beside each file holds
the norm of every one), intermediate activations, RAE state dicts that ``decoder.pt`` and
``encoder/`` beside them already hold, and the latent statistics that a diffusers configuration
repeats. The largest weights are stored as the draws they came from (``tests/drawn_weights.py``);
a weight that those do not give bit for bit is stored itself. Kept whole: the one step of stage 1
and the discriminator in it, small files whose every number is checked.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from drawn_weights import draw, find_recipe

FOLDERS = (
    "stage2", "rae", "keymaps", "transport", "train", "disc", "eval", "e2e", "diffusers",
)  # fmt: skip
KEPT_WHOLE = ("train/stage1_one_step", "disc/dinodisc_a")
SKIPPED_PREFIXES = ("grad.", "gradall.", "mid.")
INPUT_GRADIENTS = ("grad.a", "grad.x", "grad.fake_eval")
SAVED_BESIDE = ("state.encoder.", "state.decoder.")
# Case -> prefix of its drawn tensors -> seed.
DRAWN = {
    "stage2/ddt_b_qknorm": {"state": 1002, "guide_state": 1003},
    "disc/dinodisc_b_gn": {"dino": 5302},
    "diffusers/dinov2/golden": {"state": 8001},
    "diffusers/mae/golden": {"state": 8002},
    "diffusers/dinov2_grid16/golden": {"state": 8003},
}
NOT_DRAWN = ("freqs_cos", "freqs_sin", "encoder_mean", "encoder_std", "latents_mean", "latents_std")


def wanted(case: str, key: str) -> bool:
    """Whether a tensor of a case is read by a test."""
    if case in KEPT_WHOLE or (case.startswith("disc/") and key in INPUT_GRADIENTS):
        return True
    if key.startswith(SKIPPED_PREFIXES):
        return False
    full_rae = case.startswith("rae/") and "/golden" in case
    return not (full_rae and key.startswith(SAVED_BESIDE))


def take_out_drawn(case: str, order: list[str], kept: dict[str, torch.Tensor]) -> list[dict]:
    """Remove the tensors that are draws from ``kept``; the recipes that give them."""
    recipes = []
    for prefix, seed in DRAWN.get(case, {}).items():
        names = [k for k in order if k.startswith(prefix + ".") and not k.endswith(NOT_DRAWN)]
        recipes.append(find_recipe({name: kept[name] for name in names}, seed))
        for name, tensor in draw(recipes[-1]).items():
            if torch.equal(tensor, kept[name]):
                del kept[name]
    return recipes


def copy_tensors(case: str, path: Path, out: Path) -> None:
    """Copy a case's tensors, without those that no test reads or that can be drawn again."""
    with safe_open(str(path), "pt") as tensors:
        kept = {k: tensors.get_tensor(k) for k in tensors.keys() if wanted(case, k)}  # noqa: SIM118
    if case in DRAWN:
        order = json.loads(path.with_suffix(".json").read_text())["tensors"]
        recipes = take_out_drawn(case, list(order), kept)
        out.with_suffix(".drawn.json").write_text(json.dumps(recipes, separators=(",", ":")))
    save_file(kept, str(out))


def copy_configuration(path: Path, out: Path) -> None:
    """Copy a diffusers config.json, without the statistics that ``golden.safetensors`` has too."""
    values = json.loads(path.read_text())
    values = {k: v for k, v in values.items() if k not in ("latents_mean", "latents_std") or not v}
    out.write_text(json.dumps(values))


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
            if path.suffix == ".safetensors" and path.name != "model.safetensors":
                copy_tensors(case, path, out)
            elif folder == "diffusers" and path.name == "config.json":
                copy_configuration(path, out)
            else:
                shutil.copyfile(path, out)


if __name__ == "__main__":
    main()
