'use strict';

const POLL = 250; // milliseconds between two questions about progress
const element = (id) => document.getElementById(id);
let kind = 'prompt';

function say(text, bad = false) {
  element('message').textContent = text;
  element('message').className = bad ? 'bad' : '';
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    throw new Error('the server does not answer: is rae-xla serve still running?');
  }
  const content = await answer.json();
  if (content.error && !answer.ok) throw new Error(content.error);
  return content;
}

function request() {
  const number = (id) => Number(element(id).value);
  return {
    text: element('text').value,
    guidance: number('guidance'),
    steps: number('steps'),
    seed: number('seed'),
    images: number('images'),
  };
}

// Answers what needs no server, so that a mistake is no failed request.
function mistake(values) {
  if (kind === 'prompt' && !values.text.trim()) return 'The prompt is empty: write what the image is to show.';
  for (const id of ['guidance', 'steps', 'seed', 'images']) {
    const input = element(id);
    if (input.value === '' || !input.checkValidity()) {
      const range = input.max ? `from ${input.min} to ${input.max}` : `of at least ${input.min}`;
      return `${id[0].toUpperCase()}${id.slice(1)} must be a number ${range}.`;
    }
  }
  return '';
}

function show(status) {
  const progress = element('progress');
  progress.hidden = status.state !== 'running' && status.state !== 'waiting';
  if (status.state === 'waiting') {
    progress.removeAttribute('value');
    say(status.before ? `Waiting: ${status.before} before this one.` : 'Waiting.');
  } else if (status.state === 'running') {
    progress.max = status.total || 1;
    progress.value = status.done;
    say(status.total ? `Step ${status.done} of ${status.total}` : 'Reading the prompt.');
  } else if (status.state === 'failed') {
    say(status.error, true);
  } else {
    say(status.images.length === 1 ? 'Done.' : `Done: ${status.images.length} images.`);
    const shown = status.images.map((path, i) => {
      const image = new Image();
      image.src = path;
      image.alt = `${status.settings.text} (image ${i})`;
      return image;
    });
    element('images-of-job').replaceChildren(...shown);
    element('manifest').href = status.manifest;
    element('settings').textContent = JSON.stringify(status.settings, null, 1);
    element('result').hidden = false;
  }
}

async function generate(event) {
  event.preventDefault();
  const values = request();
  const problem = mistake(values);
  if (problem) return say(problem, true);
  element('go').disabled = true;
  try {
    say('Sending.');
    const job = await ask('jobs', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify(values),
    });
    if (job.error) return say(job.error, true);
    for (;;) {
      const status = await ask(`jobs/${job.key}`);
      show(status);
      if (status.state === 'done' || status.state === 'failed') break;
      await new Promise((resolve) => setTimeout(resolve, POLL));
    }
  } catch (error) {
    say(error.message, true);
  } finally {
    element('go').disabled = false;
    element('progress').hidden = true;
  }
}

async function copy() {
  const text = element('settings').textContent;
  try {
    await navigator.clipboard.writeText(text);
    say('The settings are copied.');
  } catch (error) { // no permission: select them instead
    getSelection().selectAllChildren(element('settings'));
    say('The settings are selected: copy them.');
  }
}

async function start() {
  try {
    const model = await ask('model');
    kind = model.kind;
    element('model').textContent = model.name;
    if (kind === 'class') {
      element('what').textContent = 'Classes, by name or number, separated by commas; empty: random ones';
    }
    for (const [id, value] of Object.entries(model.defaults)) element(id).value = value;
  } catch (error) {
    say(error.message, true);
  }
}

element('form').addEventListener('submit', generate);
element('copy').addEventListener('click', copy);
start();
