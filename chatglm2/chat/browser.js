// What both pages do in the browser: keep conversations, and copy texts.
//
// A conversation is {id, rounds: [[question, answer, remark]], first_round, system, query}. The
// browser's storage has it under its id; the tab's session storage has the id of the current one.
const PREFIX = "chatglm2:";

const readKept = (id) => JSON.parse(localStorage.getItem(PREFIX + id));

const nameKept = ({rounds, query}) => (rounds[0]?.[0] || query || "").trim().slice(0, 60);

function listKept() {  // the newest first
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  return keys.map((key) => JSON.parse(localStorage.getItem(key))).sort((a, b) => b.time - a.time);
}

// Returns whether other conversations were forgotten because the storage was full.
function writeKept(chat) {
  for (let hasForgotten = false; ; hasForgotten = true) {
    try {
      localStorage.setItem(PREFIX + chat.id, JSON.stringify({...chat, time: Date.now()}));
      return hasForgotten;
    } catch (error) {
      const oldest = listKept().filter(({id}) => id !== chat.id).pop();
      if (!oldest) throw error;
      localStorage.removeItem(PREFIX + oldest.id);
    }
  }
}

async function copyText(text, button) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {  // a page without TLS
    const area = Object.assign(document.createElement("textarea"), {value: text});
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1500);
}
