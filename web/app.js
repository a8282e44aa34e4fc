// The page: photos in, pictures, numbers and files out. The network runs in worker.js.
import { classColors, paint, segmentColors } from "./draw.js";
import { resultFiles } from "./files.js";

const MAX_PIXELS = 4096 * 4096; // as many as a canvas of an iPhone holds
const SHOWN_SIDE = 1600; // of the picture on the page, whatever the photo's size
const NAMES = { wasm: "WebAssembly", webgpu: "WebGPU" };
const FILES = {
  panoptic: ["Panoptic PNG", "Segments JSON"],
  semantic: ["Class map PNG"],
  instance: ["Instances JSON"],
};
const DOING = { resize: "Resizing the photo …", network: "Running the network …", merge: "Merging the masks …" };
const $ = (id) => document.getElementById(id);
const integer = new Intl.NumberFormat("en");

let source = { url: "model.onnx", name: "model.onnx" }; // of the network: a url, or a file's bytes
let network = null; // of the open file: metadata, threads, backend
let photo = null; // name, rgb, width, height, bitmap
let result = null;
let colors = []; // by segment
let chosen = null; // the chosen segments' positions, or null
let newest = 0; // number of the newest request; older ones are not shown

// Messages to the worker, answered by number.

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let calls = 0;

worker.onmessage = ({ data }) => {
  if (data.progress) return showProgress(data);
  const { resolve, reject } = waiting.get(data.id);
  waiting.delete(data.id);
  return data.error ? reject(new Error(data.error)) : resolve(data.value);
};
worker.onerror = () => fail("this browser cannot run the network: update it");

function ask(job, given, transfer = []) {
  calls += 1;
  const id = calls;
  worker.postMessage({ id, job, ...given }, transfer);
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
}

function showProgress({ progress, loaded, total }) {
  $("progress").hidden = progress !== "download";
  if (progress !== "download") return say(DOING[progress]);
  if (total) $("progress").value = loaded / total;
  return say(`Loading the network, ${(loaded / 1e6).toFixed(0)} MB …`);
}

function say(text) {
  $("status").textContent = text;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = false;
  $("progress").hidden = true;
  say("");
}

// The network.

async function openNetwork(wanted, backend = $("backend").value) {
  const number = ++newest;
  $("error").hidden = true;
  say("Opening the network …");
  try {
    const opened = await ask("open", { ...wanted, backend, threads: Number(query("threads")) || null });
    [source, network] = [wanted, { ...opened, backend }];
  } catch (error) {
    $("backend").value = network?.backend ?? "wasm";
    return number === newest && fail(error.message);
  } finally {
    $("progress").hidden = true;
  }
  const { dataset_info: data, task, precision } = network.metadata;
  const about = [`${data.classes.length} classes of ${data.name}`, task.name, precision];
  $("network").textContent = `${source.name}: ${about.join(", ")}`;
  say(photo ? "" : "Ready.");
  return photo && segment();
}

const query = (key) => new URLSearchParams(location.search).get(key);

/** WebGPU is offered where it is; `?backend=webgpu` in the address begins with it. */
async function offerBackends() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  $("choice").hidden = !adapter;
  if (adapter && query("backend") === "webgpu") $("backend").value = "webgpu";
}

// A photo.

async function take(file) {
  if (file.name?.toLowerCase().endsWith(".onnx")) {
    return openNetwork({ bytes: new Uint8Array(await file.arrayBuffer()), name: file.name });
  }
  $("error").hidden = true;
  try {
    photo = await readPhoto(file, (file.name || "photo").replace(/\.[^.]*$/, ""));
  } catch (error) {
    return fail(error.message);
  }
  return network && segment();
}

/** As Python's: upright as the EXIF orientation says, on white where it is transparent, colours as they are stored. */
async function readPhoto(file, name) {
  let bitmap;
  try {
    const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
    bitmap = file instanceof ImageBitmap ? file : await createImageBitmap(file, options);
  } catch {
    throw new Error(`${file.name || "this"} is no picture that this browser reads: choose a JPEG, PNG or WebP file`);
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    const [has, limit] = [width * height, MAX_PIXELS].map((pixels) => (pixels / 1e6).toFixed(1));
    throw new Error(`${file.name || "this"} has ${has} million pixels, more than ${limit}: shrink it`);
  }
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const rgb = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < data.length; from += 4, to += 3) {
    [rgb[to], rgb[to + 1], rgb[to + 2]] = [data[from], data[from + 1], data[from + 2]];
  }
  return { name, rgb, width, height, bitmap };
}

