# shellcheck shell=bash
# What the scripts of this folder share: errors, flags, --dry_run, quoting, the sizes of TPU slices, and the loop that
# starts a trainer again after a crash. Sourced, not run. Written for bash 3.2, which is what macOS has.
# shellcheck disable=SC2034 # Much of it is for the scripts that source this file.

POD_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$POD_DIR/../.." && pwd)

dry_run=
EXTRA=()

# Bad input: one paragraph that names the value, the rule and the way out.
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Something outside went wrong: the cloud, a worker, a trainer.
give_up() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

note() { printf '%s\n' "$*" >&2; }

# The comment at the head of the script that was started.
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

# parse FLAGS SWITCHES ARG...: sets the variable of every --name=value that FLAGS names and of every --name that SWITCHES
# names, and puts what follows a bare -- into EXTRA. Its own variables have names that no flag has.
parse() {
  local _flags=" $1 " _switches=" $2 " _arg _name _value
  shift 2
  while [ $# -gt 0 ]; do
    _arg=$1
    shift
    case $_arg in
      --)
        EXTRA=("$@")
        break
        ;;
      --help)
        usage
        exit 0
        ;;
      --*=*)
        _name=${_arg%%=*}
        _name=${_name#--}
        _value=${_arg#*=}
        [[ $_switches != *" $_name "* ]] || fail "--$_name takes no value, but got '$_value'. Write --$_name alone, or leave it out."
        [[ $_flags == *" $_name "* ]] || unknown_flag "--$_name" "$_flags$_switches"
        no_control "--$_name" "$_value"
        printf -v "$_name" '%s' "$_value"
        ;;
      --*)
        _name=${_arg#--}
        [[ $_flags != *" $_name "* ]] || fail "--$_name needs a value. Write --$_name=VALUE."
        [[ $_switches == *" $_name "* ]] || unknown_flag "$_arg" "$_flags$_switches"
        printf -v "$_name" '%s' 1
        ;;
      *) fail "Unexpected argument '$_arg': everything but the command is a flag here, written --name=value. Try --help." ;;
    esac
  done
}

unknown_flag() {
  local name list=
  for name in $2; do list="$list --$name"; done
  fail "There is no flag $1 here. The flags are$list. Flags of launch.train come after a bare --."
}

no_control() { [[ $2 != *[[:cntrl:]]* ]] || fail "$1 holds a line break or another control character. Write it on one line."; }

# require NAME EXAMPLE ...: every one of these flags was given.
require() {
  while [ $# -gt 0 ]; do
    [ -n "${!1}" ] || fail "--$1 is missing. Give it, for instance --$1=$2."
    shift 2
  done
}

# matches NAME REGEX RULE: the flag, if given, has this form.
matches() { [[ -z ${!1} || ${!1} =~ $2 ]] || fail "--$1=${!1} $3"; }

positive() {
  local name
  for name; do
    [[ ${!name} =~ ^[1-9][0-9]{0,8}$ ]] || fail "--$name=${!name} is no positive whole number. Write it in digits, for instance --$name=4."
  done
}

absolute() { matches "$1" '^/.' "is no absolute path, but every host must find it in the same place. Begin it with /."; }

DNS_LABEL='^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$'
DNS_RULE="is no valid name: up to 40 small letters, digits and '-', a letter first and no '-' at the end. Choose another."
ZONE='^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$'
PROJECT='^[a-z][-a-z0-9.:]{4,61}[a-z0-9]$'
BUCKET='^[a-z0-9][-._a-z0-9]{1,220}[a-z0-9]$'

# check_train_flags: what follows -- is for launch.train, and leaves to the scripts what they set themselves.
check_train_flags() {
  local word config=
  for word in ${EXTRA[@]+"${EXTRA[@]}"}; do
    no_control "A flag of launch.train" "$word"
    case $word in
      --config=?*) config=1 ;;
      --workdir | --workdir=*) fail "$word stands after the --, but the scripts need to know it. Write --workdir=DIR before the --." ;;
      --multihost | --multihost=* | --coordinator=* | --num_processes=* | --process_id=*)
        fail "$word stands after the --, but it follows from the number of hosts and is added here. Leave it out."
        ;;
      --?*) ;;
      *) fail "'$word' stands after the --, but flags of launch.train are written --name=value. Write it so." ;;
    esac
  done
  [ -n "$config" ] || fail "No --config is given. Write the flags of launch.train after a bare --, for instance: -- --config=configs/muxbert.py:base,n=5."
}

