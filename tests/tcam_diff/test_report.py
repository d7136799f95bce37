"""The page of tcam report: what it holds, that nothing in it can run or reach a network, and what a browser makes of it."""

from __future__ import annotations

import base64
import csv
import gzip
import html.parser
import io
import json
import re
import shutil
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import runs
import torch
from matplotlib import pyplot as plt
from tcam_diff.data.nifti import Quantiser, write_volume
from tcam_diff.data.store import Store, StoreWriter, quantise
from tcam_diff.data.volume import VolumeInfo
from tcam_diff.errors import UserError
from tcam_diff.evaluation.reconstruction import find_reconstructions
from tcam_diff.report import niivue, page
from tcam_diff.report.volumes import nifti, shown, shrunk
from tcam_diff.tables.render import markdown

HOSTILE = "<img src=x onerror=alert(1)>\"'&<!--<script>"
SIZE = (24, 20, 28)
#: Left, posterior and superior, oblique by a few degrees, and away from the origin.
AFFINE = np.array([[-2.0, 0.1, 0, 30], [0.1, -1.5, 0.05, 20], [0, 0.05, 1.0, -12], [0, 0, 0, 1]])


def make_store(folder: Path, names: list[str]) -> Store:
    writer = StoreWriter(folder, {"note": HOSTILE})
    info = VolumeInfo(channels=1, shape=SIZE, affine=AFFINE, intensity=[(10.0, 20.0)])
    records = [writer.write(n, "train", quantise(runs.blobs(i, SIZE), "uint8"), info, []) for i, n in enumerate(names)]
    writer.finish(records)
    return Store(folder)


def make_samples(folder: Path, count: int = 2) -> list[np.ndarray]:
    """Files as of tcam sample, in physical units from -10 to 90. Returns the volumes in [0, 1]."""
    folder.mkdir()
    volumes = [runs.blobs(100 + i, SIZE) for i in range(count)]
    info = VolumeInfo(channels=1, shape=SIZE, affine=AFFINE, intensity=[(-10.0, 90.0)])
    for i, volume in enumerate(volumes):
        stem = f"sample-{i:04d}_seed0_heun3"
        write_volume(folder / f"{stem}.nii.gz", iter([100 * volume - 10]), info, Quantiser("float32", 0, 1))
        sampling = {"solver": "heun", "steps": 3, "seed": 0}
        content = {"model": "0" * 64, "sampling": sampling, "dtype": "float32", "intensity": [(-10.0, 90.0)]}
        (folder / f"{stem}.json").write_text(json.dumps(content))
    return volumes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A store, a run of stage 1, samples, and the evaluation of the run."""
    work = tmp_path_factory.mktemp("report")
    store = make_store(work / "store", ["one", HOSTILE, "three", "four"]).folder
    runs.run(store, work / "run", ("batch=2",))
    make_samples(work / "samples")
    runs.tcam("evaluate", store, work / "run", "--out", work / "evaluation", "-q")
    return work


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script in place of NiiVue's, which a package that was built without npm lacks."""
    path = tmp_path / "niivue.js"
    path.write_text("const niivue = {};")
    monkeypatch.setattr(niivue, "SCRIPT", path)


def embedded(path: Path) -> dict[str, dict[str, nib.Nifti1Image]]:
    """The volumes of a page's first viewer, by column and name."""
    data = re.search(r'<script type="application/json">(.*?)</script>', path.read_text(), re.S)
    assert data is not None
    return {
        column["title"]: {
            v["name"]: nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(v["nifti"]))) for v in column["volumes"]
        }
        for column in json.loads(data[1])["columns"]
    }


