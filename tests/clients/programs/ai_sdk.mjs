// The AI SDK with its provider for servers that are compatible with OpenAI.

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

import * as checks from "./checks.mjs";
import { assert } from "./checks.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false; // standard output is for the results
const model = createOpenAICompatible({ name: "server", baseURL: checks.BASE_URL, apiKey: "none" })(checks.MODEL);
const structuredModel = createOpenAICompatible({
  name: "server", baseURL: checks.BASE_URL, apiKey: "none", supportsStructuredOutputs: true,
})(checks.MODEL);
const toolsModel = createOpenAICompatible({
  name: "server", baseURL: checks.TOOLS_BASE_URL, apiKey: "none",
})(checks.MODEL);
const prompt = checks.QUESTION;
const schema = z.object({ city: z.string() });

// Returns tools that append the cities they are asked for to a list.
function weatherTools(cities) {
  const get_weather = tool({
    description: "The weather in a city.",
    inputSchema: schema,
    execute: async ({ city }) => {
      cities.push(city);
      return checks.WEATHER;
    },
  });
  return { get_weather };
}

checks.check("chat", async () => {
  const { text, usage, finishReason } = await generateText({ model, prompt, temperature: 0 });
  checks.checkText(text);
  assert(finishReason === "stop", `the finish reason is ${finishReason}`);
  assert(usage.inputTokens > 0 && usage.outputTokens > 0, JSON.stringify(usage));
});

checks.check("streamed chat", async () => {
  const result = streamText({ model, prompt, temperature: 0 });
  let text = "";
  for await (const delta of result.textStream) text += delta;
  checks.checkText(text);
  assert((await result.finishReason) === "stop", `the finish reason is ${await result.finishReason}`);
});

checks.check("tools with several steps", async () => {
  const cities = [];
  const { text, steps } = await generateText({
    model: toolsModel, prompt, tools: weatherTools(cities), stopWhen: stepCountIs(5),
  });
  checks.checkWeather(text);
  assert(steps.length === 2 && cities.join() === "Paris", `${steps.length} steps, and cities: ${cities}`);
});

checks.check("streamed tools with several steps", async () => {
  const cities = [];
  const result = streamText({ model: toolsModel, prompt, tools: weatherTools(cities), stopWhen: stepCountIs(5) });
  checks.checkWeather(await result.text);
  const steps = await result.steps;
  assert(steps.length === 2 && cities.join() === "Paris", `${steps.length} steps, and cities: ${cities}`);
});

checks.rejected("objects", ["response_format"], () => generateObject({ model, prompt, schema }));

checks.rejected("structured output", ["response_format"], () =>
  generateText({ model: structuredModel, prompt, output: Output.object({ schema }) }),
);

checks.rejected("required tools", ["tool_choice"], () =>
  generateText({ model: toolsModel, prompt, tools: weatherTools([]), toolChoice: "required" }),
);

await checks.main();
