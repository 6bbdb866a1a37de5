/** A plugin as a process of its own, which is asked as the engine asks it. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { createInterface } from "node:readline";
import * as grpc from "@grpc/grpc-js";
import type * as Proto from "../../provider/pulumi/proto.js";
import { pluginCommand } from "../support/pluginCommand.mts";

export const root = join(import.meta.dirname, "..", "..");
const { providerGrpc }: typeof Proto = createRequire(import.meta.url)(join(root, "dist/pulumi/proto.js"));

export async function firstLine(child: ChildProcess): Promise<string> {
  if (child.stdout === null) throw new Error("its output is not ours to read");
  for await (const line of createInterface({ input: child.stdout })) return line;
  throw new Error("it ended without a word");
}

type Answer<T> = (error: grpc.ServiceError | null, response: T) => void;

export function ask<T>(call: (answer: Answer<T>) => unknown): Promise<T> {
  return new Promise((resolve, reject) =>
    call((error, response) => (error ? reject(error) : resolve(response))),
  );
}

export interface PluginProcess {
  readonly pid: number;
  readonly client: Proto.providerGrpc.ResourceProviderClient;
  end(): Promise<void>;
}

interface PluginOptions {
  /** Default: ours. */
  readonly program?: string;
  /** Beside that of this process. */
  readonly environment?: NodeJS.ProcessEnv;
  /** A file for what it says there: where no engine listens, its warnings. Default: that of this process. */
  readonly stderr?: number;
}

/** Starts a plugin as the first line of ours says. */
export async function startPlugin({
  program = join(root, "dist/plugin.js"),
  environment = {},
  stderr,
}: PluginOptions = {}): Promise<PluginProcess> {
  const { file, args, env } = pluginCommand();
  const child = spawn(file, [...args.slice(0, -1), program], {
    stdio: ["pipe", "pipe", stderr ?? "inherit"],
    env: { ...env, ...environment },
  });
  const port = await firstLine(child);
  const client = new providerGrpc.ResourceProviderClient(
    `127.0.0.1:${port}`,
    grpc.credentials.createInsecure(),
  );
  const { pid } = child;
  if (pid === undefined) throw new Error("it did not start");
  return {
    pid,
    client,
    async end() {
      client.close();
      child.kill();
      await once(child, "exit");
    },
  };
}

/** Resident memory in MB (10^6 bytes): now, and at most so far. */
export function memory(pid: number): { now: number; most: number } {
  const status = readFileSync(`/proc/${pid}/status`, "utf8");
  const megabytes = (field: string) =>
    Math.round((Number(new RegExp(`^${field}:\\s*(\\d+) kB`, "m").exec(status)?.[1]) * 1024) / 1e6);
  return { now: megabytes("VmRSS"), most: megabytes("VmHWM") };
}
