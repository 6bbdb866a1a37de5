/**
 * `npm run bench -- tls`: what TLS costs a copy. Each server of NBD exports the same volume of server1, without and with `tls`, by `pulumi up`;
 * server2 reads it whole by `nbdcopy URI null:`, in turns. Prints medians, and writes them to results/tls.json.
 */
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { z } from "zod";
import type { NbdServer } from "../../provider/linux/nbd.js";
import { FaultStack, nbdExport } from "../lab/faults/fault-stack.mts";
import { type Guest, type Lab, labUp } from "../lab/lab.mts";
import { median, rounded, say } from "./figures.mts";

const nbdServers: readonly NbdServer[] = ["nbdkit", "qemu-nbd", "nbd-server"];
const sizeMiB = 256;
const pairs = 3;
const firstPort = 10_809;

/** In `stack export --show-secrets`: a secret holds its value as JSON text. */
const secret = z.object({ plaintext: z.string().transform((text): unknown => JSON.parse(text)) });
const clientTls = z.object({ caCertificate: z.string(), certificate: z.string(), privateKey: z.string() });
const exported = z.object({
  deployment: z.object({
    resources: z.array(
      z.object({
        urn: z.string(),
        outputs: z.object({ uri: z.string(), clientTls: secret.optional() }).partial().optional(),
      }),
    ),
  }),
});

/** The URI of each export as server2 reads it, by its name; certificates are put there. */
async function urisOn(client: Guest, stack: FaultStack): Promise<ReadonlyMap<string, string>> {
  const { stdout } = await stack.cli.run(["stack", "export", "--show-secrets", "--stack", stack.cli.name]);
  const uris = new Map<string, string>();
  for (const { urn, outputs } of exported.parse(JSON.parse(stdout)).deployment.resources) {
    const name = urn.split("::").at(-1) ?? "";
    if (outputs?.uri === undefined) continue;
    if (outputs.clientTls === undefined) {
      uris.set(name, outputs.uri);
      continue;
    }
    const { caCertificate, certificate, privateKey } = clientTls.parse(outputs.clientTls.plaintext);
    const folder = `/run/bench/${name}`;
    const files = {
      "ca-cert.pem": caCertificate,
      "client-cert.pem": certificate,
      "client-key.pem": privateKey,
    };
    for (const [file, stdin] of Object.entries(files))
      await client.run(`umask 077; mkdir -p ${folder}; cat >${folder}/${file}`, { stdin });
    uris.set(name, `${outputs.uri}?tls-certificates=${folder}`);
  }
  return uris;
}

/** Seconds that a copy takes, by the client's clock. */
async function copySeconds(client: Guest, uri: string): Promise<number> {
  const { stdout } = await client.run(
    `start=$(date +%s%N); nbdcopy '${uri}' null: && echo $(( $(date +%s%N) - start ))`,
    { timeoutSeconds: 300 },
  );
  return Number(stdout) / 1e9;
}

async function measure(lab: Lab, stack: FaultStack): Promise<object> {
  const { server1, server2 } = lab;
  await server1.run(`lvcreate -qq -y -W n -L ${sizeMiB}M -n vm1 VgVm`);
  await server1.run(`dd if=/dev/urandom of=/dev/VgVm/vm1 bs=1M count=${sizeMiB} oflag=direct status=none`);
  const names = nbdServers.flatMap((server) => [
    { server, name: server, tls: false },
    { server, name: `${server}-tls`, tls: true },
  ]);
  stack.declare(
    ...names.map(({ name, server, tls }, index) =>
      nbdExport(name, {
        ...{ exportName: name, device: "/dev/VgVm/vm1", port: firstPort + index, server, tls },
        clients: [server2.privateAddress],
      }),
    ),
  );
  (await stack.up()).succeeded();
  const uris = await urisOn(server2, stack);
  const copied = (name: string) => copySeconds(server2, uris.get(name) ?? "");

  const servers: Record<string, object> = {};
  for (const server of nbdServers) {
    const seconds: { plain: number[]; tls: number[] } = { plain: [], tls: [] };
    for (let pair = 0; pair < pairs; pair++) {
      seconds.plain.push(await copied(server));
      seconds.tls.push(await copied(`${server}-tls`));
    }
    const [plain, tls] = [median(seconds.plain), median(seconds.tls)];
    const ratio = tls / plain;
    servers[server] = {
      seconds,
      plainMiBPerSecond: rounded(sizeMiB / plain),
      tlsMiBPerSecond: rounded(sizeMiB / tls),
      ratio: rounded(ratio),
    };
    say(
      `${server.padEnd(10)} without TLS ${(sizeMiB / plain).toFixed(1)} MiB/s, with TLS ${(sizeMiB / tls).toFixed(1)} MiB/s: ${ratio.toFixed(2)} times as long`,
    );
  }
  (await stack.destroy()).succeeded();

  const { stdout } = await server2.run(
    "grep -m1 -w -o aes /proc/cpuinfo; nproc; uname -r; sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1",
  );
  const hasAes = stdout.startsWith("aes\n");
  const [processors = "", kernel = "", processor = ""] = stdout.replace(/^aes\n/, "").split("\n");
  return { sizeMiB, pairs, guest: { processor, processors: Number(processors), hasAes, kernel }, servers };
}

const lab = await labUp({ name: `bench-${process.pid}`, log: say });
try {
  const stack = await FaultStack.create(lab);
  try {
    const results = await measure(lab, stack);
    const file = join(import.meta.dirname, "results", "tls.json");
    writeFileSync(file, `${JSON.stringify(results, null, 2)}\n`);
    say(`written to ${file}`);
  } finally {
    stack.close();
  }
} finally {
  await lab.down();
}
