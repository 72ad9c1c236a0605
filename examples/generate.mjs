// Generates pictures with RunPod's SDK from npm (npm install runpod-sdk): node generate.mjs PROMPT [FIELD=VALUE ...]
//
// FIELD=VALUE is any field of the request, such as seed=7 or output_format=webp. The endpoint is that of ENDPOINT_ID and
// RUNPOD_API_KEY, or ENDPOINT_URL, such as http://localhost:8000.
import { writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import runpodSdk from "runpod-sdk";

async function generate(endpoint, input) {
  const { id } = await endpoint.run({ input }, 30_000);
  process.once("SIGINT", () => endpoint.cancel(id).finally(() => process.exit(130)));
  for (let failures = 0; ; ) {
    await sleep(1000);
    const job = await endpoint.status(id, 30_000).catch((error) => {
      const answered = error.response?.status;
      if (answered === 405) return endpoint.runSync({ input }, 600_000); // the SDK's local server
      if (answered < 429 || ++failures > 100) throw error;
      return {}; // any other failed request is sent again
    });
    if (job.completed && job.output) return job.output;
    if (job.completed) throw new Error(`job ${id} ended as ${job.status}: ${job.error ?? "it has no output"}`);
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
    if (value === undefined) throw new Error(`${field} is not FIELD=VALUE; a prompt of several words needs quotes`);
    input[name] = /^-?(0|[1-9]\d*)(\.\d+)?(e[-+]?\d+)?$/i.test(value) ? Number(value) : value;
  }
  const output = await generate(runpodSdk(RUNPOD_API_KEY ?? "", { baseUrl }).endpoint(id), input);
  const images = output.images ?? [output];
  for (const [i, { image, image_url, seed }] of images.entries()) {
    const name = `picture${images.length > 1 ? `-${i + 1}` : ""}.${output.output_format ?? "png"}`;
    const file = await fetch(image_url ?? `data:;base64,${image}`);
    if (!file.ok) throw new Error(`${image_url} answered ${file.status}`);
    await writeFile(name, Buffer.from(await file.arrayBuffer()));
    console.log(`${name} seed ${seed}`);
  }
  output.warnings?.forEach((warning) => console.error(`warning: ${warning}`));
} catch (error) {
  console.error(`generate.mjs: ${[error.message, error.cause?.message].filter(Boolean).join(": ")}`);
  process.exit(1);
}
