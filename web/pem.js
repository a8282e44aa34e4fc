// An exported .onnx file in a browser or in Node: its metadata, resizing and a session. ONNX Runtime is handed in.
// The rules are those of pem_lightning/deploy/runtime.py and pem_lightning/images.py, which are the reference.

import { enlarge, panopticResult, postprocess, semanticResult } from "./postprocess.js";

const KEY = "pem_lightning";
const FORMAT_VERSION = 1;

/** A mistake of the user; the message is one line that names the cure. */
export class UserError extends Error {}

// The file.

/** What a file says about itself: docs/deploy.md, "Metadata". Walks over ONNX's protobuf; `bytes` is a Uint8Array. */
export function readMetadata(bytes, name = "the file") {
  let text = null;
  try {
    for (const [field, value] of fields(bytes)) {
      if (field !== 14) continue; // ModelProto.metadata_props
      const entry = new Map(fields(value));
      if (decode(entry.get(1)) === KEY) text = decode(entry.get(2));
    }
  } catch {
    throw new UserError(`${name} cannot be opened: it is damaged, or no .onnx file`);
  }
  if (text === null) {
    throw new UserError(`${name} says nothing about classes and sizes: it was not written by export.py`);
  }
  let metadata;
  try {
    metadata = JSON.parse(text);
  } catch {
    metadata = {};
  }
  if (metadata.format_version > FORMAT_VERSION) {
    throw new UserError(`${name} was exported by a newer version: update this page, or export the checkpoint again`);
  }
  if (!metadata.task?.name || !metadata.dataset_info?.classes?.length) {
    throw new UserError(`the metadata of ${name} cannot be read: export the checkpoint again`);
  }
  return metadata;
}

