// ---- how texts are shown: as they are, as Markdown, or with their differences marked

const WORDS = 4e6; // cells of the table below: some 2,000 words against 2,000
const HIDDEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\u{e0000}-\u{e007f}]/u;
const html = new Map(); // pair -> what the server made of its texts

function fill(it) {
  const rich = stage.dataset.format === 'markdown' && it ? html.get(it.key) : null;
  const texts = it ? it.completions : ['', ''];
  const boxes = boxesFor(texts.length);
  const marked = stage.dataset.marked === 'yes' && !rich && texts.length === 2 ? differences(...texts) : null;
  $('.conversation').replaceChildren(...(it ? it.messages : []).map((message, i) => bubble(message, rich && rich.messages[i])));
  boxes.forEach((box, i) => {
    put(box, texts[i], rich && rich.completions[i]);
    if (marked) box.replaceChildren(...marked[i]);
    box.previousElementSibling.querySelector('.note').textContent = HIDDEN.test(texts[i]) ? 'has hidden characters' : '';
  });
  if (it && stage.dataset.format === 'markdown' && !rich) ask();
}

// As many replies as the task has.
function boxesFor(count) {
  const holder = $('.replies');
  while (holder.children.length > count) holder.lastElementChild.remove();
  while (holder.children.length < count) holder.append(holder.firstElementChild.cloneNode(true));
  holder.style.setProperty('--columns', count === 4 ? 2 : Math.min(count, 3));
  [...holder.children].forEach((article, i) => {
    article.setAttribute('aria-label', count === 1 ? 'Reply' : `Reply ${LETTERS[i]}`);
    article.querySelector('h2 b').textContent = count === 1 ? 'Reply' : LETTERS[i];
  });
  return [...holder.querySelectorAll('.text')];
}

function put(box, text, rich) {
  box.classList.toggle('rich', Boolean(rich));
  if (rich) box.innerHTML = rich; // made safe by the server: annotate/markdown.py
  else box.textContent = text;
}

function bubble({ role, content }, rich) {
  const box = document.createElement('div');
  const who = box.appendChild(document.createElement('div'));
  const text = box.appendChild(document.createElement('div'));
  box.className = 'message';
  box.dataset.role = role;
  who.className = 'role';
  who.textContent = { user: 'User', assistant: 'Assistant', system: 'Instructions' }[role];
  text.className = 'text';
  text.dir = 'auto';
  put(text, content, rich);
  return box;
}

// Markdown of the pair on the screen and of those in reserve. Until it is there, texts stand as they are.
async function ask() {
  const keys = [task(), current, ...reserve].filter(Boolean).map((it) => it.key);
  const missing = [...new Set(keys)].filter((key) => !html.has(key)).slice(0, 10);
  if (!missing.length) return;
  const reply = await server.markdown({ keys: missing }).catch(() => null);
  if (!reply || !reply.ok) return;
  Object.entries(reply.html).forEach(([key, made]) => html.set(key, made));
  while (html.size > 60) html.delete(html.keys().next().value);
  if (task() && reply.html[task().key]) fill(task());
}

// The words of both texts as nodes; marked is what no longest common subsequence holds. null: too long.
function differences(a, b) {
  if (a.length + b.length > 60000) return null;
  const words = new Intl.Segmenter(undefined, { granularity: 'word' });
  const [x, y] = [a, b].map((text) => [...words.segment(text)].map((part) => part.segment));
  if (x.length * y.length > WORDS) return null;
  const width = y.length + 1;
  const common = new Uint16Array((x.length + 1) * width); // of the rests from i and j on
  for (let i = x.length - 1; i >= 0; i -= 1) {
    for (let j = y.length - 1; j >= 0; j -= 1) {
      common[i * width + j] = x[i] === y[j] ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const kept = [new Set(), new Set()];
  for (let i = 0, j = 0; i < x.length && j < y.length;) {
    if (x[i] === y[j]) {
      kept[0].add(i);
      kept[1].add(j);
      i += 1;
      j += 1;
    } else if (common[(i + 1) * width + j] >= common[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return [x, y].map((parts, side) => runs(parts, kept[side]));
}

function runs(parts, kept) {
  const nodes = [];
  parts.forEach((part, i) => {
    const tag = kept.has(i) ? 'span' : 'mark';
    const last = nodes[nodes.length - 1];
    if (last && last.localName === tag) last.textContent += part;
    else nodes.push(Object.assign(document.createElement(tag), { textContent: part }));
  });
  return nodes;
}

function toggleFormat() {
  stage.dataset.format = stage.dataset.format === 'markdown' ? 'raw' : 'markdown';
  localStorage.setItem('prefloop-format', stage.dataset.format);
  stage.dataset.marked = 'no';
  again();
}

function toggleMarked() {
  stage.dataset.marked = stage.dataset.marked === 'yes' ? 'no' : 'yes';
  stage.dataset.format = 'raw';
  again();
  if (stage.dataset.marked === 'yes' && task() && !$('.replies mark, .replies span')) {
    $('.last').textContent = 'Too long to compare word by word';
  }
}

function again() {
  fill(task());
  $('.conversation').dataset.cut = 'no';
  endOfConversation();
  report();
}

// ---- guidelines: read before the first label, and again when they change

let guidelines = '';

function introduce({ id, html: text }) {
  guidelines = id;
  $('.guidelines .rich').innerHTML = text; // made safe by the server
  if (localStorage.getItem(`read-${prefix}${round}`) !== id) openDialog(reading);
}

function haveRead() {
  localStorage.setItem(`read-${prefix}${round}`, guidelines);
  shownAt = performance.now();
}
