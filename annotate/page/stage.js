// The labelling page: this, form.js, reading.js, outbox.js and keys.js. Gradio runs them, one after the other, as the body of
// one function of (element, trigger, props, server, ...).
//
// A press is kept in this browser and the next pair shown at once; sending happens behind it. Whatever was not
// acknowledged lies in localStorage, one entry for each label, and is sent again with the same token until the
// server has it; the server counts a token once. Texts of people and models enter by textContent, or as HTML that the
// server made safe.

const $ = (selector) => element.querySelector(selector);
const stage = $('.stage');
const [help, skipping, reading, more, checked] = [$('.help'), $('.skip-why'), $('.guidelines'), $('.more'), $('.checked')];
const bothBad = $('.both-bad');
const WANT = 4; // pairs held: one on the screen, three in reserve
const BATCH = 20; // labels in one message, of no more than LARGEST characters unless it is a single one
const LARGEST = 40000;
const BOUNCE = 150; // ms: a key so soon after a label is the bounce of the last press, for nobody reads that fast

const NOTHING = {
  open: 'Nothing left to judge for now. Thank you! New ones will show up here by themselves.',
  paused: 'Paused for now; your labels are saved. It will go on here by itself.',
  closed: 'This round is closed, and your labels are saved. Thank you!',
  unqualified: 'Thank you for trying. Too few of these first answers were the expected ones, so this round has no more for you.',
  finished: 'You have done as much as one person may in this round. Thank you!',
};

let prefix = ''; // of this person's labels in localStorage: database, annotator
let round = 0;
let served = ''; // the round, form and guidelines that this page was loaded for
let unsent = []; // labels without acknowledgement, oldest first
const fresh = new Set(); // pairs among them that the server counts as open still
let reserve = []; // pairs handed out, not shown yet
let current = null; // the pair to judge
let past = []; // pairs judged, oldest first, each with its label in the order shown
let at = null; // index in `past` while an earlier label is looked at
let counted = { asked: 0, done: 0 }; // by the server
let durations = []; // ms of the last labels
let shownAt = 0;
let judgedAt = -BOUNCE;
let failures = 0;
let trouble = ''; // why labels are not arriving
let notice = ''; // what became of labels that do not count
let standing = 'open'; // why there is nothing more to judge: annotate.quality.Standing
const told = []; // answers to checks that are still to be shown
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
  begin(it);
  fill(it);
  mark();
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
  const asked = currentQuestion();
  if (at === null) return asked;
  return `${past.length - at} back you said: ${verdict(past[at])}. ${several() ? asked : 'Press to change it, Enter to leave it.'}`;
}

function nothing() {
  if (trouble || sending) return 'Waiting for the next one ...';
  return NOTHING[standing];
}

// ---- judging

// A press so soon after the last one is its bounce.
function bounced() {
  const now = performance.now();
  const soon = now - judgedAt < BOUNCE;
  if (!soon) judgedAt = now;
  return soon;
}

// Saves the label, with what the draft holds besides.
function judge({ preference = null, rating = null, ranking = null, bad = false, reason = '' }) {
  const it = task();
  if (!it) return;
  const ms = Math.round(performance.now() - shownAt);
  const nonce = [...crypto.getRandomValues(new Uint32Array(2))].map((n) => n.toString(36)).join('');
  const said = { preference, both_bad: bad, answers: { ...besides(), rating, ranking } };
  const label = { token: `${it.key}-${nonce}`, ...said, form: form.id, client_ms: ms, guidelines };
  keep(it, { ...label, reason: reason ? written(reason) : null });
  if (at === null) {
    fresh.add(it.key);
    past.push({ ...it, ...said });
    durations = [...durations, ms].slice(-20);
    current = reserve.shift() || null;
    forget();
  } else {
    Object.assign(past[at], said);
    at = null;
  }
  $('.last').textContent = `Last: ${verdict(said)}`;
  show();
  send();
}

function back() {
  if (takeBack()) return;
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
