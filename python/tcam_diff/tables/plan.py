"""Commands of each table, in the order in which they run. All paths are relative to the table's folder."""

from __future__ import annotations

import math
from pathlib import Path

from tcam_diff.diffusion.config import DiffusionConfig
from tcam_diff.tables.config import TableConfig
from tcam_diff.tables.steps import Step, step
from tcam_diff.training.logger import read_metrics

#: Names of the models, as folders and in tables.
OURS, RIVALS = "tcam-diff", ("vae-gan", "vq-gan")
#: Generators of table 3 beside ours, the folder "diffusion".
GENERATORS = {
    "ldm-vae-gan": "VAE-GAN + 3D latent diffusion",
    "ldm-vq-gan": "VQ-GAN + 3D latent diffusion",
    "concatenated": "our latents, concatenated planes (NFD)",
    "no-cross": "ours without cross-attention",
    "no-prior": "ours with the paper's choices: no prior, two heads, independent weights, Adam, uniform timesteps",
    "one-head": "ours with one head around the unit prior on the straight path (PRDiT's later recipe)",
    "gaussian": "Gaussian of our latents",
}
#: Changes of our diffusion in the rows that are variants of it.
VARIANTS = {
    "concatenated": ("network.weights=concatenated",),
    "no-cross": ("network.cross=none",),
    "no-prior": (
        "prior=none",
        "timesteps=stratified",
        "network.norm_groups=32",
        "network.heads=two",
        "network.weights=independent",
        "muon_lr=null",
        "network.octave_gains=false",
        "network.prior_input=false",
    ),
    "one-head": (
        "prior=unit",
        "timesteps=straight",
        "network.heads=one",
        "network.octave_gains=false",
        "network.prior_input=false",
    ),
}
#: Steps of trainings that end by their time.
MANY = 1_000_000


def last(run: Path, name: str) -> float:
    """Last value of a metric in the log of a run; NaN if it has none."""
    values = [r[name] for r in read_metrics(run) if r.get(name) is not None]
    return float(values[-1]) if values else float("nan")


def minutes(ours: Path) -> list[str]:
    """Keys of a training that ends after the time of ours; before that is known, as a word."""
    seconds = last(ours, "seconds")
    return [f"steps={MANY}", "minutes=THOSE-OF-OURS" if math.isnan(seconds) else f"minutes={seconds / 60:.4f}"]


