// The labelling page. Gradio runs this as the body of a function of (element, trigger, props, server, ...).
//
// A press is kept in this browser and the next pair shown at once; sending happens behind it. Whatever was not
// acknowledged lies in localStorage, one entry for each label, and is sent again with the same token until the
// server has it; the server counts a token once. Texts of people and models only ever enter by textContent.

const $ = (selector) => element.querySelector(selector);
const stage = $('.stage');
const scale = [...element.querySelectorAll('.scale button')];
const replies = [...element.querySelectorAll('.replies .text')];
const [help, skipping] = [$('.help'), $('.skip-why')];
const WANT = 4; // pairs held: one on the screen, three in reserve
const BATCH = 20; // labels in one message
const BOUNCE = 150; // ms: a key so soon after a label is the bounce of the last press, for nobody reads that fast
const VERDICTS = {
  3: 'A much better', 2: 'A better', 1: 'A slightly better', 0: 'tie',
  '-1': 'B slightly better', '-2': 'B better', '-3': 'B much better', null: 'skipped',
};

let prefix = ''; // of this person's labels in localStorage: database, round, annotator
let unsent = []; // labels without acknowledgement, oldest first
const fresh = new Set(); // pairs among them that the server counts as open still
let reserve = []; // pairs handed out, not shown yet
let current = null; // the pair to judge
let past = []; // pairs judged, oldest first, each with its preference in the order shown
let at = null; // index in `past` while an earlier label is looked at
let counted = { asked: 0, done: 0 }; // by the server
let durations = []; // ms of the last labels
let shownAt = 0;
let judgedAt = -BOUNCE;
let failures = 0;
let trouble = ''; // why labels are not arriving
let notice = ''; // what became of labels that do not count
let sending = false;
let timer = 0;

// ---- what is on the screen

const task = () => (at === null ? current : past[at]);
const pair = (token) => token.slice(0, token.lastIndexOf('-'));

function show() {
  const it = task();
  stage.dataset.state = at !== null ? 'past' : it ? 'task' : 'empty';
  stage.dataset.task = it ? it.key : '';
  $('.conversation').replaceChildren(...(it ? it.messages : []).map(bubble));
  replies.forEach((box, i) => { box.textContent = it ? it.completions[i] : ''; });
  scale.forEach((button) => {
    const chosen = at !== null && it.preference !== null && it.preference === Number(button.dataset.preference);
    button.setAttribute('aria-pressed', String(chosen));
  });
  $('.work').scrollTop = 0;
  endOfConversation();
  shownAt = performance.now();
  report();
}

function endOfConversation() {
  const box = $('.conversation');
  box.dataset.cut = 'no';
  box.dataset.cut = box.scrollHeight > box.clientHeight + 1 ? 'yes' : 'no';
  box.scrollTop = box.scrollHeight;
}

function bubble({ role, content }) {
  const box = document.createElement('div');
  const who = box.appendChild(document.createElement('div'));
  const text = box.appendChild(document.createElement('div'));
  box.className = 'message';
  box.dataset.role = role;
  who.className = 'role';
  who.textContent = { user: 'User', assistant: 'Assistant', system: 'Instructions' }[role];
  text.className = 'text';
  text.dir = 'auto';
  text.textContent = content;
  return box;
}

function report() {
  const done = counted.done + fresh.size;
  const left = Math.max(0, counted.asked - done);
  const each = durations.length < 5 ? 0 : [...durations].sort((a, b) => a - b)[durations.length >> 1] / 1000;
  const minutes = Math.round((each * left) / 60);
  $('.progress').textContent = `${done} of ${counted.asked}`;
  $('.bar i').style.width = `${(100 * done) / (counted.asked || 1)}%`;
  $('.pace').textContent = each ? `${each.toFixed(each < 10 ? 1 : 0)} s each, about ${minutes || 1} min left` : '';
  $('.saving').textContent = trouble || notice || (unsent.length > BATCH ? `sending ${unsent.length}` : 'saved');
  $('.saving').classList.toggle('warn', trouble + notice !== '');
  $('.question').textContent = question();
  $('.empty').textContent = task() ? '' : nothing();
  $('.back').disabled = (at === null ? past.length : at) === 0;
  stage.dataset.unsent = unsent.length;
}

function question() {
  if (at === null) return 'Which reply answers the last message better?';
  return `${past.length - at} back you said: ${VERDICTS[past[at].preference]}. Press to change it, Enter to leave it.`;
}

function nothing() {
  if (trouble || sending) return 'Waiting for the next pair ...';
  return 'Nothing left to judge for now. Thank you! New pairs will show up here by themselves.';
}

// ---- judging

function judge(preference, reason) {
  const it = task();
  const now = performance.now();
  if (!it || now - judgedAt < BOUNCE) return;
  judgedAt = now;
  const ms = Math.round(now - shownAt);
  const nonce = [...crypto.getRandomValues(new Uint32Array(2))].map((n) => n.toString(36)).join('');
  keep(it, { token: `${it.key}-${nonce}`, preference, reason: reason ? reason.toWellFormed() : null, client_ms: ms });
  if (at === null) {
    fresh.add(it.key);
    past.push({ ...it, preference });
    durations = [...durations, ms].slice(-20);
    current = reserve.shift() || null;
  } else {
    past[at].preference = preference;
    at = null;
  }
  $('.last').textContent = `Last: ${VERDICTS[preference]}`;
  show();
  send();
}

function back() {
  const earlier = (at === null ? past.length : at) - 1;
  if (earlier >= 0) {
    at = earlier;
    show();
  }
}

function forward() {
  if (at !== null) {
    at = null;
    show();
  }
}

// ---- keeping and sending

