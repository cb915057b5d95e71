// ---- the form: its questions one after the other, and what may be said besides

const LETTERS = 'ABCDEFGH';
const VERDICTS = {
  3: 'A much better', 2: 'A better', 1: 'A slightly better', 0: 'tie',
  '-1': 'B slightly better', '-2': 'B better', '-3': 'B much better', null: 'skipped',
};

let form = { kind: 'pairwise', question: '', attributes: {}, flags: {}, grades: [], rationale: 'no', edit: false };
let draft = null; // what has been answered of the task on the screen
let waiting = null; // the verdict that waits for its rationale

const several = () => Object.keys(form.attributes).length > 0;
const attribute = () => Object.keys(form.attributes)[Object.keys(draft.attributes).length];
const letter = (i) => (form.kind === 'rating' ? 'the reply' : LETTERS[i]);
const isRank = () => form.kind === 'ranking';

function useForm(given) {
  form = given;
  const hasMore = Object.keys(form.flags).length > 0 || form.rationale !== 'no' || form.edit;
  Object.assign(stage.dataset, { kind: form.kind, several: several() ? 'yes' : 'no', more: hasMore ? 'yes' : 'no' });
  $('.more-open').hidden = !hasMore;
  $('.more .why').hidden = form.rationale === 'no';
  $('.more .better').hidden = !form.edit;
  if (form.kind === 'rating') scaleOf(form.grades.map((grade, i) => [String(i + 1), grade]));
}

// Buttons of the scale, numbered from 1: [what stands large, what stands below].
function scaleOf(labels) {
  $('.scale').replaceChildren(...labels.map(([large, small], i) => {
    const button = document.createElement('button');
    const parts = [['kbd', i + 1], ['b', large], ['span', small]];
    button.append(...parts.map(([tag, text]) => Object.assign(document.createElement(tag), { textContent: text })));
    button.dataset.value = form.kind === 'rating' ? i + 1 : i;
    return button;
  }));
}

function begin(it) {
  const said = at === null ? null : it.answers || {};
  const kept = at === null && it ? JSON.parse(localStorage.getItem(`draft-${prefix}`) || 'null') : null;
  draft = { attributes: {}, places: [], tie: false, flags: {}, rationale: '', edit: null };
  if (said) Object.assign(draft, { flags: said.flags || {}, rationale: said.rationale || '', edit: said.edit || null });
  if (kept && kept.key === it.key && kept.form === form.id) draft = kept.draft;
  if (isRank() && it) scaleOf(it.completions.map((_, i) => [letter(i), 'next']));
}

function remember() {
  if (at !== null || !task()) return;
  try {
    localStorage.setItem(`draft-${prefix}`, JSON.stringify({ key: task().key, form: form.id, draft }));
  } catch { /* a full storage keeps labels, not drafts */ }
}

function forget() {
  localStorage.removeItem(`draft-${prefix}`);
}

function besides() {
  const edit = draft.edit && { of: draft.edit.of, text: written(draft.edit.text) };
  return { attributes: draft.attributes, flags: draft.flags, rationale: written(draft.rationale).trim() || null, edit };
}

function currentQuestion() {
  const names = Object.keys(form.attributes);
  if (!draft || !names.length) return form.question;
  const asked = attribute();
  return `${names.length - Object.keys(draft.attributes).length + 1} to go. ${asked ? form.attributes[asked] : form.question}`;
}

// Key or button n, from 1.
function answer(n) {
  const buttons = element.querySelectorAll('.scale button').length;
  if (!task() || n > buttons || bounced()) return;
  if (isRank()) {
    rank(n - 1);
    return;
  }
  const value = form.kind === 'rating' ? n : 4 - n;
  const name = attribute();
  if (name) {
    draft.attributes[name] = value;
    answered();
  } else conclude(form.kind === 'rating' ? { rating: value } : { preference: value });
}

function rank(i) {
  if (draft.places.flat().includes(i)) return;
  if (draft.tie && draft.places.length) draft.places[draft.places.length - 1].push(i);
  else draft.places.push([i]);
  draft.tie = false;
  answered();
  if (draft.places.flat().length === task().completions.length) {
    const ranking = [];
    draft.places.forEach((tied, place) => tied.forEach((reply) => { ranking[reply] = place + 1; }));
    conclude({ ranking });
  }
}

function tieNext() {
  if (!isRank() || !task()) return;
  draft.tie = !draft.tie && draft.places.length > 0;
  answered();
}

function bothAreBad() {
  if (form.kind === 'pairwise' && task() && !attribute() && !bounced()) conclude({ preference: 0, bad: true });
}

function conclude(verdictGiven) {
  if (form.rationale === 'required' && !draft.rationale.trim()) {
    openMore(verdictGiven);
    return;
  }
  judge(verdictGiven);
}

// The last answer of an unfinished task; false where there is none.
function takeBack() {
  const name = draft && Object.keys(draft.attributes).pop();
  if (!name && !(draft && draft.places.length)) return false;
  if (name) delete draft.attributes[name];
  else if (draft.places[draft.places.length - 1].length > 1) draft.places[draft.places.length - 1].pop();
  else draft.places.pop();
  answered();
  return true;
}