# The flags of launch.train, as TRAIN. On one host there is nothing to wait for.
train_flags() {
  TRAIN=("--workdir=$1")
  [ "$2" -eq 1 ] || TRAIN+=(--multihost)
  TRAIN+=(${EXTRA[@]+"${EXTRA[@]}"})
}

# One word as a shell reads it back; quoted only if it needs to be.
quote() {
  if [[ $1 =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
    printf '%s' "$1"
  else
    # shellcheck disable=SC2001 # bash versions differ in how they read a backslash in a replacement.
    printf "'%s'" "$(sed "s/'/'\\\\''/g" <<<"$1")"
  fi
}

# A whole command as a shell reads it back.
quoted() {
  local word separator=
  for word; do
    printf '%s' "$separator"
    quote "$word"
    separator=' '
  done
}

# Runs a command, or with --dry_run prints it.
run() {
  if [ -n "$dry_run" ]; then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Packs the committed source tree into $SOURCE. What is not committed stays here, so that a run can be told from its commit.
pack_source() {
  SOURCE=$ROOT/build/datamux_jax.tar.gz
  if [ -z "$dry_run" ]; then
    git -C "$ROOT" rev-parse --verify --quiet HEAD >/dev/null ||
      fail "$ROOT is no git checkout with a commit, so there is no source tree to copy. Use a clone of the repository."
    [ -z "$(git -C "$ROOT" status --porcelain)" ] || note "Changes that are not committed are not copied."
  fi
  run mkdir -p "$ROOT/build"
  run git -C "$ROOT" archive --format=tar.gz -o "$SOURCE" HEAD
}

# tpu_slice TYPE: sets chips, hosts, chips_per_host and runtime for a type name of Cloud TPU. v4 and v5p are named by
# TensorCores, of which a chip has two; v5litepod and v6e by chips.
tpu_slice() {
  local kind count most way_out="gcloud compute tpus tpu-vm accelerator-types list --zone=ZONE lists what a zone has."
  [[ $1 != v5e-* ]] || fail "--type=$1 does not exist: Cloud TPU calls v5e v5litepod. Write --type=v5litepod-${1#v5e-}."
  [[ $1 =~ ^(v4|v5litepod|v5p|v6e)-([1-9][0-9]{0,4})$ ]] ||
    fail "--type=$1 does not exist: types are v4-CORES, v5litepod-CHIPS, v5p-CORES and v6e-CHIPS, for instance v5litepod-64. $way_out"
  kind=${BASH_REMATCH[1]}
  count=${BASH_REMATCH[2]}
  case $kind in
    v4 | v5p)
      most=8192
      [ "$kind" = v4 ] || most=17920
      case $count in 8 | 16 | 32 | 64) ;; *)
        [ $((count % 128)) -eq 0 ] && [ "$count" -le $most ] ||
          fail "--type=$1 does not exist: $kind comes with 8, 16, 32, 64 or a multiple of 128 TensorCores, at most $most. $way_out"
        ;;
      esac
      chips=$((count / 2))
      chips_per_host=4
      ;;
    *)
      case $count in 1 | 4 | 8 | 16 | 32 | 64 | 128 | 256) ;; *)
        fail "--type=$1 does not exist: $kind comes with 1, 4, 8, 16, 32, 64, 128 or 256 chips. $way_out"
        ;;
      esac
      chips=$count
      chips_per_host=4
      [ "$chips" -gt 8 ] || chips_per_host=$chips
      ;;
  esac
  hosts=$((chips / chips_per_host))
  case $kind in
    v4) runtime=tpu-ubuntu2204-base ;;
    v5litepod) runtime=v2-alpha-tpuv5-lite ;;
    v5p) runtime=v2-alpha-tpuv5 ;;
    v6e) runtime=v2-alpha-tpuv6e ;;
  esac
}

