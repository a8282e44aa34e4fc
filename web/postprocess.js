// From one image's logits to a semantic map, a panoptic map or instances: pem_lightning/deploy/postprocess.py, which is
// the reference, once more. Numbers are rounded to float32 where NumPy rounds them, so that maps are equal but for the
// last bit of an exponential or a sum.
//
// Legend: Q queries, K classes, M masks, H W the output, h w a quarter of the padded size.

export const VOID_ID = 0; // segment id of pixels that belong to no segment
export const IGNORE_INDEX = 255; // class of pixels that have none
const STRIDE = 4; // pixels between two logits
const MARGIN = 1e-5; // more than rounding moves a logit or a score by
const SHOWN_SCORE = 0.5; // instances with a lower score are not drawn
const round = Math.fround;

/**
 * Make the result of one image.
 *
 * @param {Float32Array} classLogits Q * (K + 1), "no object" last
 * @param {Float32Array} maskLogits Q * h * w
 * @param {number[]} maskSize h and w
 * @param options `task`, `things` (a set of class indices), `imageSize` and `outputSize` (height, width), and the rules
 * @returns `task`, `height`, `width`; `map` (Int32Array H * W: segment ids or classes) or `instances`; and to show it
 *   `segments` with their `labels` (Uint16Array H * W: 1 + position in `segments`, 0 for none)
 */
export function postprocess(classLogits, maskLogits, maskSize, options) {
  const { task, things, imageSize, outputSize, resizeFirst = true, topK = 100 } = options;
  const { objectMaskThreshold = 0.8, overlapThreshold = 0.8 } = options;
  const Q = maskLogits.length / (maskSize[0] * maskSize[1]);
  const probabilities = softmax(classLogits, Q);
  const masks = new Masks(maskLogits, maskSize, imageSize, outputSize);
  if (task === "semantic") {
    return semanticResult(semanticMap(probabilities, masks, resizeFirst), outputSize);
  }
  if (task === "instance") return instanceResult(findInstances(probabilities, masks, things, topK), outputSize);
  const [map, segments] = panoptic(probabilities, masks, things, objectMaskThreshold, overlapThreshold);
  return panopticResult(map, segments, outputSize);
}

/** Q rows of probabilities, in float32. */
function softmax(logits, Q) {
  const n = logits.length / Q;
  return Array.from({ length: Q }, (_, q) => {
    const row = logits.subarray(q * n, (q + 1) * n);
    const highest = Math.max(...row);
    const exponentials = row.map((x) => Math.exp(round(x - highest)));
    const sum = round(exponentials.reduce((total, x) => total + x, 0));
    return exponentials.map((x) => x / sum);
  });
}

const sigmoid = (x) => round(1 / round(1 + round(Math.exp(-x))));

const argmax = (values) => {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
};

/** The source's lines before and after each line of a resized axis, and the weight of the latter. */
function neighbours(count, source, size) {
  const scale = round(source / size);
  const before = new Int32Array(count);
  const after = new Int32Array(count);
  const weight = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const place = Math.max(round(round(round(i + 0.5) * scale) - 0.5), 0);
    before[i] = Math.min(Math.trunc(place), source - 1);
    after[i] = Math.min(before[i] + 1, source - 1);
    weight[i] = Math.min(Math.max(place - before[i], 0), 1);
  }
  return { before, after, weight };
}

const identity = (count) => {
  const before = Int32Array.from({ length: count }, (_, i) => i);
  return { before, after: before, weight: new Float32Array(count) };
};

const between = (low, high, weight) => round(round(round(high - low) * weight) + low);

/** One axis of the masks: logits -> the padded image, cut to the image -> the output. */
class Axis {
  constructor(logits, image, output) {
    this.inner = neighbours(image, logits, STRIDE * logits);
    this.outer = image === output ? identity(output) : neighbours(output, image, output);
    /** Output lines that depend on the same logits, lines `low` to `high`, by the image's lines `first` to `last`. */
    this.runs = [];
    for (let line = 0; line < output; line++) {
      const [first, last] = [this.outer.before[line], this.outer.after[line]];
      const [low, high] = [this.inner.before[first], this.inner.after[last]];
      const run = this.runs.at(-1);
      if (run?.low === low && run.high === high) Object.assign(run, { stop: line + 1, last });
      else this.runs.push({ start: line, stop: line + 1, first, last, low, high });
    }
    const most = (length) => this.runs.reduce((longest, run) => Math.max(longest, length(run)), 0);
    this.mostLogits = most((run) => run.high + 1 - run.low);
    this.mostImage = most((run) => run.last + 1 - run.first);
    this.mostOutput = most((run) => run.stop - run.start);
  }
}