async function segment() {
  const number = ++newest;
  $("error").hidden = true;
  showPhoto();
  try {
    const { rgb, height, width } = photo;
    const found = await ask("segment", { rgb, height, width });
    if (number !== newest) return;
    result = found;
  } catch (error) {
    if (number === newest) fail(error.message);
    return;
  }
  say(`Done: ${result.segments.length} ${result.task === "semantic" ? "classes" : "segments"} found.`);
  chosen = null;
  colors = segmentColors(result.segments, classes());
  for (const part of [drawOverlay, writeLegend, writeFacts, writeDownloads, writeChosen]) part();
  $("panel").hidden = false;
}

const classes = () => network.metadata.dataset_info.classes;
const nameOf = (s) => classes()[s.classId].name;

// The picture.

function showPhoto() {
  const scale = Math.min(1, SHOWN_SIDE / Math.max(photo.width, photo.height));
  for (const id of ["picture", "overlay"]) {
    const canvas = $(id); // setting a size empties it
    canvas.width = Math.max(1, Math.round(photo.width * scale));
    canvas.height = Math.max(1, Math.round(photo.height * scale));
    canvas.hidden = false;
  }
  const context = $("picture").getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, $("picture").width, $("picture").height);
  context.drawImage(photo.bitmap, 0, 0, $("picture").width, $("picture").height);
  result = null;
  $("hint").hidden = true;
  $("panel").hidden = true;
  $("chosen").textContent = "";
  $("stage").classList.remove("empty");
}

function drawOverlay() {
  const { width, height } = $("overlay");
  $("overlay").getContext("2d").putImageData(paint(result, colors, width, height, chosen), 0, 0);
}

function setOpacity() {
  $("opacity-value").textContent = `${$("opacity").value} %`;
  $("overlay").style.opacity = $("opacity").value / 100;
}

function choose(positions) {
  chosen = positions;
  for (const part of [drawOverlay, writeLegend, writeChosen]) part();
}

function chooseAt({ offsetX, offsetY, currentTarget: canvas }) {
  const x = Math.floor((offsetX / canvas.clientWidth) * result.width);
  const y = Math.floor((offsetY / canvas.clientHeight) * result.height);
  const label = result.labels[Math.min(y, result.height - 1) * result.width + Math.min(x, result.width - 1)];
  choose(label ? new Set([label - 1]) : null);
}

// Numbers.

const share = (area) => {
  const percent = (100 * area) / (result.width * result.height);
  return `${percent < 0.1 ? "< 0.1" : percent.toFixed(1)} %`;
};

/** A row for each class; pressing it again steps through its objects. */
function writeLegend() {
  const groups = new Map();
  result.segments.forEach((s, i) => groups.set(s.classId, [...(groups.get(s.classId) ?? []), i]));
  const areas = [...groups].map(([classId, all]) => [classId, all, areaOf(all)]);
  const focused = document.activeElement?.dataset?.class;
  const byClass = classColors(classes());
  const rows = areas.sort((a, b) => b[2] - a[2]).map(([classId, all, area]) => {
    const { name, is_thing: isThing } = classes()[classId];
    const row = document.createElement("li");
    const button = row.appendChild(document.createElement("button"));
    const counted = isThing && result.task !== "semantic" ? ` × ${all.length}` : "";
    button.append(swatch(byClass[classId]), text("span", name + counted), text("span", share(area), "share"));
    button.type = "button";
    button.dataset.class = classId;
    button.ariaPressed = String(Boolean(chosen && all.some((i) => chosen.has(i))));
    button.onclick = () => choose(nextOf(all));
    return row;
  });
  const rest = result.width * result.height - areas.reduce((sum, [, , area]) => sum + area, 0);
  if (rest > 0) rows.push(text("li", `${share(rest)} of the photo belong to no segment`, "quiet"));
  $("legend").replaceChildren(...rows);
  if (focused) $("legend").querySelector(`[data-class="${focused}"]`)?.focus();
}

const areaOf = (positions) => positions.reduce((sum, i) => sum + result.segments[i].area, 0);

/** All of them, then one after the other, then none. */
function nextOf(all) {
  if (!chosen || !all.some((i) => chosen.has(i))) return new Set(all);
  const next = all.length === 1 ? all.length : chosen.size > 1 ? 0 : all.indexOf([...chosen][0]) + 1;
  return next < all.length ? new Set([all[next]]) : null;
}