class Elements(html.parser.HTMLParser):
    """Tags and attributes of a page, and its text outside scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_data(self, data):
        if self.tags[-1:] not in (["script"], ["style"]):
            self.text += data


# ---- what it holds -------------------------------------------------------------------------


def test_the_page_holds_the_volumes(folders, script, tmp_path):
    """Real volumes are those of the store, byte for byte; the others are within half a level. All have the true affine."""
    out = tmp_path / "page.html"
    said = runs.tcam(
        "report", folders / "samples", folders / "evaluation", folders / "run", "--out", out, "--volumes", "2", "-q"
    )
    assert "6 volumes" in said
    columns = embedded(out)
    assert list(columns) == ["real", "reconstructed", "generated"]
    store = Store(folders / "store")
    records = store.records[:2]
    assert list(columns["real"]) == list(columns["reconstructed"]) == [r.name for r in records] == ["one", HOSTILE]
    for record in records:
        image = columns["real"][record.name]
        assert (np.asarray(image.dataobj.get_unscaled()) == store.volume(record)[0]).all()
        assert abs(image.get_fdata() - store.volume(record)[0] / 255.0).max() < 1e-6
    for found in find_reconstructions(store, folders / "run")[:2]:
        assert abs(columns["reconstructed"][found.record.name].get_fdata() - found.read()[0].numpy()).max() <= 0.5001 / 255
    for i, (name, image) in enumerate(columns["generated"].items()):
        assert name == f"sample-{i:04d}_seed0_heun3"
        assert abs(image.get_fdata() - runs.blobs(100 + i, SIZE)[0]).max() <= 0.5001 / 255
    for images in columns.values():
        for image in images.values():
            assert np.allclose(image.affine, AFFINE, atol=1e-5)
            assert nib.aff2axcodes(image.affine) == ("L", "P", "S")


def test_large_volumes_are_averaged_over_the_same_place(folders, script, tmp_path):
    out = tmp_path / "page.html"
    runs.tcam("report", folders / "run", "--out", out, "--size", "10", "-q")
    image, store = embedded(out)["real"]["one"], Store(folders / "store")
    assert image.shape == (10, 10, 10)
    assert abs(image.get_fdata().mean() - store.volume(store.records[0]).mean() / 255) < 0.01
    corners = [[(*np.multiply(c, s) - 0.5, 1) for c in np.ndindex(2, 2, 2)] for s in (image.shape, SIZE)]
    assert np.allclose(np.array(corners[0]) @ image.affine.T, np.array(corners[1]) @ AFFINE.T, atol=1e-4)
    assert "averaged to 10 x 10 x 10 for this page" in out.read_text()


def test_the_page_stays_below_its_limit(folders, script, tmp_path, monkeypatch):
    """Random volumes do not compress: they get smaller until the page does not exceed the limit."""
    noise = shown("noise", torch.rand(1, 64, 64, 64), VolumeInfo(channels=1, shape=(64,) * 3, affine=np.eye(4)), 0, 64)
    columns = [page.Column("real", [noise, noise])]
    monkeypatch.setattr(page, "MOST_BYTES", 500_000)
    written = page.write_page(tmp_path / "p.html", "t", "", [("Volumes", columns)], [], "const niivue = {};")
    assert (tmp_path / "p.html").stat().st_size == written.bytes <= 500_000
    assert 30 < embedded(tmp_path / "p.html")["real"]["noise"].shape[0] < 64
    monkeypatch.setattr(page, "MOST_BYTES", 30_000)
    with pytest.raises(UserError, match="too many for a page"):
        page.write_page(tmp_path / "p.html", "t", "", [("Volumes", columns)], [], "const niivue = {};")


def test_a_shrunk_volume_is_of_means():
    whole = shown("v", torch.rand(2, 16, 12, 8), VolumeInfo(channels=2, shape=(16, 12, 8), affine=AFFINE), 1, 128)
    small = shrunk(whole, 4)
    image = nib.Nifti1Image.from_bytes(gzip.decompress(nifti(small)))
    want = whole.data.reshape(4, 4, 4, 3, 4, 2).mean((1, 3, 5)).numpy()
    assert abs(image.get_fdata() - want).max() <= 0.5001 / 255
    assert shrunk(whole, 16) is whole


def test_tables_curves_and_origin(folders, script, tmp_path):
    out = tmp_path / "page.html"
    runs.tcam("report", folders / "run", folders / "samples", folders / "evaluation", "--out", out, "-q")
    text = Elements(out).text
    summary = json.loads((folders / "evaluation" / "summary.json").read_text())
    (figures,) = summary["groups"].values()
    for figure in figures.values():
        assert f"{figure['mean']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})" in text
    for words in (
        "PSNR, dBhigher", "MSElower", "(4 volumes)", "Every volume (4)", "95 % interval", "window of 11 voxels",  # table
        "steps24", "channels: 6", "4 in the split train", "GPU", f"torch {torch.__version__}", "1 on cpu",
        f"tcam train-autodecoder {folders / 'run' / 'config.yaml'} --out {folders / 'run'}",
        f"tcam evaluate {folders / 'store'} {folders / 'run'} --out {folders / 'evaluation'}",
        f"tcam sample MODEL --n 2 --solver heun --steps 3 --seed 0 --dtype float32 --out {folders / 'samples'}",
    ):  # fmt: skip
        assert words in text, words
    with open(folders / "evaluation" / "volumes.csv") as file:
        assert [row["name"] in text for row in csv.DictReader(file)] == [True] * 4


def test_the_spread_of_samples_is_a_table(script, tmp_path):
    store = runs.make_store(tmp_path / "store", size=(12, 12, 12)).folder
    make_samples(tmp_path / "samples")
    runs.tcam("evaluate", store, tmp_path / "samples", "--out", tmp_path / "spread", "--size", "8", "-q")
    runs.tcam("report", tmp_path / "samples", tmp_path / "spread", "--out", tmp_path / "p.html", "-q")
    text = Elements(tmp_path / "p.html").text
    assert f"{tmp_path / 'samples'} (2 volumes)held out (2 volumes)training volumes (7 volumes)" in text
    assert "mean RMS difference of pairsthat of held-out volumes" in text
    assert list(embedded(tmp_path / "p.html")["real"]) == ["blob0", "blob1", "blob2"]


def test_tables_figures_and_segmentations(script, tmp_path):
    """A page of them alone, of the repository's result files. Damaged ones are named."""
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    (tmp_path / "tables" / "steps").mkdir(parents=True)
    content = json.loads((results / "table-1.json").read_text())
    (tmp_path / "tables" / "table-1.md").write_text(markdown(content))
    (tmp_path / "tables" / "config.yaml").write_text("kind: table\n")
    plt.imsave(tmp_path / "tables" / "figure-5.png", np.zeros((8, 8, 3)))
    (tmp_path / "segmentation").mkdir()
    rows = json.loads((results / "table-2.json").read_text())["rows"]
    (tmp_path / "segmentation" / "segmentation.json").write_text(json.dumps({"protocol": {"store": "S"}, "rows": rows}))
    runs.tcam("report", tmp_path / "tables", tmp_path / "segmentation", "--out", tmp_path / "p.html", "-q")
    elements = Elements(tmp_path / "p.html")
    for words in (
        "Table 1: ",
        "Figure 5: ",
        "VAE-GAN (MONAI)",
        "tcam make-cohort",
        "Segmentation: ",
        "precision",
        "0.864 ± 0.021",
    ):
        assert words in elements.text, words
    assert elements.tags.count("img") == 1
    assert "no real volumes" not in elements.text
    assert elements.tags.count("table") == 4 + 4 + 1  # of table 1, of two splits and references, the hardware
    (tmp_path / "segmentation" / "segmentation.json").write_text('{"rows": [{"split": "test"}]}')
    said = runs.tcam("report", tmp_path / "segmentation", "--out", tmp_path / "q.html", "-q", fails=True)
    assert "segmentation.json: damaged" in said