/** Masks of all queries at the output size, in blocks whose pixels depend on the same few logits, which bound them. */
class Masks {
  constructor(logits, size, imageSize, outputSize) {
    Object.assign(this, { logits, size, imageSize, outputSize });
    this.count = logits.length / (size[0] * size[1]);
    const [rows, columns] = [0, 1].map((i) => new Axis(size[i], imageSize[i], outputSize[i]));
    Object.assign(this, { rows, columns });
    this.low = new Float32Array(this.count);
    this.high = new Float32Array(this.count);
    this.steps = [
      new Float32Array(rows.mostImage * columns.mostLogits),
      new Float32Array(rows.mostImage * columns.mostImage),
      new Float32Array(rows.mostOutput * columns.mostImage),
    ];
    this.mostPixels = rows.mostOutput * columns.mostOutput;
  }

  /** Some queries, at the same size. */
  of(queries) {
    const n = this.size[0] * this.size[1];
    const logits = new Float32Array(queries.length * n);
    queries.forEach((q, m) => logits.set(this.logits.subarray(q * n, (q + 1) * n), m * n));
    return new Masks(logits, this.size, this.imageSize, this.outputSize);
  }

  /** Call `visit(rows, columns)` for every block, while `low` and `high` bound each query's logits in it. */
  forEachBlock(visit) {
    const { count: Q, low, high } = this;
    const [h, w] = this.size;
    const table = new Float32Array(this.logits.length); // h w Q
    for (let q = 0; q < Q; q++) for (let i = 0; i < h * w; i++) table[i * Q + q] = this.logits[q * h * w + i];
    for (const rows of this.rows.runs) {
      for (const columns of this.columns.runs) {
        low.fill(Infinity);
        high.fill(-Infinity);
        for (let y = rows.low; y <= rows.high; y++) {
          for (let x = columns.low; x <= columns.high; x++) {
            for (let q = 0, at = (y * w + x) * Q; q < Q; q++, at++) {
              if (table[at] < low[q]) low[q] = table[at];
              if (table[at] > high[q]) high[q] = table[at];
            }
          }
        }
        visit(rows, columns);
      }
    }
  }

  /** Logits of one query at a block's pixels, row by row, into `result`. Every resizing: rows first, then columns. */
  pixels(q, rows, columns, result) {
    const [h, w] = this.size;
    const [a, b, c] = this.steps;
    const [logitColumns, imageColumns] = [columns.high + 1 - columns.low, columns.last + 1 - columns.first];
    const [inner, outer] = [this.rows.inner, this.rows.outer];
    mixRows(this.logits, q * h * w + columns.low, w, logitColumns, inner, rows.first, rows.last + 1, a);
    const imageRows = rows.last + 1 - rows.first;
    mixColumns(a, logitColumns, imageRows, this.columns.inner, columns.first, columns.last + 1, columns.low, b);
    mixRows(b, -rows.first * imageColumns, imageColumns, imageColumns, outer, rows.start, rows.stop, c);
    const outputRows = rows.stop - rows.start;
    mixColumns(c, imageColumns, outputRows, this.columns.outer, columns.start, columns.stop, columns.first, result);
    return result;
  }
}

/** Rows `start` to `stop` of a resized array; row 0 of the source begins at `base`. */
function mixRows(source, base, stride, width, { before, after, weight }, start, stop, result) {
  for (let i = start, to = 0; i < stop; i++) {
    const [low, high] = [base + before[i] * stride, base + after[i] * stride];
    for (let x = 0; x < width; x++) result[to++] = between(source[low + x], source[high + x], weight[i]);
  }
}

/** Columns `start` to `stop` of a resized array, whose source begins with column `first`. */
function mixColumns(source, stride, height, { before, after, weight }, start, stop, first, result) {
  for (let y = 0, to = 0; y < height; y++) {
    const base = y * stride - first;
    for (let i = start; i < stop; i++) {
      result[to++] = between(source[base + before[i]], source[base + after[i]], weight[i]);
    }
  }
}

