/** How an export is looked at. */
import { hostScript } from "../core/hostCommands.js";
import { emitFunctions, vanished } from "../linux/fields.js";
import { imageGuardFunctions, lookAtImageFunction } from "../linux/imageFile.js";
import { certificatesFunctions, provenFile } from "../linux/tls.js";
import { unitFunctions } from "../linux/unitScript.js";
import { clientsLookFunctions, clientsProof } from "./clientsProof.js";

/** Shell functions, beside `emitFunctions` and `unitFunctions`. `look_at_export UNIT CONFIG [for-removal]` prints its fields. */
export const lookAtExportFunctions = `${imageGuardFunctions}${lookAtImageFunction}${certificatesFunctions}${clientsLookFunctions}
look_at_export() {
  unit=$1 conf=$2 purpose=\${3-} file=/etc/systemd/system/$1
  cd /etc/systemd/system || exit 1
  if [ -e "$file" ] || [ -L "$file" ]; then emit_file unit "$file"; fi
  if [ -L "$file" ]; then emit linked yes; fi
  if [ -e "$conf" ]; then emit_file conf "$conf"; fi
  show_with_slices "$unit" -p LoadState -p ActiveState -p NeedDaemonReload -p DropInPaths || exit 1
  emit show "$shown"
  outdated "$shown"
  if [ -e "$file" ]; then
    if [ -e ${clientsProof} ]; then emit hostProven yes; fi
    if clients_proven; then
      clients_allowed "$file"
      case $? in
      0) emit clientsProven yes;;
      1) ;;
      *) [ -e "$file" ] || exit ${vanished}; echo "$why" >&2; exit 1;;
      esac
    fi
    # Enabling makes several links, and may have been cut between them.
    tell_boots "$unit" "$file"
    device=$(own Device "$file")
    uri=$(own ProbeUri "$file")
    folder=$(own Certificates "$file")
    if [ -n "$folder" ] && same_certificates "$folder" "$(own CertificatesDigest "$file")"; then
      emit_file ca "$folder/ca-cert.pem"
      emit_file serverCert "$folder/server-cert.pem"
      emit_file clientCert "$folder/client-cert.pem"
      emit_file clientKey "$folder/client-key.pem"
      if [ -e "$folder/${provenFile}" ]; then emit proven yes; fi
      emit now "$(date +%s)"
    fi
    if [ -b "$device" ]; then emit deviceSize "$(blockdev --getsize64 "$device")"; fi
    image=$(own File "$file")
    if [ -n "$image" ]; then
      look_at_image "$image" "$(own Format "$file")"
      # Not what was shown before: a server that was started anew meanwhile has another one.
      pid=$(systemctl show -p MainPID --value "$unit")
      [ "$pid" = 0 ] || [ "/proc/$pid/root$(own RealPath "$file")" -ef "$image" ] || emit replaced yes
    fi
    case $purpose:$shown in :*ActiveState=active*)
      command -v nbdinfo >/dev/null || { echo "nbdinfo: not found" >&2; exit 127; }
      emit_output size timeout 15 nbdinfo --size "$uri"
      # A server that does not answer is asked once: each question waits as long.
      if [ "$emit_rc" = 0 ]; then
        emit_output readOnly timeout 15 nbdinfo --is read-only "$uri"
        emit bytes "$(timeout 15 nbdcopy --requests=1 --connections=1 "$uri" - 2>/dev/null | head -c 512 | wc -c)"
      fi;;
    esac
  fi
}
`;

/** Arguments: those of `look_at_export`. */
export const observeExportScript = hostScript(
  "observe-export",
  "observe",
  `${emitFunctions}${unitFunctions}${lookAtExportFunctions}
look_at_export "$@"
emit end ""
`,
  ["unit", "record", "many:word"],
);
