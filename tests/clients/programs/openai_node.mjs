// The official client of OpenAI for JavaScript.

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import * as checks from "./checks.mjs";
import { assert, MODEL } from "./checks.mjs";

const client = new OpenAI({ baseURL: checks.BASE_URL, apiKey: "none" });
const toolsClient = new OpenAI({ baseURL: checks.TOOLS_BASE_URL, apiKey: "none" });
const messages = [{ role: "user", content: checks.QUESTION }];
const City = z.object({ city: z.string() });

// Returns a tool that appends the cities it is asked for to a list.
function weatherTool(cities) {
  return {
    type: "function",
    function: {
      name: "get_weather",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
      parse: JSON.parse,
      function: ({ city }) => {
        cities.push(city);
        return checks.WEATHER;
      },
    },
  };
}

checks.check("chat", async () => {
  const answer = await client.chat.completions.create({ model: MODEL, messages, temperature: 0 });
  checks.checkText(answer.choices[0].message.content);
  const { total_tokens, prompt_tokens, completion_tokens } = answer.usage;
  assert(total_tokens === prompt_tokens + completion_tokens, JSON.stringify(answer.usage));
});

checks.check("streamed chat", async () => {
  const options = { model: MODEL, messages, temperature: 0, stream_options: { include_usage: true } };
  const stream = client.chat.completions.stream(options);
  let text = "";
  stream.on("content", (delta) => (text += delta));
  const final = await stream.finalChatCompletion();
  checks.checkText(text);
  checks.checkText(final.choices[0].message.content);
  assert((await stream.totalUsage()).completion_tokens > 0, "the usage is missing");
});

checks.check("completions with log-probabilities", async () => {
  const answer = await client.completions.create({
    model: MODEL, prompt: "Hello.", max_tokens: 4, logprobs: 2, temperature: 0,
  });
  const { tokens, token_logprobs, top_logprobs } = answer.choices[0].logprobs;
  assert(tokens.length === 4 && token_logprobs.length === 4, JSON.stringify(answer));
  assert(top_logprobs.every((alternatives) => Object.keys(alternatives).length >= 2), JSON.stringify(answer));
});

checks.check("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  const model = await client.models.retrieve(MODEL);
  assert(names.length === 1 && names[0] === MODEL && model.id === MODEL, `${names} and ${model.id}`);
});

checks.check("tools", async () => {
  const cities = [];
  const runner = toolsClient.chat.completions.runTools({ model: MODEL, messages, tools: [weatherTool(cities)] });
  checks.checkWeather(await runner.finalContent());
  assert(cities.join() === "Paris", `the tool was called with ${cities}`);
});

checks.check("streamed tools", async () => {
  const cities = [];
  const runner = toolsClient.chat.completions.runTools({
    model: MODEL, messages, tools: [weatherTool(cities)], stream: true,
  });
  checks.checkWeather(await runner.finalContent());
  assert(cities.join() === "Paris", `the tool was called with ${cities}`);
});

checks.rejected("structured output", ["response_format"], () =>
  client.chat.completions.parse({ model: MODEL, messages, response_format: zodResponseFormat(City, "city") }),
);

checks.rejected("required tools", ["tool_choice"], () =>
  toolsClient.chat.completions.create({
    model: MODEL, messages, tools: [weatherTool([])], tool_choice: "required",
  }),
);

checks.rejected("tools of `zodFunction`", ["strict"], () => {
  const tool = zodFunction({ name: "get_weather", parameters: City, function: () => checks.WEATHER });
  return toolsClient.chat.completions.runTools({ model: MODEL, messages, tools: [tool] }).finalContent();
});

await checks.main();
