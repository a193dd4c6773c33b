// The parts of web_demo2.py in the browser. `data.part` names the part of a component:
// "copy" is a button that copies `data.text`; "keep" keeps the conversation `data.chat`; "list"
// does so, too, and lists all kept conversations; it sends the one that is picked or reloaded.
// browser.js comes before this.

function keep(chat) {
  if (!chat.id) return;
  sessionStorage.setItem(PREFIX, chat.id);
  const {time, ...kept} = readKept(chat.id) || {};
  if (JSON.stringify(kept) === JSON.stringify(chat)) return;  // or its place in the list changed
  if (!chat.rounds.length && !chat.query) localStorage.removeItem(PREFIX + chat.id);
  else writeKept(chat);
}

function list({data: {chat}, parentElement, setTriggerValue}) {
  follow();
  document.addEventListener("keydown", pressEscape);
  const isNew = !chat.id;
  const current = isNew && readKept(sessionStorage.getItem(PREFIX));
  if (current) setTriggerValue("picked", current);
  keep(chat);
  const draw = () => parentElement.querySelector("ul").replaceChildren(...listKept().map((kept) => {
    const button = Object.assign(document.createElement("button"), {textContent: nameKept(kept), title: nameKept(kept)});
    if (kept.id === chat.id) button.setAttribute("aria-current", "true");
    button.onclick = () => setTriggerValue("picked", readKept(kept.id) || kept);
    const item = document.createElement("li");
    item.append(button);
    return item;
  }));
  draw();
  window.addEventListener("storage", draw);  // another tab has changed it
  return () => window.removeEventListener("storage", draw);
}

function copy({data: {text}, parentElement}) {
  const button = parentElement.querySelector("button");
  button.onclick = () => copyText(text, button);
}

// Streamlit ignores the shortcut of a button while the reader types.
function pressEscape({key, target}) {
  if (key === "Escape" && target.matches("textarea")) document.querySelector(".st-key-escape button")?.click();
}

// Follow a growing answer until the reader scrolls up, and again from the bottom on.
function follow() {
  const main = document.querySelector("[data-testid=stMain]");
  if (main.following) return;
  main.following = true;
  let isOn = true, last = 0;
  main.addEventListener("scroll", () => {
    const rest = main.scrollHeight - main.clientHeight - main.scrollTop;
    isOn = rest < 4 || (isOn && main.scrollTop >= last);
    last = main.scrollTop;
  });
  new ResizeObserver(() => { if (isOn) main.scrollTop = main.scrollHeight; })
    .observe(main.querySelector("[data-testid=stMainBlockContainer]"));
}

const parts = {copy, list, keep: ({data}) => keep(data.chat)};
export default (component) => parts[component.data.part](component);