class Plan:
    """Steps of the tables in a folder.

    Args:
        folder: the tables' folder, in which the commands run.
        config: the protocol.
        seeds: number of seeds of every training.
        equal_steps: whether rivals are also trained for as many steps as ours.
    """

    def __init__(self, folder: Path, config: TableConfig, seeds: int = 1, equal_steps: bool = False) -> None:
        self.folder, self.config, self.seeds, self.equal_steps = folder, config, seeds, equal_steps

    @property
    def generators(self) -> dict[str, str]:
        """Titles of the generators of table 3 beside ours, by folder."""
        c = self.config
        plain = DiffusionConfig.load(c.diffusion, c.diffusion_changes).prior == "none"
        wanted = [n for n in GENERATORS if (c.generators is None or n in c.generators) and not (plain and n == "no-prior")]
        return {name: GENERATORS[name] for name in wanted}

    def steps(self, table: int) -> list[Step]:
        """Steps of a table, with those of other tables that it needs."""
        made = {1: self._table1, 2: self._table2, 3: self._table3, 4: self._table4}[table]()
        return list({s.name: s for s in made}.values())

    # ---- data ---------------------------------------------------------------------------

    def _store(self, name: str = "store") -> list[Step]:
        c = self.config
        made = [] if c.data else [step("cohort", "make-cohort --out cohort -q", *c.cohort)]
        preset, changes = (
            (c.prepare, c.prepare_changes) if name == "store" else (c.prepare_channels, c.prepare_channels_changes)
        )
        return [*made, step(name, f"prepare --preset {preset} --out {name} -q", *changes, source=c.data or "cohort")]

    # ---- stage 1 ------------------------------------------------------------------------

    def _ours(self, seed: int, store: str) -> list[Step]:
        c, run = self.config, f"seed-{seed}/{store}-{OURS}"
        train = f"train-autodecoder {c.train} data={store} seed={seed} --out {run} -q"
        encode = f"encode {run} {store} --split {c.held_out} --out {run}-encoded -q"
        return [
            step(f"{run}", train, *c.train_changes, resume=True),
            step(f"{run}-encoded", encode, *c.encode_changes),
        ]

    def _rival(self, name: str, seed: int, store: str, steps: bool = False) -> Step:
        """Training of a rival for the time of ours, or for its steps."""
        c, run = self.config, f"seed-{seed}/{store}-{name}{'-equal-steps' if steps else ''}"
        preset, changes = (c.vae_gan, c.vae_gan_changes) if name == "vae-gan" else (c.vq_gan, c.vq_gan_changes)
        ours = self.folder / f"seed-{seed}/{store}-{OURS}"

        def budget() -> list[str]:
            if steps:
                return [f"steps={max((int(r['step']) for r in read_metrics(ours)), default='THOSE-OF-OURS')}"]
            return minutes(ours)

        command = f"baseline train {preset} data={store} seed={seed} --out {run} -q"
        return step(run, command, *changes, resume=True, later=budget)

    def reconstructions(self, seed: int, store: str = "store") -> dict[str, list[str]]:
        """Folders with reconstructions of each model."""
        at = f"seed-{seed}/{store}-"
        folders = {OURS: [f"{at}{OURS}", f"{at}{OURS}-encoded"], **{n: [f"{at}{n}"] for n in RIVALS}}
        if self.equal_steps and store == "store":
            folders |= {f"{n}-equal-steps": [f"{at}{n}-equal-steps"] for n in RIVALS}
        return folders

    def _stage1(self, seed: int, store: str = "store") -> list[Step]:
        made = [*self._store(store), *self._ours(seed, store)]
        for name in RIVALS:
            made.append(self._rival(name, seed, store))
            if self.equal_steps and store == "store":
                made.append(self._rival(name, seed, store, steps=True))
        return made

    def _table1(self) -> list[Step]:
        made = []
        for seed in range(self.seeds):
            made += self._stage1(seed)
            runs = [f for folders in self.reconstructions(seed).values() for f in folders]
            made += [step(f"{run}-evaluation", f"evaluate store {run} --out {run}-evaluation -q") for run in runs]
        return made

    def _table2(self) -> list[Step]:
        c, store = self.config, "store-channels"
        runs = " ".join(f for of in self.reconstructions(0, store).values() for f in of)
        command = f"segment {store} {runs} --preset {c.segment} --repeats {c.repeats} --out segmentation -q"
        return [*self._stage1(0, store), step("segmentation", command, *c.segment_changes)]

    # ---- stage 2 ------------------------------------------------------------------------

    def _held_out(self, seed: int) -> str:
        """Latents of the held-out volumes for stage 2: those of table 1 where they are encoded alike."""
        c, ours = self.config, f"seed-{seed}/store-{OURS}"
        return f"{ours}-encoded" if c.latents_changes in (None, c.encode_changes) else f"{ours}-held-out-latents"

    def _latents(self, seed: int) -> list[Step]:
        """Latents of training and held-out volumes for stage 2."""
        c, ours = self.config, f"seed-{seed}/store-{OURS}"
        if c.latents_changes is None:
            return [step(f"{ours}-latents", f"export-latents {ours} --out {ours}-latents -q")]
        sets = {"train": f"{ours}-latents", c.held_out: self._held_out(seed)}
        made = [
            step(out, f"encode {ours} store --split {split} --out {out} -q", *c.latents_changes) for split, out in sets.items()
        ]
        return [s for s in made if s.name != f"{ours}-encoded"]  # a step of table 1

    def _diffusion(self, name: str, seed: int, *changes: str) -> list[Step]:
        c, run, ours = self.config, f"seed-{seed}/{name}", f"seed-{seed}/store-{OURS}"
        data = f"latents={ours}-latents validation={self._held_out(seed)} seed={seed}"
        return [
            step(run, f"train-diffusion {c.diffusion} {data} --out {run} -q", *c.diffusion_changes, *changes, resume=True),
            step(f"{run}-samples", f"sample {run} {self._drawn(run, seed)} --planes --steps {c.sample_steps}"),
        ]

    def _latent_diffusion(self, name: str, seed: int) -> list[Step]:
        """Training of a rival's diffusion for the time of ours."""
        c, run, ours = self.config, f"seed-{seed}/{name}", self.folder / f"seed-{seed}/diffusion"
        rival = f"seed-{seed}/store-{name.removeprefix('ldm-')}"
        first = name == "ldm-vae-gan"
        preset, changes = (c.ldm_vae_gan, c.ldm_vae_gan_changes) if first else (c.ldm_vq_gan, c.ldm_vq_gan_changes)

        train = f"baseline train {preset} autoencoder={rival} data=store seed={seed} --out {run} -q"
        return [
            step(run, train, *changes, resume=True, later=lambda: minutes(ours)),
            step(f"{run}-samples", f"baseline sample {run} {self._drawn(run, seed)}"),
        ]

    def _gaussian(self, seed: int) -> list[Step]:
        run = f"seed-{seed}/gaussian"
        return [
            step(run, f"baseline train gaussian latents=seed-{seed}/store-{OURS}-latents --out {run}"),
            step(f"{run}-samples", f"baseline sample {run} {self._drawn(run, seed)} --planes"),
        ]

    def _drawn(self, run: str, seed: int) -> str:
        return f"--n {self.config.samples} --seed {seed} --out {run}-samples -q"

    def _table3(self) -> list[Step]:
        c = self.config
        made = []
        for seed in range(self.seeds):
            made += [*self._stage1(seed), *self._latents(seed), *self._diffusion("diffusion", seed)]
            for name in self.generators:
                if name in VARIANTS:
                    made += self._diffusion(name, seed, *VARIANTS[name])
                else:
                    made += self._gaussian(seed) if name == "gaussian" else self._latent_diffusion(name, seed)
        made.append(step("features", f"features train store size={c.size} --out features -q", resume=True))
        for seed in range(self.seeds):
            at = f"seed-{seed}"
            every = " ".join(f"{at}/{n}-samples" for n in ("diffusion", *self.generators))
            every += f" {at}/store-{OURS}-latents {self._held_out(seed)}"
            made.append(step(f"{at}/sets", f"evaluate store {every} --size {c.size} --features features --out {at}/sets -q"))
            for name in self.generators:
                pair = f"evaluate store {at}/diffusion-samples {at}/{name}-samples size={c.size} --size {c.size}"
                more = f"--critics {c.critics} --out {at}/pair-{name} -q"
                once = "" if name == next(iter(self.generators)) else "--no-controls"
                made.append(step(f"{at}/pair-{name}", f"{pair} {more} {once}", *c.critic_changes))
        return made

    def _table4(self) -> list[Step]:
        c = self.config
        values = "channels=" + ",".join(map(str, c.channels))
        changes = [k for k in c.train_changes if not k.startswith("channels=")]
        return [*self._store(), step("ablation", f"ablate {c.train} {values} data=store --out ablation -q", *changes)]
