/**
 * Stand-ins of LVM's programs for `CopyHost`: one volume group, `VgVm`, whose volumes are folders below `lvm/` and whose
 * devices are files below `dev/`. They take what the scripts of a copied volume ask of them, in LVM's words, and nothing else.
 */

/** Bytes of an extent of the group. */
export const extentBytes = 4096;

const functions = `
  cd "$SANDBOX/lvm" || exit 4
  fail() { echo "  $1" >&2; exit 5; }
  group() { [ "\${1%%/*}" = VgVm ] && [ ! -e "$SANDBOX/group-gone" ] || { echo "  Volume group \\"\${1%%/*}\\" not found" >&2; exit 5; }; }
  extents_free() { free=$(cat "$SANDBOX/extents"); for one in */extents; do [ -e "$one" ] && free=$((free - $(cat "$one"))); done; echo $free; }
  tags() { paste -sd, "$1/tags" 2>/dev/null; }
  no_origin() { [ -z "$(grep -lxF -- "$(cat "$1/uuid")" */origin 2>/dev/null)" ]; }
  selected() { case $1 in *' && '*) selected "\${1%% && *}" "$2" && selected "\${1#* && }" "$2"; return;; esac
    case $1 in '!(lv_role={"origin"})') no_origin "$2";; 'lv_attr=~"^s"') [ -e "$2/origin" ];; 'lv_attr=~"^.[rR]"') [ -e "$2/ro" ];; lv_uuid=*) value=\${1#lv_uuid=}; [ "\\"$(cat "$2/uuid")\\"" = "$value" ];; lv_name=*) [ "\\"$2\\"" = "\${1#lv_name=}" ];;
    origin_uuid=*) [ "\\"$(cat "$2/origin" 2>/dev/null)\\"" = "\${1#origin_uuid=}" ];; *) fail "selection $1";; esac; }`;

const row = (open: string) => `
  printf '%s{"lv_uuid":"%s","vg_name":"VgVm","lv_name":"%s","lv_path":"/dev/VgVm/%s","lv_dm_path":"",' "$comma" "$(cat $lv/uuid)" $lv $lv
  origin=$(cat $lv/origin 2>/dev/null); attr=-wi-a-----; [ -z "$origin" ] || attr=swi-a-s---
  [ ! -e $lv/ro ] || attr=-ri-a-----
  printf '"origin":"","origin_uuid":"%s","lv_size":"%s","origin_size":"","lv_attr":"%s","lv_active":"active","lv_device_open":"%s",' \\
    "$origin" $(( $(cat $lv/extents) * ${extentBytes} )) $attr "${open}"
  printf '"lv_snapshot_invalid":"","lv_merge_failed":"","lv_merging":"0","snap_percent":"","data_percent":"","metadata_percent":"",'
  printf '"pool_lv":"","lv_health_status":"","lv_when_full":"","lv_role":"public","lv_permissions":"writeable","lv_skip_activation":"",'
  printf '"lv_tags":"%s","lv_time":"1790000000","vg_extent_size":"${extentBytes}","vg_free":"%s"}' "$(tags $lv)" $(( $(extents_free) * ${extentBytes} ))`;

