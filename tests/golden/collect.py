"""Copy the reference numbers that the tests read into this folder.

    python tests/golden/collect.py PATH_TO_SHARED_GOLDEN

To keep the folder small, these are left out: full gradients of parameters (the JSON of each case
has their norms), intermediate activations, RAE state dicts that ``decoder.pt`` and ``encoder/`` in
the same folder contain, and latent statistics that a diffusers configuration repeats. The largest
weights are stored as seeds (``tests/helpers/seeded_weights.py``); weights that a seed does not
reproduce bit for bit are stored themselves. The stage-1 step and its discriminator are complete,
because the tests check every number of them. Of ``raev2`` the keys of the world model are left out.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from seeded_weights import draw, find_recipe

FOLDERS = (
    "stage2", "rae", "keymaps", "transport", "train", "disc", "eval", "e2e", "diffusers", "raev2",
)  # fmt: skip
COMPLETE = ("train/stage1_one_step", "disc/dinodisc_a")
RAEV2_SKIPPED = ("_nwm_", "INDEX", "README")
RAEV2_GRADIENTS = ("raev2/stage2/ddt_ig_a", "raev2/encoders/rae_dinov3mls")
SKIPPED_PREFIXES = ("grad.", "gradall.", "mid.")
INPUT_GRADIENTS = ("grad.a", "grad.x", "grad.fake_eval")
IN_OTHER_FILES = ("state.encoder.", "state.decoder.")
# Case -> prefix of its seeded tensors -> seed.
DRAWN = {
    "stage2/ddt_b_qknorm": {"state": 1002, "guide_state": 1003},
    "disc/dinodisc_b_gn": {"dino": 5302},
    "diffusers/dinov2/golden": {"state": 8001},
    "diffusers/mae/golden": {"state": 8002},
    "diffusers/dinov2_grid16/golden": {"state": 8003},
    "raev2/stage2/ddt_ig_a": {"state": 5100},
    "raev2/stage2/ddt_ig_equal_width": {"state": 5110},
    "raev2/stage2/ddt_ig_patch2": {"state": 5120},
    "raev2/stage2/ddt_ig_repa": {"state": 5130},
    "raev2/stage2/ddt_ig_text": {"state": 5140},
    "raev2/stage2/ddt_ig_nwm": {"state": 5150},
    "raev2/stage2/ddt_plain": {"state": 5160},
    "raev2/stage2/lightningdit_ig": {"state": 5170},
}
NOT_DRAWN = ("freqs_cos", "freqs_sin", "encoder_mean", "encoder_std", "latents_mean", "latents_std")


def wanted(case: str, key: str) -> bool:
    """Return whether a test reads a tensor of a case."""
    if case in COMPLETE or (case.startswith("disc/") and key in INPUT_GRADIENTS):
        return True
    if case in RAEV2_GRADIENTS and key.startswith("grad."):
        return True
    if key.startswith(SKIPPED_PREFIXES):
        return False
    full_rae = case.startswith("rae/") and "/golden" in case
    return not (full_rae and key.startswith(IN_OTHER_FILES))


def remove_seeded(case: str, order: list[str], kept: dict[str, torch.Tensor]) -> list[dict]:
    """Remove the tensors that a seed reproduces from ``kept``; return their recipes."""
    recipes = []
    for prefix, seed in DRAWN.get(case, {}).items():
        names = [k for k in order if k.startswith(prefix + ".") and not k.endswith(NOT_DRAWN)]
        recipes.append(find_recipe({name: kept[name] for name in names}, seed))
        for name, tensor in draw(recipes[-1]).items():
            if torch.equal(tensor, kept[name]):
                del kept[name]
    return recipes


def copy_tensors(case: str, path: Path, out: Path) -> None:
    """Copy the tensors of a case, without those that no test reads or that a seed reproduces."""
    with safe_open(str(path), "pt") as tensors:
        kept = {k: tensors.get_tensor(k) for k in tensors.keys() if wanted(case, k)}  # noqa: SIM118
    if case in DRAWN:
        meta = json.loads(path.with_suffix(".json").read_text())
        order = list(meta["tensors"])
        if case.startswith("raev2/"):  # sorted by name; generated in the order of the parameters
            order = [f"state.{name}" for name in meta["grad_norms"]]
        recipes = remove_seeded(case, order, kept)
        out.with_suffix(".drawn.json").write_text(json.dumps(recipes, separators=(",", ":")))
    save_file(kept, str(out))


def copy_configuration(path: Path, out: Path) -> None:
    """Copy a diffusers config.json, without the statistics that ``golden.safetensors`` contains."""
    values = json.loads(path.read_text())
    values = {k: v for k, v in values.items() if k not in ("latents_mean", "latents_std") or not v}
    out.write_text(json.dumps(values))


def main() -> None:
    """Copy every file of the folders above; safetensors files are reduced."""
    source, target = Path(sys.argv[1]), Path(__file__).parent
    for folder in FOLDERS:
        for path in sorted((source / folder).rglob("*")):
            relative = path.relative_to(source)
            case = relative.with_suffix("").as_posix()
            skipped = folder == "raev2" and any(name in case for name in RAEV2_SKIPPED)
            if path.is_dir() or skipped:
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
