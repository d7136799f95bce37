"use strict";
// Every .viewer element holds the volumes of its columns as JSON, and a picture that stays where NiiVue or WebGL2 is missing.
// A column is a NiiVue instance. Crosshair, zoom, window and view are one for all columns of a viewer.

const VIEWS = { "three planes": 3, axial: 0, coronal: 1, sagittal: 2, "3D": 4 };
const STEPS = {
  ArrowLeft: [-1, 0, 0], ArrowRight: [1, 0, 0], ArrowDown: [0, -1, 0], ArrowUp: [0, 1, 0],
  PageDown: [0, 0, -1], PageUp: [0, 0, 1],
};

function make(parent, tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  Object.assign(element, attributes);
  parent.append(element);
  return element;
}

function labelled(parent, text, tag, attributes = {}) {
  return make(make(parent, "label", text + " "), tag, "", attributes);
}

function choices(select, names) {
  names.forEach((name, i) => make(select, "option", name, { value: i }));
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)).buffer;
}

class Column {
  constructor(parent, data, viewer) {
    this.volumes = data.volumes;
    this.follows = data.follows;
    const box = make(parent, "div", "", { className: "column" });
    const head = make(box, "div", "", { className: "head" });
    make(head, "b", data.title);
    this.select = make(head, "select", "", { ariaLabel: `volume: ${data.title}` });
    this.select.hidden = this.follows || this.volumes.length < 2;
    choices(this.select, this.volumes.map((v) => v.name));
    this.select.addEventListener("change", () => viewer.show(this));
    this.canvas = make(make(box, "div", "", { className: "canvas" }), "canvas", "", { tabIndex: 0, ariaLabel: data.title });
    // NiiVue moves other instances along with the one that has the focus.
    this.canvas.addEventListener("pointerenter", () => this.canvas.focus({ preventScroll: true }));
    this.place = make(box, "output", "", { className: "place" });
    this.detail = make(box, "div", "", { className: "detail" });
    this.nv = new niivue.Niivue({
      multiplanarShowRender: 0, multiplanarLayout: 1, multiplanarPadPixels: 4, isNearestInterpolation: true,
      showAllOrientationMarkers: true, fontColor: [0.95, 0.95, 0.95, 1], show3Dcrosshair: true,
      crosshairColor: [0.95, 0.75, 0.2, 0.7], crosshairWidth: 0.6, crosshairWidthUnit: "percent", crosshairGap: 6,
      backColor: [0, 0, 0, 1], dragAndDropEnabled: false, loadingText: "", logLevel: "error",
    });
    this.nv.setDragMode("none");
    this.nv.onLocationChange = (at) => this.say(at);
  }

  say(at) {
    const [x, y, z] = Array.from(at.mm, (v) => v.toFixed(0));
    this.place.textContent = `${x}, ${y}, ${z} mm: ${at.values[0].value.toFixed(3)}`;
  }

  get shown() {
    return this.nv.volumes.length > 0;
  }

  async load(name) {
    const volume = this.volumes.find((v) => v.name === name);
    for (const old of [...this.nv.volumes]) this.nv.removeVolume(old);
    this.detail.textContent = volume ? `${volume.name}: ${volume.detail}` : "no volume of this case";
    if (!volume) this.place.textContent = "";
    else await this.nv.loadFromArrayBuffer(bytes(volume.nifti), "volume.nii.gz");
  }
}

class Viewer {
  constructor(element) {
    this.element = element;
    const data = JSON.parse(element.querySelector("script").textContent);
    this.live = make(element, "div", "", { className: "live" });
    this.controls(make(this.live, "div", "", { className: "controls" }));
    const grid = make(this.live, "div", "", { className: "columns" });
    this.columns = data.columns.map((column) => new Column(grid, column, this));
    this.live.addEventListener("keydown", (event) => this.key(event), true);
    make(this.live, "p", "Wheel over a plane, or arrow keys and Page Up / Page Down: next slice. Click: move the crosshair. " +
      "L and R are the left and right of the patient. Values are in [0, 1].", { className: "help" });
  }

