/** Pulumi's two doors to the handlers, by name: for what drives the CLI and loads none of the provider itself. */
const doors = ["dynamic", "plugin"] as const;
export type Door = (typeof doors)[number];

/** Through which the lab's stacks go where a test does not say it: `LAB_DOOR=plugin npm test -- lab`. */
export const labDoor: Door = chosen(process.env.LAB_DOOR || "dynamic");

function chosen(name: string): Door {
  const door = doors.find((one) => one === name);
  if (door === undefined) throw new Error(`LAB_DOOR is "${name}"; there are ${doors.join(" and ")}`);
  return door;
}

/** The other door, where `LAB_DOOR` does not say which one. */
export function nextDoor(door: Door): Door {
  return process.env.LAB_DOOR ? labDoor : (doors.find((other) => other !== door) ?? door);
}

/** What is in the command line of a provider's process, and in no other's. */
export const providerProgram: Readonly<Record<Door, string>> = {
  dynamic: "dynamic-provider",
  plugin: "pulumi-resource-lvm-nbd",
};
