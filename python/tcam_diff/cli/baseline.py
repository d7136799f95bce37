"""``tcam baseline``: train rivals of TCAM-Diff, reconstruct volumes with them and draw samples from them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from tcam_diff import config as configs
from tcam_diff.baselines.config import CompressionConfig, GaussianConfig, LatentDiffusionConfig
from tcam_diff.cli.common import RESUMED, Quiet, Resume, duration, end_training, progress_bar, say, stop_on_interrupt
from tcam_diff.errors import UserError

app = typer.Typer(
    help="Rivals of TCAM-Diff: VAE-GAN and VQ-GAN with 3D latent diffusion, of MONAI's networks, and a Gaussian of planes. "
    "Concatenated planes (NFD) and no cross-attention: `tcam train-diffusion` with network.weights=concatenated and "
    "network.cross=none.",
    no_args_is_help=True,
)
COMPRESSIONS, DIFFUSIONS = configs.presets("baseline"), [f"ldm-{n}" for n in configs.presets("ldm")]
SHOWN = [
    ("loss", "loss", ".4f", ""), ("PSNR", "psnr", ".2f", " dB"), ("", "steps_per_second", ".2f", " steps/s"),
]  # fmt: skip


@app.command("train")
def train_command(
    preset: Annotated[
        str,
        typer.Argument(help=f"A preset ({', '.join([*COMPRESSIONS, *DIFFUSIONS, 'gaussian'])}) or the config.yaml of a run."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes: data=STORE, autoencoder=RUN or latents=LATENTS, and others."),
    ] = None,
    resume: Resume = None,
    quiet: Quiet = False,
) -> None:
    """Train a rival.

    vae-gan and vq-gan compress volumes (data=STORE), ldm-... generates their latents (autoencoder=RUN), gaussian fits a
    Gaussian to planes (latents=LATENTS). Ctrl-C stops and writes a checkpoint; --resume auto continues. minutes=M ends a
    training after that time, to compare rivals at equal times.
    """
    from tcam_diff.training.run import train

    settings = _settings(preset, overrides or [])
    if isinstance(settings, GaussianConfig):
        from tcam_diff.baselines.gaussian import fit_gaussian

        made = fit_gaussian(settings, out)
        say(f"{out}: Gaussian of {made.directions.shape[1]} numbers in {made.directions.shape[0]} directions")
        return
    task: Any
    if isinstance(settings, CompressionConfig):
        from tcam_diff.baselines.compression import CompressionTraining as task
    else:
        from tcam_diff.baselines.latent_diffusion import LatentDiffusionTraining as task

    def started(made: Any) -> None:
        model = made.model if isinstance(settings, CompressionConfig) else made.model.compression
        volumes = f"{len(made.records)} volumes; " if hasattr(made, "records") else ""
        say(
            f"{volumes}latents {' x '.join(map(str, model.latent_shape))} ({model.latents} numbers a volume), "
            f"{made.parameters / 1e6:.2f} M parameters"
        )

    with progress_bar("training", quiet, SHOWN) as show, stop_on_interrupt(RESUMED) as stop:
        outcome = train(task, settings, out, resume, None if quiet else started, show, stop)
    end_training(out, outcome, settings.steps, quiet)
    if not quiet:
        m = outcome.metrics
        result = f"PSNR {m['psnr']:.2f} dB" if "psnr" in m else f"loss {m['evaluation_loss']:.4f}"
        say(f"{out}: {outcome.step} steps in {duration(outcome.seconds)}, {result}, {m.get('memory_gb', 0):.2f} GB at most")


def _settings(preset: str, overrides: list[str]) -> CompressionConfig | LatentDiffusionConfig | GaussianConfig:
    if preset == "gaussian":
        return GaussianConfig.load("default", overrides)
    if preset in DIFFUSIONS:
        return LatentDiffusionConfig.load(preset.removeprefix("ldm-"), overrides)
    if preset in COMPRESSIONS:
        return CompressionConfig.load(preset, overrides)
    if Path(preset).is_file():
        keys = configs.read_settings(Path(preset))
        return (LatentDiffusionConfig if "autoencoder" in keys else CompressionConfig).load(preset, overrides)
    known = ", ".join([*COMPRESSIONS, *DIFFUSIONS, "gaussian"])
    raise UserError(f"{preset}: expected a preset ({known}) or the config.yaml of a run")


train_command.__doc__ = (
    f"{inspect.getdoc(train_command)}\n\nKeys of vae-gan and vq-gan:\n\n\b\n{configs.describe(CompressionConfig)}\n\n"
    f"Keys of ldm-...:\n\n\b\n{configs.describe(LatentDiffusionConfig)}\n\n"
    f"Keys of gaussian:\n\n\b\n{configs.describe(GaussianConfig)}\n"
)


@app.command("reconstruct")
def reconstruct_command(
    run: Annotated[Path, typer.Argument(help="A run of `tcam baseline train` with vae-gan or vq-gan.")],
    store: Annotated[Path, typer.Argument(help="The volumes: a store of `tcam prepare`.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the volumes, as NIfTI.")],
    split: Annotated[str | None, typer.Option(help="Volumes of this split. [default: all]", show_default=False)] = None,
    dtype: Annotated[str, typer.Option(help="float32, int16, uint16 or uint8 (integers with a scale).")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Compress volumes and write what is left of them. `tcam evaluate STORE RUN` does the same without files."""
    from tcam_diff.baselines.draw import reconstruct
    from tcam_diff.data.store import Store

    with progress_bar("reconstructing", quiet) as show:
        count = reconstruct(run, Store(store), out, split=split, dtype=dtype, device=device, progress=show)
    say(f"{out}: {count} volumes")


@app.command("sample")
def sample_command(
    run: Annotated[Path, typer.Argument(help="A run of `tcam baseline train` with ldm-... or gaussian.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the volumes; existing ones are kept.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Number of volumes.")] = 4,
    first: Annotated[int, typer.Option(min=0, help="Number of the first sample; sample i is the same in any command.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, int16, uint16 or uint8 (integers with a scale).")] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 4,
    planes: Annotated[
        bool, typer.Option("--planes", help="For gaussian: also write the planes of each volume, as safetensors.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    quiet: Quiet = False,
) -> None:
    """Draw volumes, in files like those of `tcam sample`. Ctrl-C stops; the same command continues."""
    from tcam_diff.baselines.draw import draw
    from tcam_diff.diffusion.draw import SHEET

    with progress_bar("sampling", quiet) as show, stop_on_interrupt("the same command continues") as stop:
        done = draw(
            run, out, range(first, first + n), seed=seed, dtype=dtype, planes=planes, batch_size=batch_size, device=device,
            progress=show, stop=stop,
        )  # fmt: skip
    if not done:
        raise KeyboardInterrupt
    say(f"{out}: {n} volumes; {out / SHEET}")