def test_both_stages_and_latents(trained, latents, script, tmp_path):
    """The command of samples names the run of stage 2 whose model drew them. Synthetic latents have no store."""
    runs.sample(trained, tmp_path / "samples")
    said = runs.tcam("report", trained, tmp_path / "samples", "--out", tmp_path / "p.html", "-q")
    text = Elements(tmp_path / "p.html").text
    assert f"tcam sample {trained} --n 5" in text
    assert "loss on training volumes" in text
    assert "no real volumes" in said
    assert "no real volumes" in text
    refused = runs.tcam("report", latents, "--out", tmp_path / "p.html", fails=True)
    assert "names the store" in refused
    assert "--store STORE" in refused


def test_samples_alone_have_no_real_volumes_unless_a_store_is_given(folders, script, tmp_path):
    out = tmp_path / "page.html"
    runs.tcam("report", folders / "samples", "--out", out, "-q")
    assert list(embedded(out)) == ["generated"]
    runs.tcam("report", folders / "samples", "--store", folders / "store", "--out", out, "-q")
    assert list(embedded(out)) == ["real", "generated"]


# ---- what it must not do -------------------------------------------------------------------


def test_nothing_from_files_becomes_markup(folders, script, tmp_path):
    """Names of cases, groups, settings and folders are text; no element, attribute or script comes from them."""
    hostile = tmp_path / HOSTILE
    hostile.mkdir()
    mean = {"volumes": 1, "mean": 1.0, "low": 1.0, "high": 1.0}
    content = {"protocol": {"real": str(folders / "store"), HOSTILE: HOSTILE}, "groups": {HOSTILE: {HOSTILE: mean}}}
    (hostile / "summary.json").write_text(json.dumps(content))
    (hostile / "volumes.csv").write_text(f"name\n{HOSTILE}\n")
    out = tmp_path / "page.html"
    runs.tcam("report", folders / "run", hostile, "--out", out, "-q")
    elements = Elements(out)
    assert elements.tags.count("script") == 3  # the volumes, the viewer, this package's part
    assert elements.tags.count("img") == 2  # the still picture and the curves
    assert {k for k, _ in elements.attributes} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "type", "alt", "src",
    }  # fmt: skip
    assert all(v.startswith("data:image/png;base64,") for k, v in elements.attributes if k == "src")
    assert elements.text.count(HOSTILE) >= 6


