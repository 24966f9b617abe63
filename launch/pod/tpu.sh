#!/usr/bin/env bash
# From nothing to a running training job on a Cloud TPU slice (docs/pods.md explains every step):
#
#   bash launch/pod/tpu.sh COMMAND --name=NAME --zone=ZONE --type=TYPE [--project=PROJECT] [--dry_run] ... [-- TRAIN FLAGS]
#
#   create   asks for the slice and waits until it is there
#            [--version=RUNTIME] [--spot | --reserved] [--valid_for=6h] [--network= --subnetwork= --service_account=] [--poll=30]
#   install  copies the committed source tree to all hosts, installs it, checks that jax sees every chip  [--extras=tpu]
#   mount    mounts a folder that all hosts share  --bucket=BUCKET | --nfs=HOST:/SHARE  [--mount=/mnt/pod]
#   launch   starts training on all hosts  --workdir=DIR [--restarts=3] [--pause=120] -- --config=FILE ...
#   status   what every host does
#   watch    follows the log of a host  [--worker=0] [--lines=50]
#   stop     asks the trainers to save, and waits until they have ended  [--wait=600] [--kill]
#   resume   goes on: asks for a slice again if it was lost, mounts, and launches where nothing runs.
#            Takes the flags of create, install, mount and launch; with --until_done it watches over the job until the end
#   fetch    copies metrics and reports, without checkpoints  --workdir=DIR --to=FOLDER
#   delete   deletes the slice and all that is on its own disks  [--yes]
#
# --dry_run prints the commands that would be run, one a line, and runs nothing. --internal_ip connects from within the same
# network. --type names the slice as Cloud TPU does: v4-32, v5litepod-64, v5p-128, v6e-16.

set -euo pipefail
# shellcheck source=launch/pod/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=
zone=
project=
type=
internal_ip=
version=
spot=
reserved=
valid_for=
network=
subnetwork=
service_account=
poll=30
extras=tpu
bucket=
nfs=
mount=/mnt/pod
workdir=
restarts=3
pause=120
worker=0
lines=50
wait=600
kill=
until_done=
to=
yes=

HOST='datamux_pod/src/launch/pod/host.sh' # Below the home folder of every host.

place() {
  PLACE=("--zone=$zone")
  [ -z "$project" ] || PLACE+=("--project=$project")
  CONNECT=(${internal_ip:+--internal-ip})
}

# on WORKER REMOTE: runs the shell command REMOTE there; all workers run it at the same time.
on() { run gcloud compute tpus tpu-vm ssh "$name" "${PLACE[@]}" ${CONNECT[@]+"${CONNECT[@]}"} "--worker=$1" "--command=$2"; }

copy() { run gcloud compute tpus tpu-vm scp "$1" "$2" "${PLACE[@]}" ${CONNECT[@]+"${CONNECT[@]}"} "--worker=$3"; }

# gcloud stalls, or fails worker by worker, where an ssh agent does not hold its key.
need_agent() {
  [ -z "$dry_run" ] && [ "$hosts" -gt 1 ] || return 0
  ssh-add -l >/dev/null 2>&1 ||
    fail "--type=$type has $hosts hosts, and gcloud reaches several at once only if an ssh agent holds its key. Run: eval \"\$(ssh-agent)\" && ssh-add ~/.ssh/google_compute_engine. If that file does not exist yet, connecting once makes it: gcloud compute tpus tpu-vm ssh $name ${PLACE[*]}"
}

# The state of the request: NONE if there is none. Fails, with gcloud's message, if it cannot be told.
request_state() { described queued-resources 'value(state.state)'; }

node_state() { described tpu-vm 'value(state)'; }

described() {
  local errors out code=0
  errors=$(mktemp)
  out=$(gcloud compute tpus "$1" describe "$name" "${PLACE[@]}" "--format=$2" 2>"$errors") || code=$?
  if [ "$code" -eq 0 ]; then
    echo "$out"
  elif grep -qi 'not.found' "$errors"; then
    echo NONE
    code=0
  else
    cat "$errors" >&2
  fi
  rm -f "$errors"
  return "$code"
}

