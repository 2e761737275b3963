"""Copy the reference numbers of the text-to-image model that the tests read into ``t2i``.

    python tests/golden/collect_t2i.py PATH_TO_SHARED_GOLDEN

Left out to keep the folder small: gradients (the JSON of each case has their norms), intermediate
activations other than ``KEPT_INTERMEDIATES``, the cases that record faults of the reference, three
of four positions of the logits, and most pixels of the large decoded image. The weights of the
diffusion heads are stored as seeds (``tests/helpers/seeded_weights.py``).
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from seeded_weights import draw, find_recipe

SKIPPED_CASES = ("transport/sampler_reference_bug",)
SKIPPED_PREFIXES = ("grad", "mid.", "out.cfg_scale3_reference_bug", "out.sampler_bug")
KEPT_INTERMEDIATES = {"joint": ("mid.inputs_embeds",), "generate": ("mid.",)}
SEEDED = ("head/dit_", "transport/sampler_target", "transport/training_loss")
NOT_SEEDED = ("pos_embed", "freqs_cos", "freqs_sin")
MODULES = ("x_embedder", "t_embedder", "y_embedder", "dit_blocks", "final_layer")
LAYERS = ("norm1", "norm2", "norm_final", "attn", "mlp", "linear", "adaLN_modulation")
# Tensor of a case -> its new name and the part that is kept.
SLICED = {
    ("joint/query_a", "out.logits"): ("out.logits_every_4th", (slice(None), slice(None, None, 4))),
    ("joint/query_multi_image_k3_aux", "out.logits"): (
        "out.logits_every_4th",
        (slice(None), slice(None, None, 4)),
    ),
    ("decoder/siglip2_decoder_224/golden", "out.image0"): (
        "out.image0_every_5th",
        (slice(None), slice(None), slice(None, None, 5), slice(None, None, 5)),
    ),
    ("head/tables", "init.pos_embed"): ("init.pos_embed_every_17th", (slice(None, None, 17),)),
    ("head/tables", "init.rope.freqs_cos"): ("init.freqs_cos_every_17th", (slice(None, None, 17),)),
    ("head/tables", "init.rope.freqs_sin"): ("init.freqs_sin_every_17th", (slice(None, None, 17),)),
}


def generation_order(name: str) -> tuple[object, ...]:
    """Return the sorting key that puts parameters of a head into the order of their generation."""
    module, *path = name.removeprefix("state.").split(".")
    index = int(path.pop(0)) if module == "dit_blocks" else 0
    layer = LAYERS.index(path[0]) if path[0] in LAYERS else 0
    inner = path[1] if len(path) > 2 else path[0]
    inner = {"qkv": "0", "proj": "1", "w12": "0", "w3": "1"}.get(inner, inner)
    return MODULES.index(module), index, layer, inner, path[-1] != "weight"


def is_wanted(case: str, name: str) -> bool:
    """Return whether a test reads a tensor of a case."""
    if name.startswith(KEPT_INTERMEDIATES.get(case.split("/")[0], ("\0",))):
        return True
    return not name.startswith(SKIPPED_PREFIXES)


def copy_case(source: Path, target: Path, case: str) -> None:
    """Copy one safetensors file of reference numbers, reduced, and its seeded weights."""
    tensors = load_file(source / f"{case}.safetensors")
    kept = {k: t for k, t in tensors.items() if is_wanted(case, k)}
    for (of, name), (new, part) in SLICED.items():
        if of == case:
            kept[new] = kept.pop(name)[part].contiguous()
    if case.startswith(SEEDED):
        seed = json.loads((source / f"{case}.json").read_text())["seed"]
        names = [k for k in kept if k.startswith("state.") and not k.endswith(NOT_SEEDED)]
        names.sort(key=generation_order)
        recipe = find_recipe({name: kept[name] for name in names}, seed)
        for name, tensor in draw(recipe).items():
            if torch.equal(tensor, kept[name]):
                del kept[name]
        text = json.dumps([recipe], separators=(",", ":"))
        (target / f"{case}.drawn.json").write_text(text)
    save_file(kept, str(target / f"{case}.safetensors"))


def copy_json(path: Path, out: Path) -> None:
    """Copy a JSON file without white space and without the list of its tensors."""
    content = json.loads(path.read_text())
    content.pop("tensors", None)
    out.write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False))


def main() -> None:
    """Copy every case that the tests read."""
    source, target = Path(sys.argv[1]) / "t2i", Path(__file__).parent / "t2i"
    for path in sorted(source.rglob("*")):
        case = path.relative_to(source).with_suffix("").as_posix()
        if path.is_dir() or case in SKIPPED_CASES or "/" not in case:
            continue
        out = target / path.relative_to(source)
        out.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors" and path.name != "model.safetensors":
            copy_case(source, target, case)
        elif path.suffix == ".json" and path.parent.name not in ("hf", "tokenizer"):
            copy_json(path, out)
        else:
            shutil.copyfile(path, out)


if __name__ == "__main__":
    main()
