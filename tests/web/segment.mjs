// Runs web/*.js on the cases that a test has written: node segment.mjs FOLDER. Reads cases.json and raw arrays there.
import { readFileSync, writeFileSync } from "node:fs";
import { resultFiles } from "../../web/files.js";
import { Model, readMetadata, resize, resizedSize } from "../../web/pem.js";
import { postprocess } from "../../web/postprocess.js";

const folder = process.argv[2];
const read = (name) => readFileSync(`${folder}/${name}`);
const floats = (name) => new Float32Array(Uint8Array.from(read(name)).buffer);

const jobs = {
  async postprocess({ name, maskSize, options, classes }) {
    const rules = { ...options, things: new Set(options.things) };
    const result = postprocess(floats(`${name}_classes.f32`), floats(`${name}_masks.f32`), maskSize, rules);
    return save(result, classes, name);
  },
  resize({ name, from, to, rule }) {
    const size = rule ? resizedSize(...from, rule) : to;
    writeFileSync(`${folder}/${name}.resized`, resize(read(`${name}.rgb`), ...from, ...size));
    return { size };
  },
  metadata: ({ name }) => readMetadata(read(name), name),
  async segment({ name, file, size, ort }) {
    const runtime = await import(ort);
    const model = await Model.open(runtime, read(file), { name: file, providers: ["wasm"] });
    const result = await model.segment(read(`${name}.rgb`), ...size);
    return save(result, model.classes, name);
  },
};

async function save(result, classes, name) {
  const files = await resultFiles(result, classes, name);
  for (const [file, content] of files) writeFileSync(`${folder}/${file}`, content);
  const segments = result.segments.map(({ mask, ...segment }) => segment);
  return { segments, networkSize: result.networkSize, files: files.map(([file]) => file) };
}

const results = [];
for (const { job, ...given } of JSON.parse(read("cases.json"))) {
  try {
    results.push(await jobs[job](given));
  } catch (error) {
    if (!error.message || error.constructor.name !== "UserError") throw error;
    results.push({ error: error.message });
  }
}
writeFileSync(`${folder}/results.json`, JSON.stringify(results));
