// A result as files: what `SegmentedImage.save` of pem_lightning/inference/results.py writes.

import { IGNORE_INDEX } from "./postprocess.js";

/**
 * @param result of `Model.segment`
 * @param {object[]} classes of the file's metadata
 * @param {string} name of the image
 * @returns {Promise<Array<[string, Uint8Array, string]>>} name, content and type of each file
 */
export async function resultFiles(result, classes, name) {
  const { task, width, height, map } = result;
  const json = (content) => new TextEncoder().encode(JSON.stringify(content));
  if (task === "panoptic") {
    const ids = new Uint8Array(3 * map.length);
    map.forEach((id, i) => ids.set([id & 255, (id >> 8) & 255, id >> 16], 3 * i)); // as in COCO
    return [
      [`${name}_panoptic.png`, await encodePNG(ids, width, height, 3), "image/png"],
      [`${name}_segments.json`, json(segmentsInfo(result, classes)), "application/json"],
    ];
  }
  if (task === "semantic") {
    return [[`${name}_semantic.png`, await encodeClassMap(result, classes), "image/png"]];
  }
  const instances = result.instances.map((instance) => ({
    image_id: name,
    category_id: classes[instance.classId].category_id,
    segmentation: { size: [height, width], counts: encodeRLE(instance, height, width) },
    bbox: cocoBox(instance.box),
    area: instance.area,
    score: instance.score,
  }));
  return [[`${name}_instances.json`, json(instances), "application/json"]];
}

/** COCO's description of every segment of a panoptic map. */
export function segmentsInfo({ segments }, classes) {
  return segments.map(({ id, classId, area, box, score }) => {
    return { id, category_id: classes[classId].category_id, area, bbox: cocoBox(box), iscrowd: 0, score };
  });
}

const cocoBox = ([left, top, right, bottom]) => [left, top, right - left, bottom - top];

/** The data set's official ids as a grey PNG, of 16 bits where 8 are too few; 0, 255 or 65535 where no class is. */
function encodeClassMap({ map, width, height }, classes) {
  const ids = classes.map((c) => c.category_id);
  const nothing = [0, 255, 65535].find((value) => !ids.includes(value));
  const isWide = Math.max(...ids, nothing) > 255;
  const values = Uint16Array.from(map, (k) => (k === IGNORE_INDEX || k >= ids.length ? nothing : ids[k]));
  if (!isWide) return encodePNG(Uint8Array.from(values), width, height, 1);
  const bytes = new Uint8Array(2 * values.length);
  values.forEach((value, i) => bytes.set([value >> 8, value & 255], 2 * i));
  return encodePNG(bytes, width, height, 2);
}

/**
 * A PNG. A canvas writes them, too, but some browsers change its pixels against fingerprinting.
 *
 * @param {Uint8Array} pixels height * width * `size` bytes
 * @param {number} size of a pixel: 1 grey, 2 grey of 16 bits, 3 RGB
 */
export async function encodePNG(pixels, width, height, size) {
  const lines = new Uint8Array(height * (1 + width * size)); // each begins with its filter, 0 for none
  for (let y = 0; y < height; y++) {
    lines.set(pixels.subarray(y * width * size, (y + 1) * width * size), y * (1 + width * size) + 1);
  }
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, size === 2 ? 16 : 8);
  header.setUint8(9, size === 3 ? 2 : 0);
  const packed = new Response(new Blob([lines]).stream().pipeThrough(new CompressionStream("deflate")));
  const chunks = [
    Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10),
    chunk("IHDR", new Uint8Array(header.buffer)),
    chunk("IDAT", new Uint8Array(await packed.arrayBuffer())),
    chunk("IEND", new Uint8Array(0)),
  ];
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

function chunk(kind, content) {
  const bytes = new Uint8Array(12 + content.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, content.length);
  bytes.set(new TextEncoder().encode(kind), 4);
  bytes.set(content, 8);
  view.setUint32(8 + content.length, crc32(bytes.subarray(4, 8 + content.length)));
  return bytes;
}

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/** COCO's compressed run lengths of a mask in its box: see `encode_rle` of pem_lightning/inference/regions.py. */
function encodeRLE({ box: [left, top, right, bottom], mask }, height, width) {
  const lengths = []; // columns first, background first
  let value = 0;
  let length = 0;
  const add = (next, count) => {
    if (count === 0) return;
    if (next !== value) {
      lengths.push(length);
      [value, length] = [next, 0];
    }
    length += count;
  };
  add(0, left * height);
  for (let x = left; x < right; x++) {
    add(0, top);
    for (let y = top; y < bottom; y++) add(mask[(y - top) * (right - left) + x - left], 1);
    add(0, height - bottom);
  }
  add(0, (width - right) * height);
  lengths.push(length);
  let text = "";
  lengths.forEach((count, i) => {
    let number = i > 2 ? count - lengths[i - 2] : count;
    for (let more = true; more; ) {
      const bits = number & 31;
      number >>= 5;
      more = bits & 16 ? number !== -1 : number !== 0;
      text += String.fromCharCode((bits | (more ? 32 : 0)) + 48);
    }
  });
  return text;
}