def test_the_policy_allows_the_scripts_of_the_page_alone(folders, script, tmp_path):
    runs.tcam("report", folders / "run", "--out", tmp_path / "p.html", "-q")
    (policy,) = (v for k, v in Elements(tmp_path / "p.html").attributes if k == "content" and "-src" in v)
    assert policy.startswith("default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'sha256-")
    assert policy.count("'sha256-") == 2
    assert policy.count("unsafe") == 1


def test_without_the_viewer_the_page_has_pictures_and_says_why(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(niivue, "SCRIPT", tmp_path / "none.js")
    out = tmp_path / "page.html"
    said = runs.tcam("report", folders / "run", folders / "samples", "--out", out, "-q")
    elements = Elements(out)
    for text in (said, elements.text):
        assert "built without NiiVue" in text
        assert "npm pack @niivue/niivue@" in text
    assert "script" not in elements.tags
    assert elements.tags.count("img") == 2
    assert any("script-src 'none'" in v for _, v in elements.attributes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], r"nowhere: no such folder; expected a run of"),
        (["empty"], r"empty: expected a run of .*; it has no files"),
        (["store"], r"store: expected a run of .*; it has cases, store.json"),
        (["odd"], r"config.yaml: expected the key data or latents, as in a run of training; got colour"),
        (["moved"], r"moved: names the store .*gone, which is not there; give its place: --store STORE"),
        (["damaged"], r"summary.json: damaged: .*; run `tcam evaluate` again"),
        (["run", "of-other"], r"of-other: is of the store .*other, .*run of .*store; make a page for each"),
        (["run", "--channel", "3"], r"--channel: expected 0 to 0, the channels of one, got 3"),
        (["run", "--store", "nowhere"], r"nowhere: not a folder that `tcam prepare` finished"),
        (
            ["run", "--niivue", "run/config.yaml"],
            r"--niivue .*config.yaml: not the package of NiiVue .*; expected the file that",
        ),
        (["run", "--niivue", "nowhere"], r"--niivue .*nowhere: cannot be read: No such file"),
        (["bare"], r"nothing to show: expected a run of `tcam train-autodecoder`, samples, or --store STORE"),
        (["started"], r"started: has no checkpoint yet"),
    ],
)
def test_what_cannot_be_shown_is_refused(folders, script, tmp_path, arguments, message):
    for name in ("empty", "odd", "moved", "damaged", "of-other", "bare", "started"):
        (tmp_path / name).mkdir()
    for name in ("store", "run"):
        (tmp_path / name).symlink_to(folders / name)
    (tmp_path / "odd" / "config.yaml").write_text("colour: red\n")
    text = (folders / "run" / "config.yaml").read_text()
    (tmp_path / "started" / "config.yaml").write_text(text)
    (tmp_path / "moved" / "config.yaml").write_text(text.replace(str(folders / "store"), str(tmp_path / "gone")))
    (tmp_path / "damaged" / "summary.json").write_text('{"protocol": {}, "groups": {"a": {"b": {"mean": "x"}}}}')
    other = make_store(tmp_path / "other", ["one"]).folder
    (tmp_path / "of-other" / "summary.json").write_text(json.dumps({"protocol": {"real": str(other)}, "groups": {}}))
    (tmp_path / "bare" / "summary.json").write_text('{"protocol": {}}')
    paths = [a if a.startswith("--") or a.isdigit() else tmp_path / a for a in arguments]
    assert re.search(message, runs.tcam("report", *paths, "--out", tmp_path / "p.html", "-q", fails=True))
    assert not (tmp_path / "p.html").exists()


def test_a_folder_is_no_place_for_the_page(folders, script, tmp_path):
    assert "is a folder; expected the name of a file" in runs.tcam("report", folders / "run", "--out", tmp_path, fails=True)


