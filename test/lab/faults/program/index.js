// Declares what the configuration lists: `resources` is a list of { type, name, args, dependsOn?, options? }. A value
// { "$output": ["NAME", "PROPERTY"] } inside `args` is that output of a resource listed before, { "$env": "NAME" } what the
// environment has. A VmBackup is told what there is in its folder, and may be told what day it is. LAB_DOOR chooses the
// door: "plugin", or dynamic resources.
const pulumi = require("@pulumi/pulumi");
const { listImages, ...own } = require("pulumi-lvm-nbd");

const types = process.env.LAB_DOOR === "plugin" ? { ...own, ...require("./plugin.js") } : own;

const made = new Map();

function resolved(value) {
  if (Array.isArray(value)) return value.map(resolved);
  if (typeof value !== "object" || value === null) return value;
  if (value.$env !== undefined) return process.env[value.$env];
  if (value.$output !== undefined) {
    const [name, property] = value.$output;
    return made.get(name)[property];
  }
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolved(inner)]));
}

async function backupArgs({ now, ...args }) {
  const images = await listImages(args.host, args.folder);
  return { ...args, made: images, ...(now === undefined ? {} : { now: new Date(now) }) };
}

module.exports = async () => {
  for (const { type, name, args, dependsOn = [], options: more } of new pulumi.Config().requireObject(
    "resources",
  )) {
    const options = { ...more, dependsOn: dependsOn.map((other) => made.get(other)) };
    const known = resolved(args);
    made.set(name, new types[type](name, type === "VmBackup" ? await backupArgs(known) : known, options));
  }
};
