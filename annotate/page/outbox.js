// ---- keeping and sending

// What the server takes of a text that somebody wrote: no half of a character, no NUL.
const written = (text) => text.toWellFormed().replaceAll('\0', '');

function keep({ key, messages, completions }, label) {
  unsent.push(label);
  const entry = { label, round, task: { key, messages, completions }, at: Date.now() };
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

// What an earlier visit could not send takes its place behind what the server knows of; of another round it is only sent.
function recall() {
  const mine = Object.keys(localStorage).filter((key) => key.startsWith(prefix));
  const entries = mine.map((key) => JSON.parse(localStorage.getItem(key))).sort((a, b) => a.at - b.at);
  entries.forEach(({ label, round: of, task: it }) => {
    unsent.push(label);
    if (of !== round) return;
    const known = past.find((other) => other.key === pair(label.token));
    const said = { preference: label.preference, both_bad: label.both_bad, answers: label.answers || {} };
    if (known) Object.assign(known, said);
    else {
      if (it) past.push({ ...it, ...said });
      fresh.add(pair(label.token));
    }
  });
}

function message() {
  let size = 0;
  return unsent.slice(0, BATCH).filter((label, i) => {
    size += JSON.stringify(label).length;
    return i === 0 || size < LARGEST;
  });
}

async function send() {
  if (sending) return;
  sending = true;
  clearTimeout(timer);
  try {
    do {
      const labels = message();
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
  standing = reply.standing || 'open';
  const why = standing === 'closed' ? 'the round was closed' : 'someone else had taken the pair';
  if (uncounted) notice = `${uncounted} not counted: ${why}`;
  const sent = new Set(labels.map((label) => label.token));
  unsent = unsent.filter((label) => !sent.has(label.token));
  sent.forEach((token) => {
    localStorage.removeItem(`${prefix}${token}`);
    if (fresh.delete(pair(token))) counted.done += 1;
  });
  if (reply.progress) counted = reply.progress;
  const looked = at === null ? null : past[at];
  const judged = new Set([looked && looked.key, ...unsent.map((label) => pair(label.token))]);
  const stale = reply.served !== served; // the server was started again, for something else
  const open = stale ? [] : reply.tasks.filter((it) => !judged.has(it.key));
  const again = new Set(open.map((it) => it.key)); // where judged before, that came too late to count
  past = past.filter((it) => !again.has(it.key));
  if (looked) at = past.indexOf(looked);
  if (standing === 'closed' && current) {
    current = null;
    if (at === null) show();
  }
  if (!current && open.length) {
    current = open[0];
    if (at === null) show();
  }
  reserve = open.filter((it) => it.key !== current.key);
  if (stage.dataset.format === 'markdown') ask();
  told.push(...(reply.feedback || []));
  tell();
  const idle = !unsent.length && !$('dialog[open]');
  if (stale && idle) location.reload();
}

// What the answer to a task should have been, where the round's checks say so; not over another dialog.
function tell() {
  if (!told.length || $('dialog[open]')) return;
  const { token, right, text } = told.shift();
  const it = past.find((other) => other.key === pair(token));
  const asked = it && it.messages.length ? it.messages[it.messages.length - 1].content : '';
  checked.querySelector('h2').textContent = right ? 'That was right' : 'That was not right';
  checked.querySelector('.asked').textContent = asked.length > 200 ? `${asked.slice(0, 200)} ...` : asked;
  checked.querySelector('.said').textContent = it ? `You said: ${verdict(it)}.` : '';
  checked.querySelector('.because').textContent = text;
  checked.showModal();
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
  prefix = `prefloop:${reply.database}:${reply.annotator}:`;
  ({ round, served } = reply);
  past = reply.history;
  counted = reply.progress;
  recall();
  $('.title').textContent = reply.title;
  $('.name').textContent = reply.name;
  $('.for-researcher').hidden = !reply.researcher;
  useForm(reply.form);
  introduce(reply.guidelines);
  send();
}
