// Generates pictures with RunPod's SDK from npm (npm install runpod-sdk): node generate.mjs PROMPT [FIELD=VALUE ...]
//
// FIELD=VALUE is any field of the request, such as seed=7 or output_format=webp; image=@photo.jpg sends a file. The
// endpoint is that of ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL, such as http://localhost:8000.
import { readFile, rename, writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import runpodSdk from "runpod-sdk";

const MAX_REQUEST_BYTES = 10_000_000; // RunPod's limit for /run

// returns what FIELD=VALUE sends: a file in base64, a number or text
async function readValue(name, value) {
  if (/^(image|mask)$/.test(name) && value.startsWith("@")) return readFile(value.slice(1), "base64");
  if (/^(prompt|negative_prompt|output_format|scheduler|image|mask)$/.test(name)) return value;
  const isNumber = /^-?(0|[1-9]\d*)(\.\d+)?(e[-+]?\d+)?$/i.test(value) && Number.isFinite(Number(value));
  return isNumber ? Number(value) : value;
}

function checked(job) {
  if (!job?.id || typeof job.status !== "string")
    throw new Error("this is not an answer from RunPod: check ENDPOINT_URL");
  return job;
}

async function cancel(endpoint, { id }) {
  await endpoint.cancel(id, 30_000).then(
    () => console.error(`generate.mjs: cancelled job ${id}`),
    (error) => console.error(`generate.mjs: cannot cancel job ${id}: ${error.message}`),
  );
  process.exit(130);
}

async function generate(endpoint, input) {
  const sent = endpoint.run({ input }, 120_000).then(checked);
  let interrupted;
  process.once("SIGINT", () => (interrupted = sent.then((job) => cancel(endpoint, job))));
  const { id } = await sent;
  for (let failures = 0; ; await sleep(1000)) {
    const job = await endpoint.status(id, 30_000).catch((error) => {
      const answered = error.response?.status;
      if (answered === 405) return endpoint.runSync({ input }, 600_000); // the SDK's local server
      if ((answered < 429 && answered !== 408) || ++failures > 100) throw error;
    });
    await interrupted;
    if (!job || ["IN_QUEUE", "IN_PROGRESS"].includes(checked(job).status)) continue;
    if (job.output) return job.output;
    throw new Error(`job ${id} ended as ${job.status}: ${job.error ?? "it has no picture"}`);
  }
}

try {
  const { ENDPOINT_ID, ENDPOINT_URL, RUNPOD_API_KEY } = process.env;
  const { RUNPOD_ENDPOINT_BASE_URL = "https://api.runpod.ai/v2" } = process.env;
  if (!(ENDPOINT_URL || (ENDPOINT_ID && RUNPOD_API_KEY)))
    throw new Error("set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL");
  const { href } = new URL(ENDPOINT_URL || `${RUNPOD_ENDPOINT_BASE_URL}/${ENDPOINT_ID}`);
  const [, baseUrl, id] = href.match(/^(.*)\/([^/]+)\/?$/);
  const [prompt, ...fields] = process.argv.slice(2);
  if (!prompt) throw new Error("a prompt is needed");
  const input = { prompt };
  for (const field of fields) {
    const [name, value] = field.split(/=(.*)/s);
    // which the SDK would leave out
    if (/^(__proto__|constructor|prototype)$/.test(name)) throw new Error(`${name} is not a field`);
    if (value === undefined) throw new Error(`${field} is not FIELD=VALUE; a prompt of several words needs quotes`);
    input[name] = await readValue(name, value);
  }
  if (Buffer.byteLength(JSON.stringify({ input })) > MAX_REQUEST_BYTES)
    throw new Error("the request is over RunPod's limit of 10 MB: send a smaller picture, or its address");
  const output = await generate(runpodSdk(RUNPOD_API_KEY ?? "", { baseUrl }).endpoint(id), input);
  const images = output.images ?? [output];
  for (const [i, { image, image_url, seed }] of images.entries()) {
    const name = `picture${images.length > 1 ? `-${i + 1}` : ""}.${output.output_format ?? "png"}`;
    if (!image && !image_url) throw new Error("the job's output holds no picture");
    const file = await fetch(image_url ?? `data:;base64,${image}`);
    if (!file.ok) throw new Error(`${image_url} answered ${file.status}`);
    await writeFile(`${name}.part`, Buffer.from(await file.arrayBuffer()));
    await rename(`${name}.part`, name);
    console.log(`${name} seed ${seed}`);
  }
  output.warnings?.forEach((warning) => console.error(`warning: ${warning}`));
} catch (error) {
  console.error(`generate.mjs: ${[error.message, error.cause?.message].filter(Boolean).join(": ")}`);
  process.exit(1);
}
