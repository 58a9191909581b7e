"use strict";

const byId = (id) => document.getElementById(id);

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text; // text, never HTML
  if (className) made.className = className;
  return made;
}

function row(label, share, first) {
  const tr = element("tr", undefined, first ? "first" : "");
  const th = element("th", label);
  th.scope = "row";
  const cell = element("td");
  cell.setAttribute("aria-hidden", "true"); // the number beside it says the same
  const track = element("div", undefined, "track");
  const bar = element("div", undefined, "bar");
  bar.style.width = `${100 * share}%`;
  track.append(bar);
  cell.append(track);
  tr.append(th, cell, element("td", `${(100 * share).toFixed(1)} %`));
  return tr;
}

function table(face) {
  const made = element("table");
  made.append(element("caption", `Face ${face.track + 1}: ${face.label}, seen for ${face.seconds.toFixed(1)} s`));
  const body = element("tbody");
  const shares = Object.entries(face.probabilities).sort((a, b) => b[1] - a[1]);
  shares.forEach(([label, share], i) => body.append(row(label, share, i === 0)));
  made.append(body);
  return made;
}

async function ask(file) {
  const reply = await fetch("v1/predict", { method: "POST", body: file });
  const kind = reply.headers.get("content-type") || "";
  const answer = kind.startsWith("application/json") ? await reply.json() : null;
  if (reply.ok && answer) return answer;
  const error = answer && answer.error;
  if (error) throw new Error([error.cause, error.consequence, error.remedy].join(" "));
  throw new Error(reply.status === 503 ? "The server is busy. Try again in a few seconds."
    : `The server answered ${reply.status}.`);
}

async function send(event) {
  event.preventDefault();
  const file = byId("file").files[0];
  if (!file) return;
  byId("send").disabled = true;
  byId("faces").replaceChildren();
  byId("status").textContent = "Working ...";
  try {
    const answer = await ask(file);
    byId("faces").append(...answer.faces.map(table));
    const spent = Object.values(answer.seconds).reduce((a, b) => a + b, 0);
    const count = answer.faces.length;
    byId("status").textContent = `${count} ${count === 1 ? "face" : "faces"}, ${spent.toFixed(1)} s.`;
  } catch (error) {
    byId("status").textContent = error.message;
  } finally {
    byId("send").disabled = false;
  }
}

async function about() {
  const reply = await fetch("v1/health");
  if (!reply.ok) return;
  const health = await reply.json();
  byId("about").textContent = `Bundle ${health.bundle}, version ${health.version}. `
    + `Expressions: ${health.labels.join(", ")}. Files up to ${health.max_upload_mb} MiB.`;
}

byId("form").addEventListener("submit", send);
about().catch(() => { byId("about").textContent = "The server does not answer."; });
