// The openai package for JavaScript.

import OpenAI from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { API_KEY, BASE_URL, MODEL, TIMEOUT_MS, expect, run } from '../reporting.mjs';

const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0, timeout: TIMEOUT_MS });
const messages = [{ role: 'user', content: 'Name the capital of France.' }];
const settings = { model: MODEL, temperature: 0, max_tokens: 24 };
const City = z.enum(['Paris', 'Rome', 'Oslo']);
const Person = z.object({ name: z.string().max(20), age: z.int().min(0).max(120), city: City });

await run('openai-node', {
  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    expect(names.includes(MODEL), 'the model is not listed', names);
    return names.join(', ');
  },

  async chat() {
    const answer = await client.chat.completions.create({ ...settings, messages });
    expect(answer.choices[0].finish_reason === 'stop', 'finish_reason', answer.choices[0]);
    const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
    expect(total_tokens === prompt_tokens + completion_tokens, 'usage', answer.usage);
    return answer.choices[0].message.content;
  },

  async 'chat-stream'() {
    const stream = await client.chat.completions.create({
      ...settings,
      messages,
      stream: true,
      stream_options: { include_usage: true },
    });
    let text = '';
    let usage;
    let chunks = 0;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? '';
      usage = chunk.usage ?? usage;
      chunks += 1;
    }
    const whole = await client.chat.completions.create({ ...settings, messages });
    expect(text === whole.choices[0].message.content, 'the streamed text', text);
    expect(usage.completion_tokens === whole.usage.completion_tokens, 'usage', usage);
    return `${chunks} chunks`;
  },

  async 'chat-stream-left-early'() {
    const stream = await client.chat.completions.create({ ...settings, messages, max_tokens: 300, stream: true });
    for await (const chunk of stream) {
      stream.controller.abort();
      return chunk.id;
    }
  },

  async 'chat-logprobs'() {
    const answer = await client.chat.completions.create({ ...settings, messages, logprobs: true, top_logprobs: 2 });
    const tokens = answer.choices[0].logprobs.content;
    expect(tokens.length > 0 && tokens.every(token => token.top_logprobs.length === 2), 'logprobs', tokens);
    return `${tokens.length} tokens`;
  },

  async parse() {
    const answer = await client.chat.completions.parse({
      ...settings,
      max_tokens: 200,
      messages: [{ role: 'user', content: 'Invent a person.' }],
      response_format: zodResponseFormat(Person, 'person'),
    });
    return JSON.stringify(Person.parse(answer.choices[0].message.parsed));
  },

  async 'tool-stream'() {
    const stream = client.chat.completions.stream({
      ...settings,
      max_tokens: 200,
      messages: [{ role: 'user', content: 'What is the weather in Oslo?' }],
      tools: [zodFunction({ name: 'get_weather', parameters: z.object({ city: City }) })],
      tool_choice: 'required',
      parallel_tool_calls: false,
    });
    const answer = await stream.finalChatCompletion();
    const [call] = answer.choices[0].message.tool_calls;
    expect(answer.choices[0].finish_reason === 'tool_calls', 'finish_reason', answer.choices[0]);
    return JSON.stringify(City.parse(call.function.parsed_arguments.city));
  },

  async completion() {
    const answer = await client.completions.create({ ...settings, prompt: '1, 2, 3, 4,', max_tokens: 6 });
    expect(answer.choices[0].finish_reason === 'length', 'finish_reason', answer.choices[0]);
    return answer.choices[0].text;
  },

  async responses() {
    const asked = { model: MODEL, input: 'Name the capital of France.', max_output_tokens: 32, temperature: 0 };
    const whole = await client.responses.create(asked);
    let text = '';
    for await (const event of await client.responses.create({ ...asked, stream: true })) {
      if (event.type === 'response.output_text.delta') text += event.delta;
    }
    expect(text !== '' && text === whole.output_text, 'the streamed text', text);
    return text;
  },

  async refused() {
    try {
      await client.chat.completions.create({ ...settings, messages, model: 'gpt-9' });
    } catch (error) {
      expect(error instanceof OpenAI.NotFoundError && error.code === 'model_not_found', 'the error', String(error));
      return error.message;
    }
    throw new Error('an unknown model was not refused');
  },
});