# none, waiting, ready, stopped or lost. What is lost may be deleted; what somebody stopped may not.
condition() {
  local state
  state=$(request_state) || return 1
  case $state in
    NONE) echo none ;;
    ACTIVE)
      state=$(node_state) || return 1
      case $state in
        READY) echo ready ;;
        NONE | PREEMPTED | TERMINATED | DELETING) echo lost ;;
        STOPPED | STOPPING) echo stopped ;;
        *) echo waiting ;;
      esac
      ;;
    FAILED | SUSPENDED | SUSPENDING | DELETING) echo lost ;;
    *) echo waiting ;;
  esac
}

request() {
  local flags=("--node-id=$name" "--accelerator-type=$type" "--runtime-version=${version:-$runtime}")
  [ -z "$spot" ] || flags+=(--spot)
  [ -z "$reserved" ] || flags+=(--reserved)
  [ -z "$valid_for" ] || flags+=("--valid-until-duration=$valid_for")
  [ -z "$network" ] || flags+=("--network=$network")
  [ -z "$subnetwork" ] || flags+=("--subnetwork=$subnetwork")
  [ -z "$service_account" ] || flags+=("--service-account=$service_account")
  [ -z "$internal_ip" ] || flags+=(--internal-ips)
  run gcloud compute tpus queued-resources create "$name" "${PLACE[@]}" "${flags[@]}" --async
}

# Waits until the request is ACTIVE. A state is printed when it changes.
wait_active() {
  local state last='' began=$SECONDS silent=0
  while :; do
    if state=$(request_state) && [ "$state" != NONE ]; then
      silent=0
      [ "$state" = "$last" ] || echo "$name: $state after $(((SECONDS - began) / 60)) minutes"
      last=$state
      case $state in
        ACTIVE) return ;;
        FAILED | SUSPENDING | SUSPENDED | DELETING)
          give_up "The request for $name is $state and will not become a slice any more. gcloud compute tpus queued-resources describe $name ${PLACE[*]} tells why; then run \`delete\`, and \`create\` again, perhaps in another zone or without --spot."
          ;;
      esac
    else
      # Just made, a request may not be found yet; and a connection may fail for once.
      silent=$((silent + 1))
      [ "$silent" -lt 5 ] || give_up "Nothing was heard of the request for $name five times in a row. Check the connection, --zone and --project; the same command goes on waiting."
    fi
    sleep "$poll"
  done
}

create() {
  local state
  if [ -n "$dry_run" ]; then
    request
    run gcloud compute tpus queued-resources describe "$name" "${PLACE[@]}" '--format=value(state.state)'
    return
  fi
  state=$(request_state) || give_up "gcloud cannot tell whether $name exists; its message is above."
  if [ "$state" = NONE ]; then
    request
  else
    echo "$name was asked for before."
  fi
  wait_active
  echo "$name is ACTIVE: $chips chips on $hosts hosts."
}

install() {
  need_agent
  pack_source
  copy "$SOURCE" "$name:" all
  on all "rm -rf datamux_pod/new && mkdir -p datamux_pod/new && tar -xzf datamux_jax.tar.gz -C datamux_pod/new && bash datamux_pod/new/launch/pod/host.sh install $(quote "--extras=$extras")"
  on all "bash $HOST check --chips=$chips --hosts=$hosts"
}

mount_all() {
  need_agent
  local source
  if [ -n "$bucket" ]; then source=--bucket=$bucket; else source=--nfs=$nfs; fi
  on all "bash $HOST mount $(quoted "$source" "--mount=$mount")"
}

# One line for every host.
statuses() { on all "bash $HOST status" | grep '^status='; }

count() { grep -c "^status=$1 " <<<"$2" || :; }

start() { on all "bash $HOST start $(quoted "--workdir=$workdir" "--hosts=$hosts" "--restarts=$restarts" "--pause=$pause" -- "${EXTRA[@]}")"; }

launch() {
  local found running
  need_agent
  if [ -n "$dry_run" ]; then
    on all "bash $HOST status"
  else
    found=$(statuses) || give_up "The hosts of $name cannot be asked what they do. Is the installation done, and the slice still there?"
    running=$(($(count running "$found") + $(count waiting "$found")))
    [ "$running" -eq 0 ] || give_up "The trainer runs already, on $running of $hosts hosts of $name, and is not started twice. \`watch\` follows it; \`stop\` ends it."
  fi
  start
}

