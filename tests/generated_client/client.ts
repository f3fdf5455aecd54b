// Steps a session by types that were generated from /openapi.json, and prints what it saw.

import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

const [url, readings] = process.argv.slice(2);
if (url === undefined || readings === undefined) throw new Error("usage: client.js URL READINGS");
const client = createClient<paths>({ baseUrl: url });
const path = { model: "weather", session: "typescript" };
const body: components["schemas"]["StepBody"] = { inputs: JSON.parse(readings), seq: 1 };
const step = "/v1/models/{model}/sessions/{session}/step";

const first = await client.POST(step, { params: { path }, body });
if (first.error !== undefined) throw new Error(first.error.detail);
const again = await client.POST(step, { params: { path }, body });
const refused = await client.POST(step, { params: { path }, body: { ...body, seq: 9 } });
const info = await client.GET("/v1/models/{model}/sessions/{session}", { params: { path } });
const served = await client.GET("/v1/models");

console.log(
  JSON.stringify({
    outputs: first.data.outputs,
    again: again.data?.outputs,
    step: info.data?.step,
    refusal: refused.error?.code,
    models: served.data?.models.map((model) => model.name),
  }),
);
