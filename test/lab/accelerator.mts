import { spawn } from "node:child_process";
import { readFile, writeFile } from "node:fs/promises";
import { cpus } from "node:os";
import { join } from "node:path";
import { runChild } from "./child.mts";
import type { GuestImage } from "./image.mts";

/** How QEMU runs guest code here. */
export interface Accelerator {
  name: "kvm" | "tcg";
  /** QEMU options that choose the accelerator and the processor. */
  args: readonly string[];
  /** What a saved machine state depends on: it may be loaded only where this is the same. */
  key: string;
}

const KVM_ARGS = ["-accel", "kvm", "-cpu", "host"];
// The plainest processor is the quickest one to translate: a tenth less than "max" on the lab's mix of commands.
const TCG_ARGS = ["-accel", "tcg,thread=multi", "-cpu", "qemu64"];
const KVM_PROBE_LIMIT_MS = 8_000;

/** KVM if a kernel really boots under it, else QEMU's own translation. */
export async function chooseAccelerator(
  image: GuestImage,
  log: (line: string) => void,
): Promise<Accelerator> {
  const { stdout } = await runChild(["qemu-system-x86_64", "--version"]);
  const version = stdout.split("\n")[0] ?? "";
  if (await kvmWorks(image, log)) {
    return { name: "kvm", args: KVM_ARGS, key: [...KVM_ARGS, cpus()[0]?.model, version].join(" ") };
  }
  return { name: "tcg", args: TCG_ARGS, key: [...TCG_ARGS, version].join(" ") };
}

/** The answer holds until this machine boots again: a broken KVM takes the whole time limit to tell. */
async function kvmWorks(image: GuestImage, log: (line: string) => void): Promise<boolean> {
  const boot = (await readFile("/proc/sys/kernel/random/boot_id", "utf8")).trim();
  const record = join(image.directory, "kvm");
  const [recordedBoot, verdict] = (await readFile(record, "utf8").catch(() => "")).split(" ");
  if (recordedBoot === boot) return verdict === "works";
  const works = await kvmBootsKernel(image);
  log(works ? "lab: KVM works here" : "lab: no working KVM here, QEMU translates (slower)");
  await writeFile(record, `${boot} ${works ? "works" : "broken"}`);
  return works;
}

/**
 * Boots the guest's kernel under KVM until it says so. Less does not prove it: /dev/kvm may open, the firmware
 * may run, and the processor then never get out of the kernel's first pages.
 */
async function kvmBootsKernel(image: GuestImage): Promise<boolean> {
  const child = spawn(
    "qemu-system-x86_64",
    [...KVM_ARGS, "-m", "256", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"].concat(
      "-kernel",
      image.kernel,
      "-append",
      "console=ttyS0 earlyprintk=ttyS0 panic=-1",
    ),
    { stdio: ["ignore", "pipe", "ignore"] },
  );
  const timer = setTimeout(() => child.kill("SIGKILL"), KVM_PROBE_LIMIT_MS);
  let output = "";
  try {
    return await new Promise<boolean>((resolve) => {
      child.on("error", () => resolve(false));
      child.on("close", () => resolve(false));
      child.stdout.on("data", (chunk: Buffer) => {
        output += chunk.toString("latin1");
        if (output.includes("Linux version")) resolve(true);
      });
    });
  } finally {
    clearTimeout(timer);
    child.kill("SIGKILL");
  }
}
