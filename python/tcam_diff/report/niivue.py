"""NiiVue, the viewer in the page: taken from its npm package when this package is built, and read when a page is made.

setup.py runs this file by its path, so it imports the standard library alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

VERSION = "0.69.0"
#: Digest of the npm package, as npm writes it.
INTEGRITY = "sha512-YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
#: The script in the package: one file for pages without modules, which defines the global variable ``niivue``.
MEMBER = "package/dist/niivue.umd.js"
SCRIPT = Path(__file__).with_name("niivue.js")
LICENCE = Path(__file__).with_name("niivue-licence.txt")
PACK = f"npm pack @niivue/niivue@{VERSION}"
#: Seconds that npm may take.
PATIENCE = 60


def unpack(package: bytes) -> str:
    """The viewer's script in an npm package, after a comment with its version and licence. Raises ValueError."""
    digest = "sha512-" + base64.b64encode(hashlib.sha512(package).digest()).decode()
    if digest != INTEGRITY:
        raise ValueError(f"not the package of NiiVue {VERSION}: its digest is {digest}")
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        member = archive.extractfile(MEMBER)
        assert member is not None
        return _comment() + member.read().decode()


def _comment() -> str:
    return f"/*! NiiVue {VERSION}, the part {MEMBER} of its npm package.\n\n{LICENCE.read_text()}*/\n"


def fetch() -> str:
    """Write the script beside this file, unless it is there. Returns why it is not there, or ""."""
    try:
        if SCRIPT.is_file() and SCRIPT.read_text().startswith(_comment()):
            return ""
        SCRIPT.unlink(missing_ok=True)
        npm = shutil.which("npm")
        if npm is None:
            return "npm is not on PATH"
        with tempfile.TemporaryDirectory() as folder:
            command = [npm, *PACK.split()[1:], "--silent", "--fetch-retries=1", f"--fetch-timeout={PATIENCE * 500}"]
            done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
            packages = list(Path(folder).glob("*.tgz"))
            if done.returncode != 0 or len(packages) != 1:
                return f"`{PACK}` failed"
            part = Path(folder) / SCRIPT.name
            part.write_text(unpack(packages[0].read_bytes()))
            shutil.copy2(part, SCRIPT.with_suffix(".part"))
            SCRIPT.with_suffix(".part").replace(SCRIPT)
    except subprocess.TimeoutExpired:
        return f"`{PACK}` took more than {PATIENCE} s"
    except (OSError, ValueError) as error:
        return str(error)
    return ""
