// The labelling page: this, reading.js, outbox.js and keys.js. Gradio runs them, one after the other, as the body of
// one function of (element, trigger, props, server, ...).
//
// A press is kept in this browser and the next pair shown at once; sending happens behind it. Whatever was not
// acknowledged lies in localStorage, one entry for each label, and is sent again with the same token until the
// server has it; the server counts a token once. Texts of people and models enter by textContent, or as HTML that the
// server made safe.

const $ = (selector) => element.querySelector(selector);
const stage = $('.stage');
const scale = [...element.querySelectorAll('.scale button')];
const replies = [...element.querySelectorAll('.replies .text')];
const [help, skipping, reading] = [$('.help'), $('.skip-why'), $('.guidelines')];
const bothBad = $('.both-bad');
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
  stage.dataset.marked = 'no';
  fill(it);
  const said = at === null || it.both_bad ? null : it.preference;
  scale.forEach((button) => {
    button.setAttribute('aria-pressed', String(said !== null && said === Number(button.dataset.preference)));
  });
  bothBad.setAttribute('aria-pressed', String(at !== null && Boolean(it.both_bad)));
  report();
  $('.conversation').dataset.cut = 'no';
  endOfConversation(); // reads the layout, so last: one layout for each pair
  $('.work').scrollTop = 0;
  shownAt = performance.now();
}

function endOfConversation() {
  const box = $('.conversation');
  const cut = box.scrollHeight > box.clientHeight + 1;
  if (cut) box.dataset.cut = 'yes';
  if (cut) box.scrollTop = box.scrollHeight;
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
  $('.format').setAttribute('aria-pressed', String(stage.dataset.format === 'markdown'));
  $('.marked').setAttribute('aria-pressed', String(stage.dataset.marked === 'yes'));
  $('.empty').textContent = task() ? '' : nothing();
  $('.back').disabled = (at === null ? past.length : at) === 0;
  stage.dataset.unsent = unsent.length;
}

function question() {
  if (at === null) return 'Which reply answers the last message better?';
  return `${past.length - at} back you said: ${verdict(past[at])}. Press to change it, Enter to leave it.`;
}

function verdict({ preference, both_bad: bad }) {
  return bad ? 'both bad' : VERDICTS[preference];
}

function nothing() {
  if (trouble || sending) return 'Waiting for the next pair ...';
  return 'Nothing left to judge for now. Thank you! New pairs will show up here by themselves.';
}

// ---- judging

function judge(preference, { reason = '', bad = false } = {}) {
  const it = task();
  const now = performance.now();
  if (!it || now - judgedAt < BOUNCE) return;
  judgedAt = now;
  const ms = Math.round(now - shownAt);
  const nonce = [...crypto.getRandomValues(new Uint32Array(2))].map((n) => n.toString(36)).join('');
  const label = { token: `${it.key}-${nonce}`, preference, both_bad: bad, client_ms: ms, guidelines };
  keep(it, { ...label, reason: reason ? reason.toWellFormed() : null });
  if (at === null) {
    fresh.add(it.key);
    past.push({ ...it, preference, both_bad: bad });
    durations = [...durations, ms].slice(-20);
    current = reserve.shift() || null;
  } else {
    Object.assign(past[at], { preference, both_bad: bad });
    at = null;
  }
  $('.last').textContent = `Last: ${verdict({ preference, both_bad: bad })}`;
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