/** Every pixel goes to the query with the highest class times mask probability, or to none. */
function panoptic(probabilities, masks, things, objectMaskThreshold, overlapThreshold) {
  const nothing = probabilities[0].length - 1;
  const labels = probabilities.map(argmax);
  const sure = (q) => labels[q] !== nothing && probabilities[q][labels[q]] > round(objectMaskThreshold);
  const kept = probabilities.map((_, q) => q).filter(sure);
  const map = new Int32Array(masks.outputSize[0] * masks.outputSize[1]).fill(VOID_ID);
  if (kept.length === 0) return [map, []];
  const scores = kept.map((q) => probabilities[q][labels[q]]);
  const areas = findWinners(masks.of(kept), scores, map);
  const segments = [];
  const stuffIds = new Map();
  const ids = new Int32Array(kept.length + 1).fill(VOID_ID); // the last is for pixels outside the winner's mask
  kept.forEach((q, m) => {
    const [classId, { won, own, visible }] = [labels[q], areas[m]];
    if (visible === 0 || won / own < overlapThreshold) return;
    ids[m] = stuffIds.get(classId) ?? segments.length + 1;
    if (stuffIds.has(classId)) return;
    const isThing = things.has(classId);
    segments.push({ id: ids[m], classId, isThing, score: scores[m] });
    if (!isThing) stuffIds.set(classId, ids[m]);
  });
  for (let i = 0; i < map.length; i++) map[i] = ids[map[i]];
  return [map, segments];
}

/**
 * Write the winner of every pixel into `map`, M where the pixel is not in the winner's mask.
 *
 * @returns pixels that each query won, pixels of its own mask, and pixels of both
 */
function findWinners(masks, scores, map) {
  const M = masks.count;
  const { low, high } = masks;
  const areas = scores.map(() => ({ won: 0, own: 0, visible: 0 }));
  const logits = scores.map(() => new Float32Array(masks.mostPixels));
  const width = masks.outputSize[1];
  masks.forEachBlock((rows, columns) => {
    const blockWidth = columns.stop - columns.start;
    const pixels = (rows.stop - rows.start) * blockWidth;
    let best = 0;
    let bestLow = -1;
    for (let m = 0; m < M; m++) {
      const score = round(sigmoid(low[m]) * scores[m]);
      if (score > bestLow) [best, bestLow] = [m, score];
    }
    const rivals = [];
    const open = []; // queries to compute pixel by pixel
    for (let m = 0; m < M; m++) {
      const isRival = m === best || bestLow <= sigmoid(high[m]) * scores[m] * (1 + MARGIN) + MARGIN * MARGIN;
      const isCrossed = low[m] < 0 && high[m] > -MARGIN; // a contour may run through the block
      if (isRival) rivals.push(m);
      if (isRival || isCrossed) open.push(m);
      else if (low[m] >= 0) areas[m].own += pixels;
    }
    const decided = open.length === 1 && (low[best] >= 0 || high[best] <= -MARGIN);
    if (decided) {
      areas[best].won += pixels;
      if (low[best] >= 0) {
        areas[best].own += pixels;
        areas[best].visible += pixels;
      }
      const value = low[best] >= 0 ? best : M;
      for (let y = rows.start; y < rows.stop; y++) map.fill(value, y * width + columns.start, y * width + columns.stop);
      return;
    }
    for (const m of open) {
      const values = masks.pixels(m, rows, columns, logits[m]);
      for (let i = 0; i < pixels; i++) {
        values[i] = sigmoid(values[i]);
        if (values[i] >= 0.5) areas[m].own++; // not `logit >= 0`: a slightly negative logit rounds to 0.5
      }
    }
    for (let i = 0; i < pixels; i++) {
      let winner = -1;
      let highest = -1;
      for (const m of rivals) {
        const score = round(logits[m][i] * scores[m]);
        if (score > highest) [winner, highest] = [m, score];
      }
      areas[winner].won++;
      const isVisible = logits[winner][i] >= 0.5;
      if (isVisible) areas[winner].visible++;
      const y = rows.start + Math.floor(i / blockWidth);
      map[y * width + columns.start + (i % blockWidth)] = isVisible ? winner : M;
    }
  });
  return areas;
}

/** The class with the highest sum over queries of class probability times mask probability. */
function semanticMap(weights, masks, resizeFirst) {
  const K = weights[0].length - 1;
  const { imageSize, outputSize } = masks;
  const isSame = imageSize[0] === outputSize[0] && imageSize[1] === outputSize[1];
  if (isSame || resizeFirst) {
    const map = new Int32Array(outputSize[0] * outputSize[1]);
    scoreClasses(weights, masks, (i, scores) => (map[i] = argmax(scores)), (i, j, k) => map.fill(k, i, j));
    return map;
  }
  const scores = new Float32Array(imageSize[0] * imageSize[1] * K);
  const atImageSize = new Masks(masks.logits, masks.size, imageSize, imageSize);
  scoreClasses(weights, atImageSize, (i, values) => scores.set(values, i * K));
  return resizedArgmax(scores, K, imageSize, outputSize);
}