  controls(bar) {
    this.view = labelled(bar, "View", "select");
    choices(this.view, Object.keys(VIEWS));
    this.view.addEventListener("change", () => this.look());
    const range = { type: "range", step: 0.01 };
    this.low = labelled(bar, "Black at", "input", { ...range, min: 0, max: 0.99, value: 0 });
    this.lowText = make(bar, "output", "0.00");
    this.high = labelled(bar, "White at", "input", { ...range, min: 0.01, max: 1, value: 1 });
    this.highText = make(bar, "output", "1.00");
    this.low.addEventListener("input", () => this.window(this.low));
    this.high.addEventListener("input", () => this.window(this.high));
    make(bar, "button", "Reset", { type: "button" }).addEventListener("click", () => this.reset());
  }

  async start() {
    for (const column of this.columns) await column.nv.attachToCanvas(column.canvas);
    for (const column of this.columns) if (!column.follows) await this.show(column);
    this.reset();
  }

  // Load the volume that a column has selected, and that of the columns that follow it, at the same place and window.
  async show(column) {
    const first = this.columns.find((c) => c.shown);
    const place = first && Array.from(first.nv.frac2mm(first.nv.scene.crosshairPos));
    const name = column.volumes[column.select.value].name;
    const rest = this.columns.slice(this.columns.indexOf(column) + 1);
    const end = rest.findIndex((c) => !c.follows);
    for (const each of [column, ...rest.slice(0, end < 0 ? rest.length : end)]) await each.load(name);
    const shown = this.columns.filter((c) => c.shown);
    for (const each of shown) each.nv.broadcastTo(shown.filter((c) => c !== each).map((c) => c.nv));
    this.window();
    this.move(place ?? Array.from(column.nv.frac2mm([0.5, 0.5, 0.5])));
  }

  move(mm) {
    for (const { nv } of this.columns.filter((c) => c.shown)) {
      nv.scene.crosshairPos = nv.mm2frac(mm);
      nv.drawScene();
      nv.createOnLocationChange();
    }
  }

  window(changed) {
    if (changed && Number(this.high.value) - Number(this.low.value) < 0.01) {
      if (changed === this.low) this.high.value = Number(this.low.value) + 0.01;
      else this.low.value = Number(this.high.value) - 0.01;
    }
    this.lowText.textContent = Number(this.low.value).toFixed(2);
    this.highText.textContent = Number(this.high.value).toFixed(2);
    for (const { nv } of this.columns.filter((c) => c.shown)) {
      nv.volumes[0].cal_min = Number(this.low.value);
      nv.volumes[0].cal_max = Number(this.high.value);
      nv.updateGLVolume();
    }
  }

  look() {
    this.live.classList.toggle("single", this.view.value !== "0");
    for (const { nv } of this.columns) nv.setSliceType(Object.values(VIEWS)[this.view.value]);
  }

  reset() {
    this.low.value = 0;
    this.high.value = 1;
    this.view.value = 0;
    this.window();
    this.look();
    for (const { nv } of this.columns) nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    const first = this.columns.find((c) => c.shown);
    this.move(Array.from(first.nv.frac2mm([0.5, 0.5, 0.5])));
  }

  key(event) {
    const step = STEPS[event.key];
    const column = this.columns.find((c) => c.canvas === event.target);
    if (!step || !column?.shown) return;
    event.preventDefault();
    event.stopPropagation();
    column.nv.moveCrosshairInVox(...step);
  }
}

async function start(element) {
  const viewer = new Viewer(element);
  try {
    await viewer.start();
    element.classList.add("started");
  } catch (error) {
    viewer.live.remove();
    make(element, "p", `The viewer could not start (${error.message}), so this is a picture of the central slices.`);
  }
}

document.querySelectorAll(".viewer").forEach(start);
