// The Vercel AI SDK with its openai-compatible provider.

import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, Output, generateObject, generateText, isStepCount, streamText, tool } from 'ai';
import { z } from 'zod';
import { API_KEY, BASE_URL, MODEL, TIMEOUT_MS, expect, run } from '../reporting.mjs';

const molink = createOpenAICompatible({
  name: 'molink',
  baseURL: BASE_URL,
  apiKey: API_KEY,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = molink(MODEL);
const prompt = 'Name the capital of France.';
const settings = () => ({
  model,
  temperature: 0,
  maxOutputTokens: 200,
  maxRetries: 0,
  abortSignal: AbortSignal.timeout(TIMEOUT_MS),
});
const City = z.enum(['Paris', 'Rome', 'Oslo']);
const Person = z.object({ name: z.string().max(20), age: z.int().min(0).max(120), city: City });
const weather = tool({
  description: 'The weather in a city.',
  inputSchema: z.object({ city: City }),
  execute: async ({ city }) => `Snow in ${city}.`,
});

await run('ai-sdk', {
  async 'generate-text'() {
    const { text, finishReason, usage } = await generateText({ ...settings(), system: 'Be brief.', prompt });
    expect(finishReason === 'stop', 'finishReason', finishReason);
    expect(usage.totalTokens === usage.inputTokens + usage.outputTokens, 'usage', usage);
    return text;
  },

  async 'stream-text'() {
    const stream = streamText({ ...settings(), prompt });
    let text = '';
    let pieces = 0;
    for await (const piece of stream.textStream) {
      text += piece;
      pieces += 1;
    }
    const usage = await stream.usage;
    const whole = await generateText({ ...settings(), prompt });
    expect(text === whole.text, 'the streamed text', text);
    expect((await stream.finishReason) === 'stop', 'finishReason');
    expect(usage.outputTokens === whole.usage.outputTokens, 'usage', usage);
    return `${pieces} pieces`;
  },

  async 'generate-object'() {
    const { object } = await generateObject({ ...settings(), schema: Person, prompt: 'Invent a person.' });
    return JSON.stringify(Person.parse(object));
  },

  async 'output-object'() {
    const { output } = await generateText({
      ...settings(),
      output: Output.object({ schema: Person }),
      prompt: 'Invent a person.',
    });
    return JSON.stringify(Person.parse(output));
  },

  async 'output-choice'() {
    const { output } = await generateText({
      ...settings(),
      output: Output.choice({ options: ['yes', 'no'] }),
      prompt: 'Is the sky blue?',
    });
    expect(['yes', 'no'].includes(output), 'output', output);
    return output;
  },

  async 'stream-object'() {
    const stream = streamText({
      ...settings(),
      output: Output.object({ schema: Person }),
      prompt: 'Invent a person.',
    });
    let states = 0;
    for await (const _ of stream.partialOutputStream) states += 1;
    return `${states} states, last ${JSON.stringify(Person.parse(await stream.output))}`;
  },

  async 'tool-required'() {
    const { toolCalls, toolResults, finishReason } = await generateText({
      ...settings(),
      tools: { weather },
      toolChoice: 'required',
      prompt: 'What is the weather in Oslo?',
    });
    expect(finishReason === 'tool-calls', 'finishReason', finishReason);
    expect(toolCalls.length > 0 && toolCalls.length === toolResults.length, 'calls', toolCalls);
    return JSON.stringify(toolResults[0].output);
  },

  async 'tool-then-text'() {
    const { steps, text } = await generateText({
      ...settings(),
      tools: { weather },
      stopWhen: isStepCount(2),
      prepareStep: ({ stepNumber }) => ({
        toolChoice: stepNumber === 0 ? { type: 'tool', toolName: 'weather' } : 'none',
      }),
      prompt: 'What is the weather in Oslo?',
    });
    expect(steps.length === 2, 'number of steps', steps.length);
    expect(text !== '', 'no text after the tool');
    return text;
  },

  async 'tool-stream'() {
    const stream = streamText({
      ...settings(),
      tools: { weather },
      toolChoice: 'required',
      prompt: 'What is the weather in Oslo?',
    });
    const kinds = new Set();
    for await (const part of stream.fullStream) kinds.add(part.type);
    for (const kind of ['tool-input-start', 'tool-input-delta', 'tool-call', 'tool-result']) {
      expect(kinds.has(kind), `no ${kind}`, [...kinds]);
    }
    return JSON.stringify((await stream.toolCalls)[0].input);
  },

  async completion() {
    const { text } = await generateText({
      ...settings(),
      model: molink.completionModel(MODEL),
      maxOutputTokens: 6,
      prompt: '1, 2, 3, 4,',
    });
    expect(text !== '', 'no text');
    return text;
  },

  async refused() {
    try {
      await generateText({ ...settings(), model: molink('gpt-9'), prompt });
    } catch (error) {
      expect(APICallError.isInstance(error) && error.statusCode === 404, 'the error', String(error));
      return error.message;
    }
    throw new Error('an unknown model was not refused');
  },
});