/** Call `write(pixel, scores)` for every pixel, or `fill(start, stop, class)` where the winner is certain. */
function scoreClasses(weights, masks, write, fill = null) {
  const K = weights[0].length - 1;
  const { count: Q, low, high } = masks;
  const width = masks.outputSize[1];
  const largest = weights.map((row) => Math.max(...row.subarray(0, K)));
  const [lowest, highest] = [new Float64Array(K), new Float64Array(K)];
  const logits = new Float32Array(masks.mostPixels);
  const sums = Array.from({ length: masks.mostPixels }, () => new Float64Array(K));
  const mostOf = new Float32Array(Q);
  masks.forEachBlock((rows, columns) => {
    lowest.fill(0);
    highest.fill(0);
    for (let q = 0; q < Q; q++) {
      const least = sigmoid(low[q]);
      mostOf[q] = sigmoid(high[q]);
      for (let k = 0; k < K; k++) {
        lowest[k] += least * weights[q][k];
        highest[k] += mostOf[q] * weights[q][k];
      }
    }
    const best = argmax(lowest);
    if (fill && highest.every((s, k) => k === best || lowest[best] > s * (1 + MARGIN) + MARGIN * MARGIN)) {
      for (let y = rows.start; y < rows.stop; y++) fill(y * width + columns.start, y * width + columns.stop, best);
      return;
    }
    const blockWidth = columns.stop - columns.start;
    const pixels = (rows.stop - rows.start) * blockWidth;
    for (let i = 0; i < pixels; i++) sums[i].fill(0);
    for (let q = 0; q < Q; q++) {
      if (mostOf[q] * largest[q] * Q < 1e-9 * lowest[best]) continue; // less than float32 can tell
      masks.pixels(q, rows, columns, logits);
      for (let i = 0; i < pixels; i++) {
        const probability = sigmoid(logits[i]);
        for (let k = 0; k < K; k++) sums[i][k] += probability * weights[q][k];
      }
    }
    for (let i = 0; i < pixels; i++) {
      write((rows.start + Math.floor(i / blockWidth)) * width + columns.start + (i % blockWidth), sums[i]);
    }
  });
}

/** The class with the highest of the resized scores [H, W, K] at every pixel. */
function resizedArgmax(scores, K, [height, width], [newHeight, newWidth]) {
  const rows = neighbours(newHeight, height, newHeight);
  const columns = neighbours(newWidth, width, newWidth);
  const map = new Int32Array(newHeight * newWidth);
  const row = new Float32Array(width * K);
  const winners = new Int32Array(width); // of the row's pixels
  const [highest, lead] = [new Float32Array(width), new Float32Array(width)];
  for (let y = 0; y < newHeight; y++) {
    const line = { before: [rows.before[y]], after: [rows.after[y]], weight: [rows.weight[y]] };
    mixRows(scores, 0, width * K, width * K, line, 0, 1, row);
    for (let x = 0; x < width; x++) {
      let [best, first, second] = [0, row[x * K], -Infinity];
      for (let k = 1; k < K; k++) {
        const score = row[x * K + k];
        if (score > first) [best, first, second] = [k, score, first];
        else if (score > second) second = score;
      }
      [winners[x], highest[x], lead[x]] = [best, first, first - second];
    }
    for (let x = 0; x < newWidth; x++) {
      const [i, j] = [columns.before[x], columns.after[x]];
      let best = winners[i];
      const isClear = Math.min(lead[i], lead[j]) > MARGIN * Math.max(highest[i], highest[j]);
      if (best !== winners[j] || !isClear) {
        best = 0;
        let most = -Infinity;
        for (let k = 0; k < K; k++) {
          const score = between(row[i * K + k], row[j * K + k], columns.weight[x]);
          if (score > most) [best, most] = [k, score];
        }
      }
      map[y * newWidth + x] = best;
    }
  }
  return map;
}

/** Things among the `topK` most probable pairs of query and class, by falling score. */
function findInstances(probabilities, masks, things, topK) {
  const K = probabilities[0].length - 1;
  const pairs = probabilities.flatMap((row, q) => Array.from({ length: K }, (_, k) => ({ q, k, score: row[k] })));
  const found = [];
  const known = new Map();
  for (const { q, k, score } of pairs.sort((a, b) => b.score - a.score).slice(0, topK)) {
    if (!things.has(k)) continue;
    if (!known.has(q)) known.set(q, findMask(masks.of([q])));
    const { probability, ...mask } = known.get(q);
    found.push({ classId: k, isThing: true, score: score * probability, ...mask });
  }
  return found.sort((a, b) => b.score - a.score);
}

