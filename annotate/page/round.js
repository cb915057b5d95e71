// Renews the page in place: what is scrolled, opened or focused stays so, and a selection is never taken away.

const EVERY = 10_000; // ms

async function renew() {
  if (document.hidden || !getSelection().isCollapsed) return;
  const answer = await fetch(location.pathname).catch(() => null);
  if (!answer || !answer.ok || answer.redirected) {
    document.querySelector('#fresh').textContent = 'no answer from the server: these numbers are old';
    return;
  }
  const old = document.querySelector('#live');
  const live = new DOMParser().parseFromString(await answer.text(), 'text/html').querySelector('#live');
  const [focused, open, table] = [document.activeElement.id, old.querySelector('details[open]'), old.querySelector('#table')];
  const left = table ? table.scrollLeft : 0;
  old.replaceWith(live);
  if (open) live.querySelector('#columns').open = true;
  if (live.querySelector('#table')) live.querySelector('#table').scrollLeft = left;
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

document.addEventListener('submit', (event) => {
  const closing = event.submitter?.value === 'closed';
  if (closing && !confirm('Close the round? Whoever is labelling is told so, and what they still send will not count.')) event.preventDefault();
});
setInterval(renew, EVERY);
document.addEventListener('visibilitychange', renew);
