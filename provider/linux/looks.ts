/** Short looks at a host that several resources take. */
import { hostProgram, hostScript } from "../core/hostCommands.js";

/** Seconds since 1970 by the host's clock, which also dates its snapshots. */
export const clockCommand = hostProgram("clock", "observe", ["date", "+%s"], []);

/** Whether there is a volume group. One more argument: its name. */
export const groupCommand = hostProgram(
  "volume-group",
  "observe",
  ["vgs", "--noheadings", "-o", "vg_name"],
  ["name"],
);

/** By which way, and from which address, an address is reached. One more argument: the address. ip-route(8). */
export const routeCommand = hostProgram("route", "observe", ["ip", "-o", "route", "get"], ["address"]);

/** The connections of clients. One more argument: ss(8)'s filter. */
export const connectionsCommand = hostProgram(
  "connections",
  "observe",
  ["ss", "-Htn", "state", "established"],
  ["filter"],
);

/** A host's name and its machine-id(5), a line each. */
export const identityScript = hostScript(
  "identity",
  "observe",
  "uname -n; cat /etc/machine-id 2>/dev/null || :",
  [],
);
