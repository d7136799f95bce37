"""Commands of each table, in the order in which they run. All paths are relative to the table's folder."""

from __future__ import annotations

from pathlib import Path

from tcam_diff.tables.config import TableConfig
from tcam_diff.tables.steps import Step, step
from tcam_diff.training.logger import read_metrics

#: Names of the models, as folders and in tables.
OURS, RIVALS = "tcam-diff", ("vae-gan", "vq-gan")
#: Generators of table 3 beside ours.
GENERATORS = {
    "ldm-vae-gan": "VAE-GAN + 3D latent diffusion",
    "ldm-vq-gan": "VQ-GAN + 3D latent diffusion",
    "concatenated": "our latents, concatenated planes (NFD)",
    "no-cross": "ours without cross-attention",
    "gaussian": "Gaussian of our latents",
}


def last(run: Path, name: str) -> float:
    """Last value of a metric in the log of a run; NaN if it has none."""
    values = [r[name] for r in read_metrics(run) if r.get(name) is not None]
    return float(values[-1]) if values else float("nan")


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

    def steps(self, table: int) -> list[Step]:
        """Steps of a table, with those of other tables that it needs."""
        made = {1: self._table1, 2: self._table2, 3: self._table3, 4: self._table4}[table]()
        return list({s.name: s for s in made}.values())

    # ---- data ---------------------------------------------------------------------------

    def _store(self, name: str = "store") -> list[Step]:
        c, steps = self.config, []
        source = c.data or "cohort"
        if c.data is None:
            steps.append(step("cohort", "make-cohort", *c.cohort, "--out", "cohort"))
        preset, changes = (c.prepare, []) if name == "store" else (c.prepare_channels, c.prepare_channels_changes)
        return [*steps, step(name, "prepare", source, "--preset", preset, *changes, "--out", name, "-q")]

    # ---- stage 1 ------------------------------------------------------------------------

    def _ours(self, seed: int, store: str = "store") -> list[Step]:
        c, run = self.config, f"seed-{seed}/{store}-{OURS}"
        keys = [f"data={store}", f"seed={seed}", *c.train_changes]
        tag = run.replace("/", "-")
        return [
            step(tag, "train-autodecoder", c.train, *keys, "--out", run, "-q", resume=True),
            step(
                f"{tag}-encoded",
                "encode",
                run,
                store,
                "--split",
                c.held_out,
                *c.encode_changes,
                "--out",
                f"{run}-encoded",
                "-q",
            ),
        ]

    def _rival(self, name: str, seed: int, store: str = "store", steps: bool = False) -> list[Step]:
        """Training of a rival for the time of ours, or for its steps."""
        c, run = self.config, f"seed-{seed}/{store}-{name}{'-equal-steps' if steps else ''}"
        preset, changes = (c.vae_gan, c.vae_gan_changes) if name == "vae-gan" else (c.vq_gan, c.vq_gan_changes)
        ours = self.folder / f"seed-{seed}/{store}-{OURS}"

        def arguments() -> list[str]:
            if steps:
                budget = [f"steps={max(int(r['step']) for r in read_metrics(ours))}"]
            else:
                budget = ["steps=1000000", f"minutes={last(ours, 'seconds') / 60:.2f}"]
            keys = [f"data={store}", f"seed={seed}", *changes, *budget]
            return ["baseline", "train", preset, *keys, "--out", run, "-q"]

        return [Step(run.replace("/", "-"), arguments, resume=True)]

    def _evaluated(self, run: str, store: str = "store") -> Step:
        return step(f"{run.replace('/', '-')}-evaluate", "evaluate", store, run, "--out", f"{run}-evaluation", "-q")

    def reconstructions(self, seed: int, store: str = "store") -> dict[str, list[str]]:
        """Folders with reconstructions of each model."""
        run = f"seed-{seed}/{store}-"
        equal = {f"{n}-equal-steps": [f"{run}{n}-equal-steps"] for n in RIVALS if self.equal_steps and store == "store"}
        return {OURS: [f"{run}{OURS}", f"{run}{OURS}-encoded"], **{n: [f"{run}{n}"] for n in RIVALS}, **equal}

    def _stage1(self, seed: int, store: str = "store") -> list[Step]:
        steps = [*self._store(store), *self._ours(seed, store)]
        for name in RIVALS:
            steps += self._rival(name, seed, store)
            if self.equal_steps and store == "store":
                steps += self._rival(name, seed, store, steps=True)
        return steps

    def _table1(self) -> list[Step]:
        steps = []
        for seed in range(self.seeds):
            steps += self._stage1(seed)
            steps += [self._evaluated(f) for folders in self.reconstructions(seed).values() for f in folders]
        return steps

    def _table2(self) -> list[Step]:
        c, store = self.config, "store-channels"
        folders = [f for of in self.reconstructions(0, store).values() for f in of]
        keys = ["--preset", c.segment, *c.segment_changes, "--repeats", str(c.repeats)]
        return [*self._stage1(0, store), step("segment", "segment", store, *folders, *keys, "--out", "segmentation", "-q")]

    # ---- stage 2 ------------------------------------------------------------------------

    def _generators(self, seed: int) -> list[Step]:
        c, at = self.config, f"seed-{seed}"
        ours = f"{at}/store-{OURS}"

        def ours_like(name: str, *changes: str) -> list[Step]:
            keys = [f"latents={ours}-latents", f"validation={ours}-encoded", f"seed={seed}", *c.diffusion_changes, *changes]
            return [
                step(f"{at}-{name}", "train-diffusion", c.diffusion, *keys, "--out", f"{at}/{name}", "-q", resume=True),
                self._drawn(name, seed, "sample", "--steps", str(c.sample_steps)),
            ]

        def ldm(name: str) -> list[Step]:
            preset, changes = (
                (c.ldm_vae_gan, c.ldm_vae_gan_changes) if name == "ldm-vae-gan" else (c.ldm_vq_gan, c.ldm_vq_gan_changes)
            )

            def arguments() -> list[str]:
                minutes = last(self.folder / at / "diffusion", "seconds") / 60
                rival = f"{at}/store-{name.removeprefix('ldm-')}"
                keys = [
                    f"autoencoder={rival}",
                    "data=store",
                    f"seed={seed}",
                    *changes,
                    "steps=1000000",
                    f"minutes={minutes:.2f}",
                ]
                return ["baseline", "train", preset, *keys, "--out", f"{at}/{name}", "-q"]

            return [Step(f"{at}-{name}", arguments, resume=True), self._drawn(name, seed, "baseline", "sample")]

        return [
            step(f"{at}-latents", "export-latents", ours, "--out", f"{ours}-latents", "-q"),
            *ours_like("diffusion"),
            *ours_like("no-cross", "network.cross=none"),
            *ours_like("concatenated", "network.weights=concatenated"),
            *ldm("ldm-vae-gan"),
            *ldm("ldm-vq-gan"),
            step(f"{at}-gaussian", "baseline", "train", "gaussian", f"latents={ours}-latents", "--out", f"{at}/gaussian"),
            self._drawn("gaussian", seed, "baseline", "sample"),
        ]

    def _drawn(self, name: str, seed: int, *command: str) -> Step:
        run = f"seed-{seed}/{name}"
        n, more = str(self.config.samples), command[1:] if command[0] == "sample" else ()
        words = ("sample",) if command[0] == "sample" else command
        return step(
            f"{run.replace('/', '-')}-samples",
            *words,
            run,
            "--n",
            n,
            "--seed",
            str(seed),
            *more,
            "--out",
            f"{run}-samples",
            "-q",
        )

    def _table3(self) -> list[Step]:
        c, steps = self.config, []
        for seed in range(self.seeds):
            steps += [*self._stage1(seed), *self._generators(seed)]
        steps.append(step("features", "features", "train", "store", f"size={c.size}", "--out", "features", "-q", resume=True))
        common = ["--size", str(c.size), "--features", "features", "-q"]
        for seed in range(self.seeds):
            at = f"seed-{seed}"
            every = [f"{at}/{n}-samples" for n in ("diffusion", *GENERATORS)]
            steps.append(step(f"{at}-sets", "evaluate", "store", *every, *common, "--out", f"{at}/sets"))
            for name in GENERATORS:
                pair = [f"{at}/diffusion-samples", f"{at}/{name}-samples", f"size={c.size}", *c.critic_changes]
                critics = ["--critics", str(c.critics), "--size", str(c.size), "-q"]
                controls = [] if name == next(iter(GENERATORS)) else ["--no-controls"]
                out = ["--out", f"{at}/pair-{name}"]
                steps.append(step(f"{at}-pair-{name}", "evaluate", "store", *pair, *critics, *controls, *out))
        return steps

    def _table4(self) -> list[Step]:
        c = self.config
        values = "channels=" + ",".join(map(str, c.channels))
        keys = [k for k in ["data=store", *c.train_changes] if not k.startswith("channels=")]
        return [*self._store(), step("ablation", "ablate", c.train, values, *keys, "--out", "ablation", "-q")]