function keep({ key, messages, completions }, label) {
  unsent.push(label);
  const entry = { label, task: { key, messages, completions }, at: Date.now() };
  const stored = store(entry) || store({ ...entry, task: null }); // the texts of some pairs fill the storage
  if (!stored) trouble = 'this browser keeps nothing: stay on the page until it says saved';
}

function store(entry) {
  try {
    localStorage.setItem(`${prefix}${entry.label.token}`, JSON.stringify(entry));
    return true;
  } catch {
    return false;
  }
}

// What an earlier visit could not send takes its place behind what the server knows of.
function recall() {
  const mine = Object.keys(localStorage).filter((key) => key.startsWith(prefix));
  const entries = mine.map((key) => JSON.parse(localStorage.getItem(key))).sort((a, b) => a.at - b.at);
  entries.forEach(({ label, task: it }) => {
    unsent.push(label);
    const known = past.find((other) => other.key === pair(label.token));
    if (known) known.preference = label.preference;
    else {
      if (it) past.push({ ...it, preference: label.preference });
      fresh.add(pair(label.token));
    }
  });
}

async function send() {
  if (sending) return;
  sending = true;
  clearTimeout(timer);
  try {
    do {
      const labels = unsent.slice(0, BATCH);
      const idle = labels.length === 0 || !current;
      const reply = await call('step', { labels, want: WANT, count: idle || past.length % 10 === 0 });
      if (!reply) return;
      settle(labels, reply);
    } while (unsent.length || (!current && reserve.length));
    if (!current) timer = setTimeout(send, 10000);
  } finally {
    sending = false;
    report();
  }
}

function settle(labels, reply) {
  const uncounted = reply.statuses.filter((status) => status === 'late' || status === 'refused').length;
  if (uncounted) notice = `${uncounted} not counted: someone else had taken the pair`;
  const sent = new Set(labels.map((label) => label.token));
  unsent = unsent.filter((label) => !sent.has(label.token));
  sent.forEach((token) => {
    localStorage.removeItem(`${prefix}${token}`);
    if (fresh.delete(pair(token))) counted.done += 1;
  });
  if (reply.progress) counted = reply.progress;
  const judged = new Set([...past.map((it) => it.key), ...unsent.map((label) => pair(label.token))]);
  const open = reply.tasks.filter((it) => !judged.has(it.key));
  if (!current && open.length) {
    current = open[0];
    if (at === null) show();
  }
  reserve = open.filter((it) => it.key !== current.key);
}

// Gradio's client turns a lost connection into undefined: only an answer of ours counts as one.
async function call(name, argument) {
  let reply;
  try { reply = await server[name](argument); } catch { reply = undefined; }
  if (reply && reply.ok) {
    failures = 0;
    trouble = '';
    return reply;
  }
  failures += 1;
  trouble = (reply && reply.error) || `no connection: ${unsent.length} label(s) kept in this browser`;
  clearTimeout(timer);
  timer = setTimeout(name === 'hello' ? start : send, Math.min(500 * failures, 5000));
  report();
  if (failures % 3 === 0) {
    const answer = await fetch('../whoami').catch(() => null);
    if (answer && answer.status === 401) location.assign('../'); // the session is gone; labels stay kept
  }
  return null;
}

async function start() {
  const reply = await call('hello', {});
  if (!reply) return;
  prefix = `prefloop:${reply.database}:${reply.round}:${reply.annotator}:`;
  past = reply.history;
  counted = reply.progress;
  recall();
  $('.title').textContent = reply.title;
  $('.name').textContent = reply.name;
  send();
}

// ---- keys and buttons

const KEYS = {
  s: () => task() && openDialog(skipping), u: back, Backspace: back, Enter: forward, Escape: forward,
  '?': () => openDialog(help), d: toggleTheme, c: toggleConversation,
  j: () => $('.work').scrollBy(0, 120), k: () => $('.work').scrollBy(0, -120),
};

function press(event) {
  if (!element.isConnected) return document.removeEventListener('keydown', press);
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return undefined;
  if (help.open || skipping.open || event.target.closest('input, textarea')) return undefined;
  if (event.key === 'Enter' && event.target.closest('button, a')) return undefined; // presses that button
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const act = /^[1-7]$/.test(key) ? () => judge(4 - Number(key)) : KEYS[key];
  if (act && stage.dataset.state !== 'loading') {
    event.preventDefault();
    act();
  }
  return undefined;
}

function openDialog(dialog) {
  skipping.querySelector('form').reset();
  skipping.returnValue = '';
  dialog.showModal();
}

function toggleTheme() {
  const theme = stage.dataset.theme === 'dark' ? 'light' : 'dark';
  localStorage.setItem('prefloop-theme', theme);
  stage.dataset.theme = theme;
}

function toggleConversation() {
  stage.dataset.whole = stage.dataset.whole === 'yes' ? 'no' : 'yes';
  endOfConversation();
}

function click(selector, act) {
  $(selector).addEventListener('click', (event) => {
    if (event.detail) event.currentTarget.blur(); // after the mouse, Enter must not press this button again
    act();
  });
}

const dark = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
stage.dataset.theme = localStorage.getItem('prefloop-theme') || dark;
document.addEventListener('keydown', press);
window.addEventListener('online', () => prefix && send());
scale.forEach((button, i) => click(`.scale button:nth-child(${i + 1})`, () => judge(Number(button.dataset.preference))));
click('.back', back);
click('.skip', KEYS.s);
click('.help-open', KEYS['?']);
click('.skip-why .cancel', () => skipping.close());
skipping.addEventListener('close', () => {
  if (skipping.returnValue === 'skip') judge(null, skipping.querySelector('input').value.trim());
});
start();