export const lvmStandIns: Readonly<Record<string, string>> = {
  vgs: `${functions}
    for last; do :; done
    group "$last"
    case " $* " in *" vg_free,vg_extent_size "*) echo "  $(( $(extents_free) * ${extentBytes} )) ${extentBytes}";; *) echo "  VgVm";; esac`,
  lvs: `${functions}
    case " $* " in *" --reportformat "*)
      printf '{"report":[{"lv":['; comma=
      [ -e "$SANDBOX/group-gone" ] || for lv in *; do
        [ -e "$lv/uuid" ] || continue
        open=; [ ! -e $lv/open ] || open=open
        ${row("$open")}
        comma=,
      done
      echo ']}]}'; exit;;
    esac
    selection= fields= between=' '
    while [ $# -gt 1 ]; do case $1 in --separator) between=$2; shift 2;; -S) selection=$2; shift 2;; -o) fields=$2; shift 2;; *) shift;; esac; done
    group "$1"
    for lv in *; do
      [ -e "$lv/uuid" ] && selected "$selection" "$lv" || continue
      line=
      for field in $(echo $fields | tr , ' '); do
        case $field in lv_uuid) value=$(cat $lv/uuid);; lv_name) value=$lv;; lv_tags) value=$(tags $lv);;
          lv_attr) if [ -e $lv/merging ]; then value=Owi-a-s---; elif [ -e $lv/origin ]; then value=swi-a-s---; elif [ -e $lv/ro ]; then value=-ri-a-----; else value=-wi-a-----; fi;; lv_size) value=$(($(cat $lv/extents) * ${extentBytes}));; snap_percent) value=50.08;; chunk_size) value=4096;;
          lv_permissions) if [ -e $lv/ro ]; then value=read-only; elif [ -e $lv/inactive ]; then value=unknown; else value=writeable; fi;;
          lv_device_open) if [ -e $lv/open ]; then value=1; else value=0; fi;; *) fail "field $field";; esac
        line="$line\${line:+$between}$value"
      done
      echo "  $line"
    done`,
  lvcreate: `${functions}
    extents= name= marks=
    while [ $# -gt 1 ]; do case $1 in -l) extents=$2; shift 2;; -n) name=$2; shift 2;; --addtag) marks="$marks$2
"; shift 2;; -y|-Wn|-Zn|-ay) shift;; *) fail "unrecognized option $1";; esac; done
    group "$1"
    [ ! -e "$name" ] || fail "Logical Volume \\"$name\\" already exists in volume group \\"VgVm\\""
    [ "$extents" -le "$(extents_free)" ] || fail "Volume group \\"VgVm\\" has insufficient free space ($(extents_free) extents): $extents required."
    mkdir ".$name" && printf %s "$marks" >".$name/tags" && echo $extents >".$name/extents" && cat /proc/sys/kernel/random/uuid >".$name/uuid"
    mkdir -p "$SANDBOX/dev/VgVm"
    # What an earlier volume left where its extents lie.
    head -c $((extents * ${extentBytes})) /dev/zero | tr '\\0' '#' >"$SANDBOX/dev/VgVm/$name"
    mv ".$name" "$name"`,
  lvchange: `${functions}
    add= drop= selection= permission=
    while [ $# -gt 1 ]; do case $1 in -p) permission=$2; shift 2;; --addtag) add="$add $2"; shift 2;; --deltag) drop="$drop $2"; shift 2;; -S) selection=$2; shift 2;; *) shift;; esac; done
    group "$1"; lv=\${1#*/}
    [ -e "$lv" ] && selected "$selection" "$lv" || exit 0
    case $permission in
      r) [ ! -e "$lv/ro" ] || fail "Logical volume \\"VgVm/$lv\\" is already read only."; : >"$lv/ro";;
      rw) rm -f "$lv/ro";;
    esac
    { for one in $add; do echo "$one"; done; cat "$lv/tags"; } | sort -u >"$lv/tags.new"
    for one in $drop; do grep -vxF -e "$one" "$lv/tags.new" >"$lv/tags.less"; mv "$lv/tags.less" "$lv/tags.new"; done
    mv "$lv/tags.new" "$lv/tags"`,
  lvremove: `${functions}
    while [ $# -gt 1 ]; do case $1 in -S) selection=$2; shift 2;; *) shift;; esac; done
    group "$1"; lv=\${1#*/}
    [ -e "$lv" ] && selected "$selection" "$lv" || exit 0
    [ ! -e "$lv/open" ] || fail "Logical volume VgVm/$lv in use."
    rm -f "$SANDBOX/dev/VgVm/$lv"; rm -rf "$lv"`,
  lvrename: `${functions}
    [ "$1" = -y ] && shift
    [ ! -e "$SANDBOX/no-rename" ] || fail "device-mapper: rename ioctl failed"
    group "$1"
    [ -e "$2" ] || fail "Existing logical volume \\"$2\\" not found in volume group \\"VgVm\\""
    [ ! -e "$3" ] || fail "Logical volume \\"$3\\" already exists in volume group \\"VgVm\\""
    mv "$SANDBOX/dev/VgVm/$2" "$SANDBOX/dev/VgVm/$3" && mv "$2" "$3"`,
  // `hands-over`: meanwhile somebody makes all volumes writable.
  udevadm: `[ ! -e "$SANDBOX/hands-over" ] || rm -f "$SANDBOX"/lvm/*/ro`,
  // What is open stays so: nothing is gained by waiting.
  sleep: `PATH=\${PATH#*:} exec sleep 0.02`,
  blockdev: `case $1 in --getss) echo 512;; --getsize64) stat -c %s "$2";; esac`,
  // The machine's folder for temporary files may know no direct I/O.
  dd: `
    for arg; do shift; case $arg in iflag=direct,*) arg=iflag=\${arg#iflag=direct,};; esac; set -- "$@" "$arg"; done
    PATH=\${PATH#*:} exec dd "$@"`,
};