function writeChosen() {
  const segments = [...(chosen ?? [])].map((i) => result.segments[i]);
  if (segments.length === 0) {
    $("chosen").textContent = "Click a segment, in the picture or in the list.";
    return;
  }
  const area = areaOf([...chosen]);
  const parts = [`${integer.format(area)} pixels (${share(area)})`];
  if (segments.length > 1) parts.unshift(`${segments.length} objects`);
  else if (segments[0].score !== undefined) parts.unshift(`score ${segments[0].score.toFixed(2)}`);
  $("chosen").textContent = `${nameOf(segments[0])}: ${parts.join(", ")}`;
}

function writeFacts() {
  const milliseconds = (stage) => `${integer.format(Math.round(result.times[stage]))} ms`;
  const [height, width] = result.networkSize;
  const facts = {
    Photo: `${result.width} × ${result.height}`,
    "Network saw": `${width} × ${height}`,
    Resizing: milliseconds("resize"),
    Network: milliseconds("network"),
    Merging: milliseconds("merge"),
    "Ran on": NAMES[network.backend],
    ...(network.backend === "wasm" && { Threads: network.threads }),
  };
  const rows = Object.entries(facts).flatMap(([name, value]) => [text("dt", name), text("dd", value)]);
  $("facts").replaceChildren(...rows);
}

function text(tag, content, className = "") {
  const element = document.createElement(tag);
  Object.assign(element, { textContent: content, className });
  return element;
}

function swatch([red, green, blue]) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const rectangle = svg.appendChild(document.createElementNS(svg.namespaceURI, "rect"));
  const attributes = { width: "100%", height: "100%", rx: 3, fill: `rgb(${red} ${green} ${blue})` };
  for (const [name, value] of Object.entries(attributes)) rectangle.setAttribute(name, value);
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

// Files.

function writeDownloads() {
  const [shown, name] = [result, photo.name];
  const buttons = FILES[result.task].map((label, i) =>
    downloadButton(label, async () => {
      const [file, content, type] = (await resultFiles(shown, classes(), name))[i];
      return [file, new Blob([content], { type })];
    }),
  );
  buttons.unshift(downloadButton("Overlay PNG", async () => [`${name}_overlay.png`, await overlayPNG()]));
  $("downloads").replaceChildren(...buttons);
}

function downloadButton(label, make) {
  const button = text("button", label);
  button.type = "button";
  button.onclick = async () => {
    const [name, blob] = await make();
    const link = Object.assign(document.createElement("a"), { download: name, href: URL.createObjectURL(blob) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  };
  return button;
}

/** What is on the page, at the photo's size. */
async function overlayPNG() {
  const { width, height } = photo;
  const [canvas, layer] = [new OffscreenCanvas(width, height), new OffscreenCanvas(width, height)];
  layer.getContext("2d").putImageData(paint(result, colors, width, height, chosen), 0, 0);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(photo.bitmap, 0, 0);
  context.globalAlpha = $("opacity").value / 100;
  context.drawImage(layer, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

// The camera.

async function openCamera() {
  $("error").hidden = true;
  try {
    $("video").srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    return fail("the camera cannot be used: allow it for this page, or choose a photo");
  }
  return $("viewfinder").showModal();
}

async function shoot() {
  const bitmap = await createImageBitmap($("video")).catch(() => null); // there may be no picture yet
  if (!bitmap) return;
  $("viewfinder").close();
  await take(bitmap);
}

function closeCamera() {
  for (const track of $("video").srcObject?.getTracks() ?? []) track.stop();
  $("video").srcObject = null;
}

// What the user does.

const firstFile = (data) => [...(data?.files ?? [])][0];

for (const id of ["photo", "file"]) {
  $(id).onchange = () => {
    const file = firstFile($(id));
    $(id).value = ""; // so that the same file can be chosen again
    if (file) take(file);
  };
}
addEventListener("paste", (event) => {
  const file = firstFile(event.clipboardData);
  if (file) take(file);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  $("stage").classList.add("drop");
});
addEventListener("dragleave", (event) => event.relatedTarget ?? $("stage").classList.remove("drop"));
addEventListener("drop", (event) => {
  event.preventDefault();
  $("stage").classList.remove("drop");
  const file = firstFile(event.dataTransfer);
  if (file) take(file);
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && result && !$("viewfinder").open) choose(null);
});
$("overlay").onclick = (event) => result && chooseAt(event);
$("opacity").oninput = setOpacity;
$("backend").onchange = () => openNetwork(source);
$("camera").hidden = !navigator.mediaDevices?.getUserMedia;
$("camera").onclick = openCamera;
$("shoot").onclick = shoot;
$("cancel").onclick = () => $("viewfinder").close();
$("viewfinder").onclose = closeCamera;
setOpacity();
await offerBackends();
openNetwork(source);
