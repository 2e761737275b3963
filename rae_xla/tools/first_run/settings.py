"""What a first run runs: the configurations of its sections, at real size or at a tiny one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STAGE_1, STAGE_2 = "configs/stage1/dinov2_b_256.yaml", "configs/stage2/ditdh_s_256.yaml"

# The networks of stage 1 at a size that a CPU trains in seconds.
_TINY_DISCRIMINATOR = "{depth: 2, embed_dim: 32, num_heads: 4, patch_size: 32}"


@dataclass(frozen=True)
class FirstRun:
    """Settings of a first run, the same for all of its sections.

    Attributes:
        folder: for the files of its sections.
        smoke: tiny models on the CPU, to test the first run itself.
        devices: number of processes that torchrun starts for a section; 1 without torchrun.
        budget: seconds for all sections together.
    """

    folder: str
    smoke: bool = False
    devices: int = 1
    budget: float = 600.0

    @property
    def tiny_model(self) -> Path:
        """Configuration of the tiny model, which ``runner.run`` writes."""
        return Path(self.folder) / "tiny" / "config.yaml"

    def task_config(self, task: str) -> tuple[str, list[str]]:
        """Return the configuration file of a task's step, and the settings that replace its own."""
        if not self.smoke:
            file = {"stage1": STAGE_1, "stage2": STAGE_2}[task]
            return file, ["data.train=null", "data.val=null", "runtime.precision=bf16"]
        settings = [*self._small_run, "data.image_size=64"]
        if task == "stage1":
            settings += [
                "stage_2=null", "stage_1.params.pretrained_decoder_path=null",
                "stage_1.params.normalization_stat_path=null",
                "gan.loss.perceptual_weight=1", "gan.loss.disc_weight=0.75",
                "gan.loss.disc_start=0", "gan.loss.disc_upd_start=0",
                f"gan.disc.arch.recipe={_TINY_DISCRIMINATOR}", "gan.disc.arch.key_depths=[0]",
                "gan.disc.arch.ks=3", "gan.disc.arch.dino_ckpt_path=none.pth",
            ]  # fmt: skip
        return str(self.tiny_model), settings

    @property
    def _small_run(self) -> list[str]:
        return ["training.global_batch_size=16", "training.epochs=1", *self.runtime]

    @property
    def runtime(self) -> list[str]:
        """Settings of the backend."""
        return ["runtime.backend=torch"] if self.smoke else []