function answered() {
  remember();
  mark();
  report();
}

// Shows on the buttons and replies what has been said.
function mark() {
  const it = task();
  const before = at === null || !it ? {} : it.answers || {};
  const name = draft && attribute();
  let said = null;
  if (at !== null && it && !it.both_bad) said = name ? (before.attributes || {})[name] : before.rating || it.preference;
  const groups = draft && draft.places.length ? draft.places : groupsOf(before.ranking);
  const placeOf = (i) => groups.findIndex((tied) => tied.includes(i));
  element.querySelectorAll('.scale button').forEach((button, i) => {
    const on = isRank() ? groups.flat().includes(i) : said !== null && said !== undefined && said === Number(button.dataset.value);
    button.setAttribute('aria-pressed', String(on));
    if (isRank()) button.querySelector('span').textContent = on ? `place ${placeOf(i) + 1}` : 'next';
  });
  element.querySelectorAll('.replies .place').forEach((badge, i) => {
    badge.textContent = placeOf(i) < 0 ? '' : `${placeOf(i) + 1}.`;
  });
  bothBad.setAttribute('aria-pressed', String(at !== null && Boolean(it.both_bad)));
  bothBad.disabled = Boolean(name);
  $('.tied').setAttribute('aria-pressed', String(Boolean(draft && draft.tie)));
  const noted = draft && (draft.rationale.trim() || draft.edit || Object.keys(draft.flags).length);
  $('.more-open').setAttribute('aria-pressed', String(Boolean(noted)));
}

function groupsOf(ranking) {
  const groups = [];
  (ranking || []).forEach((place, reply) => { (groups[place - 1] ||= []).push(reply); });
  return groups;
}

function verdict({ preference, both_bad: bad, answers = {} }) {
  if (bad) return 'both bad';
  if (answers.rating) return form.grades[answers.rating - 1];
  if (answers.ranking) return groupsOf(answers.ranking).map((tied) => tied.map(letter).join(' = ')).join(' > ');
  return VERDICTS[preference];
}

// ---- what may be said besides

function openMore(verdictGiven = null) {
  if (stage.dataset.more !== 'yes' || !task()) return;
  waiting = verdictGiven;
  const fields = more.querySelector('form').elements;
  const count = task().completions.length;
  more.querySelector('.flags').replaceChildren(...Object.entries(form.flags).map(([name, means]) => flag(name, means, count)));
  fields.rationale.value = draft.rationale;
  const options = [['', 'none'], ...task().completions.map((_, i) => [i, letter(i)])];
  fields.of.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  fields.of.value = draft.edit ? draft.edit.of : '';
  fields.edit.value = draft.edit ? draft.edit.text : '';
  const saves = verdictBefore() ? 'Done saves this with the label you gave.' : '';
  more.querySelector('.hint').textContent = waiting ? 'This form asks for a reason.' : saves;
  more.returnValue = '';
  more.showModal();
  if (waiting) fields.rationale.focus();
}

function flag(name, means, count) {
  const set = document.createElement('fieldset');
  set.append(Object.assign(document.createElement('legend'), { textContent: `${name}: ${means}` }));
  for (let i = 0; i < count; i += 1) {
    const label = document.createElement('label');
    const box = Object.assign(document.createElement('input'), { type: 'checkbox', name: `flag-${name}`, value: i });
    box.checked = (draft.flags[name] || []).includes(i);
    label.append(box, ` ${letter(i)}`);
    set.append(label);
  }
  return set;
}

// Whatever way the dialog was left, what was typed is kept with the draft.
function readMore() {
  const fields = more.querySelector('form').elements;
  draft.flags = {};
  Object.keys(form.flags).forEach((name) => {
    const on = [...more.querySelectorAll(`[name="flag-${name}"]:checked`)].map((box) => Number(box.value));
    if (on.length) draft.flags[name] = on;
  });
  draft.rationale = fields.rationale.value;
  draft.edit = fields.of.value !== '' && fields.edit.value.trim() ? { of: Number(fields.of.value), text: fields.edit.value } : null;
  answered();
  const before = waiting ? null : verdictBefore();
  const given = more.returnValue === 'done' ? waiting || before : null;
  if (given && before) draft.attributes = { ...(past[at].answers || {}).attributes };
  waiting = null;
  if (given) conclude(given);
}

// Of an earlier label that is not being answered anew: its verdict, which its note is saved with. A skip has none.
function verdictBefore() {
  if (at === null || draft.places.length || Object.keys(draft.attributes).length) return null;
  const { preference, both_bad: bad, answers = {} } = past[at];
  const { rating = null, ranking = null } = answers;
  return preference === null && rating === null && ranking === null ? null : { preference, bad, rating, ranking };
}

// Choosing a reply brings its text, unless something of one's own stands there.
function startEdit() {
  const fields = more.querySelector('form').elements;
  const texts = task().completions;
  if (fields.of.value !== '' && (!fields.edit.value.trim() || texts.includes(fields.edit.value))) {
    fields.edit.value = texts[Number(fields.of.value)];
  }
  fields.edit.focus();
}

