"""Choosing the checkpoint to resume from: the newest intact one, as all processes agree."""

import json
from types import SimpleNamespace

import pytest
from checkpoint_cases import logged, one_process, save

from rae_xla.checkpoint.manager import list_checkpoints
from rae_xla.checkpoint.resume import check_shared, choose_checkpoint
from rae_xla.errors import UserError


def damage(folder, step, file):
    path = folder / f"step-{step:08d}" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_none_without_a_folder(tmp_path):
    assert choose_checkpoint(str(tmp_path / "missing"), one_process()) is None


@pytest.mark.parametrize("file", ["model-0.distcp", "optimizer-0.distcp", ".metadata"])
def test_broken_checkpoints_are_logged_and_skipped(tmp_path, caplog, file):
    for step in (10, 20, 30):
        save(tmp_path, step)
    damage(tmp_path, 20, file)
    (tmp_path / "step-00000030" / file).unlink()
    found = choose_checkpoint(str(tmp_path), one_process())
    assert found.step == 10
    missing, differs, chosen = logged(caplog)
    assert f"step-00000030 is broken: {file} is missing" in missing
    assert f"step-00000020 is broken: {file}" in differs
    assert "checksum" in differs
    assert str(found) in chosen
    assert len(list_checkpoints(str(tmp_path))) == 3, "nothing was deleted"


def test_only_process_0_warns(tmp_path, caplog):
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "step-00000020/.metadata").unlink()

    class Second(SimpleNamespace):
        """Process 1 of two, both of which see the same files."""

        def all_gather_text(self, text):
            own = json.loads(text)
            return [json.dumps(own | {"steps": [10, 20]}) if "steps" in own else text, text]

    assert choose_checkpoint(str(tmp_path), Second(process_index=1, process_count=2)).step == 10
    assert logged(caplog) == []


def test_all_broken_is_an_error_that_deletes_nothing(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
        (tmp_path / f"step-{step:08d}" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"step-00000020.*manifest\.json"):
        choose_checkpoint(str(tmp_path), one_process())
    assert len(list_checkpoints(str(tmp_path))) == 2


def test_before_a_step(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert choose_checkpoint(str(tmp_path), one_process(), before=30).step == 20
    assert choose_checkpoint(str(tmp_path), one_process(), before=10) is None


def test_a_later_format_is_an_error(tmp_path):
    checkpoint = save(tmp_path, 1)
    path = tmp_path / "step-00000001/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="format 2"):
        choose_checkpoint(str(tmp_path), one_process())
    assert list_checkpoints(str(tmp_path)) == [checkpoint]


class OtherHost(SimpleNamespace):
    """Process 1 of two, which does not see what process 0 has written."""

    def all_gather_text(self, text):
        return ["yes", text]


def test_a_folder_must_be_shared(tmp_path):
    with pytest.raises(UserError, match=r"process 1 .*checkpoint\.dir=gs://"):
        check_shared(str(tmp_path), OtherHost(process_index=1, process_count=2))
    check_shared("gs://bucket/run", OtherHost(process_index=1, process_count=2))
