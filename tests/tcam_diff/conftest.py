"""A small model of stage 2, trained once for all tests that draw from it."""

from __future__ import annotations

import pytest
import runs
from tcam_diff.diffusion.model import TriplaneDiffusion


@pytest.fixture(scope="session")
def latents(tmp_path_factory):
    return runs.make_latents(tmp_path_factory.mktemp("set") / "latents")


@pytest.fixture(scope="session")
def trained(latents, tmp_path_factory):
    """Run with two classes."""
    out = tmp_path_factory.mktemp("trained") / "run"
    table = out.parent / "labels.csv"
    table.write_text("name,label\n" + "".join(f"v0-{i},{'ab'[i % 2]}\n" for i in range(6)))
    more = ("steps=60", "network.dropout=0", "lr=5e-3", "checkpoint_every=60", "evaluate_every=60", f"labels={table}")
    runs.finish(runs.start(runs.diffuse, latents, out, more))
    return out


@pytest.fixture(scope="session")
def model(trained):
    return TriplaneDiffusion.load(trained)


@pytest.fixture(scope="session")
def truth(model):
    """Volume that the model can generate: a sample with another seed."""
    return model.decode(runs.sampler(model, seed=77, final="x").sample([0]))[0]
