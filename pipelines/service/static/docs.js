"use strict";
// A small reader of openapi.json: the usual viewers load scripts from other hosts, and a cluster may reach none.
const make = (tag, text, ...children) => {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  element.append(...children);
  return element;
};
const row = (cell, texts) => make("tr", "", ...texts.map((text) => make(cell, text)));
const table = (head, rows) => make("table", "", make("thead", "", row("th", head)), make("tbody", "", ...rows.map((r) => row("td", r))));

function rule(schema) {
  const own = schema.anyOf ? schema.anyOf.find((kind) => kind.type !== "null") : schema;
  const parts = [own.contentMediaType || own.format === "binary" ? "file" : own.type];
  if (own.minimum !== undefined) parts.push(`>= ${own.minimum}`);
  if (own.exclusiveMinimum !== undefined) parts.push(`> ${own.exclusiveMinimum}`);
  if (own.maximum !== undefined) parts.push(`<= ${own.maximum}`);
  if (own.maxLength !== undefined) parts.push(`at most ${own.maxLength} characters`);
  return parts.join(", ");
}

function operation(method, path, about, schemas) {
  const section = make("section", "", make("h2", `${method.toUpperCase()} ${path}`), make("p", about.summary));
  const content = about.requestBody && about.requestBody.content["multipart/form-data"];
  if (content) {
    const form = schemas[content.schema.$ref.split("/").pop()];
    const required = form.required || [];
    const names = [...required, ...Object.keys(form.properties).filter((name) => !required.includes(name))];
    section.append(table(["field", "value", "default", "meaning"], names.map((name) => {
      const field = form.properties[name];
      const usual = required.includes(name) ? "(required)" : field.default == null ? "" : JSON.stringify(field.default);
      return [name, rule(field), usual, field.description || ""];
    })));
    const files = required.map((name) => `-F ${name}=@${name === "image" ? "photo.png" : "dog.wav"}`).join(" ");
    section.append(make("pre", `curl -H "X-API-Key: $AAI_API_KEY" ${files} -F seed=7 -o out.png ${new URL(path.slice(1), document.baseURI)}`));
  }
  section.append(table(["status", "answer"], Object.entries(about.responses).map(([code, r]) => [code, r.description])));
  return section;
}

fetch("openapi.json").then((response) => response.json()).then((api) => {
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      document.getElementById("paths").append(operation(method, path, about, api.components.schemas));
    }
  }
});
