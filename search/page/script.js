"use strict";
const by = (id) => document.getElementById(id);
const form = by("ask"), text = by("text"), file = by("file"), shown = by("shown"), status = by("status");
let latest = 0, blob = null;

function element(tag, className, content) {
  const made = document.createElement(tag);
  made.className = className;
  if (content !== undefined) made.textContent = content;
  return made;
}
const cosineOf = (value) => value.toFixed(3).replace("-", "−");

function card(image) {
  const item = document.createElement("li"), button = element("button", ""), picture = document.createElement("img");
  const caption = image.captions.join(" · ");
  button.type = "button";
  picture.src = "/thumbnail/" + image.id;
  picture.alt = caption || image.name;
  button.title = "Find images like this: " + image.name;
  button.append(picture);
  if (image.cosine !== undefined) button.append(element("span", "cosine", cosineOf(image.cosine)));
  else button.append(element("span", "cosine", ""));
  if (caption) button.append(element("span", "caption", caption));
  button.append(element("span", "name", image.name));
  button.addEventListener("click", () => go({image: image.id, name: image.name}));
  item.append(button);
  return item;
}

function captionLine(caption) {
  const item = document.createElement("li"), button = element("button", ""), line = element("span", "line");
  const track = element("span", "track"), bar = document.createElement("i");
  button.type = "button";
  button.title = "Search with this caption";
  bar.style.width = 100 * Math.min(1, Math.max(0, caption.cosine)) + "%";
  track.append(bar);
  line.append(element("span", "words", caption.text), element("span", "cosine", cosineOf(caption.cosine)));
  button.append(line, track);
  button.addEventListener("click", () => go({text: caption.text}));
  item.append(button);
  return item;
}

async function answer(response) {
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

// Only the answer to the latest question is shown, whichever comes last.
async function search(ask, question, picture) {
  const number = ++latest;
  by("start").hidden = true;
  by("asked").hidden = false;
  by("question").textContent = question;
  shown.hidden = !picture;
  if (picture) shown.src = picture;
  status.className = "";
  status.textContent = "Searching …";
  by("results").classList.add("busy");
  try {
    const found = await answer(await ask());
    if (number !== latest) return;
    by("images").replaceChildren(...found.images.map(card));
    by("captions").replaceChildren(...found.captions.map(captionLine));
    by("of-captions").hidden = !found.captions.length;
    by("results").classList.toggle("alone", !found.captions.length);
    by("results").hidden = false;
    status.textContent = `The numbers are cosines. Found in ${Math.round(1000 * found.seconds)} ms.`;
  } catch (error) {
    if (number !== latest) return;
    by("results").hidden = shown.hidden = true;
    status.className = "wrong";
    status.textContent = error instanceof TypeError ? "explore.py has ended: start it again." : error.message;
  }
  by("results").classList.remove("busy");
}

function show(question) {
  if (question?.text) {
    text.value = question.text;
    search(() => fetch("/search?" + new URLSearchParams({text: question.text})), question.text, null);
  } else if (question?.image) {
    text.value = "";
    search(() => fetch("/search?" + new URLSearchParams({image: question.image})), "Like " + (question.name ?? "this"),
      "/thumbnail/" + question.image);
  } else {
    latest++;
    text.value = status.textContent = "";
    by("asked").hidden = by("results").hidden = true;
    by("start").hidden = false;
  }
}
function go(question) {
  history.pushState(null, "", "#" + new URLSearchParams(question));
  show(question);
  // What was pressed among the results goes with them: the keyboard goes on above the new ones.
  if (document.activeElement.closest("main")) by("question").focus({preventScroll: true});
  scrollTo(0, 0);
}
function searchFile(chosen) {
  if (!chosen) return;
  if (blob) URL.revokeObjectURL(blob);
  blob = URL.createObjectURL(chosen);
  text.value = "";
  if (location.hash) history.pushState(null, "", location.pathname);
  search(() => fetch("/search", {method: "POST", body: chosen}), "Like " + (chosen.name || "the pasted image"), blob);
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (text.value.trim()) go({text: text.value});
  else text.focus();
});
file.addEventListener("change", () => { searchFile(file.files[0]); file.value = ""; });
addEventListener("popstate", () => show(Object.fromEntries(new URLSearchParams(location.hash.slice(1)))));
addEventListener("paste", (event) => {
  const image = [...event.clipboardData.files][0];
  if (image) { event.preventDefault(); searchFile(image); }
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dragging"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  searchFile(event.dataTransfer.files[0]);
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== text) { event.preventDefault(); text.focus(); }
});

fetch("/about").then(answer).then((about) => {
  by("about").textContent = `${about.count} in ${about.pictures} · ${about.checkpoint} · ${about.text_tower}`;
  by("examples").replaceChildren(...about.examples.map(card));
  by("left").hidden = !about.left.length;
  by("left").querySelector("ul").replaceChildren(...about.left.map((line) => element("li", "", line)));
  show(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
}).catch((error) => { status.className = "wrong"; status.textContent = error.message; });
