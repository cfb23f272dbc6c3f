"use strict";
const rows = [...document.querySelectorAll(".row")];
const texts = new Map();
const search = document.querySelector("#search");
const count = document.querySelector("#count");
let wanted = "";
function show() {
  const words = search.value.trim().toLowerCase();
  let seen = 0;
  for (const row of rows) {
    if (words && !texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    const hit = (!wanted || row.dataset.is.split(" ").includes(wanted)) && (!words || texts.get(row).includes(words));
    row.hidden = !hit;
    seen += hit;
  }
  count.textContent = seen === rows.length ? "" : `${seen} of ${rows.length} shown`;
}
for (const button of document.querySelectorAll("[data-want]")) {
  button.addEventListener("click", () => {
    wanted = button.dataset.want;
    for (const other of document.querySelectorAll("[data-want]")) other.setAttribute("aria-pressed", other === button);
    show();
  });
}
search.addEventListener("input", show);
document.querySelector("#unfold").addEventListener("click", () => { for (const row of rows) row.open = true; });
document.querySelector("#fold").addEventListener("click", () => { for (const row of rows) row.open = false; });
function follow() {
  const row = document.getElementById(location.hash.slice(1));
  if (row && row.classList.contains("row")) row.open = true;
}
addEventListener("hashchange", follow);
follow();
