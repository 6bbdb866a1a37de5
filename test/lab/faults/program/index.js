// Declares what the configuration lists: `resources` is a list of { type, name, args, dependsOn? }. A value
// { "$output": ["NAME", "PROPERTY"] } inside `args` is that output of a resource listed before.
const pulumi = require("@pulumi/pulumi");
const types = require("pulumi-lvm-nbd");

const made = new Map();

function resolved(value) {
  if (Array.isArray(value)) return value.map(resolved);
  if (typeof value !== "object" || value === null) return value;
  if (value.$output !== undefined) {
    const [name, property] = value.$output;
    return made.get(name)[property];
  }
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolved(inner)]));
}

for (const { type, name, args, dependsOn = [] } of new pulumi.Config().requireObject("resources")) {
  made.set(
    name,
    new types[type](name, resolved(args), { dependsOn: dependsOn.map((other) => made.get(other)) }),
  );
}
