"""Demo: fit planes to an MRI and decode them, then train both stages on a cohort and draw new volumes.

The MRI is the central 128^3 voxels of the MNI152 T1 template (ICBM 2009a, 1 mm) from nilearn. The cohort is made from the same
template.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tcam_diff.environment import prepare_environment
from tcam_diff.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tcam_diff.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results (default: demo)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the preset fast of the fit")
    parser.add_argument("--fit-only", action="store_true", help="only fit the MRI: no cohort, no new volumes")
    arguments = parser.parse_args()
    prepare_environment()
    import torch

    import tcam_ext
    from tcam_diff.demo.run import fit_one, generate
    from tcam_diff.files import fault

    print(f"tcam_ext {tcam_ext.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    start = time.monotonic()
    out: Path = arguments.out
    try:
        out.mkdir(parents=True, exist_ok=True)
        fit_one(out, arguments.overrides, start)
        if not arguments.fit_only:
            generate(out, start)
    except UserError as error:
        raise SystemExit(f"demo: {error}") from error
    except OSError as error:
        raise SystemExit(f"demo: {fault(error)}") from error
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the same command continues")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
