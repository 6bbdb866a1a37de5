/** The proof that an export with TLS lets nobody in who has no certificate of its own authority: one tries. */
import { makeCertificates } from "../core/certificateAuthority.js";
import { failure } from "../core/command.js";
import { hostScript, script } from "../core/hostCommands.js";
import type { Context } from "../core/resource.js";
import { askedUri, type ExportPlan, exportCertificates, exportUnitName } from "../linux/exportUnit.js";
import {
  certificatesArguments,
  certificatesFolders,
  certificatesFunctions,
  certificatesInput,
  provenFile,
  type TlsRecord,
} from "../linux/tls.js";
import {
  changedMeanwhile,
  cutOffFunction,
  giveUpSeconds,
  provenOnly,
  unitFunctions,
} from "../linux/unitScript.js";
import type { RemoteCommand } from "../ssh/types.js";
import { stopIt } from "./clientsProof.js";
import { couldNotEnable, writtenMeanwhile } from "./unit.js";

/**
 * Arguments: unit, URI with the export's own certificates, their folder, what such folders begin with, the record, "enabled" or "", those of
 * `receive_certificates` for a client of another authority (stdin). What is not enabled was never proven. Exit code 72: somebody got in, and the export was stopped; 74: it could not be.
 */
const proveScript = hostScript(
  "prove-tls",
  "change",
  `${unitFunctions}${cutOffFunction}${certificatesFunctions}
unit=$1 uri=$2 folder=$3 folders=$4 plan=$5 enabled=$6; shift 6
file=/etc/systemd/system/$unit
watch "$file" "$plan"
work=$(mktemp -d /run/lvm-nbd-proof.XXXXXXXX) || exit 1
trap 'rm -rf "$work"' EXIT
if [ -n "$enabled" ]; then trap 'exit 1' HUP INT TERM; else trap 'give_up "$unit" "$file"' HUP INT TERM; fi
receive_certificates "$work/stranger" "$@" && mkdir "$work/none" && cp "$folder/ca-cert.pem" "$work/none" &&
  cp "$folder/ca-cert.pem" "$work/stranger" || exit 1
ask() { said=$(timeout 75 nbdinfo --size "$1" 2>&1); }
running() { systemctl show -p MainPID --value "$unit"; }
server=$(running) || exit 1
ask "$uri" || { printf '%s\\n' "$said" >&2; exit 1; }
refused() {
  ask "$1"
  case $? in
  0)
    # Another one may be meant to let it in.
    same "$file" || exit ${changedMeanwhile}
    code=72
    cut_off "$unit" || code=74
    # Last of all: where nobody listens any more, it kills the script.
    echo "$2 got in" >&2
    exit "$code";;
  1) ;;
  *) echo "whether $2 gets in cannot be told" >&2; exit 1;;
  esac
}
plain=\${uri%%\\?*}
refused "nbd\${plain#nbds}" "a client without TLS"
refused "$plain?tls-certificates=$work/none" "a client without a certificate"
refused "$plain?tls-certificates=$work/stranger" "a client with another authority's certificate"
# Who is not let in by a server that has ended proves nothing.
ask "$uri" && [ "$(running)" = "$server" ] || { echo "the server ended meanwhile: $said" >&2; exit 1; }
lock ${provenOnly}
same "$file" || exit ${changedMeanwhile}
umask 077
tidy_certificates "$folders" "$folder" && : >"$folder/${provenFile}" || exit ${provenOnly}
[ -n "$enabled" ] || systemctl enable --root=/ --quiet "$unit" || exit ${provenOnly}
`,
);

/**
 * Raises TLS_NOT_ENFORCED. Then lets the export start at boot, and removes the certificates of before. `caCertificate`: the export's
 * authority. `enabled`: it starts at boot already.
 */
export async function proveTls(
  context: Context,
  plan: ExportPlan & { readonly tls: TlsRecord },
  caCertificate: string,
  enabled: boolean,
): Promise<void> {
  const unit = exportUnitName(plan.exportName);
  // A client shows its certificate only to a server that asks for one of an authority of that name.
  const stranger = await makeCertificates("stranger", [], new Date(), caCertificate);
  const files = {
    "client-cert.pem": stranger.clientCertificate,
    "client-key.pem": stranger.clientPrivateKey,
  };
  context.progress(`seeing that nobody gets into ${plan.exportName} without its certificate`);
  const command: RemoteCommand = {
    argv: script(
      ...([
        proveScript,
        unit,
        askedUri(plan),
        exportCertificates(plan) ?? "",
        certificatesFolders(unit),
        ...[JSON.stringify(plan), enabled ? "enabled" : ""],
      ] as const),
      ...certificatesArguments(files),
    ),
    stdin: certificatesInput(files),
    kind: "change",
    // Five questions and the lock.
    deadlineSeconds: 560,
    graceSeconds: giveUpSeconds,
  };
  const result = await context.host.run(command, context.signal);
  if (result.exitCode === 0) return;
  if (result.exitCode === changedMeanwhile) throw writtenMeanwhile(context, command, result);
  if (result.exitCode === provenOnly) throw couldNotEnable(context, command, result);
  const isOpen = result.exitCode === 72 || result.exitCode === 74;
  const [still, advice] = result.exitCode === 74 ? ["; the export could NOT be stopped", stopIt] : [""];
  const what = isOpen
    ? `tls: ${plan.server} lets clients in without TLS or without a certificate of the export's authority${still}`
    : "whether the export lets in clients without its certificate could not be found out";
  throw failure(context, command, result, what, isOpen ? "TLS_NOT_ENFORCED" : "COMMAND_FAILED", advice);
}
