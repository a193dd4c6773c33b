// The parts of web_demo2.py in the browser. `data.part` names the part of a component:
// "copy" is a button that copies `data.text`; "keep" keeps the conversation `data.chat`; "list"
// does so, too, and lists all kept conversations; it sends the one that is picked or reloaded.
//
// A conversation is {id, rounds: [[question, answer, remark]], first_round, system, query}. It is
// kept in the browser's storage under its id; the tab's session storage has the current id.
const PREFIX = "chatglm2:";
const read = (id) => JSON.parse(localStorage.getItem(PREFIX + id));
const title = ({rounds, query}) => (rounds[0]?.[0] || query || "").trim().slice(0, 60);

function listKept() {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  return keys.map((key) => JSON.parse(localStorage.getItem(key))).sort((a, b) => b.time - a.time);
}

function keep(chat) {
  if (!chat.id) return;
  sessionStorage.setItem(PREFIX, chat.id);
  const {time, ...kept} = read(chat.id) || {};
  if (JSON.stringify(kept) === JSON.stringify(chat)) return;  // or its place in the list changed
  if (!chat.rounds.length && !chat.query) localStorage.removeItem(PREFIX + chat.id);
  else write(chat);
}

function write(chat) {
  for (;;) {
    try {
      return localStorage.setItem(PREFIX + chat.id, JSON.stringify({...chat, time: Date.now()}));
    } catch (error) {  // the storage is full: forget the oldest conversation
      const oldest = listKept().filter(({id}) => id !== chat.id).pop();
      if (!oldest) throw error;
      localStorage.removeItem(PREFIX + oldest.id);
    }
  }
}

function list({data: {chat}, parentElement, setTriggerValue}) {
  follow();
  document.addEventListener("keydown", pressEscape);
  const isNew = !chat.id;
  const current = isNew && read(sessionStorage.getItem(PREFIX));
  if (current) setTriggerValue("picked", current);
  keep(chat);
  const draw = () => parentElement.querySelector("ul").replaceChildren(...listKept().map((kept) => {
    const button = Object.assign(document.createElement("button"), {textContent: title(kept), title: title(kept)});
    if (kept.id === chat.id) button.setAttribute("aria-current", "true");
    button.onclick = () => setTriggerValue("picked", read(kept.id) || kept);
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
  button.onclick = async () => {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copySelected(text);
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1500);
  };
}

function copySelected(text) {  // on a page without TLS
  const area = Object.assign(document.createElement("textarea"), {value: text});
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
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
