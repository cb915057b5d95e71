// ---- keys and buttons

const KEYS = {
  s: () => task() && openDialog(skipping), u: back, Backspace: back, Enter: forward, Escape: forward,
  0: bothAreBad, n: () => openMore(), '=': tieNext, '?': () => openDialog(help), g: () => openDialog(reading),
  d: toggleTheme, c: toggleConversation, m: toggleFormat, x: toggleMarked,
  j: () => $('.work').scrollBy(0, 120), k: () => $('.work').scrollBy(0, -120),
};

function press(event) {
  if (!element.isConnected) return document.removeEventListener('keydown', press);
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return undefined;
  if ($('dialog[open]') || event.target.closest('input, textarea, select')) return undefined;
  if (event.key === 'Enter' && event.target.closest('button, a')) return undefined; // presses that button
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const act = /^[1-9]$/.test(key) ? () => answer(Number(key)) : KEYS[key];
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
  $('.conversation').dataset.cut = 'no';
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
stage.dataset.format = localStorage.getItem('prefloop-format') || 'raw';
document.addEventListener('keydown', press);
window.addEventListener('online', () => prefix && send());
$('.scale').addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  const n = [...button.parentElement.children].indexOf(button) + 1;
  if (event.detail) button.blur();
  answer(n);
});
click('.back', back);
click('.skip', KEYS.s);
click('.help-open', KEYS['?']);
click('.guidelines-open', KEYS.g);
click('.both-bad', bothAreBad);
click('.tied', tieNext);
click('.more-open', () => openMore());
click('.format', toggleFormat);
click('.marked', toggleMarked);
click('.theme', toggleTheme);
click('.skip-why .cancel', () => skipping.close());
skipping.addEventListener('close', () => {
  const [act, why] = skipping.returnValue.split(': ');
  if (act === 'skip') judge({ reason: why || skipping.querySelector('input').value.trim() });
});
reading.addEventListener('close', haveRead);
checked.addEventListener('close', () => { shownAt = performance.now(); });
element.querySelectorAll('dialog').forEach((dialog) => dialog.addEventListener('close', tell));
more.addEventListener('close', readMore);
more.querySelector('select').addEventListener('change', startEdit);
more.addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && event.ctrlKey) more.querySelector('[value="done"]').click();
});
start();
