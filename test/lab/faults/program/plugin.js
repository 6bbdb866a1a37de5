// The resources of the plugin, and its components, declared as by the SDK that Pulumi generates from the schema.
const pulumi = require("@pulumi/pulumi");
const { resources } = require("pulumi-lvm-nbd/schema.json");

function resourceClass(token, { inputProperties, properties, aliases }) {
  const secret = Object.keys(properties).filter((property) => properties[property].secret);
  const hidden = secret.filter((property) => property in inputProperties);
  return class extends pulumi.CustomResource {
    constructor(name, args, options) {
      const outputs = Object.fromEntries(Object.keys(properties).map((property) => [property, undefined]));
      const given = hidden.filter((property) => args[property] !== undefined);
      const secrets = Object.fromEntries(given.map((property) => [property, pulumi.secret(args[property])]));
      const own = { aliases, additionalSecretOutputs: secret };
      super(token, name, { ...outputs, ...args, ...secrets }, pulumi.mergeOptions(options, own));
    }
  };
}

function componentClass(token, { properties }) {
  return class extends pulumi.ComponentResource {
    constructor(name, args, options) {
      const outputs = Object.fromEntries(Object.keys(properties).map((property) => [property, undefined]));
      super(token, name, { ...outputs, ...args }, options, true);
    }
  };
}

for (const [token, resource] of Object.entries(resources)) {
  const declared = resource.isComponent ? componentClass : resourceClass;
  exports[token.split(":").at(-1)] = declared(token, resource);
}