# gke_slice ACCELERATOR TOPOLOGY: sets chips, hosts, chips_per_host, machine and label for a slice in GKE.
gke_slice() {
  local a b c most known=' 1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16 '
  case $1 in
    v4 | v5p)
      [[ $2 =~ ^([1-9][0-9]{0,2})x([1-9][0-9]{0,2})x([1-9][0-9]{0,2})$ ]] ||
        fail "--topology=$2 is no topology of $1: three sizes with x between them. Write it like --topology=4x4x4."
      a=${BASH_REMATCH[1]} b=${BASH_REMATCH[2]} c=${BASH_REMATCH[3]}
      chips=$((a * b * c))
      most=4096
      [ "$1" = v4 ] || most=8960
      case $2 in 2x2x1 | 2x2x2 | 2x2x4 | 2x4x4) ;; *)
        [ $((a % 4 + b % 4 + c % 4)) -eq 0 ] && [ "$a" -le "$b" ] && [ "$b" -le "$c" ] && [ "$chips" -le $most ] ||
          fail "--topology=$2 does not exist for $1: it is 2x2x1, 2x2x2, 2x2x4, 2x4x4, or three multiples of 4 that do not fall from left to right, with a product of at most $most. Choose one of these."
        ;;
      esac
      chips_per_host=4
      ;;
    v5e | v6e)
      [[ $known == *" $2 "* ]] || fail "--topology=$2 does not exist for $1. Choose one of$known"
      chips=$((${2%x*} * ${2#*x}))
      chips_per_host=4
      [ "$chips" -gt 8 ] || chips_per_host=$chips
      ;;
    *) fail "--accelerator=$1 does not exist here. Choose v4, v5e, v5p or v6e." ;;
  esac
  hosts=$((chips / chips_per_host))
  case $1 in
    v4) machine=ct4p-hightpu-4t label=tpu-v4-podslice ;;
    v5e) machine=ct5lp-hightpu-${chips_per_host}t label=tpu-v5-lite-podslice ;;
    v5p) machine=ct5p-hightpu-4t label=tpu-v5p-slice ;;
    v6e) machine=ct6e-standard-${chips_per_host}t label=tpu-v6e-slice ;;
  esac
}

stopping=
child=
forward=1         # Whether a TERM that arrives here is passed on to the trainer.
on_state() { :; } # A script that keeps a record overrides it: on_state running|waiting, with the process in $child.

# Waits for a process although signals interrupt `wait`; returns its exit code.
await() {
  local code=0
  wait "$1" || code=$?
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
  return $code
}

# supervise RESTARTS PAUSE COMMAND...: runs COMMAND and starts it again when it crashes, RESTARTS times in a row at most; a
# crash after an hour of work begins a new count. Returns its last exit code: 0 done, 2 refused, 130 stopped and saved.
supervise() {
  local restarts=$1 pause=$2 crashes=0 began code
  shift 2
  trap 'stopping=1; [ -z "$forward" ] || [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || :' TERM INT
  while :; do
    began=$(date +%s)
    "$@" &
    child=$!
    on_state running
    [ -z "$stopping" ] || [ -z "$forward" ] || kill -TERM "$child" 2>/dev/null || :
    code=0
    await "$child" || code=$?
    child=
    [ "$code" -ne 143 ] || code=130 # Stopped before it could answer to the signal.
    case $code in 0 | 2 | 130) return "$code" ;; esac
    [ -z "$stopping" ] || return "$code"
    [ $(($(date +%s) - began)) -lt 3600 ] || crashes=0
    crashes=$((crashes + 1))
    if [ "$crashes" -gt "$restarts" ]; then
      note "launch/pod: the trainer ended with exit code $code, for the last time."
      return "$code"
    fi
    note "launch/pod: the trainer ended with exit code $code; start $crashes of $restarts follows in $pause seconds."
    sleep "$pause" &
    child=$!
    on_state waiting
    await "$child" || :
    child=
    [ -z "$stopping" ] || return 130
  done
}