# ---- in a browser --------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, with WebGL in software, behind selenium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium or chromedriver is not on PATH")
    if not niivue.SCRIPT.is_file():
        pytest.skip("this package was built without NiiVue")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for argument in (
        "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--use-gl=angle", "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader", "--window-size=1280,1000", f"--user-data-dir={tmp_path / 'profile'}",
    ):  # fmt: skip
        options.add_argument(argument)
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    started.set_script_timeout(60)
    yield started
    started.quit()


def pixels(element) -> np.ndarray:
    return plt.imread(io.BytesIO(element.screenshot_as_png), format="png")[..., :3]


def settled(check, seconds: float = 30) -> None:
    """Wait until ``check`` holds."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "nothing changed"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_in_a_browser(folders, browser, tmp_path):
    """It opens without a network, draws, scrolls through linked slices, and windows."""
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    from selenium.webdriver.support.ui import Select

    out = tmp_path / "page.html"
    runs.tcam("report", folders / "run", folders / "samples", folders / "evaluation", "--out", out, "--volumes", "2", "-q")
    assert out.stat().st_size < 25e6
    browser.get(out.as_uri())

    def find(selector: str):
        return browser.find_elements("css selector", selector)

    settled(lambda: find(".viewer.started"), 120)
    canvases, places = find("canvas"), find(".place")
    assert [e.text for e in find(".head b")] == ["real", "reconstructed", "generated"]
    assert len(canvases) == len(places) == 3
    assert not find(".viewer .still")[0].is_displayed()

    def at() -> list[str]:
        """The crosshair's place in each column, in mm."""
        return [p.text.partition(" mm")[0] for p in places]

    def draw() -> list[np.ndarray]:
        return [pixels(c) for c in canvases]

    first, begin = draw(), at()
    assert len(set(begin)) == 1
    for picture in first:
        assert picture.std() > 0.05
        assert len(np.unique(picture)) > 50

    # Keys and wheel move every column to the same place, and every picture changes.
    ActionChains(browser).move_to_element(canvases[0]).perform()
    canvases[0].send_keys(Keys.PAGE_UP * 6)
    settled(lambda: len(set(at())) == 1 and at() != begin)
    second = draw()
    assert all(abs(a - b).mean() > 1e-3 for a, b in zip(first, second, strict=True))
    view = Select(find(".controls select")[0])
    view.select_by_visible_text("axial")
    settled(lambda: all(c.size["height"] == c.size["width"] for c in canvases))
    moved, axial = at(), draw()
    ActionChains(browser).move_to_element_with_offset(canvases[2], 20, 20).perform()
    for _ in range(3):
        ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(canvases[2], 20, 20), 0, 120).perform()
    settled(lambda: len(set(at())) == 1 and at() != moved)
    assert all(abs(a - b).mean() > 1e-3 for a, b in zip(axial, draw(), strict=True))
    view.select_by_visible_text("three planes")
    settled(lambda: all(c.size["height"] > c.size["width"] for c in canvases))
    third = draw()

    # The window applies to every column, and reset undoes it.
    low, high = find("input[type=range]")
    low.send_keys(Keys.ARROW_RIGHT * 30)
    settled(lambda: low.get_attribute("value") == "0.3")
    fourth = draw()
    assert all(b.mean() < a.mean() for a, b in zip(third, fourth, strict=True))
    high.send_keys(Keys.HOME)  # white stays above black
    assert float(high.get_attribute("value")) > float(low.get_attribute("value"))
    find(".controls button")[0].click()
    settled(lambda: at() == begin)
    assert all(abs(a - b).mean() < 1e-3 for a, b in zip(first, draw(), strict=True))

    # Another case changes the real and the reconstructed volume. Its name is text.
    Select(find(".head select")[0]).select_by_index(1)
    settled(lambda: find(".detail")[1].text.startswith(HOSTILE))
    fifth = draw()
    changed = [abs(a - b).mean() > 1e-3 for a, b in zip(first, fifth, strict=True)]
    assert changed == [True, True, False]
    for name in ("sagittal", "3D"):
        view.select_by_visible_text(name)
        settled(lambda: all(c.size["height"] == c.size["width"] for c in canvases))
        assert all(p.std() > 0.02 for p in draw())

    # Nothing was asked of a network, and nothing can be.
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = [p["request"]["url"] for p in sent if p["documentURL"].startswith("file:")]
    assert out.as_uri() in asked
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    refused = browser.execute_async_script(
        "const done = arguments[0]; document.addEventListener('securitypolicyviolation', (e) => done(e.effectiveDirective));"
        "fetch('http://127.0.0.1:9/').catch(() => {});"
    )
    assert refused == "connect-src"