delete_quietly() { run gcloud compute tpus queued-resources delete "$name" "${PLACE[@]}" --force --quiet; }

# Starts what does not run: after a preemption all of it, on a slice that is asked for again.
go_on() {
  local now tries=0 fresh=
  now=$(condition) || give_up "gcloud cannot tell what became of $name; its message is above."
  [ "$now" != stopped ] || give_up "$name was stopped by hand. Start it, and give the same command again: gcloud compute tpus tpu-vm start $name ${PLACE[*]}"
  if [ "$now" = lost ]; then
    echo "$name was lost. It is deleted and asked for again."
    delete_quietly
    while [ "$(request_state)" != NONE ]; do
      tries=$((tries + 1))
      [ "$tries" -lt 60 ] || give_up "$name is still being deleted. Give the same command again later."
      sleep "$poll"
    done
    now=none
  fi
  if [ "$now" = none ]; then request; fi
  if [ "$now" != ready ]; then
    fresh=1
    wait_active
    while now=$(condition) && [ "$now" = waiting ]; do sleep "$poll"; done
    [ "$now" = ready ] || give_up "$name was lost again before anything ran on it. The same command asks for it again."
  fi
  need_agent
  # A slice that was made new has no installation; one that was only started again has no mount.
  if [ -n "$fresh" ] || ! on all "[ -x datamux_pod/venv/bin/python ] && [ -e $HOST ]"; then install; fi
  [ -z "$bucket$nfs" ] || mount_all
  start
}

resume() {
  if [ -n "$dry_run" ]; then
    run gcloud compute tpus queued-resources describe "$name" "${PLACE[@]}" '--format=value(state.state)'
    echo "# Only if the slice was lost:"
    delete_quietly
    request
    install
    echo "# In any case:"
    [ -z "$bucket$nfs" ] || mount_all
    start
  elif [ -n "$until_done" ]; then
    watch_over "$@"
  else
    go_on
  fi
}

# Resumes as often as it takes. Each time is a process of its own, so that a slice that is lost meanwhile ends only that.
watch_over() {
  local arg now found failures=0 code again=()
  for arg; do
    [ "$arg" != --until_done ] || continue
    again+=("$arg")
  done
  while :; do
    code=0
    bash "$POD_DIR/tpu.sh" resume "${again[@]}" || code=$?
    [ "$code" -ne 2 ] || exit 2
    if [ "$code" -ne 0 ]; then
      failures=$((failures + 1))
      [ "$failures" -lt 10 ] || give_up "$name could not be resumed 10 times in a row; the last reason is above. The same command tries again."
      sleep "$poll"
      continue
    fi
    failures=0
    while sleep "$poll"; do
      now=$(condition) || continue
      [ "$now" != waiting ] || continue
      [ "$now" = ready ] || break
      found=$(statuses) || continue
      [ "$(count finished "$found")" -ne "$hosts" ] || { echo "Done: the trainer has finished on all $hosts hosts." && return; }
      [ "$(count stopped "$found")" -eq 0 ] || { echo "The trainer was stopped by hand. The same command goes on." && return; }
      ! grep -q '^status=refused' <<<"$found" || give_up "The trainer refuses its flags or its data; \`watch\` shows why. Correct them, then give the command again."
      ! grep -q '^status=failed' <<<"$found" || give_up "The trainer failed $((restarts + 1)) times in a row; \`watch\` shows why. The same command goes on from the last checkpoint."
      [ $(($(count running "$found") + $(count waiting "$found") + $(count finished "$found"))) -eq "$hosts" ] || break
    done
  done
}

fetch() {
  local packed=$ROOT/build/fetched-$name.tar.gz
  on 0 "tar -C $(quote "$workdir") --exclude=checkpoints -czf datamux_pod/fetched.tar.gz ."
  run mkdir -p "$ROOT/build" "$to"
  copy "$name:datamux_pod/fetched.tar.gz" "$packed" 0
  run tar -xzf "$packed" -C "$to"
}

