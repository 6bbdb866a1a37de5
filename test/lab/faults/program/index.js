// Declares what the configuration lists: `resources` is a list of { type, name, args, dependsOn?, options? }. A value
// { "$output": ["NAME", "PROPERTY"] } inside `args` is that output of a resource listed before, { "$env": "NAME" } what the
// environment has. A VmBackup may be told what day it is; that of this language is told what there is in its folder. LAB_DOOR
// chooses the door: "plugin", or dynamic resources.
const pulumi = require("@pulumi/pulumi");
const { listImages, ...own } = require("pulumi-lvm-nbd");

const isPlugin = process.env.LAB_DOOR === "plugin";
const types = isPlugin ? require("./plugin.js") : own;

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
    const given = type === "VmBackup" && !isPlugin ? await backupArgs(known) : known;
    made.set(name, new types[type](name, given, options));
  }
};
