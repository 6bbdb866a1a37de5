/** How an attachment is looked at. */
import { hostScript } from "../core/hostCommands.js";
import { emitFunctions } from "../linux/fields.js";
import { certificatesFunctions } from "../linux/tls.js";
import { unitFunctions } from "../linux/unitScript.js";

/**
 * Shell function, beside `emitFunctions`, `unitFunctions` and `certificatesFunctions`. `look_at_attachment UNIT PATH [for-removal]`
 * prints its fields. `show_at_first UNIT`: what systemd shows of it; another one may be put in its place that knows that already.
 */
export const lookAtAttachmentFunction = `
show_attachment() { systemctl show -p LoadState -p ActiveState -p NeedDaemonReload -p DropInPaths -p MainPID "$1"; }
show_at_first() { show_attachment "$1"; }
look_at_attachment() {
  unit=$1 path=$2 purpose=\${3-} file=/etc/systemd/system/$1
  cd /etc/systemd/system || exit 1
  if [ -e "$file" ] || [ -L "$file" ]; then emit_file unit "$file"; fi
  if [ -L "$file" ]; then emit linked yes; fi
  show=$(show_at_first "$unit") || exit 1
  # A link that has just died is being made again: give it a moment before it counts as detached.
  until=$(( $(date +%s) + 4 ))
  while case $show in *ActiveState=activating*) [ "$(date +%s)" -lt "$until" ];; *) false;; esac; do
    sleep 0.2
    show=$(show_attachment "$unit") || exit 1
  done
  link=$(readlink "$path")
  device=
  if [ -e "$file" ]; then device=$(own Device "$file"); fi
  [ -n "$device" ] || device=$link
  if [ -e "$file" ]; then
    tell_boots "$unit" "$file"
    folder=$(own Certificates "$file")
    if [ -n "$folder" ] && same_certificates "$folder" "$(own CertificatesDigest "$file")"; then
      emit_file ca "$folder/ca-cert.pem"
      emit_file certificate "$folder/client-cert.pem"
      emit now "$(date +%s)"
    fi
  fi
  emit link "$link"
  emit device "$device"
  # The path may be of whoever runs this as sudo lets him: what his link leads to is not opened, unless it is such a device.
  number=\${device#/dev/nbd} sys=
  case $number in "$device"|''|*[!0-9]*) ;; *) sys=/sys/block/nbd$number;; esac
  if [ -n "$sys" ] && [ -d "$sys" ]; then
    emit size "$(cat "$sys/size")"
    emit ro "$(cat "$sys/ro")"
    if [ -e "$sys/pid" ]; then
      pid=$(cat "$sys/pid")
      emit pid "$pid"
      # The link may have been made anew since systemd was asked: it is not another one's for that.
      case "$show
" in *"MainPID=$pid
"*) ;; *) show=$(show_attachment "$unit") || exit 1;; esac
    fi
    if [ -z "$purpose" ] && [ "$(cat "$sys/size")" != 0 ]; then
      emit_output read timeout 10 dd if="$device" of=/dev/null bs=4096 count=1 iflag=direct
    fi
  fi
  emit show "$show"
  outdated "$show"
}
`;

/** Arguments: those of `look_at_attachment`. */
export const observeAttachmentScript = hostScript(
  "observe-attachment",
  "observe",
  `${emitFunctions}${unitFunctions}${certificatesFunctions}${lookAtAttachmentFunction}
look_at_attachment "$@"
emit end ""
`,
  ["unit", "path", "many:word"],
);
