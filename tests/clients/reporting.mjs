// What a client's program needs: where the server is, and one JSON line for each check (see reporting.py).

export const BASE_URL = process.env.CLIENT_BASE_URL ?? 'http://127.0.0.1:8000/v1';
export const MODEL = process.env.CLIENT_MODEL ?? 'demo';
export const API_KEY = process.env.CLIENT_API_KEY ?? 'unused';
export const TIMEOUT_MS = 90_000;

/** Raises unless `condition` holds; `seen` is told. */
export function expect(condition, what, seen) {
  if (!condition) throw new Error(seen === undefined ? what : `${what}: ${JSON.stringify(seen)}`);
}

/** Carries out `checks`, an object of async functions that return what they saw, or those named on the command line. */
export async function run(client, checks) {
  const named = process.argv.slice(2);
  const names = named.length > 0 ? named : Object.keys(checks);
  let allOk = true;
  for (const name of names) {
    const started = performance.now();
    let ok = true;
    let detail;
    try {
      if (!(name in checks)) throw new Error(`no such check; there are ${Object.keys(checks).join(', ')}`);
      detail = await checks[name]();
    } catch (error) {
      ok = false;
      const frames = (error?.stack ?? '').split('\n').filter(frame => !frame.includes('node_modules'));
      const place = /client\.mjs:\d+/.exec(frames.join('\n'))?.[0];
      detail = `${place ? `${place}: ` : ''}${error?.name}: ${error?.message}`;
      if (error?.responseBody) detail += ` ${error.responseBody}`;
    }
    allOk &&= ok;
    const seconds = Math.round((performance.now() - started) / 10) / 100;
    console.log(JSON.stringify({ client, check: name, ok, detail, seconds }));
  }
  process.exitCode = allOk ? 0 : 1;
}
