// Runs the network beside the page, which stays responsive: {id, job, ...} -> {id, value | error}, and {progress}.
import { Model, UserError } from "./pem.js";

// WebAssembly's part is half as large without WebGPU, so each has a bundle of its own.
const BUNDLES = {
  wasm: ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"],
  webgpu: ["ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"],
};
let model = null;

const jobs = {
  async open({ bytes, url, name, backend, threads }) {
    const [code, wasm] = BUNDLES[backend].map((file) => new URL(`ort/${file}`, import.meta.url).href);
    const ort = await import(code);
    ort.env.wasm.wasmPaths = { wasm };
    const possible = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 8) : 1;
    ort.env.wasm.numThreads = threads ?? possible;
    const opened = await Model.open(ort, bytes ?? (await download(url, name)), { name, providers: [backend] });
    await model?.session.release();
    model = opened;
    return { metadata: model.metadata, threads: ort.env.wasm.numThreads };
  },
  segment: ({ rgb, height, width }) => model.segment(rgb, height, width, (stage) => postMessage({ progress: stage })),
};

async function download(url, name) {
  const response = await fetch(url).catch(() => null);
  if (!response?.ok) throw new UserError(`there is no ${name} beside this page: run make web, or open a file`);
  const total = Number(response.headers.get("Content-Length"));
  const parts = [];
  let loaded = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(parts).arrayBuffer());
    parts.push(value);
    loaded += value.length;
    postMessage({ progress: "download", loaded, total });
  }
}

onmessage = async ({ data: { id, job, ...given } }) => {
  try {
    postMessage({ id, value: await jobs[job](given) });
  } catch (error) {
    postMessage({ id, error: error.message || String(error), isUserError: error instanceof UserError });
  }
};
