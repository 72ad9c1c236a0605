// How a JavaScript application calls the worker: with RunPod's SDK from npm.
//
// npm install runpod-sdk
// ENDPOINT_ID=... RUNPOD_API_KEY=... node examples/generate.mjs PROMPT [FIELD=VALUE ...]
//
// FIELD=VALUE is any field of the request, such as seed=7 or output_format=webp. ENDPOINT_URL in place of both variables
// is the address of another endpoint, such as http://localhost:8000.
import { writeFile } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import runpodSdk from "runpod-sdk";

async function generate(endpoint, input) {
  const { id } = await endpoint.run({ input }, 30_000);
  process.once("SIGINT", () => endpoint.cancel(id).finally(() => process.exit(130)));
  let job = {};
  while (!job.completed) {
    await sleep(1000);
    job = await endpoint.status(id, 30_000).catch((error) => {
      // the SDK's local server does not answer GET /status
      if (error.response?.status === 405) return endpoint.runSync({ input }, 600_000);
      // one failed request does not end the job, unless the endpoint refuses it
      if (error.response?.status < 429) throw error;
      return {};
    });
  }
  if (!job.output) throw new Error(`job ${id} ended as ${job.status}: ${job.error ?? "it has no output"}`);
  return job.output;
}

async function file({ image, image_url }) {
  if (image) return Buffer.from(image, "base64");
  const link = await fetch(image_url);
  if (!link.ok) throw new Error(`${image_url} answered ${link.status}`);
  return Buffer.from(await link.arrayBuffer());
}

try {
  const { ENDPOINT_ID, ENDPOINT_URL, RUNPOD_API_KEY } = process.env;
  const { RUNPOD_ENDPOINT_BASE_URL = "https://api.runpod.ai/v2" } = process.env;
  if (!ENDPOINT_URL && !(ENDPOINT_ID && RUNPOD_API_KEY)) {
    throw new Error("set ENDPOINT_ID and RUNPOD_API_KEY, or ENDPOINT_URL");
  }
  const { href } = new URL(ENDPOINT_URL || `${RUNPOD_ENDPOINT_BASE_URL}/${ENDPOINT_ID}`);
  const [, baseUrl, id] = href.match(/^(.*)\/([^/]+)\/?$/);
  const [prompt, ...fields] = process.argv.slice(2);
  const input = { prompt };
  for (const [name, value] of fields.map((field) => field.split(/=(.*)/s))) {
    input[name] = /^-?(0|[1-9]\d*)(\.\d+)?(e[-+]?\d+)?$/i.test(value) ? Number(value) : value;
  }
  const output = await generate(runpodSdk(RUNPOD_API_KEY ?? "", { baseUrl }).endpoint(id), input);
  const images = output.images ?? [output];
  for (const [i, image] of images.entries()) {
    const name = `picture${images.length > 1 ? `-${i + 1}` : ""}.${output.output_format ?? "png"}`;
    await writeFile(name, await file(image));
    console.log(`${name} seed ${image.seed}`);
  }
  output.warnings?.forEach((warning) => console.error(`warning: ${warning}`));
  process.exit();
} catch (error) {
  console.error(`generate.mjs: ${error.message}${error.cause ? `: ${error.cause.message}` : ""}`);
  process.exit(1);
}