function* fields(bytes) {
  let place = 0;
  const varint = () => {
    for (let value = 0, scale = 1; ; scale *= 128) {
      if (place >= bytes.length || scale > 2 ** 63) throw new Error("cut off");
      const byte = bytes[place++];
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  if (bytes.length === 0) throw new Error("empty");
  while (place < bytes.length) {
    const tag = varint();
    const [field, type] = [Math.floor(tag / 8), tag % 8];
    let value = null;
    if (type === 0) value = varint();
    else if (type === 1 || type === 5) place += type === 1 ? 8 : 4;
    else if (type === 2) {
      const length = varint();
      value = bytes.subarray(place, (place += length));
    } else throw new Error("no protobuf");
    if (field === 0 || place > bytes.length) throw new Error("cut off");
    yield [field, value];
  }
}

const decode = (bytes) => new TextDecoder().decode(bytes);

// ONNX Runtime 1.30's WebGPU gives wrong numbers for a convolution with an activation in one, see docs/deploy.md.
const NO_FUSED_ACTIVATIONS = { optimization: { disable_specified_optimizers: "ConvActivationFusion" } };

/** An exported file that is open. */
export class Model {
  /**
   * @param ort the module of onnxruntime-web or onnxruntime-node
   * @param {Uint8Array} bytes of the file
   * @param {{name?: string, providers?: string[], maxPixels?: number}} options `providers`: "wasm", "webgpu" or "cpu";
   *   `maxPixels`: images that would enter the network larger are shrunk, because WebAssembly's memory ends at 4 GiB
   */
  static async open(ort, bytes, { name = "the file", providers, maxPixels = 1024 * 2048 } = {}) {
    const metadata = readMetadata(bytes, name);
    try {
      const session = await ort.InferenceSession.create(bytes, {
        logSeverityLevel: 3,
        ...(providers && { executionProviders: providers }),
        ...(providers?.includes("webgpu") && { extra: NO_FUSED_ACTIVATIONS }),
      });
      return new Model(ort, session, metadata, maxPixels);
    } catch (error) {
      const reason = firstLine(error);
      throw new UserError(`${name} cannot be opened (${reason}): it is damaged, or this device cannot run it`);
    }
  }

  constructor(ort, session, metadata, maxPixels) {
    Object.assign(this, { ort, session, metadata, maxPixels });
    this.classes = metadata.dataset_info.classes;
  }

  /** Height and width at which the network sees an image. */
  networkSize(height, width) {
    if (this.metadata.size) return this.metadata.size;
    let size = [height, width];
    if (this.metadata.resize) size = resizedSize(...size, this.metadata.resize);
    const shrink = Math.sqrt(this.maxPixels / (size[0] * size[1]));
    return shrink >= 1 ? size : size.map((side) => Math.max(1, Math.floor(side * shrink)));
  }

  /**
   * Segment one image.
   *
   * @param {Uint8Array} rgb height * width * 3
   * @param {(stage: string) => void} onStage is told when "resize", "network" and "merge" begin
   * @returns {Promise<object>} as `postprocess`, and `networkSize`, and `times` in milliseconds by stage
   */
  async segment(rgb, height, width, onStage = () => {}) {
    const times = {};
    const timed = async (stage, work) => {
      onStage(stage);
      const start = performance.now();
      const value = await work();
      times[stage] = performance.now() - start;
      return value;
    };
    const size = this.networkSize(height, width);
    const image = await timed("resize", () => resize(rgb, height, width, ...size));
    const outputs = await timed("network", () => this.run(image, ...size));
    const result = await timed("merge", () => this.merge(outputs, size, [height, width]));
    return { ...result, networkSize: size, times };
  }

  /** Outputs of the network by name. */
  async run(rgb, height, width) {
    const images = new this.ort.Tensor("uint8", rgb, [1, height, width, 3]);
    try {
      return await this.session.run({ images });
    } catch (error) {
      if (!/alloc|memory|RangeError/i.test(String(error))) throw error;
      throw new UserError(`an image of ${width} x ${height} pixels needs more memory than there is: shrink it`);
    }
  }

  merge(outputs, imageSize, outputSize) {
    const { name: task, ...rules } = this.metadata.task;
    const things = new Set(this.classes.flatMap((c, i) => (c.is_thing ? [i] : [])));
    if (outputs.classes) return semanticResult(enlarge(outputs.classes.data, imageSize, outputSize), outputSize);
    if (outputs.panoptic) {
      const rows = Array.from({ length: outputs.segments.dims[0] }, (_, i) =>
        Array.from(outputs.segments.data.slice(3 * i, 3 * i + 3), Number),
      );
      const segments = rows.map(([id, classId, score]) => ({ id, classId, isThing: things.has(classId), score }));
      return panopticResult(enlarge(outputs.panoptic.data, imageSize, outputSize), segments, outputSize);
    }
    const [, , h, w] = outputs.mask_logits.dims;
    return postprocess(outputs.class_logits.data, outputs.mask_logits.data, [h, w], {
      task,
      things,
      imageSize,
      outputSize,
      resizeFirst: rules.resize_first,
      objectMaskThreshold: rules.object_mask_threshold,
      overlapThreshold: rules.overlap_threshold,
      topK: rules.top_k,
    });
  }
}

const firstLine = (error) => String(error?.message ?? error).split("\n")[0].slice(0, 200);

// Resizing.

/** Height and width as evaluation resizes: the shortest edge to a length, the longest to `max_size` at most. */
export function resizedSize(height, width, { shortest_edge: shortest, max_size: longest = null }) {
  let scale = shortest / Math.min(height, width);
  if (longest !== null) scale = Math.min(scale, longest / Math.max(height, width));
  return [height, width].map((side) => Math.max(Math.trunc(side * scale + 0.5), 1));
}

/** Antialiased bilinear interpolation of RGB bytes; equal to Pillow's `resize(size, BILINEAR)`. */
export function resize(rgb, height, width, newHeight, newWidth) {
  const across = width === newWidth ? rgb : resizeLines(rgb, height, width, newWidth, 3, 3 * width, 3 * newWidth);
  if (height === newHeight) return across;
  return resizeLines(across, newWidth, height, newHeight, 3 * newWidth, 3, 3);
}

/** Resize `count` lines of `source` pixels to `size`. Neighbours in a line are `step` bytes apart. */
function resizeLines(bytes, count, source, size, step, lineStep, newLineStep) {
  const bits = 22; // of the fixed-point weights' fraction
  const half = 1 << (bits - 1);
  const result = new Uint8Array((bytes.length / source) * size);
  const scale = source / size;
  const support = Math.max(scale, 1);
  for (let i = 0; i < size; i++) {
    const center = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const last = Math.min(Math.trunc(center + support + 0.5), source);
    const weights = [];
    for (let x = first; x < last; x++) weights.push(Math.max(0, 1 - Math.abs((x - center + 0.5) * (1 / support))));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    const fixed = Int32Array.from(weights, (weight) => Math.trunc(0.5 + (weight / total) * (1 << bits)));
    for (let line = 0; line < count; line++) {
      const from = line * lineStep + first * step;
      const to = line * newLineStep + i * step;
      for (let channel = 0; channel < 3; channel++) {
        let sum = half;
        for (let k = 0, at = from + channel; k < fixed.length; k++, at += step) sum += bytes[at] * fixed[k];
        result[to + channel] = Math.min(sum >> bits, 255);
      }
    }
  }
  return result;
}