/** One mask: its area, the box around it (left, top, right, bottom), its pixels in the box, mean probability inside. */
function findMask(masks) {
  const [height, width] = masks.outputSize;
  const inside = new Uint8Array(height * width);
  const logits = new Float32Array(masks.mostPixels);
  let total = 0;
  masks.forEachBlock((rows, columns) => {
    if (masks.high[0] <= 0) return;
    masks.pixels(0, rows, columns, logits);
    for (let y = rows.start, i = 0; y < rows.stop; y++) {
      for (let x = columns.start; x < columns.stop; x++, i++) {
        if (logits[i] <= 0) continue;
        inside[y * width + x] = 1;
        total += sigmoid(logits[i]);
      }
    }
  });
  const [{ area, box }] = findRegions(inside, 1, width);
  const mask = new Uint8Array(Math.max(0, (box[2] - box[0]) * (box[3] - box[1])));
  for (let y = box[1], to = 0; y < box[3]; y++, to += box[2] - box[0]) {
    mask.set(inside.subarray(y * width + box[0], y * width + box[2]), to);
  }
  return { area, box, mask, probability: total / (area + 1e-6) };
}

// Results.

/** Area and box (left, top, right, bottom) of the labels 1 to `count`; of none: 0 and an empty box. */
function findRegions(labels, count, width) {
  const regions = Array.from({ length: count }, () => ({ area: 0, box: [width, Infinity, 0, 0] }));
  for (let start = 0, i = 1; i <= labels.length; i++) {
    if (i < labels.length && labels[i] === labels[start] && i % width !== 0) continue;
    if (labels[start] > 0) {
      const region = regions[labels[start] - 1];
      const [y, left] = [Math.floor(start / width), start % width];
      region.area += i - start;
      const [l, t, r] = region.box;
      region.box = [Math.min(l, left), Math.min(t, y), Math.max(r, left + i - start), y + 1];
    }
    start = i;
  }
  for (const region of regions) if (region.area === 0) region.box = [0, 0, 0, 0];
  return regions;
}

function shown(result, segments, labels) {
  findRegions(labels, segments.length, result.width).forEach((region, i) => Object.assign(segments[i], region));
  return { ...result, segments, labels };
}

export function semanticResult(map, [height, width]) {
  const table = new Uint16Array(IGNORE_INDEX + 1);
  const segments = [];
  for (const classId of map) {
    if (classId !== IGNORE_INDEX && table[classId] === 0) table[classId] = segments.push({ classId, isThing: false });
  }
  return shown({ task: "semantic", height, width, map }, segments, Uint16Array.from(map, (value) => table[value]));
}

export function panopticResult(map, segments, [height, width]) {
  const table = new Map(segments.map(({ id }, i) => [id, i + 1]));
  const labels = Uint16Array.from(map, (id) => table.get(id) ?? 0);
  const result = shown({ task: "panoptic", height, width, map }, segments, labels);
  const there = result.segments.filter(({ area }) => area > 0); // ids that no pixel has are left out
  return there.length === segments.length ? result : panopticResult(map, there, [height, width]);
}

function instanceResult(instances, [height, width]) {
  const found = instances.filter(({ area }) => area > 0);
  const segments = found.filter(({ score }) => score >= SHOWN_SCORE).map((instance) => ({ ...instance }));
  const labels = new Uint16Array(height * width);
  for (let i = segments.length - 1; i >= 0; i--) {
    const { box, mask } = segments[i]; // the most confident on top
    for (let y = box[1], from = 0; y < box[3]; y++) {
      for (let x = box[0]; x < box[2]; x++, from++) if (mask[from]) labels[y * width + x] = i + 1;
    }
  }
  return { task: "instance", height, width, instances: found, segments, labels };
}

/** A map at another size, by the nearest pixel: for files that give maps instead of logits. */
export function enlarge(map, [height, width], [newHeight, newWidth]) {
  const result = new Int32Array(newHeight * newWidth);
  for (let y = 0; y < newHeight; y++) {
    const row = Math.floor(((y + 0.5) * height) / newHeight) * width;
    for (let x = 0; x < newWidth; x++) result[y * newWidth + x] = map[row + Math.floor(((x + 0.5) * width) / newWidth)];
  }
  return result;
}
