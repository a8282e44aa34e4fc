// Segments in colours: those of overlays that pem_lightning/inference/visualize.py draws.

const ALIKE = 8; // grey levels: colours that differ by less in every channel cannot be told apart
const GOLDEN = 0.618034;
const DIMMED = 0.3; // opacity of what is not chosen

/** Every class's own colour, but of classes that look alike all but the first get one far from the rest. */
export function classColors(classes) {
  const steps = [32, 64, 96, 128, 160, 192, 224];
  const candidates = steps.flatMap((r) => steps.flatMap((g) => steps.map((b) => [r, g, b])));
  const taken = classes.map((c) => c.color);
  const colors = [];
  const distance = (one) => Math.min(...taken.map((other) => one.reduce((d, x, i) => d + (x - other[i]) ** 2, 0)));
  for (const { color } of classes) {
    if (!colors.some((other) => other.every((x, i) => Math.abs(x - color[i]) < ALIKE))) {
      colors.push(color);
      continue;
    }
    const distances = candidates.map(distance);
    colors.push(candidates[distances.indexOf(Math.max(...distances))]);
    taken.push(colors.at(-1));
  }
  return colors;
}

/** A colour for each segment: its class's, things in shades from left to right. */
export function segmentColors(segments, classes) {
  const byClass = classColors(classes);
  const colors = segments.map(({ classId }) => byClass[classId]);
  const seen = new Map();
  const things = segments.map((segment, i) => ({ ...segment, i })).filter(({ isThing }) => isThing);
  for (const { classId, i } of things.sort((a, b) => a.box[0] + a.box[2] - b.box[0] - b.box[2])) {
    const n = seen.get(classId) ?? 0;
    seen.set(classId, n + 1);
    colors[i] = shade(colors[i], n);
  }
  return colors;
}

/** The n-th shade; the first is the colour itself, successive ones are far apart in lightness. */
function shade(color, n) {
  if (n === 0) return color;
  const [hue, saturation, lightness] = toHSL(color);
  const darkest = Math.min(Math.max(lightness - 0.23, 0.2), 0.38);
  const lifted = lightness - darkest + 0.46 * ((n * GOLDEN) % 1);
  const turned = hue + 0.1 * (((n * GOLDEN * GOLDEN) % 1) - 0.5);
  return fromHSL((turned + 1) % 1, saturation, darkest + ((lifted % 0.46) + 0.46) % 0.46);
}

function toHSL(color) {
  const [r, g, b] = color.map((x) => x / 255);
  const [high, low] = [Math.max(r, g, b), Math.min(r, g, b)];
  const [lightness, spread] = [(high + low) / 2, high - low];
  if (spread === 0) return [0, 0, lightness];
  const saturation = spread / (1 - Math.abs(2 * lightness - 1));
  const sixth = high === r ? (g - b) / spread : high === g ? 2 + (b - r) / spread : 4 + (r - g) / spread;
  return [((sixth + 6) % 6) / 6, saturation, lightness];
}

function fromHSL(hue, saturation, lightness) {
  return [0, 8, 4].map((n) => {
    const k = (n + hue * 12) % 12;
    const swing = saturation * Math.min(lightness, 1 - lightness);
    return Math.round(255 * (lightness - swing * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  });
}

/**
 * The segments alone as an ImageData of any size, with light lines between them.
 *
 * @param result of `Model.segment`
 * @param colors by segment
 * @param {Set<number> | null} chosen positions in `segments`; the others are dimmed
 */
export function paint({ labels, width: sourceWidth, height: sourceHeight }, colors, width, height, chosen = null) {
  const image = new ImageData(width, height);
  const columns = Int32Array.from({ length: width }, (_, x) => Math.floor(((x + 0.5) * sourceWidth) / width));
  const rowOf = (y) => Math.floor(((Math.min(y, height - 1) + 0.5) * sourceHeight) / height) * sourceWidth;
  const opacity = (i) => (chosen && !chosen.has(i) ? 255 * DIMMED : 255);
  const palette = [[0, 0, 0, 0], ...colors.map((color, i) => [...color, opacity(i)])];
  for (let y = 0, to = 0; y < height; y++) {
    const [row, below] = [rowOf(y), rowOf(y + 1)];
    for (let x = 0; x < width; x++, to += 4) {
      const label = labels[row + columns[x]];
      const right = labels[row + columns[Math.min(x + 1, width - 1)]];
      const color = palette[label];
      const line = label !== right || label !== labels[below + columns[x]] ? 0.75 : 0;
      for (let i = 0; i < 3; i++) image.data[to + i] = color[i] + (255 - color[i]) * line;
      image.data[to + 3] = line ? Math.max(color[3], 191) : color[3];
    }
  }
  return image;
}
