// The filter: rows and figures of one data set or method; kept in the address, so that a filtered page can be linked to.
const form = document.querySelector(".filter");
const told = form.querySelector("output");

function filter() {
  const wanted = { data: form.elements.data.value, method: form.elements.method.value };
  for (const element of document.querySelectorAll("[data-data], [data-method]")) {
    const has = name => !wanted[name] || element.dataset[name] === undefined || element.dataset[name].split(" ").includes(wanted[name]);
    element.hidden = !(has("data") && has("method"));
  }
  const rows = [...document.querySelectorAll(".verdicts tbody tr")];
  const shown = rows.filter(row => !row.hidden).length;
  told.value = shown === rows.length ? "" : `${shown} of ${rows.length} verdicts`;
}

function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  for (const name of ["data", "method"]) {
    const options = [...form.elements[name].options].map(option => option.value);
    form.elements[name].value = options.includes(asked.get(name)) ? asked.get(name) : "";
  }
  filter();
}

form.addEventListener("change", () => {
  const chosen = new URLSearchParams([...new FormData(form)].filter(([, value]) => value));
  history.replaceState(null, "", "#" + chosen);
  filter();
});
form.addEventListener("submit", event => event.preventDefault());
form.hidden = false;
if (location.hash.includes("=")) fromAddress();
addEventListener("hashchange", () => location.hash.includes("=") && fromAddress());
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(d => d.open = true));
