"""Both stages together (algorithm.md 9.10): samples are closer to the data than decoded noise."""

from __future__ import annotations

import pytest
import runs
import torch
from tcam_diff.autodecoder.planes import normalise
from tcam_diff.cli.app import app
from tcam_diff.diffusion.config import SampleConfig
from tcam_diff.diffusion.model import TriplaneDiffusion
from tcam_diff.diffusion.sampling import Sampler
from tcam_diff.errors import UserError
from tcam_diff.evaluation.critic import CriticConfig, prepare, score
from tcam_diff.evaluation.sets import read_set

COUNT = 24


def test_the_demo_keeps_files_that_it_did_not_make(tmp_path):
    from tcam_diff.demo import run as demo

    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"contains .*samples, not made by this demo"):
        demo.generate(tmp_path, 0.0)
    assert (tmp_path / "samples" / "precious.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["samples"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Data, samples and decoded noise, each (N, 1, H, W, D)."""
    work = tmp_path_factory.mktemp("whole")
    store = runs.make_store(work / "store", count=COUNT, held_out=2, size=(16, 16, 16)).folder
    stage1 = ("channels=6", "widths=[24]", "stride=2", "steps=250", "batch=4", "plane_size=8")
    stage2 = ("steps=300", "batch=8", "center=true", "preview_steps=0")
    for command in (
        ["train-autodecoder", "fast", f"data={store}", *stage1, "--out", work / "one", "-q"],
        ["export-latents", work / "one", "--out", work / "latents", "-q"],
        ["train-diffusion", "tiny", f"latents={work / 'latents'}", *stage2, "--out", work / "two", "-q"],
    ):
        app([str(c) for c in command], standalone_mode=False)
    model = TriplaneDiffusion.load(work / "two")
    planes = Sampler(model, SampleConfig(steps=20)).sample(range(COUNT))
    noise = normalise([torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(planes)])
    data = read_set(store, lambda v: v, split="train").volumes
    with torch.no_grad():
        return data, model.decode(planes), model.decode(noise)


@pytest.mark.slow
def test_samples_have_the_mean_and_spread_of_the_data(sets):
    data, samples, noise = sets
    for moment in (torch.mean, torch.std):
        want = moment(data, 0)
        near, far = ((moment(s, 0) - want).square().mean().sqrt() for s in (samples, noise))
        assert near < 0.8 * far


@pytest.mark.slow
def test_a_critic_scores_samples_closer_than_noise(sets):
    config = CriticConfig(size=16, width=8, epochs=12, lr=1e-3)
    data, samples, noise = (prepare(s, config) for s in sets)
    distances = [score(data, {"fake": s}, config, 0, torch.device("cpu")).distance["fake"] for s in (samples, noise)]
    assert distances[0] < 0.5 * distances[1]