[ $# -gt 0 ] || fail "No command is given. Commands are create, install, mount, launch, status, watch, stop, resume, fetch and delete; --help explains them."
command=$1
shift
common='name zone project type'
create_flags='version valid_for network subnetwork service_account poll'
case $command in
  create) parse "$common $create_flags" 'spot reserved internal_ip dry_run' "$@" ;;
  install) parse "$common extras" 'internal_ip dry_run' "$@" ;;
  mount) parse "$common bucket nfs mount" 'internal_ip dry_run' "$@" ;;
  launch) parse "$common workdir restarts pause" 'internal_ip dry_run' "$@" ;;
  status) parse "$common" 'internal_ip dry_run' "$@" ;;
  watch) parse "$common worker lines" 'internal_ip dry_run' "$@" ;;
  stop) parse "$common wait" 'kill internal_ip dry_run' "$@" ;;
  resume) parse "$common $create_flags extras bucket nfs mount workdir restarts pause" 'spot reserved internal_ip until_done dry_run' "$@" ;;
  fetch) parse "$common workdir to" 'internal_ip dry_run' "$@" ;;
  delete) parse "$common" 'yes internal_ip dry_run' "$@" ;;
  --help) usage; exit 0 ;;
  *) fail "There is no command $command here. Commands are create, install, mount, launch, status, watch, stop, resume, fetch and delete." ;;
esac

require name muxbert zone us-west4-a
matches name "$DNS_LABEL" "$DNS_RULE"
matches zone "$ZONE" "is no zone. Write it like --zone=us-west4-a."
matches project "$PROJECT" "is no project id. \`gcloud projects list\` shows them."
place
case $command in watch | fetch | delete) ;; *) require type v5litepod-64 ;; esac
[ -z "$type" ] || tpu_slice "$type"
positive poll pause lines wait
matches version '^[a-z0-9][-.a-z0-9]*$' "is no runtime version. gcloud compute tpus tpu-vm versions list --zone=$zone lists them."
matches valid_for '^[1-9][0-9]*[smhd]$' "is no duration. Write a number and s, m, h or d, for instance --valid_for=6h."
matches restarts '^[0-9]{1,4}$' "is no number of restarts. Write it in digits; 0 for none."
matches extras '^[a-z]+(,[a-z]+)*$' "is no list of extras. Write names from setup.cfg with commas between them, for instance --extras=tpu."
matches bucket "$BUCKET" "is no name of a bucket. Write the name alone, without gs:// and without a folder."
matches nfs '^[A-Za-z0-9][-.A-Za-z0-9]*:/.+$' "is no NFS share. Write it as HOST:/SHARE, for instance --nfs=10.0.0.2:/share."
matches worker '^[0-9]{1,4}$' "is no worker. Write its number, from 0."
absolute mount
absolute workdir
[ -z "$spot" ] || [ -z "$reserved" ] || fail "--spot and --reserved exclude each other: a slice comes from a reservation or from what is left over. Give one of them."
[ -z "$bucket" ] || [ -z "$nfs" ] || fail "--bucket and --nfs are both given, but one folder is mounted. Give one of them."
case $command in
  mount) [ -n "$bucket$nfs" ] || fail "Neither --bucket nor --nfs is given. Give what is to be mounted: --bucket=NAME or --nfs=HOST:/SHARE." ;;
  launch | resume)
    require workdir /mnt/pod/runs/muxbert
    check_train_flags
    ;;
  watch) [ -z "$type" ] || [ "$worker" -lt "$hosts" ] || fail "--worker=$worker does not exist: --type=$type has $hosts hosts, from 0 to $((hosts - 1)). Choose one of these." ;;
  fetch) require workdir /mnt/pod/runs/muxbert to fetched ;;
esac
[ "$command" = launch ] || [ "$command" = resume ] || [ ${#EXTRA[@]} -eq 0 ] || fail "'${EXTRA[0]}' stands after a bare --, but only launch and resume take flags of launch.train. Leave it out."

case $command in
  create) create ;;
  install) install ;;
  mount) mount_all ;;
  launch) launch ;;
  status)
    need_agent
    if [ -n "$dry_run" ]; then on all "bash $HOST status"; else statuses; fi
    ;;
  watch) on "$worker" "tail -n $lines -F datamux_pod/train.log" ;;
  stop)
    need_agent
    on all "bash $HOST stop --wait=$wait${kill:+ --kill}"
    ;;
  resume) resume "$@" ;;
  fetch) fetch ;;
  delete) run gcloud compute tpus queued-resources delete "$name" "${PLACE[@]}" --force ${yes:+--quiet} ;;
esac
