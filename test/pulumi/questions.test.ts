/** Questions of a program, in a process of its own: what is configured reaches them, and they do not keep it from ending. */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { type FakeServer, startFakeServer, takesPassword } from "../ssh/fakeServer.js";
import { recordedLvs } from "../support/recorded.js";

const password = "planted-password";
let server: FakeServer;

beforeAll(async () => {
  server = await startFakeServer({
    authenticate: takesPassword(password),
    run: ({ line, started, exit }) => {
      started();
      if (line.includes("lvs")) exit(0, recordedLvs("valid"));
      else exit(0, "end\n");
    },
  });
});
afterAll(() => server.close());

/** What a program says that asks this, by the built package, with these hosts in its stack's configuration. */
async function run(question: string, hosts: object) {
  const program = `require("pulumi-lvm-nbd").${question}.then(
    (told) => console.log(JSON.stringify(told)), (error) => console.log("failed: " + error.message));`;
  const child = spawn(process.execPath, ["-e", program], {
    stdio: ["ignore", "pipe", "pipe"],
    env: {
      ...process.env,
      PULUMI_CONFIG: JSON.stringify({ "lvm-nbd:hosts": JSON.stringify(hosts) }),
      PULUMI_CONFIG_SECRET_KEYS: '["lvm-nbd:hosts"]',
    },
  });
  let said = "";
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (data) => (said += data));
  const deadline = setTimeout(() => child.kill("SIGKILL"), 25_000);
  const [code] = await once(child, "close");
  clearTimeout(deadline);
  expect(code).toBe(0);
  expect(said).not.toContain(password);
  return said;
}

const server1 = () => ({
  ...{ address: "127.0.0.1", port: server.port, password, hostKey: server.publicKey, sudo: false },
});

describe("a program", () => {
  it("asks for the volumes of a configured host, and ends", async () => {
    const said = await run('getVolumes({ host: "server1", volumeGroup: "VgVm" })', { server1: server1() });
    const { volumes } = JSON.parse(said) as { volumes: { name: string }[] };
    expect(volumes.map(({ name }) => name)).toEqual(["vm1", "vm1-snap"]);
  });

  it("asks for the images of a configured host", async () => {
    expect(await run('listImages("server1", "/backup")', { server1: server1() })).toBe("[]\n");
  });

  it("is told of what it asks wrongly, and of what is configured wrongly", async () => {
    expect(await run('getVolumes({ host: "server1", group: "VgVm" })', { server1: server1() })).toMatch(
      /^failed: INVALID_INPUT: getVolumes: group: is no property of this function/,
    );
    expect(await run('getHost({ host: "server1" })', { server1: { ...server1(), port: "22" } })).toMatch(
      /^failed: INVALID_INPUT: lvm-nbd:hosts\.server1\.port: /,
    );
  });

  it("is told of a host that cannot be read, and ends", async () => {
    expect(await run('getHost({ host: "server1" })', { server1: server1() })).toMatch(
      /^failed: OUTPUT_UNREADABLE: getHost on host server1/,
    );
  });
});
