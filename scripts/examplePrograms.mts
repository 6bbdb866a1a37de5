/** The programs of examples/yaml and examples/python. They are one, written out in each language. */
import { type Program, pythonProgram, Setting, yamlProgram, yamlSettings } from "./exampleCode.mts";
import { OutputOf } from "./provider.mts";

const name = "lvm-nbd";

const [source, client, backups] = ["source", "client", "backups"].map((setting) => new Setting(setting));
const [listenAddress, clientAddress] = ["listenAddress", "clientAddress"].map(
  (setting) => new Setting(setting),
);
const [volumeGroup, origin] = ["volumeGroup", "origin"].map((setting) => new Setting(setting));

/** A moment of a VM's disk on another server, and the VM's nightly backups. */
export const program: Program = {
  settings: {
    source: "SSH alias or address of the server that holds the VM's volume",
    client: "SSH alias or address of the server that is to read it",
    backups: "SSH alias or address of the server that keeps the backups",
    listenAddress: "Address of the source at which the other two reach it",
    clientAddress: "Address from which the client connects; nobody else may",
    volumeGroup: "Volume group of the VM's volume",
    origin: "The VM's logical volume",
  },
  resources: {
    vm1Snapshot: {
      type: "LvSnapshot",
      properties: { host: source, volumeGroup, origin, size: "20%ORIGIN" },
    },
    vm1Export: {
      type: "NbdExport",
      properties: {
        host: source,
        device: new OutputOf("vm1Snapshot", "path"),
        listenAddress,
        clients: [clientAddress],
      },
    },
    vm1Disk: { type: "NbdAttachment", properties: { host: client, uri: new OutputOf("vm1Export", "uri") } },
    vm1: {
      type: "VmBackup",
      properties: {
        host: backups,
        folder: "/var/backups",
        source: { host: source, listenAddress },
        volumes: [{ volumeGroup, origin, size: "20%ORIGIN" }],
        keep: { daily: 7, weekly: 4, monthly: 12 },
      },
    },
  },
  outputs: {
    device: new OutputOf("vm1Disk", "path"),
    takenAt: new OutputOf("vm1Snapshot", "createdAt"),
    backups: new OutputOf("vm1", "keys"),
  },
};

const head = (language: string, runtime: string, comment: readonly string[]) =>
  `${comment.map((line) => `# ${line}\n`).join("")}name: ${language}\nruntime:${runtime}\n` +
  `description: A moment of a VM's disk on another server, and its nightly backups, in ${language}\n`;

const setUp = [
  "npm install --global pulumi-lvm-nbd            # its plugin is on the PATH then",
  "pulumi stack init dev",
  "pulumi config set lvm-nbd:organization NAME    # with a backend of one's own: organization",
  "pulumi config set source server1               # and so on, for each setting below",
];

/** Texts by their paths. */
export const examplePrograms: Readonly<Record<string, string>> = {
  "examples/yaml/Pulumi.yaml": head("yaml", " yaml", [...setUp, "pulumi up"]) + yamlProgram(program, name),
  "examples/python/Pulumi.yaml":
    head("python", "\n  name: python\n  options:\n    toolchain: pip\n    virtualenv: venv", [
      ...setUp,
      'pulumi package gen-sdk "$(npm root -g)/pulumi-lvm-nbd/schema.json" --language python',
      "pulumi install && pulumi up",
    ]) + yamlSettings(program),
  "examples/python/requirements.txt": "pulumi>=3,<4\n./sdk/python\n",
  "examples/python/__main__.py": pythonProgram(program, name),
};
