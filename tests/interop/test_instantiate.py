import dataclasses
import inspect

import pytest
import torch
from safetensors.torch import save_file

import rae_xla
from rae_xla.config import ModelSpec
from rae_xla.config.model_params import AUTOENCODERS, DENOISERS
from rae_xla.config.registry import TARGETS, full_name
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import find_class, load_weights

TINY = {
    "input_size": 4,
    "in_channels": 8,
    "hidden_size": [16, 24],
    "depth": [1, 1],
    "num_heads": [2, 2],
    "num_classes": 5,
}


def tiny(**changes):
    return {"target": "stage2.models.DDT.DiTwDDTHead", "params": TINY | changes}


def instantiate_error(spec):
    """Return the message of the error that ``instantiate`` raises."""
    with pytest.raises(UserError) as error:
        rae_xla.instantiate(spec)
    return str(error.value)


@pytest.fixture
def trained():
    model = rae_xla.instantiate(tiny())
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model.state_dict()


@pytest.mark.parametrize("name", [n for names in TARGETS.items() for n in (names[0], *names[1])])
def test_every_target_is_a_class(name):
    found = find_class(name)
    assert f"{found.__module__}.{found.__qualname__}" == full_name(name)


@pytest.mark.parametrize("name", [*AUTOENCODERS, *DENOISERS])
def test_params_schemas_match_the_signatures(name):
    schema = (AUTOENCODERS | DENOISERS)[name]
    listed = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(schema)
    }
    signature = inspect.signature(find_class(name)).parameters
    taken = {n: {} if n == "encoder_params" else p.default for n, p in signature.items()}
    assert listed == taken


@pytest.mark.parametrize("target", ["DiTDH", "stage2.models.DDT.DiTwDDTHead"])
def test_builds_from_a_mapping_or_a_spec(target):
    x = torch.zeros(1, 8, 4, 4)
    for spec in ({"target": target, "params": TINY}, ModelSpec(target, TINY)):
        assert rae_xla.instantiate(spec)(x, torch.zeros(1), torch.zeros(1).long()).shape == x.shape


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        ("stage1.RAF", "stage1.RAE"),
        ("src.stage2.models.DDT.DiTwDDTHead", "DiTwDDTHead"),
        ("stage2.models.DTT.DiTDHead", "stage2.models.DDT.DiTwDDTHead"),
    ],
)
def test_unknown_target(target, nearest):
    message = instantiate_error({"target": target})
    assert repr(target) in message
    assert f"did you mean {nearest}?" in message


def test_unknown_or_missing_parameters():
    assert "'hiden_size': did you mean hidden_size?" in instantiate_error(tiny(hiden_size=[8, 8]))
    assert "'weights'" in instantiate_error(tiny() | {"weights": "x.pt"})
    assert "needs a target" in instantiate_error({"params": TINY})
    assert "needs the parameters dinov2_path" in instantiate_error({"target": "Dinov2withNorm"})


@pytest.mark.parametrize("kind", ["bare", "ema", "safetensors"])
def test_ckpt_formats(tmp_path, trained, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pt")
    if kind == "safetensors":
        save_file(trained, path)
    elif kind == "ema":
        online = {k: torch.zeros_like(v) for k, v in trained.items()}
        torch.save({"step": 8, "model": online, "ema": trained, "optimizer": {"lr": 1}}, path)
    else:
        torch.save(trained, path)
    loaded = rae_xla.instantiate(tiny() | {"ckpt": str(path)}).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in trained.items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module."])
def test_ckpt_of_a_wrapped_model(tmp_path, trained, prefix):
    wrapped = {prefix + name: tensor for name, tensor in trained.items()}
    for content in (wrapped, {"ema": wrapped}, {"model": wrapped, "ema": wrapped, "step": 1}):
        torch.save(content, tmp_path / "w.pt")
        loaded = rae_xla.instantiate(tiny() | {"ckpt": str(tmp_path / "w.pt")}).state_dict()
        assert all(torch.equal(loaded[k], v) for k, v in trained.items())


def test_ckpt_without_averaged_weights(tmp_path, trained):
    torch.save({"model": trained, "step": 3}, tmp_path / "w.pt")
    message = instantiate_error(tiny() | {"ckpt": str(tmp_path / "w.pt")})
    assert "without averaged (`ema`) weights" in message
    assert "rae-xla convert FILE --weights model" in message


def test_missing_ckpt_suggests_similar_files(tmp_path, trained):
    torch.save(trained, tmp_path / "stage2_model.pt")
    message = instantiate_error(tiny() | {"ckpt": str(tmp_path / "stage2_modle.pt")})
    assert "stage2_modle.pt" in message
    assert "stage2_model.pt" in message
    assert "nor a folder" in instantiate_error(tiny() | {"ckpt": str(tmp_path / "no" / "w.pt")})
    assert "holds no checkpoint" in instantiate_error(tiny() | {"ckpt": str(tmp_path)})


def test_ckpt_of_another_shape(tmp_path, trained):
    torch.save(trained, tmp_path / "w.pt")
    message = instantiate_error(tiny(hidden_size=[32, 24]) | {"ckpt": str(tmp_path / "w.pt")})
    assert "w.pt does not fit DiTDH" in message
    assert "s_embedder.proj.weight is (16, 8, 1, 1), expected (32, 8, 1, 1)" in message
    assert "more" in message
    assert "params it was trained with" in message


def test_ckpt_of_another_architecture(tmp_path, trained):
    trained["extra"] = trained.pop("pos_embed")
    torch.save(trained, tmp_path / "w.pt")
    message = instantiate_error(tiny() | {"ckpt": str(tmp_path / "w.pt")})
    assert "missing pos_embed" in message
    assert "unexpected extra" in message


def test_ckpt_of_the_other_stage(tmp_path):
    """The message names stage 2 only if the model is a generator."""
    state = {"encoder.x": torch.zeros(1), "decoder.x": torch.zeros(1)}
    torch.save(state, tmp_path / "w.pt")
    message = instantiate_error(tiny() | {"ckpt": str(tmp_path / "w.pt")})
    assert "holds an autoencoder (stage 1): give a checkpoint of stage 2" in message
    autoencoder = torch.nn.Module()
    autoencoder.decoder = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"missing decoder\.weight.*the params it was trained with"):
        load_weights(autoencoder, tmp_path / "w.pt")


def test_ckpt_without_weights(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"not a checkpoint")
    assert "cannot be read" in instantiate_error(tiny() | {"ckpt": str(tmp_path / "w.pt")})
    torch.save({"state_dict": {}, "lr": 1.0}, tmp_path / "d.pt")
    assert "no tensors at state_dict, lr" in instantiate_error(
        tiny() | {"ckpt": str(tmp_path / "d.pt")}
    )
    torch.save([torch.zeros(1)], tmp_path / "l.pt")
    assert "holds a list" in instantiate_error(tiny() | {"ckpt": str(tmp_path / "l.pt")})
